"""What finished runs show: means over seeds, differences to a baseline and how sure they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import groupby, product

import numpy as np

from bert_finetune.errors import InputError
from experiments.figures import SCORE, Arrays, Figure, all_figures_of, figures_of
from experiments.finished_runs import FinishedRun, Unfinished, run_name
from experiments.significance import (
    MARGIN,
    RESAMPLES,
    bootstrap_interval,
    equality_p_values,
    holm,
    mean_and_sd,
    resampled_figures,
    seeds_p_value,
)

TEACHER = "teacher"

_SIGNIFICANT = 0.05


def label(size: str | None, method: str) -> str:
    """What pictures call a method, of a size where there are several."""
    return f"{method}, {size}" if size else method


@dataclass(frozen=True)
class Summary:
    """A method on one figure. All figures and differences in points (100 x the figure).

    values: one per seed. difference: mean over the `common` seeds of (method - baseline); interval: its 95 % bootstrap
    interval over examples, for the models as they were trained; p: of the paired t-test over the common seeds, for
    training anew; holm_p: the same, corrected for all comparisons on this figure. equal_p, unequal_p: that the
    difference is less, and that it is more than `margin`, corrected likewise. None where there is nothing to tell.
    """

    figure: Figure
    size: str | None
    method: str
    values: tuple[float, ...]
    common: tuple[int | None, ...] = ()
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    holm_p: float | None = None
    equal_p: float | None = None
    unequal_p: float | None = None
    margin: float = MARGIN

    @property
    def name(self) -> str:
        return label(self.size, self.method)

    @property
    def mean(self) -> float:
        return mean_and_sd(self.values)[0]

    @property
    def sd(self) -> float | None:
        return mean_and_sd(self.values)[1]

    @property
    def claim(self) -> str:
        """ "better" or "worse" than the baseline, only where the interval excludes zero and the seeds agree.

        They do where holm_p < .05. The interval alone, which knows nothing of chance in training, often excludes zero
        for two equal methods.
        """
        low, high = self.interval or (0, 0)
        if not _is_shown(self.holm_p):
            return ""
        above, below = ("worse", "better") if self.figure.smaller_is_better else ("better", "worse")
        return above if low > 0 else below if high < 0 else ""

    @property
    def equality(self) -> str:
        """Whether the seeds show that the difference to the baseline is less or more than `margin` points.

        "" where there is no difference to judge."""
        if self.difference is None:
            return ""
        if _is_shown(self.equal_p):
            return f"equal within {self.margin:g}"
        return "not equal" if _is_shown(self.unequal_p) else "cannot tell"


def _is_shown(p: float | None) -> bool:
    return p is not None and p < _SIGNIFICANT


class Teachers(Enum):
    """How the teachers of a figure's students go with their seeds; the value says what p is worth for that."""

    ONE = "p comes from students of one teacher: it says nothing of training the teacher anew."
    OWN = "Each seed has a teacher of its own: p is for training teacher and student anew."
    UNKNOWN = "Not every seed is known to have a teacher of its own: p may say nothing of training the teacher anew."


@dataclass
class Comparison:
    """summaries: by figure, then size, then method. beside: of further figures, of which only the means are shown.
    constant: what the best constant answer scores, in points, where a run has kept the labels. teachers: where there
    are p-values. chosen: whether some run may end with the checkpoint that was best on the dev set. notes: what could
    not be told, and why."""

    baseline: str | None
    margin: float = MARGIN
    summaries: list[Summary] = field(default_factory=list)
    beside: list[Summary] = field(default_factory=list)
    constant: dict[Figure, float] = field(default_factory=dict)
    teachers: dict[Figure, Teachers] = field(default_factory=dict)
    chosen: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        return list(dict.fromkeys(summary.figure for summary in self.summaries))

    @property
    def shown(self) -> list[Figure]:
        """All figures that there is a mean of."""
        return list(dict.fromkeys(summary.figure for summary in (*self.summaries, *self.beside)))

    @property
    def scores(self) -> list[Figure]:
        """The figures that GLUE's average is of."""
        return [figure for figure in self.figures if figure.is_score]

    @property
    def methods(self) -> list[tuple[str | None, str]]:
        """(size, method) of every row: teachers first, then by size, the baseline before its rivals."""
        found = dict.fromkeys((summary.size, summary.method) for summary in (*self.summaries, *self.beside))
        return sorted(found, key=lambda key: (key[1] != TEACHER, key[0] or "", key[1] != self.baseline))

    def of(self, figure: Figure, size: str | None, method: str) -> Summary | None:
        wanted = figure, size, method
        found = (*self.summaries, *self.beside)
        return next((s for s in found if (s.figure, s.size, s.method) == wanted), None)

    def average(self, size: str | None, method: str) -> float | None:
        """GLUE's average: the mean over all scores here; None where the method lacks one of them."""
        found = [self.of(figure, size, method) for figure in self.scores]
        return None if None in found or not found else float(np.mean([summary.mean for summary in found]))


def choose_baseline(asked: str | None, plans: list[dict], runs: list[FinishedRun]) -> tuple[str | None, list[str]]:
    """The baseline's name, or None, and what there is to say about it.

    Raises InputError for a method that no run is of, and plans that differ.
    """
    methods = dict.fromkeys(run.method for run in runs)
    planned = list(dict.fromkeys(plan.get("baseline") for plan in plans))
    if asked is None and len(planned) > 1:
        raise InputError(f"the plans name different baselines: {', '.join(map(str, planned))}; give --baseline")
    name = asked or next(iter(planned), None)
    if name in methods:
        return name, []
    if asked:
        raise InputError(f"--baseline {asked}: no finished run is of this method; there are {', '.join(methods)}")
    reason = f"The plan's baseline {name} has no finished run" if name else "No baseline was named (--baseline)"
    return None, [f"{reason}: no differences."]


def state_notes(unfinished: list[Unfinished]) -> list[str]:
    """The runs that are left out, counted and named."""
    if not unfinished:
        return []
    named = "; ".join(f"{run.name} ({run.state})" for run in unfinished)
    return [f"{len(unfinished)} {'runs are' if len(unfinished) > 1 else 'run is'} left out, not finished: {named}."]


def begin_notes(plans: list[dict], begun: list[FinishedRun | Unfinished]) -> list[str]:
    """How many of the plans' students have not begun, and which methods of which tasks they are of."""
    known = {run.name for run in begun}
    missing = []
    for plan in plans:
        parts = (plan.get("tasks", []), plan.get("sizes") or [None], plan.get("methods", []), plan.get("seeds", []))
        missing += [place for place in product(*parts) if run_name(*place) not in known]
    if not missing:
        return []
    named = Counter(run_name(*place[:3], None) for place in missing)
    listed = ", ".join(f"{name} ({count})" for name, count in named.items())
    return [f"{len(missing)} of the planned students have not begun, by method (seeds): {listed}."]


def compare(
    runs: list[FinishedRun],
    baseline: str | None,
    resamples: int = RESAMPLES,
    margin: float = MARGIN,
    names: Sequence[str] = (SCORE,),
) -> Comparison:
    """Compare all methods of each task with the `baseline` of the same size (None: with none), on the figures of these
    `names` (see `figures_of`); equal are those that differ by less than `margin` points.

    Raises InputError where two runs of a task were measured on different sets, and for a name that no run has.
    """
    comparison, beside = Comparison(baseline, margin), Comparison(None)
    compared = set()
    for task, group in groupby(runs, key=lambda run: run.task):
        group = list(group)
        asked = {figure: name for name in names for figure in figures_of(task, name)}
        for figure in dict.fromkeys((*asked, *all_figures_of(task))):
            having = [run for run in group if run.figure(figure) is not None]
            if figure in asked:
                compared |= {asked[figure]} if having else set()
                _compare_figure(comparison, figure, having, resamples)
            elif having:
                _compare_figure(beside, figure, having, resamples)
    for name in names:
        if name not in compared:
            raise InputError(f"--figure {name}: no run has it")
    comparison.beside = beside.summaries
    comparison.chosen = any(run.args.get("options", {}).get("load_best_model_at_end", True) for run in runs)
    order = {key: place for place, key in enumerate(comparison.methods)}
    figures = comparison.figures
    comparison.summaries.sort(key=lambda s: (figures.index(s.figure), order[s.size, s.method]))
    return comparison


def _compare_figure(comparison: Comparison, figure: Figure, runs: list[FinishedRun], resamples: int) -> None:
    answers = _answers(figure, runs)
    resampled = {}
    if answers:
        first = next(iter(answers.values()))
        constant = figure.constant(first)
        if constant is not None:
            comparison.constant[figure] = 100 * constant
    if comparison.baseline and answers:
        measures = [figure.measure(kept) for kept in answers.values()]
        found = resampled_figures(measures, len(first["logits"]), resamples)
        resampled = dict(zip(answers, found, strict=True))
    methods: dict[tuple, dict[int | None, FinishedRun]] = {}
    for run in runs:
        methods.setdefault((run.size, run.method), {})[run.seed] = run
    summaries = []
    for (size, method), seeds in methods.items():
        base = {} if method in (TEACHER, comparison.baseline) else methods.get((size, comparison.baseline), {})
        common = [seed for seed in seeds if seed in base]
        paired = [seeds[seed] for seed in common], [base[seed] for seed in common]
        told = {}
        if common:
            ours, theirs = ([100 * run.figure(figure) for run in side] for side in paired)
            told = {"difference": float(np.subtract(ours, theirs).mean()), "p": seeds_p_value(ours, theirs)}
            less_more = equality_p_values(ours, theirs, comparison.margin) or (None, None)
            told |= dict(zip(("equal_p", "unequal_p"), less_more, strict=True))
            lacking = [run.name for side in paired for run in side if run.name not in resampled]
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                comparison.notes.append(
                    f"{figure.title}, {method}: no interval, since there is no {figure.predictions_file} of "
                    f"{lacking[0]}{more}."
                )
            else:
                ours, theirs = (100 * np.stack([resampled[run.name] for run in side]) for side in paired)
                told["interval"] = bootstrap_interval(ours, theirs)
        elif base:
            comparison.notes.append(f"{figure.title}, {method}: no seed in common with {comparison.baseline}.")
        values = tuple(100 * run.figure(figure) for run in seeds.values())
        summaries.append(Summary(figure, size, method, values, tuple(common), margin=comparison.margin, **told))
    comparison.summaries += corrected(summaries)
    if any(summary.p is not None for summary in summaries):
        comparison.teachers[figure] = teachers_of(runs)
    if not any(run.method == TEACHER for run in runs):
        comparison.summaries += _teacher_of(figure, runs)


def corrected(summaries: list[Summary]) -> list[Summary]:
    """The summaries of one figure, whose p-values are each corrected for all of their kind among them."""
    kinds = [holm([getattr(s, kind) for s in summaries]) for kind in ("p", "equal_p", "unequal_p")]
    return [
        replace(summary, holm_p=p, equal_p=equal, unequal_p=unequal)
        for summary, p, equal, unequal in zip(summaries, *kinds, strict=True)
    ]


def teachers_of(runs: list[FinishedRun]) -> Teachers:
    """What one figure's runs, teachers' own aside, say of their teachers."""
    pairs = {(run.seed, run.teacher) for run in runs if run.method != TEACHER}
    seeds, teachers = ({pair[k] for pair in pairs} for k in (0, 1))
    if None not in teachers and len(teachers) == 1:
        return Teachers.ONE
    paired = None not in teachers and len(seeds) == len(teachers) == len(pairs)
    return Teachers.OWN if paired else Teachers.UNKNOWN


def _answers(figure: Figure, runs: list[FinishedRun]) -> dict[str, Arrays]:
    """What those runs kept of the figure's set that did."""
    answers, first = {}, None
    for run in runs:
        found = run.predictions(figure)
        if found is None:
            continue
        # Where the set has no labels, its length is all that there is to tell.
        labels = found.get("labels", np.zeros(len(found["logits"])))
        first = first or (run, labels)
        if not np.array_equal(first[1], labels):
            raise InputError(
                f"{run.folder / figure.predictions_file}: its labels are not those of {first[0].folder}; two sets of "
                f"{figure.title} cannot be compared"
            )
        answers[run.name] = found
    return answers


def _teacher_of(figure: Figure, runs: list[FinishedRun]) -> list[Summary]:
    """The teacher's row from what its students say of it: every different teacher once."""
    said = {}
    for run in runs:
        value = run.figure(figure, "teacher_")
        if value is not None:
            said.setdefault(run.teacher or value, value)
    return [Summary(figure, None, TEACHER, tuple(100 * value for value in said.values()))] if said else []
