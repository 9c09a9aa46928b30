"""Copies of training rows with some words replaced: TinyBERT's augmentation (Jiao et al., EMNLP Findings 2020).

read_rows -> Candidates -> copies_of -> Growing, in chunks of rows
"""

import csv
import io
import json
import re
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tqdm import tqdm

from bert_emd.candidates import LETTER, MaskedLM, Place, Question, Word, WordVectors, places_of, windows
from bert_finetune.arguments import TaskArguments
from bert_finetune.custom_task import only_text_column
from bert_finetune.data import GlueFiles, present, with_full_rows
from bert_finetune.digests import file_digest
from bert_finetune.errors import InputError, writing
from bert_finetune.files import flush, read_json, remove, rename, write_json
from bert_finetune.glue import get_task
from bert_finetune.paths import several
from bert_finetune.tables import Table

# Copies of a row, N_a in the paper: TinyBERT's by task, and for all else the paper's own.
COPIES = {"CoLA": 30, "MNLI": 10, "MRPC": 30, "SST-2": 20, "STS-B": 30, "QQP": 10, "QNLI": 20, "RTE": 30, "WNLI": 30}
OTHER_COPIES = 20
# Rows that are done at a time: what an interrupted run has to do again, and among how many are those of similar length.
CHUNK = 1000
# Options that say nothing of the rows that are written; of the files it is what is in them that counts.
_MAY_CHANGE = ("output", "overwrite", "data_dir", "train_file")

# Letters alone: neither a part of don't or x2, nor a single letter, which tokenised text has left of them (it 's).
_WORD = regex.compile(rf"(?<![\w'’]){LETTER}{{2,}}(?![\w'’])")


def words_of(text: str) -> list[Word]:
    """The words of a text that may be replaced: of two letters or more, none of them a stop word."""
    found = (Word(match.start(), match.end(), match[0]) for match in _WORD.finditer(text))
    return [word for word in found if word.text.lower() not in ENGLISH_STOP_WORDS]


@dataclass(frozen=True)
class Slot:
    """A word of a text, and what may stand in its place."""

    word: Word
    candidates: list[str]


class Candidates:
    """Finds what may stand in each word's place. A word of one piece: what a masked language model expects. One of
    several pieces: the nearest by word vectors, or what the model expects where there are no vectors, or none of this
    word. Without a model the vectors serve all words.

    faithful: the model is asked for one word at a time, and never for one of several pieces, as in TinyBERT's code.
    """

    def __init__(self, masked_lm: MaskedLM | None, vectors: WordVectors | None, faithful: bool = False):
        self._masked_lm, self._vectors, self._faithful = masked_lm, vectors, faithful

    def slots(self, texts: Iterable[str]) -> dict[str, list[Slot]]:
        """Each text -> those of its words for which there are candidates, in order."""
        texts = list(dict.fromkeys(texts))
        words = [words_of(text) for text in texts]
        near = self._vectors.nearest(word.text for here in words for word in here) if self._vectors else {}
        found = {(k, word): near.get(word.text) for k, here in enumerate(words) for word in here}
        if self._masked_lm:
            asked = list(self._questions(texts, words, near))
            answers = self._masked_lm.predict([question for _, question in asked])
            for (k, question), answer in zip(asked, answers, strict=True):
                found |= {(k, place.word): given for place, given in zip(question.places, answer, strict=True)}
        return {
            text: [Slot(word, in_case_of(word.text, found[k, word])) for word in words[k] if found[k, word]]
            for k, text in enumerate(texts)
        }

    def _questions(
        self, texts: list[str], words: list[list[Word]], near: dict[str, list[str]]
    ) -> Iterator[tuple[int, Question]]:
        """What the model is asked, each with the number of the text."""
        room = self._masked_lm.room

        def is_for_model(place: Place) -> bool:
            several = 1 < place.end - place.first <= room
            return place.end - place.first == 1 or (several and not self._faithful and not near.get(place.word.text))

        for k, pieces in enumerate(self._masked_lm.split(texts)):
            places = list(filter(is_for_model, places_of(words[k], pieces)))
            for part, inside in windows(pieces.ids, places, room):
                for hidden in [[place] for place in inside] if self._faithful else [inside]:
                    yield k, Question(part, hidden)


def in_case_of(word: str, candidates: list[str]) -> list[str]:
    """The candidates in capitals where the word is, or with a capital where it has one."""
    if word.isupper():
        candidates = map(str.upper, candidates)
    elif word[0].isupper():
        candidates = (text[:1].upper() + text[1:] for text in candidates)
    return list(dict.fromkeys(candidates))


def varied(text: str, slots: list[Slot], count: int, probability: float, rng: np.random.Generator) -> list[str]:
    """So many copies of a text. For each word one of its candidates is drawn, and used with this probability; what
    stands between is kept as it is."""
    replaced = rng.random((count, len(slots))) < probability
    sizes = np.array([len(slot.candidates) for slot in slots])
    drawn = (rng.random((count, len(slots))) * sizes).astype(int)
    copies = []
    for uses, choices in zip(replaced.tolist(), drawn.tolist(), strict=True):
        parts, done = [], 0
        for slot, use, choice in zip(slots, uses, choices, strict=True):
            if use:
                parts += text[done : slot.word.start], slot.candidates[choice]
                done = slot.word.end
        copies.append("".join([*parts, text[done:]]))
    return copies


def copies_of(
    texts: tuple[str, ...],
    slots: dict[str, list[Slot]],
    count: int,
    probability: float,
    rng: np.random.Generator,
    faithful: bool = False,
) -> list[tuple[str, ...]]:
    """A row's texts (one, or a pair), and after them their copies, each once.

    The texts of a pair vary independently, `count` times. faithful: TinyBERT's order, first `count` copies of the first
    text beside the second as it is, then as many of the second beside the last copy of the first.
    """
    versions = [varied(text, slots[text], count, probability, rng) for text in texts]
    if not faithful:
        return list(dict.fromkeys([texts, *zip(*versions, strict=True)]))
    rows = {texts: None}
    for side, copies in enumerate(versions):
        last = next(reversed(rows))
        rows |= {(*last[:side], copy, *last[side + 1 :]): None for copy in copies}
    return list(rows)


@dataclass(frozen=True)
class Rows:
    """Training rows as a file is to have them.

    columns: their names; `header`: whether the file says them. rows: all fields. texts: of each row the one text, or
    the pair; `positions`: in which fields they are. sources: the files that the rows are of.
    """

    columns: tuple[str, ...]
    header: bool
    rows: list[list]
    texts: list[tuple[str, ...]]
    positions: list[int]
    sources: list[Path]

    def with_texts(self, k: int, texts: tuple[str, ...]) -> list:
        """Row k with other texts."""
        row = list(self.rows[k])
        for position, text in zip(self.positions, texts, strict=True):
            row[position] = text
        return row


def read_rows(task: TaskArguments, suffix: str) -> Rows:
    """The training rows of a GLUE task, or of the user's own files, for a file whose name ends in `suffix`.

    Raises InputError for rows without text, and those that such a file cannot have.
    """
    header = True
    if task.task_name:
        glue = get_task(task.task_name)
        files, sources, names = GlueFiles(glue), [task.file(glue.train)], glue.columns
        tables = [with_full_rows(files.read(sources[0]), glue, "train", labelled=True)]
        header = tables[0].columns != glue.headerless
    else:
        files, sources = task.reader(), several("--train_file", task.train_file)
        tables = [files.read(path) for path in sources]
        names = tuple(name.strip() for name in (task.text_column or "").split(",") if name.strip())
        names = names or only_text_column(tables[0], files)
        if len(names) > 2:
            raise InputError(f"--text_column {task.text_column}: give one column, or two of a pair")
    columns = tables[0].columns
    rows, texts = [], []
    for table in tables:
        if table.columns != columns:
            raise InputError(f"{table.path}: has other columns than {tables[0].path}; augment each by itself")
        texts += zip(*(present(files.texts(table, name), table, name) for name in names), strict=True)
        rows += [row + [None] * (len(columns) - len(row)) for row in table.rows]
        if suffix == ".tsv":
            _check_fields(table)
    return Rows(columns, header, rows, texts, [tables[0].column(name) for name in names], sources)


def _check_fields(table: Table) -> None:
    for k, row in enumerate(table.rows):
        for name, value in zip(table.columns, row, strict=False):
            if re.search(r"[\t\n]|\r\Z", _as_field(value)):
                raise InputError(
                    f"{table.place(k)}: column {name!r} has a tab or the end of a line in it, which TSV cannot have; "
                    "give --output a name in .csv or .jsonl"
                )


def as_text(suffix: str, columns: tuple[str, ...], rows: list[list]) -> str:
    """Rows as a file's lines: .tsv without quoting, .csv, or .jsonl with an object a line."""
    if suffix == ".jsonl":
        return "".join(json.dumps(dict(zip(columns, row, strict=True)), default=str) + "\n" for row in rows)
    fields = [[_as_field(value) for value in row] for row in rows]
    if suffix == ".tsv":
        return "".join("\t".join(row) + "\n" for row in fields)
    lines = []
    for row in fields:
        # With the line end that it has by default, csv puts a carriage return in a field into quotes, too.
        file = io.StringIO(newline="")
        csv.writer(file).writerow(row)
        lines.append(file.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _as_field(value) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return "" if value is None else str(value)


class Growing:
    """A file that is written in parts, beside its place, and gets there once it is whole.

    made_of: what its content follows from. Beside the parts stands, as JSON, what they are made of, and how much of
    them is complete: `size` bytes, `written` rows made of the first `done` ones. A run that was cut goes on from there
    where it is made of the same; otherwise the file is begun anew, which is printed.
    """

    def __init__(self, path: Path, made_of: dict):
        self._path = path
        self._parts, self._about = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
        self._made_of = json.loads(json.dumps(made_of))
        self.size = self.done = self.written = 0
        earlier = self._earlier()
        if earlier.get("made_of") == self._made_of:
            self.size, self.done, self.written = (earlier[name] for name in ("size", "done", "written"))
            print(f"{self._parts}: goes on after {self.done} rows")
        else:
            if self._parts.exists():
                print(f"{self._parts}: is of other options or data; begun anew")
            if self._about.exists():
                remove(self._about)  # of other parts, which these may outgrow before they are told of
        with writing(self._parts), open(self._parts, "ab") as file:
            file.truncate(self.size)

    def _earlier(self) -> dict:
        """What is told of the parts; nothing where they are not there."""
        try:
            told = read_json(self._about)
            return told if self._parts.stat().st_size >= told["size"] else {}
        except (InputError, OSError, KeyError):
            return {}

    def add(self, text: str, done: int, written: int) -> None:
        """Append a part, with which the rows before number `done` are complete; it has `written` rows."""
        with writing(self._parts), open(self._parts, "ab") as file:
            file.write(text.encode(errors="replace"))  # half an emoji, in a column that is not looked at
            self.size = file.tell()
        flush(self._parts)
        self.done, self.written = done, self.written + written
        told = {name: getattr(self, name) for name in ("size", "done", "written")}
        write_json(self._about, {"made_of": self._made_of} | told)

    def finish(self) -> None:
        """Give the file its name."""
        rename(self._parts, self._path)
        self._about.unlink()


def augment(options: Namespace, task: TaskArguments) -> None:
    """What the script does, once its options are known to be there (see its help)."""
    suffix = options.output.suffix.lower()
    data = read_rows(task, suffix)
    for path in map(Path, filter(None, [*data.sources, options.word_vectors])):
        if options.output.exists() and path.exists() and options.output.samefile(path):
            raise InputError(f"--output {options.output}: is {path}, which is read; give another name")
    masked_lm = vectors = None
    if options.masked_lm:
        masked_lm = MaskedLM.load(options.masked_lm, options.candidates, options.batch_size, options.faithful)
    if options.word_vectors:
        vectors = WordVectors.load(options.word_vectors, options.candidates)
    candidates = Candidates(masked_lm, vectors, options.faithful)
    count = options.copies or COPIES.get(task.name, OTHER_COPIES)
    made_of = {name: value for name, value in vars(options).items() if name not in _MAY_CHANGE} | {
        "copies": count,
        "data": [file_digest(path) for path in data.sources],
        "masked_lm": masked_lm and masked_lm.made_of,
        "word_vectors": vectors and vectors.digest,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    growing = Growing(options.output, made_of)
    if data.header and not growing.size and suffix != ".jsonl":
        growing.add(as_text(suffix, data.columns, [list(data.columns)]), 0, 0)
    begun, sentences = time.perf_counter(), 0
    try:
        with tqdm(total=len(data.rows), initial=growing.done, unit="row", disable=None) as bar:
            while growing.done < len(data.rows):
                chunk = range(growing.done, min(growing.done + CHUNK, len(data.rows)))
                texts = [text for k in chunk for text in data.texts[k]]
                slots = candidates.slots(texts)
                rows = []
                for k in chunk:
                    # A stream of its own for each row: what is drawn does not depend on where a run went on.
                    rng = np.random.default_rng([options.seed, k])
                    drawn = copies_of(data.texts[k], slots, count, options.probability, rng, options.faithful)
                    rows += [data.with_texts(k, texts) for texts in drawn]
                growing.add(as_text(suffix, data.columns, rows), chunk.stop, len(rows))
                sentences += len(texts)
                bar.update(len(chunk))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on from here") from interrupt
    growing.finish()
    speed = sentences / (time.perf_counter() - begun)
    print(f"{options.output}: {growing.written} rows, made of {len(data.rows)}; {speed:.1f} sentences a second")
