"""A run's checkpoints: written so that a kill at any instant, or a power cut, loses at most what came after the last
one; found again; and gone on from by the same experiment only.

A checkpoint is put together in a hidden folder beside the others. Once every file of it is on disk, its marker is
written, which names the files with their digests; then the folder gets its name. Older ones are removed after that. So
`checkpoint-N` is there whole or not at all, and what lacks the marker was not made by a run and is never touched.
"""

import json
import re
from pathlib import Path

from bert_finetune.digests import file_digest
from bert_finetune.errors import InputError
from bert_finetune.files import flush, remove, rename, write_json
from bert_finetune.processes import is_main_process

_MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Without these a run would go on with other numbers, and without a word.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def begin(aside: Path) -> None:
    """Make an empty folder to put a checkpoint together in."""
    if aside.exists():
        remove(aside)
    aside.mkdir(parents=True)


def complete(checkpoint: Path, folder: Path, experiment: dict, seconds: float) -> None:
    """Have all files of `checkpoint` on disk, mark it as complete, and move it into `folder` under its own name.

    experiment: what the run is, see `check_same_experiment`. seconds: that it has trained so far.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        flush(path)
    for inner in (checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())):
        flush(inner)
    marks = {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}
    write_json(checkpoint / _MARKER, {"files": marks, "seconds": round(seconds, 1), "experiment": experiment})
    if (folder / checkpoint.name).exists():  # of this very step: one that was damaged, or is made again
        remove(folder / checkpoint.name)
    rename(checkpoint, folder / checkpoint.name)


def checkpoints(folder: str | Path) -> list[Path]:
    """Those that runs have completed in `folder`, by steps. Other files and folders, whatever their names, are not."""
    found = {path: _NAME.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*")}
    ours = {path: int(name[1]) for path, name in found.items() if name and (path / _MARKER).is_file()}
    return sorted(ours, key=ours.get)


def not_of_a_run(folder: str | Path) -> Path | None:
    """Something that has a checkpoint's name, where one may have to lie, and was not made by a run; None if nothing."""
    return next((path for path in Path(folder).glob("checkpoint-*") if _is_foreign(path)), None)


def _is_foreign(path: Path) -> bool:
    return bool(_NAME.fullmatch(path.name)) and not (path / _MARKER).is_file()


def last_checkpoint(folder: str | Path) -> Path | None:
    """The one with the most steps, or None."""
    return next(reversed(checkpoints(folder)), None)


def last_good_checkpoint(folder: str | Path) -> Path | None:
    """The one with the most steps whose files are all as they were written, or None; damaged ones are named."""
    for checkpoint in reversed(checkpoints(folder)):
        if (fault := fault_of(checkpoint)) is None:
            return checkpoint
        if is_main_process():
            print(f"{checkpoint}: {fault}; going on from an earlier one")
    return None


def fault_of(checkpoint: Path) -> str | None:
    """Why a run cannot go on from this folder, in words; None where it can."""
    if not (checkpoint / _MARKER).is_file():
        return "not a complete checkpoint folder"
    try:
        files = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))["files"]
        missing = [name for name in (*_NEEDED, *files) if not (checkpoint / name).is_file()]
        if missing:
            return f"has no {missing[0]}"
        damaged = [name for name, digest in files.items() if file_digest(checkpoint / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MARKER} is damaged"
    if damaged:
        return f"its {damaged[0]} is damaged"
    if not any(name.startswith("rng_state") for name in files):
        return "has no rng_state.pth"
    return None


def seconds_at(checkpoint: Path) -> float:
    """How long the run had trained by then."""
    return json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))["seconds"]


def keep(folder: Path, limit: int | None, needed: Path | None) -> None:
    """Remove all but the last `limit` checkpoints (None: all stay) and the one that is `needed`."""
    found = checkpoints(folder)
    for path in found[: 0 if limit is None else max(0, len(found) - limit)]:
        if path != needed:
            remove(path)


def check_same_experiment(checkpoint: Path, experiment: dict) -> None:
    """Raise InputError where going on from `checkpoint` with `experiment` would make another experiment of it.

    An experiment is what decides a run's numbers: name -> value, options named as on the command line. Those in
    `GROWING` may go up, and what is `FOLLOWING` then.
    """
    then = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))["experiment"]
    now = json.loads(json.dumps(experiment, default=str))
    grown = [name for name in GROWING if 0 < then.get(name, 0) < now.get(name, 0)]
    allowed = {*grown, *(FOLLOWING if grown else ())}
    changed = [name for name in then | now if then.get(name) != now.get(name) and name not in allowed]
    if changed:
        told = ", ".join(f"{_spelt(name)} was {then.get(name)}, now {now.get(name)}" for name in changed[:5])
        more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: is of another experiment: {told}{more}; give what it was, or "
            "start anew in another --output_dir"
        )


# May be larger than they were: the run goes on for longer.
GROWING = ("num_train_epochs", "max_steps")
# A run that sees no example twice does not keep the teacher's answers.
FOLLOWING = ("the teacher's answers",)


def _spelt(name: str) -> str:
    """Options as they are typed; what is no option is a phrase."""
    return name if " " in name else f"--{name}"
