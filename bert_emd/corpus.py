"""Running text as packed sequences of tokens, which lie on disk: memory does not grow with the corpus.

A corpus is plain text with a sentence a line and blank lines between documents, as BERT's own pre-training takes it, or
a table with a document a row. A sequence is made of sentences of one document, as many as fit, split into two segments
between sentences drawn at random.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path

import pyarrow
from datasets import Dataset
from filelock import FileLock
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bert_finetune.data import plain_backend
from bert_finetune.digests import file_digest
from bert_finetune.errors import InputError, writing
from bert_finetune.files import flush, read_json, remove, rename, write_json
from bert_finetune.paths import ending
from bert_finetune.run_checkpoints import begin
from bert_finetune.tables import stream_lines, stream_texts

# What a folder of a corpus may hold; other files of text are named one by one, or by a pattern.
KINDS = (".txt", ".parquet")
_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_PARTS = ("train", "dev")
_COUNTS = "corpus.json"
# Of a document, what decides which part it belongs to; sentences that are tokenised at a time; sequences written at a
# time.
_HEAD, _SENTENCES, _ROWS = 1000, 10_000, 1000

Segments = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Corpus:
    """A corpus, and how it is packed.

    files: read in this order, a document ends with its file. text_column: of tables, None for the only one of text.
    max_seq_length: of a sequence, special tokens included. short_seq_prob: the share of sequences that aim at a length
    drawn at random. dev_share: the share of the documents that is held out. seed: of all that is drawn. source: what
    messages call the whole.
    """

    files: tuple[Path, ...]
    text_column: str | None
    max_seq_length: int
    short_seq_prob: float = 0.0
    dev_share: float = 0.0
    seed: int = 0
    source: str = "the corpus"

    def digest(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the sequences depend on, in short. Raises InputError for a file that is no corpus."""
        parts = [self.text_column, self.max_seq_length, self.short_seq_prob, self.dev_share, self.seed]
        for path in self.files:
            if ending(path) in _TABLES:
                raise InputError(f"{path}: a corpus is plain text, or a .parquet file with a document a row")
            try:
                parts.append(file_digest(path))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        parts += [tokenizer.model_input_names, tokenizer.backend_tokenizer.to_str()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def sentences(self, limit: float) -> Iterator[tuple[str, str | None]]:
        """Each sentence with the part that it belongs to, "train" or "dev"; None after a document's last one.

        A document is held out where the number that its beginning is given, evenly between 0 and 1, is at most `limit`:
        whatever the other documents, the seed and the length. A larger share holds out the same ones and more.
        """
        for document in chain.from_iterable(map(self._documents, self.files)):
            head = _beginning(document)
            if head:
                part = "dev" if _number(head) <= limit else "train"
                yield from ((part, sentence) for sentence in chain(head, document))
                yield part, None

    def least_number(self) -> float:
        """The least number of a document, see `sentences`."""
        heads = map(_beginning, chain.from_iterable(map(self._documents, self.files)))
        return min(_number(head) for head in heads if head)

    def _documents(self, path: Path) -> Iterator[Iterator[str]]:
        """The documents of a file, each as its sentences; one is to be read to its end before the next."""
        if ending(path) == ".parquet":
            for text in stream_texts(path, self.text_column):
                yield (line.rstrip("\r") for line in text.split("\n") if line.strip())
        else:
            for is_blank, lines in groupby(stream_lines(path), key=lambda line: not line.strip()):
                if not is_blank:
                    yield lines


def _beginning(document: Iterator[str]) -> list[str]:
    """The sentences with the first `_HEAD` characters of a document."""
    head, length = [], 0
    for sentence in document:
        head.append(sentence)
        length += len(sentence)
        if length >= _HEAD:
            break
    return head


def _number(head: list[str]) -> float:
    digest = hashlib.sha256("\n".join(head).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass
class Packer:
    """Fills sequences of at most `room` tokens with sentences of one document; see `Corpus` for `short_seq_prob`.

    A sentence that is longer than `room` is cut into pieces, which count as sentences. One that is longer than the
    length that a short sequence aims at makes a sequence by itself.
    """

    room: int
    short_seq_prob: float
    draw: random.Random
    _sentences: list[list[int]] = field(default_factory=list)
    _aim: int = 0

    def add(self, sentence: list[int]) -> Iterator[Segments]:
        """Take a sentence; the sequence that is full with those before it, if one is."""
        for start in range(0, len(sentence), self.room):
            piece = sentence[start : start + self.room]
            if sum(map(len, self._sentences)) + len(piece) > self._aim:
                yield from self.end()
                short = self.draw.random() < self.short_seq_prob
                self._aim = self.draw.randint(2, self.room) if short else self.room
            self._sentences.append(piece)

    def end(self) -> Iterator[Segments]:
        """The sequence of what is left of a document, if anything is; its second segment is empty where there is but
        one sentence."""
        if self._sentences:
            split = self.draw.randrange(1, max(2, len(self._sentences)))
            parts = self._sentences[:split], self._sentences[split:]
            yield tuple(list(chain.from_iterable(part)) for part in parts)
        self._sentences, self._aim = [], 0


class Frame:
    """The special tokens that a tokenizer puts around segments of token numbers, read off an example of its own."""

    def __init__(self, example: Encoding):
        rows = zip(example.sequence_ids, example.ids, example.type_ids, strict=True)
        self._pieces = [(segment, list(group)) for segment, group in groupby(rows, key=lambda row: row[0])]

    def around(self, segments: Segments) -> tuple[list[int], list[int]]:
        """`input_ids` and `token_type_ids`."""
        ids, types = [], []
        for segment, rows in self._pieces:
            inner = [token for _, token, _ in rows] if segment is None else segments[segment]
            ids += inner
            types += [kind for _, _, kind in rows] if segment is None else [rows[0][2]] * len(inner)
        return ids, types


class _Writer:
    """Sequences into an Arrow file; `counts` of them and of their tokens."""

    def __init__(self, path: Path, names: list[str], stack: ExitStack):
        kinds = {"input_ids": pyarrow.list_(pyarrow.int32()), "token_type_ids": pyarrow.list_(pyarrow.int8())}
        self._schema = pyarrow.schema({name: kind for name, kind in kinds.items() if name in names})
        file = stack.enter_context(pyarrow.OSFile(str(path), "wb"))
        self._stream = stack.enter_context(pyarrow.ipc.new_stream(file, self._schema))
        self._rows, self.counts = [], Counter(documents=0, sequences=0, tokens=0)

    def add(self, row: tuple[list[int], list[int]]) -> None:
        self._rows.append(row)
        self.counts.update(sequences=1, tokens=len(row[0]))
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        columns = zip(self._schema, zip(*self._rows, strict=True), strict=False)
        if self._rows:
            arrays = [pyarrow.array(column, field.type) for field, column in columns]
            self._stream.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows = []


@dataclass(frozen=True)
class PackedCorpus:
    """The sequences of a corpus, `input_ids` and `token_type_ids` where the model has these, mapped from disk: those to
    train on, and those held out (None for no such share). `told`: how many there are, in words."""

    train: Dataset
    dev: Dataset | None
    told: str


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, place: Path) -> PackedCorpus:
    """Read a corpus, and keep its sequences in the folder `place`, whose name is of its digest; or find them there. Of
    several runs at once one writes, and the others wait.

    Raises InputError for a corpus that has no text, or too few documents for a share to be held out.
    """
    if not place.is_dir():
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.with_name(f".{place.name}.lock")):
                if not place.is_dir():
                    _keep(corpus, tokenizer, place)
    counts = read_json(place / _COUNTS)
    parts = {part: Dataset.from_file(str(place / f"{part}.arrow")) for part in counts}
    told = "; ".join(
        f"{part}: {of['documents']:,} documents, {of['sequences']:,} sequences, {of['tokens']:,} tokens"
        for part, of in counts.items()
    )
    return PackedCorpus(parts["train"], parts.get("dev"), told)


def _keep(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Write the sequences of each part, and their numbers."""
    aside = place.with_name(f".saving-{place.name}")
    try:
        begin(aside)
        write_json(aside / _COUNTS, _write(corpus, tokenizer, aside))
        for path in aside.iterdir():
            flush(path)
        rename(aside, place)
    finally:
        if aside.exists():
            remove(aside)


def _write(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, dict[str, int]]:
    """Write the sequences of each part; what there is in each."""
    if not corpus.dev_share:
        counts = _write_parts(corpus, tokenizer, folder, -1.0)
        del counts["dev"]
    else:
        counts = _write_parts(corpus, tokenizer, folder, corpus.dev_share)
        if not counts["dev"]["documents"] and counts["train"]["documents"] > 1:
            # Of a small corpus none may lie within the share: then it is the nearest one.
            counts = _write_parts(corpus, tokenizer, folder, corpus.least_number())
    documents = sum(of["documents"] for of in counts.values())
    if not documents:
        raise InputError(f"{corpus.source}: holds no text, only empty lines")
    if documents == 1 and corpus.dev_share:
        raise InputError(
            f"{corpus.source}: holds one document only, and none can be held out; put blank lines between documents, "
            "or give --dev_share 0"
        )
    for part, of in counts.items():
        if not of["sequences"]:
            purpose = "train on" if part == "train" else "hold out"
            raise InputError(f"{corpus.source}: no text is left to {purpose}; give another --dev_share")
    return counts


def _write_parts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, folder: Path, limit: float
) -> dict[str, dict[str, int]]:
    backend = plain_backend(tokenizer)
    room = corpus.max_seq_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise InputError(f"--max_seq_length {corpus.max_seq_length} leaves no room for text beside the special tokens")
    frames = {False: Frame(backend.encode("a")), True: Frame(backend.encode("a", "a"))}
    packers = {part: Packer(room, corpus.short_seq_prob, random.Random(f"{corpus.seed} {part}")) for part in _PARTS}
    with ExitStack() as stack:
        names = tokenizer.model_input_names
        writers = {part: _Writer(folder / f"{part}.arrow", names, stack) for part in _PARTS}
        for part, tokens in _tokenized(corpus.sentences(limit), backend):
            packer, writer = packers[part], writers[part]
            writer.counts.update(documents=tokens is None)
            for segments in packer.end() if tokens is None else packer.add(tokens):
                writer.add(frames[bool(segments[1])].around(segments))
        for writer in writers.values():
            writer.flush()
    return {part: dict(writer.counts) for part, writer in writers.items()}


def _tokenized(sentences: Iterable[tuple[str, str | None]], backend) -> Iterator[tuple[str, list[int] | None]]:
    """Token numbers in the place of texts."""
    sentences = iter(sentences)
    while batch := list(islice(sentences, _SENTENCES)):
        texts = [text for _, text in batch if text is not None]
        found = iter(backend.encode_batch(texts, add_special_tokens=False))
        yield from ((part, None if text is None else next(found).ids) for part, text in batch)
