"""The distillation of a teacher into a student, in its order of events."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from bert_emd.arguments import DistillationArguments
from bert_emd.attention_scores import attention_heads, attention_windows, expose_attention
from bert_emd.diagnosis import format_shares
from bert_emd.distillation import Distillation
from bert_emd.layer_arguments import LayerArguments
from bert_emd.layer_mapping import LayerMapping
from bert_emd.mappings import MAPPINGS
from bert_emd.narrow_student import make_student, start_from_teacher
from bert_emd.objectives import LayerCosts, Objective, PublishedCosts
from bert_emd.student import (
    make_projections,
    stored_projections,
    use_relu_head,
)
from bert_emd.teacher_answers import CachePlan, plan_cache
from bert_emd.teachers import (
    load_shared_tokenizer,
    load_teachers,
    measure_teachers,
    teachers_digests,
    with_teacher_logits,
)
from bert_emd.trainer import DistillationTrainer
from bert_finetune.architectures import check_inputs, check_length
from bert_finetune.arguments import TaskArguments
from bert_finetune.checkpoints import load_classifier, load_classifier_config
from bert_finetune.data import TaskDatasets, load_datasets, load_held_out, load_unlabelled
from bert_finetune.digests import data_digest, weights_digest
from bert_finetune.errors import InputError
from bert_finetune.finishing import Ending, finish, write_predictions
from bert_finetune.glue import Task
from bert_finetune.outputs import check_output_dir, describe_experiment, output_folder, write_run_description
from bert_finetune.paths import for_others, several
from bert_finetune.processes import is_main_process
from bert_finetune.push import open_repository, push
from bert_finetune.run_arguments import RunArguments
from bert_finetune.soft_labels import TEACHER_LOGITS, SoftLabels
from bert_finetune.task_kinds import AGREEMENT, TaskKind
from bert_finetune.training import TaskTrainer, check_batch
from bert_finetune.training_log import all_figures

# Of a GLUE task's folder.
AUGMENTED = "train_aug.tsv"


def distil(distillation: DistillationArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Train a student, save the best one and its results; predict the test set where asked for."""
    check_output_dir(args, *distillation.teachers, distillation.student_model)
    open_repository(args, distillation.student_model)
    taught = bool(distillation.teachers)
    named, option = (
        (distillation.teachers[0], "--teacher_model") if taught else (distillation.student_model, "--student_model")
    )
    config, unlabelled = load_classifier_config(named, option, taught), distillation.alpha == 1
    task = task_args.load_task(config, taught, args.splits, unlabelled, distillation.soft_labels)
    task = task.chosen_by(args.metric_for_best_model, *(AGREEMENT if taught else ()))
    if distillation.aug_train:
        task = augmented(task, task_args)
    if not distillation.one_step and not distillation.pred_distill:
        args.load_best_model_at_end = False  # no dev figure tells how well the layers have learnt

    teachers = load_teachers(distillation, task_args, task)
    teacher = teachers[0] if teachers else None
    tokenizer = load_shared_tokenizer(
        distillation.teachers, distillation.student_model, "--student_model", task_args.do_lower_case
    )
    set_seed(args.seed)  # new weights, of a head or the projections, are drawn from here on
    student = load_student(distillation, teacher, task)
    check_models(teachers, student, "--student_model", tokenizer, task, task_args.max_seq_length)
    with_layers = teacher is not None and not distillation.pred_distill
    mapping = make_mapping(distillation, student.config, teacher.config) if with_layers else None
    if mapping is not None and distillation.use_att:
        expose_attention(teacher, "--teacher_model", task_args.max_seq_length)
        expose_attention(student, "--student_model", task_args.max_seq_length)
    # A dev set without labels is for a run whose best checkpoint is the one that is most like the teacher.
    unlabelled = ["train", "dev"] if args.metric_for_best_model in AGREEMENT else ["train"]
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits, unlabelled)
    datasets = with_unlabelled(datasets, distillation, task, tokenizer, task_args.max_seq_length)
    held_out = load_agreement_file(distillation, task_args, task, tokenizer)
    check_batch(args, datasets.train)
    task = task.weighted(args.class_weights, datasets.train["labels"])
    windows = attention_windows(student.config, teacher.config) if mapping is not None else None
    published = {"max_seq_length": task_args.max_seq_length, "count_padding": distillation.count_padding}
    costs = make_costs(distillation, args, windows, **published)
    unit = 1.0 if distillation.objective == "published" else unit_of_loss(task.kind, datasets.train)
    objective = make_objective(distillation, costs, task.kind, unit, with_layers=mapping is not None)
    check_taught(datasets.train, task.kind, objective)
    projections = load_projections(distillation, student, teacher)
    relus = (
        [hook for model in (*teachers, student) for hook in use_relu_head(model)] if distillation.head == "relu" else []
    )

    # What is given beside each row, or will be, is not asked for at each step.
    known = {"logits"} if distillation.soft_labels or len(teachers) > 1 else set()
    asked = objective.looks_at - known if teacher is not None and objective.needs_teacher else frozenset()
    plan = plan_of_cache(distillation, args, teacher, asked, tokenizer, datasets.train) if asked else None
    read = teachers_digests(teachers) | {
        "the student as it starts": weights_digest(torch.nn.ModuleList([student, projections])),
        "the data": data_digest([datasets.train, *datasets.dev.values()]),
        "the teacher's answers": "asked for at each step" if plan is None else f"kept in {plan.dtype}",
    }
    experiment = describe_experiment(args, (distillation, task_args), read)
    with output_folder(args, experiment) as checkpoint:
        measured, each = measure_teachers(teachers, args, task, tokenizer, datasets.dev, held_out)
        train, cache = with_teacher_logits(datasets.train, teachers, args, task, tokenizer), None
        if plan is not None:
            if is_main_process():
                print(plan)
            with args.main_process_first(local=False):
                cache = plan.open()
            train = train.add_column("example", list(range(len(train))))
        if checkpoint is None and not distillation.student_model:
            start_student(distillation, student, projections, teacher.to(args.device), datasets.train, tokenizer)
        padding = {}
        if distillation.pad_to_max_length:
            padding = {"padding": "max_length", "max_length": task_args.max_seq_length}
        trainer = DistillationTrainer(
            Distillation(student, objective, mapping, projections),
            teacher,
            args,
            task,
            tokenizer,
            train,
            datasets.dev,
            experiment,
            held_out,
            {name: answers.logits for name, answers in measured.answers.items()},
            asked=asked,
            teacher_mode=distillation.teacher_mode,
            optimizer=distillation.optimizer,
            teacher_cache=cache,
            data_collator=DataCollatorWithPadding(tokenizer, **padding),
        )
        write_run_description(args, distillation, task_args)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.record_layers()
        if trainer.shares and is_main_process():
            print(f"terms by their share of the gradient (of the loss): {format_shares(trainer.shares)}")
        name = "teacher (with a relu before its classifier)" if relus else "teacher"
        names = [name] if len(teachers) < 2 else [f"{name} {k}" for k in range(1, len(teachers) + 1)]
        ending = Ending(
            origin(trainer, distillation.soft_labels, teachers),
            compared=list(zip(names, teachers, [one.figures for one in each], strict=False)),
            figures=trainer.shares | {f"teacher_{key}": value for key, value in measured.figures.items()},
            writers=[lambda folder: write_layers(trainer, folder)],
            hooks=relus,
        )
        finish(trainer, datasets.test, ending, task_args.file)
    if args.process_index == 0 and not distillation.teacher_cache_dir:
        shutil.rmtree(cache_folder(distillation, args), ignore_errors=True)
    push(args)


def evaluate_student(distillation: DistillationArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Measure a finished student, and write its predictions into the output folder: `--student_model`, or the model
    in `--output_dir`. With `--teacher_model`, also how it agrees with that."""
    open_repository(args, distillation.student_model)
    name = distillation.student_model or args.output_dir
    option = "--student_model" if distillation.student_model else "--output_dir"
    # With a teacher, agreement can be measured without labels.
    unlabelled = ["dev"] if distillation.teachers else []
    config = load_classifier_config(name, option, fine_tuned=True)
    task = task_args.load_task(config, True, args.splits, unlabelled=bool(unlabelled))
    model = load_classifier(name, task, option, fine_tuned=True, output_names=task_args.output_names)
    tokenizer = load_shared_tokenizer(distillation.teachers, name, option, task_args.do_lower_case)
    teachers = load_teachers(distillation, task_args, task)
    check_models(teachers, model, option, tokenizer, task, task_args.max_seq_length)
    for each in (model, *teachers):
        if distillation.head == "relu":
            use_relu_head(each)
    if teachers:
        task = replace(task, kind=task.kind.configured(teachers[0].config.to_dict()))
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits, unlabelled)
    held_out = load_agreement_file(distillation, task_args, task, tokenizer)
    measured, _ = measure_teachers(teachers, args, task, tokenizer, datasets.dev, held_out)
    teacher_logits = {name: answers.logits for name, answers in measured.answers.items()}
    trainer = TaskTrainer(
        model, args, task, tokenizer, dev=datasets.dev, held_out=held_out, teacher_logits=teacher_logits
    )
    figures = trainer.measure().figures
    if figures and is_main_process():
        print(all_figures(figures))
    write_predictions(trainer, datasets.test, task_args.file)
    push(args)


def check_models(
    teachers: list[PreTrainedModel],
    student: PreTrainedModel,
    option: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_seq_length: int,
) -> None:
    """Raise InputError where one of the models cannot read what the shared tokenizer gives; `option`: where the
    student's name comes from."""
    for model, named in [*((teacher, "--teacher_model") for teacher in teachers), (student, option)]:
        check_length(model, max_seq_length)
        check_inputs(model, tokenizer, f"{named} {model.config.name_or_path}", pair=len(task.columns) > 1)


def augmented(task: Task, task_args: TaskArguments) -> Task:
    """The task with its augmented training file. Raises InputError where there is none."""
    if task.own_files:
        raise InputError("--aug_train: is for a GLUE task; give your own augmented file as --train_file")
    path = task_args.file(AUGMENTED)
    if not path.exists():
        raise InputError(f"--aug_train: there is no {path}; bert_emd/augment_data.py writes it")
    return replace(task, train=AUGMENTED)


def with_unlabelled(
    datasets: TaskDatasets,
    distillation: DistillationArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> TaskDatasets:
    """With the texts of each `--unlabeled_file` behind the training rows. Raises InputError for one without the soft
    labels that the others have, where there is no teacher to ask."""
    paths = several("--unlabeled_file", distillation.unlabeled_file) if distillation.unlabeled_file else []
    features, more = datasets.train.features, []
    for path in paths:
        rows = load_unlabelled(task, path, tokenizer, max_seq_length)
        if TEACHER_LOGITS in features and TEACHER_LOGITS not in rows.column_names:
            if not distillation.teachers:
                raise InputError(
                    f"{path}: has no {distillation.soft_labels.option}, and there is no --teacher_model to ask"
                )
            unknown = [math.nan] * task.kind.outputs
            rows = rows.add_column(TEACHER_LOGITS, [unknown] * len(rows))
        more.append(rows.cast(features))
    return replace(datasets, train=concatenate_datasets([datasets.train, *more]))


def unit_of_loss(kind: TaskKind, train: Dataset) -> float:
    """`TaskKind.unit_of_loss` of the training rows' labels, or of their soft labels where no row has another."""
    labels = np.array(train["labels"])
    if TEACHER_LOGITS in train.column_names and not kind.is_labelled(labels).any():
        labels = np.array(train[TEACHER_LOGITS])
    return kind.unit_of_loss(labels)


def check_taught(train: Dataset, kind: TaskKind, objective: Objective) -> None:
    """Say how many training rows have no label. Raises InputError where nothing else teaches them."""
    labels = np.array(train["labels"])
    without = int((~kind.is_labelled(labels)).sum())
    if without and not objective.needs_teacher:
        raise InputError(f"{without} training rows have no label, and nothing else teaches them here; see --alpha")
    if without and is_main_process():
        print(f"{len(train)} training rows, {without} of them without a label: these learn from the teacher alone")


def load_agreement_file(
    distillation: DistillationArguments, task_args: TaskArguments, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Dataset | None:
    """`--agreement_file`, where it is given. Raises InputError where there is no teacher to agree with."""
    if distillation.agreement_file is None:
        return None
    if not distillation.teachers:
        raise InputError("--agreement_file: whom is the student to agree with? Give --teacher_model")
    return load_held_out(task, Path(distillation.agreement_file), tokenizer, task_args.max_seq_length)


def load_projections(
    distillation: DistillationArguments, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> torch.nn.ModuleList:
    """The maps to the teacher's width, those of the `--student_model` where it has some; none without a teacher."""
    if teacher is None:
        return torch.nn.ModuleList()
    width, stored = teacher.config.hidden_size, None
    if distillation.student_model:
        stored = stored_projections(distillation.student_model, width)
    return make_projections(student, width, distillation.projection, stored)


def load_student(distillation: DistillationArguments, teacher: PreTrainedModel | None, task: Task) -> PreTrainedModel:
    """A model of its own, or one of the teacher's architecture, for `start_student` to fill."""
    if distillation.student_model:
        return load_classifier(distillation.student_model, task, "--student_model")
    layers = distillation.layers_of(teacher.config)
    if distillation.start.layers and is_main_process():
        print(f"student from the teacher's layers {', '.join(map(str, layers))}")
    return make_student(teacher, layers, distillation.shape, distillation.start)


def start_student(
    distillation: DistillationArguments,
    student: PreTrainedModel,
    projections: torch.nn.ModuleList,
    teacher: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Fill in what a student of the teacher's architecture takes from it, and has not yet."""
    if distillation.start.embeddings and not distillation.copies_teacher:
        layers = distillation.layers_of(teacher.config)
        start_from_teacher(student, projections, teacher, layers, distillation.start, train, tokenizer)


def make_mapping(options: LayerArguments, student: PreTrainedConfig, teacher: PreTrainedConfig) -> LayerMapping | None:
    """The mapping that the options name. Raises InputError where the two models' layers cannot be compared."""
    row = MAPPINGS[options.layer_mapping]
    mapping = row.make(options, student.num_hidden_layers, teacher.num_hidden_layers)
    heads = attention_heads(student), attention_heads(teacher)
    if mapping is not None and options.use_att and heads[0] != heads[1]:
        raise InputError(
            f"the student has {heads[0]} attention heads and the teacher {heads[1]}: their scores cannot be compared; "
            "use --use_att False or another student"
        )
    return mapping


def make_costs(
    options: LayerArguments, args: RunArguments, windows: tuple[list[float], list[float]] | None, **published
) -> LayerCosts:
    """The costs between layers that the options name; `windows`: of `LayerCosts`, published: more of
    `PublishedCosts`."""
    kernel = "compiled" if args.torch_compile and args.device.type == "cpu" else None
    if options.objective == "published":
        return PublishedCosts(kernel, windows, **published)
    return LayerCosts(kernel, windows)


def make_objective(
    distillation: DistillationArguments, costs: LayerCosts, kind: TaskKind, unit: float, with_layers: bool
) -> Objective:
    """The loss that the options describe, of predictions in units of `unit`; `with_layers`: there is a mapping."""
    parts = {
        "logits": distillation.one_step or distillation.pred_distill,
        "embedding": distillation.use_embedding and with_layers,
        "hidden": distillation.use_rep and with_layers,
        "attention": distillation.use_att and with_layers,
    }
    looks_at = frozenset(part for part, used in parts.items() if used)
    weights = distillation.beta, distillation.theta, distillation.alpha, distillation.T
    return Objective(kind, costs, *weights, looks_at, unit, distillation.objective == "published")


def cache_folder(distillation: DistillationArguments, args: RunArguments) -> Path:
    """Where a cache on disk lies."""
    return Path(distillation.teacher_cache_dir or Path(args.output_dir) / "teacher_cache")


def plan_of_cache(
    distillation: DistillationArguments,
    args: RunArguments,
    teacher: PreTrainedModel,
    asked: frozenset[str],
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
) -> CachePlan | None:
    """Where the teacher's answers, of the parts that are `asked` for, will be kept, None for nowhere. Raises InputError
    where that was asked for and cannot be."""
    plan = plan_cache(
        distillation.teacher_cache if cacheable(distillation, args, tokenizer) else "none",
        distillation.teacher_cache_dtype,
        cache_folder(distillation, args),
        teacher.to(args.device).eval(),
        asked,
        train,
        args.device,
        worthwhile=reads_twice(args, len(train)),
        lasting=bool(distillation.teacher_cache_dir),
        variant=f"{distillation.head} head, bf16 {args.bf16}, fp16 {args.fp16}",
        limit=distillation.teacher_cache_limit * 1e9,
    )
    if plan is None and distillation.teacher_cache_dir and is_main_process():
        print("warning: --teacher_cache_dir: nothing is kept, for want of room or by --teacher_cache's other rules")
    return plan


def reads_twice(args: RunArguments, examples: int) -> bool:
    """Whether the training sees an example more than once."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size > examples
    return args.num_train_epochs > 1


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


def origin(trainer: DistillationTrainer, soft_labels: SoftLabels | None, teachers: list[PreTrainedModel]) -> str:
    """Where the student comes from, in a sentence or two of its card."""
    names = [f"`{for_others(teacher.config.name_or_path)}`" for teacher in teachers]
    objective, mapping = trainer.distillation.objective, trainer.distillation.mapping
    if not objective.needs_teacher:
        student = f"Fine-tuned from `{for_others(trainer.plain_model.config.name_or_path)}`."
        return f"{student} {' and '.join(names)} took no part; it is here for comparison."
    predicts = "logits" in objective.looks_at and objective.alpha > 0
    more = ""
    if predicts and soft_labels:
        more = f"Predictions to learn from came with the training data ({soft_labels.option})."
    elif predicts and len(names) > 1:
        more = f"Its predictions are averaged with those of {' and '.join(names[1:])}."
    if objective.looks_at & {"hidden", "attention"}:
        return " ".join(filter(None, [mapping.described.format(teacher=names[0]), more]))
    parts = {"embeddings": "embedding" in objective.looks_at, "predictions": predicts and not soft_labels}
    learnt = " and ".join(part for part, used in parts.items() if used)
    return " ".join(filter(None, [learnt and f"Distilled from the {learnt} of {names[0]}.", more]))


def write_layers(trainer: DistillationTrainer, folder: Path) -> list[Path]:
    """Flows and layer weights over the run, and pictures of both, where layers were matched; the pictures."""
    trainer.layer_history.write(folder)
    if not trainer.layer_history.has_records:
        return []
    # A heavy import, which a run without layers does without.
    from bert_emd import pictures

    names = trainer.distillation.mapping.pictures
    drawn = [name for name in names if pictures.PICTURES[name](folder, folder / name) is not None]
    return [folder / f"{name}.png" for name in drawn]
