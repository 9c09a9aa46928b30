import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from bert_emd.arguments import DistillationArguments
from bert_emd.choices import SOLVERS, WEIGHT_UPDATES
from bert_emd.layer_transport import LayerTransport, attend_to_costs, solve_transport

SOLVER_NAMES = sorted(SOLVERS)


def random_problem(seed, m=None, n=None):
    rng = np.random.default_rng(seed)
    m, n = m or rng.integers(1, 7), n or rng.integers(1, 13)
    return rng.dirichlet(np.ones(m)), rng.dirichlet(np.ones(n)), rng.random((m, n)) * 10 ** rng.uniform(-6, 6)


def linear_program(student, teacher, cost):
    """The solution by scipy, costs as a part of the largest."""
    m, n = cost.shape
    rows, columns = np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))
    scale = cost.max()
    solution = linprog(cost.ravel() / scale, A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([student, teacher]))
    assert solution.success
    return solution


@pytest.mark.parametrize("solver", SOLVER_NAMES)
class TestSolver:
    def test_solved_by_hand(self, solver):
        # The cheap cells take all they can: 1/2 of student 1 to teacher 1, the rest of teacher 1 from student 2.
        flow = solve_transport(np.array([0.5, 0.5]), np.array([0.75, 0.25]), np.array([[1.0, 9.0], [2.0, 3.0]]), solver)
        np.testing.assert_allclose(flow, [[0.5, 0], [0.25, 0.25]], atol=1e-12)

    def test_one_layer_each(self, solver):
        np.testing.assert_allclose(solve_transport(np.ones(1), np.ones(1), np.array([[3.0]]), solver), [[1.0]])

    @pytest.mark.parametrize("seed", range(40))
    def test_optimal_vertex_with_the_right_marginals(self, solver, seed):
        student, teacher, cost = random_problem(seed)
        flow = solve_transport(student, teacher, cost, solver)
        assert (flow >= 0).all()
        np.testing.assert_allclose(flow.sum(axis=1), student, atol=1e-9)
        np.testing.assert_allclose(flow.sum(axis=0), teacher, atol=1e-9)
        assert (flow > 1e-12).sum() <= sum(cost.shape) - 1
        assert (flow * cost).sum() == pytest.approx(linear_program(student, teacher, cost).fun * cost.max(), rel=1e-6)

    def test_costs_that_are_not_finite(self, solver):
        with pytest.raises(FloatingPointError, match="NaN or infinity"):
            solve_transport(np.ones(1), np.ones(1), np.array([[np.nan]]), solver)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_the_flows_of_1000_random_problems_are_the_linear_program_s(solver):
    """Not those of the other solver alone: pyemd hands its problems to pot."""
    for seed in range(1000):
        problem = random_problem(seed)
        expected = linear_program(*problem).x.reshape(problem[2].shape)
        np.testing.assert_allclose(solve_transport(*problem, solver), expected, atol=1e-6, err_msg=f"problem {seed}")


def costs(m, n, seed=0, requires_grad=False):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def test_loss_and_gradient_are_the_flow_s():
    transport = LayerTransport(3, 5)
    attention, hidden = costs(3, 5, 1, True), costs(3, 5, 2, True)
    result = transport(attention=attention, hidden=hidden)
    assert result.attention_loss.item() == pytest.approx(
        float((result.attention_flow * attention.detach().numpy()).sum())
    )
    (result.attention_loss + 2 * result.hidden_loss).backward()
    np.testing.assert_allclose(attention.grad, result.attention_flow, rtol=1e-6)
    np.testing.assert_allclose(hidden.grad, 2 * result.hidden_flow, rtol=1e-6)


@pytest.mark.parametrize("kind", WEIGHT_UPDATES)
@pytest.mark.parametrize("merge", [True, False])
def test_weights_by_the_formula(kind, merge):
    m, n, tau = 2, 3, 4.0
    transport = LayerTransport(m, n, kind, tau, merge)
    matrices = {"attention": costs(m, n, 1), "hidden": costs(m, n, 2)}
    result = transport(**matrices)
    uniform = [np.full(m, 1 / m), np.full(n, 1 / n)]

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    expected = {}
    for branch, matrix in matrices.items():
        moved = getattr(result, f"{branch}_flow") * matrix.double().numpy()
        unit = [moved.sum(axis=1) / uniform[0], moved.sum(axis=0) / uniform[1]]
        u = [c.sum() / c for c in unit]
        expected[branch] = {
            "normalize": [x / x.sum() for x in u],
            "softmax": [softmax(x / tau) for x in u],
            "softmax2": [softmax(x / tau) for x in u],
            "none": uniform,
        }[kind]
    if merge:
        mean = [(a + b) / 2 for a, b in zip(*expected.values(), strict=True)]
        expected = dict.fromkeys(expected, mean)
    if kind == "softmax2":
        expected = {branch: [softmax(x) for x in vectors] for branch, vectors in expected.items()}
    for branch, vectors in expected.items():
        for got, vector in zip(getattr(transport, f"{branch}_weights"), vectors, strict=True):
            np.testing.assert_allclose(got.numpy(), vector, rtol=1e-9)
            assert got.dtype == torch.float64


def test_the_next_flow_has_the_new_weights_as_marginals():
    transport = LayerTransport(3, 6)
    for step in range(5):
        before = [weights.numpy().copy() for weights in transport.hidden_weights]
        flow = transport(attention=costs(3, 6, step), hidden=costs(3, 6, 100 + step)).hidden_flow
        np.testing.assert_allclose(flow.sum(axis=1), before[0], atol=1e-9)
        np.testing.assert_allclose(flow.sum(axis=0), before[1], atol=1e-9)


def test_weights_only_move_in_training_mode():
    transport = LayerTransport(2, 3).eval()
    transport(hidden=costs(2, 3))
    assert torch.equal(transport.hidden_weights[0], torch.full((2,), 0.5, dtype=torch.float64))


def test_a_branch_that_is_off_has_no_say_in_the_weights():
    both, alone = LayerTransport(2, 4, merge_weights=True), LayerTransport(2, 4, merge_weights=False)
    for step in range(3):
        result = both(hidden=costs(2, 4, step))
        assert result.attention_loss is None and result.attention_flow is None
        alone(hidden=costs(2, 4, step))
    for got, expected in zip(both.hidden_weights, alone.hidden_weights, strict=True):
        assert torch.equal(got, expected)
    assert LayerTransport(2, 4)().hidden_loss is None


def test_state_dict_goes_on_where_it_was():
    one, other = LayerTransport(3, 4), LayerTransport(3, 4)
    one(attention=costs(3, 4, 1), hidden=costs(3, 4, 2))
    other.load_state_dict(one.state_dict())
    results = [transport(attention=costs(3, 4, 3), hidden=costs(3, 4, 4)) for transport in (one, other)]
    np.testing.assert_array_equal(results[0].hidden_flow, results[1].hidden_flow)
    assert not dict(LayerTransport(3, 4).named_parameters())


@pytest.mark.parametrize("kind", ["normalize", "softmax"])
def test_zero_cost_is_the_limit_of_the_formula(kind):
    unit = np.array([0.0, 2.0, 5.0])
    limits = [attend_to_costs(np.maximum(unit, tiny), kind, 1.0) for tiny in (1e-3, 1e-9)]
    exact = attend_to_costs(unit, kind, 1.0)
    np.testing.assert_allclose(exact, [1, 0, 0])
    np.testing.assert_allclose(limits[1], exact, atol=1e-6)
    np.testing.assert_allclose(attend_to_costs(np.array([0.0, 0.0, 5.0]), kind, 1.0), [0.5, 0.5, 0])
    np.testing.assert_allclose(attend_to_costs(np.zeros(4), kind, 1.0), np.full(4, 0.25))


@pytest.mark.slow
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    kind=st.sampled_from(WEIGHT_UPDATES),
    merge=st.booleans(),
    tau=st.sampled_from([0.1, 1.0, 10.0]),
    solver=st.sampled_from(SOLVER_NAMES),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_never_nan(m, n, kind, merge, tau, solver, data):
    transport = LayerTransport(m, n, kind, tau, merge, solver)
    cell = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 7.5, 1e6, 1e30])
    for _ in range(3):
        matrices = [torch.tensor(data.draw(st.lists(cell, min_size=m * n, max_size=m * n))).view(m, n) for _ in "ab"]
        before = [
            [w.numpy().copy() for w in weights] for weights in (transport.attention_weights, transport.hidden_weights)
        ]
        result = transport(attention=matrices[0], hidden=matrices[1])
        for loss, flow, weights in zip(
            (result.attention_loss, result.hidden_loss),
            (result.attention_flow, result.hidden_flow),
            before,
            strict=True,
        ):
            assert torch.isfinite(loss)
            np.testing.assert_allclose(flow.sum(axis=1), weights[0], atol=1e-9)
            np.testing.assert_allclose(flow.sum(axis=0), weights[1], atol=1e-9)
        for weights in (*transport.attention_weights, *transport.hidden_weights):
            assert torch.isfinite(weights).all() and (weights > 0).all()
            assert float(weights.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_update": "max"}, "weight_update must be one of"),
        ({"solver": "simplex"}, "solver must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"student_layers": 0}, "student_layers and teacher_layers must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerTransport(**{"student_layers": 2, "teacher_layers": 3} | arguments)


def with_a_cheap_pair(layers, seed):
    """Costs of attention and hidden states, each with one pair of layers that are nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    costs = {branch: 0.2 + torch.rand(*layers, generator=generator) for branch in ("attention", "hidden")}
    costs["attention"][0, 0] = costs["hidden"][0, 1] = 0.01
    return costs


def weights_over(costs, momentum, still=0.0, steps=200):
    """The student layers' weights after each of so many steps of the same costs, or until a step changes none of them
    by more than `still`; and the module."""
    m, n = costs["hidden"].shape
    transport, weights = LayerTransport(m, n, momentum=momentum), []
    for _ in range(steps):
        transport(**costs)
        weights.append(transport.hidden_weights[0].numpy().copy())
        if len(weights) > 1 and np.abs(weights[-1] - weights[-2]).max() < still:
            break
    return np.array(weights), transport


def test_momentum_settles_where_the_paper_s_weights_swing():
    costs = with_a_cheap_pair((3, 6), seed=3)
    paper, _ = weights_over(costs, 0.0)
    assert np.abs(paper[-1] - paper[-3]).max() < 1e-9 and np.abs(paper[-1] - paper[-2]).max() > 0.5  # period 2
    settled, transport = weights_over(costs, 0.8)
    assert np.abs(settled[-1] - settled[-2]).max() < 1e-9
    transport.momentum = 0.0  # where they rest, the paper's own update leaves them: w = f(w)
    transport(**costs)
    np.testing.assert_allclose(transport.hidden_weights[0].numpy(), settled[-1], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(2, 2), (3, 6), (4, 12)], ids=str)
def test_weights_settle_with_the_default_momentum(layers):
    """Of 30 problems drawn at random, all; without momentum 1, 25 and 30 of them swing."""
    swinging = 0
    for seed in range(30):
        weights, _ = weights_over(with_a_cheap_pair(layers, seed), DistillationArguments().weight_momentum, still=1e-6)
        swinging += np.abs(weights[-1] - weights[-2]).max() > 1e-4
    assert swinging == 0


def test_momentum_mixes_old_and_new_weights():
    cost = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    plain, slow = LayerTransport(2, 2), LayerTransport(2, 2, momentum=0.75)
    plain(hidden=cost), slow(hidden=cost)
    for new, mixed in zip(plain.hidden_weights, slow.hidden_weights, strict=True):
        np.testing.assert_allclose(mixed, 0.75 * 0.5 + 0.25 * new, atol=1e-12)
    with pytest.raises(ValueError, match="momentum must be from 0 to below 1, got 1"):
        LayerTransport(2, 2, momentum=1)
