"""The command line of the distillation: the method's options, the recipe's defaults, what does not go together.

Nothing here imports torch before all options are known to be right.
"""

import csv
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from bert_emd.layer_arguments import OF_MADE_STUDENTS, LayerArguments, check_layer_values
from bert_emd.recipes import CUT, RECIPES, has_bf16, recipe_defaults
from bert_finetune.arguments import TaskArguments, defaults_of_run
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.paths import listed
from bert_finetune.processes import is_main_process

if TYPE_CHECKING:
    from bert_finetune.run_arguments import RunArguments
    from bert_finetune.soft_labels import SoftLabels

# What `--help` says of defaults that depend on other options.
_FOUND = dict.fromkeys(("max_seq_length", "T_emd", *CUT), "by recipe, student and task") | {
    "bf16": "where the hardware has it, with --recipe recommended",
    "do_train": "True, unless --do_eval or --do_predict is given alone",
}


@dataclass
class DistillationArguments(LayerArguments):
    """Teacher, student, and the method. The letters are the paper's."""

    teacher_model: str | None = HfArg(
        default=None,
        help="Fine-tuned teacher: a folder or a hub name. Of several, with commas between, the probabilities are "
        "averaged, and the layers are the first one's.",
    )
    student_model: str | None = HfArg(
        default=None, help="Pre-trained student: a folder or a hub name. Left out, --student_layers makes one."
    )
    unlabeled_file: str | None = HfArg(
        default=None,
        help="More texts to train on, in any format that --train_file takes, or .txt with a text a line; several files "
        "with commas between, a pattern (texts/*.txt), or a folder of .parquet files. The teacher answers for them, "
        "and labels that they may have are not looked at.",
    )
    aug_train: bool = HfArg(
        default=False,
        help="Train on the GLUE task's train_aug.tsv, beside its train.tsv, which bert_emd/augment_data.py writes.",
    )
    probability_columns: str | None = HfArg(
        default=None,
        help="Columns of your --train_file with probabilities that stand in the place of the teacher's predictions: "
        "one a class (p_neg,p_pos), or a single one with a list of all. With them --teacher_model may be left out; "
        "only predictions then teach, and no layers.",
    )
    logit_columns: str | None = HfArg(default=None, help="The same with logits; of scores, the teacher's scores.")
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
    beta: float = HfArg(default=0.005, help="Weight β of the layer losses.")
    alpha: float = HfArg(
        default=1.0,
        help="Weight α of the teacher's predictions; 1 - α is the labels'. 0 with --layer_mapping none is plain "
        "fine-tuning; the teacher is only measured beside it.",
    )
    T: float = HfArg(default=1.0, help="Temperature of the prediction loss.")
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
    pad_to_max_length: bool = HfArg(
        default=False, help="Pad every training batch to --max_seq_length, not just to its longest example."
    )
    count_padding: bool = HfArg(
        default=False,
        help="Padded tokens count in the layer losses, as in the authors' code; needs --objective published and "
        "--pad_to_max_length.",
    )

    @property
    def teachers(self) -> list[str]:
        """The teachers' names."""
        return listed(self.teacher_model) if self.teacher_model else []

    @property
    def soft_labels(self) -> "SoftLabels | None":
        """What training files have in the place of the teacher's predictions."""
        for option, are_logits in (("probability_columns", False), ("logit_columns", True)):
            if columns := getattr(self, option):
                from bert_finetune.soft_labels import SoftLabels

                # As in a CSV file, a name with a comma in it stands in double quotes.
                names = tuple(
                    name.strip() for name in next(csv.reader([columns], skipinitialspace=True)) if name.strip()
                )
                return SoftLabels(f"--{option} {columns}", names, are_logits)
        return None

    @property
    def copies_teacher(self) -> bool:
        return not self.student_model and super().copies_teacher


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
    if not distillation.teachers and not distillation.soft_labels:
        raise InputError("--teacher_model is missing: give the folder of a fine-tuned model, or its hub name")
    if not distillation.student_model and not distillation.teachers:
        raise InputError("--student_model is missing: there is no teacher whose layers --student_layers could take")
    if not (distillation.student_model or distillation.student_layers):
        raise InputError("give --student_model, or --student_layers to start from the teacher's own layers")
    from bert_finetune.checkpoints import load_classifier_config

    if distillation.student_model:
        return load_classifier_config(distillation.student_model, "--student_model").num_hidden_layers
    teacher = load_classifier_config(distillation.teachers[0], "--teacher_model", fine_tuned=True)
    return len(distillation.layers_of(teacher))


def check_values(distillation: DistillationArguments, args: "RunArguments") -> None:
    """Raise InputError for values outside their range, and for options that do not go together."""
    check_layer_values(distillation, args)
    for name, fits, rule in (
        ("T", distillation.T > 0, "above 0"),
        ("beta", distillation.beta >= 0, "0 or more"),
        ("teacher_cache_limit", distillation.teacher_cache_limit > 0, "above 0"),
        ("alpha", 0 <= distillation.alpha <= 1, "from 0 to 1"),
    ):
        if not fits:
            raise InputError(f"--{name} {getattr(distillation, name)}: must be {rule}")
    if distillation.student_model and distillation.student_layers:
        raise InputError("--student_layers makes the student from the teacher; leave it or --student_model out")
    for field in dataclasses.fields(distillation):
        given = getattr(distillation, field.name) != field.default
        if distillation.student_model and field.name in OF_MADE_STUDENTS and given:
            raise InputError(f"--{field.name}: the --student_model has its own; leave one of the two out")
    if distillation.alpha == 1 and args.class_weights != "none":
        raise InputError(f"--class_weights {args.class_weights}: weighs the labels' loss, which --alpha 1 leaves out")
    if distillation.probability_columns and distillation.logit_columns:
        raise InputError("--probability_columns and --logit_columns: give one of the two")
    if distillation.soft_labels and distillation.alpha == 0:
        raise InputError(f"{distillation.soft_labels.option}: nothing would be learnt from it with --alpha 0")
    if distillation.soft_labels and not distillation.teachers and not distillation.one_step:
        raise InputError("--one_step False: the first stage learns from a teacher's layers; give --teacher_model")
    if len(distillation.teachers) > 1 and distillation.teacher_mode == "train":
        raise InputError("--teacher_mode train: several teachers are asked once, before the training")
    if distillation.count_padding and distillation.objective != "published":
        raise InputError("--count_padding: needs --objective published; the relative one counts real tokens only")
    if distillation.count_padding and not distillation.pad_to_max_length:
        raise InputError("--count_padding: needs --pad_to_max_length, or losses depend on each batch's longest example")
    if distillation.teacher_cache_dir and distillation.teacher_cache in ("memory", "none"):
        raise InputError(f"--teacher_cache_dir: nothing lasts with --teacher_cache {distillation.teacher_cache}")
