"""Paths as others are shown them: without what is private to this machine."""

import os
import shlex
from pathlib import Path


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
    if not os.path.isabs(os.path.expanduser(path)):
        return str(text)
    path = Path(path).expanduser()
    here = Path.cwd()
    return name + equals + (path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)
