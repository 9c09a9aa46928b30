"""The teachers of a student: mostly one; of several the probabilities are averaged; none where training files have soft
labels."""

import sys

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bert_emd.arguments import DistillationArguments
from bert_finetune.arguments import TaskArguments
from bert_finetune.checkpoints import load_classifier, load_tokenizer
from bert_finetune.digests import weights_digest
from bert_finetune.errors import InputError
from bert_finetune.glue import Task
from bert_finetune.processes import is_main_process
from bert_finetune.run_arguments import RunArguments
from bert_finetune.soft_labels import TEACHER_LOGITS
from bert_finetune.training import Answers, Measurement, TaskTrainer
from bert_finetune.training_log import all_figures


def load_teachers(distillation: DistillationArguments, task_args: TaskArguments, task: Task) -> list[PreTrainedModel]:
    """The teachers, each with the task's classes in the task's order."""
    return [
        load_classifier(name, task, "--teacher_model", fine_tuned=True, output_names=task_args.output_names)
        for name in distillation.teachers
    ]


def load_shared_tokenizer(
    teachers: list[str], student: str | None, option: str, do_lower_case: bool | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that all models understand; `option`: where the student's name comes from, None for one that is
    made from the (first) teacher. Raises InputError where their vocabularies differ."""
    if not teachers:
        return load_tokenizer(student, option, do_lower_case)
    first = load_tokenizer(teachers[0], "--teacher_model", do_lower_case)
    for name in teachers[1:]:
        _check_vocabulary(
            load_tokenizer(name, "--teacher_model", do_lower_case), "--teacher_model", name, first, teachers[0]
        )
    if not student:
        return first
    students = load_tokenizer(student, option, do_lower_case)
    _check_vocabulary(students, option, student, first, teachers[0])
    # A model without segment ids ignores them, but one that has them must be given them.
    return students if "token_type_ids" in students.model_input_names else first


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, option: str, name: str, teachers: PreTrainedTokenizerBase, teacher: str
) -> None:
    ours, theirs = tokenizer.get_vocab(), teachers.get_vocab()
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise InputError(
            f"{option} {name}: its vocabulary ({len(ours)} tokens) is not that of --teacher_model {teacher} "
            f"({len(theirs)} tokens), see {token!r}; both must read the same input"
        )


def teachers_digests(teachers: list[PreTrainedModel]) -> dict[str, str]:
    """Of their weights, named in words."""
    names = ["the teacher", *(f"teacher {k}" for k in range(2, len(teachers) + 1))]
    return {name: weights_digest(teacher) for name, teacher in zip(names, teachers, strict=False)}


def with_teacher_logits(
    train: Dataset,
    teachers: list[PreTrainedModel],
    args: RunArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """The training rows with the teachers' logits beside each, in TEACHER_LOGITS, where they are known before the
    training: of several teachers the mean of their probabilities, on rows that have no soft label of their own."""
    given = np.array(train[TEACHER_LOGITS]) if TEACHER_LOGITS in train.column_names else None
    if given is None and len(teachers) < 2:
        return train
    missing = range(len(train)) if given is None else np.flatnonzero(np.isnan(given).any(axis=1))
    if len(missing) == 0:
        return train
    if is_main_process():
        print(f"asking {len(teachers)} teachers about {len(missing)} training rows")
    inputs = [name for name in train.column_names if name not in ("labels", TEACHER_LOGITS)]
    rows = train.select(missing).select_columns(inputs)
    split = next(iter(task.dev))  # a Trainer wants a dev set, whatever it is asked for
    trainers = [TaskTrainer(teacher, args, task, tokenizer, dev={split: rows}) for teacher in teachers]
    answers = [trainer.predict(rows).predictions for trainer in trainers]
    for trainer in trainers:
        _without_wrapper(trainer)
    logits = np.empty((len(train), task.kind.outputs), np.float32) if given is None else given
    logits[missing] = task.kind.averaged(answers) if len(answers) > 1 else answers[0]
    others = train if given is None else train.remove_columns([TEACHER_LOGITS])
    return others.add_column(TEACHER_LOGITS, logits.tolist())


def measure_teachers(
    teachers: list[PreTrainedModel],
    args: RunArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    dev: dict[str, Dataset],
    held_out: Dataset | None,
) -> tuple[Measurement, list[Measurement]]:
    """Measure what a student learns from, and each teacher by itself; figures are shown, with a warning where a
    constant answer would do as well on the dev set, if there is one."""
    each = []
    for teacher in teachers:
        if is_main_process():
            print(f"teacher: {teacher.config.num_hidden_layers} layers x {teacher.config.hidden_size}")
        trainer = TaskTrainer(teacher, args, task, tokenizer, dev=dev, held_out=held_out)
        each.append(trainer.measure())
        if each[-1].figures and is_main_process():
            print(all_figures(each[-1].figures))
        _without_wrapper(trainer)
    if not each:
        return Measurement({}, {}), each
    whole = each[0] if len(each) == 1 else _together(each, task)
    if len(each) > 1 and whole.figures and is_main_process():
        print(f"{len(each)} teachers together: {all_figures(whole.figures)}")
    _warn_of_chance(whole, task, next(iter(dev.values()), None))
    return whole, each


def _without_wrapper(trainer: TaskTrainer) -> None:
    """Take away what evaluation in bf16 leaves around a teacher, which would copy all of its answers to float32."""
    trainer.accelerator.unwrap_model(trainer.plain_model, keep_fp32_wrapper=False)


def _together(each: list[Measurement], task: Task) -> Measurement:
    figures, answers = {}, {}
    for prefix, first in each[0].answers.items():
        logits = task.kind.averaged([one.answers[prefix].logits for one in each])
        answers[prefix] = Answers(logits, first.labels, None)
        if first.labels is not None:
            figures |= {f"{prefix}_{name}": value for name, value in task.measure(logits, first.labels).items()}
    return Measurement(figures, answers)


def _warn_of_chance(measured: Measurement, task: Task, dev: Dataset | None) -> None:
    if dev is None or "labels" not in dev.column_names:
        return
    score = measured.figures[task.best_metric]
    chance = task.kind.constant_figure(task.metric, np.array(dev["labels"]), task.kind.outputs)
    if score <= chance and is_main_process():
        print(
            f"warning: the teacher's {task.metric} of {score:.4f} is no better than a constant answer's {chance:.4f}; "
            "is it a model for this task, with its classes in this order?",
            file=sys.stderr,
        )
