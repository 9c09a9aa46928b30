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
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from bert_finetune.errors import DAMAGE, ArgumentParser, InputError, reason, reports_input_errors, writing
from bert_finetune.glue import CORPORA, Corpus, File
from bert_finetune.glue_sha256 import SHA256

BASE_URL = "https://dl.fbaipublicfiles.com"
HUB_DATASET = "nyu-mll/glue"
ATTEMPTS = 6  # the second at once, the next after pauses that double
TIMEOUT = 30  # seconds without an answer
CHUNK = 1 << 16  # bytes
MAX_FILE_BYTES = 1 << 31  # far beyond any file of GLUE
PASSING_STATUS = {408, 429, 500, 502, 503, 504}  # worth another attempt


@dataclass(frozen=True)
class Finding:
    """What lies at a file's place: its rows, its fault (None: it is right), and a note on its bytes."""

    file: File
    rows: int = 0
    fault: str | None = None
    note: str = ""


# How a corpus's files come out of its sources


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
    """Around zipfile's work alone: what it raises for a damaged archive becomes an InputError."""
    try:
        yield
    except DAMAGE as error:
        raise InputError(f"the archive cannot be unpacked ({in_one_line(error)})") from error


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def copy_single(sources: Sequence[Path], files: Sequence[File], folder: Path) -> None:
    """Copy the one source of a corpus that has one file."""
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


# All others come as one zip.
UNPACKERS = {"MRPC": build_mrpc, "diagnostic": copy_single}


# Checking


def lines_and_sha256(path: Path) -> tuple[int, str]:
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
    lines, sha256 = lines_and_sha256(path)
    rows, official = lines - file.header, SHA256.get(file.path)
    if rows != file.rows:
        return Finding(file, rows, f"{rows} rows instead of {file.rows}")
    if exact and official not in (None, sha256):
        return Finding(file, rows, f"SHA-256 {sha256} instead of {official}")
    if exact or official is None:
        return Finding(file, rows)
    return Finding(file, rows, note="official bytes" if sha256 == official else "not the official bytes")


def survey(corpus: Corpus, options: argparse.Namespace) -> list[Finding]:
    """Inspect the files of a corpus in the data folder."""
    exact = options.source == "official"
    return [inspect(Path(options.data_dir, file.path), file, exact) for file in corpus.files]


def report(corpus: Corpus, findings: Sequence[Finding], state: str) -> None:
    """Print one line: the corpus, and the rows of its files."""
    details = (f"{each.file.name} {each.rows} rows" + (each.note and f" ({each.note})") for each in findings)
    print(f"{corpus.folder}: {state}: {', '.join(details)}", flush=True)


# From the official server


def download(url: str, part: Path, backoff: float) -> None:
    """Fetch `url` into `part`, resuming what is there.

    Each request is repeated where the server cannot be reached or is busy: at once, then after pauses of `backoff`,
    twice that, ... seconds. Where the connection is cut, another one asks for the rest. Raises InputError, leaving the
    part for the next run, when that does not help, and when the server refuses.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    retry = Retry(
        ATTEMPTS - 1,
        backoff_factor=backoff / 2,
        status_forcelist=PASSING_STATUS,
        raise_on_status=False,
        respect_retry_after_header=False,  # which may be hours
    )
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            for _ in range(ATTEMPTS):
                cut = receive(session, url, part)
                if cut is None:
                    return
        cause, why = cut, "the connection was cut"
    except requests.HTTPError as error:
        cause, why = error, f"HTTP {error.response.status_code} {error.response.reason}"
    except requests.RequestException as error:
        cause, why = error, reason(first_cause(error))
    raise InputError(
        f"{url}: {why}; check the network, run the same command again to resume, or choose another server with "
        "--base_url or --source hub"
    ) from cause


def receive(session, url: str, part: Path) -> Exception | None:
    """Fetch, in one request of the requests.Session, what `part` still lacks of `url`; return what cut it short, or
    None once it is complete.

    A part that does not belong to this file goes unnoticed here: the archive's checksums and SHA-256 reveal it later.
    Raises requests.RequestException when there is no answer, or one that refuses.
    """
    from urllib3.exceptions import HTTPError

    offset = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if offset and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Nothing is left to fetch, or the part is longer than the file and so not a part of it.
            if response.headers.get("Content-Range") == f"bytes */{offset}":
                return None
            part.unlink()
            return receive(session, url, part)
        response.raise_for_status()
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            offset = 0
        left = response.raw.length_remaining
        total = None if left is None else offset + left
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, writing(part), open(part, "ab" if offset else "wb") as out:
            try:
                # Undecoded, it gives what came before a cut; requests' own way would keep up to a chunk of that back.
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    out.write(chunk)
                    bar.update(len(chunk))
            except HTTPError as error:
                return error
    return None


def first_cause(error: BaseException) -> BaseException:
    """What an error goes back to."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def fetch_official(
    corpus: Corpus, files: Sequence[File], folder: Path, options: argparse.Namespace, backoff: float
) -> None:
    """Download the corpus's sources and unpack `files` into `folder`.

    The sources are removed once they are unpacked, or found damaged; until then each stays as
    `<data_dir>/<TASK>/<source>.part`, for the next run to go on from.
    """
    paths, parts = [], []
    for source in corpus.sources:
        name = PurePosixPath(source).name
        if options.path_to_mrpc and name.startswith("msr_paraphrase"):
            paths.append(Path(options.path_to_mrpc, name))
            if not paths[-1].is_file():
                raise InputError(f"--path_to_mrpc: there is no file {paths[-1]}")
            continue
        url, part = f"{options.base_url}/{source}", Path(options.data_dir, corpus.folder, f"{name}.part")
        download(url, part, backoff)
        if SHA256.get(name) not in (None, lines_and_sha256(part)[1]):
            part.unlink()
            raise InputError(f"{url}: not the official file (its SHA-256 differs); the download was removed, try again")
        paths.append(part)
        parts.append(part)
    damage = None
    try:
        UNPACKERS.get(corpus.folder, unpack_zip)(paths, files, folder)
    except InputError as error:
        damage = error
    for part in parts:
        part.unlink()
    if damage:
        raise InputError(f"{options.base_url}/{corpus.sources[0]}: {damage}; it was removed, try again") from damage


# From the hub


def hub_rows(config: str, split: str) -> Iterator[dict]:
    """Yield the rows of one split of the hub's GLUE. Raises InputError when it cannot be loaded."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import logging
    from pyarrow import parquet

    from bert_finetune.hub import HUB_FAILURES

    logging.set_verbosity_error()  # the error below says it all
    name = f"{config}/{split}-00000-of-00001.parquet"
    try:
        table = parquet.read_table(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))
    except HUB_FAILURES as error:
        raise InputError(
            f"{constants.ENDPOINT}/datasets/{HUB_DATASET}: cannot fetch {name} ({in_one_line(error)}); check the "
            "network and HF_ENDPOINT, or use --source official"
        ) from error
    for batch in table.to_batches():
        yield from batch.to_pylist()


def label_text(corpus: Corpus, value: int | float | None) -> str | None:
    """Return the hub's label as the official file has it (a number in at most 7 digits), or None if it is no label."""
    if not isinstance(value, int | float):
        return None
    text = dict(enumerate(corpus.hub_labels)).get(value, f"{value:.7g}")
    return text if corpus.kind.accepts(text) else None


def hub_line(corpus: Corpus, file: File, row: dict) -> str:
    """Return one row of the hub as a line of the official file, with `-` in the columns that the hub lacks.

    Raises InputError for a value that the line cannot hold: no text, no label of the task, or with a tab or a line end.
    """
    cells = []
    for field in file.columns.values():
        value = "-" if field is None else row.get(field)
        if field == "label":
            value = label_text(corpus, value)
        elif field == "idx":
            value = str(value)
        if not isinstance(value, str) or set(value) & set("\t\n\r"):
            raise InputError(
                f"{HUB_DATASET} {corpus.config}: {field} of row {row.get('idx')} does not fit into {file.path}"
            )
        cells.append(value)
    return "\t".join(cells)


def fetch_hub(corpus: Corpus, files: Sequence[File], folder: Path) -> None:
    """Write `files` into `folder` from the hub's rows."""
    for file in files:
        path = folder / file.name
        with writing(path), open(path, "w", encoding="utf-8", newline="\n") as out:
            if file.header:
                out.write("\t".join(file.columns) + "\n")
            for row in hub_rows(corpus.config, file.split):
                out.write(hub_line(corpus, file, row) + "\n")


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


def obtain(corpus: Corpus, options: argparse.Namespace, backoff: float) -> None:
    """Fetch the files of a corpus that are missing or wrong, check them, put them in place and report them.

    Raises InputError, with what was there before left as it was, for data that cannot be had or fails its check.
    """
    findings = survey(corpus, options)
    wrong = [finding.file for finding in findings if finding.fault]
    if not wrong:
        return report(corpus, findings, "already there")
    exact = options.source == "official"
    with incoming(Path(options.data_dir, corpus.folder)) as folder:
        if exact:
            fetch_official(corpus, wrong, folder, options, backoff)
        else:
            fetch_hub(corpus, wrong, folder)
        fetched = [inspect(folder / file.name, file, exact) for file in wrong]
        for finding in fetched:
            if finding.fault:
                raise InputError(
                    f"{finding.file.path} as fetched is not the official file ({finding.fault}) and was thrown away; "
                    "try again, or another --source or --base_url"
                )
        for file in wrong:
            os.replace(folder / file.name, Path(options.data_dir, file.path))
    report(corpus, fetched, "written")


def check(corpora: Sequence[Corpus], options: argparse.Namespace) -> None:
    """Report each corpus that is right, print one line on stderr per wrong file, and exit with 2 if there is any."""
    faults = 0
    for corpus in corpora:
        findings = survey(corpus, options)
        wrong = [finding for finding in findings if finding.fault]
        for finding in wrong:
            print(f"{Path(options.data_dir, finding.file.path)}: {finding.fault}", file=sys.stderr)
        if not wrong:
            report(corpus, findings, "right")
        faults += len(wrong)
    if faults:
        sys.exit(2)


def choose(names: str, corpora: Sequence[Corpus]) -> list[Corpus]:
    """Return those named in `names` (comma-separated, any case, `all` for all), in the order of `corpora`."""
    wanted = {name.strip().lower() for name in names.split(",")}
    chosen = [corpus for corpus in corpora if "all" in wanted or any(map(corpus.is_called, wanted))]
    unknown = [name for name in wanted - {"all"} if not any(corpus.is_called(name) for corpus in corpora)]
    if unknown:
        raise InputError(
            f"--tasks: unknown {', '.join(map(repr, sorted(unknown)))}; choose among all, "
            + ", ".join(corpus.folder for corpus in corpora)
        )
    return chosen


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
def main(argv: Sequence[str] | None = None, corpora: Sequence[Corpus] = CORPORA, backoff: float = 1.0) -> None:
    """Run the command; `corpora` is what GLUE publishes, `backoff` the first pause between attempts (s)."""
    options = parse(argv)
    chosen = choose(options.tasks, corpora)
    try:
        if options.check:
            return check(chosen, options)
        for corpus in chosen:
            obtain(corpus, options, backoff)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on from here") from interrupt


if __name__ == "__main__":
    main()
