"""What finished runs show: means over seeds, differences to a baseline and how sure they are, what each model costs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from bert_finetune.errors import InputError, reading
from bert_finetune.footprint import measure_models
from experiments.finished_runs import Figure, Run, figures_of, model_tensors
from experiments.significance import (
    RESAMPLES,
    bootstrap_interval,
    mean_and_sd,
    resampled_figures,
    seeds_p_value,
)

TEACHER = "teacher"

_SIGNIFICANT = 0.05

# Speed is timed on sequences of this many tokens, so many at once.
_BATCH, _TOKENS = 8, 64


@dataclass(frozen=True)
class Summary:
    """A method on one figure. All figures and differences in points (100 x the figure).

    values: one per seed. difference: mean over the `common` seeds of (method - baseline); interval: its 95 % bootstrap
    interval over dev examples, for the models as they were trained; p: of the paired t-test over the common seeds, for
    training anew. None where there is nothing to tell.
    """

    figure: Figure
    size: str | None
    method: str
    values: tuple[float, ...]
    common: tuple[int | None, ...] = ()
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def mean(self) -> float:
        return mean_and_sd(self.values)[0]

    @property
    def sd(self) -> float | None:
        return mean_and_sd(self.values)[1]

    @property
    def claim(self) -> str:
        """ "better" or "worse" than the baseline, only where the interval excludes zero and the seeds agree: p < .05.

        The interval alone, which knows nothing of chance in training, often excludes zero for two equal methods.
        """
        low, high = self.interval or (0, 0)
        if self.p is None or self.p >= _SIGNIFICANT:
            return ""
        return "better" if low > 0 else "worse" if high < 0 else ""


@dataclass
class Comparison:
    """summaries: by figure, then size, then method. constant: what the best constant answer scores, in points, where a
    run has kept the dev labels. notes: what could not be told, and why."""

    baseline: str | None
    summaries: list[Summary] = field(default_factory=list)
    constant: dict[Figure, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        return list(dict.fromkeys(summary.figure for summary in self.summaries))

    @property
    def methods(self) -> list[tuple[str | None, str]]:
        """(size, method) of every row: teachers first, then by size, the baseline before its rivals."""
        found = dict.fromkeys((summary.size, summary.method) for summary in self.summaries)
        return sorted(found, key=lambda key: (key[1] != TEACHER, key[0] or "", key[1] != self.baseline))

    def of(self, figure: Figure, size: str | None, method: str) -> Summary | None:
        wanted = figure, size, method
        return next((s for s in self.summaries if (s.figure, s.size, s.method) == wanted), None)

    def average(self, size: str | None, method: str) -> float | None:
        """GLUE's average: the mean over all figures here; None where the method lacks one of them."""
        found = [self.of(figure, size, method) for figure in self.figures]
        return None if None in found else float(np.mean([summary.mean for summary in found]))


def compare(runs: list[Run], baseline: str | None, resamples: int = RESAMPLES) -> Comparison:
    """Compare all methods of each task with the `baseline` of the same size (None: with none).

    Raises InputError where two runs of a task were measured on different dev sets.
    """
    comparison = Comparison(baseline)
    for task, group in groupby(runs, key=lambda run: run.task):
        group = list(group)
        for figure in figures_of(task):
            _compare_figure(comparison, figure, [run for run in group if run.figure(figure) is not None], resamples)
    order = {key: place for place, key in enumerate(comparison.methods)}
    figures = comparison.figures
    comparison.summaries.sort(key=lambda s: (figures.index(s.figure), order[s.size, s.method]))
    return comparison


def _compare_figure(comparison: Comparison, figure: Figure, runs: list[Run], resamples: int) -> None:
    answers = _answers(figure, runs)
    resampled = {}
    if answers:
        first, labels = next(iter(answers.values()))
        kind, metric = figure.task.kind, figure.task.metric
        comparison.constant[figure] = 100 * kind.constant_figure(metric, labels, first.shape[-1])
    if comparison.baseline and answers:
        logits = [logits for logits, _ in answers.values()]
        resampled = dict(zip(answers, resampled_figures(figure.task, logits, labels, resamples), strict=True))
    methods: dict[tuple, dict[int | None, Run]] = {}
    for run in runs:
        methods.setdefault((run.size, run.method), {})[run.seed] = run
    for (size, method), seeds in methods.items():
        base = {} if method in (TEACHER, comparison.baseline) else methods.get((size, comparison.baseline), {})
        common = [seed for seed in seeds if seed in base]
        paired = [seeds[seed] for seed in common], [base[seed] for seed in common]
        told = {}
        if common:
            ours, theirs = ([100 * run.figure(figure) for run in side] for side in paired)
            told = {"difference": float(np.subtract(ours, theirs).mean()), "p": seeds_p_value(ours, theirs)}
            lacking = [run.name for side in paired for run in side if run.name not in resampled]
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                comparison.notes.append(
                    f"{figure.title}, {method}: no interval, since there is no dev_predictions.npz of "
                    f"{lacking[0]}{more}."
                )
            else:
                ours, theirs = (100 * np.stack([resampled[run.name] for run in side]) for side in paired)
                told["interval"] = bootstrap_interval(ours, theirs)
        elif base:
            comparison.notes.append(f"{figure.title}, {method}: no seed in common with {comparison.baseline}.")
        values = tuple(100 * run.figure(figure) for run in seeds.values())
        comparison.summaries.append(Summary(figure, size, method, values, tuple(common), **told))
    if not any(run.method == TEACHER for run in runs):
        comparison.summaries += _teacher_of(figure, runs)


def _answers(figure: Figure, runs: list[Run]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits and labels by run, for those that kept them."""
    answers, first = {}, None
    for run in runs:
        found = run.predictions(figure)
        if found is None:
            continue
        first = first or (run, found[1])
        if not np.array_equal(first[1], found[1]):
            raise InputError(
                f"{run.folder / 'dev_predictions.npz'}: its labels are not those of {first[0].folder}; two dev sets of "
                f"{figure.title} cannot be compared"
            )
        answers[run.name] = found
    return answers


def _teacher_of(figure: Figure, runs: list[Run]) -> list[Summary]:
    """The teacher's row from what its students say of it: every different teacher once."""
    said = {}
    for run in runs:
        value = run.figure(figure, "teacher_")
        if value is not None:
            said.setdefault(run.args.get("options", {}).get("teacher_model", value), value)
    return [Summary(figure, None, TEACHER, tuple(100 * value for value in said.values()))] if said else []


@dataclass(frozen=True)
class Cost:
    """parameters; megabytes (10⁶ bytes) of the weights' file; milliseconds for a sentence and speed_up over the
    teacher, None where not measured."""

    parameters: int
    megabytes: float
    milliseconds: float | None = None
    speed_up: float | None = None


def costs(runs: list[Run], timed: bool) -> tuple[dict[tuple[str | None, str], Cost], str]:
    """What each (size, method) costs, by the first of its runs whose model is there, and how speed was measured.

    timed: time one model of each architecture and the teacher, in turns, in float32; without a teacher's model there is
    no speed-up. Models of one architecture get one time: what differs between them is chance.
    """
    folders: dict[tuple[str | None, str], Path] = {}
    for run in runs:
        if (run.size, run.method) not in folders and model_tensors(run.folder):
            folders[run.size, run.method] = run.folder
    teacher = next((key for key in folders if key[1] == TEACHER), (None, TEACHER))
    if teacher not in folders:
        candidates = filter(None, (run.teacher_folder for run in runs))
        folders.update((teacher, folder) for folder in candidates if model_tensors(folder))
    tensors = {key: model_tensors(folder) for key, folder in folders.items()}
    speed, conditions = {}, ""
    if timed and teacher in folders and len(folders) > 1:
        architectures = {_architecture(tensors[key]): folder for key, folder in reversed(folders.items())}
        milliseconds, conditions = _time(architectures.values())
        times = dict(zip(architectures, milliseconds, strict=True))
        speed = {key: times[_architecture(tensors[key])] for key in folders}
    reference = speed.get(teacher)
    return {
        key: Cost(
            sum(int(np.prod(shape)) for shape, _ in parts.values()),
            sum(size for _, size in parts.values()) / 1e6,
            speed.get(key),
            reference / speed[key] if reference else None,
        )
        for key, parts in tensors.items()
    }, conditions


def _architecture(tensors: dict[str, tuple[tuple[int, ...], int]]) -> frozenset:
    return frozenset((name, shape) for name, (shape, _) in tensors.items())


def _time(folders: Iterable[Path]) -> tuple[list[float], str]:
    """Milliseconds a sentence of each model, in turns on one batch of made-up tokens, and these conditions in words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for folder in folders:
        with reading(str(folder)):
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        models.append(model.eval().to(device))
    tokens = min([_TOKENS, *(getattr(model.config, "max_position_embeddings", _TOKENS) - 2 for model in models)])
    known = min(model.config.vocab_size for model in models)
    ids = torch.randint(known, (_BATCH, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    footprints = measure_models(models, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU (threads: {torch.get_num_threads()})"
    conditions = (
        f"Speed-up: on a batch of {_BATCH} x {tokens} made-up tokens, {where}, float32, one model an architecture."
    )
    return [footprint.milliseconds for footprint in footprints], conditions
