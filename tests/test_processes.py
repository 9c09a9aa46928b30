"""Two processes on half the batch each have the costs, flows and layer weights of one process on all of it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT

from bert_emd.layer_outputs import LayerOutputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import LayerCosts, Objective
from bert_finetune.processes import found_by_first
from bert_finetune.task_kinds import Classification

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("warm")]

M, N, BATCH, HEADS, LENGTH, WIDTH = 2, 3, 4, 2, 5, 6


def batch():
    generator = torch.Generator().manual_seed(0)

    def outputs(layers):
        return LayerOutputs(
            torch.randn(BATCH, 2, generator=generator),
            tuple(torch.randn(BATCH, LENGTH, WIDTH, generator=generator) for _ in range(layers + 1)),
            tuple(torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=generator) for _ in range(layers)),
        )

    # Lengths that differ between the halves: a mean of the halves' means would not be the mean.
    mask = (torch.arange(LENGTH) < torch.tensor([5, 4, 2, 1])[:, None]).long()
    return outputs(M), outputs(N), mask


def steps(rows: slice) -> tuple[list[float], list, dict]:
    student, teacher, mask = batch()
    parts = [
        LayerOutputs(o.logits[rows], *(tuple(x[rows] for x in part) for part in (o.hidden_states, o.attention)))
        for o in (student, teacher)
    ]
    mapping, objective = LayerTransport(M, N), Objective(Classification({"0": "a", "1": "b"}), LayerCosts(), beta=0.1)
    losses, flows = [], []
    for _ in range(3):
        loss, _, matching = objective(mapping, *parts, mask[rows], None)
        losses.append(loss.item())
        flows.append(matching.hidden_flow)
    return losses, flows, mapping.state_dict()


def one_of_two(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = found_by_first(lambda: {"found by": rank})
    torch.save([*steps(slice(2 * rank, 2 * rank + 2)), found], folder / f"of-rank-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    processes = [warm.start(__file__, rank, tmp_path, RANK=str(rank)) for rank in (0, 1)]
    for process in processes:
        assert process.wait(120) == 0, process.communicate()[1]
    halves = [torch.load(tmp_path / f"of-rank-{rank}", weights_only=False) for rank in (0, 1)]
    assert [found for *_, found in halves] == [found_by_first(lambda: {"found by": 0})] * 2
    losses, flows, state = steps(slice(None))
    for step in range(3):
        # Gradients are averaged over processes, so the mean of their losses must be the whole batch's loss.
        torch.testing.assert_close((halves[0][0][step] + halves[1][0][step]) / 2, losses[step], rtol=1e-5, atol=1e-7)
        for half in halves:
            torch.testing.assert_close(torch.tensor(half[1][step]), torch.tensor(flows[step]), rtol=1e-5, atol=1e-7)
    for name, value in state.items():
        torch.testing.assert_close(halves[0][2][name], value, rtol=1e-5, atol=1e-7)
        assert torch.equal(halves[0][2][name], halves[1][2][name])


@pytest.mark.training
@pytest.mark.parametrize("options", [[], ["--use_rep", "False"], ["--one_step", "False"]], ids=" ".join)
def test_the_script_in_two_processes(options, teacher, small_student, glue_dir, tmp_path):
    out = tmp_path / "out"
    pair = warm.start_pair(
        *(ROOT / "bert_emd/emd_task_distill.py", "--teacher_model", teacher, "--student_model", small_student),
        *("--task_name", "RTE", "--data_dir", glue_dir, "--output_dir", out, "--max_seq_length", "32"),
        *("--num_train_epochs", "2", "--train_batch_size", "4", "--no_cuda", "--overwrite_output_dir", *options),
    )
    printed = ""
    for process in pair:
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        printed += said
    history = json.loads((out / "eval_results.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [3, 6]  # 24 rows, 2 x 4 a step
    assert sum(line.startswith("step ") for line in printed.splitlines()) == 2  # one process prints


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
