"""bert_emd/augment_data.py: which words are replaced by what, what rows are written, and that a cut run goes on."""

import csv
import json
import re
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import SPECIAL
from glue_files import FORMATS, WORDS, write_task
from mishaps import dies, snapshot
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from bert_emd import augmentation
from bert_emd.augment_data import main
from bert_emd.augmentation import COPIES, Candidates, Slot, copies_of, in_case_of, words_of
from bert_emd.candidates import MaskedLM, Word, WordVectors, places_of, windows
from bert_finetune.checkpoints import load_tokenizer
from bert_finetune.data import GlueFiles
from bert_finetune.glue import get_task
from bert_finetune.tables import read_table

# So that "catdog" and "songs" have two pieces.
VOCABULARY = [*SPECIAL, *WORDS, "##dog", "##s", "(", ")", '"', "'"]
TEXTS = ["The cat sees a small dog .", "(catdog sleeps)", "bird", "A good film, a bad book and a dull song today !"]


def shape(vocabulary, positions=64):
    return {"vocab_size": vocabulary, "num_hidden_layers": 2, "max_position_embeddings": positions}


def save_bert(folder, positions=64):
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48}
    config = BertConfig(**shape(len(VOCABULARY), positions), **sizes)
    return save(folder, BertForMaskedLM(config), tokenizer)


def save(folder, model, tokenizer):
    # Weights that are far from each other, so that no order hangs on a rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_distilbert(folder):
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=24, n_layers=2, n_heads=3, hidden_dim=48, max_position_embeddings=64
    )
    return save(folder, DistilBertForMaskedLM(config), tokenizer)


def save_roberta(folder):
    learner = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator([" ".join(WORDS)] * 5, vocab_size=500, min_frequency=1, special_tokens=specials)
    learner.save_model(str(folder))
    tokenizer = RobertaTokenizer.from_pretrained(folder, mask_token=AddedToken("<mask>", lstrip=True))
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "type_vocab_size": 1}
    config = RobertaConfig(**shape(len(tokenizer), 66), **sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return save(folder, RobertaForMaskedLM(config), tokenizer)


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert_emd.candidates.has_bf16", lambda use_cpu: False)
        yield


@pytest.fixture(scope="module", params=[save_bert, save_distilbert, save_roberta])
def any_model(request, tmp_path_factory):
    torch.manual_seed(0)
    return request.param(tmp_path_factory.mktemp("masked_lm"))


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    torch.manual_seed(0)
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A file in GloVe's format, with all words of the made-up tasks, punctuation too."""
    path = tmp_path_factory.mktemp("vectors") / "glove.txt"
    rng = np.random.default_rng(0)
    lines = [" ".join([word, *map("{:.4f}".format, rng.normal(size=8))]) for word in [*WORDS, "NASA", ". . ."]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_words_that_may_be_replaced():
    def found(text):
        words = words_of(text)
        assert all(text[word.start : word.end] == word.text for word in words)
        return [word.text for word in words]

    assert found("The Film is NOT a good-looking one.") == ["Film", "good", "looking"]
    assert found("it 's x2 and 3rd don't I'll dogs' café_x 42 y") == []
    assert found("„Größe“ (déjà vu), naïve\tword\n") == ["Größe", "déjà", "vu", "naïve", "word"]
    assert found("यह हिन्दी है, de\u0301ja\u0300 vu à̀ e\u0301") == ["यह", "हिन्दी", "de\u0301ja\u0300", "vu"]
    assert found("") == []


def by_hand(folder, text, word, alone=False):
    """What the model says at the place of a word, its order of the whole vocabulary; other words hidden unless
    `alone`."""
    lm, tokenizer = MaskedLM.load(folder, 5), load_tokenizer(folder, "")
    hidden = text
    for other in reversed(words_of(text)):
        if not alone or other == word:
            hidden = hidden[: other.start] + tokenizer.mask_token + hidden[other.end :]
    inputs = tokenizer(" " + hidden, " " + text, return_tensors="pt")
    places = [k for k, piece in enumerate(inputs["input_ids"][0].tolist()) if piece == tokenizer.mask_token_id]
    place = places[0 if alone else words_of(text).index(word)]
    with torch.no_grad():
        order = lm.model(**inputs).logits[0, place].argsort(descending=True).tolist()
    return [tokenizer.decode([piece]).strip() for piece in order], order


def test_candidates_are_the_model_s(any_model):
    """All at once, each the most likely whole words, as the whole model has them at that place; batches change none."""
    lm = MaskedLM.load(any_model, 5)
    roberta = lm.model.config.model_type == "roberta"
    slots = Candidates(lm, None).slots(TEXTS)
    assert slots == Candidates(MaskedLM.load(any_model, 5, 1), None).slots(TEXTS)
    tokenizer = load_tokenizer(any_model, "")
    for text in TEXTS:
        assert [slot.word for slot in slots[text]] == words_of(text)
        for slot in slots[text]:
            texts, order = by_hand(any_model, text, slot.word)
            tokens = tokenizer.convert_ids_to_tokens(order)
            whole = [bool(re.fullmatch("Ġ[A-Za-z]+" if roberta else "[a-z]+", token)) for token in tokens]
            wanted = [found for found, is_word in zip(texts, whole, strict=True) if is_word]
            wanted = [found for found in wanted if found != slot.word.text.lower()][:5]
            assert slot.candidates == in_case_of(slot.word.text, wanted), (text, slot)


def test_faithful_candidates(masked_lm):
    """A pass for each word, its own piece and punctuation among the candidates; a word of several pieces stays."""
    lm = MaskedLM.load(masked_lm, 20, 100, True)
    (text,) = texts = ["a good film , catdog sleeps"]
    slots = Candidates(lm, None, faithful=True).slots(texts)[text]
    assert [slot.word.text for slot in slots] == ["good", "film", "sleeps"]
    found = []
    for slot in slots:
        texts, _ = by_hand(masked_lm, text, slot.word, alone=True)
        assert slot.candidates == [found for found in texts[:20] if not found.startswith("##")]
        found += slot.candidates
    assert set(found) & {".", ",", "?", "[SEP]", "[PAD]"} and set(found) & {"good", "film", "sleeps"}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_hundred_sentences_a_pass(masked_lm, bf16, monkeypatch):
    """And the head sees nothing but the masks. Sentence by sentence the same is found, in bfloat16 mostly."""
    texts = [f"{first} {second} film" for first in WORDS[5:20] for second in WORDS[5:22]]
    precise = Candidates(MaskedLM.load(masked_lm, 5, 1), None).slots(texts)
    monkeypatch.setattr("bert_emd.candidates.has_bf16", lambda use_cpu: bf16)
    lm, passes = MaskedLM.load(masked_lm, 5), []
    lm.model.register_forward_hook(
        lambda module, args, inputs, output: passes.append((len(inputs["input_ids"]), output.logits)), with_kwargs=True
    )
    found = Candidates(lm, None).slots(texts)
    assert [size for size, _ in passes] == [100, 100, 55]
    assert sum(logits.shape[1] for _, logits in passes) == sum(map(len, map(words_of, texts)))
    assert {(logits.shape[0], logits.dtype) for _, logits in passes} == {(1, torch.bfloat16 if bf16 else torch.float32)}
    pairs = [(a.candidates, b.candidates) for text in texts for a, b in zip(found[text], precise[text], strict=True)]
    shared = sum(len(set(ours) & set(theirs)) for ours, theirs in pairs) / sum(len(theirs) for _, theirs in pairs)
    assert shared > 0.9 if bf16 else found == precise


def test_a_word_with_marks_is_one_word(masked_lm):
    """Also for a tokenizer that leaves the marks out."""
    (text,) = texts = ["the go\u0301od film"]
    slots = Candidates(MaskedLM.load(masked_lm, 100), None).slots(texts)[text]
    assert [slot.word.text for slot in slots] == ["go\u0301od", "film"]
    assert "good" not in slots[0].candidates and "good" in slots[1].candidates


@pytest.mark.parametrize("faithful", [False, True])
def test_a_padded_vocabulary(faithful, masked_lm, tmp_path):
    """A model with more outputs than its tokenizer has pieces, and more candidates asked for than there are."""
    model = BertForMaskedLM.from_pretrained(masked_lm)
    model.resize_token_embeddings(len(VOCABULARY) + 11)
    save(tmp_path, model, load_tokenizer(masked_lm, ""))
    (text,) = texts = ["good film"]
    slots = Candidates(MaskedLM.load(str(tmp_path), 1000, 100, faithful), None, faithful).slots(texts)
    for slot in slots[text]:
        if faithful:
            assert sorted(slot.candidates) == sorted(piece for piece in VOCABULARY if not piece.startswith("##"))
        else:
            assert {*slot.candidates} == {word for word in WORDS if word.isalpha()} - {slot.word.text}


def test_a_text_longer_than_the_model(tmp_path):
    """In parts; none of its words is left out, and none of the parts is too long."""
    torch.manual_seed(0)
    lm = MaskedLM.load(save_bert(tmp_path, positions=27), 5)
    assert lm.room == 12
    text = f"bird {'the ' * 30} cat (dog) {'film song book ' * 9} {'a , ' * 9} house catdog"
    words = words_of(text)
    slots = Candidates(lm, None).slots([text])[text]
    assert [slot.word for slot in slots] == words and len(words) == 32
    pieces = lm.split([text])[0]
    parts = list(windows(pieces.ids, places_of(words, pieces), lm.room))
    assert max(len(part) for part, _ in parts) == 12
    tokenizer = load_tokenizer(str(tmp_path), "")
    shown = [tokenizer.decode(part[place.first : place.end]) for part, places in parts for place in places]
    assert shown == [word.text for word in words]
    assert all(len(places) > 1 for _, places in parts[2:-1])


def test_nearest_by_word_vectors(tmp_path):
    words = ["good", "Good", "fine", "bad", "NASA"]
    angles = torch.tensor([0.0, 0.01, 0.2, 0.5, 1.5])
    vectors = WordVectors(words, torch.stack([angles.cos(), angles.sin()], dim=1) * torch.rand(5, 1), count=2)
    assert vectors.nearest(["good", "BAD", "bad", "NASA", "none"]) == {
        "good": ["fine", "bad"],
        "BAD": ["fine", "Good"],
        "bad": ["fine", "Good"],
        "NASA": ["bad", "fine"],
        "none": [],
    }
    assert in_case_of("Bad", ["fine", "Good", "good", "NASA"]) == ["Fine", "Good", "NASA"]
    assert in_case_of("BAD", ["fine"]) == ["FINE"] and in_case_of("bad", ["fine", "NASA"]) == ["fine", "NASA"]


def test_vectors_of_a_file_and_of_a_model(masked_lm, vectors, tmp_path):
    of_file = WordVectors.load(str(vectors), 15)
    assert set(of_file.words) == {word for word in WORDS if word.isalpha()} | {"NASA"}
    (tmp_path / "fasttext.vec").write_text(f"{len(WORDS)} 8\n{vectors.read_text()}")
    assert WordVectors.load(str(tmp_path / "fasttext.vec"), 15).digest == of_file.digest
    of_model = WordVectors.load(masked_lm, 3)
    assert set(of_model.words) == {word for word in WORDS if word.isalpha()}  # no ##dog, no [MASK]
    table = BertForMaskedLM.from_pretrained(masked_lm).get_input_embeddings().weight.detach()
    cosines = torch.cosine_similarity(table[VOCABULARY.index("film")], table, dim=1)
    order = [VOCABULARY[k] for k in cosines.argsort(descending=True)]
    assert of_model.nearest(["film"])["film"] == [word for word in order if word in of_model.words][1:4]


def test_which_words_vectors_serve(masked_lm, vectors, tmp_path):
    """With a model those of several pieces, as far as they have them."""
    (tmp_path / "few.txt").write_text("songs 1 0\nsong 1 0.1\ncat 0 1\nbirds 0.1 1\nbird 0 1\n")
    few, lm = WordVectors.load(str(tmp_path / "few.txt"), 1), MaskedLM.load(masked_lm, 3)
    text = "cat songs birds dogs"
    alone, both = (Candidates(lm, used).slots([text])[text] for used in (None, few))
    assert [len(slot.candidates) for slot in alone] == [3] * 4
    assert [slot.candidates for slot in both[1:3]] == [["song"], ["cat"]]
    assert len(both[0].candidates) == len(both[3].candidates) == 3
    without = Candidates(None, few).slots([text])[text]
    assert [slot.word.text for slot in without] == ["cat", "songs", "birds"]


SLOTS = {
    "good film": [Slot(Word(0, 4, "good"), ["fine", "bad"]), Slot(Word(5, 9, "film"), ["song"])],
    "my dog": [Slot(Word(3, 6, "dog"), ["cat"])],
    "of it": [],
}


def test_copies_of_a_text():
    def draw(text, count=400, probability=0.4, seed=1):
        return [copy for (copy,) in copies_of((text,), SLOTS, count, probability, np.random.default_rng(seed))]

    assert draw("good film")[0] == "good film"
    assert sorted(draw("good film")) == sorted(
        f"{first} {second}" for first in ("good", "fine", "bad") for second in ("film", "song")
    )
    assert draw("of it") == ["of it"]
    assert set(draw("good film", probability=1)[1:]) == {"fine song", "bad song"}
    counted = augmentation.varied("my dog", SLOTS["my dog"], 10_000, 0.4, np.random.default_rng(0))
    assert counted.count("my cat") == pytest.approx(4000, abs=200)


def test_copies_of_a_pair():
    pair = ("good film", "my dog")
    both = copies_of(pair, SLOTS, 400, 0.4, np.random.default_rng(0))
    assert both[0] == pair and len(both) == len(set(both)) == 6 * 2  # every combination
    assert len(copies_of(pair, SLOTS, 3, 0.4, np.random.default_rng(0))) <= 4
    theirs = copies_of(pair, SLOTS, 400, 0.4, np.random.default_rng(0), faithful=True)
    assert [second for _, second in theirs] == ["my dog"] * 6 + ["my cat"]
    assert theirs[-1][0] == theirs[-2][0] != "good film"


@pytest.fixture
def augment(vectors, capsys):
    """Runs the script, on the word vectors alone where no model is named; returns what it prints."""

    def run(*argv):
        argv = list(map(str, argv))
        main(argv if "--masked_lm" in argv else [*argv, "--word_vectors", str(vectors)])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", FORMATS)
def test_the_official_format(name, augment, tmp_path):
    """Each row comes with copies that differ in some words of its texts alone, and is read as it was."""
    write_task(tmp_path / name, name, train=6)
    train, out, task = tmp_path / name / "train.tsv", tmp_path / "aug.tsv", get_task(name)
    lines = train.read_text(encoding="utf-8").replace("\ta ", '\t"A  good" ').replace(" ,", "\x85,")
    train.write_text(lines, encoding="utf-8", newline="")
    said = augment("--task_name", name, "--data_dir", tmp_path, "--output", out)
    before, after = (GlueFiles(task).read(path) for path in (train, out))
    assert after.columns == before.columns
    texts = [before.column(column) for column in task.columns]

    def frame(row):
        return [re.sub(r"[^\W\d_]+", "_", field) if k in texts else field for k, field in enumerate(row)]

    rows = iter(after.rows)
    row = next(rows)
    for original in before.rows:
        assert row == original
        copies = []
        while (row := next(rows, None)) is not None and row not in before.rows:
            copies.append(row)
        assert all(frame(copy) == frame(original) and copy != original for copy in copies)
        assert 1 <= len(copies) == len({tuple(copy) for copy in copies}) <= COPIES[name]
    assert row is None
    assert f"{len(after.rows)} rows, made of 6; " in said and "sentences a second" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [name, out.name, *(["diagnostic"] * (name == "MNLI"))]
    )


ODD = ['the "good" dog', "good dog,\nbad\rcat\r", "a\tcat; sees", "", "  the song ", "dogs' café \u2028 bird"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("source", [".csv", ".jsonl"])
def test_own_files(source, ending, augment, tmp_path):
    rows = [{"id": k, "a": text, "b": ODD[-k], "answer": "x\ny" if k % 2 else None} for k, text in enumerate(ODD)]
    path, out = tmp_path / f"train{source}", tmp_path / f"out{ending}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if source == ".csv":
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    augment("--train_file", path, "--text_column", "a,b", "--label_column", "answer", "--output", out, "--copies", 4)
    table = read_table(out)
    assert table.columns == ("id", "a", "b", "answer")
    made = [[table.text(k, column) or "" for column in range(4)] for k in range(len(table.rows))]
    wanted = [[str(row["id"]), row["a"], row["b"], row["answer"] or ""] for row in rows]
    assert [row for row in made if row in wanted] == wanted
    for k, row in enumerate(wanted):
        mine = [copy for copy in made if copy[0] == str(k)]
        assert mine[0] == row and len(mine) <= 5 and all(copy[3] == row[3] for copy in mine)
    assert len(made) > len(rows)


def test_own_files_in_plain_text_and_tsv(augment, exits_with_2, vectors, tmp_path):
    (tmp_path / "more.txt").write_text("a good dog\n\nthe dull film\n")
    (tmp_path / "1.tsv").write_text('sentence\tlabel\n"good\tx\ndog\n')
    (tmp_path / "2.tsv").write_text("sentence\tlabel\nfilm\ty\n")
    augment("--train_file", tmp_path / "more.txt", "--output", tmp_path / "more.csv", "--copies", 1, "--probability", 1)
    assert [len(row) for row in read_table(tmp_path / "more.csv").rows] == [1] * 4
    augment("--train_file", tmp_path / "*.tsv", "--output", tmp_path / "out.tsv", "--copies", 1, "--probability", 1)
    table = read_table(tmp_path / "out.tsv")
    assert table.rows[::2] == [['"good', "x"], ["dog", ""], ["film", "y"]] and len(table.rows) == 6
    assert [row[1] for row in table.rows] == ["x", "x", "", "", "y", "y"]
    (tmp_path / "tab.csv").write_text('sentence,label\n"a\tb",x\n')
    line = exits_with_2(
        main, "--train_file", tmp_path / "tab.csv", "--word_vectors", vectors, "--output", tmp_path / "tab.tsv"
    )
    assert "tab.csv, line 2: column 'sentence' has a tab" in line and ".csv or .jsonl" in line


def test_a_model_s_rows_by_seed(masked_lm, augment, tmp_path):
    """The same command writes the same bytes, whatever the batches; faithful pairs come in TinyBERT's order."""
    write_task(tmp_path / "RTE", "RTE", train=5)
    command = ["--task_name", "RTE", "--data_dir", tmp_path, "--masked_lm", masked_lm, "--copies", 6]
    written = []
    for k, more in enumerate(([], ["--batch_size", 2], ["--seed", 7], ["--faithful"])):
        augment(*command, *more, "--output", tmp_path / f"{k}.tsv")
        written.append((tmp_path / f"{k}.tsv").read_bytes())
    assert written[0] == written[1] and len(set(written)) == 3
    rows = [line.split("\t") for line in written[3].decode().split("\n")[1:-1]]
    steps = [(a[1] != b[1], a[2] != b[2]) for a, b in pairwise(rows) if a[0] == b[0]]
    assert steps.count((True, True)) == 0 and steps.count((True, False)) > 5 < steps.count((False, True))
    independent = [line.split("\t") for line in written[0].decode().split("\n")[1:-1]]
    assert any(a[1] != b[1] and a[2] != b[2] for a, b in pairwise(independent) if a[0] == b[0])


def test_a_cut_run_goes_on(augment, vectors, tmp_path, monkeypatch, capsys):
    """Wherever it is killed, what is written in the end is the same, and nothing is left beside it."""
    monkeypatch.setattr(augmentation, "CHUNK", 2)
    write_task(tmp_path / "RTE", "RTE", train=7)
    command = ["--task_name", "RTE", "--data_dir", tmp_path, "--word_vectors", vectors, "--output"]
    augment(*command, tmp_path / "whole.tsv")
    whole = (tmp_path / "whole.tsv").read_bytes()
    argv = [*map(str, command), str(tmp_path / "cut.tsv")]
    for rename in range(6):  # the header, four chunks, and the file's own name
        assert dies(lambda: main(argv), rename=rename)
        with open(tmp_path / "cut.tsv.part", "ab") as file:
            file.write(b"half a ro")
        said = augment(*argv)
        assert ("goes on after" in said) == (rename > 0)
        if rename > 1:
            assert f"goes on after {min(2 * (rename - 1), 7)} rows" in said
        assert (tmp_path / "cut.tsv").read_bytes() == whole
        assert not list(tmp_path.glob("*.part*"))
        (tmp_path / "cut.tsv").unlink()
    assert dies(lambda: main(argv), rename=3)
    said = augment(*argv, "--copies", 2)
    assert "cut.tsv.part: is of other options or data; begun anew" in said
    other = (tmp_path / "cut.tsv").read_bytes()
    augment(*command, tmp_path / "other.tsv", "--copies", 2)
    assert other == (tmp_path / "other.tsv").read_bytes() != whole


def test_a_cut_run_goes_on_with_its_own_parts_alone(augment, tmp_path):
    """Not with those of another command, which was cut before it told of any."""
    (tmp_path / "train.jsonl").write_text('{"text": "a good dog"}\n')
    command = ["--train_file", tmp_path / "train.jsonl", "--output", tmp_path / "a.jsonl", "--probability", 1]
    argv = [*map(str, command), "--copies"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "rename", lambda *paths: sys.exit(3))
        with pytest.raises(SystemExit, match="3"):
            augment(*argv, 1)
        patch.setattr(augmentation, "write_json", lambda *told: sys.exit(4))
        with pytest.raises(SystemExit, match="4"):
            augment(*argv, 9)
    augment(*argv, 1)
    assert (tmp_path / "a.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("change", ["", "batch", "precision", "tokenizer"])
def test_a_cut_run_of_a_model(change, masked_lm, augment, tmp_path, monkeypatch):
    """Goes on where the model would give just the same answers."""
    write_task(tmp_path / "RTE", "RTE", train=3)
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    command = ["--task_name", "RTE", "--data_dir", tmp_path, "--output", tmp_path / "a.tsv", "--masked_lm", folder]
    with monkeypatch.context() as patch:
        patch.setattr(augmentation, "rename", lambda *paths: sys.exit(3))
        with pytest.raises(SystemExit, match="3"):
            augment(*command)
    if change == "precision":
        monkeypatch.setattr("bert_emd.candidates.has_bf16", lambda use_cpu: True)
    elif change == "tokenizer":
        vocabulary = {word: k for k, word in enumerate(VOCABULARY)}
        BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    said = augment(*command, *(["--batch_size", 2] if change == "batch" else []))
    assert ("begun anew" if change else "goes on after 3 rows") in said


def test_interrupted(vectors, glue_dir, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(augmentation, "copies_of", interrupt)
    command = ["--task_name", "RTE", "--data_dir", glue_dir, "--word_vectors", vectors, "--output", tmp_path / "a.tsv"]
    with pytest.raises(SystemExit, match="130"):
        main(list(map(str, command)))
    assert "the same command goes on from here" in capsys.readouterr().err


def test_bad_options(exits_with_2, masked_lm, vectors, glue_dir, tmp_path):
    rte = ("--task_name", "RTE", "--data_dir", glue_dir)

    def said(*more, task=rte, out="a.tsv", words=("--word_vectors", vectors)):
        return exits_with_2(main, *task, *words, "--output", tmp_path / out, *more)

    assert "give --masked_lm" in said(words=())
    assert "give --task_name with --data_dir, or --train_file" in said(task=())
    assert "--data_dir is missing" in said(task=("--task_name", "RTE"))
    assert "must end in .tsv" in said(out="a.csv")
    assert "must end in .tsv or .csv or .jsonl" in said(task=("--train_file", "x.csv"), out="a.txt")
    for option, value in (("copies", 0), ("candidates", 0), ("batch_size", 0), ("seed", -1), ("probability", 0)):
        assert f"--{option} {value}" in said(f"--{option}", value)
    (tmp_path / "a.tsv").write_text("mine")
    assert "is there already" in said()
    assert (tmp_path / "a.tsv").read_text() == "mine"
    main(list(map(str, [*rte, "--word_vectors", vectors, "--output", tmp_path / "a.tsv", "--overwrite"])))
    assert len((tmp_path / "a.tsv").read_text().split("\n")) > 100


def test_no_input_is_overwritten(exits_with_2, vectors, tmp_path):
    write_task(tmp_path / "RTE", "RTE")
    (tmp_path / "train.csv").write_text("text\na good dog\n")
    (tmp_path / "words.csv").write_bytes(vectors.read_bytes())
    (tmp_path / "link.csv").symlink_to("train.csv")
    before = snapshot(tmp_path)
    own = ("--train_file", tmp_path / "train.csv", "--word_vectors", tmp_path / "words.csv", "--overwrite", "--output")
    for name, read in (("train.csv", "train.csv"), ("link.csv", "train.csv"), ("words.csv", "words.csv")):
        assert f"{name}: is {tmp_path / read}, which is read" in exits_with_2(main, *own, tmp_path / name)
    glue = ("--task_name", "RTE", "--data_dir", tmp_path, "--word_vectors", vectors, "--overwrite", "--output")
    assert "train.tsv, which is read" in exits_with_2(main, *glue, tmp_path / "RTE/train.tsv")
    assert snapshot(tmp_path) == before


def test_bad_models_and_vectors(exits_with_2, masked_lm, pretrained, glue_dir, tmp_path):
    def said(option, value, *more):
        task = ("--task_name", "RTE", "--data_dir", glue_dir, "--output", tmp_path / "a.tsv")
        line = exits_with_2(main, *task, option, value, *more)
        assert not (tmp_path / "a.tsv.part").exists()
        return line

    assert re.search(
        r"pretrained\d*: has no weights for cls\.predictions.*as it was pre-trained", said("--masked_lm", pretrained)
    )
    assert "no such folder" in said("--masked_lm", tmp_path / "nothing")
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate([*VOCABULARY, "more"])})
    BertForMaskedLM.from_pretrained(masked_lm).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    assert f"has {len(VOCABULARY) + 1} pieces, and the model embeddings for {len(VOCABULARY)}" in said(
        "--masked_lm", tmp_path / "small"
    )
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})
    tokenizer.mask_token = None
    BertForMaskedLM.from_pretrained(masked_lm).save_pretrained(tmp_path / "maskless")
    tokenizer.save_pretrained(tmp_path / "maskless")
    assert "its tokenizer has no mask" in said("--masked_lm", tmp_path / "maskless")
    for content, expected in (
        (b"good 1 2\nbad 1\n", "line 2: not a word and 2 numbers"),
        (b"good 1 2\nbad 1 2 3\n", "line 2: not a word and 2 numbers"),
        (b"good 1 2\n. . . 1 2\n\n", "line 3: not a word and 2 numbers"),
        (b"good\n", "line 1: not a word and some numbers"),
        (b"good 1 2\nbad 1 x\n", "line 2: could not convert"),
        (b"good 1 2\nbad 1 nan\n", "line 2: the vector of bad holds NaN"),
        (b"good 1 2\nb\xffd 1 2\n", "line 2: 'utf-8'"),
        (b"", "holds no vector of a word of letters"),
        (b". 1 2\n", "holds no vector of a word of letters"),
    ):
        (tmp_path / "vectors.txt").write_bytes(content)
        assert expected in said("--word_vectors", tmp_path / "vectors.txt"), content


def test_bad_data(exits_with_2, vectors, tmp_path):
    def said(content, *more):
        path = tmp_path / "train.csv"
        path.write_text(content)
        out = ("--output", tmp_path / "a.csv")
        return exits_with_2(main, "--train_file", path, "--word_vectors", vectors, *out, *more)

    assert "holds no row of data" in said("text,label\n")
    assert "no column 'review'" in said("text,label\na,b\n", "--text_column", "review")
    assert "--text_column is missing" in said("a,b\nx,y\n")
    assert "give one column, or two of a pair" in said("a,b,c\nx,y,z\n", "--text_column", "a,b,c")
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    (tmp_path / "other.csv").write_text("text,mood\na,b\n")
    both = f"{tmp_path / 'train.csv'},{tmp_path / 'other.csv'}"
    line = exits_with_2(main, "--train_file", both, "--word_vectors", vectors, "--output", tmp_path / "a.csv")
    assert "other.csv: has other columns than" in line
    (tmp_path / "null.jsonl").write_text('{"text": "good dog"}\n{"text": null}\n')
    command = ["--train_file", tmp_path / "null.jsonl", "--word_vectors", vectors, "--output", tmp_path / "a.csv"]
    assert "null.jsonl, line 2: no value in column 'text'" in exits_with_2(main, *command)
