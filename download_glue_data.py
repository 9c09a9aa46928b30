"""Fetch the GLUE data sets, check them, and lay them out as `<data_dir>/<TASK>/{train,dev,test}.tsv`.

    python download_glue_data.py                                    # everything, into glue_data/
    python download_glue_data.py --tasks MRPC,RTE,STS-B             # some tasks
    python download_glue_data.py --base_url https://mirror.example  # from a mirror of the official server
    python download_glue_data.py --source hub                       # from the Hugging Face hub (honours HF_ENDPOINT)
    python download_glue_data.py --check                            # only check what is there; no network

Running it again fetches only what is missing or wrong, and resumes a download that was cut. A file that is already
there is replaced only once its successor is complete and has passed the check.
"""

import argparse
import hashlib
import http.client
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from bert_finetune import glue
from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors, writing

BASE_URL = "https://dl.fbaipublicfiles.com"
HUB_DATASET = "nyu-mll/glue"
ATTEMPTS = 5
TIMEOUT = 30  # seconds without an answer
CHUNK = 1 << 16  # bytes
MAX_FILE_BYTES = 1 << 31  # far beyond any file of GLUE
PASSING_STATUS = {408, 429, 500, 502, 503, 504}  # worth another attempt
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Source:
    """A file on the official server: its path under the base address, and its SHA-256 (None: not known)."""

    path: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class File:
    """One TSV file as GLUE publishes it.

    `path` is its place in the data folder and in the official archive; `split` its name on the hub; `rows` leaves the
    header out. `columns` gives, for each official column in order, the hub's field with that content, or None where the
    hub has none. `sha256` is None where it is not known.
    """

    path: str
    split: str
    rows: int
    columns: dict[str, str | None]
    header: bool
    sha256: str | None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Task:
    """A GLUE task.

    `folder` is its place in the data folder, `config` its name on the hub, `unpack(sources, files, folder)` writes
    `files` into `folder` from the downloaded `sources`. `labels` are the official label names in the order of the hub's
    numbers (none for a regression), `aliases` the task's other names.
    """

    folder: str
    config: str
    sources: tuple[Source, ...]
    unpack: Callable[[Sequence[Path], Sequence[File], Path], None]
    labels: tuple[str, ...]
    files: tuple[File, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What lies at a file's place: its rows, its fault (None: it is right), and a note on its bytes."""

    file: File
    rows: int = 0
    fault: str | None = None
    note: str = ""


# How each task's files come out of its sources


def unpack_zip(sources: Sequence[Path], files: Sequence[File], folder: Path) -> None:
    """Extract `files`, and nothing else, from the one archive in `sources` into `folder`.

    Raises InputError for an archive that is damaged, lacks one of them, is not packed as GLUE's are, or has a member
    outside its own folder.
    """
    with naming_damage():
        archive = zipfile.ZipFile(sources[0])
    with archive:
        members = {member.filename: member for member in archive.infolist()}
        for member in members:
            path = PurePosixPath(member.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"the archive has a member outside its folder, {member!r}")
        for file in files:
            if file.path not in members:
                raise InputError(f"the archive has no {file.path}")
            path = folder / file.name
            with writing(path), open(path, "wb") as target:
                target.writelines(unpacked(archive, members[file.path]))


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield a member in chunks, its checksum verified with the last. Raises InputError for damage."""
    # zipfile would unpack the other methods' data in pieces of any size, whatever it is asked for.
    common = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not (common and 0 < member.file_size <= MAX_FILE_BYTES):
        raise InputError(
            f"the archive's {member.filename!r}, {member.file_size} bytes packed by method {member.compress_type}, is "
            "none of GLUE's"
        )
    missing = member.file_size
    with naming_damage(), archive.open(member) as packed:
        while chunk := packed.read(CHUNK):
            missing -= len(chunk)
            yield chunk
    if missing:  # which zipfile lets pass where the directory's checksum is that of what is there
        raise InputError(f"the archive's {member.filename!r} is cut short by {missing} bytes")


@contextmanager
def naming_damage() -> Iterator[None]:
    """Damage shows as BadZipFile, zlib.error, EOFError, OSError...: whatever zipfile meets first, here InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the archive cannot be unpacked ({' '.join(str(error).split())})") from error


def copy_single(sources: Sequence[Path], files: Sequence[File], folder: Path) -> None:
    """Copy the one source of a task that has one file."""
    with writing(folder / files[0].name):
        shutil.copyfile(sources[0], folder / files[0].name)


def build_mrpc(sources: Sequence[Path], files: Sequence[File], folder: Path) -> None:
    """Make GLUE's MRPC files from (msr_paraphrase_train.txt, msr_paraphrase_test.txt, the id pairs of the dev set).

    The corpus's training file is split in two by the ids, both parts keeping its order and its header with the BOM; in
    the test file an index takes the place of the label. Windows line ends become Unix ones, as in the official files.
    """
    (header, *pairs), (_, *test_pairs), dev_ids = (path.read_bytes().splitlines() or [b""] for path in sources)
    dev_ids = set(dev_ids)
    parts = {"train.tsv": [header], "dev.tsv": [header], "test.tsv": [b"index\t#1 ID\t#2 ID\t#1 String\t#2 String"]}
    for pair in pairs:
        ids = b"\t".join(pair.split(b"\t")[1:3])
        parts["dev.tsv" if ids in dev_ids else "train.tsv"].append(pair)
    for index, pair in enumerate(test_pairs):
        parts["test.tsv"].append(b"%d\t%b" % (index, pair.partition(b"\t")[2]))
    for file in files:
        with writing(folder / file.name):
            (folder / file.name).write_bytes(b"".join(line + b"\n" for line in parts[file.name]))


# The tables

# The files by their place, then the sources by their name. An archive is listed where some file in it is not.
SHA256 = {
    "CoLA/dev.tsv": "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd",
    "CoLA/test.tsv": "3b4df85f7a9a0633574b38d181e18090ac961a24b18fb6bcd74999ddea8ad0b8",
    "CoLA/train.tsv": "cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624",
    "MRPC/dev.tsv": "9e8f284788040f7c9ecde2e1b3c07237c756f926bd9ef8548ef5d34b56f69f17",
    "MRPC/test.tsv": "aee460ceda833926b8ab2ad952d399f5cf8bc9335cff19afcac03dc449558622",
    "MRPC/train.tsv": "69abcedee3cf738c6ce58d772e43e1b7cdf5b4edee4aceda459c0d9f4e5599f3",
    "QNLI/dev.tsv": "ac19409dcb04631eaaa094bdebdcf621086bc352503dfb6a1a648b614986f4fd",
    "QNLI/test.tsv": "6d856264e292fa7a7bc7b8e182efa1454ffd9532733c12ad813017dd5b377a5a",
    "RTE/dev.tsv": "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb",
    "RTE/test.tsv": "6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f",
    "RTE/train.tsv": "41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c",
    "STS-B/dev.tsv": "fe7dc0632a5033562f3cadff991f6e8d9b9b6311861660e78c3c82eb7db67f59",
    "STS-B/test.tsv": "16b4223d7d44a644fbc10f1b449472cfe81e1715fb07cf44023b0aa88ce856eb",
    "STS-B/train.tsv": "41c4d978b6162abdcada7e49a982211954cca5459c228db478af333124b257a2",
    "WNLI/dev.tsv": "cba00490596dd14be8cf53b4f53bb744abe3a7b89f81ab210528d80225338ed5",
    "WNLI/test.tsv": "ff0296817e235bf6f7a230c5f6781bd6ee228a45445f6510831fdef6f2a04766",
    "WNLI/train.tsv": "9a88e9d54b6861cc796a088e9acf4f5f65064a9ef65ae6fa7a688b28391e5c9a",
    "diagnostic/diagnostic.tsv": "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd",
    "MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
    "msr_paraphrase_test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    "msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
}


def source(path: str) -> Source:
    """Return the Source at `path`, with its SHA-256 where it is known."""
    return Source(path, SHA256.get(PurePosixPath(path).name))


def tsv(path: str, split: str, rows: int, columns: dict[str, str | None], header: bool = True) -> File:
    """Return the File at `path`, with its SHA-256 where it is known."""
    return File(path, split, rows, columns, header, SHA256.get(path))


def splits(
    folder: str, labelled: dict, unlabelled: dict, train: int, dev: int, header: bool = True
) -> tuple[File, ...]:
    """Return a task's files: train and dev, of that many rows and with a `header` line or without, and test."""
    (test,) = glue.TASKS[folder].test_rows
    return (
        tsv(f"{folder}/train.tsv", "train", train, labelled, header),
        tsv(f"{folder}/dev.tsv", "validation", dev, labelled, header),
        tsv(f"{folder}/test.tsv", "test", test, unlabelled),
    )


INDEX = {"index": "idx"}
LABEL = {"label": "label"}
SENTENCE = {"sentence": "sentence"}
PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
PREMISE = {"sentence1": "premise", "sentence2": "hypothesis"}
QUESTION = {"question": "question", "sentence": "sentence"}
QUESTIONS = {"question1": "question1", "question2": "question2"}
MRPC_PAIR = {"#1 ID": None, "#2 ID": None, "#1 String": "sentence1", "#2 String": "sentence2"}
STS_ORIGIN = dict.fromkeys(("genre", "filename", "year", "old_index", "source1", "source2"))
MNLI_ORIGIN = dict.fromkeys(("promptID", "pairID", "genre"))
MNLI_PARSES = dict.fromkeys(f"sentence{n}_{parse}" for parse in ("binary_parse", "parse") for n in (1, 2))
MNLI_TEST = INDEX | MNLI_ORIGIN | MNLI_PARSES | PREMISE
MNLI_DEV = MNLI_TEST | dict.fromkeys(f"label{n}" for n in range(1, 6)) | {"gold_label": "label"}
MNLI_TRAIN = MNLI_TEST | {"label1": None, "gold_label": "label"}
COLA = {"source": None} | LABEL | {"mark": None} | SENTENCE
QQP = {"id": None, "qid1": None, "qid2": None} | QUESTIONS | {"is_duplicate": "label"}

COLA_FILES = splits("CoLA", COLA, INDEX | SENTENCE, 8551, 1043, header=False)
SST_FILES = splits("SST-2", SENTENCE | LABEL, INDEX | SENTENCE, 67349, 872)
MRPC_FILES = splits("MRPC", {"\ufeffQuality": "label"} | MRPC_PAIR, INDEX | MRPC_PAIR, 3668, 408)
STS_FILES = splits("STS-B", INDEX | STS_ORIGIN | PAIR | {"score": "label"}, INDEX | STS_ORIGIN | PAIR, 5749, 1500)
QQP_FILES = splits("QQP", QQP, {"id": "idx"} | QUESTIONS, 363846, 40430)
QNLI_FILES = splits("QNLI", INDEX | QUESTION | LABEL, INDEX | QUESTION, 104743, 5463)
RTE_FILES = splits("RTE", INDEX | PAIR | LABEL, INDEX | PAIR, 2490, 277)
WNLI_FILES = splits("WNLI", INDEX | PAIR | LABEL, INDEX | PAIR, 635, 71)
MATCHED_ROWS, MISMATCHED_ROWS, AX_ROWS = glue.TASKS["MNLI"].test_rows
AX_FILES = (tsv("diagnostic/diagnostic.tsv", "test", AX_ROWS, INDEX | PREMISE),)
MNLI_FILES = (
    tsv("MNLI/train.tsv", "train", 392702, MNLI_TRAIN),
    tsv("MNLI/dev_matched.tsv", "validation_matched", 9815, MNLI_DEV),
    tsv("MNLI/dev_mismatched.tsv", "validation_mismatched", 9832, MNLI_DEV),
    tsv("MNLI/test_matched.tsv", "test_matched", MATCHED_ROWS, MNLI_TEST),
    tsv("MNLI/test_mismatched.tsv", "test_mismatched", MISMATCHED_ROWS, MNLI_TEST),
)

ZERO_ONE = ("0", "1")
THREE_WAY = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")

MRPC_SOURCES = (
    source("senteval/senteval_data/msr_paraphrase_train.txt"),
    source("senteval/senteval_data/msr_paraphrase_test.txt"),
    source("glue/data/mrpc_dev_ids.tsv"),
)

TASKS = (
    Task("CoLA", "cola", (source("glue/data/CoLA.zip"),), unpack_zip, ZERO_ONE, COLA_FILES),
    Task("SST-2", "sst2", (source("glue/data/SST-2.zip"),), unpack_zip, ZERO_ONE, SST_FILES, aliases=("SST",)),
    Task("MRPC", "mrpc", MRPC_SOURCES, build_mrpc, ZERO_ONE, MRPC_FILES),
    Task("STS-B", "stsb", (source("glue/data/STS-B.zip"),), unpack_zip, (), STS_FILES, aliases=("STS",)),
    Task("QQP", "qqp", (source("glue/data/QQP-clean.zip"),), unpack_zip, ZERO_ONE, QQP_FILES),
    Task("MNLI", "mnli", (source("glue/data/MNLI.zip"),), unpack_zip, THREE_WAY, MNLI_FILES),
    Task("QNLI", "qnli", (source("glue/data/QNLIv2.zip"),), unpack_zip, TWO_WAY, QNLI_FILES),
    Task("RTE", "rte", (source("glue/data/RTE.zip"),), unpack_zip, TWO_WAY, RTE_FILES),
    Task("WNLI", "wnli", (source("glue/data/WNLI.zip"),), unpack_zip, ZERO_ONE, WNLI_FILES),
    Task("diagnostic", "ax", (source("glue/data/AX.tsv"),), copy_single, THREE_WAY, AX_FILES, aliases=("AX",)),
)


# Checking


def measure(path: Path) -> tuple[int, str]:
    """Return the number of lines, split on the byte `\\n` only, and the SHA-256 of a file."""
    lines, last, digest = 0, b"\n", hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
            digest.update(chunk)
    return lines + (last != b"\n"), digest.hexdigest()


def inspect(path: Path, file: File, exact: bool) -> Finding:
    """Compare the file at `path` with what GLUE publishes: by rows, and if `exact` also by SHA-256 where it is known.

    Without `exact` a known SHA-256 only makes the finding's note.
    """
    if not path.is_file():
        return Finding(file, fault="missing")
    lines, sha256 = measure(path)
    rows = lines - file.header
    if rows != file.rows:
        return Finding(file, rows, f"{rows} rows instead of {file.rows}")
    if exact and file.sha256 not in (None, sha256):
        return Finding(file, rows, f"SHA-256 {sha256} instead of {file.sha256}")
    if exact or file.sha256 is None:
        return Finding(file, rows)
    return Finding(file, rows, note="official bytes" if sha256 == file.sha256 else "not the official bytes")


def survey(task: Task, options: argparse.Namespace) -> list[Finding]:
    """Inspect the files of a task in the data folder."""
    exact = options.source == "official"
    return [inspect(Path(options.data_dir, file.path), file, exact) for file in task.files]


def report(task: Task, findings: Sequence[Finding], state: str) -> None:
    """Print one line: the task, and the rows of its files."""
    details = (f"{each.file.name} {each.rows} rows" + (each.note and f" ({each.note})") for each in findings)
    print(f"{task.folder}: {state}: {', '.join(details)}", flush=True)


# From the official server


def receive(url: str, part: Path) -> bool:
    """Fetch, in one request, what `part` still lacks of `url`; return whether it is complete.

    A part that does not belong to this file goes unnoticed here: the archive's checksums and SHA-256 reveal it later.
    Raises what urllib raises.
    """
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        # Nothing is left to fetch, or the part is longer than the file and so not a part of it.
        complete = error.headers.get("Content-Range") == f"bytes */{offset}"
        if not complete:
            part.unlink()
        return complete
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            offset = 0
        total = None if response.length is None else offset + response.length
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, writing(part), open(part, "ab" if offset else "wb") as out:
            for chunk in received(response):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the response in chunks. The network's `OSError`s become `HTTPException`s, to tell them from the disk's."""
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except OSError as error:
        raise http.client.HTTPException(str(error)) from error


def download(url: str, part: Path, backoff: float) -> None:
    """Fetch `url` into `part`, resuming what is there; the pause after a failed attempt, at first `backoff` s, doubles.

    Raises InputError, leaving the part for the next run, when the server cannot be reached or refuses.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            if receive(url, part):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in PASSING_STATUS:
                break
        except NETWORK_ERRORS as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise InputError(
        f"{url}: {reason} (attempt {attempt + 1} of {ATTEMPTS}); check the network, run the same command again to "
        "resume, or choose another server with --base_url or --source hub"
    )


def fetch_official(
    task: Task, files: Sequence[File], folder: Path, options: argparse.Namespace, backoff: float
) -> None:
    """Download the task's sources and unpack `files` into `folder`.

    The sources are removed once they are unpacked, or found damaged; until then each stays as
    `<data_dir>/<TASK>/<source>.part`, for the next run to go on from.
    """
    paths, parts = [], []
    for origin in task.sources:
        if options.path_to_mrpc and origin.name.startswith("msr_paraphrase"):
            paths.append(Path(options.path_to_mrpc, origin.name))
            if not paths[-1].is_file():
                raise InputError(f"--path_to_mrpc: there is no file {paths[-1]}")
            continue
        url, part = f"{options.base_url}/{origin.path}", Path(options.data_dir, task.folder, f"{origin.name}.part")
        download(url, part, backoff)
        if origin.sha256 not in (None, measure(part)[1]):
            part.unlink()
            raise InputError(f"{url}: not the official file (its SHA-256 differs); the download was removed, try again")
        paths.append(part)
        parts.append(part)
    try:
        task.unpack(paths, files, folder)
    except InputError as error:
        raise InputError(f"{options.base_url}/{task.sources[0].path}: {error}; it was removed, try again") from error
    except (OSError, KeyboardInterrupt):
        parts.clear()  # whole, and not at fault
        raise
    finally:
        for part in parts:
            part.unlink()


# From the hub


def hub_rows(config: str, split: str) -> Iterator[dict]:
    """Yield the rows of one split of the hub's GLUE. Raises InputError when it cannot be loaded."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import logging
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"--source hub needs `pip install huggingface_hub pyarrow` ({error})") from error
    logging.set_verbosity_error()  # the error below says it all
    name = f"{config}/{split}-00000-of-00001.parquet"
    try:
        table = parquet.read_table(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))
    # The hub's client lets the errors of its HTTP library through, and which library that is depends on its version.
    except Exception as error:
        raise InputError(
            f"{constants.ENDPOINT}/datasets/{HUB_DATASET}: cannot fetch {name} ({' '.join(str(error).split())}); check "
            "the network and HF_ENDPOINT, or use --source official"
        ) from error
    for batch in table.to_batches():
        yield from batch.to_pylist()


def label_text(labels: tuple[str, ...], value: int | float) -> str | None:
    """Return the hub's label as the official file has it (a score in at most 7 digits), or None if it is no label."""
    if labels:
        return labels[value] if value in range(len(labels)) else None
    return f"{value:.7g}" if value is not None and 0 <= value <= 5 else None


def hub_line(task: Task, file: File, row: dict) -> str:
    """Return one row of the hub as a line of the official file, with `-` in the columns that the hub lacks.

    Raises InputError for a value that the line cannot hold: no text, no label of the task, or with a tab or a line end.
    """
    cells = []
    for field in file.columns.values():
        value = "-" if field is None else row.get(field)
        if field == "label":
            value = label_text(task.labels, value)
        elif field == "idx":
            value = str(value)
        if not isinstance(value, str) or set(value) & set("\t\n\r"):
            raise InputError(
                f"{HUB_DATASET} {task.config}: {field} of row {row.get('idx')} does not fit into {file.path}"
            )
        cells.append(value)
    return "\t".join(cells)


def fetch_hub(task: Task, files: Sequence[File], folder: Path) -> None:
    """Write `files` into `folder` from the hub's rows."""
    for file in files:
        path = folder / file.name
        with writing(path), open(path, "w", encoding="utf-8", newline="\n") as out:
            if file.header:
                out.write("\t".join(file.columns) + "\n")
            for row in hub_rows(task.config, file.split):
                out.write(hub_line(task, file, row) + "\n")


# The command


@contextmanager
def incoming(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder`, so that a rename moves its files there, and remove it afterwards."""
    path = folder / ".incoming"
    shutil.rmtree(path, ignore_errors=True)  # what a killed run left
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def obtain(task: Task, options: argparse.Namespace, backoff: float) -> None:
    """Fetch the files of a task that are missing or wrong, check them, put them in place and report them.

    Raises InputError, with what was there before left as it was, for data that cannot be had or fails its check.
    """
    findings = survey(task, options)
    wrong = [finding.file for finding in findings if finding.fault]
    if not wrong:
        return report(task, findings, "already there")
    exact = options.source == "official"
    with incoming(Path(options.data_dir, task.folder)) as folder:
        if exact:
            fetch_official(task, wrong, folder, options, backoff)
        else:
            fetch_hub(task, wrong, folder)
        fetched = [inspect(folder / file.name, file, exact) for file in wrong]
        for finding in fetched:
            if finding.fault:
                raise InputError(
                    f"{finding.file.path} as fetched is not the official file ({finding.fault}) and was thrown away; "
                    "try again, or another --source or --base_url"
                )
        for file in wrong:
            os.replace(folder / file.name, Path(options.data_dir, file.path))
    report(task, fetched, "written")


def check(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Report each task that is right, print one line on stderr per wrong file, and exit with 2 if there is any."""
    faults = 0
    for task in tasks:
        findings = survey(task, options)
        wrong = [finding for finding in findings if finding.fault]
        for finding in wrong:
            print(f"{Path(options.data_dir, finding.file.path)}: {finding.fault}", file=sys.stderr)
        if not wrong:
            report(task, findings, "right")
        faults += len(wrong)
    if faults:
        sys.exit(2)


def choose(names: str, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks named in `names` (comma-separated, any case, `all` for all), in the order of `tasks`."""
    wanted = {name.strip().lower() for name in names.split(",")}
    known = {task.folder: {name.lower() for name in (task.folder, *task.aliases)} for task in tasks}
    unknown = wanted - {"all"}.union(*known.values())
    if unknown:
        raise InputError(
            f"--tasks: unknown {', '.join(map(repr, sorted(unknown)))}; choose among all, {', '.join(known)}"
        )
    return [task for task in tasks if "all" in wanted or known[task.folder] & wanted]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for options that are wrong or do not go together."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="glue_data", help="where the task folders go (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        default="all",
        help="all, or some, with commas: CoLA, SST-2 (SST), MRPC, STS-B (STS), QQP, MNLI, QNLI, RTE, WNLI, "
        "AX (diagnostic); in upper or lower case (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        choices=("official", "hub"),
        default="official",
        help="official: the server of the original archives; each file is checked by SHA-256 where it is known, else "
        "by its number of rows. hub: nyu-mll/glue on the Hugging Face hub, or on the mirror that HF_ENDPOINT names; "
        "columns that it lacks are written as `-` and some bytes may differ from the official file, so its files are "
        "checked by their number of rows, and the SHA-256 is only reported (default: %(default)s)",
    )
    parser.add_argument(
        "--base_url",
        help="with --source official: a mirror with glue/data/... and senteval/senteval_data/... below this address "
        f"(default: {BASE_URL})",
    )
    parser.add_argument(
        "--path_to_mrpc",
        metavar="FOLDER",
        help="with --source official: take msr_paraphrase_train.txt and msr_paraphrase_test.txt from here",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check what is there, in the way of --source, without any network: exit code 0 when all is right, "
        "else 2 and one line per wrong file",
    )
    options = parser.parse_args(argv)
    if options.source == "hub" and (options.base_url or options.path_to_mrpc):
        parser.error("--base_url and --path_to_mrpc go with --source official")
    options.base_url = BASE_URL if options.base_url is None else options.base_url.rstrip("/")
    try:
        address = urlsplit(options.base_url)
        usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
        usable = usable and address.hostname.encode("idna") and re.fullmatch("[!-~]+", options.base_url)
    except ValueError:
        usable = False
    if not usable:
        parser.error(f"--base_url: {options.base_url!r} is not an http(s) address")
    return options


@reports_input_errors
def main(argv: Sequence[str] | None = None, tasks: Sequence[Task] = TASKS, backoff: float = 1.0) -> None:
    """Run the command; `tasks` is the table of what GLUE publishes, `backoff` the first pause between attempts (s)."""
    options = parse(argv)
    chosen = choose(options.tasks, tasks)
    try:
        if options.check:
            return check(chosen, options)
        for task in chosen:
            obtain(task, options, backoff)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None


if __name__ == "__main__":
    main()
