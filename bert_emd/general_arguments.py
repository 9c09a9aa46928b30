"""The command line of general distillation: the corpus, the student, two recipes.

Nothing here imports torch before all options are known to be right.
"""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from bert_emd.layer_arguments import OF_MADE_STUDENTS, LayerArguments, check_layer_values
from bert_emd.recipes import has_bf16
from bert_emd.starts import Shape
from bert_finetune.arguments import RunOptions
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.hub import CONFIG
from bert_finetune.processes import is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bert_finetune.run_arguments import RunArguments

# TinyBERT's, with its sums for our means: over the pairs of `uniform`, as many as there are student layers, a sum is
# θ = M times the mean. docs/fidelity.md says what of its code is not done.
_TINYBERT = {
    "objective": "published",
    "layer_mapping": "uniform",
    "projection": "shared",
    "optimizer": "bert_adam",
    "weight_decay": 0.01,
    "learning_rate": 5e-5,
    "short_seq_prob": 0.1,
}
RECIPES = {"recommended": {"learning_rate": 3e-4}, "tinybert": _TINYBERT}
# Of both: about so many sequences a step, with as many parts of a step as come nearest.
_STEP = 256
# Whatever the recipe: an evaluation, and a checkpoint, after each twentieth of the run.
_ALWAYS = {"do_train": True, "eval_steps": 0.05, "train_sampling_strategy": "random"}

_FOUND = dict.fromkeys(("theta", "gradient_accumulation_steps", *_TINYBERT), "by recipe") | {
    "bf16": "where the hardware has it, with --recipe recommended"
}
# Options that say something of a task.
_OF_TASKS = ("do_eval", "do_predict", "probabilities", "class_weights", "metric_for_best_model")


@dataclass
class GeneralArguments(LayerArguments):
    """Teacher, student, corpus."""

    teacher_model: str | None = HfArg(
        default=None, help="Pre-trained teacher: a folder or a hub name. Of a fine-tuned one, its head is left out."
    )
    student_config: str | None = HfArg(
        default=None,
        help="A student with new weights: its layers and width (4x312), and perhaps its feed-forward width "
        "(4x312x1200; left out, in the teacher's ratio), with the teacher's number of heads; or the folder or hub name "
        "of a model of that configuration. In its place, --student_layers makes one from the teacher.",
    )
    corpus: str | None = HfArg(
        default=None,
        help="Text to learn from: a sentence a line, blank lines between documents; also packed, with .gz or .zst "
        "behind its name. Several files with commas between, a pattern (wiki/**/*), or a folder of .txt files. Of "
        ".parquet files each row is a document.",
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="In place of --corpus: a dataset of the Hugging Face hub, or a folder as the hub has them, each row a "
        "document. Code that a dataset may have is never run.",
    )
    dataset_config: str | None = HfArg(default=None, help="Which of the dataset's configurations, if it has several.")
    train_split: str = HfArg(default="train", help="The dataset's split to read.")
    text_column: str | None = HfArg(
        default=None, help="Column of the text in a dataset or in .parquet files; left out, the only one with texts."
    )
    dev_share: float = HfArg(
        default=0.01,
        help="Share of the documents to hold out, for the dev loss that chooses the best checkpoint; 0 for none. Which "
        "these are depends on their own text alone.",
    )
    corpus_cache_dir: str | None = HfArg(
        default=None,
        help="Folder in which the packed corpus stays, for further runs on it; left out, it lies in --output_dir until "
        "the run has finished.",
    )
    max_seq_length: int = HfArg(default=128, help="Length of the packed sequences in tokens, special tokens included.")
    short_seq_prob: float = HfArg(default=0.0, help="Share of sequences that aim at a shorter length, drawn at random.")
    do_lower_case: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Lower-case the text (False: do not); left out, the tokenizer's own setting counts.",
    )
    recipe: Literal[tuple(RECIPES)] = HfArg(
        default="recommended",
        help="Set of defaults: recommended, or tinybert, TinyBERT's published one. Both have about 256 "
        "sequences a step.",
    )

    @property
    def student_size(self) -> tuple[int, Shape] | None:
        """Layers and shape that `student_config` says; None where it names a model."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", self.student_config or "")
        layers, width, ffn = (part and int(part) for part in found.groups()) if found else (None, None, None)
        return (layers, Shape(width, ffn)) if found else None

    @property
    def named_config(self) -> "PreTrainedConfig":
        """The configuration of the model that `student_config` names."""
        from bert_finetune.checkpoints import load_encoder_config

        file = Path(self.student_config)
        return load_encoder_config(str(file.parent) if file.name == CONFIG else self.student_config, "--student_config")

    @property
    def student_layer_count(self) -> int:
        """How many layers the student will have."""
        from bert_finetune.checkpoints import load_encoder_config

        if self.student_size:
            return self.student_size[0]
        if self.student_config:
            return self.named_config.num_hidden_layers
        teacher = load_encoder_config(self.teacher_model, "--teacher_model")
        return len(self.layers_of(teacher))


def read_options(argv: list[str] | None, description: str) -> tuple[GeneralArguments, "RunArguments"]:
    """The command line, with the recipe's values as the defaults of what it leaves out."""
    parser = Parser(GeneralArguments, description=description, found=_FOUND)
    options, run = parser.look(argv)
    check_sources(options, run)
    part = max(1, run.per_device_train_batch_size) * int(os.environ.get("WORLD_SIZE", 1))
    defaults = RECIPES[options.recipe] | {"gradient_accumulation_steps": max(1, round(_STEP / part))}
    if options.recipe == "tinybert":
        defaults["theta"] = float(options.student_layer_count)
    elif not run.fp16:
        defaults["bf16"] = has_bf16(run.use_cpu)
    without_dev = {} if options.dev_share else {"eval_strategy": "no", "save_strategy": "steps"}
    parser.set_defaults(**defaults, **_ALWAYS, **without_dev)
    options, args = parser.parse(argv)
    check_layer_values(options, args)
    if args.train_sampling_strategy != "random":
        raise InputError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: sequences are drawn at random here"
        )
    if is_main_process():
        values = vars(options) | vars(args)
        chosen = " ".join(f"--{name} {values[name]}" for name in defaults)
        print(f"recipe {options.recipe}, with what the command line gives: {chosen}")
        print(f"{part * args.gradient_accumulation_steps} sequences a step")
    return options, args


def check_sources(options: GeneralArguments, run: RunOptions) -> None:
    """Raise InputError where it is not clear who teaches whom on which text, and for options of tasks."""
    if options.teacher_model is None:
        raise InputError("--teacher_model is missing: give the folder of a model, or its hub name")
    if bool(options.corpus) == bool(options.dataset_name):
        raise InputError("give --corpus, files of text, or --dataset_name")
    if options.dataset_config and not options.dataset_name:
        raise InputError("--dataset_config: of which dataset? Give --dataset_name")
    if bool(options.student_config) == bool(options.student_layers):
        raise InputError("give --student_config, for a student with new weights, or --student_layers")
    for field in fields(options):
        given = getattr(options, field.name) != field.default
        if options.student_config and field.name in OF_MADE_STUDENTS and given:
            raise InputError(f"--{field.name}: is for --student_layers; --student_config has its own")
    for name in ("dev_share", "short_seq_prob"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be from 0 to below 1")
    for field in fields(run):
        if field.name in _OF_TASKS and getattr(run, field.name) != field.default:
            raise InputError(f"--{field.name}: there is no task here yet; leave it out")
    if not options.dev_share and run.eval_strategy not in (None, "no"):
        raise InputError(f"--eval_strategy {run.eval_strategy}: nothing is held out with --dev_share 0")
    if options.corpus_cache_dir and Path(options.corpus_cache_dir).is_file():
        raise InputError(f"--corpus_cache_dir {options.corpus_cache_dir}: is a file, not a folder")
