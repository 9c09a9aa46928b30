"""What the first step of a run gives, worked out here from the two models: every loss, under every option that changes
one; and what the options do to mapping, weights, schedule and update."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import save_bert
from glue_files import write_task
from safetensors.torch import load_file
from scipy.optimize import linprog
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bert_emd.emd_task_distill import main
from bert_finetune.data import load_split, tokenize
from bert_finetune.glue import get_task

pytestmark = pytest.mark.training

ROWS, LENGTH, M, N = 24, 32, 2, 4
STUDENT_LAYERS = (2, 4)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def still_teacher(tmp_path_factory):
    """A teacher without dropout, and so a student without."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    return save_bert(folder, get_task("RTE").kind.output_names, initializer_range=0.3, **STILL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("data") / "RTE", "RTE", train=ROWS)


@dataclass
class Step:
    """Of the one batch of all rows: both models' logits, hidden states and scores; the student's come first."""

    mask: torch.Tensor
    labels: torch.Tensor
    logits: list
    states: list
    scores: list


def scores_of(model, states):
    """Pre-softmax attention scores of each layer, from its weights and its input."""
    found = []
    for layer, state in zip(model.bert.encoder.layer, states, strict=False):
        own = layer.attention.self
        query, key = (
            part(state).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for part in (own.query, own.key)
        )
        found.append(query @ key.mT / query.shape[-1] ** 0.5)
    return found


@pytest.fixture(scope="module")
def step(still_teacher, data):
    """The first step, with the batch padded to `longest` tokens."""

    @torch.no_grad()
    def work_out(padding):
        tokenizer = AutoTokenizer.from_pretrained(still_teacher)
        rows = tokenize(load_split(get_task("RTE"), data / "train.tsv", "train"), tokenizer, LENGTH)
        batch = DataCollatorWithPadding(tokenizer, padding=padding, max_length=LENGTH)([rows[k] for k in range(ROWS)])
        labels = batch.pop("labels")
        teacher, student = (AutoModelForSequenceClassification.from_pretrained(still_teacher).eval() for _ in "ab")
        student.bert.encoder.layer = torch.nn.ModuleList(student.bert.encoder.layer[k - 1] for k in STUDENT_LAYERS)
        outputs = [model(**batch, output_hidden_states=True) for model in (student, teacher)]
        states = [output.hidden_states for output in outputs]
        scores = [scores_of(*pair) for pair in zip((student, teacher), states, strict=True)]
        return Step(batch["attention_mask"], labels, [output.logits for output in outputs], states, scores)

    return {padding: work_out(padding) for padding in ("longest", "max_length")}


def costs(step, published=False, counted=False):
    """The cost matrices of attention and hidden states, and the embedding loss: sums of squared errors in units of the
    teacher's mean sum of squares, or, `published`, mean squared errors."""
    real = torch.ones_like(step.mask) if counted else step.mask
    keys, queries, heads = step.mask[:, None, None, :], real[:, None, :, None], step.scores[0][0].shape[1]

    def in_units(square, ours, theirs, elements):
        unit = elements if published else float(np.mean([square(layer) for layer in theirs]))
        return np.array([[square(one - other) / unit for other in theirs] for one in ours])

    def hidden(ours, theirs):
        return in_units(lambda x: float((x**2 * real[:, :, None]).sum()), ours, theirs, real.sum() * ours[0].shape[-1])

    def attention(ours, theirs):
        elements = real.sum() * heads * LENGTH
        return in_units(lambda x: float((x**2 * keys * queries).sum()), ours, theirs, elements)

    states = [(side[:1], side[1:]) for side in step.states]
    embedding = hidden(states[0][0], states[1][0]).item()
    return attention(*step.scores), hidden(states[0][1], states[1][1]), embedding


def emd(cost):
    """The least cost of moving equal student weights onto equal teacher weights, by a linear program; and the flow."""
    rows = np.vstack([np.kron(np.eye(M), np.ones(N)), np.kron(np.ones(M), np.eye(N))])
    sums = np.concatenate([np.full(M, 1 / M), np.full(N, 1 / N)])
    flow = linprog(cost.ravel(), A_eq=rows, b_eq=sums).x.reshape(M, N)
    return flow


def fixed(*pairs):
    flow = np.zeros((M, N))
    for i, j in pairs:
        flow[i - 1, j - 1] = 1 / len(pairs)
    return lambda cost: flow


def soft(step, temperature=1.0, published=False):
    ours, theirs = (torch.log_softmax(logits / temperature, -1) for logits in step.logits)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float((-(theirs.exp() * ours).mean() if published else divergence) * temperature**2)


def hard(step):
    return float(functional.cross_entropy(step.logits[0], step.labels))


@pytest.fixture
def run(still_teacher, data, tmp_path):
    """Do a run; its history's first entry, its args.json's options, and its folder."""

    def carry_out(*options):
        options = options if "--max_steps" in options else (*options, "--max_steps", "1")
        command = f"""
            --teacher_model {still_teacher} --student_layers {",".join(map(str, STUDENT_LAYERS))} --task_name RTE
            --data_dir {data} --output_dir {tmp_path / "out"} --max_seq_length {LENGTH} --train_batch_size {ROWS}
            --eval_step 1 --logging_steps 1 --beta 0.5 --learning_rate 1e-3 --warmup_steps 0 --bf16 False --no_cuda
            --teacher_cache none --save_total_limit 9 --alpha 1
        """.split()
        main([*command, *options])
        history = json.loads((tmp_path / "out" / "eval_results.json").read_text())["history"]
        return history[0], json.loads((tmp_path / "out" / "args.json").read_text())["options"], tmp_path / "out"

    return carry_out


# Options, what they leave of the losses (a: attention, h: hidden, e: embedding, s: soft, y: hard), and the flow.
EVERYTHING = "ahes"
VARIANTS = {
    "": (EVERYTHING, emd),
    "--use_att False": ("hes", emd),
    "--use_rep False": ("aes", emd),
    "--use_embedding False": ("ahs", emd),
    "--use_att False --use_rep False": ("es", emd),
    "--use_rep False --use_embedding False": ("as", emd),
    "--use_att False --use_embedding False": ("hs", emd),
    "--layer_mapping none": ("s", None),
    "--layer_mapping none --alpha 0": ("y", None),
    "--layer_mapping uniform --alpha 0.25": ("ahesy", fixed((1, 2), (2, 4))),
    "--layer_mapping skip": (EVERYTHING, fixed((1, 2))),
    "--layer_mapping last": (EVERYTHING, fixed((1, 3))),
    "--theta 2": (EVERYTHING, emd),
    "--T 3": (EVERYTHING, emd),
    "--one_step False": ("ahe", emd),
    "--pred_distill": ("s", None),
    "--pad_to_max_length --objective published --count_padding": (EVERYTHING, emd),
    "--pad_to_max_length": (EVERYTHING, emd),
    "--objective published --T 3": (EVERYTHING, emd),
    f"--max_seq_length {2 * LENGTH}": (EVERYTHING, emd),
    "--layer_mapping first": (EVERYTHING, fixed((1, 1), (2, 2))),
    "--layer_mapping reverse": (EVERYTHING, fixed((1, 4), (2, 2))),
    "--layer_mapping mean": (EVERYTHING, fixed(*((i + 1, j + 1) for i in range(M) for j in range(N)))),
    "--layer_mapping nearest": (EVERYTHING, lambda cost: (cost == cost.min(axis=1, keepdims=True)) / M),
    "--gradient_accumulation_steps 1 --separate": (EVERYTHING, emd),
}


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options or "defaults")
def test_every_loss(options, run, step):
    left, flow_of = VARIANTS[options]
    entry, chosen, _ = run(*options.split())
    step = step["max_length" if "--pad" in options else "longest"]
    published = "published" in options
    attention, hidden, embedding = costs(step, published, counted="--count_padding" in options)
    predictions = soft(step, chosen["T"], published)
    known = {"e": ("embedding", embedding), "s": ("soft", predictions), "y": ("hard", hard(step))}
    for letter, name, cost in (("a", "attention", attention), ("h", "hidden", hidden)):
        if letter in left:
            known[letter] = name, (flow_of(cost) * cost).sum()
    expected = {f"{known[letter][0]}_loss": known[letter][1] for letter in left}
    found = {key: value for key, value in entry.items() if key.endswith("_loss") and not key.startswith("eval_")}
    total = found.pop("train_loss")
    assert found == pytest.approx(expected, rel=1e-4)
    beta, theta, alpha = (chosen[name] for name in ("beta", "theta", "alpha"))
    weights = {"a": beta * theta, "h": beta * theta, "e": beta, "s": alpha, "y": 1 - alpha}
    assert total == pytest.approx(sum(weights[letter] * known[letter][1] for letter in left), rel=1e-4)


def weights_after(costs, kind, temperature):
    """The cost attention's weights after a step, by the formulas of docs/fidelity.md: (student, teacher)."""
    sides = []
    for axis in (1, 0):
        branches = []
        for cost in costs:
            moved = (emd(cost) * cost).sum(axis=axis)
            unit = moved * (M if axis else N)
            u = unit.sum() / unit
            branches.append(
                u / u.sum() if kind == "normalize" else np.exp(u / temperature) / np.exp(u / temperature).sum()
            )
        mean = np.mean(branches, axis=0)
        if kind == "softmax2":
            mean = np.exp(mean) / np.exp(mean).sum()
        sides.append(mean)
    return sides


@pytest.mark.parametrize(("kind", "temperature"), [("normalize", 1), ("softmax", 5), ("softmax2", 5), ("none", 1)])
def test_layer_weights_after_a_step(kind, temperature, run, step):
    *_, out = run("--cost_attention", kind, "--T_emd", str(temperature), "--weight_momentum", "0")
    with np.load(out / "flows.npz") as kept:
        found = [kept[f"hidden_{side}_weights"][0] for side in ("student", "teacher")]
    equal = [np.full(M, 1 / M), np.full(N, 1 / N)]
    expected = equal if kind == "none" else weights_after(costs(step["longest"])[:2], kind, temperature)
    for ours, by_hand, start in zip(found, expected, equal, strict=True):
        np.testing.assert_allclose(ours, by_hand, rtol=1e-4)
        assert kind == "none" or np.abs(by_hand - start).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ("", [1, 3 / 4, 2 / 4, 1 / 4]),
        ("--schedule constant", [1, 1, 1, 1]),
        ("--warmup_steps 2", [0, 1 / 2, 1, 1 / 2]),
        ("--warmup_proportion 0.5 --schedule constant_with_warmup", [0, 1 / 2, 1, 1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedule(options, rates, run):
    *_, out = run(*options.split(), "--max_steps", "4")
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    found = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert found == pytest.approx([1e-3 * rate for rate in rates])


@pytest.mark.parametrize(("optimizer", "longest"), [("adamw", 1.0), ("bert_adam", (1 - 0.9) / (1 - 0.999) ** 0.5)])
def test_first_update(optimizer, longest, run, still_teacher):
    """Adam's first update of a weight is the learning rate long; BertAdam's, without bias correction, 3.16 times."""
    *_, out = run("--optimizer", optimizer, "--max_grad_norm", "1.0", "--weight_decay", "0")
    before, after = (load_file(folder / "model.safetensors") for folder in (still_teacher, out))
    moved = max((after[key] - before[key]).abs().max().item() for key in after if ".layer." not in key)
    assert moved == pytest.approx(1e-3 * longest, rel=1e-2)


def test_accumulated_losses_are_the_means_of_their_parts(run, step):
    entry, *_ = run("--train_batch_size", "12", "--gradient_accumulation_steps", "2", "--use_att", "False")
    step = step["longest"]
    assert entry["soft_loss"] == pytest.approx(soft(step), rel=1e-4)  # of two halves of the rows


@pytest.mark.parametrize(("projection", "maps"), [("auto", 0), ("shared", 1), ("per_layer", M + 1)])
def test_projections_that_are_trained(projection, maps, run):
    *_, out = run("--projection", projection)
    state = load_file(out / "checkpoint-1" / "distillation.safetensors")
    assert len([key for key in state if key.startswith("projections.") and key.endswith(".weight")]) == maps


def test_the_teacher_s_dropout_is_active_only_if_asked_for(teacher, run):
    """By the soft loss of two steps at learning rate 0, with the student's dropout off."""
    losses = {}
    for mode in ("eval", "train"):
        *_, out = run(
            *("--teacher_model", str(teacher), "--teacher_mode", mode, "--learning_rate", "0", "--max_steps", "2"),
            *("--student_layers", "1", "--layer_mapping", "none", "--overwrite_output_dir"),
        )
        history = json.loads((out / "eval_results.json").read_text())["history"]
        losses[mode] = [entry["soft_loss"] for entry in history]
    assert losses["train"][0] != pytest.approx(losses["eval"][0], rel=1e-6)
