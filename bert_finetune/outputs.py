"""A run's output folder: what of it is a run's, whether it may be written, what to go on from, and `args.json`."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from bert_finetune.errors import InputError
from bert_finetune.files import write_json
from bert_finetune.glue import TASKS
from bert_finetune.hub import commits_used

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pyemd", "POT", "numpy", "scipy", "scikit-learn")
_PREDICTIONS = ("predictions.tsv", *(name for task in TASKS.values() for name in task.submission.values()))
# What a run writes and --overwrite_output_dir takes away; nothing else in the folder is ever touched.
_RUN_FILES = (
    "checkpoint-*",
    "runs",
    ".saving-*",
    "model*.safetensors*",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "args.json",
    "eval_results.*",
    "dev_predictions.npz",
    "layer_weights.csv",
    "flows.npz",
    "teacher_cache",
    *(f"{name}.{kind}" for name in ("flow", "flow_over_training", "layer_weights") for kind in ("png", "svg")),
    *_PREDICTIONS,
)

# What --push_to_hub keeps back: what only this machine has a use for, labels and predictions of the user's data.
_KEPT_HERE = ("checkpoint-*", "runs", ".saving-*", "teacher_cache", "dev_predictions.npz", *_PREDICTIONS)


def check_output_dir(args: TrainingArguments, *sources: str | None) -> None:
    """Refuse an output folder that is one of the folders read (`sources`), or that holds a run, unless it is to be
    replaced or resumed."""
    folder = Path(args.output_dir)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {folder}: {path} is a file, not a folder")
    for source in map(Path, filter(None, sources)):
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise InputError(f"--output_dir {folder}: {source} is also read from; choose another folder")
    holds_run = any(
        next(folder.glob(pattern), None) for pattern in ("checkpoint-*", "model*.safetensors", "eval_results.*")
    )
    if holds_run and not args.overwrite_output_dir and args.resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {folder}: already holds a run; choose another folder, or give --overwrite_output_dir to "
            "replace it or --resume_from_checkpoint to go on with it"
        )


def start_output_dir(args: TrainingArguments) -> str | None:
    """Make the output folder ready, and return the checkpoint to go on from (None: from the start).

    With `--overwrite_output_dir` the earlier run's files are removed. When resuming, checkpoints that a killed run
    left incomplete are removed: a checkpoint is complete once its trainer_state.json, written last, can be read.
    Raises InputError for a folder that cannot be written, or a checkpoint that is not complete.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if resume not in (None, "last") and not _is_complete(Path(resume)):
        raise InputError(f"--resume_from_checkpoint {resume}: not a complete checkpoint folder")
    # With several processes the first tidies up, and the others then find nothing left to do.
    with args.main_process_first(local=False):
        try:
            if resume is None and args.overwrite_output_dir:
                _remove(path for pattern in _RUN_FILES for path in folder.glob(pattern))
            if resume == "last":
                remove_incomplete(folder.glob("checkpoint-*"))
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {folder}: {error.filename}: {error.strerror}") from error
    return last_checkpoint(folder) if resume == "last" else resume


def pushed_files(folder: Path) -> list[str]:
    """What `--push_to_hub` sends of a finished run's folder; nothing where there is no model."""
    if next(folder.glob("model*.safetensors"), None) is None:
        return []
    patterns = ["README.md", "runs/**/*", *(name for name in _RUN_FILES if name not in _KEPT_HERE)]
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found]


def remove_incomplete(checkpoints: Iterable[Path]) -> None:
    """Remove those that a killed run, or a full disk, left incomplete."""
    _remove(path for path in checkpoints if not _is_complete(path))


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def last_checkpoint(folder: str | Path) -> str | None:
    """The complete checkpoint of `folder` with the most steps, or None."""
    complete = [path for path in Path(folder).glob("checkpoint-*") if _is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]), default="")) or None


def _is_complete(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return True


def write_run_description(args: TrainingArguments, *more) -> None:
    """`args.json`: the exact command, every option (of `args` and further dataclasses), seed, versions, the commits of
    models from the hub, machine."""
    if args.process_index != 0:
        return
    options = {}
    for group in more:
        options |= vars(group)
    options |= args.to_dict()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    write_json(
        Path(args.output_dir) / "args.json",
        {
            "command": shlex.join([sys.executable, *sys.argv]),
            "folder": os.getcwd(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seed": options.get("seed"),
            "options": options,
            "versions": versions,
            "commits": commits_used(),
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        },
    )
