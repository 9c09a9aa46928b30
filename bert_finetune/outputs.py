"""What a run leaves in its output folder beside the model, and how to find out what is there already."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from bert_finetune.errors import InputError
from bert_finetune.glue import TASKS

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pyemd", "POT", "numpy", "scipy", "scikit-learn")
# What a run writes and --overwrite_output_dir takes away; nothing else in the folder is ever touched.
_RUN_FILES = (
    "checkpoint-*",
    "runs",
    ".saving-*",
    "model*.safetensors*",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "args.json",
    "eval_results.*",
    "layer_weights.csv",
    "flows.npz",
    *(name for task in TASKS.values() for name in task.submission.values()),
)


def check_output_dir(args: TrainingArguments, *sources: str | None) -> None:
    """Refuse an output folder that is one of the folders read (`sources`), or that holds a run, unless it is to be
    replaced or resumed."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file, not a folder")
    if folder.resolve() in {Path(source).resolve() for source in sources if source}:
        raise InputError(f"--output_dir {folder}: is also read from; choose another folder")
    holds_run = (
        (folder / "args.json").exists() or any(folder.glob("checkpoint-*")) or any(folder.glob("model*.safetensors"))
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
    """
    folder = Path(args.output_dir)
    if args.overwrite_output_dir and args.resume_from_checkpoint is None:
        for pattern in _RUN_FILES:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume_from_checkpoint not in (None, "last"):
        if not _is_complete(Path(args.resume_from_checkpoint)):
            raise InputError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint}: not a complete checkpoint folder"
            )
        return args.resume_from_checkpoint
    if args.resume_from_checkpoint is None:
        return None
    for path in folder.glob("checkpoint-*"):
        if not _is_complete(path):
            shutil.rmtree(path)
    return last_checkpoint(folder)


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


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: str | Path, values: dict) -> None:
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def write_run_description(output_dir: str | Path, *arguments) -> None:
    """`args.json`: the exact command, every option's value, seed, versions and machine."""
    options = {}
    for group in arguments:
        options |= group.to_dict() if isinstance(group, TrainingArguments) else vars(group)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    write_json(
        Path(output_dir) / "args.json",
        {
            "command": shlex.join([sys.executable, *sys.argv]),
            "folder": os.getcwd(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seed": options.get("seed"),
            "options": options,
            "versions": versions,
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        },
    )


def write_eval_results(output_dir: str | Path, results: dict, history: list[dict]) -> None:
    """`eval_results.json` with the history, and `eval_results.txt` with a `key = value` line for each figure."""
    folder = Path(output_dir)
    write_json(folder / "eval_results.json", results | {"history": history})
    write_atomically(folder / "eval_results.txt", "".join(f"{key} = {value}\n" for key, value in results.items()))
