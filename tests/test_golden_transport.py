"""The transport losses, gradients and layer weights of the authors' code, over four steps in all 28 cases."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bert_emd.layer_outputs import LayerOutputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import PARTS, Objective, PublishedCosts
from bert_finetune.task_kinds import Regression

CASES = sorted((Path(__file__).parent / "golden").glob("transport_*.npz"))
NAMES = {"attention": "att", "hidden": "rep"}


def test_all_cases_are_here():
    assert len(CASES) == 28


@pytest.mark.parametrize("form", ["scores", "factors"])
@pytest.mark.parametrize("solver", ["pyemd", "pot"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem.removeprefix("transport_"))
def test_four_steps(path, solver, form):
    values = np.load(path)
    _, year, shape, merge, tau, kind = path.stem.split("_")
    m, n = map(int, shape.removeprefix("M").split("N"))
    update = "normalize" if year == "2022" else {"plain": "softmax", "softmax2": "softmax2"}[kind]
    transport = LayerTransport(m, n, update, float(tau.removeprefix("tau")), merge == "shared", solver)
    for step in range(4):

        def get(name, step=step):
            return values[f"step{step}/{name}"]

        scores = torch.tensor(get("student_scores"), requires_grad=True)
        hidden = torch.tensor(get("student_hidden"), requires_grad=True)
        attention_mask = torch.tensor(get("attention_mask"))
        check_weights(transport, get, "before")
        costs = PublishedCosts(max_seq_length=attention_mask.shape[1], count_padding=True)
        objective = Objective(Regression(), costs, beta=1.0, looks_at=PARTS - {"logits"})
        attention = tuple if form == "scores" else factors
        loss, terms, _ = objective(
            transport,
            LayerOutputs(None, tuple(hidden), attention(scores)),
            LayerOutputs(
                None, tuple(torch.tensor(get("teacher_hidden"))), attention(torch.tensor(get("teacher_scores")))
            ),
            attention_mask,
            None,
        )
        loss.backward()
        for name in ("attention_loss", "hidden_loss", "embedding_loss"):
            assert terms[name].item() == pytest.approx(float(get(name)), rel=1e-5)
        # Their solver rounds masses to whole millionths, which shows in the gradients.
        for ours, theirs in ((scores.grad, get("grad_student_scores")), (hidden.grad, get("grad_student_hidden"))):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())
        check_weights(transport, get, "after")


def factors(scores):
    """Queries and keys with these scores: the scores themselves, and the identity."""
    keys = torch.eye(scores.shape[-1]).expand(scores.shape)
    return torch.stack((scores, keys), dim=1).unbind()


def check_weights(transport, get, when):
    for branch, theirs in NAMES.items():
        for side, weights in zip(("student", "teacher"), getattr(transport, f"{branch}_weights"), strict=True):
            np.testing.assert_allclose(weights.numpy(), get(f"{when}/{theirs}_{side}_weight"), atol=1e-5)
