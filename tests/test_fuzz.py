"""The readers of foreign files against damage: whatever the bytes, an `InputError` or exactly the right contents.

A few hundred damaged files for each of the two binary readers in `make test`, 100,000 in `make fuzz`. A file is made
from its number alone, which a failure shows. More about the checkpoint reader is in test_tf_checkpoint.py.
"""

import io
import os
import random
import resource
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from glue_files import FORMATS, write_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tf_checkpoint_writer import block, entry, table, write_checkpoint

import download_glue_data as downloader
from bert_finetune.data import load_split
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task
from bert_finetune.tables import read_tsv
from bert_finetune.tf_checkpoint import TFCheckpoint

INPUTS = int(os.environ.get("FUZZ_INPUTS", 400))
SECONDS = 20  # no input takes a hundredth of it
MEMORY = 1 << 30

fuzz = settings(
    max_examples=max(100, INPUTS // 50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# Damage

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def flip_a_bit(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    data[start] ^= 1 << chance.randrange(8)


def change_a_byte(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    data[start] = chance.randrange(256)


def write_a_number(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    size = chance.choice((2, 4, 8))
    value = chance.choice([*NUMBERS, chance.getrandbits(64), len(data)]) % (1 << 8 * size)
    data[start : start + size] = value.to_bytes(size, "little")


def cut_the_end(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    del data[start:]


def cut_out(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    del data[start:end]


def insert(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    data[start:start] = chance.randbytes(chance.choice((1, 2, 7, 100)))


def duplicate(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    place = chance.randrange(len(data) + 1)
    data[place:place] = data[start:end]


def overwrite_by_another_part(data: bytearray, chance: random.Random, start: int, end: int) -> None:
    place = chance.randrange(len(data))
    data[place : place + end - start] = data[start:end]


DAMAGES = (
    flip_a_bit,
    flip_a_bit,
    change_a_byte,
    write_a_number,
    cut_the_end,
    cut_out,
    insert,
    duplicate,
    overwrite_by_another_part,
)


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """One to four damages, at places anywhere or, as that is where the numbers are, near the end."""
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if data:
            start = chance.randrange(len(data))
            if chance.random() < 0.3:
                start = max(0, len(data) - 1 - start % 64)
            end = min(len(data), start + chance.choice((1, 4, 16, 64, 256)))
            chance.choice(DAMAGES)(data, chance, start, end)
    return bytes(data)


@contextmanager
def within_bounds() -> Iterator[None]:
    """An input that takes too long, or more memory than any right one, fails the test."""

    def too_long(*_):
        raise AssertionError(f"no end after {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def numbered(read, seen: dict[str, int], times: int = INPUTS) -> None:
    """Call `read(chance, number)` for each input and count what comes of it: "read", or "refused" by an InputError."""
    with within_bounds():
        for number in range(times):
            signal.alarm(SECONDS)
            try:
                outcome = read(random.Random(number), number)
            except InputError as error:
                assert "\n" not in str(error), number
                assert not isinstance(error.__cause__, MemoryError), number
                outcome = "refused"
            except BaseException as error:
                error.add_note(f"input number {number}") if hasattr(error, "add_note") else print("input", number)
                raise
            seen[outcome] = seen.get(outcome, 0) + 1
    print(f"{times} inputs: " + ", ".join(f"{count} {outcome}" for outcome, count in seen.items()))


# The checkpoint reader

VARIABLES = {
    "bert/pooler/dense/bias": np.arange(4, dtype="f4"),
    "bert/pooler/dense/kernel": np.random.default_rng(0).normal(size=(4, 3)).astype("f4"),
    "global_step": np.array(7),
    "half": np.ones(3, "f2"),
}
LAYOUTS = {"one": (1, 1000), "some": (2, 2), "many": (3, 1)}  # shards, pairs per block


@pytest.fixture
def checkpoints(tmp_path) -> dict[Path, bytes]:
    """All files of three checkpoints of the same variables, and their contents."""
    for name, (shards, pairs) in LAYOUTS.items():
        write_checkpoint(tmp_path / name, VARIABLES, shards, pairs)
    return {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}


def read_all(prefix: Path) -> None:
    """Every variable, exactly right."""
    checkpoint = TFCheckpoint(prefix)
    values = {name: checkpoint.read(name) for name in checkpoint.variables}
    assert list(values) == sorted(VARIABLES)
    for name, value in values.items():
        np.testing.assert_array_equal(value, VARIABLES[name], strict=True)


@pytest.mark.slow
def test_damaged_checkpoints(checkpoints, tmp_path):
    def read(chance: random.Random, number: int) -> str:
        name = chance.choice(list(LAYOUTS))
        files = [path for path in checkpoints if path.stem == name]
        changed = [path for path in files if chance.random() < (0.8 if path.suffix == ".index" else 0.3)]
        for path in changed:
            path.write_bytes(damaged(checkpoints[path], chance))
        try:
            read_all(tmp_path / name)
        finally:
            for path in changed:
                path.write_bytes(checkpoints[path])
        return "read"

    seen = {}
    numbered(read, seen)
    assert seen["refused"] > seen["read"] > 0


def test_damaged_contents_under_right_checksums(checkpoints, tmp_path):
    """No checksum stops these: they may name other variables, but end in nothing worse than an InputError."""
    place = tmp_path / "forged"
    contents = [(name.encode(), entry(1, (2, 2), 0, 0, bytes(16))) for name in VARIABLES]
    header = b"\x08\x01\x1a\x02\x08\x01"
    Path(f"{place}.data-00000-of-00001").write_bytes(bytes(64))

    def read(chance: random.Random, number: int) -> str:
        blocks = [block([(b"", header), *contents[:2]]), block(contents[2:])]
        blocks = [damaged(each, chance) if chance.random() < 0.7 else each for each in blocks]
        Path(f"{place}.index").write_bytes(table(blocks))
        checkpoint = TFCheckpoint(place)
        for name in checkpoint.variables:
            checkpoint.read(name)
        return "read"

    seen = {}
    numbered(read, seen, max(100, INPUTS // 10))
    assert seen["refused"] > seen["read"] > 0


# The archive extractor

FILES = get_task("RTE").corpus.files
CONTENTS = {file.path: f"index\tsentence {file.name}\n".encode() * 9 for file in FILES}


class Unseekable(io.BytesIO):
    """As a pipe: zipfile then writes sizes and checksums behind each member."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_):
        raise OSError("no way back")

    tell = seek


def packed(out: io.BytesIO, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"", zip64: bool = False) -> bytes:
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.comment = comment
        archive.mkdir("RTE") if hasattr(archive, "mkdir") else None
        for name, content in CONTENTS.items():
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(content)
    return out.getvalue()


ARCHIVES = (
    packed(io.BytesIO(), zipfile.ZIP_STORED),
    packed(io.BytesIO(), comment=b"GLUE"),
    packed(io.BytesIO(), zip64=True),
    packed(Unseekable()),
)


class Writes:
    """Which paths the process opens for writing, makes, renames, links or removes, while it is watched."""

    EVENTS = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod")

    def __init__(self):
        self.watching, self.paths = False, set()
        sys.addaudithook(self._see)  # there is no way to take it off again

    def _see(self, event: str, args: tuple) -> None:
        if self.watching:
            opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if opened or event in self.EVENTS:
                self.paths |= {
                    str(path) for path in args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]
                }

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        self.watching, self.paths = True, set()
        try:
            yield self.paths
        finally:
            self.watching = False


@pytest.fixture(scope="module")
def writes() -> Writes:
    return Writes()


@pytest.fixture
def unpack(tmp_path, writes):
    """Unpack an archive into a folder, and see that nothing is written elsewhere; returns the files in the folder."""
    part, place = tmp_path / "RTE.zip.part", tmp_path / "incoming"
    place.mkdir()
    targets = {str(place / file.name) for file in FILES}

    def call(archive: bytes) -> dict[str, bytes]:
        part.write_bytes(archive)
        with writes.watched():
            try:
                downloader.unpack_zip([part], FILES, place)
            finally:
                left = {file: Path(file).read_bytes() for file in writes.paths & targets if os.path.isfile(file)}
                assert writes.paths <= targets
                assert sorted(os.listdir(place)) == sorted(os.path.basename(file) for file in left)
                for file in left:
                    os.remove(file)
        return {f"RTE/{os.path.basename(file)}": content for file, content in left.items()}

    return call


def test_damaged_archives(unpack):
    def read(chance: random.Random, number: int) -> str:
        assert unpack(damaged(chance.choice(ARCHIVES), chance)) == CONTENTS
        return "read"

    seen = {}
    numbered(read, seen)
    assert seen["refused"] > seen["read"] > 0


ESCAPES = ["../escaped", "/tmp/escaped", "RTE/../../escaped", "..\\escaped", "RTE\\..\\..\\x", "..", "/"]
ODD = ["RTE/train.tsv/", "rte/train.tsv", "RTE//train.tsv", "RTE/./train.tsv", "C:\\escaped", "", ".", "RTE"]
MEMBER = st.tuples(
    st.one_of(st.sampled_from([*CONTENTS, *ESCAPES, *ODD]), st.text(max_size=12)),
    st.binary(max_size=60),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
    st.sampled_from([0o100644, 0o120777, 0o040755, 0o010644]),  # a file, a link, a folder, a pipe
)


@pytest.mark.slow
@given(members=st.lists(MEMBER, max_size=4), good=st.booleans(), number=st.integers(0, 2**32))
@fuzz
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_any_members(unpack, members, good, number):
    """Names that lead outside, links, names given twice, any packing; half of them with what is needed as well."""
    if good:
        members = members + [(name, content, zipfile.ZIP_DEFLATED, 0o100644) for name, content in CONTENTS.items()]
        random.Random(number).shuffle(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method, kind in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = kind << 16, method
            archive.writestr(info, content)
    last = {name: (content, method) for name, content, method, _ in members}
    try:
        files = unpack(out.getvalue())
    except InputError:
        common = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        outside = [
            name
            for name in last
            if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts
        ]
        assert outside or not all(name in last and last[name][0] and last[name][1] in common for name in CONTENTS)
    else:
        assert files == {name: last[name][0] for name in CONTENTS}
        assert not any(".." in name.replace("\\", "/").split("/") or name.startswith("/") for name in last)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb(unpack, monkeypatch, method):
    """Much out of little: refused by its size, and one that understates its size is not unpacked beyond that."""
    monkeypatch.setattr(downloader, "MAX_FILE_BYTES", 1 << 20)
    out, size = io.BytesIO(), 8 << 20
    with zipfile.ZipFile(out, "w", method) as archive:
        for name in CONTENTS:
            archive.writestr(name, bytes(size if name == "RTE/train.tsv" else 1))
    bomb = bytearray(out.getvalue())
    assert len(bomb) < 10_000
    with pytest.raises(InputError, match=f"{size} bytes packed by method {method}, is none of GLUE's"):
        unpack(bomb)
    place = bomb.rindex(b"RTE/train.tsv") - 46 + 24  # of the uncompressed size in the directory's entry
    bomb[place : place + 4] = (1 << 19).to_bytes(4, "little")
    with pytest.raises(InputError, match="Bad CRC-32" if method == zipfile.ZIP_DEFLATED else "none of GLUE's"):
        unpack(bomb)


# The TSV reader


def quiet_load_split(*args):
    with redirect_stdout(io.StringIO()):
        return load_split(*args)


@given(raw=st.one_of(st.binary(max_size=80), st.text("a\t\n\r\x00\u2028\ufeffé", max_size=40).map(str.encode)))
@fuzz
def test_any_bytes_as_tsv(tmp_path, raw):
    path = tmp_path / "a.tsv"
    path.write_bytes(raw)
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [line.removesuffix(b"\r").split(b"\t") for line in (lines if lines[-1] else lines[:-1])]
    try:
        table = read_tsv(path)
    except InputError as error:
        assert str(path) in str(error)
        assert len(expected) < 2 or raw.decode("utf-8", errors="ignore").encode() != raw
    else:
        assert [[field.encode() for field in row] for row in [table.columns, *table.rows]] == expected


FIELD = st.text(st.characters(exclude_characters="\t\n\r\ufeff", exclude_categories=["Cs"]), max_size=6)


@pytest.mark.slow
@given(data=st.data(), name=st.sampled_from(list(FORMATS)), split=st.sampled_from(["train", "dev", "test"]))
@fuzz
def test_any_table_of_a_task(tmp_path, data, name, split):
    """Columns in any order among others, any text, rows of any length: each row comes out with its own text and label,
    or the file is refused."""
    task, (labelled, unlabelled, labels) = get_task(name), FORMATS[name]
    columns = list(unlabelled if split == "test" else labelled or task.headerless)
    if labelled or split == "test":
        columns = data.draw(st.permutations(columns + data.draw(st.lists(FIELD, max_size=2))))
    label = None if split == "test" else columns.index(task.label_column) if task.label_column in columns else None
    rows = []
    for _ in range(data.draw(st.integers(0, 4))):
        row = [data.draw(FIELD) for _ in columns]
        if label is not None:
            row[label] = data.draw(st.sampled_from([*labels] * 5 + ["", "2 ", "nan"]))
        rows.append(row[: data.draw(st.sampled_from([len(row)] * 6 + [1]))])
    path = tmp_path / "a.tsv"
    header = [columns] if labelled or split == "test" else []
    path.write_bytes("".join("\t".join(row) + "\n" for row in header + rows).encode())
    try:
        dataset = quiet_load_split(task, path, split)
    except InputError as error:
        assert str(path) in str(error)
        return
    needed = max([columns.index(column) for column in task.columns] + ([] if label is None else [label])) + 1
    kept = [row + [""] * (needed - len(row)) for row in rows if split == "test" or len(row) >= needed]
    for text, column in zip(("text_a", "text_b"), task.columns, strict=False):
        assert dataset[text][:] == [row[columns.index(column)] for row in kept]
    if label is not None:
        given = [row[label] for row in kept]
        assert dataset["label"][:] == [float(x) if name == "STS-B" else labels.index(x) for x in given]


def test_damaged_tables(tmp_path):
    for name in FORMATS:
        write_task(tmp_path / name, name, train=4, dev=3, test=3)
    whole = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.tsv"))}
    path = tmp_path / "a.tsv"

    def read(chance: random.Random, number: int) -> str:
        original = chance.choice(list(whole))
        path.write_bytes(damaged(whole[original], chance))
        quiet_load_split(get_task(original.parent.name), path, original.stem.split("_")[0])
        return "read"

    seen = {}
    numbered(read, seen, max(100, INPUTS // 10))
    assert seen["refused"] and seen["read"]
