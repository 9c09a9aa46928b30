"""How much each term has to say in a training: its share of the loss, and of the gradient.

A loss of a term can be large and its gradient small, or the other way round; it is the gradient that trains. With L_t
the terms as they stand in the sum, weighted, and θ the student's parameters:

    loss_share_t = L_t / Σ_u L_u        grad_share_t = ‖∂L_t/∂θ‖ / Σ_u ‖∂L_u/∂θ‖
"""

import math

import torch

from bert_finetune.processes import mean_over_processes

# A run is looked at once in so many steps, and no more often than that.
_EVERY, _MOST = 50, 5
_LAYERS = ("attention", "hidden", "embedding")
_ORDER = [f"{of}_share_{term}" for of in ("loss", "grad") for term in (*_LAYERS, "soft", "hard")]
# Of the gradient; outside, the layer losses or the predictions do nothing.
_LEAST_OF_LAYERS, _MOST_OF_LAYERS = 0.02, 0.98


def measured_steps(steps: int) -> set[int]:
    """At which of a training's steps, counted from 1, shares are measured: the middles of equal parts of it."""
    count = min(_MOST, math.ceil(steps / _EVERY))
    return {math.ceil((k + 0.5) * steps / count) for k in range(count)}


def measure_shares(
    terms: dict[str, torch.Tensor], parameters: list[torch.Tensor], scale: float = 1.0
) -> dict[str, float]:
    """`loss_share_...` and `grad_share_...` of each of the weighted `terms`, by name; the means over all processes,
    each of which has its part of the batch. Empty where they are not finite, or all nothing.

    The graph stays, and so do the parameters' gradients. scale: of the losses while their gradient is taken, for a
    precision in which small ones would be lost.
    """
    norms = []
    for term in terms.values():
        found = torch.autograd.grad(scale * term, parameters, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([gradient.float().norm() for gradient in found if gradient is not None]).norm())
    losses = torch.stack([term.detach().float() for term in terms.values()])
    sizes = {"loss": mean_over_processes(losses), "grad": mean_over_processes(torch.stack(norms))}
    if not all(size.isfinite().all() and size.sum() > 0 for size in sizes.values()):
        return {}
    return {
        f"{of}_share_{name}": value
        for of, size in sizes.items()
        for name, value in zip(terms, (size / size.sum()).tolist(), strict=True)
    }


def mean_shares(log: list[dict]) -> dict[str, float]:
    """The means of all shares in a training's log (`TrainerState.log_history`), which a run that goes on reads back in
    alphabetical order."""
    entries = [entry for entry in log if any("_share_" in key for key in entry)]
    return {key: sum(entry[key] for entry in entries) / len(entries) for key in _ORDER if entries and key in entries[0]}


def format_shares(shares: dict[str, float]) -> str:
    """Each term's share of the gradient and, in brackets, of the loss: `hidden 31 % (44 %)`."""
    names = [key.removeprefix("grad_share_") for key in shares if key.startswith("grad_share_")]
    return ", ".join(
        f"{name} {shares[f'grad_share_{name}']:.1%} ({shares[f'loss_share_{name}']:.1%})" for name in names
    )


def imbalance(shares: dict[str, float], beta: float) -> str | None:
    """What is to be said where the layer losses, or all others, do nothing; None where both train, and where there is
    only one of the two."""
    gradient = {
        key.removeprefix("grad_share_"): value for key, value in shares.items() if key.startswith("grad_share_")
    }
    layers = [value for name, value in gradient.items() if name in _LAYERS]
    if not 0 < len(layers) < len(gradient):
        return None
    share = sum(layers)
    if share < _LEAST_OF_LAYERS:
        return f"the layer losses are {share:.1%} of the gradient: they do nothing here; raise --beta (now {beta:g})"
    if share > _MOST_OF_LAYERS:
        return f"the layer losses are {share:.1%} of the gradient: they do all here; lower --beta (now {beta:g})"
    return None
