import json
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import SHARED
from datasets import Dataset
from glue_files import FORMATS, rows, write_task, write_tsv
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from bert_finetune.data import load_split, tokenize
from bert_finetune.errors import InputError
from bert_finetune.glue import TASKS, get_task
from bert_finetune.tables import read_tsv
from bert_finetune.task_kinds import Regression

GLUE = SHARED / "glue_data"
# REFERENCE: rows without header, train/dev/test, of the official files that may lie beside the repository.
OFFICIAL_ROWS = {
    "CoLA": (8551, 1043, 1063),
    "MRPC": (3668, 408, 1725),
    "STS-B": (5749, 1500, 1379),
    "QNLI": (None, 5463, 5463),
    "RTE": (2490, 277, 3000),
    "WNLI": (635, 71, 146),
}


def test_task_names_in_any_spelling():
    assert get_task("stsb") is get_task("STS-B") is TASKS["STS-B"]
    assert get_task("sst-2") is TASKS["SST-2"]
    with pytest.raises(InputError, match="--task_name FOO: no such task; choose one of CoLA"):
        get_task("FOO")


@pytest.mark.parametrize("name", list(FORMATS))
def test_made_up_files_of_every_task(name, tmp_path):
    task = get_task(name)
    folder = write_task(tmp_path / name, name, train=7, dev=5, test=4)
    train = load_split(task, folder / task.train, "train")
    assert len(train) == 7
    assert train.column_names == [*["text_a", "text_b"][: len(task.columns)], "label"]
    expected = rows(name, "train", 7)
    header = FORMATS[name][0] or ["source", "label", "mark", "sentence"]
    for row, example in zip(expected, train, strict=True):
        for column, text in zip(task.columns, ("text_a", "text_b"), strict=False):
            assert example[text] == row[header.index(column)]
        label = row[header.index(task.label_column)]
        assert example["label"] == (
            float(label) if isinstance(task.kind, Regression) else [*task.kind.labels].index(label)
        )
    assert (len(task.dev), len(task.test)) == ((2, 3) if name == "MNLI" else (1, 1))
    for file in task.dev.values():
        assert len(load_split(task, folder / file, "dev")) == 5
    for file in task.test.values():
        test = load_split(task, folder / file, "test")
        assert len(test) == 4
        assert "label" not in test.column_names


@pytest.mark.skipif(not GLUE.exists(), reason="the official files are not here")
@pytest.mark.parametrize("name", list(OFFICIAL_ROWS))
def test_official_row_counts(name):
    task = get_task(name)
    for (split, file), count in zip(
        (("train", "train.tsv"), ("dev", "dev.tsv"), ("test", "test.tsv")), OFFICIAL_ROWS[name], strict=True
    ):
        if count is not None:
            assert len(load_split(task, GLUE / name / file, split)) == count


@pytest.mark.skipif(not GLUE.exists(), reason="the official files are not here")
def test_official_samples():
    mnli = load_split(get_task("MNLI"), GLUE / "samples/MNLI/dev_matched.reconstructed.tsv", "dev")
    assert len(mnli) == 9815
    assert sorted(set(mnli["label"])) == [0, 1, 2]
    qqp = load_split(get_task("QQP"), GLUE / "samples/QQP/dev.tsv", "dev")
    assert qqp[0]["text_a"] == "Why are African-Americans so beautiful?"


def test_text_is_read_exactly(tmp_path):
    odd = [
        '"quoted',
        'say "hi"',
        "a\u2028b\u2029c\x85d",
        "tail\rmiddle",
        "nul\x00byte",
        "word " * 10_000,
        "",
        "naïve 🙂",
    ]
    write_tsv(tmp_path / "a.tsv", ["sentence", "label"], [[text, "1"] for text in odd])
    assert load_split(get_task("SST-2"), tmp_path / "a.tsv", "train")["text_a"][:] == odd


def test_windows_line_ends_byte_order_mark_and_no_final_newline(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\ngood\t1\r\nbad\t0")
    data = load_split(get_task("SST-2"), tmp_path / "a.tsv", "dev")
    assert data["text_a"][:] == ["good", "bad"]
    assert data["label"][:] == [1, 0]


FIELD = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), max_size=12).map(
    lambda text: text.removesuffix("\r").removeprefix("\ufeff")
)


@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=8))
def test_no_row_is_lost_split_or_joined(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    write_tsv(path, ["x", "y"], [list(pair) for pair in fields])
    assert read_tsv(path).rows == [list(pair) for pair in fields]


def test_short_rows(tmp_path, capsys):
    def file(name, task_rows, header):
        write_tsv(tmp_path / name, header, task_rows)
        return tmp_path / name

    header, test_header, _ = FORMATS["QQP"]
    good, short = rows("QQP", "train", 2), ["7", "8"]
    train = file("train.tsv", [good[0], short, good[1]], header)
    assert len(load_split(get_task("QQP"), train, "train")) == 2
    assert "1 rows with too few fields left out (lines 3)" in capsys.readouterr().out

    test_rows = rows("QQP", "test", 2)
    test = file("test.tsv", [test_rows[0], short, test_rows[1]], test_header)
    kept = load_split(get_task("QQP"), test, "test")
    assert (len(kept), kept[1]["text_a"], kept[1]["text_b"]) == (3, "8", "")
    assert "1 rows with too few fields kept with empty text (lines 3)" in capsys.readouterr().out

    rte = file("rte.tsv", [["0", "one sentence"]], FORMATS["RTE"][0])
    with pytest.raises(InputError, match=r"rte\.tsv, line 2: 2 tab-separated fields where 4 are needed"):
        load_split(get_task("RTE"), rte, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "holds no row of data"),
        (b"sentence\tlabel\n", "holds no row of data"),
        (b"text\tlabel\ngood\t1\n", "no column 'sentence'; its columns are text, label"),
        (b"sentence\tlabel\ngood\t1\nbad\t7\n", "line 3: label '7' is not one of SST-2's: 0, 1"),
        (b"sentence\tlabel\ngood\t1\nb\xff\t0\n", "line 3: not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_split(get_task("SST-2"), path, "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("score", ["nan", "5.1", "-1", "high", "inf"])
def test_scores_outside_the_range(tmp_path, score):
    row = rows("STS-B", "train", 1)[0]
    write_tsv(tmp_path / "a.tsv", FORMATS["STS-B"][0], [[*row[:-1], score]])
    with pytest.raises(InputError, match=f"line 2: '{score}' is not a score between 0 and 5"):
        load_split(get_task("STS-B"), tmp_path / "a.tsv", "train")


def _check_features(path: Path, vocabulary: Path):
    tokenizer, alike = BertTokenizer.from_pretrained(vocabulary), defaultdict(list)
    for case in json.loads(path.read_text()):
        alike[case["max_seq_length"], case["text_b"] is not None].append(case)
    for (length, pairs), cases in alike.items():
        texts = {name: [case[name] for case in cases] for name in ("text_a", *["text_b"] * pairs)}
        for features, case in zip(tokenize(Dataset.from_dict(texts), tokenizer, length), cases, strict=True):
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                assert features[name] + [0] * (length - len(features[name])) == case[name], (name, case)


# The packaged model has the vocabulary of bert-base-uncased.


@pytest.mark.slow
def test_golden_features(packaged_model):
    _check_features(Path(__file__).parent / "golden" / "features.json", packaged_model)


@pytest.mark.slow
def test_golden_features_of_glue_text(packaged_model):
    path = SHARED / "golden" / "features_glue.json"
    if not path.exists():
        pytest.skip("the GLUE text is not here")
    _check_features(path, packaged_model)


def test_odd_total_leaves_the_extra_token_to_the_first(pretrained):
    tokenizer = BertTokenizer.from_pretrained(pretrained)
    data = Dataset.from_dict({"text_a": ["cat " * 9], "text_b": ["dog " * 9], "label": [1]})
    features = tokenize(data, tokenizer, 10)[0]
    assert features["token_type_ids"] == [0] * 6 + [1] * 4  # [CLS] + 4 + [SEP], 3 + [SEP]
    assert features["labels"] == 1
    with pytest.raises(InputError, match="--max_seq_length 4 leaves no room"):
        tokenize(data, tokenizer, 4)


def test_the_tokenizer_file_s_own_truncation_is_not_used(pretrained):
    tokenizer = BertTokenizer.from_pretrained(pretrained)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    features = tokenize(Dataset.from_dict({"text_a": ["cat " * 9]}), tokenizer, 20)[0]
    assert len(features["input_ids"]) == 11
