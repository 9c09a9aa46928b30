"""BertAdam, the optimiser of the original BERT code, which the authors train with."""

import torch


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay and every tensor clipped by itself.

        m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,   p ← p - lr (m / (√v + ε) + weight_decay · p)

    where g is the gradient scaled down to norm `max_grad_norm`, tensor by tensor (0: not clipped). Without bias
    correction the first update is (1 - β₁) / √(1 - β₂) = 3.16 times as long as Adam's. The learning rate's schedule is
    a scheduler's business, as for torch's own optimisers.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["max_grad_norm"] > 0:
                    torch.nn.utils.clip_grad_norm_(parameter, group["max_grad_norm"])
                state = self.state[parameter]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                m, v = state["m"], state["v"]
                m.lerp_(gradient, 1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                update = m / (v.sqrt() + group["eps"])
                if group["weight_decay"]:
                    update.add_(parameter, alpha=group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        return loss
