"""`--do_predict` writes one row for each row of the test files, in their order, whatever they hold."""

import random
import shutil

import pytest
import torch
from conftest import save_bert
from glue_files import FORMATS, sentence, write_task, write_tsv
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_emd.emd_task_distill import main as distil
from bert_finetune.glue import TASKS
from bert_finetune.run_glue import main as finetune
from bert_finetune.task_kinds import Regression

pytestmark = pytest.mark.training

ODD = [
    "",
    " ",
    '"',
    'she said "good',
    "'",
    "nul\x00byte",
    "good\rfilm",
    "\r",
    "dull\u2028book\u2029",
    "old\x85new\x0ccat",
]
ODD += ["\ufeffcat", "cat " * 100, "naïve 🙂", "\\N", "NA", "nan", "#", ",", "a bad song\r"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A function that gives a model for a task, one that has every answer for some texts."""
    folder = tmp_path_factory.mktemp("classifiers")

    def get(task):
        path = folder / task.name
        if not path.exists():
            save_bert(path, task.kind.output_names, initializer_range=0.5)
            model = AutoModelForSequenceClassification.from_pretrained(path)
            rng, single = random.Random(0), len(task.columns) == 1
            texts = [[sentence(rng)] if single else [sentence(rng), sentence(rng)] for _ in range(20)]
            with torch.no_grad():
                model.classifier.bias -= torch.stack(logits_of(path, texts)).mean(0) - 2.5
            model.save_pretrained(path)
        return path

    return get


def odd_rows(columns, texts, seed):
    """Rows with odd text and without some or all of their fields, good ones between them, and the text of each."""
    rng = random.Random(seed)
    at = [columns.index(name) for name in texts]
    made, read = [], []
    for odd in rng.sample(ODD, len(ODD)):
        for pair in (odd, sentence(rng)), (sentence(rng), odd):
            row = [str(len(made))] * len(columns)
            for position, text in zip(at, pair, strict=False):
                row[position] = text
            made.append(row)
            read.append(pair[: len(at)])
    made += [[], ["7"], made[0][: at[-1]], [*made[-1], "a field", "too many"]]
    read += [("",) * len(at), ("",) * len(at), (*read[0][:-1], ""), read[-1]]
    order = rng.sample(range(len(made)), len(made))
    return [made[k] for k in order], [read[k] for k in order]


@torch.no_grad()
def logits_of(folder, texts):
    """What the model says to one text after another."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = [
        tokenizer(*([part] for part in text), truncation=True, max_length=64, return_tensors="pt") for text in texts
    ]
    return [model(**each).logits[0] for each in inputs]


def predict(script, model, data_dir, out, task="MNLI"):
    option = "--model_name_or_path" if script is finetune else "--student_model"
    options = [option, model, "--task_name", task, "--data_dir", data_dir, "--output_dir", out, "--do_predict"]
    script([str(option) for option in [*options, "--max_seq_length", 64, "--eval_batch_size", 16, "--no_cuda"]])


def read(path):
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [str(k) for k in range(len(lines))]
    return [line.split("\t")[1] for line in lines]


@pytest.mark.parametrize(
    ("script", "name"), [*((finetune, name) for name in TASKS), (distil, "MNLI")], ids=[*TASKS, "distil"]
)
def test_one_row_for_each_input_row_in_order(script, name, classifier, tmp_path, capsys):
    task, expected = TASKS[name], {}
    data = write_task(tmp_path / "data" / name, name)
    for seed, (split, file) in enumerate(task.test.items()):
        header = FORMATS["RTE" if split == "diagnostic" else name][1]
        made, texts = odd_rows(header, task.columns, seed)
        write_tsv(data / file, header, made)
        expected[task.submission[split]] = logits_of(classifier(task), texts)
    predict(script, classifier(task), data, tmp_path / "out", name)
    for file, logits in expected.items():
        given = read(tmp_path / "out" / file)
        if isinstance(task.kind, Regression):
            assert list(map(float, given)) == pytest.approx([value.clip(0, 5).item() for value in logits], abs=1e-3)
        else:
            assert given == [list(task.kind.labels)[values.argmax()] for values in logits]
            assert set(given) == set(task.kind.labels)
    printed = capsys.readouterr().out
    assert printed.count("rows with too few fields kept with empty text") == len(task.test)


@pytest.mark.parametrize("script", [finetune, distil], ids=["finetune", "distil"])
@pytest.mark.parametrize("data_dir", ["glue", "glue/MNLI", "glue/MNLI/"])
def test_the_diagnostic_set_is_found(script, data_dir, classifier, tmp_path, monkeypatch):
    write_task(tmp_path / "glue" / "MNLI", "MNLI")
    monkeypatch.chdir(tmp_path)
    predict(script, classifier(TASKS["MNLI"]), data_dir, "out")
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
        assert len(read(tmp_path / "out" / name)) == 6


@pytest.mark.parametrize("script", [finetune, distil], ids=["finetune", "distil"])
def test_only_the_diagnostic_set_may_be_missing(script, classifier, tmp_path, capsys, exits_with_2):
    data = write_task(tmp_path / "data" / "MNLI", "MNLI")
    shutil.rmtree(tmp_path / "data" / "diagnostic")
    predict(script, classifier(TASKS["MNLI"]), data, tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "AX.tsv" in line]
    assert len(lines) == 1
    assert "no ../diagnostic/diagnostic.tsv as seen from the MNLI folder: AX.tsv is not written" in lines[0]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tsv")) == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    (data / "test_mismatched.tsv").unlink()
    line = exits_with_2(lambda argv: predict(script, classifier(TASKS["MNLI"]), data, tmp_path / "out"))
    assert "test_mismatched.tsv: no such file" in line
