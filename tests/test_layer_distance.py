import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_emd import layer_distance
from bert_emd.layer_distance import pairwise_mse


def layers(count, shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def looped(student, teacher):
    return torch.stack([torch.stack([((s.double() - t.double()) ** 2).mean() for t in teacher]) for s in student])


@given(m=st.integers(1, 5), n=st.integers(1, 7), size=st.integers(1, 300), chunk=st.integers(1, 64))
@settings(max_examples=50)
def test_equals_the_loop_whatever_the_pieces(m, n, size, chunk):
    student, teacher = layers(m, (size,), 1), layers(n, (size,), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_distance, "_BLOCK", chunk)
        distance = pairwise_mse(student, teacher)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), looped(student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6])
def test_no_cancellation_between_nearly_equal_layers(relative):
    teacher = [100 + layer for layer in layers(3, (4, 5000), 0)]
    student = [layer * (1 + relative) for layer in teacher[:2]]
    assert torch.allclose(pairwise_mse(student, teacher).double(), looped(student, teacher), rtol=1e-5, atol=0)


def test_gradient_is_the_derivative():
    student, teacher = layers(2, (3, 4), 1, torch.float64), layers(3, (3, 4), 2, torch.float64)
    for layer in student:
        layer.requires_grad_()
    weights = torch.rand(2, 3, dtype=torch.float64)
    weights[0, 1] = weights[1, 0] = 0  # as a flow has them
    assert torch.autograd.gradcheck(lambda *s: (weights * pairwise_mse(list(s), teacher, 7.0)).sum(), student)


@given(
    m=st.integers(1, 3),
    n=st.integers(1, 4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    block=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_mask_of_any_broadcastable_shape(m, n, shape, block, data):
    narrow = [data.draw(st.sampled_from([1, size])) for size in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    mask = torch.rand(narrow, generator=torch.Generator().manual_seed(0)) < 0.6
    student = [layer.requires_grad_() for layer in layers(m, shape, 1, torch.float64)]
    teacher = layers(n, shape, 2, torch.float64)
    weights = torch.rand(m, n, dtype=torch.float64) * (torch.rand(m, n) < 0.7)
    expected = torch.stack([torch.stack([(mask * (s - t) ** 2).sum() / 3 for t in teacher]) for s in student])
    expected_grads = torch.autograd.grad((weights * expected).sum(), student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_distance, "_BLOCK", block)
        distance = pairwise_mse(student, teacher, 3.0, mask)
        grads = torch.autograd.grad((weights * distance).sum(), student)
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_layers_need_not_be_contiguous_and_may_be_low_precision():
    student = [layer.transpose(0, 1) for layer in layers(2, (6, 4), 1)]
    teacher = layers(2, (4, 6), 2)
    torch.testing.assert_close(pairwise_mse(student, teacher).double(), looped(student, teacher), rtol=1e-6, atol=0)
    halves = [layer.bfloat16().requires_grad_() for layer in student]
    distance = pairwise_mse(halves, [layer.bfloat16() for layer in teacher])
    assert distance.dtype == torch.float32
    distance.sum().backward()
    assert halves[0].grad.dtype == torch.bfloat16


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 3\), \(3, 2\)\]"):
        pairwise_mse([torch.zeros(2, 3)], [torch.zeros(3, 2)])
