import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from bert_emd.bert_adam import BertAdam

GOLDEN = Path(__file__).parent / "golden" / "bert_adam.npz"


def test_twenty_steps_of_the_authors_optimiser():
    values = np.load(GOLDEN)
    weight, bias = (torch.nn.Parameter(torch.tensor(values[f"{name}/0"])) for name in ("weight", "bias"))
    optimizer = BertAdam(
        [{"params": [weight], "weight_decay": float(values["weight_decay"])}, {"params": [bias], "weight_decay": 0.0}],
        lr=float(values["lr"]),
        max_grad_norm=float(values["max_grad_norm"]),
    )
    total = int(values["t_total"])
    scheduler = get_linear_schedule_with_warmup(optimizer, round(float(values["warmup"]) * total), total)
    for step in range(20):
        weight.grad, bias.grad = (torch.tensor(values[f"grad_{name}/{step}"]) for name in ("weight", "bias"))
        optimizer.step()
        scheduler.step()
        for parameter, name in ((weight, "weight"), (bias, "bias")):
            np.testing.assert_allclose(parameter.detach().numpy(), values[f"{name}/{step + 1}"], rtol=1e-6, atol=1e-6)


def test_the_first_update_is_not_bias_corrected():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 0.5)
    BertAdam([parameter], lr=1.0, weight_decay=0.0).step()
    assert parameter.item() == pytest.approx(-0.1 / 0.001**0.5, rel=1e-4)


def test_state_is_saved_and_restored():
    def run(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = torch.full((3,), float(step))
            optimizer.step()

    one = torch.nn.Parameter(torch.ones(3))
    first = BertAdam([one], lr=0.1)
    run(one, first, [1, 2])
    other = torch.nn.Parameter(one.detach().clone())
    second = BertAdam([other], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(one, first, [3])
    run(other, second, [3])
    assert torch.equal(one, other)
