"""The distillation of a teacher into a student, in its order of events."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from bert_emd.arguments import DistillationArguments
from bert_emd.attention_scores import expose_attention
from bert_emd.diagnosis import format_shares
from bert_emd.distillation import Distillation
from bert_emd.layer_mapping import LayerMapping
from bert_emd.mappings import MAPPINGS
from bert_emd.narrow_student import make_student, start_from_teacher
from bert_emd.objectives import LayerCosts, Objective, PublishedCosts
from bert_emd.student import (
    make_projections,
    parse_student_layers,
    stored_projections,
    use_relu_head,
)
from bert_emd.teacher_answers import CachePlan, plan_cache
from bert_emd.trainer import DistillationTrainer
from bert_finetune.arguments import TaskArguments
from bert_finetune.checkpoints import check_length, load_classifier, load_config, load_tokenizer
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
from bert_finetune.task_kinds import AGREEMENT, TaskKind
from bert_finetune.training import Measurement, TaskTrainer, check_batch
from bert_finetune.training_log import all_figures


def distil(distillation: DistillationArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Train a student, save the best one and its results; predict the test set where asked for."""
    check_output_dir(args, distillation.teacher_model, distillation.student_model)
    open_repository(args, distillation.student_model)
    teachers_config = load_config(distillation.teacher_model, "--teacher_model")
    task = task_args.load_task(teachers_config, fine_tuned=True, splits=args.splits, unlabelled=distillation.alpha == 1)
    task.check_metric(args.metric_for_best_model, *AGREEMENT)
    if not distillation.one_step and not distillation.pred_distill:
        args.load_best_model_at_end = False  # no dev figure tells how well the layers have learnt

    teacher = load_classifier(
        distillation.teacher_model, task, "--teacher_model", fine_tuned=True, output_names=task_args.output_names
    )
    tokenizer = load_shared_tokenizer(
        distillation.teacher_model, distillation.student_model, "--student_model", task_args.do_lower_case
    )
    set_seed(args.seed)  # new weights, of a head or the projections, are drawn from here on
    student, stored = load_student(distillation, teacher, task), None
    if distillation.student_model:
        stored = stored_projections(distillation.student_model, teacher.config.hidden_size)
    for model in (teacher, student):
        check_length(model.config, task_args.max_seq_length)
    mapping = make_mapping(distillation, student.config, teacher.config)
    kernel = "compiled" if args.torch_compile and args.device.type == "cpu" else None
    # A dev set without labels is for a run whose best checkpoint is the one that is most like the teacher.
    unlabelled = ["train", "dev"] if args.metric_for_best_model in AGREEMENT else ["train"]
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits, unlabelled)
    datasets = with_unlabelled(datasets, distillation, task, tokenizer, task_args.max_seq_length)
    held_out = load_agreement_file(distillation, task_args, task, tokenizer)
    check_batch(args, datasets.train)
    costs, unit = LayerCosts(kernel), task.kind.unit_of_loss(np.array(datasets.train["labels"]))
    if distillation.objective == "published":
        lengths = {"max_seq_length": task_args.max_seq_length, "count_padding": distillation.count_padding}
        costs, unit = PublishedCosts(kernel, **lengths), 1.0
    objective = make_objective(distillation, costs, task.kind, unit, with_layers=mapping is not None)
    check_taught(datasets.train, task.kind, objective)
    if "attention" in objective.looks_at:
        expose_attention(teacher, "--teacher_model", task_args.max_seq_length)
        expose_attention(student, "--student_model", task_args.max_seq_length)
    projections = make_projections(student, teacher.config.hidden_size, distillation.projection, stored)
    relus = [*use_relu_head(teacher), *use_relu_head(student)] if distillation.head == "relu" else []

    plan = plan_of_cache(distillation, args, teacher, objective, tokenizer, datasets.train)
    read = {
        "the teacher": weights_digest(teacher),
        "the student as it starts": weights_digest(torch.nn.ModuleList([student, projections])),
        "the data": data_digest([datasets.train, *datasets.dev.values()]),
        "the teacher's answers": "asked for at each step" if plan is None else f"kept in {plan.dtype}",
    }
    experiment = describe_experiment(args, (distillation, task_args), read)
    with output_folder(args, experiment) as checkpoint:
        teachers = evaluate_teacher(teacher, args, task, tokenizer, datasets.dev, held_out)
        train, cache = datasets.train, None
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
            {name: answers.logits for name, answers in teachers.answers.items()},
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
        ending = Ending(
            origin(trainer, teacher),
            compared=[(name, teacher, teachers.figures)],
            figures=trainer.shares | {f"teacher_{key}": value for key, value in teachers.figures.items()},
            writers=[lambda folder: write_layers(trainer, folder)],
            hooks=relus,
        )
        finish(trainer, datasets.test, ending)
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
    unlabelled = ["dev"] if distillation.teacher_model else []
    task = task_args.load_task(load_config(name, option), True, args.splits, unlabelled=bool(unlabelled))
    model = load_classifier(name, task, option, fine_tuned=True, output_names=task_args.output_names)
    models, teacher = [model], None
    if distillation.teacher_model:
        tokenizer = load_shared_tokenizer(distillation.teacher_model, name, option, task_args.do_lower_case)
        teacher = load_classifier(
            distillation.teacher_model, task, "--teacher_model", fine_tuned=True, output_names=task_args.output_names
        )
        models.append(teacher)
    else:
        tokenizer = load_tokenizer(name, option, task_args.do_lower_case)
    for each in models:
        check_length(each.config, task_args.max_seq_length)
        if distillation.head == "relu":
            use_relu_head(each)
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits, unlabelled)
    held_out = load_agreement_file(distillation, task_args, task, tokenizer)
    teacher_logits = {}
    if teacher is not None:
        measured = evaluate_teacher(teacher, args, task, tokenizer, datasets.dev, held_out)
        teacher_logits = {name: answers.logits for name, answers in measured.answers.items()}
    trainer = TaskTrainer(
        model, args, task, tokenizer, dev=datasets.dev, held_out=held_out, teacher_logits=teacher_logits
    )
    figures = trainer.measure().figures
    if figures and is_main_process():
        print(all_figures(figures))
    write_predictions(trainer, datasets.test)
    push(args)


def with_unlabelled(
    datasets: TaskDatasets,
    distillation: DistillationArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> TaskDatasets:
    """With the texts of each `--unlabeled_file` behind the training rows."""
    paths = several("--unlabeled_file", distillation.unlabeled_file) if distillation.unlabeled_file else []
    features = datasets.train.features
    more = [load_unlabelled(task, path, tokenizer, max_seq_length).cast(features) for path in paths]
    return replace(datasets, train=concatenate_datasets([datasets.train, *more]))


def check_taught(train: Dataset, kind: TaskKind, objective: Objective) -> None:
    """Say how many training rows have no label. Raises InputError where nothing else teaches them."""
    labels = np.array(train["labels"])
    without = int((np.isnan(labels) | (labels == kind.no_label)).sum())
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
    if distillation.teacher_model is None:
        raise InputError("--agreement_file: whom is the student to agree with? Give --teacher_model")
    return load_held_out(task, Path(distillation.agreement_file), tokenizer, task_args.max_seq_length)


def load_shared_tokenizer(
    teacher: str, student: str | None, option: str, do_lower_case: bool | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that both models understand; `option`: where the student's name comes from, None for one that is
    made from the teacher. Raises InputError where their vocabularies differ."""
    teachers = load_tokenizer(teacher, "--teacher_model", do_lower_case)
    if not student:
        return teachers
    students = load_tokenizer(student, option, do_lower_case)
    theirs, ours = teachers.get_vocab(), students.get_vocab()
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise InputError(
            f"{option} {student}: its vocabulary ({len(ours)} tokens) is not that of --teacher_model {teacher} "
            f"({len(theirs)} tokens), see {token!r}; both must read the same input"
        )
    # A model without segment ids ignores them, but one that has them must be given them.
    return students if "token_type_ids" in students.model_input_names else teachers


def load_student(distillation: DistillationArguments, teacher: PreTrainedModel, task: Task) -> PreTrainedModel:
    """A model of its own, or one of the teacher's architecture, for `start_student` to fill."""
    if distillation.student_model:
        return load_classifier(distillation.student_model, task, "--student_model")
    layers = teacher_layers(distillation, teacher)
    if distillation.start.layers and is_main_process():
        print(f"student from the teacher's layers {', '.join(map(str, layers))}")
    return make_student(teacher, layers, distillation.shape, distillation.start)


def teacher_layers(distillation: DistillationArguments, teacher: PreTrainedModel) -> list[int]:
    """The teacher's layer for each of the student's."""
    return parse_student_layers(
        distillation.student_layers, teacher.config.num_hidden_layers, distillation.start.layers
    )


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
        layers = teacher_layers(distillation, teacher)
        start_from_teacher(student, projections, teacher, layers, distillation.start, train, tokenizer)


def make_mapping(
    distillation: DistillationArguments, student: PreTrainedConfig, teacher: PreTrainedConfig
) -> LayerMapping | None:
    """The mapping that the options name. Raises InputError where the two models' layers cannot be compared."""
    if distillation.pred_distill:
        return None
    row = MAPPINGS[distillation.layer_mapping]
    mapping = row.make(distillation, student.num_hidden_layers, teacher.num_hidden_layers)
    heads = student.num_attention_heads, teacher.num_attention_heads
    if mapping is not None and distillation.use_att and heads[0] != heads[1]:
        raise InputError(
            f"the student has {heads[0]} attention heads and the teacher {heads[1]}: their scores cannot be compared; "
            "use --use_att False or another --student_model"
        )
    return mapping


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
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
) -> CachePlan | None:
    """Where the teacher's answers will be kept, None for nowhere. Raises InputError where that was asked for and cannot
    be."""
    if not objective.needs_teacher:
        return None
    plan = plan_cache(
        distillation.teacher_cache if cacheable(distillation, args, tokenizer) else "none",
        distillation.teacher_cache_dtype,
        cache_folder(distillation, args),
        teacher.to(args.device).eval(),
        objective.looks_at,
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


def evaluate_teacher(
    teacher: PreTrainedModel,
    args: RunArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    dev: dict[str, Dataset],
    held_out: Dataset | None,
) -> Measurement:
    """Measure the teacher and show its figures, with a warning when a constant answer would do as well on the dev set,
    where there is one."""
    if is_main_process():
        print(f"teacher: {teacher.config.num_hidden_layers} layers x {teacher.config.hidden_size}")
    trainer = TaskTrainer(teacher, args, task, tokenizer, dev=dev, held_out=held_out)
    measured = trainer.measure()
    if measured.figures and is_main_process():
        print(all_figures(measured.figures))
    # Without the wrapper that evaluation in bf16 leaves, which would copy all of its answers to float32.
    trainer.accelerator.unwrap_model(teacher, keep_fp32_wrapper=False)
    first = next(iter(dev.values()), None)
    if first is None or "labels" not in first.column_names:
        return measured
    labels = np.array(first["labels"])
    score = measured.figures[task.best_metric]
    chance = task.kind.constant_figure(task.metric, labels, task.kind.outputs)
    if score <= chance and is_main_process():
        print(
            f"warning: the teacher's {task.metric} of {score:.4f} is no better than a constant answer's {chance:.4f}; "
            "is it a model for this task, with its classes in this order?",
            file=sys.stderr,
        )
    return measured


def origin(trainer: DistillationTrainer, teacher: PreTrainedModel) -> str:
    """Where the student comes from, in a sentence of its card."""
    distillation, name = trainer.distillation, f"`{for_others(teacher.config.name_or_path)}`"
    objective = distillation.objective
    if not objective.needs_teacher:
        student = f"Fine-tuned from `{for_others(trainer.classifier.config.name_or_path)}`."
        return f"{student} {name} took no part; it is here for comparison."
    if objective.looks_at & {"hidden", "attention"}:
        return distillation.mapping.described.format(teacher=name)
    parts = {"embeddings": "embedding" in objective.looks_at}
    parts["predictions"] = "logits" in objective.looks_at and objective.alpha > 0
    return f"Distilled from the {' and '.join(part for part, used in parts.items() if used)} of {name}."


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
