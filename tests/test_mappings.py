"""The table of layer mappings, and one of a user's own, added to it here."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from bert_emd.arguments import DistillationArguments
from bert_emd.emd_task_distill import main
from bert_emd.layer_distance import pairwise_mse
from bert_emd.layer_mapping import FixedMapping, LayerMapping
from bert_emd.layer_outputs import LayerOutputs
from bert_emd.mappings import (
    MAPPINGS,
    MappingRow,
    evenly_spaced_layers,
    first_pairs,
    last_pairs,
    mean_pairs,
    random_pairs,
    reverse_pairs,
    skip_pairs,
    uniform_pairs,
)
from bert_emd.objectives import PARTS, LayerCosts, Objective
from bert_finetune.errors import InputError
from bert_finetune.task_kinds import Classification


def test_evenly_spaced_layers():
    assert evenly_spaced_layers(3, 6) == [2, 4, 6]
    assert evenly_spaced_layers(4, 12) == [3, 6, 9, 12]
    assert evenly_spaced_layers(5, 12) == [3, 5, 8, 10, 12]
    assert evenly_spaced_layers(1, 6) == [6]
    assert evenly_spaced_layers(6, 6) == [1, 2, 3, 4, 5, 6]


def test_fixed_mappings():
    assert uniform_pairs(4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert skip_pairs(6, 12) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert last_pairs(6, 12) == [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]
    assert uniform_pairs(3, 2) == [(1, 1), (2, 2), (3, 2)]
    assert last_pairs(4, 2) == [(1, 1), (2, 1), (3, 1)]
    assert uniform_pairs(1, 1) == [(1, 1)]
    assert first_pairs(3, 6) == [(1, 1), (2, 2), (3, 3)]
    assert first_pairs(3, 2) == [(1, 1), (2, 2), (3, 2)]
    assert reverse_pairs(3, 6) == [(1, 6), (2, 4), (3, 2)]
    assert mean_pairs(2, 3) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    for kind in ("skip", "last"):
        with pytest.raises(InputError, match=f"--layer_mapping {kind}: leaves a student's last layer to the predictio"):
            MAPPINGS[kind].make(DistillationArguments(layer_mapping=kind), 1, 6)


def test_fixed_mapping_is_the_mean_of_its_pairs():
    costs = torch.arange(6.0).view(2, 3)
    result = FixedMapping([(1, 2), (2, 3)], 2, 3)(attention=costs)
    assert result.attention_loss.item() == (1 + 5) / 2
    assert result.hidden_loss is None and result.hidden_flow is None
    np.testing.assert_array_equal(result.attention_flow, [[0, 0.5, 0], [0, 0, 0.5]])


def test_random_pairs_are_drawn_by_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return random_pairs(3, 6)

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(20)}) > 10
    for seed in range(20):
        assert [i for i, _ in drawn(seed)] == [1, 2, 3]
        assert len({j for _, j in drawn(seed)}) == 3 and {j for _, j in drawn(seed)} <= set(range(1, 7))
    torch.manual_seed(0)
    assert sorted(j for _, j in random_pairs(4, 2)) == [1, 1, 2, 2]


def test_nearest_constrains_the_students_side_alone():
    """The flow is the optimum of the linear programme without the teacher's marginals."""
    costs = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    result = MAPPINGS["nearest"].make(DistillationArguments(), 3, 5)(hidden=costs)
    sums = np.kron(np.eye(3), np.ones(5))
    best = linprog(costs.detach().numpy().ravel(), A_eq=sums, b_eq=np.full(3, 1 / 3))
    np.testing.assert_allclose(result.hidden_flow.ravel(), best.x, atol=1e-9)
    assert result.hidden_loss.item() == pytest.approx(best.fun)


class LearntMapping(LayerMapping):
    """Every pair has a share, and the shares are learnt."""

    def __init__(self, student_layers: int, teacher_layers: int):
        super().__init__()
        self.shares = nn.Parameter(torch.zeros(student_layers, teacher_layers))

    def flow(self, branch, cost):
        return self.shares.flatten().softmax(0).view_as(cost)

    def recorded(self):
        return {"hidden_shares": self.shares.detach().numpy().copy()}


@pytest.fixture
def learnt():
    """A row of the table, as a user would add it."""
    MAPPINGS["learnt"] = MappingRow("every pair, by learnt shares", "here", lambda _, m, n: LearntMapping(m, n))
    yield "learnt"
    del MAPPINGS["learnt"]


@pytest.mark.training
def test_a_mapping_with_parameters_is_trained_recorded_and_resumed(learnt, teacher, small_student, glue_dir, tmp_path):
    """By its row alone: the option knows it, it is optimised, kept in checkpoints, recorded, drawn, and in the card."""
    out = tmp_path / "out"
    command = f"""
        --teacher_model {teacher} --student_model {small_student} --task_name RTE --data_dir {glue_dir / "RTE"}
        --layer_mapping {learnt} --beta 1 --learning_rate 0.1 --max_seq_length 32 --train_batch_size 8 --no_cuda
        --eval_step 2 --logging_steps 1 --save_total_limit 9 --warmup_steps 0 --max_steps 4 --output_dir {out}
    """.split()
    main(command)
    with np.load(out / "flows.npz") as kept:
        shares, flow = kept["hidden_shares"], kept["hidden_flow"]
    assert shares.shape == (4, 2, 4) and np.abs(shares[1]).max() > 0.05  # after one step of about the learning rate
    assert not np.array_equal(shares[2], shares[1])
    np.testing.assert_allclose(flow[1], np.exp(shares[1]) / np.exp(shares[1]).sum(), atol=1e-6)
    assert (out / "flow.png").exists() and not (out / "layer_weights.png").exists()
    assert "layer by layer under a mapping of its own" in (out / "README.md").read_text()
    whole = (out / "model.safetensors").read_bytes()
    # Go on from step 2: the parameter is where it was, and so is the optimiser's state of it.
    main([*command, "--resume_from_checkpoint", str(out / "checkpoint-2")])
    with np.load(out / "flows.npz") as kept:
        np.testing.assert_array_equal(kept["hidden_shares"], shares)
    assert (out / "model.safetensors").read_bytes() == whole
    assert json.loads((out / "args.json").read_text())["options"]["layer_mapping"] == "learnt"


class CosineCosts(LayerCosts):
    """1 - cosine of hidden states, the mean over real tokens."""

    def hidden(self, student, teacher, attention_mask):
        ours, theirs = (torch.stack(tuple(side))[:, attention_mask.bool()] for side in (student, teacher))
        return 1 - torch.cosine_similarity(ours[:, None], theirs[None], dim=-1).mean(-1)


def test_a_layer_cost_of_ones_own_takes_part_in_the_loss():
    torch.manual_seed(0)
    states = [torch.randn(layers + 1, 3, 5, 6, requires_grad=layers == 2) for layers in (2, 3)]
    student, teacher = (LayerOutputs(None, tuple(side)) for side in states)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    kind, parts = Classification({"0": "no", "1": "yes"}), PARTS - {"logits", "attention"}
    mapping = FixedMapping(uniform_pairs(2, 3), 2, 3)
    loss, terms, _ = Objective(kind, CosineCosts(), 1.0, looks_at=parts)(mapping, student, teacher, mask, None)
    loss.backward()
    (ours, theirs), real = states, mask.bool()
    expected = [
        1 - torch.cosine_similarity(ours[i][real], theirs[j][real], dim=-1).mean() for i, j in uniform_pairs(2, 3)
    ]
    assert terms["hidden_loss"].item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)
    assert states[0].grad.abs().sum() > 0
    by_squares = pairwise_mse(list(ours[1:]), list(theirs[1:]))
    assert terms["hidden_loss"].item() != pytest.approx(by_squares.mean().item(), rel=1e-2)
