"""Patch embedding against its definition in fp64: values and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKEND_DTYPES, DEVICE, compare

from patchkernels import patch_embedding, reference

pytestmark = pytest.mark.usefixtures("small_blocks")


def table(vocab: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(vocab, hidden, dtype=torch.float64).to(DEVICE, dtype)


def ids_of(*shape: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, shape, device=DEVICE)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize(
    ("shape", "patch_size", "vocab", "hidden"),
    [
        ((2, 12), 4, 11, 33),
        ((24,), 3, 50, 7),
        ((1, 2, 10), 5, 7, 16),
        ((3, 17), 17, 100, 20),
        ((4, 6), 1, 9, 5),
    ],
)
def test_values_and_gradient(backend, dtype, shape, patch_size, vocab, hidden):
    ids = ids_of(*shape, vocab=vocab)
    compare(
        lambda w: patch_embedding(ids, w, patch_size, backend=backend),
        lambda w: reference.patch_embedding(ids, w, patch_size),
        table(vocab, hidden, dtype),
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_padding_is_left_out_of_the_mean_and_has_no_gradient(backend, dtype, patch_size):
    ids = ids_of(3, 16, vocab=5)
    ids[0, :8] = 2  # patches of nothing but padding
    compare(
        lambda w: patch_embedding(ids, w, patch_size, padding_idx=2, backend=backend),
        lambda w: reference.patch_embedding(ids, w, patch_size, padding_idx=2),
        table(5, 9, dtype),
    )


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_padding_as_in_embedding_bag(backend):
    ids, weight = ids_of(6, 4, vocab=4), table(4, 8)
    ids[0] = 1
    out = patch_embedding(ids, weight, 4, padding_idx=-3, backend=backend)  # counted from the end, as in F.embedding
    bag = F.embedding_bag(ids, weight, mode="mean", padding_idx=1)
    torch.testing.assert_close(out[:, 0], bag)
    assert not out[0].any()


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_patch_size_1_is_embedding_bit_for_bit(backend, dtype):
    ids, weight = ids_of(4, 5, vocab=6), table(6, 10, dtype)
    weight[2] = -0.0
    for padding_idx in (None, 2):
        ours = patch_embedding(ids, weight, 1, padding_idx=padding_idx, backend=backend)
        expected = F.embedding(ids, weight, padding_idx)
        assert torch.equal(ours, expected) and torch.equal(ours.signbit(), expected.signbit())


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("patch_size", [1, 3])
def test_int32_ids(backend, dtype, patch_size):
    ids, weight = ids_of(4, 6, vocab=11), table(11, 10, dtype).requires_grad_()
    outs = [patch_embedding(i, weight, patch_size, backend=backend) for i in (ids, ids.int())]
    grads = [torch.autograd.grad(out, weight, torch.ones_like(out))[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradient_is_deterministic_and_fp32(backend):
    """Half of all ids are the same: a sum of some 500 equal gradients would not grow beyond 256 of them in bf16."""
    ids = torch.where(torch.rand(16, 64) < 0.5, 3, torch.randint(0, 40, (16, 64))).to(DEVICE)
    weight = table(40, 2, torch.bfloat16).requires_grad_()
    ones = torch.ones(16, 16, 2, device=DEVICE, dtype=torch.bfloat16)
    first, second = (
        torch.autograd.grad(patch_embedding(ids, weight, 4, backend=backend), weight, ones)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    exact = torch.bincount(ids.flatten(), minlength=40) / 4
    torch.testing.assert_close(first, exact[:, None].expand(-1, 2).to(first), rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_non_contiguous_inputs(backend):
    ids = ids_of(12, 2, vocab=7).T
    storage = torch.randn(11, 29, device=DEVICE)
    for weight in (storage[:7, 1:21], storage.T[:7, :9]):  # misaligned rows; unit stride along V
        compare(
            lambda w, view=weight: patch_embedding(ids, w.as_strided(view.shape, view.stride(), 1), 3, backend=backend),
            lambda w, view=weight: reference.patch_embedding(ids, w.as_strided(view.shape, view.stride(), 1), 3),
            storage,
        )


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (0,)])
def test_empty_inputs_give_empty_output_and_zero_gradient(backend, shape):
    weight = table(5, 6).requires_grad_()
    out = patch_embedding(torch.zeros(shape, dtype=torch.long, device=DEVICE), weight, 4, backend=backend)
    assert out.shape == (*shape[:-1], shape[-1] // 4, 6)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(gradient, torch.zeros_like(weight))


@given(
    data=st.data(),
    patch_size=st.integers(1, 9),
    patches=st.integers(1, 12),
    vocab=st.integers(1, 12),
    hidden=st.integers(1, 20),
    padding=st.booleans(),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_any_shape(backend, data, patch_size, patches, vocab, hidden, padding):
    ids = data.draw(st.lists(st.integers(0, vocab - 1), min_size=patches * patch_size, max_size=patches * patch_size))
    ids, padding_idx = torch.tensor(ids, device=DEVICE), vocab // 2 if padding else None
    compare(
        lambda w: patch_embedding(ids, w, patch_size, padding_idx=padding_idx, backend=backend),
        lambda w: reference.patch_embedding(ids, w, patch_size, padding_idx=padding_idx),
        table(vocab, hidden),
    )


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_id_outside_the_table_raises_on_cpu(bad):
    ids = torch.tensor([[0, 1, bad, 2]])
    for patch_size in (1, 2):
        with pytest.raises(IndexError, match=rf"\[0, 5\), got {bad}"):
            patch_embedding(ids, torch.randn(5, 3), patch_size, backend="eager")


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_id_outside_the_table_gives_nan_in_the_kernel_and_reads_nothing(bad):
    ids, weight = torch.tensor([[0, 1, bad, 2]], device=DEVICE), table(5, 3).requires_grad_()
    out = patch_embedding(ids, weight, 2, backend="triton")
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), weight)
    assert torch.equal(gradient.sum(1), torch.tensor([1.5, 1.5, 0, 0, 0], device=DEVICE))


@pytest.mark.parametrize(
    ("ids", "weight", "options", "error", "message"),
    [
        (
            torch.zeros(2, 5, dtype=torch.long),
            torch.randn(3, 4),
            {"patch_size": 2},
            ValueError,
            r"divisible.*\(2, 5\)",
        ),
        (
            torch.zeros(4, dtype=torch.long),
            torch.randn(3, 4),
            {"patch_size": 0},
            ValueError,
            "at least 1, got 0",
        ),
        (torch.tensor(1), torch.randn(3, 4), {"patch_size": 1}, ValueError, "got a scalar"),
        (
            torch.zeros(4, dtype=torch.long),
            torch.randn(4),
            {"patch_size": 2},
            ValueError,
            r"\(V, D\), got \(4,\)",
        ),
        (torch.zeros(4), torch.randn(3, 4), {"patch_size": 2}, TypeError, "torch.float32"),
        (
            torch.zeros(4, dtype=torch.long),
            torch.ones(3, 4).long(),
            {"patch_size": 2},
            TypeError,
            "torch.int64",
        ),
        (
            torch.zeros(4).long(),
            torch.randn(3, 4).to(torch.float8_e4m3fn),
            {"patch_size": 2},
            TypeError,
            "weight must be floating point.*got torch.float8_e4m3fn",
        ),
        (torch.zeros(4, dtype=torch.uint8), torch.randn(3, 4), {"patch_size": 2}, TypeError, "torch.uint8"),
        (
            torch.zeros(4).long(),
            torch.randn(3, 4),
            {"patch_size": 2, "padding_idx": 3},
            ValueError,
            "padding_idx",
        ),
        (torch.zeros(4).long(), torch.randn(3, 4, device="meta"), {"patch_size": 2}, ValueError, "meta"),
        (
            torch.zeros(4).long(),
            torch.randn(3, 4),
            {"patch_size": 2, "backend": "cuda"},
            ValueError,
            "'cuda'",
        ),
    ],
)
def test_bad_input(ids, weight, options, error, message):
    with pytest.raises(error, match=message):
        patch_embedding(ids, weight, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize(("shape", "vocab", "hidden"), [((3, 4), 5, 0), ((3, 0), 5, 6), ((0, 4), 5, 6), ((3, 0), 0, 6)])
def test_empty_tensors(backend, patch_size, shape, vocab, hidden):
    weight = torch.randn(vocab, hidden, device=DEVICE, requires_grad=True)
    out = patch_embedding(torch.zeros(shape, dtype=torch.long, device=DEVICE), weight, patch_size, backend=backend)
    assert out.shape == (shape[0], shape[1] // patch_size, hidden)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert gradient.shape == weight.shape and not gradient.any()
