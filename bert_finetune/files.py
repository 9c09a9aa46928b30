"""Files written whole or not at all, also through a power cut; small ones read."""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_finetune.errors import reading, writing

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yields the place beside `path` for its new content, which is moved there in the end, or removed if that fails."""
    path = Path(path)
    aside = path.with_name(f".{path.name}")
    try:
        with writing(path):
            yield aside
            flush(aside)
            rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# What a power cut leaves is decided by these three alone: contents that were flushed, and names of flushed folders.


def flush(path: str | Path) -> None:
    """Have a file's content, or a folder's names, on disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Give a file or a folder its name, replacing a file that has it; on disk when this returns."""
    os.replace(path, target)
    flush(target.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, of which a kill leaves nothing under the folder's own name."""
    if path.is_dir() and not path.is_symlink():
        going = path.with_name(f".removing-{path.name}")
        if going.exists():
            shutil.rmtree(going)
        rename(path, going)
        shutil.rmtree(going)
    else:
        path.unlink()
    flush(path.parent)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, values: dict) -> None:
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def as_csv(rows: list[dict], decimals: int = 6) -> str:
    """Rows of the same names as CSV with a header; None is empty. Six decimals of a float hide no more than noise."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        rounded = {key: round(value, decimals) if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow(rounded)
    return file.getvalue()


def read_json(path: str | Path) -> dict:
    """A JSON file's object. Raises InputError for anything else."""
    return _read_table(path, json.loads)


def read_toml(path: str | Path) -> dict:
    """A TOML file. Raises InputError for anything else."""
    return _read_table(path, tomllib.loads)


def _read_table(path: str | Path, loads: Callable[[str], dict]) -> dict:
    with reading(str(path)):
        values = loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no object with names")
        return values
