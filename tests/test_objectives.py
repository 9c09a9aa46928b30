from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bert_emd.choices import WEIGHT_UPDATES
from bert_emd.layer_mapping import FixedMapping
from bert_emd.layer_outputs import LayerOutputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.mappings import mean_pairs
from bert_emd.objectives import PARTS, LayerCosts, Objective, PublishedCosts, prediction_loss
from bert_finetune.errors import InputError
from bert_finetune.task_kinds import Classification, Regression

KIND = Classification({"0": "no", "1": "yes"})
GOLDEN = Path(__file__).parent / "golden"
HEADS, LENGTH, WIDTH, M, N = 2, 5, 6, 2, 3


def outputs(layers, seed, length=LENGTH, requires_grad=False, form="scores", batch=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_(requires_grad)

    return LayerOutputs(
        draw(batch, 2),
        tuple(draw(batch, length, WIDTH) for _ in range(layers + 1)),
        tuple(
            draw(batch, HEADS, length, length) if form == "scores" else draw(2, batch, HEADS, length, WIDTH // HEADS)
            for _ in range(layers)
        ),
    )


def scores(attention):
    return attention if attention.dim() == 4 else attention[0] @ attention[1].mT


def mask(*lengths, length=LENGTH):
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("form", ["scores", "factors"])
def test_published_costs_look_at_real_tokens_only(form):
    student, teacher, attention_mask = outputs(M, 1, form=form), outputs(N, 2, form=form), mask(5, 3, 1)
    costs = PublishedCosts(max_seq_length=16)
    hidden = costs.hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
    attention = costs.attention(student.attention, teacher.attention, attention_mask)
    real = attention_mask.bool()
    for i in range(M):
        for j in range(N):
            difference = student.hidden_states[1 + i] - teacher.hidden_states[1 + j]
            assert hidden[i, j].item() == pytest.approx((difference[real] ** 2).mean().item(), rel=1e-5)
            # per real query: the sum over real keys / 16; then the mean over real queries and heads
            difference = scores(student.attention[i]) - scores(teacher.attention[j])
            squares = difference**2 * real[:, None, None, :]
            per_query = squares.sum(-1).transpose(1, 2)[real] / 16
            assert attention[i, j].item() == pytest.approx(per_query.mean().item(), rel=1e-5)


@pytest.mark.parametrize("form", ["scores", "factors"])
def test_relative_costs_are_in_the_teachers_size(form):
    student, teacher, attention_mask = outputs(M, 1, form=form), outputs(N, 2, form=form), mask(5, 3, 1)
    hidden = LayerCosts().hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
    attention = LayerCosts().attention(student.attention, teacher.attention, attention_mask)
    real = attention_mask.bool()
    pairs = real[:, None, :, None] & real[:, None, None, :]

    def squares(layer):
        return (layer[real] ** 2 if layer.dim() == 3 else layer**2 * pairs).sum().item()

    theirs = [scores(layer) for layer in teacher.attention]
    states = teacher.hidden_states[1:]
    sizes = [sum(map(squares, layers)) / N for layers in (states, theirs)]
    for i in range(M):
        for j in range(N):
            expected = squares(student.hidden_states[1 + i] - states[j]) / sizes[0]
            assert hidden[i, j].item() == pytest.approx(expected, rel=1e-5)
            expected = squares(scores(student.attention[i]) - theirs[j]) / sizes[1]
            assert attention[i, j].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["scores", "factors"])
def test_a_student_that_outputs_nothing_gets_1(form):
    teacher, attention_mask = outputs(N, 2, form=form), mask(5, 3, 1)
    nothing = LayerOutputs(
        torch.zeros(3, 2),
        tuple(torch.zeros_like(layer) for layer in teacher.hidden_states[: M + 1]),
        tuple(torch.zeros_like(layer) for layer in teacher.attention[:M]),
    )
    mapping = FixedMapping(mean_pairs(M, N), M, N)
    _, terms, _ = Objective(KIND, LayerCosts(), 1.0)(mapping, nothing, teacher, attention_mask, None)
    for name in ("attention_loss", "hidden_loss", "embedding_loss"):
        assert terms[name].item() == pytest.approx(1, rel=1e-5)


def weighed(student, teacher, rows, labels, **changes):
    """Each term's share of the relative loss, and of the size of its gradient in the student's outputs."""
    whole = Objective(KIND, LayerCosts(), **{"beta": 0.5, "alpha": 0.6, "temperature": 2.0} | changes)
    parts = [student.logits, *student.hidden_states, *student.attention]
    _, terms, matching = whole(LayerTransport(M, N), student, teacher, rows, labels)
    sizes = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, parts, retain_graph=True, allow_unused=True)
        sizes[name] = term.item(), sum((g**2).sum() for g in found if g is not None).sqrt().item()
    return sizes, matching


def assert_alike(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert other[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("form", ["scores", "factors"])
def test_the_teachers_units_do_not_count(form):
    """A teacher ten times as large, and a student as large again, lose what they lost, and are moved as before."""
    labels, rows = torch.tensor([0, 1, 1]), mask(5, 3, 1)

    def times(outputs, factor):
        # Scores are a product of their factors.
        of_scores = factor if form == "scores" else factor**0.5
        states = tuple((factor * layer).detach().requires_grad_() for layer in outputs.hidden_states)
        attention = tuple((of_scores * layer).detach().requires_grad_() for layer in outputs.attention)
        return LayerOutputs(outputs.logits, states, attention)

    student, teacher = outputs(M, 1, requires_grad=True, form=form), outputs(N, 2, form=form)
    before, flows = weighed(student, teacher, rows, labels)
    after, same = weighed(times(student, 10.0), times(teacher, 10.0), rows, labels)
    for name in before:
        assert after[name][0] == pytest.approx(before[name][0], rel=1e-5), name
    np.testing.assert_allclose(same.hidden_flow, flows.hidden_flow, atol=1e-9)
    np.testing.assert_allclose(same.attention_flow, flows.attention_flow, atol=1e-9)
    # A gradient is per unit of the output: ten times the unit, a tenth of the gradient.
    assert 10 * after["hidden_loss"][1] == pytest.approx(before["hidden_loss"][1], rel=1e-4)


def test_classes_that_nobody_uses_do_not_count():
    def widened(outputs):
        more = torch.full((3, 40), -60.0)
        return LayerOutputs(
            torch.cat([outputs.logits.detach(), more], 1).requires_grad_(), outputs.hidden_states, outputs.attention
        )

    student, teacher, labels = outputs(M, 1, requires_grad=True), outputs(N, 2), torch.tensor([0, 1, 1])
    before, _ = weighed(student, teacher, mask(5, 3, 1), labels, temperature=1.0)
    after, _ = weighed(widened(student), widened(teacher), mask(5, 3, 1), labels, temperature=1.0)
    assert_alike(before, after)


def test_errors_of_scores_are_in_units_of_the_training_scores_variance():
    student, teacher, labels = outputs(M, 1).logits[:, :1], outputs(N, 2).logits[:, :1], torch.tensor([1.0, 3.0, 5.0])
    unit = Regression().unit_of_loss(labels.numpy())
    total, _ = prediction_loss(Regression(), student, teacher, labels, alpha=0.5, unit=unit)
    large = Regression().unit_of_loss(100 * labels.numpy())
    same, _ = prediction_loss(Regression(), 100 * student, 100 * teacher, 100 * labels, alpha=0.5, unit=large)
    assert same.item() == pytest.approx(total.item(), rel=1e-5)
    constant, _ = prediction_loss(Regression(), labels.mean().repeat(3), None, labels, alpha=0.0, unit=unit)
    assert constant.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("form", ["scores", "factors"])
@pytest.mark.parametrize("costs", [LayerCosts(), PublishedCosts(max_seq_length=16)], ids=["relative", "published"])
def test_costs_do_not_depend_on_the_amount_of_padding(form, costs):
    attention_mask = mask(5, 3, 1)
    short = outputs(M, 1, form=form), outputs(N, 2, form=form)
    pad = {"hidden_states": (0, 0, 0, 4), "attention": (0, 4 if form == "scores" else 0, 0, 4)}
    long = [
        LayerOutputs(
            o.logits,
            **{name: tuple(functional.pad(x, p, value=9.9) for x in getattr(o, name)) for name, p in pad.items()},
        )
        for o in short
    ]
    for name, part in (("hidden", "hidden_states"), ("attention", "attention")):
        few = getattr(costs, name)(*(getattr(o, part) for o in short), attention_mask)
        many = getattr(costs, name)(*(getattr(o, part) for o in long), functional.pad(attention_mask, (0, 4)))
        torch.testing.assert_close(few, many)


@pytest.mark.parametrize("form", ["scores", "factors"])
def test_counted_padding_is_the_plain_mean_with_masked_keys_as_zero(form):
    student, teacher, attention_mask = outputs(M, 1, form=form), outputs(N, 2, form=form), mask(5, 3, 1)
    costs = PublishedCosts(max_seq_length=LENGTH, count_padding=True)
    hidden = costs.hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
    expected = functional.mse_loss(student.hidden_states[1], teacher.hidden_states[2])
    assert hidden[0, 1].item() == pytest.approx(expected.item(), rel=1e-6)
    keys = attention_mask[:, None, None, :].bool()
    a, b = (scores(o.attention[0]).masked_fill(~keys, 0) for o in (student, teacher))
    attention = costs.attention(student.attention, teacher.attention, attention_mask)
    assert attention[0, 0].item() == pytest.approx(functional.mse_loss(a, b).item(), rel=1e-6)


def test_prediction_loss_against_the_authors_code():
    values = np.load(GOLDEN / "prediction_loss.npz")
    cases = sorted({name.split("/")[0] for name in values.files})
    assert len(cases) >= 5
    for case in cases:
        get = {
            name.split("/")[1]: torch.as_tensor(values[name]) for name in values.files if name.startswith(f"{case}/")
        }
        logits = get["student_logits"].clone().requires_grad_()
        kind = Regression() if int(get["classes"]) == 1 else KIND
        total, terms = prediction_loss(
            kind,
            logits,
            get["teacher_logits"],
            get["labels"],
            float(get["T"]),
            float(get["alpha"]),
            mean_over_classes=True,
        )
        total.backward()
        assert total.item() == pytest.approx(get["total"].item(), rel=1e-5)
        for name, term in terms.items():
            assert term.item() == pytest.approx(get[name.removesuffix("_loss")].item(), rel=1e-5)
        torch.testing.assert_close(logits.grad, get["grad"].float(), rtol=1e-4, atol=1e-7)


def objective(**changes):
    return Objective(KIND, PublishedCosts(max_seq_length=16), **{"beta": 0.1, "theta": 3.0} | changes)


def test_total_is_the_weighted_sum_of_the_terms():
    student, teacher, labels = outputs(M, 1), outputs(N, 2), torch.tensor([0, 1, 1])
    whole = objective(alpha=0.25, temperature=2.0)
    total, terms, matching = whole(LayerTransport(M, N), student, teacher, mask(5, 3, 1), labels)
    layers = 3.0 * (terms["attention_loss"] + terms["hidden_loss"]) + terms["embedding_loss"]
    predictions = 0.25 * terms["soft_loss"] + 0.75 * terms["hard_loss"]
    assert total.item() == pytest.approx((0.1 * layers + predictions).item(), rel=1e-6)
    assert matching.attention_flow.shape == (M, N)
    embedding = (student.hidden_states[0] - teacher.hidden_states[0])[mask(5, 3, 1).bool()] ** 2
    assert terms["embedding_loss"].item() == pytest.approx(embedding.mean().item(), rel=1e-5)


@pytest.mark.parametrize("off", sorted(PARTS))
def test_each_term_can_be_left_out(off):
    student, teacher, labels = outputs(M, 1, requires_grad=True), outputs(N, 2), torch.tensor([0, 1, 1])
    rest = objective(looks_at=PARTS - {off})
    loss, terms, _ = rest(LayerTransport(M, N), student, teacher, mask(5, 3, 1), labels)
    loss.backward()
    assert set(terms) == {f"{'soft' if part == 'logits' else part}_loss" for part in PARTS - {off}}
    assert (student.attention[0].grad is None) == (off == "attention")


def test_labels_alone_need_no_teacher():
    alone = frozenset({"logits"})
    plain = objective(alpha=0.0, looks_at=alone)
    assert not plain.needs_teacher
    student, labels = outputs(M, 1), torch.tensor([0, 1, 1])
    loss, terms, matching = plain(None, LayerOutputs(student.logits), None, mask(5, 3, 1), labels)
    assert loss.item() == pytest.approx(functional.cross_entropy(student.logits, labels).item())
    assert set(terms) == {"hard_loss"} and matching is None
    assert objective(looks_at=alone).needs_teacher
    assert objective(alpha=0.0, looks_at=PARTS - {"hidden"}).needs_teacher
    with pytest.raises(InputError, match="no loss is left to train with"):
        objective(looks_at=frozenset())


@st.composite
def _steps(draw):
    """Two models' outputs, some of their layers alike, a mask, a mapping with drawn weights, and the loss."""
    m, n, batch = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, LENGTH), min_size=batch, max_size=batch))
    form, counted = draw(st.sampled_from(["scores", "factors"])), draw(st.booleans())
    size = {"length": LENGTH if counted else max(lengths), "form": form, "batch": batch}
    student, teacher = outputs(m, draw(st.integers(0, 99)), requires_grad=True, **size), outputs(n, 100, **size)
    for i, j in draw(st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, n - 1)), max_size=3)):
        student.hidden_states[1 + i].data.copy_(teacher.hidden_states[1 + j])
        student.attention[i].data.copy_(teacher.attention[j])
    update, merge = draw(st.sampled_from(WEIGHT_UPDATES)), draw(st.booleans())
    published = PublishedCosts(max_seq_length=LENGTH, count_padding=counted)
    costs = published if counted else draw(st.sampled_from([LayerCosts(), published]))
    mapping, whole = LayerTransport(m, n, update, 5.0, merge), Objective(KIND, costs, beta=0.1)
    for weights in (*mapping.attention_weights, *mapping.hidden_weights):
        drawn = draw(st.lists(st.floats(1e-12, 1), min_size=len(weights), max_size=len(weights)))
        weights.copy_(torch.tensor(drawn, dtype=torch.float64) / sum(drawn))
    return student, teacher, mask(*lengths, length=size["length"]), mapping, whole


@pytest.mark.slow
@given(_steps())
@settings(max_examples=150, deadline=None)
def test_never_nan(step):
    """Any M and N, a batch of one, one token, layers that are alike: finite losses, gradients and weights."""
    student, teacher, attention_mask, mapping, whole = step
    for _ in range(3):
        before = [weights.clone() for weights in mapping.hidden_weights]
        loss, terms, matching = whole(mapping, student, teacher, attention_mask, None)
        loss.backward()
        assert all(torch.isfinite(term) and term >= 0 for term in terms.values())
        for tensor in (student.logits, *student.hidden_states, *student.attention):
            assert torch.isfinite(tensor.grad).all()
        for axis, weights in enumerate(before):
            np.testing.assert_allclose(matching.hidden_flow.sum(axis=1 - axis), weights, atol=1e-9)
        for weights in (*mapping.attention_weights, *mapping.hidden_weights):
            assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_teacher_itself_as_student_keeps_uniform_weights(batch):
    same = outputs(M, 1, length=1, batch=batch)
    mapping = LayerTransport(M, M)
    for _ in range(4):
        loss, terms, _ = objective()(mapping, same, same, mask(*[1] * batch, length=1), None)
        assert torch.isfinite(loss)
        assert terms["hidden_loss"].item() == terms["attention_loss"].item() == 0
    for weights in mapping.hidden_weights:
        np.testing.assert_allclose(weights.numpy(), 1 / M)


@pytest.mark.parametrize("costs", [LayerCosts, lambda **how: PublishedCosts(max_seq_length=LENGTH, **how)])
def test_scores_outside_of_either_layer_s_window_do_not_count(costs):
    ours, theirs = [1, float("inf")], [float("inf"), 2, 1]
    attention_mask = mask(5, 4, 3)
    student, teacher = outputs(M, 1).attention, outputs(N, 2).attention
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    counted = (attention_mask[:, None] * attention_mask[:, :, None]).bool()[:, None]
    windowed = costs(windows=(ours, theirs)).attention(student, teacher, attention_mask)

    def mean(values, window):
        return values[(counted & (far <= window)).expand_as(values)].mean().item()

    size = 1.0
    if costs is LayerCosts:
        size = sum(mean(layer**2, window) for layer, window in zip(teacher, theirs, strict=True)) / N
    else:  # per real query and key of LENGTH
        size = int(attention_mask.sum()) * LENGTH / int(counted.sum())
    for i in range(M):
        for j in range(N):
            expected = mean((student[i] - teacher[j]) ** 2, min(ours[i], theirs[j])) / size
            assert windowed[i, j].item() == pytest.approx(expected, rel=1e-5)
    # What stands outside may be anything.
    changed = [layer.masked_fill(far > window, 1e3) for layer, window in zip(student, ours, strict=True)]
    torch.testing.assert_close(costs(windows=(ours, theirs)).attention(changed, teacher, attention_mask), windowed)


def test_windows_leave_gradients_inside():
    student, teacher, attention_mask = outputs(M, 1, requires_grad=True), outputs(N, 2), mask(5, 4, 3)
    windows = [1, 1], [1, float("inf"), 1]
    LayerCosts(windows=windows).attention(student.attention, teacher.attention, attention_mask).sum().backward()
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() > 1
    for layer in student.attention:
        assert (layer.grad[:, :, far] == 0).all() and (layer.grad[0, :, ~far] != 0).all()


def test_factors_are_compared_with_scores():
    student, teacher, attention_mask = outputs(M, 1, form="factors"), outputs(N, 2), mask(5, 4, 3)
    whole = [scores(layer) for layer in student.attention]
    for costs in (LayerCosts(), PublishedCosts(max_seq_length=LENGTH)):
        torch.testing.assert_close(
            costs.attention(student.attention, teacher.attention, attention_mask),
            costs.attention(whole, teacher.attention, attention_mask),
        )
