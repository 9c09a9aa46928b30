"""The command line of the distillation: the method's options, the recipe's defaults, what does not go together.

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
from bert_emd.recipes import CUT, RECIPES, has_bf16, recipe_defaults
from bert_emd.starts import STARTS, Shape, Start
from bert_finetune.arguments import TaskArguments, defaults_of_run
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.option_rules import NOT_IN_DISTILLATION, RULES
from bert_finetune.processes import is_main_process

if TYPE_CHECKING:
    from bert_finetune.run_arguments import RunArguments

# Options of the usual optimiser that BertAdam has no use for.
_NOT_BERT_ADAM = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")

# Options of a student that is made by --student_layers.
_OF_MADE_STUDENTS = ("student_width", "student_ffn", "student_heads", "student_start")

# What `--help` says of defaults that depend on other options.
_FOUND = dict.fromkeys(("max_seq_length", "T_emd", *CUT), "by recipe, student and task") | {
    "bf16": "where the hardware has it, with --recipe recommended",
    "do_train": "True, unless --do_eval or --do_predict is given alone",
}


@dataclass
class DistillationArguments:
    """Teacher, student, and the method. The letters are the paper's."""

    teacher_model: str | None = HfArg(default=None, help="Fine-tuned teacher: a folder or a hub name.")
    student_model: str | None = HfArg(
        default=None, help="Pre-trained student: a folder or a hub name. Left out, --student_layers makes one."
    )
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
    unlabeled_file: str | None = HfArg(
        default=None,
        help="More texts to train on, in any format that --train_file takes, or .txt with a text a line; several files "
        "with commas between, a pattern (texts/*.txt), or a folder of .parquet files. The teacher answers for them, "
        "and labels that they may have are not looked at.",
    )
    agreement_file: str | None = HfArg(
        default=None,
        help="File in any format that --test_file takes, or .txt with a text a line, with the text columns of the task "
        "and with or without labels: on it the finished student is measured once, by its agreement with the teacher, "
        "and by the task's figures where there are labels (test_... in eval_results).",
    )
    recipe: Literal[tuple(RECIPES)] = HfArg(
        default="recommended",
        help="Set of defaults (bert_emd/recipes.py), the hyper-parameters chosen by the student's size and the task.",
    )
    objective: Literal["relative", "published"] = HfArg(
        default="relative",
        help="What the losses are measured in. relative: layer costs in the teacher's own size, predictions by their "
        "KL divergence, errors of scores in the training scores' variance, so that loss weights mean the same for "
        "every teacher, task and length. published: the authors' arithmetic: squared errors, those of attention "
        "divided by --max_seq_length, predictions' cross-entropy divided by the number of classes.",
    )
    beta: float = HfArg(default=0.005, help="Weight β of the layer losses.")
    theta: float = HfArg(default=1.0, help="Weight θ of attention and hidden losses against the embedding loss.")
    alpha: float = HfArg(default=1.0, help="Weight α of the teacher's predictions; 1 - α is the labels'.")
    T: float = HfArg(default=1.0, help="Temperature of the prediction loss.")
    T_emd: float = HfArg(default=1.0, help="Temperature of the cost attention (no effect with normalize).")
    layer_mapping: str = HfArg(
        default="emd",
        metadata={"choices": MAPPINGS},
        help="Which layers learn from which. "
        + "; ".join(f"{name}: {row.what}" + f" ({row.source})" * bool(row.source) for name, row in MAPPINGS.items())
        + ". With --alpha 0, none is plain fine-tuning; the teacher is only measured beside it.",
    )
    use_att: bool = HfArg(default=True, help="Learn attention scores.")
    use_rep: bool = HfArg(default=True, help="Learn hidden states.")
    use_embedding: bool = HfArg(default=True, help="Learn the embedding output.")
    cost_attention: Literal[WEIGHT_UPDATES] = HfArg(
        default="normalize",
        help="How layer weights follow the costs: normalize (the authors' code since 2021), softmax, softmax2 (their "
        "code of 2020), none (weights stay uniform).",
    )
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
    one_step: bool = HfArg(
        default=True,
        help="False: the first of two stages, layer losses only; go on with --pred_distill and this run's output as "
        "--student_model.",
    )
    pred_distill: bool = HfArg(default=False, help="The second of two stages: the prediction loss only.")
    teacher_mode: Literal["eval", "train"] = HfArg(
        default="eval", help="train: the teacher's dropout is active while it teaches, as in the authors' code."
    )
    teacher_cache: Literal["auto", "memory", "disk", "none"] = HfArg(
        default="auto",
        help="Where to keep what the teacher says of each example, so that it runs once and not in every epoch: "
        "memory, disk (removed at the end), none; auto: a GPU's memory, or the disk on a CPU or with "
        "--teacher_cache_dir, if it takes no more than half of what is free; none with several processes. Not with "
        "--teacher_mode train or --count_padding.",
    )
    teacher_cache_dir: str | None = HfArg(
        default=None,
        help="Folder of a cache on disk that stays, for further students of the same teacher on the same data.",
    )
    teacher_cache_limit: float = HfArg(
        default=50.0,
        help="Most GB that caches on disk take: in --teacher_cache_dir the least recently used are removed for a new "
        "one, but none that a run uses. `python -m bert_emd.teacher_cache DIR` lists and removes them.",
    )
    teacher_cache_dtype: Literal["bfloat16", "float32"] = HfArg(
        default="bfloat16", help="How exactly the teacher's answers are kept; float32 takes twice the room."
    )
    head: Literal["own", "relu"] = HfArg(
        default="own",
        help="relu: both models' logits are classifier(relu(pooled)), without dropout, as in the authors' code. A "
        "saved model has no relu there: eval_results then holds its figures without it too, as own_head_eval_...",
    )
    optimizer: Literal["adamw", "bert_adam"] = HfArg(
        default="adamw",
        help="bert_adam: the original BERT's, without bias correction, each tensor's gradient clipped to norm 1; it "
        "takes --weight_decay (the authors': 0.01), but no --optim, --adam_... or --max_grad_norm. adamw: what --optim "
        "says, the whole gradient clipped to --max_grad_norm.",
    )
    pad_to_max_length: bool = HfArg(
        default=False, help="Pad every training batch to --max_seq_length, not just to its longest example."
    )
    count_padding: bool = HfArg(
        default=False,
        help="Padded tokens count in the layer losses, as in the authors' code; needs --objective published and "
        "--pad_to_max_length.",
    )

    @property
    def shape(self) -> Shape:
        return Shape(self.student_width, self.student_ffn, self.student_heads)

    @property
    def start(self) -> Start:
        return STARTS[self.student_start]

    @property
    def copies_teacher(self) -> bool:
        """Whether the student is made of the teacher's layers as they are."""
        return not self.student_model and self.start.layers and self.shape == Shape()


def read_options(
    argv: list[str] | None, description: str
) -> tuple[DistillationArguments, TaskArguments, "RunArguments"]:
    """The command line, with the recipe's values as the defaults of what it leaves out.

    As in the authors' script, `--do_train` need not be said; `--do_eval` or `--do_predict` alone look at a student that
    is finished.
    """
    parser = Parser(DistillationArguments, TaskArguments, description=description, found=_FOUND)
    # A first look, at what the recipe's values depend on: its name, the task, the number of student layers.
    distillation, task_args, run = parser.look(argv)
    if not run.do_train and (run.do_eval or run.do_predict):
        folder = distillation.student_model or run.output_dir
        parser.set_defaults(**defaults_of_run(folder, task_args, run, "head"))
        return parser.parse(argv)
    defaults = recipe_defaults(
        distillation.recipe,
        student_layers(distillation),
        task_args.name,
        cut=distillation.copies_teacher,
        pred_distill=distillation.pred_distill,
    )
    if distillation.recipe == "recommended" and not run.fp16:
        defaults["bf16"] = has_bf16(run.use_cpu)
    parser.set_defaults(**defaults, do_train=True)
    distillation, task_args, args = parser.parse(argv)
    check_values(distillation, args)
    if is_main_process():
        options = vars(distillation) | vars(task_args) | vars(args)
        chosen = " ".join(f"--{name} {options[name]}" for name in defaults)
        print(f"recipe {distillation.recipe}, with what the command line gives: {chosen}")
    return distillation, task_args, args


def student_layers(distillation: DistillationArguments) -> int:
    """How many layers the student will have. Raises InputError where the options name no teacher or no student."""
    if distillation.teacher_model is None:
        raise InputError("--teacher_model is missing: give the folder of a fine-tuned model, or its hub name")
    if not (distillation.student_model or distillation.student_layers):
        raise InputError("give --student_model, or --student_layers to start from the teacher's own layers")
    from bert_emd.student import parse_student_layers
    from bert_finetune.checkpoints import load_config

    if distillation.student_model:
        return load_config(distillation.student_model, "--student_model").num_hidden_layers
    teacher = load_config(distillation.teacher_model, "--teacher_model")
    return len(parse_student_layers(distillation.student_layers, teacher.num_hidden_layers, distillation.start.layers))


def check_values(distillation: DistillationArguments, args: "RunArguments") -> None:
    """Raise InputError for values outside their range, and for options that do not go together."""
    for name, fits, rule in (
        ("T", distillation.T > 0, "above 0"),
        ("T_emd", distillation.T_emd > 0, "above 0"),
        ("weight_momentum", 0 <= distillation.weight_momentum < 1, "from 0 to below 1"),
        ("beta", distillation.beta >= 0, "0 or more"),
        ("theta", distillation.theta >= 0, "0 or more"),
        ("teacher_cache_limit", distillation.teacher_cache_limit > 0, "above 0"),
        ("alpha", 0 <= distillation.alpha <= 1, "from 0 to 1"),
    ):
        if not fits:
            raise InputError(f"--{name} {getattr(distillation, name)}: must be {rule}")
    if distillation.student_model and distillation.student_layers:
        raise InputError("--student_layers makes the student from the teacher; leave it or --student_model out")
    for field in dataclasses.fields(distillation):
        given = getattr(distillation, field.name) != field.default
        if distillation.student_model and field.name in _OF_MADE_STUDENTS and given:
            raise InputError(f"--{field.name}: the --student_model has its own; leave one of the two out")
    if distillation.optimizer == "bert_adam":
        for field in dataclasses.fields(args):
            if field.name in _NOT_BERT_ADAM and getattr(args, field.name) != field.default:
                raise InputError(f"--{field.name}: --optimizer bert_adam has its own; leave it out")
    if distillation.count_padding and distillation.objective != "published":
        raise InputError("--count_padding: needs --objective published; the relative one counts real tokens only")
    if distillation.count_padding and not distillation.pad_to_max_length:
        raise InputError("--count_padding: needs --pad_to_max_length, or losses depend on each batch's longest example")
    if args.torch_compile and args.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        raise InputError("--torch_compile: needs a C++ compiler, and there is no g++; install one or leave it out")
    if distillation.teacher_cache_dir and distillation.teacher_cache in ("memory", "none"):
        raise InputError(f"--teacher_cache_dir: nothing lasts with --teacher_cache {distillation.teacher_cache}")
    for name, rules in RULES.items():
        if NOT_IN_DISTILLATION in rules and getattr(args, name):
            raise InputError(f"--{name}: is not supported in distillation; leave it out")
