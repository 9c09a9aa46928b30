"""Tests of download_glue_data.py against a real HTTP server on this machine and made-up data in the official form."""

import hashlib
import io
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pytest
from loopback import Loopback, QuietHandler
from mishaps import full_disk

import download_glue_data as downloader
from bert_finetune.errors import InputError
from bert_finetune.glue import CORPORA, TASKS, Corpus, File, get_task
from bert_finetune.glue_sha256 import SHA256

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "glue_data"
needs_official_files = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the official files are not at {SHARED}")

ROWS = {"train": 7, "validation": 4, "test": 5}
HUB = "/datasets/nyu-mll/glue/resolve/main"


@dataclass
class Server(Loopback):
    """An HTTP server of `files`; each GET uses up one of `faults`, a status or the number of bytes to cut after."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list = field(default_factory=list)
    resumes: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range header

    def handler(self) -> type[QuietHandler]:
        server = self

        class Handler(QuietHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                self.answer(server.faults.pop(0) if server.faults else None)

            def do_HEAD(self):
                self.answer(None)

            def answer(self, fault):
                body, start = server.files.get(self.path), 0
                if isinstance(fault, int) or body is None:
                    return self.send_error(fault or 404)
                if server.resumes and self.headers.get("Range"):
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                self.send_response(200 if not start else 206 if start < len(body) else 416)
                if start:
                    span = f"{start}-{len(body) - 1}" if start < len(body) else "*"
                    self.send_header("Content-Range", f"bytes {span}/{len(body)}")
                self.send_header("Content-Length", str(len(body[start:])))
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[start:] if fault is None else body[start : start + fault["cut"]])

        return Handler


@dataclass
class Glue:
    """Made-up data of all tasks: the table for it, the server that has it, and the files that must come out."""

    corpora: tuple[Corpus, ...]
    contents: dict[str, bytes]
    server: Server
    data_dir: Path

    def run(self, *options: str) -> int:
        """Run the command against the server and return its exit code."""
        if "hub" not in options and "--base_url" not in options:
            options += ("--base_url", self.server.url)
        try:
            downloader.main([*options, "--data_dir", str(self.data_dir)], corpora=self.corpora, backoff=0.01)
        except SystemExit as error:
            return error.code
        return 0

    def put(self, path: str, content: bytes | None = None) -> Path:
        """Lay the right content, or another, at `path` of the data folder."""
        target = self.data_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.contents[path] if content is None else content)
        return target

    def present(self) -> dict[str, bytes]:
        """All files of the data folder but the parts that a later run resumes."""
        files = (path for path in self.data_dir.rglob("*") if path.is_file() and path.suffix != ".part")
        return {path.relative_to(self.data_dir).as_posix(): path.read_bytes() for path in files}

    def expected(self, folder: str) -> dict[str, bytes]:
        return {path: content for path, content in self.contents.items() if path.startswith(f"{folder}/")}


def lines(*rows: str) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def made_up(file: File) -> bytes:
    """The official form, with a lone quote, a letter beyond ASCII and a line separator, which are all text in GLUE."""
    names = list(file.columns)
    count = ROWS[file.split.split("_")[0]]
    rows = ["\t".join(f'{name} "é\u2028 {number}' for name in names) for number in range(count)]
    return lines(*(["\t".join(names)] if file.header else []), *rows)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def declaring(members: dict[str, bytes], name: str, size: int) -> bytes:
    """An archive whose directory gives another size for one member."""
    packed = zipped(members, zipfile.ZIP_DEFLATED)
    place = packed.rindex(name.encode()) - 46 + 24  # of the uncompressed size in the directory's entry
    return packed[:place] + size.to_bytes(4, "little") + packed[place + 4 :]


def pairs(start: int, count: int) -> list[str]:
    return [f'{n % 2}\t{n}00\t{n}01\tFirst " made-up café {n} .\tSecond one {n} .' for n in range(start, start + count)]


MRPC_COLUMNS = "#1 ID\t#2 ID\t#1 String\t#2 String"
MRPC_HEADER = f"\ufeffQuality\t{MRPC_COLUMNS}"
MRPC_SOURCES = {
    "msr_paraphrase_train.txt": lines(MRPC_HEADER, *pairs(0, 11)),
    "msr_paraphrase_test.txt": lines(MRPC_HEADER, *pairs(20, 5)),
    "mrpc_dev_ids.tsv": lines("900\t901", "200\t201", "500\t501", "300\t301"),
}
MRPC_FILES = {
    "MRPC/train.tsv": lines(MRPC_HEADER, *pairs(0, 2), *pairs(4, 1), *pairs(6, 3), *pairs(10, 1)),
    "MRPC/dev.tsv": lines(MRPC_HEADER, *pairs(2, 2), *pairs(5, 1), *pairs(9, 1)),
    "MRPC/test.tsv": lines(f"index\t{MRPC_COLUMNS}", *(f"{i}{pair[1:]}" for i, pair in enumerate(pairs(20, 5)))),
}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Iterator[Glue]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contents = {file.path: made_up(file) for corpus in CORPORA for file in corpus.files} | MRPC_FILES
    corpora, served = [], {}
    for corpus in CORPORA:
        packed = {file.path: contents[file.path] for file in corpus.files} | {f"{corpus.folder}/original/x": b"no"}
        for source in corpus.sources:
            single = MRPC_SOURCES.get(PurePosixPath(source).name, contents["diagnostic/diagnostic.tsv"])
            served[f"/{source}"] = zipped(packed) if source.endswith(".zip") else single
        files = tuple(replace(file, rows=ROWS[file.split.split("_")[0]]) for file in corpus.files)
        corpora.append(replace(corpus, files=files))
    made = contents | {PurePosixPath(path).name: content for path, content in served.items()}
    known = {name: hashlib.sha256(content).hexdigest() for name, content in made.items() if name in SHA256}
    monkeypatch.setattr(downloader, "SHA256", known)
    with Server(served) as server:
        yield Glue(tuple(corpora), contents, server, tmp_path / "glue_data")


def only_error(capsys) -> str:
    """The single line on stderr."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and "error: " in error
    return error


# From the official server


def test_plain_run(data, capsys):
    assert data.run("--tasks", "all") == 0
    assert data.present() == data.contents
    assert not list(data.data_dir.rglob("*.part")) and not list(data.data_dir.rglob(".incoming"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(data.corpora)
    assert "CoLA: written: train.tsv 7 rows, dev.tsv 4 rows, test.tsv 5 rows" in printed
    assert "diagnostic: written: diagnostic.tsv 5 rows" in printed


def test_what_is_there_and_right_is_not_fetched(data, capsys):
    for path in data.contents:
        data.put(path)
    assert data.run() == 0
    assert data.server.requests == []
    assert "RTE: already there: train.tsv 7 rows" in capsys.readouterr().out


def test_only_the_wrong_file_is_replaced(data):
    right, _ = data.put("RTE/train.tsv"), data.put("RTE/dev.tsv", b"old")
    os.utime(right, (1, 1))
    assert data.run("--tasks", "RTE") == 0
    assert data.present() == data.expected("RTE")
    assert right.stat().st_mtime == 1


def test_a_cut_connection_resumes_in_the_same_run(data):
    data.server.faults = [{"cut": 100}, {"cut": 50}]
    assert data.run("--tasks", "AX") == 0
    assert [span for _, span in data.server.requests] == [None, "bytes=100-", "bytes=150-"]
    assert data.present() == data.expected("diagnostic")


def test_the_next_run_resumes_what_the_last_one_left(data, capsys):
    old = data.put("RTE/dev.tsv", b"old")
    data.server.faults = [{"cut": 10}] * downloader.ATTEMPTS
    assert data.run("--tasks", "RTE") == 2
    assert "/glue/data/RTE.zip: the connection was cut" in only_error(capsys)
    assert data.present() == {"RTE/dev.tsv": b"old"} and old.read_bytes() == b"old"
    assert (data.data_dir / "RTE/RTE.zip.part").stat().st_size == 10 * downloader.ATTEMPTS

    data.server.requests.clear()
    assert data.run("--tasks", "RTE") == 0
    assert data.server.requests == [("/glue/data/RTE.zip", f"bytes={10 * downloader.ATTEMPTS}-")]
    assert data.present() == data.expected("RTE")


def test_a_server_without_ranges_sends_all_again(data):
    data.server.resumes = False
    data.server.faults = [{"cut": 100}]
    assert data.run("--tasks", "AX") == 0
    assert [span for _, span in data.server.requests] == [None, "bytes=100-"]
    assert data.present() == data.expected("diagnostic")


@pytest.mark.parametrize("rest", [b"", b"of something longer"])
def test_a_part_that_lacks_nothing(data, rest):
    archive = data.server.files["/glue/data/RTE.zip"]
    data.put("RTE/RTE.zip.part", archive + rest)
    assert data.run("--tasks", "RTE") == 0
    assert [span for _, span in data.server.requests] == [f"bytes={len(archive + rest)}-"] + [None] * bool(rest)
    assert data.present() == data.expected("RTE")


def test_a_missing_file_on_the_server(data, capsys):
    data.put("RTE/dev.tsv", b"old")
    del data.server.files["/glue/data/RTE.zip"]
    assert data.run("--tasks", "RTE") == 2
    error = only_error(capsys)
    assert f"{data.server.url}/glue/data/RTE.zip: HTTP 404" in error and "--base_url" in error
    assert len(data.server.requests) == 1
    assert data.present() == {"RTE/dev.tsv": b"old"}


def test_a_busy_server_is_asked_again(data):
    data.server.faults = [503, 503]
    assert data.run("--tasks", "RTE") == 0
    assert len(data.server.requests) == 3
    assert data.present() == data.expected("RTE")


def test_the_pause_doubles(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with Server(faults=[503] * downloader.ATTEMPTS) as server, pytest.raises(InputError, match="HTTP 503"):
        downloader.download(f"{server.url}/x", tmp_path / "x.part", backoff=3)
    assert pauses == [3, 6, 12, 24]


def test_a_server_that_cannot_be_reached(data, capsys):
    data.put("RTE/dev.tsv", b"old")
    with Server() as gone:
        pass
    assert data.run("--tasks", "RTE", "--base_url", gone.url) == 2
    assert f"{gone.url}/glue/data/RTE.zip: Connection refused; check the network" in only_error(capsys)
    assert data.present() == {"RTE/dev.tsv": b"old"}


def test_a_proxy_is_asked(data, monkeypatch):
    monkeypatch.setenv("http_proxy", data.server.url)
    data.server.files["http://glue.invalid/glue/data/RTE.zip"] = data.server.files["/glue/data/RTE.zip"]
    assert data.run("--tasks", "RTE", "--base_url", "http://glue.invalid") == 0
    assert data.present() == data.expected("RTE")


def members(data: Glue, folder: str, **changed: bytes | None) -> dict[str, bytes]:
    """The members of a task's archive with some replaced (name without suffix) or left out (None)."""
    changes = {f"{folder}/{name}.tsv": content for name, content in changed.items()}
    return {name: content for name, content in (data.expected(folder) | changes).items() if content is not None}


BAD_ARCHIVES = {
    "truncated": (lambda data: data.server.files["/glue/data/RTE.zip"][:-30], "cannot be unpacked"),
    "not a zip": (lambda data: b"<html>Please log in</html>", "cannot be unpacked"),
    "spoilt": (
        lambda data: data.server.files["/glue/data/RTE.zip"].replace(b"sentence2", b"sentence3"),
        "cannot be unpacked",
    ),
    "tampered": (lambda data: zipped(members(data, "RTE", dev=data.contents["RTE/dev.tsv"].upper())), "SHA-256"),
    "too short": (lambda data: zipped(members(data, "RTE", dev=lines("index", "0\ta\tb"))), "1 rows instead of 4"),
    "parent": (lambda data: zipped(members(data, "RTE") | {"RTE/../../escaped": b""}), "'RTE/../../escaped'"),
    "absolute": (lambda data: zipped(members(data, "RTE") | {"/tmp/escaped": b""}), "'/tmp/escaped'"),
    "missing": (lambda data: zipped(members(data, "RTE", dev=None)), "no RTE/dev.tsv"),
    "another packing": (
        lambda data: zipped(members(data, "RTE"), zipfile.ZIP_BZIP2),
        "'RTE/train.tsv', 508 bytes packed by method 12, is none of GLUE's",
    ),
    "a bomb": (
        lambda data: declaring(members(data, "RTE"), "RTE/dev.tsv", downloader.MAX_FILE_BYTES + 1),
        "'RTE/dev.tsv', 2147483649 bytes packed by method 8, is none of GLUE's",
    ),
    "a member that is longer than it says": (
        lambda data: declaring(members(data, "RTE"), "RTE/dev.tsv", 10),
        "cannot be unpacked (Bad CRC-32",
    ),
    "a member that is shorter than it says": (
        lambda data: declaring(members(data, "RTE"), "RTE/dev.tsv", 10**6),
        f"'RTE/dev.tsv' is cut short by {10**6 - 304} bytes",
    ),
    "an empty member": (
        lambda data: zipped(members(data, "RTE", dev=b"")),
        "'RTE/dev.tsv', 0 bytes packed by method 0, is none of GLUE's",
    ),
    "other folder": (lambda data: zipped({"train.tsv": b"", "dev.tsv": b"", "test.tsv": b""}), "no RTE/train.tsv"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_changes_nothing(data, capsys, kind):
    make, message = BAD_ARCHIVES[kind]
    good = data.server.files["/glue/data/RTE.zip"]
    data.put("RTE/dev.tsv", b"old")
    data.put("RTE/test.tsv", b"older")
    data.server.files["/glue/data/RTE.zip"] = make(data)
    assert data.run("--tasks", "RTE") == 2
    assert message in only_error(capsys)
    assert data.present() == {"RTE/dev.tsv": b"old", "RTE/test.tsv": b"older"}
    assert not list(data.data_dir.parent.rglob("escaped"))

    data.server.files["/glue/data/RTE.zip"] = good
    assert data.run("--tasks", "RTE") == 0
    assert data.present() == data.expected("RTE")


def test_an_archive_of_known_sha256_is_checked_itself(data, capsys):
    data.put("QQP/train.tsv", b"old")
    tampered = data.contents["QQP/train.tsv"].upper()
    data.server.files["/glue/data/QQP-clean.zip"] = zipped(members(data, "QQP", train=tampered))
    assert data.run("--tasks", "QQP") == 2
    assert "QQP-clean.zip: not the official file" in only_error(capsys)
    assert data.present() == {"QQP/train.tsv": b"old"}
    assert not list(data.data_dir.rglob("*.part"))


def test_an_interruption_leaves_no_half_file(data, capsys, monkeypatch):
    def interrupted(sources, files, folder):
        (folder / "train.tsv").write_bytes(b"half")
        raise KeyboardInterrupt

    data.put("RTE/train.tsv", b"old")
    monkeypatch.setattr(downloader, "unpack_zip", interrupted)
    assert data.run("--tasks", "RTE") == 130
    assert capsys.readouterr().err.endswith(": interrupted; the same command goes on from here\n")
    assert data.present() == {"RTE/train.tsv": b"old"}


def test_a_mistake_of_the_program_keeps_its_traceback_and_the_download(data, monkeypatch):
    def mistaken(sources, files, folder):
        return files.no_such_thing

    monkeypatch.setattr(downloader, "unpack_zip", mistaken)
    with pytest.raises(AttributeError, match="no_such_thing"):
        data.run("--tasks", "RTE")
    assert (data.data_dir / "RTE/RTE.zip.part").read_bytes() == data.server.files["/glue/data/RTE.zip"]


@pytest.mark.parametrize(("room", "named", "fetched_again"), [(300, "RTE.zip.part", 1), (900, ".incoming/dev.tsv", 0)])
def test_a_full_disk(data, capsys, room, named, fetched_again):
    """While the archive comes in (it is kept, to go on from), and while it is unpacked (it is whole)."""
    contents = data.expected("RTE") | {"RTE/dev.tsv": b"index\n" + b"0\ta\tb\n" * 1000}
    data.server.files["/glue/data/RTE.zip"] = zipped(contents, zipfile.ZIP_DEFLATED)
    data.put("RTE/test.tsv", b"old")
    with full_disk(room):
        assert data.run("--tasks", "RTE") == 2
    assert f"error: {data.data_dir / 'RTE' / named}: cannot be written: " in only_error(capsys)
    assert data.present() == {"RTE/test.tsv": b"old"}
    data.server.requests.clear()
    assert data.run("--tasks", "RTE") == 2  # the archive is not GLUE's
    assert "1000 rows instead of 4" in only_error(capsys)
    whole = len(data.server.files["/glue/data/RTE.zip"])
    assert data.server.requests == [("/glue/data/RTE.zip", f"bytes={300 if fetched_again else whole}-")]
    assert data.present() == {"RTE/test.tsv": b"old"}


def test_a_killed_run_is_cleaned_up(data):
    data.put("RTE/.incoming/train.tsv", b"half")
    assert data.run("--tasks", "RTE") == 0
    assert data.present() == data.expected("RTE")


# MRPC


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_path_to_mrpc(data, tmp_path, line_end):
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (tmp_path / name).write_bytes(MRPC_SOURCES[name].replace(b"\n", line_end))
    assert data.run("--tasks", "mrpc", "--path_to_mrpc", str(tmp_path)) == 0
    assert data.server.requests == [("/glue/data/mrpc_dev_ids.tsv", None)]
    assert data.present() == MRPC_FILES
    assert (tmp_path / "msr_paraphrase_train.txt").is_file()


def test_path_to_mrpc_without_the_files(data, tmp_path, capsys):
    assert data.run("--tasks", "MRPC", "--path_to_mrpc", str(tmp_path)) == 2
    assert str(tmp_path / "msr_paraphrase_train.txt") in only_error(capsys)


def test_a_path_to_another_mrpc(data, tmp_path, capsys):
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (tmp_path / name).write_bytes(b"")
    assert data.run("--tasks", "MRPC", "--path_to_mrpc", str(tmp_path)) == 2
    assert "MRPC/train.tsv" in only_error(capsys)
    assert data.present() == {}


def test_a_tampered_mrpc_source(data, capsys):
    data.put("MRPC/dev.tsv", b"old")
    data.server.files["/senteval/senteval_data/msr_paraphrase_test.txt"] += b"0\t1\t2\ta\tb\n"
    assert data.run("--tasks", "MRPC") == 2
    assert "msr_paraphrase_test.txt: not the official file" in only_error(capsys)
    assert data.present() == {"MRPC/dev.tsv": b"old"}


@needs_official_files
def test_mrpc_is_built_byte_for_byte(tmp_path):
    folder = SHARED / "MRPC"
    names = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv")
    downloader.build_mrpc([folder / name for name in names], get_task("MRPC").corpus.files, tmp_path)
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# Checking


def test_check_of_what_is_right(data, capsys):
    for path in data.expected("RTE"):
        data.put(path)
    assert data.run("--tasks", "RTE", "--check") == 0
    assert capsys.readouterr().out == "RTE: right: train.tsv 7 rows, dev.tsv 4 rows, test.tsv 5 rows\n"


def test_check_names_each_wrong_file(data, capsys):
    data.put("RTE/train.tsv")
    data.put("RTE/dev.tsv", data.contents["RTE/dev.tsv"].upper())
    data.put("QQP/train.tsv", data.contents["QQP/train.tsv"] + b"one more")
    before = data.present()
    assert data.run("--tasks", "RTE,QQP", "--check") == 2
    dev, test, train, *missing = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "QQP" in line)
    assert dev.startswith(f"{data.data_dir / 'RTE/dev.tsv'}: SHA-256 ")
    assert test == f"{data.data_dir / 'RTE/test.tsv'}: missing"
    assert train == f"{data.data_dir / 'QQP/train.tsv'}: 8 rows instead of 7"
    assert missing == [f"{data.data_dir / 'QQP' / name}: missing" for name in ("dev.tsv", "test.tsv")]
    assert data.server.requests == [] and data.present() == before


@needs_official_files
def test_check_of_the_official_files(capsys):
    downloader.main(["--check", "--tasks", "CoLA,MRPC,STS-B,RTE,WNLI,AX", "--data_dir", str(SHARED)])
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("content", "count"),
    [("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("a\n\n", 2), ("a\rb\x0b\x0c\x1c\x85\u2028\u2029c\n", 1)],
)
def test_a_row_ends_at_a_line_feed_and_nowhere_else(tmp_path, content, count):
    path = tmp_path / "file"
    path.write_bytes(content.encode())
    assert downloader.lines_and_sha256(path) == (count, hashlib.sha256(content.encode()).hexdigest())


# The options


def test_the_names_of_the_tasks():
    official = ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI", "diagnostic"]
    assert [corpus.folder for corpus in downloader.choose("all", CORPORA)] == official
    for names, folders in {"ax,sst,STS": "SST-2 STS-B diagnostic", "Diagnostic, cola ,COLA": "CoLA diagnostic"}.items():
        assert [corpus.folder for corpus in downloader.choose(names, CORPORA)] == folders.split()
    assert get_task("sts") is get_task("STS-B") is TASKS["STS-B"]
    with pytest.raises(InputError, match="no such task"):
        get_task("AX")  # MNLI's model predicts it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "RTE,SNLI"], "'snli'"),
        (["--tasks", ""], "--tasks"),
        (["--source", "elsewhere"], "--source"),
        (["--no_such_option"], "--no_such_option"),
        (["--base_url", "ftp://example.org"], "--base_url"),
        (["--base_url", "http://"], "--base_url"),
        (["--base_url", "http://a:b"], "--base_url"),
        (["--base_url", ""], "--base_url"),
        (["--source", "hub", "--base_url", "http://example.org"], "--source official"),
        (["--source", "hub", "--path_to_mrpc", "x"], "--source official"),
    ],
)
def test_bad_options(data, capsys, options, message):
    assert data.run(*options) == 2
    assert message in only_error(capsys)
    assert data.server.requests == [] and not data.data_dir.exists()


def test_a_data_dir_that_is_a_file(data, capsys):
    data.data_dir.write_bytes(b"mine")
    assert data.run("--tasks", "RTE") == 2
    assert str(data.data_dir) in only_error(capsys)
    assert data.data_dir.read_bytes() == b"mine"


# From the hub


def hub_split(corpus: Corpus, file: File, count: int) -> bytes:
    """A parquet file with the hub's columns for this split; its test labels are -1."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    fields = {name for name in file.columns.values() if name} - {"label", "idx"}
    columns = {name: [f"{name} {number}" for number in range(count)] for name in sorted(fields)}
    labels = [number % corpus.kind.outputs for number in range(count)] if file.split != "test" else [-1] * count
    if corpus.folder == "STS-B":
        labels = pyarrow.array([0.0, 5.0, 2.6, 3.588, 4.25, 1.2, 0.1][:count], pyarrow.float32())
    columns |= {"label": labels, "idx": pyarrow.array(range(count), pyarrow.int32())}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def serve_hub(server: Server, corpora: Sequence[Corpus]) -> None:
    for corpus in corpora:
        for file in corpus.files:
            path = f"{HUB}/{corpus.config}/{file.split}-00000-of-00001.parquet"
            server.files[path] = hub_split(corpus, file, file.rows)


def hub_is_at(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does, which the hub's client reads only once, when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def hub(data, tmp_path, monkeypatch) -> Glue:
    """The made-up data on a server that speaks the hub's protocol."""
    hub_is_at(data.server.url, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client has its own pauses
    serve_hub(data.server, data.corpora)
    return data


def test_the_hub_gives_the_official_form(hub, capsys):
    assert hub.run("--source", "hub") == 0
    present = {path: content.decode().split("\n") for path, content in hub.present().items()}
    assert {path: len(rows) for path, rows in present.items()} == {
        file.path: file.header + file.rows + 1 for corpus in hub.corpora for file in corpus.files
    }
    assert present["CoLA/train.tsv"][1] == "-\t1\t-\tsentence 1"
    assert present["CoLA/test.tsv"][:2] == ["index\tsentence", "0\tsentence 0"]
    assert present["SST-2/dev.tsv"][:2] == ["sentence\tlabel", "sentence 0\t0"]
    assert present["MRPC/dev.tsv"][:2] == [MRPC_HEADER, "0\t-\t-\tsentence1 0\tsentence2 0"]
    assert present["MRPC/test.tsv"][:2] == [f"index\t{MRPC_COLUMNS}", "0\t-\t-\tsentence1 0\tsentence2 0"]
    assert present["STS-B/train.tsv"][0].split("\t")[-3:] == ["sentence1", "sentence2", "score"]
    scores = ["0", "5", "2.6", "3.588", "4.25", "1.2", "0.1"]
    assert [row.split("\t")[9] for row in present["STS-B/train.tsv"][:-1]] == ["score", *scores]
    assert present["STS-B/test.tsv"][1] == "0\t-\t-\t-\t-\t-\t-\tsentence1 0\tsentence2 0"
    assert present["QQP/train.tsv"][0] == "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    assert present["QQP/train.tsv"][2] == "-\t-\t-\tquestion1 1\tquestion2 1\t1"
    assert present["QQP/test.tsv"][:2] == ["id\tquestion1\tquestion2", "0\tquestion1 0\tquestion2 0"]
    classes = ["entailment", "neutral", "contradiction"]
    assert [row.split("\t")[11] for row in present["MNLI/train.tsv"][:4]] == ["gold_label", *classes]
    assert [row.split("\t")[15] for row in present["MNLI/dev_mismatched.tsv"][:4]] == ["gold_label", *classes]
    assert present["MNLI/test_matched.tsv"][1].split("\t") == ["0", *"-------", "premise 0", "hypothesis 0"]
    assert present["QNLI/dev.tsv"][:2] == ["index\tquestion\tsentence\tlabel", "0\tquestion 0\tsentence 0\tentailment"]
    assert present["RTE/train.tsv"][2] == "1\tsentence1 1\tsentence2 1\tnot_entailment"
    assert present["WNLI/train.tsv"][2] == "1\tsentence1 1\tsentence2 1\t1"
    assert present["diagnostic/diagnostic.tsv"][:2] == ["index\tsentence1\tsentence2", "0\tpremise 0\thypothesis 0"]
    assert "RTE: written: train.tsv 7 rows (not the official bytes)" in capsys.readouterr().out


def test_files_from_the_hub_are_checked_by_their_rows(hub, capsys):
    assert hub.run("--source", "hub", "--tasks", "RTE") == 0
    hub.put("RTE/dev.tsv")
    hub.server.files.clear()
    assert hub.run("--source", "hub", "--tasks", "RTE") == 0
    assert hub.run("--source", "hub", "--tasks", "RTE", "--check") == 0
    assert "dev.tsv 4 rows (official bytes)" in capsys.readouterr().out
    assert hub.run("--tasks", "RTE", "--check") == 2


def served_rows(hub: Glue, config: str, split: str, **columns: list) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    hub.server.files[f"{HUB}/{config}/{split}-00000-of-00001.parquet"] = buffer.getvalue()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a", "a\tb", "c", "d"], "label": [0, 1, 0, 1]}, "sentence of row 1"),
        ({"sentence": ["a", "b", "c\n", "d"], "label": [0, 1, 0, 1]}, "sentence of row 2"),
        ({"sentence": ["a", None, "c", "d"], "label": [0, 1, 0, 1]}, "sentence of row 1"),
        ({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}, "sentence of row 0"),
        ({"sentence": ["a", "b", "c", "d"], "label": [0, -1, 0, 1]}, "label of row 1"),
        ({"sentence": ["a", "b", "c", "d"], "label": [0, 2, 0, 1]}, "label of row 1"),
        ({"sentence": ["a", "b", "c"], "label": [0, 1, 0]}, "3 rows instead of 4"),
    ],
)
def test_hub_rows_that_do_not_fit(hub, capsys, columns, message):
    hub.put("SST-2/dev.tsv", b"old")
    served_rows(hub, "sst2", "validation", idx=list(range(len(columns["label"]))), **columns)
    assert hub.run("--source", "hub", "--tasks", "SST-2") == 2
    assert message in only_error(capsys)
    assert hub.present() == {"SST-2/dev.tsv": b"old"}


@pytest.mark.parametrize("fault", ["gone", "not parquet", "no server"])
def test_a_hub_that_fails(hub, capsys, monkeypatch, fault):
    hub.put("RTE/dev.tsv", b"old")
    path = f"{HUB}/rte/train-00000-of-00001.parquet"
    if fault == "gone":
        del hub.server.files[path]
    elif fault == "not parquet":
        hub.server.files[path] = b"<html>Please log in</html>"
    else:
        with Server() as gone:
            pass
        hub_is_at(gone.url, monkeypatch)
    assert hub.run("--source", "hub", "--tasks", "RTE") == 2
    assert "/datasets/nyu-mll/glue: cannot fetch rte/train-" in only_error(capsys)
    assert hub.present() == {"RTE/dev.tsv": b"old"}


@pytest.mark.slow
def test_the_script_itself_honours_hf_endpoint(tmp_path):
    pytest.importorskip("huggingface_hub")
    with Server() as server:
        serve_hub(server, [TASKS["WNLI"].corpus])
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "download_glue_data.py", "--source", "hub", "--tasks", "WNLI", "--data_dir"]
        done = subprocess.run([*command, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train.tsv 635 rows (not the official bytes), dev.tsv 71 rows" in done.stdout
    assert (tmp_path / "WNLI/test.tsv").read_text().splitlines()[145 + 1] == "145\tsentence1 145\tsentence2 145"
