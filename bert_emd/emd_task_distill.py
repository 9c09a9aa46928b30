r"""Distil a fine-tuned teacher into a small student: every student layer learns from every teacher layer.

    python emd_task_distill.py --teacher_model ../model/RTE/teacher --student_layers 3 --task_name RTE \
        --data_dir ../glue_data/RTE --output_dir ../model/RTE/student
    python emd_task_distill.py --teacher_model my-classifier --student_layers 3 --train_file train.csv \
        --validation_file dev.csv --output_dir my-small-classifier

Several GPUs: torchrun --nproc_per_node 4 emd_task_distill.py ... (or accelerate launch). The options of transformers'
TrainingArguments work too, but for label smoothing, NEFTune and gradient checkpointing.
"""

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.hf_argparser import HfArg

from bert_emd.attention_scores import expose_attention
from bert_emd.layer_transport import SOLVERS, WEIGHT_UPDATES, LayerTransport
from bert_emd.objectives import FixedMapping, LayerCosts, Objective, fixed_mapping
from bert_emd.recipes import BEST, RECIPES, has_bf16, recipe_defaults
from bert_emd.student import (
    PROJECTIONS,
    Student,
    parse_student_layers,
    stored_projections,
    student_from_teacher,
    use_relu_head,
)
from bert_emd.teacher_cache import PLACES, plan_cache
from bert_emd.trainer import DistillationTrainer
from bert_finetune.arguments import Parser, RunArguments, TaskArguments
from bert_finetune.checkpoints import check_length, load_classifier, load_config, load_tokenizer
from bert_finetune.data import load_datasets
from bert_finetune.errors import InputError, reports_input_errors
from bert_finetune.glue import Task
from bert_finetune.metrics import chance_level, check_metric
from bert_finetune.outputs import check_output_dir, start_output_dir, write_run_description
from bert_finetune.processes import is_main_process
from bert_finetune.push import open_repository, push
from bert_finetune.trainer import TaskTrainer, check_batch, is_figure

# Options of the usual optimiser that BertAdam has no use for.
_NOT_BERT_ADAM = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")

# Not supported in distillation.
_REFUSED = ("label_smoothing_factor", "neftune_noise_alpha", "gradient_checkpointing")

# What `--help` says of defaults that depend on other options.
_FOUND = dict.fromkeys(("num_train_epochs", "max_seq_length", *vars(BEST[4, "RTE"])), "by recipe, layers and task") | {
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
        help="Start the student from the teacher's own layers: a number (3: evenly spaced) or a list, counted from 1 "
        "(1,3,5).",
    )
    recipe: Literal[tuple(RECIPES)] = HfArg(
        default="recommended",
        help="Set of defaults (bert_emd/recipes.py), the hyper-parameters chosen by the student's size and the task.",
    )
    beta: float = HfArg(default=0.005, help="Weight β of the layer losses.")
    theta: float = HfArg(default=1.0, help="Weight θ of attention and hidden losses against the embedding loss.")
    alpha: float = HfArg(default=1.0, help="Weight α of the teacher's predictions; 1 - α is the labels'.")
    T: float = HfArg(default=1.0, help="Temperature of the prediction loss.")
    T_emd: float = HfArg(default=1.0, help="Temperature of the cost attention (no effect with normalize).")
    layer_mapping: Literal["emd", "uniform", "skip", "last", "none"] = HfArg(
        default="emd",
        help="Which layers learn from which: emd, a fixed rival (uniform: TinyBERT's every k-th; skip, last: Patient "
        "KD's), or none for the prediction loss only. With --alpha 0, none is plain fine-tuning; the teacher is only "
        "measured beside it.",
    )
    use_att: bool = HfArg(default=True, help="Learn attention scores.")
    use_rep: bool = HfArg(default=True, help="Learn hidden states.")
    use_embedding: bool = HfArg(default=True, help="Learn the embedding output.")
    cost_attention: Literal[WEIGHT_UPDATES] = HfArg(
        default="normalize",
        help="How layer weights follow the costs: normalize (the authors' code since 2021), softmax, softmax2 (their "
        "code of 2020), none (weights stay uniform).",
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
    projection: Literal[PROJECTIONS] = HfArg(
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
    teacher_cache: Literal[PLACES] = HfArg(
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
        help="Padded tokens count in the layer losses, as in the authors' code; needs --pad_to_max_length.",
    )


def parse(argv: list[str] | None) -> tuple[DistillationArguments, TaskArguments, RunArguments]:
    """The command line, with the recipe's values as the defaults of what it leaves out.

    As in the authors' script, `--do_train` need not be said; `--do_eval` or `--do_predict` alone look at a student that
    is finished.
    """
    parser = Parser(DistillationArguments, TaskArguments, RunArguments, description=__doc__, found=_FOUND)
    argv = sys.argv[1:] if argv is None else argv
    # A first look, at what the recipe's values depend on: its name, the task, the number of student layers.
    distillation, task_args, args = parser.parse(argv)
    if not args.do_train and (args.do_eval or args.do_predict):
        parser.set_defaults(**defaults_of_run(distillation.student_model or args.output_dir))
        return parser.parse(argv)
    if distillation.teacher_model is None:
        raise InputError("--teacher_model is missing: give the folder of a fine-tuned model, or its hub name")
    if distillation.student_model:
        layers = load_config(distillation.student_model, "--student_model").num_hidden_layers
    elif distillation.student_layers:
        teacher = load_config(distillation.teacher_model, "--teacher_model")
        layers = len(parse_student_layers(distillation.student_layers, teacher.num_hidden_layers))
    else:
        raise InputError("give --student_model, or --student_layers to start from the teacher's own layers")
    defaults = recipe_defaults(distillation.recipe, layers, task_args.name, distillation.pred_distill)
    if distillation.recipe == "recommended" and not args.fp16:
        defaults["bf16"] = has_bf16(args.use_cpu)
    parser.set_defaults(**defaults, do_train=True)
    distillation, task_args, args = parser.parse(argv)
    check_values(distillation, args)
    if is_main_process():
        options = vars(distillation) | vars(task_args) | vars(args)
        chosen = " ".join(f"--{name} {options[name]}" for name in defaults)
        print(f"recipe {distillation.recipe}, with what the command line gives: {chosen}")
    return distillation, task_args, args


def defaults_of_run(folder: str) -> dict:
    """How a finished student was trained, as far as it counts for looking at it, from the `args.json` beside it."""
    try:
        options = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))["options"]
        names = ("max_seq_length", "head", "text_column", "label_column", "bf16", "fp16")
        return {name: options[name] for name in names if name in options}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not a run of this script


def check_values(distillation: DistillationArguments, args: RunArguments) -> None:
    """Raise InputError for values outside their range, and for options that do not go together."""
    for name, fits, rule in (
        ("T", distillation.T > 0, "above 0"),
        ("T_emd", distillation.T_emd > 0, "above 0"),
        ("beta", distillation.beta >= 0, "0 or more"),
        ("theta", distillation.theta >= 0, "0 or more"),
        ("alpha", 0 <= distillation.alpha <= 1, "from 0 to 1"),
    ):
        if not fits:
            raise InputError(f"--{name} {getattr(distillation, name)}: must be {rule}")
    if distillation.student_model and distillation.student_layers:
        raise InputError("--student_layers makes the student from the teacher; leave it or --student_model out")
    if distillation.optimizer == "bert_adam":
        for field in dataclasses.fields(args):
            if field.name in _NOT_BERT_ADAM and getattr(args, field.name) != field.default:
                raise InputError(f"--{field.name}: --optimizer bert_adam has its own; leave it out")
    if distillation.count_padding and not distillation.pad_to_max_length:
        raise InputError("--count_padding: needs --pad_to_max_length, or losses depend on each batch's longest example")
    if args.torch_compile and args.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        raise InputError("--torch_compile: needs a C++ compiler, and there is no g++; install one or leave it out")
    if distillation.teacher_cache_dir and distillation.teacher_cache in ("memory", "none"):
        raise InputError(f"--teacher_cache_dir: nothing lasts with --teacher_cache {distillation.teacher_cache}")
    for name in _REFUSED:
        if getattr(args, name):
            raise InputError(f"--{name}: is not supported in distillation; leave it out")


def cacheable(distillation: DistillationArguments, args: RunArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the teacher's answers can be kept. Raises InputError where that was asked for and cannot be."""
    choice, in_training = distillation.teacher_cache, distillation.teacher_mode == "train"
    reasons = {
        "the teacher's answers change from epoch to epoch with --teacher_mode train": in_training,
        "nothing is kept for padding, which --count_padding counts": distillation.count_padding,
        "the teacher's answers depend on padding where that is on the left": tokenizer.padding_side != "right",
        "every process sees other examples in every epoch; use disk": args.world_size > 1
        and choice != "disk"
        and not distillation.teacher_cache_dir,
    }
    for reason, applies in reasons.items():
        if applies and choice in ("memory", "disk"):
            raise InputError(f"--teacher_cache {choice}: {reason}")
    return not any(reasons.values())


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    distillation, task_args, args = parse(argv)
    if args.do_train:
        check_output_dir(args, distillation.teacher_model, distillation.student_model)
    open_repository(args, distillation.student_model)
    (distil if args.do_train else evaluate_student)(distillation, task_args, args)
    push(args)


def distil(distillation: DistillationArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Train a student, save the best one and its results; predict the test set where asked for."""
    teacher_config = load_config(distillation.teacher_model, "--teacher_model")
    task = task_args.load_task(teacher_config, fine_tuned=True, splits=args.splits)
    check_metric(task, args.metric_for_best_model)
    if not distillation.one_step and not distillation.pred_distill:
        args.load_best_model_at_end = False  # no dev figure tells how well the layers have learnt
    teacher = load_classifier(distillation.teacher_model, task, "--teacher_model", fine_tuned=True)
    tokenizer = load_shared_tokenizer(distillation, task_args.do_lower_case)
    set_seed(args.seed)  # new weights, of a head or the projections, are drawn from here on
    student = load_student(distillation, teacher, task)
    stored = None
    if distillation.student_model:
        stored = stored_projections(distillation.student_model, teacher.config.hidden_size)
    for model in (teacher, student):
        check_length(model.config, task_args.max_seq_length)
    kernel = "compiled" if args.torch_compile and args.device.type == "cpu" else None
    costs = LayerCosts(task_args.max_seq_length, distillation.count_padding, kernel)
    objective = make_objective(distillation, costs, student.config, teacher.config, task.is_regression)
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits)
    check_batch(args, datasets.train)
    if "attention" in objective.looks_at:
        expose_attention(teacher, "--teacher_model", task_args.max_seq_length)
        expose_attention(student, "--student_model", task_args.max_seq_length)
    trained = Student(student, teacher.config.hidden_size, distillation.projection, stored)
    relus = [*use_relu_head(teacher), *use_relu_head(student)] if distillation.head == "relu" else []
    collator = DataCollatorWithPadding(tokenizer)
    if distillation.pad_to_max_length:
        collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=task_args.max_seq_length)

    cache_folder = Path(distillation.teacher_cache_dir or Path(args.output_dir) / "teacher_cache")
    plan = None
    if objective.needs_teacher:
        plan = plan_cache(
            distillation.teacher_cache if cacheable(distillation, args, tokenizer) else "none",
            distillation.teacher_cache_dtype,
            cache_folder,
            teacher.to(args.device).eval(),
            objective.looks_at,
            datasets.train,
            args.device,
            worthwhile=reads_twice(args, len(datasets.train)),
            lasting=bool(distillation.teacher_cache_dir),
            variant=f"{distillation.head} head, bf16 {args.bf16}, fp16 {args.fp16}",
        )
        if plan is None and distillation.teacher_cache_dir and is_main_process():
            print("warning: --teacher_cache_dir: nothing is kept, for want of room or by --teacher_cache's other rules")
    checkpoint = start_output_dir(args)
    teacher_metrics = evaluate_teacher(teacher, args, task, tokenizer, datasets.dev)
    train, cache = datasets.train, None
    if plan is not None:
        with args.main_process_first(local=False):
            cache = plan.open()
        train = train.add_column("example", list(range(len(train))))
        if is_main_process():
            print(plan)
    trainer = DistillationTrainer(
        trained,
        teacher,
        objective,
        args,
        task,
        tokenizer,
        train,
        datasets.dev,
        teacher_mode=distillation.teacher_mode,
        optimizer=distillation.optimizer,
        teacher_metrics=teacher_metrics,
        relu_heads=relus,
        teacher_cache=cache,
        data_collator=collator,
    )
    write_run_description(args, distillation, task_args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.write_predictions(datasets.test)
    trainer.finish_training()
    if args.process_index == 0 and not distillation.teacher_cache_dir:
        shutil.rmtree(cache_folder, ignore_errors=True)


def reads_twice(args: RunArguments, examples: int) -> bool:
    """Whether the training sees an example more than once."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size > examples
    return args.num_train_epochs > 1


def evaluate_student(distillation: DistillationArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Measure a finished student, and write its predictions into the output folder: `--student_model`, or the model
    in `--output_dir`."""
    name = distillation.student_model or args.output_dir
    option = "--student_model" if distillation.student_model else "--output_dir"
    task = task_args.load_task(load_config(name, option), fine_tuned=True, splits=args.splits)
    model = load_classifier(name, task, option, fine_tuned=True)
    tokenizer = load_tokenizer(name, option, task_args.do_lower_case)
    check_length(model.config, task_args.max_seq_length)
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits)
    if distillation.head == "relu":
        use_relu_head(model)
    trainer = TaskTrainer(model, args, task, tokenizer, eval_datasets=datasets.dev)
    if args.do_eval:
        trainer.evaluate()
    trainer.write_predictions(datasets.test)


def load_shared_tokenizer(distillation: DistillationArguments, do_lower_case: bool | None) -> PreTrainedTokenizerBase:
    """The tokenizer that both models understand. Raises InputError where their vocabularies differ."""
    teachers = load_tokenizer(distillation.teacher_model, "--teacher_model", do_lower_case)
    if not distillation.student_model:
        return teachers
    students = load_tokenizer(distillation.student_model, "--student_model", do_lower_case)
    theirs, ours = teachers.get_vocab(), students.get_vocab()
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise InputError(
            f"--student_model {distillation.student_model}: its vocabulary ({len(ours)} tokens) is not that of "
            f"--teacher_model {distillation.teacher_model} ({len(theirs)} tokens), see {token!r}; both must read the "
            "same input"
        )
    # A model without segment ids ignores them, but one that has them must be given them.
    return students if "token_type_ids" in students.model_input_names else teachers


def load_student(distillation: DistillationArguments, teacher: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The student as it starts: a model of its own, or the teacher's embeddings, head and chosen layers."""
    if distillation.student_model:
        return load_classifier(distillation.student_model, task, "--student_model")
    layers = parse_student_layers(distillation.student_layers, teacher.config.num_hidden_layers)
    if is_main_process():
        print(f"student from the teacher's layers {', '.join(map(str, layers))}")
    return student_from_teacher(teacher, layers)


def make_objective(
    distillation: DistillationArguments,
    costs: LayerCosts,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    regression: bool,
) -> Objective:
    """The loss that the options describe. Raises InputError where the two models cannot be compared."""
    shape = student.num_hidden_layers, teacher.num_hidden_layers
    if distillation.layer_mapping == "none" or distillation.pred_distill:
        mapping = None
    elif distillation.layer_mapping == "emd":
        kind = distillation.cost_attention if distillation.update_weight else "none"
        solver = "pot" if distillation.emd_solver == "auto" else distillation.emd_solver
        mapping = LayerTransport(*shape, kind, distillation.T_emd, not distillation.separate, solver)
    else:
        pairs = fixed_mapping(distillation.layer_mapping, *shape)
        mapping = FixedMapping(pairs, *shape)
        if is_main_process():
            print("layer mapping, student-teacher: " + ", ".join(f"{i}-{j}" for i, j in pairs))
    heads = student.num_attention_heads, teacher.num_attention_heads
    if mapping is not None and distillation.use_att and heads[0] != heads[1]:
        raise InputError(
            f"the student has {heads[0]} attention heads and the teacher {heads[1]}: their scores cannot be compared; "
            "use --use_att False or another --student_model"
        )
    return Objective(
        mapping,
        costs,
        distillation.beta,
        distillation.theta,
        distillation.alpha,
        distillation.T,
        distillation.use_att,
        distillation.use_rep,
        distillation.use_embedding,
        use_prediction=distillation.one_step or distillation.pred_distill,
        regression=regression,
    )


def evaluate_teacher(
    teacher: PreTrainedModel,
    args: RunArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    dev: dict[str, Dataset],
) -> dict[str, float]:
    """Measure and show the teacher's dev figures, with a warning when a constant answer would do as well."""
    if is_main_process():
        print(f"teacher: {teacher.config.num_hidden_layers} layers x {teacher.config.hidden_size}")
    trainer = TaskTrainer(teacher, args, task, tokenizer, eval_datasets=dev)
    metrics = trainer.evaluate()
    # Without the wrapper that evaluation in bf16 leaves, which would copy all of its answers to float32.
    trainer.accelerator.unwrap_model(teacher, keep_fp32_wrapper=False)
    score, chance = metrics[task.best_metric], chance_level(task, next(iter(dev.values()))["labels"])
    if score <= chance and is_main_process():
        print(
            f"warning: the teacher's {task.metric} of {score:.4f} is no better than a constant answer's {chance:.4f}; "
            "is it a model for this task, with its classes in this order?",
            file=sys.stderr,
        )
    return {key: value for key, value in metrics.items() if is_figure(key)}


if __name__ == "__main__":
    main()
