"""What a run says of itself while it trains: mean losses, a line for each evaluation, and their history."""

import torch
from transformers.trainer_callback import ProgressCallback, TrainerState

from bert_finetune.processes import mean_over_processes


class Means:
    """Running means of named losses, over steps and processes, kept on their device until they are asked for."""

    def __init__(self):
        self._sums, self._count = {}, 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing was added. All processes must ask."""
        means = {name: float(mean_over_processes(total)) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class QuietProgress(ProgressCallback):
    """The progress bars without a dictionary printed at every log: `RunTrainer` prints its own line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def evaluation_line(state: TrainerState, logged: dict[str, float], in_training: bool) -> str:
    """An evaluation in one line: where the training stands, its mean losses since the last one, dev figures."""
    parts = []
    if in_training:
        parts.append(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}")
        losses = [f"{key.removesuffix('_loss')} {value:.4f}" for key, value in logged.items() if _is_train_loss(key)]
        parts.append("losses: " + " ".join(losses))
    parts.append("dev: " + format_figures(logged))
    return "  ".join(parts)


def history(state: TrainerState) -> list[dict]:
    """One entry for each evaluation so far: step, epoch, mean training losses, dev figures."""
    entries = {}
    for entry in state.log_history:
        if any(key.startswith("eval_") for key in entry):
            entries.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if is_figure(k)})
    return list(entries.values())


def format_figures(metrics: dict[str, float], prefix: str = "eval_") -> str:
    """The dev figures of an evaluation as `accuracy 0.8440 loss 0.3912`, or those of another `prefix`."""
    figures = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix) and is_figure(k)}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))


def all_figures(metrics: dict[str, float]) -> str:
    """The dev figures, and those of a held-out set where there is one: `dev: accuracy 0.8440  test: ...`."""
    told = {"dev": format_figures(metrics), "test": format_figures(metrics, "test_")}
    return "  ".join(f"{name}: {figures}" for name, figures in told.items() if figures)


def is_figure(key: str) -> bool:
    """Whether an evaluation's entry says something about the model, not about the time it took."""
    return not key.endswith(("_per_second", "_runtime", "_preparation_time"))


def _is_train_loss(key: str) -> bool:
    return key.endswith("_loss") and not key.startswith("eval_")
