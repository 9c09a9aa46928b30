"""What paths say: which format a file has, and, without what is private to this machine, where others find it."""

import glob
import os
import shlex
from pathlib import Path

from bert_finetune.errors import InputError

# A file's last ending -> how it is packed.
PACKED = {".gz": "gzip", ".zst": "zstd"}


def ending(path: str | Path) -> str:
    """The ending that says what format a file has, in lower case; of a packed one the one before: .csv of a.CSV.gz."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def several(option: str, paths: str, kinds: tuple[str, ...] = (".parquet",)) -> list[Path]:
    """The files of an option that takes several, with commas between them, patterns of names, and folders of files of
    these `kinds`; each once. A name with a comma in it is that file's, if it is there. Raises InputError for one that
    is not there."""
    found = []
    for part in listed(paths):
        if Path(part).is_dir():
            here = sorted(file for file in Path(part).iterdir() if ending(file) in kinds)
            lacks = f"no folder of {' or '.join(kinds)} files"
        else:
            here = [part] if _is_there(part) else sorted(glob.glob(part, recursive=True))
            lacks = "no such file"
        if not here:
            raise InputError(f"{option} {part}: {lacks}")
        found += map(Path, here)
    if not found:
        raise InputError(f"{option} {paths}: names no file")
    return list(dict.fromkeys(found))


def listed(paths: str) -> list[str]:
    """Paths with commas between them; one alone, if it is there, may have commas in its name."""
    return [paths] if _is_there(paths) else list(filter(None, map(str.strip, paths.split(","))))


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long for one
        return False


def for_others(value):
    """A text, a command, or a structure of them, in which absolute paths are relative to the working directory, or
    their last part."""
    if isinstance(value, dict):
        return {key: for_others(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [for_others(inner) for inner in value]
    return _shown(value) if isinstance(value, str | Path) else value


def command_for_others(command: str) -> str:
    """A command line whose interpreter is `python`, its paths as `for_others` has them."""
    _, *words = shlex.split(command)
    return shlex.join(["python", *map(_shown, words)])


def run_for_others(told: dict) -> dict:
    """What args.json says of a run and its earlier starts, its commands and paths as others are shown them."""
    starts = [start | {"command": command_for_others(start["command"])} for start in told.get("earlier_starts", [])]
    earlier = {"earlier_starts": starts} if starts else {}
    return for_others(told | {"command": command_for_others(told["command"])} | earlier)


def _shown(text: str | Path) -> str:
    name, equals, path = str(text).partition("=") if str(text).startswith("--") else ("", "", str(text))
    if "," in path:
        return name + equals + ",".join(map(_shown, path.split(",")))
    if not os.path.isabs(os.path.expanduser(path)):
        return str(text)
    path = Path(path).expanduser()
    here = Path.cwd()
    return name + equals + (path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)
