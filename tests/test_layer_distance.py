import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_emd import layer_distance
from bert_emd.layer_distance import pairwise_attention_mse, pairwise_mse

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not there for this system")
# Without a GPU Triton's interpreter runs the kernel (tests/conftest.py). The compiled kernel has a test of its own.
# Without a GPU it is interpreted, which takes seconds.
KERNELS = ["eager", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layers(count, shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE) for _ in range(count)]


def looped(student, teacher):
    return torch.stack([torch.stack([((s.double() - t.double()) ** 2).mean() for t in teacher]) for s in student])


@pytest.mark.parametrize("kernel", KERNELS)
@given(m=st.integers(1, 5), n=st.integers(1, 7), size=st.integers(1, 300), chunk=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_equals_the_loop_whatever_the_pieces(kernel, m, n, size, chunk):
    student, teacher = layers(m, (size,), 1), layers(n, (size,), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_distance, "_BLOCK", chunk)
        distance = pairwise_mse(student, teacher, kernel=kernel)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), looped(student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6])
def test_no_cancellation_between_nearly_equal_layers(kernel, relative):
    teacher = [100 + layer for layer in layers(3, (4, 5000), 0)]
    student = [layer * (1 + relative) for layer in teacher[:2]]
    distance = pairwise_mse(student, teacher, kernel=kernel)
    assert torch.allclose(distance.double(), looped(student, teacher), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_derivative(kernel):
    student, teacher = layers(2, (3, 4), 1, torch.float64), layers(3, (3, 4), 2, torch.float64)
    for layer in student:
        layer.requires_grad_()
    weights = torch.rand(2, 3, dtype=torch.float64).to(DEVICE)
    weights[0, 1] = weights[1, 0] = 0  # as a flow has them
    assert torch.autograd.gradcheck(
        lambda *s: (weights * pairwise_mse(list(s), teacher, 7.0, kernel=kernel)).sum(), student
    )


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    m=st.integers(1, 3),
    n=st.integers(1, 4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    block=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_mask_of_any_broadcastable_shape(kernel, m, n, shape, block, data):
    narrow = [data.draw(st.sampled_from([1, size])) for size in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    mask = (torch.rand(narrow, generator=torch.Generator().manual_seed(0)) < 0.6).to(DEVICE)
    student = [layer.requires_grad_() for layer in layers(m, shape, 1, torch.float64)]
    teacher = layers(n, shape, 2, torch.float64)
    weights = (torch.rand(m, n, dtype=torch.float64) * (torch.rand(m, n) < 0.7)).to(DEVICE)
    expected = torch.stack([torch.stack([(mask * (s - t) ** 2).sum() / 3 for t in teacher]) for s in student])
    expected_grads = torch.autograd.grad((weights * expected).sum(), student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_distance, "_BLOCK", block)
        distance = pairwise_mse(student, teacher, 3.0, mask, kernel)
        grads = torch.autograd.grad((weights * distance).sum(), student)
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_need_not_be_contiguous_and_may_be_low_precision(kernel):
    student = [layer.transpose(0, 1) for layer in layers(2, (6, 4), 1)]
    teacher = layers(2, (4, 6), 2)
    distance = pairwise_mse(student, teacher, kernel=kernel)
    torch.testing.assert_close(distance.double(), looped(student, teacher), rtol=1e-6, atol=0)
    halves = [layer.bfloat16().requires_grad_() for layer in student]
    for others in (teacher, [layer.bfloat16() for layer in teacher]):
        distance = pairwise_mse(halves, others, kernel=kernel)
        torch.testing.assert_close(distance.double(), looped(halves, others), rtol=1e-6, atol=0)
        assert distance.dtype == torch.float32
        distance.sum().backward()
        assert halves[0].grad.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_compiled_kernel_is_the_eager_one_for_all_lengths():
    graphs = []
    for batch, length in ((5, 8), (9, 11), (7, 6)):
        student = [layer.requires_grad_() for layer in layers(2, (batch, 4, length, length), 1)]
        teacher = [layer.bfloat16() for layer in layers(3, (batch, 4, length, length), 2)]
        mask = (torch.rand(batch, 1, length, length) < 0.8).to(DEVICE)
        results = []
        for kernel in ("eager", "compiled"):
            distance = pairwise_mse(student, teacher, 7.0, mask, kernel)
            loss = (torch.eye(2, 3, device=DEVICE) * distance).sum()
            results.append((distance, *torch.autograd.grad(loss, student)))
        torch.testing.assert_close(*results)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.slow
@needs_triton
def test_the_triton_kernel_compiles_for_a_gpu():
    """Down to machine code for a Hopper GPU, without one."""
    program = """
import bert_emd.layer_distance_triton as kernel
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

whole = dict.fromkeys(["elements", *(f"{w}{k}" for w in ("size", "stride") for k in range(4))], "i32")
for masked in (False, True):
    for function in (kernel._distances, kernel._gradients):
        constants = {"M": 4, "N": 12, "ROWS": 16, "BLOCK": 512, "MASKED": masked, "STUDENT": tl.float32,
                     "TEACHER": tl.bfloat16, "ACCURACY": tl.float32}
        kinds = whole | {"partial": "*fp32", "weights": "*fp32", "mask": "*i1" if masked else "*fp32"}
        kinds |= dict.fromkeys(["student", "teacher", "grads"], "*i64") | dict.fromkeys(constants, "constexpr")
        names = function.arg_names
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, {name: kinds[name] for name in names}, places)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


def test_unknown_names():
    with pytest.raises(ValueError, match="kernel must be eager, compiled or triton, got 'cuda'"):
        pairwise_mse(layers(1, (2,), 0), layers(1, (2,), 1), kernel="cuda")
    with pytest.raises(ValueError, match="form must be direct or factored, got 'fast'"):
        pairwise_attention_mse(factors(1, 0, 2), factors(1, 1, 2), form="fast")


def test_attention_distances_keep_their_digits_under_autocast():
    student, teacher = factors(2, 1, 4), factors(2, 2, 5)
    for form in ("direct", "factored"):
        with torch.autocast(DEVICE, torch.bfloat16):
            distance = pairwise_attention_mse(student, teacher, form=form)
        torch.testing.assert_close(distance.double(), looped_attention(student, teacher), rtol=1e-4, atol=0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 3\), \(3, 2\)\]"):
        pairwise_mse([torch.zeros(2, 3)], [torch.zeros(3, 2)])


# The compiled kernel's layers are looked at before it is compiled.
@pytest.mark.parametrize("kernel", [*KERNELS, "compiled", None])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_of_a_side_have_one_dtype(kernel, side):
    sides = {"student": layers(3, (2, 5), 1), "teacher": layers(3, (2, 5), 2)}
    sides[side][-1] = sides[side][-1].bfloat16()
    with pytest.raises(ValueError, match=f"{side} layers must have one dtype, got torch.bfloat16, torch.float32"):
        pairwise_mse(**sides, kernel=kernel)


@pytest.mark.parametrize("kernel", [*KERNELS, "compiled", None])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_are_on_one_device(kernel, side):
    sides = {"student": layers(3, (2, 5), 1), "teacher": layers(3, (2, 5), 2)}
    sides[side][-1] = sides[side][-1].to("meta")
    with pytest.raises(ValueError, match=rf"student and teacher layers must be on one device, got {DEVICE}.*, meta"):
        pairwise_mse(**sides, kernel=kernel)


@pytest.mark.parametrize("form", ["direct", "factored"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_attention_factors_of_a_side_are_alike(form, side):
    for change, reason in ((torch.float16, "one dtype, got torch.float16, torch.float32"), ("meta", "on one device")):
        sides = {"student": factors(2, 1, 4), "teacher": factors(2, 2, 4)}
        sides[side][-1] = sides[side][-1].to(change)
        with pytest.raises(ValueError, match=reason):
            pairwise_attention_mse(**sides, form=form)


@pytest.mark.parametrize(
    ("triton", "compiler", "missing"),
    [
        (True, None, "a C compiler (gcc or clang)"),
        (False, "gcc", "Triton (pip install triton)"),
        (False, None, "Triton (pip install triton) and a C compiler (gcc or clang)"),
        (True, "gcc", None),
        (True, "clang", None),
        (True, "CC", None),
    ],
)
def test_a_gpu_s_slow_kernel_is_said_once_with_what_to_install(triton, compiler, missing, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setenv("CC", "/usr/bin/cc" if compiler == "CC" else "")
    layer_distance._best_kernel.cache_clear()
    try:
        assert {layer_distance._best_kernel("cuda") for _ in range(3)} == {"eager" if missing else "triton"}
        assert layer_distance._best_kernel("cpu") == "eager"
    finally:
        layer_distance._best_kernel.cache_clear()
    warning = f"warning: layers are compared by the slow kernel, for want of {missing}\n"
    assert capsys.readouterr() == ("", warning if missing else "")


def factors(count, seed, head_size, batch=2, heads=3, length=7, dtype=torch.float32):
    return layers(count, (2, batch, heads, length, head_size), seed, dtype)


def looped_attention(student, teacher):
    scores = [[x[0].double() @ x[1].double().mT for x in side] for side in (student, teacher)]
    return torch.stack([torch.stack([((s - t) ** 2).mean() for t in scores[1]]) for s in scores[0]])


@pytest.mark.parametrize("form", ["direct", "factored"])
@given(
    m=st.integers(1, 3),
    n=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    block=st.integers(1, 400),
)
@settings(max_examples=40, deadline=None)
def test_attention_distances_equal_the_loop_over_scores(form, m, n, sizes, shape, block):
    student = factors(m, 1, sizes[0], *shape)
    for layer in student:
        layer.requires_grad_()
    teacher = factors(n, 2, sizes[1], *shape)
    weights = torch.rand(m, n, generator=torch.Generator().manual_seed(0)) * (torch.rand(m, n) < 0.7)
    expected = looped_attention(student, teacher)
    expected_grads = torch.autograd.grad((weights * expected).sum(), student)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_SCORES_BLOCK", "_GPU_BLOCK"):
            patch.setattr(layer_distance, name, block)
        distance = pairwise_attention_mse(student, teacher, form=form)
        grads = torch.autograd.grad((weights * distance).sum(), student)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=0)
    scale = max(grad.abs().max() for grad in expected_grads)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(scale) + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["direct", "factored"])
def test_attention_gradient_is_the_derivative(form):
    student, teacher = factors(2, 1, 3, dtype=torch.float64), factors(3, 2, 4, dtype=torch.float64)
    for layer in student:
        layer.requires_grad_()
    weights = torch.rand(2, 3, dtype=torch.float64)
    weights[0, 1] = weights[1, 0] = 0
    assert torch.autograd.gradcheck(
        lambda *s: (weights * pairwise_attention_mse(list(s), teacher, 7.0, form)).sum(), student
    )


@pytest.mark.parametrize("form", ["direct", "factored", None])
def test_nearly_equal_attention_loses_no_digits(form):
    teacher = factors(3, 0, 8, length=40)
    student = [layer * (1 + relative) for layer, relative in zip(teacher, (1e-5, 0.0), strict=False)]
    distance = pairwise_attention_mse(student, teacher, form=form)
    torch.testing.assert_close(distance.double(), looped_attention(student, teacher), rtol=1e-2, atol=0)
    assert distance[1, 1] == 0


def test_the_form_is_chosen_by_length(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        layer_distance._PairwiseAttentionDistance,
        "apply",
        lambda form, m, *rows: chosen.append(form) or torch.zeros(1, 1),
    )
    for length in (16, 512):
        pairwise_attention_mse(factors(1, 0, 2, 1, 1, length), factors(1, 1, 2, 1, 1, length))
    assert chosen == ["direct", "factored"]


def test_attention_factors_must_agree():
    with pytest.raises(ValueError, match="agree in all but the head size"):
        pairwise_attention_mse(factors(1, 0, 4, length=5), factors(1, 0, 4, length=6))
