"""A run's output folder: what of it is a run's, whether it may be written, what to go on from, and `args.json`."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from bert_finetune.arguments import MAY_CHANGE
from bert_finetune.errors import InputError
from bert_finetune.files import read_json, remove, rename, write_json
from bert_finetune.glue import TASKS
from bert_finetune.hub import commits_used
from bert_finetune.run_checkpoints import (
    check_same_experiment,
    checkpoints,
    fault_of,
    last_checkpoint,
    last_good_checkpoint,
    not_of_a_run,
)

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pyemd", "POT", "numpy", "scipy", "scikit-learn")


def with_probabilities(predictions: str) -> str:
    """The file with probabilities beside a file of predictions."""
    return f"{Path(predictions).stem}.probabilities.csv"


_SUBMISSIONS = ("predictions.tsv", *(name for task in TASKS.values() for name in task.submission.values()))
_PREDICTIONS = (*_SUBMISSIONS, *map(with_probabilities, _SUBMISSIONS))

# What a general distillation reads, until it has finished.
PACKED_CORPUS = ".packed-corpus"

# What a killed run was about to save, or to remove.
_UNFINISHED = (".saving-*", ".removing-*")
# What a run writes, beside its checkpoints, and --overwrite_output_dir takes away, with the exports of its model.
# Nothing else is ever touched.
_RUN_FILES = (
    "runs",
    *_UNFINISHED,
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
    "test_predictions.npz",
    "projections.safetensors",
    "layer_weights.csv",
    "flows.npz",
    "teacher_cache",
    PACKED_CORPUS,
    *(f"{name}.{kind}" for name in ("flow", "flow_over_training", "layer_weights") for kind in ("png", "svg")),
    *_PREDICTIONS,
)

# What --push_to_hub keeps back: what only this machine has a use for, or names it (TensorBoard's log), labels and
# predictions of the user's data.
_KEPT_HERE = (
    "runs",
    *_UNFINISHED,
    "teacher_cache",
    PACKED_CORPUS,
    "dev_predictions.npz",
    "test_predictions.npz",
    *_PREDICTIONS,
)


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
    if foreign := not_of_a_run(folder):
        raise InputError(f"{foreign}: no run made this, and a checkpoint may have to lie there; move it elsewhere")
    traces = ("model*.safetensors", "eval_results.*", _REPLACED)
    holds_run = last_checkpoint(folder) or any(next(folder.glob(pattern), None) for pattern in traces)
    if holds_run and not args.overwrite_output_dir and args.resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {folder}: already holds a run; choose another folder, or give --overwrite_output_dir to "
            "replace it or --resume_from_checkpoint to go on with it"
        )


@contextmanager
def output_folder(args: TrainingArguments, experiment: dict) -> Iterator[str | None]:
    """Around a training run: makes the output folder ready, and yields the checkpoint to go on from (None: from the
    start), which must be of the same `experiment`.

    With `--overwrite_output_dir` the earlier run's files are set aside; they are removed once the new run saves its
    first checkpoint or its model (`forget_replaced_run`), and put back where it fails before that.
    Raises InputError for a folder that cannot be written, and a checkpoint that the run cannot go on from.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    checkpoint = last_good_checkpoint(folder) if resume == "last" else resume and Path(resume)
    if checkpoint:
        if fault := fault_of(checkpoint):
            raise InputError(f"--resume_from_checkpoint {checkpoint}: {fault}")
        check_same_experiment(checkpoint, experiment)
    # With several processes the first tidies up; it may be writing here again when the others come.
    with args.main_process_first(local=False):
        try:
            if args.process_index == 0:
                _remove(path for pattern in _UNFINISHED for path in folder.glob(pattern))
            if args.process_index == 0 and resume is None and args.overwrite_output_dir:
                _set_aside(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {folder}: {error.filename}: {error.strerror}") from error
    try:
        yield checkpoint and str(checkpoint)
    except BaseException:
        if args.process_index == 0:
            _put_back(folder)
        raise


# Where the run that is to be replaced waits, in its own folder.
_REPLACED = ".replaced"


def _run_files(folder: Path) -> list[Path]:
    # What deploy/export_student.py has made of a run's model goes with it.
    exports = [folder / name for name in ("onnx", "openvino") if (folder / name / "export.json").is_file()]
    return [path for pattern in _RUN_FILES for path in folder.glob(pattern)] + exports + checkpoints(folder)


def _set_aside(folder: Path) -> None:
    """Set a run's files aside; those of one that had been set aside before stay, and this one's go."""
    replaced = folder / _REPLACED
    if replaced.exists():
        _remove(_run_files(folder))
    elif files := _run_files(folder):
        replaced.mkdir()
        for path in files:
            rename(path, replaced / path.name)


def _put_back(folder: Path) -> None:
    """Undo `_set_aside`, if what came after has saved nothing."""
    replaced = folder / _REPLACED
    if replaced.exists():
        _remove(_run_files(folder))
        for path in replaced.iterdir():
            rename(path, folder / path.name)
        remove(replaced)


def forget_replaced_run(folder: Path) -> None:
    """Remove what `_set_aside` kept, if anything: the new run has something to show."""
    if (folder / _REPLACED).exists():
        remove(folder / _REPLACED)


def forget_figures(folder: Path) -> None:
    """Remove the figures of the model that is about to be replaced, so that none stand beside another one's weights if
    the run ends in between."""
    _remove(path for pattern in ("eval_results.*", "*_predictions.npz") for path in folder.glob(pattern))


def pushed_files(folder: Path) -> list[str]:
    """What `--push_to_hub` sends of a finished run's folder; nothing where there is no model."""
    if next(folder.glob("model*.safetensors"), None) is None:
        return []
    patterns = ["README.md", *(name for name in _RUN_FILES if name not in _KEPT_HERE)]
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found]


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        remove(path)


def describe_experiment(args: TrainingArguments, groups: Iterable, more: dict[str, str]) -> dict:
    """What decides a run's numbers: its options but for `MAY_CHANGE`, the rows of a batch, the versions of torch and
    transformers, and `more`: digests of what it reads, named in words."""
    options = {}
    for group in groups:
        options |= vars(group)
    options |= args.to_dict()
    experiment = {name: value for name, value in options.items() if name not in MAY_CHANGE}
    experiment["rows of a batch"] = args.train_batch_size * args.world_size
    experiment |= {
        f"version of {package}": importlib.metadata.version(package) for package in ("torch", "transformers")
    }
    return experiment | more


def write_run_description(args: TrainingArguments, *more) -> None:
    """`args.json`: the exact command, every option (of `args` and further dataclasses), seed, versions, the commits of
    models from the hub, machine, and under `earlier_starts` the same of each time that the run was started before."""
    if args.process_index != 0:
        return
    options = {}
    for group in more:
        options |= vars(group)
    options |= args.to_dict()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    path = Path(args.output_dir) / "args.json"
    earlier = []
    if path.exists():
        before = read_json(path)
        earlier = [*before.pop("earlier_starts", []), before]
    write_json(
        path,
        {
            "command": shlex.join([sys.executable, *sys.argv]),
            "folder": os.getcwd(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seed": options.get("seed"),
            "options": options,
            "versions": versions,
            "commits": commits_used(),
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "earlier_starts": earlier,
        },
    )
