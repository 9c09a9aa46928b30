"""What runs with one --teacher_cache_dir have kept of their teachers' answers: lists it, and makes room.

    python -m bert_emd.teacher_cache model/teacher_cache
    python -m bert_emd.teacher_cache model/teacher_cache --prune 20

A cache is a teacher's answers for one training set, in a folder of its own (bert_emd/teacher_answers.py).
"""

import contextlib
import fcntl
import os
import re
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import read_json

# In every cache's folder: whoever uses it holds a shared lock on this file, which has the time of the last use.
_USED = "used"
ABOUT = "about.json"


def claim(folder: Path) -> IO:
    """Make a cache's folder, and mark it as in use until the file that is returned is closed."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / _USED, "a")  # noqa: SIM115
        except (FileNotFoundError, FileExistsError):  # another run removes it at this moment
            if folder.is_file():
                raise
            continue
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_open(folder / _USED, file):
            os.utime(folder / _USED)
            return file
        file.close()


def _is_open(path: Path, file: IO) -> bool:
    """Whether `path` is still, or again, the file that was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Cache:
    """A cache on disk: its `size` in bytes, when it was `last_used` in seconds since 1970."""

    path: Path
    size: int
    last_used: float

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_used))
        return f"{self.path.name}, {self.size / 1e9:.2f} GB, last used {day}: {self._content()}"

    def _content(self) -> str:
        parts = sorted({path.name.partition("-")[0] for path in self.path.glob("*.checksums")})
        try:
            about = "{teacher}, {examples} examples, {dtype}, torch {torch}, {device}".format(
                **read_json(self.path / ABOUT)
            )
        except (InputError, KeyError):
            return "of an earlier version, or damaged"
        return f"{about}: {', '.join(parts)}"

    def in_use(self) -> bool:
        """Whether a run uses it, or it is not ours to remove."""
        try:
            with self._alone():
                return False
        except OSError:
            return True

    def remove(self) -> bool:
        """Remove it unless it is in use. Returns whether it is gone."""
        try:
            with self._alone():
                last = _mark(self.path)  # what is left by a removal that is cut short is still a cache
                for path in sorted(self.path.iterdir(), key=lambda path: path == last):
                    path.unlink()
                with contextlib.suppress(OSError):  # a run has just made the folder its own
                    self.path.rmdir()
                return True
        except (BlockingIOError, FileNotFoundError):  # in use, or another run has removed it
            return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises BlockingIOError where a run uses it, FileNotFoundError where it has just been removed."""
        mark = _mark(self.path)
        with open(mark, "r+") as file:
            for patience in reversed(range(10)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not patience:
                        raise
                    time.sleep(0.01)  # perhaps another run is only looking, too
            if not _is_open(mark, file):
                raise FileNotFoundError
            yield


def _mark(path: Path) -> Path:
    """What tells a cache from another folder. Those of earlier versions have a lock, but nothing that says when they
    were used last."""
    return path / _USED if (path / _USED).is_file() else path / "lock"


def caches_in(folder: Path) -> list[Cache]:
    """Those right below a folder, the least recently used first; nothing else there is looked at."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"[0-9a-f]{16}", path.name) and _mark(path).is_file():
            with contextlib.suppress(FileNotFoundError):  # being removed
                size = sum(file.stat().st_blocks * 512 for file in path.iterdir())
                found.append(Cache(path, size, _mark(path).stat().st_mtime))
    return sorted(found, key=lambda cache: cache.last_used)


def surplus(folder: Path, limit: float, spare: Path | None = None) -> list[Cache]:
    """What has to go for a folder's caches to take no more than `limit` bytes: the least recently used first, none that
    is in use, nor `spare`."""
    caches, going = caches_in(folder), []
    excess = sum(cache.size for cache in caches) - limit
    for cache in caches:
        if excess > 0 and cache.path != spare and not cache.in_use():
            going.append(cache)
            excess -= cache.size
    return going


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m bert_emd.teacher_cache", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --teacher_cache_dir of runs")
    parser.add_argument(
        "--prune",
        type=float,
        metavar="GB",
        help="remove the least recently used caches until the others take no more; none that a run uses",
    )
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        raise InputError(f"{options.folder}: there is no such folder; give the --teacher_cache_dir of runs")
    if options.prune is not None:
        if not options.prune >= 0:
            raise InputError(f"--prune {options.prune}: must be 0 or more")
        for cache in surplus(options.folder, options.prune * 1e9):
            told = str(cache)
            if cache.remove():
                print(f"removed {told}")
    caches = caches_in(options.folder)
    for cache in caches:
        print(f"{cache}{' (in use)' if cache.in_use() else ''}")
    print(f"{len(caches)} cache{'s' * (len(caches) != 1)}, {sum(cache.size for cache in caches) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
