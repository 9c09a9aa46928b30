"""The export of a student, in its order of events: the model and its dev set, the graphs, their checks, the folder."""

import datetime
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bert_finetune.architectures import check_length, longest_input
from bert_finetune.arguments import TaskArguments
from bert_finetune.checkpoints import (
    class_names,
    load_classifier,
    load_classifier_config,
    load_tokenizer,
)
from bert_finetune.data import load_datasets
from bert_finetune.digests import file_digest
from bert_finetune.errors import InputError, writing
from bert_finetune.files import flush, remove, rename, write_json
from bert_finetune.footprint import footprint, milliseconds_each, processor_name
from bert_finetune.glue import Task
from bert_finetune.model_card import put_section
from bert_finetune.paths import command_for_others
from bert_finetune.samplers import batches_longest_first, longest_first
from bert_finetune.task_kinds import of_teacher
from bert_finetune.training_log import format_figures
from deploy.card import card_section
from deploy.classify import FLOAT, INT8, files_of
from deploy.formats import FORMATS, Format
from deploy.graph import (
    TOLERANCE,
    Inputs,
    input_names,
    largest_difference,
    made_up_inputs,
    open_graph,
    quantize,
    write_onnx,
    write_openvino,
)

_BATCH = 64
# Tokens of the longest input that a graph is tried with, beside the task's own length: some models have no limit.
_LONGEST = 512
# Times are of a batch of so many sentences and tokens.
_TIMED = 8, 64


@dataclass(frozen=True)
class DevSet:
    """One of a task's dev sets: tokenised, with its labels, and the teacher's answers where a run has kept them, with
    the settings of its kind."""

    name: str
    data: Dataset
    teacher: dict[str, np.ndarray]

    @property
    def labels(self) -> np.ndarray:
        return np.array(self.data["labels"])


def export(options, task_args: TaskArguments) -> bool:
    """Write the export's folder, and its figures into the model's card. Returns whether int8, where the format has it,
    has been found to lose no more than `options.max_drop`.

    options: `ExportArguments`. Raises InputError for a model or a dev set that cannot be used, and for a graph that
    does not compute what PyTorch does.
    """
    name, option, form = options.model, "--model", FORMATS[options.format]
    target = Path(options.output_dir or Path(name) / form.folder)
    if target.exists() and not (target / "export.json").is_file():
        raise InputError(f"{target}: is there already, and no export; move it, or choose another --output_dir")
    config = load_classifier_config(name, option, fine_tuned=True)
    task = task_args.load_task(config, fine_tuned=True, splits=["dev"])
    tokenizer = load_tokenizer(name, option, task_args.do_lower_case)
    if not tokenizer.is_fast:
        raise InputError(f"{option} {name}: its tokenizer has no fast form, which is what a server reads")
    model = load_classifier(name, task, option, fine_tuned=True, output_names=task_args.output_names).eval()
    check_length(model, task_args.max_seq_length)
    loaded = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, ["dev"]).dev
    if any(label == f"LABEL_{k}" for k, label in enumerate(class_names(model.config))) and task.kind.outputs > 1:
        raise InputError(f"{option} {name}: its classes have no names; give them in their order with --class_names")
    dev = []
    for split, data in loaded.items():
        split = split if len(loaded) > 1 else ""
        dev.append(DevSet(split, data, _teachers_answers(Path(name), split, data)))

    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target):
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".exporting-"))
        try:
            said = _export_into(aside, form, model, tokenizer, task, dev, task_args.max_seq_length, options)
            _replace(aside, target)
        finally:
            if aside.exists():
                shutil.rmtree(aside)
    print(f"exported into {target}: {', '.join(sorted(path.name for path in target.iterdir()))}")
    section = card_section(form, target, task, said)
    if target.parent.resolve() == Path(name).resolve() and put_section(Path(name), *section):
        print(f"{Path(name) / 'README.md'}: has its figures now")
    return "int8" in said["figures"] or not form.quantizations


def _export_into(
    folder: Path,
    form: Format,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dev: list[DevSet],
    max_seq_length: int,
    options,
) -> dict:
    """Write an export's files. Returns what its export.json says."""
    names = input_names(model, tokenizer)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opset = write_onnx(model, names, folder / FLOAT)
    if form.file != FLOAT:
        write_openvino(folder / FLOAT, folder / form.file)
        (folder / FLOAT).unlink()

    @torch.inference_mode()
    def in_torch(inputs: Inputs) -> np.ndarray:
        return model(**inputs).logits.numpy()

    def answers(run: Callable[[Inputs], np.ndarray]) -> dict[str, np.ndarray]:
        return {one.name: _logits(run, one.data, names, tokenizer) for one in dev}

    forms = {"torch": in_torch, "float": open_graph(folder / form.file)}
    student, float_graph = (answers(run) for run in forms.values())
    difference = max(float(np.abs(student[one.name] - float_graph[one.name]).max()) for one in dev)
    longest = min(longest_input(model), max(_LONGEST, max_seq_length))
    difference = max(difference, largest_difference(model, folder / form.file, names, longest))
    if not difference <= TOLERANCE:
        raise InputError(f"{form.file}: logits differ from PyTorch's by {difference:.1e}, more than {TOLERANCE:.0e}")
    print(f"{form.file}: logits differ from PyTorch's by {difference:.1e} at most, on the dev set and on odd shapes")

    def figures(logits: dict[str, np.ndarray]) -> dict[str, float]:
        return {key: value for one in dev for key, value in _figures(task, one, logits[one.name], student).items()}

    results = {"torch": figures(student), "float": figures(float_graph)}
    _say("PyTorch", results["torch"])
    _say(form.file, results["float"])
    chosen = None
    for way in form.quantizations[1 if options.per_channel else 0 :]:
        quantize(folder / FLOAT, folder / INT8, way)
        int8 = open_graph(folder / INT8)
        found = figures(answers(int8))
        drop = _drop(task, dev, results["torch"], found)
        _say(f"{INT8}, {way.what}", found)
        if drop <= options.max_drop:
            chosen, forms["int8"], results["int8"] = way, int8, found
            break
        print(f"{task.metric} falls by {drop:.2f} points, more than --max_drop {options.max_drop:g}", file=sys.stderr)
    if form.quantizations and chosen is None:
        (folder / INT8).unlink()
        print(f"int8 loses too much in every way: only {FLOAT} is kept", file=sys.stderr)
    shape = _TIMED[0], min(_TIMED[1], longest)
    inputs = made_up_inputs(model, names, *shape)
    each = milliseconds_each([partial(run, inputs) for run in forms.values()], shape[0], seconds=2)
    written = {what: file for what, file in (("float", form.file), ("int8", INT8)) if what in forms}
    said = {
        "exported": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_for_others(shlex.join([sys.executable, *sys.argv])),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", *form.packages)},
        "opset": opset,
        "max_seq_length": max_seq_length,
        "task": task.name,
        "text_columns": list(task.columns),
        "metric": task.metric,
        "largest_difference": difference,
        "quantization": chosen and chosen.what,
        "files": written,
        "figures": results,
        "megabytes": {"torch": footprint(model, each[0]).megabytes}
        | {what: sum(path.stat().st_size for path in files_of(folder / file)) / 1e6 for what, file in written.items()},
        "milliseconds": dict(zip(forms, each, strict=True)),
        "timed": f"{shape[0]} x {shape[1]} made-up tokens, {torch.get_num_threads()} threads of {processor_name()}",
        "sha256": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / "export.json", said)
    return said


def _logits(
    run: Callable[[Inputs], np.ndarray], data: Dataset, names: list[str], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """(examples, outputs), in the order of the dataset."""
    batches = batches_longest_first(data, tokenizer, _BATCH)
    logits = [run({name: batch[name] for name in names}) for batch in batches]
    return np.concatenate(logits)[np.argsort(longest_first(data))]


def _figures(task: Task, dev: DevSet, logits: np.ndarray, student: dict[str, np.ndarray]) -> dict[str, float]:
    """The task's figures, and the agreement with the student in PyTorch and with its teacher, by name."""
    found = task.measure(logits, dev.labels)
    found["student_agreement"] = task.kind.agreement(logits, student[dev.name])["agreement"]
    if dev.teacher:
        found |= task.kind.configured(dev.teacher).agreement(logits, dev.teacher["logits"])
    return {_key(dev, name): value for name, value in found.items()}


def _key(dev: DevSet, name: str) -> str:
    return "_".join(filter(None, ("eval", dev.name, name)))


def _drop(task: Task, dev: list[DevSet], before: dict[str, float], after: dict[str, float]) -> float:
    """How many points of the task's figure are lost, on the dev set on which it is most."""
    return max(100 * (before[_key(one, task.metric)] - after[_key(one, task.metric)]) for one in dev)


def _say(what: str, figures: dict[str, float]) -> None:
    print(f"{what}: {format_figures(figures)}")


def _teachers_answers(folder: Path, split: str, data: Dataset) -> dict[str, np.ndarray]:
    """Those that the student's run has kept of this very dev set; empty where there are none."""
    path = folder / "dev_predictions.npz"
    if not path.is_file():
        return {}
    with np.load(path) as kept:
        arrays = {key.removeprefix(f"{split}/" if split else ""): kept[key] for key in kept.files}
    same = np.array_equal(arrays.get("labels"), np.array(data["labels"]))
    return of_teacher(arrays) if same else {}


def _replace(aside: Path, target: Path) -> None:
    """Give a folder that is complete its name; an export that has it goes."""
    for path in aside.iterdir():
        flush(path)
    flush(aside)
    aside.chmod(0o755)  # a temporary folder is for its owner alone
    if target.exists():
        remove(target)
    rename(aside, target)
