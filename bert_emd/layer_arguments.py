"""The options of every distillation: the student as it is made, and how its layers learn.

Nothing here imports torch before all options are known to be right.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from bert_emd.choices import SOLVERS, WEIGHT_UPDATES
from bert_emd.mappings import MAPPINGS
from bert_emd.starts import STARTS, Shape, Start
from bert_finetune.errors import InputError
from bert_finetune.option_rules import NOT_IN_DISTILLATION, RULES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bert_finetune.run_arguments import RunArguments

# Options of a student that is made by --student_layers.
OF_MADE_STUDENTS = ("student_width", "student_ffn", "student_heads", "student_start")

# Options of the usual optimiser that BertAdam has no use for.
_NOT_BERT_ADAM = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")


@dataclass
class LayerArguments:
    """What a student is made of, and how its layers learn from the teacher's. The letters are the paper's."""

    student_layers: str | None = HfArg(
        default=None,
        help="Make the student from the teacher: a number of its layers (3: evenly spaced) or a list, counted from 1 "
        "(1,3,5).",
    )
    student_width: int | None = HfArg(
        default=None, help="Hidden width of a student made by --student_layers; left out, the teacher's."
    )
    student_ffn: int | None = HfArg(
        default=None, help="Its feed-forward width; left out, in the teacher's ratio to the hidden width."
    )
    student_heads: int | None = HfArg(
        default=None,
        help="Its attention heads; left out, the teacher's number, without which attention cannot be compared.",
    )
    student_start: Literal[tuple(STARTS)] = HfArg(
        default="layers",
        help="What it starts from: "
        + "; ".join(f"{name}: {start.what}" for name, start in STARTS.items())
        + ". For a narrower student these are projected onto the principal directions of the teacher's hidden states "
        "on the training text.",
    )
    objective: Literal["relative", "published"] = HfArg(
        default="relative",
        help="What the losses are measured in. relative: layer costs in the teacher's own size, predictions by their "
        "KL divergence, errors of scores in the training scores' variance, so that loss weights mean the same for "
        "every teacher, task and length. published: the authors' arithmetic: squared errors, those of attention "
        "divided by --max_seq_length, predictions' cross-entropy divided by the number of classes.",
    )
    theta: float = HfArg(default=1.0, help="Weight θ of attention and hidden losses against the embedding loss.")
    layer_mapping: str = HfArg(
        default="emd",
        metadata={"choices": MAPPINGS},
        help="Which layers learn from which. "
        + "; ".join(f"{name}: {row.what}" + f" ({row.source})" * bool(row.source) for name, row in MAPPINGS.items())
        + ".",
    )
    use_att: bool = HfArg(default=True, help="Learn attention scores.")
    use_rep: bool = HfArg(default=True, help="Learn hidden states.")
    use_embedding: bool = HfArg(default=True, help="Learn the embedding output.")
    cost_attention: Literal[WEIGHT_UPDATES] = HfArg(
        default="normalize",
        help="How layer weights follow the costs: normalize (the authors' code since 2021), softmax, softmax2 (their "
        "code of 2020), none (weights stay uniform).",
    )
    T_emd: float = HfArg(default=1.0, help="Temperature of the cost attention (no effect with normalize).")
    weight_momentum: float = HfArg(
        default=0.8,
        help="How much of a step's layer weights stays in the next, from 0 (the paper) to below 1: it damps their "
        "swinging between two values, and they settle at the same ones.",
    )
    update_weight: bool = HfArg(default=True, help="False is the same as --cost_attention none.")
    separate: bool = HfArg(
        default=False,
        aliases=["--seperate"],
        help="Keep two sets of layer weights, for attention and for hidden states, and not their mean for both.",
    )
    emd_solver: Literal[("auto", *SOLVERS)] = HfArg(
        default="auto",
        help="Exact solver of the transport problem, for the same flows: pyemd, which from 1.1 on calls pot, or pot "
        "itself, which is faster (auto).",
    )
    projection: Literal["auto", "per_layer", "shared", "none"] = HfArg(
        default="auto",
        help="Linear maps from student to teacher width: one per layer, one shared by all, none; auto is what the "
        "student's checkpoint brings, else none for equal widths, else per_layer.",
    )
    optimizer: Literal["adamw", "bert_adam"] = HfArg(
        default="adamw",
        help="bert_adam: the original BERT's, without bias correction, each tensor's gradient clipped to norm 1; it "
        "takes --weight_decay (the authors': 0.01), but no --optim, --adam_... or --max_grad_norm. adamw: what --optim "
        "says, the whole gradient clipped to --max_grad_norm.",
    )

    def layers_of(self, teacher: "PreTrainedConfig") -> list[int]:
        """The teacher's layer, from 1, for each of those of a student that `student_layers` makes."""
        from bert_emd.student import parse_student_layers

        return parse_student_layers(self.student_layers, teacher.num_hidden_layers, self.start.layers)

    @property
    def shape(self) -> Shape:
        return Shape(self.student_width, self.student_ffn, self.student_heads)

    @property
    def start(self) -> Start:
        return STARTS[self.student_start]

    @property
    def copies_teacher(self) -> bool:
        """Whether the student is made of the teacher's layers as they are."""
        return self.start.layers and self.shape == Shape()


def check_layer_values(options: LayerArguments, args: "RunArguments") -> None:
    """Raise InputError for values outside their range, and for options that do not go together, in any distillation."""
    for name, fits, rule in (
        ("T_emd", options.T_emd > 0, "above 0"),
        ("weight_momentum", 0 <= options.weight_momentum < 1, "from 0 to below 1"),
        ("theta", options.theta >= 0, "0 or more"),
    ):
        if not fits:
            raise InputError(f"--{name} {getattr(options, name)}: must be {rule}")
    if options.optimizer == "bert_adam":
        for field in dataclasses.fields(args):
            if field.name in _NOT_BERT_ADAM and getattr(args, field.name) != field.default:
                raise InputError(f"--{field.name}: --optimizer bert_adam has its own; leave it out")
    if args.torch_compile and args.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        raise InputError("--torch_compile: needs a C++ compiler, and there is no g++; install one or leave it out")
    for name, rules in RULES.items():
        if NOT_IN_DISTILLATION in rules and getattr(args, name):
            raise InputError(f"--{name}: is not supported in distillation; leave it out")
