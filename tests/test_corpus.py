"""A corpus on its way to packed sequences: what is read, how sequences are filled, what is held out, what it takes."""

import gzip
import os
import random
import threading
from itertools import chain, pairwise

import pyarrow
import pytest
import warm
from conftest import save_bert
from glue_files import WORDS
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from bert_emd import corpus as corpora
from bert_emd.corpus import Corpus, Frame, PackedCorpus, Packer
from bert_finetune.errors import InputError
from bert_finetune.paths import several
from bert_finetune.run_checkpoints import begin
from bert_finetune.samplers import Shuffled


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("models") / "bert", None))


LETTERS = [word for word in WORDS if word.isalpha()]  # others a tokenizer writes back otherwise


def write_corpus(path, documents=30, seed=0):
    """Made-up documents of 1 to 9 sentences of 2 to 9 words; the documents, each a list of sentences."""
    draw = random.Random(seed)
    texts = [
        [" ".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(draw.randint(1, 9))]
        for _ in range(documents)
    ]
    path.write_text("\n\n".join("\n".join(text) for text in texts) + "\n")
    return texts


def pack(corpus, tokenizer, folder) -> PackedCorpus:
    """Packed in a folder of packed corpora."""
    return corpora.pack(corpus, tokenizer, folder / corpus.digest(tokenizer)[:16])


def kept(folder):
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def words_of(dataset, tokenizer):
    """A row's words, without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True).split() for ids in dataset["input_ids"]]


# How sequences are filled


@given(
    st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=8),
    st.integers(2, 20),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_packer_keeps_every_token_in_order_and_fills_sequences(documents, room, short):
    packer, counter, rows = Packer(room, short, random.Random(0)), iter(range(10**6)), []
    for lengths in documents:
        sentences = [[next(counter) for _ in range(length)] for length in lengths]
        made = [row for sentence in sentences for row in packer.add(sentence)] + list(packer.end())
        rows += made
        assert list(chain(*(first + second for first, second in made))) == list(chain(*sentences))
        starts = {piece[0] for sentence in sentences for piece in (sentence[k:] for k in range(0, len(sentence), room))}
        for first, second in made:
            assert first and len(first) + len(second) <= room
            assert first[0] in starts and (not second or second[0] in starts)  # between sentences
            assert bool(second) == (len(starts & {*first, *second}) > 1)
        if not short:  # none is closed before the next sentence, or the next piece of one, is too long for it
            pieces = [sentence[k : k + room] for sentence in sentences for k in range(0, len(sentence), room)]
            length = {piece[0]: len(piece) for piece in pieces}
            for (first, second), (after, _) in pairwise(made):
                assert len(first) + len(second) + length[after[0]] > room


def test_segments_are_split_at_random_and_short_sequences_are_short():
    def made(seed, short=0.0):
        packer = Packer(60, short, random.Random(seed))
        rows = list(chain.from_iterable(packer.add([1] * 10) for _ in range(3000)))
        return [(len(first), len(second)) for first, second in rows]

    splits = [first for first, _ in made(0)]
    assert set(splits) == {10, 20, 30, 40, 50} and made(0) == made(0) != made(1)
    lengths = [sum(row) for row in made(0, short=0.5)]
    assert set(lengths) == {10, 20, 30, 40, 50, 60}
    assert 0.4 < sum(length < 60 for length in lengths) / len(lengths) < 0.55


def test_frame_is_the_tokenizers_own(tokenizer):
    def check(backend, *texts):
        encoding = backend.encode(*texts)
        segments = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        example = backend.encode(*["a"] * len(texts))
        assert Frame(example).around(segments) == (encoding.ids, encoding.type_ids)

    backend = tokenizer.backend_tokenizer
    for texts in (["the old cat"], ["the old cat", "a dog sings"]):
        check(backend, *texts)
    other = Tokenizer.from_str(backend.to_str())
    other.post_processor = processors.TemplateProcessing(
        pair="[CLS] $A:1 [SEP]:2 [SEP] $B [CLS]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    check(other, "the old cat", "a dog sings")


# What is read


def test_every_sentence_is_in_some_sequence(tokenizer, tmp_path):
    texts = write_corpus(tmp_path / "text.txt")
    packed = pack(Corpus((tmp_path / "text.txt",), None, 24), tokenizer, tmp_path / "cache")
    assert packed.dev is None
    assert list(chain(*words_of(packed.train, tokenizer))) == " ".join(chain(*texts)).split()
    for row in packed.train:
        ids, types = row["input_ids"], row["token_type_ids"]
        assert len(ids) == len(types) <= 24 and ids[0] == 2 and ids[-1] == 3
        assert ids.count(3) == 1 + types[-1] and types == sorted(types)
    sizes = [len(ids) for ids in packed.train["input_ids"]]
    assert max(sizes) == 24
    documents, sequences, tokens = len(texts), len(packed.train), sum(sizes)
    assert packed.told == f"train: {documents} documents, {sequences} sequences, {tokens:,} tokens"


@pytest.mark.parametrize("form", ["gz", "zst", "windows", "byte-order mark", "several", "folder", "parquet"])
def test_forms(form, tokenizer, tmp_path):
    plain = tmp_path / "plain.txt"
    texts = write_corpus(plain)
    expected = list(pack(Corpus((plain,), None, 24, seed=3), tokenizer, tmp_path / "cache").train)
    raw, folder = plain.read_bytes(), tmp_path / "form"
    folder.mkdir()
    option = folder / "text.txt"
    if form == "gz":
        option = folder / "text.txt.gz"
        option.write_bytes(gzip.compress(raw))
    elif form == "zst":
        option = folder / "text.zst"
        with pyarrow.CompressedOutputStream(str(option), "zstd") as file:
            file.write(raw)
    elif form == "windows":
        option.write_bytes(raw.replace(b"\n", b"\r\n").replace(b"\r\n\r\n", b"\r\n \t\r\n\r\n"))
    elif form == "byte-order mark":
        option.write_bytes(b"\xef\xbb\xbf" + raw)
    elif form == "parquet":
        option = folder / "text.parquet"
        table = {"text": ["\n".join(text) for text in texts] + [None, " "], "number": range(len(texts) + 2)}
        parquet.write_table(pyarrow.table({name: list(values) for name, values in table.items()}), option)
    else:  # a document ends with its file
        first, second = raw.split(b"\n\n", 1)
        (folder / "a.txt").write_bytes(first)
        (folder / "b.txt").write_bytes(second)
        option = folder if form == "folder" else f"{folder}/a.txt,{folder}/[b].txt"
    files = tuple(several("--corpus", str(option), (".txt", ".parquet")))
    assert list(pack(Corpus(files, None, 24, seed=3), tokenizer, tmp_path / "cache").train) == expected


def test_the_same_corpus_is_packed_once(tokenizer, tmp_path, monkeypatch):
    write_corpus(tmp_path / "text.txt")
    corpus = Corpus((tmp_path / "text.txt",), None, 24, dev_share=0.2)
    first = pack(corpus, tokenizer, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("bert_emd.corpus._write", lambda *args: pytest.fail("packed again"))
        again = pack(corpus, tokenizer, tmp_path / "cache")
    assert list(again.train) == list(first.train) and again.told == first.told
    (tmp_path / "text.txt").write_text("another\n\ncorpus\n")
    assert len(pack(corpus, tokenizer, tmp_path / "cache").train) == 1
    assert len(kept(tmp_path / "cache")) == 2


def test_two_runs_at_once_pack_once(tokenizer, tmp_path, monkeypatch):
    write_corpus(tmp_path / "text.txt")
    corpus, wrote, original = Corpus((tmp_path / "text.txt",), None, 24), [], corpora._write

    def write(*args):
        wrote.append(second.start() if not wrote else pytest.fail("packed again"))
        second.join(0.2)
        return original(*args)

    found = []
    second = threading.Thread(target=lambda: found.append(pack(corpus, tokenizer, tmp_path / "cache")))
    monkeypatch.setattr(corpora, "_write", write)
    first = pack(corpus, tokenizer, tmp_path / "cache")
    second.join()
    assert len(wrote) == 1 and list(found[0].train) == list(first.train)


def test_what_a_killed_run_left_is_made_anew(tokenizer, tmp_path):
    write_corpus(tmp_path / "text.txt")
    corpus = Corpus((tmp_path / "text.txt",), None, 24)
    place = tmp_path / "cache" / corpus.digest(tokenizer)[:16]
    begin(place.with_name(f".saving-{place.name}"))
    assert pack(corpus, tokenizer, tmp_path / "cache").train.num_rows
    assert kept(tmp_path / "cache") == [place.name]


# What is held out


def held_out(tokenizer, path, share, seed=0):
    """The sequences of documents that are held out, and the packed corpus."""
    packed = pack(Corpus((path,), None, 24, dev_share=share, seed=seed), tokenizer, path.parent / "cache")
    return {" ".join(words) for words in words_of(packed.dev, tokenizer)}, packed


def test_documents_are_held_out_by_their_text(tokenizer, tmp_path):
    path, longer = tmp_path / "text.txt", tmp_path / "longer.txt"
    texts = write_corpus(path, documents=200)
    dev, packed = held_out(tokenizer, path, 0.2)
    documents = int(packed.told.split("dev: ")[1].split(" documents")[0])
    assert 25 <= documents <= 55
    words = list(chain(*words_of(packed.train, tokenizer), *words_of(packed.dev, tokenizer)))
    assert sorted(words) == sorted(" ".join(chain(*texts)).split())  # each in one of the two
    # Neither what else is in the corpus nor the seed changes which they are; a larger share has them all, and more.
    longer.write_text("a new dog\n\n" + path.read_text())
    assert dev <= {*held_out(tokenizer, longer, 0.2)[0], "a new dog"}
    assert held_out(tokenizer, path, 0.2, seed=1)[0] == dev
    larger = held_out(tokenizer, path, 0.5)[0]
    assert dev < larger


def test_of_a_small_corpus_one_document_is_held_out(tokenizer, tmp_path):
    texts = write_corpus(tmp_path / "text.txt", documents=3)
    assert "train: 2 documents" in (told := held_out(tokenizer, tmp_path / "text.txt", 0.0001)[1].told)
    assert "dev: 1 documents" in told
    rows = ["", " \n", *map("\n".join, texts)]  # two of them are none
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "text.parquet")
    assert held_out(tokenizer, tmp_path / "text.parquet", 0.0001)[1].told == told


# What cannot be used


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.txt", b"one\ntwo\n", "holds one document only, and none can be held out; put blank lines between"),
        ("text.txt", b"\n \n\t\r\n", "the corpus: holds no text, only empty lines"),
        ("text.txt", b"", "holds no text"),
        ("text.txt", b"one\n\ntw\xff\n", "text.txt, line 3: not UTF-8 text; save the file as UTF-8"),
        ("text.txt", gzip.compress(b"one\n\ntwo"), "a gzip file; its name must end in .gz"),
        ("text.gz", b"one\n\ntwo", "not a whole gzip file"),
        ("text.gz", gzip.compress(b"one\n\ntwo\n" * 99)[:-20], "not a whole gzip file"),
        ("text.csv", b"one\n\ntwo", "a corpus is plain text, or a .parquet file with a document a row"),
        ("text.parquet", b"one\n\ntwo", "not a Parquet file that can be read"),
        ("gone.txt", None, "gone.txt: cannot be read: No such file"),
    ],
)
def test_bad_corpus(name, content, said, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        pack(Corpus((tmp_path / name,), None, 24, dev_share=0.5), tokenizer, tmp_path / "cache")
    assert said in str(error.value)
    assert not (tmp_path / "cache").exists() or not kept(tmp_path / "cache")


def test_which_column(tokenizer, tmp_path):
    path = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"title": ["a cat"], "body": ["a dog\nsings"]}), path)
    for column, said in ((None, "which of its columns is the text?"), ("text", "no column 'text' of text")):
        with pytest.raises(InputError, match=said):
            pack(Corpus((path,), column, 24), tokenizer, tmp_path / "cache")
    packed = pack(Corpus((path,), "body", 24), tokenizer, tmp_path / "cache")
    assert words_of(packed.train, tokenizer) == [["a", "dog", "sings"]]


def test_too_short_for_text(tokenizer, tmp_path):
    write_corpus(tmp_path / "text.txt")
    with pytest.raises(InputError, match="--max_seq_length 4 leaves no room"):
        pack(Corpus((tmp_path / "text.txt",), None, 4), tokenizer, tmp_path / "cache")


# What it takes

# Of made-up text; `CORPUS_MB=1000 pytest tests/test_corpus.py -s -k memory` packs a gigabyte.
CORPUS_MB = int(os.environ.get("CORPUS_MB", 4))
PEAKS = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from bert_emd.corpus import Corpus, pack
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
for path in map(Path, sys.argv[2:]):
    pack(Corpus((path,), None, 128), tokenizer, path.with_suffix(""))
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """What 1 MB of text takes at most is enough for more, whose sentences or sequences would be tens of MB."""
    (tmp_path / "peaks.py").write_text(PEAKS)
    write_corpus(tmp_path / "once.txt", documents=1400)
    once, paths = (tmp_path / "once.txt").read_text() + "\n", []
    for megabytes in (1, CORPUS_MB):
        paths.append(tmp_path / f"{megabytes}.txt")
        with open(paths[-1], "w") as file:
            for _ in range(megabytes * 1_000_000 // len(once)):
                file.write(once)
    process = warm.start(tmp_path / "peaks.py", save_bert(tmp_path / "bert", None), *paths)
    told, error = process.communicate()
    assert process.returncode == 0, error
    before, after = map(int, told.split())
    print(f"most memory: {before / 1000:.0f} MB for 1 MB of text, {after / 1000:.0f} MB for {CORPUS_MB} MB")
    assert after - before < 16_000  # KB


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_shuffled(rows):
    epoch = [0]
    sampler = Shuffled(rows, 5, lambda: epoch[0])
    first = list(sampler)
    assert len(sampler) == rows and sorted(first) == list(range(rows)) and list(sampler) == first
    assert all(type(k) is int for k in first)
    epoch[0] = 1
    assert rows == 1 or (sorted(sampler) == sorted(first) and list(sampler) != first)
