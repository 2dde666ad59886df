"""On a GPU the host never waits for a result, and every launch is on the GPU of its tensors.

Both make an operator safe in a CUDA graph: nothing of what the host does depends on what a tensor holds. The tensors
here have no data at all (``bench.fake_cuda``), so that a size or a branch that depended on it could not be computed.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from checkout import CHECKOUT
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.torch_version import TorchVersion

import patchkernels
from patchkernels.numerics import LossOptions

if torch.cuda.is_available():
    pytest.skip("tensors without data are for a machine without a GPU", allow_module_level=True)
fake_cuda = pytest.importorskip("bench.fake_cuda")  # imports the kernels, and they import Triton

N, K, V, D = 160, 4, 99, 32
FORMS = [("auto", torch.bfloat16), ("auto", torch.float16), ("auto", torch.float32), ("eager", torch.bfloat16)]
OPTIONS = [{}, {"label_smoothing": 0.1, "softcap": 30.0, "z_loss_weight": 1e-4}]


@pytest.fixture
def gpu():
    with fake_cuda.FakeCuda() as gpu:
        yield gpu


def leaf(*shape, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def labels(*shape, device="cuda"):
    return torch.randint(0, V, shape, device=device)


def kernels(gpu):
    """The kernels that were launched since the last call."""
    names = [launch.kernel for launch in gpu.launches]
    gpu.launches.clear()
    return names


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.sum().tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave((x > 0).long().sum(0)),
    "read by a mask": lambda x: x[x > 0],
    "write by a mask": lambda x: x.detach().index_put_((x > 0,), x.detach()[0, 0]),
    "masked_fill by a tensor": lambda x: x.masked_fill(x > 0, x.detach()[0, 0]),
    "where with a tensor of the CPU": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "to the GPU": lambda x: torch.zeros(3).to(x.device),
    "to the CPU": lambda x: x.cpu(),
    "copy_": lambda x: torch.zeros_like(x, device="cpu").copy_(x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_waits_is_noticed(gpu, wait):
    with pytest.raises(fake_cuda.HostWaits):
        wait(leaf(4, 5))


def test_a_number_that_is_rounded_to_16_bits_is_noticed(gpu):
    number = torch.ones((), device="cuda")
    with pytest.raises(fake_cuda.Narrowed):
        leaf(4, 5, dtype=torch.float16) * number
    leaf(4, 5, dtype=torch.float32) * number


def test_what_waits_inside_of_an_operator_is_noticed(gpu, monkeypatch):
    cross_entropy = pytest.importorskip("patchkernels.kernels.cross_entropy")
    monkeypatch.setattr(cross_entropy, "check_targets", lambda target, *_: int(target.max()))
    with pytest.raises(fake_cuda.HostWaits):
        patchkernels.patch_cross_entropy(leaf(N, V), labels(N, K))


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(("backend", "dtype"), FORMS)
def test_patch_embedding(gpu, backend, dtype, padding_idx):
    weight = leaf(V, D, dtype=dtype)
    for patch_size in (1, K):
        out = patchkernels.patch_embedding(
            labels(2, 40 * K), weight, patch_size, padding_idx=padding_idx, backend=backend
        )
        gpu.backward(out.sum())
    assert weight.grad.shape == weight.shape
    assert len(kernels(gpu)) == (0 if backend == "eager" else 6)


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "all options"))
@pytest.mark.parametrize("reduction", ["mean", "slot_mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_patch_cross_entropy(gpu, backend, reduction, options):
    logits, target = leaf(N, V), labels(N, K)
    for target_weight in (None, torch.rand(K, device="cuda")):
        loss, losses = patchkernels.patch_cross_entropy(
            logits, target, target_weight=target_weight, reduction=reduction, return_losses=True, backend=backend,
            **options,
        )  # fmt: skip
        gpu.backward(loss.sum())
        assert losses.shape == target.shape
    names = ["target_coefficients_kernel", "patch_cross_entropy_kernel", "weighted_sum_kernel", "scale_kernel"]
    in_two_passes = ["patch_cross_entropy_kernel"] * 2
    assert kernels(gpu) == ([] if backend == "eager" else 2 * (in_two_passes if reduction == "none" else names))


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(("reduction", "options"), [("mean", OPTIONS[0]), ("none", OPTIONS[1])])
@pytest.mark.parametrize(("backend", "dtype"), FORMS)
def test_linear_patch_cross_entropy(gpu, backend, dtype, reduction, options, memory):
    x, weight, bias, target = leaf(N, D, dtype=dtype), leaf(V, D, dtype=dtype), leaf(V, dtype=dtype), labels(N, K)
    for logits_bytes in (None, N * V):  # one chunk or slice, and several
        loss = patchkernels.linear_patch_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction, memory=memory, logits_bytes=logits_bytes,
            backend=backend, **options,
        )  # fmt: skip
        gpu.backward(loss.sum())
    assert {parameter.grad.dtype for parameter in (x, weight, bias)} == {dtype}
    with torch.no_grad():
        patchkernels.linear_patch_cross_entropy(x, weight, target, memory=memory, backend=backend)
    assert bool(kernels(gpu)) == (backend == "auto")


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_a_gpu_has_the_products_of_every_autocast(gpu, autocast, parameters):
    x, weight, bias = (leaf(*shape, dtype=parameters) for shape in ((N, D), (V, D), (V,)))
    with torch.autocast("cuda", autocast):
        loss = patchkernels.linear_patch_cross_entropy(x, weight, labels(N, K), linear_bias=bias)
    gpu.backward(loss)
    assert {tensor.grad.dtype for tensor in (x, weight, bias)} == {parameters}


def test_under_autocast(gpu):
    x, weight = leaf(N, D, dtype=torch.float32), leaf(V, D, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        gpu.backward(patchkernels.linear_patch_cross_entropy(x, weight, labels(N, K)))
    assert weight.grad.dtype == torch.float32
    assert gpu.sums == [(torch.float32, torch.bfloat16, torch.bfloat16)] * 2, "dx and dW, in fp32 as they are"
    loss = ["target_coefficients_kernel", "patch_cross_entropy_kernel", "weighted_sum_kernel"]
    assert kernels(gpu) == [*loss, *["scale_kernel"] * 2]


def test_the_oldest_torch_has_our_products(gpu):
    """torch for CUDA adds a product of 16-bit factors to an fp32 sum since 2.10 (its pull request 167931)."""
    x, weight = leaf(N, D), leaf(V, D)
    for memory in ("default", "low"):
        gpu.backward(
            patchkernels.linear_patch_cross_entropy(x, weight, labels(N, K), memory=memory, logits_bytes=N * V)
        )
    assert set(gpu.sums) == {(torch.float32, torch.bfloat16, torch.bfloat16)}
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (CHECKOUT / "pyproject.toml").read_text())
    assert TorchVersion(oldest) >= (2, 10)
    assert f" torch=={oldest}.0 " in (CHECKOUT / "Makefile").read_text()  # `make test-oldest-torch` runs with it


def test_next_patch_targets(gpu):
    assert patchkernels.next_patch_targets(labels(2, 12), K).shape == (2, 3, K)


@pytest.fixture
def group():
    """A process group of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_sharded_vocabulary(group, gpu):
    ops, target, needs = torch.ops.patchkernels, labels(N, K), [True, True, True]
    x, weight, bias = (t.detach() for t in (leaf(N, D), leaf(V, D), leaf(V)))
    settings = (0, 2 * V, group, N * V, "triton", *LossOptions(label_smoothing=0.1))
    for c in (None, torch.rand(N, K, device="cuda")):
        assert ops.linear_losses(x, weight, bias, target, c, needs, *settings)[0].shape == (N, K)
    one_chunk = (*settings[:3], 2 * N * V, *settings[4:])
    for keep in (False, True):
        results = ops.linear_loss(x, weight, bias, target, None, "mean", False, needs, keep, *one_chunk)
        factors = (x, weight) if keep else (None, None)
        dtypes = [torch.bfloat16] * 3
        gradients = ops.linear_gradients(results[0], *results[2:], *factors, needs, group, "triton", *dtypes)
        assert [gradient.shape for gradient in gradients] == [x.shape, weight.shape, bias.shape]
    assert "slice_statistics_kernel" in kernels(gpu)
    for padding_idx in (None, 3):
        assert ops.embedding_vocab_parallel(target, weight, padding_idx, 0, 2 * V, group).shape == (N, D)


@pytest.mark.parametrize(("patch_size", "autocast"), [(4, True), (1, False)])
def test_training_step(gpu, patch_size, autocast):
    settings = patchkernels.PatchLMConfig(
        vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, attention="sdpa",
    )  # fmt: skip
    with torch.device("cuda"):
        model = patchkernels.PatchLM(settings)
        ids, documents = labels(2, 64), torch.zeros(2, 64, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for document_ids in (None, documents):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(ids, ids, patch_size, document_ids=document_ids)
        gpu.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert {"patch_embedding_kernel", "patch_cross_entropy_kernel"} < set(kernels(gpu))


def test_launches_on_the_gpu_of_the_tensors(gpu):
    """Tensors are on cuda:1 while cuda:0 is current, before and after."""
    target = labels(N, K, device="cuda:1")
    table, logits, x = leaf(V, D, device="cuda:1"), leaf(N, V, device="cuda:1"), leaf(N, D, device="cuda:1")
    losses = [patchkernels.patch_embedding(target, table, K).sum(), patchkernels.patch_cross_entropy(logits, target)]
    for memory in ("default", "low"):
        losses.append(patchkernels.linear_patch_cross_entropy(x, table, target, memory=memory))
    for loss in losses:
        gpu.backward(loss)
    assert {(launch.current, *launch.tensors) for launch in gpu.launches} == {(1, 1)}
    assert {launch.kernel for launch in gpu.launches} == {
        "patch_embedding_kernel", "patch_embedding_block_sums_kernel", "patch_embedding_backward_kernel",
        "patch_cross_entropy_kernel", "slice_statistics_kernel", "target_coefficients_kernel", "weighted_sum_kernel",
        "scale_kernel",
    }  # fmt: skip
    assert gpu.current == 0
