"""A vocabulary or a sequence divided over several processes gives the values and gradients of one process."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run
from oracle import assert_as_exact_as_plain, outputs_and_gradients, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from patchkernels import (
    PatchEmbedding,
    PatchLMHead,
    linear_patch_cross_entropy,
    next_patch_targets,
    patch_embedding,
    reference,
)

ROWS, HIDDEN, VOCAB, SLOTS = 9, 6, 23, 3
SMALL_VOCAB = 4  # on 3 processes the last one's shard is empty
LOSSES = [
    {"reduction": reduction, **options}
    for reduction, options in itertools.product(
        ("mean", "slot_mean", "sum", "none"),
        (
            {},
            {"label_smoothing": 0.1, "z_loss_weight": 0.01},
            {"softcap": 3.0, "bias": True},
            {"weights": True, "label_smoothing": 0.2, "softcap": 2.0},
        ),
    )
]


def shard_of(tensor):
    """This process's rows of a vocabulary, as DTensor divides them."""
    size = -(-len(tensor) // dist.get_world_size())
    return tensor[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def one_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def replicated(tensor):
    """The differentiable DTensor of a tensor that is the same on every process."""
    return DTensor.from_local(tensor, one_mesh(), [Replicate()], run_check=False)


def loss_of_shards(x, weight, target, **options):
    """The loss for hidden states that are the same on every process and a head in shards."""
    return linear_patch_cross_entropy(replicated(x), weight, target, **options).to_local()


def sharded_rows(local, vocab):
    """The differentiable DTensor of ``vocab`` rows of which this process holds ``local`` (or numbers, for a bias)."""
    mesh, shape = one_mesh(), (vocab, *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def inputs(slots=SLOTS, dtype=torch.float64, vocab=VOCAB):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((ROWS, HIDDEN), (vocab, HIDDEN), (vocab,)))
    target = torch.randint(0, vocab, (ROWS, slots))
    target[torch.rand(target.shape) < 0.2] = -100
    target[0] = target[0, :1]
    return x, weight, bias, target


def check_losses(vocab):
    for slots, dtype, budget in itertools.product(
        (1, SLOTS), (torch.float64, torch.float32, torch.bfloat16), (None, 64)
    ):
        x, weight, bias, target = inputs(slots, dtype, vocab)
        for options in LOSSES:
            kept = {key: value for key, value in options.items() if key not in ("bias", "weights")}
            if "weights" in options:
                kept["target_weight"] = torch.linspace(0.5, 1.5, slots)
            leaves = [x, weight, bias] if "bias" in options else [x, weight]

            def full(x, weight, *bias, options=kept, target=target):
                return reference.patch_cross_entropy(F.linear(x, weight, *bias), target, **options)

            def one_process(x, weight, bias=None, options=kept, target=target, budget=budget):
                return linear_patch_cross_entropy(x, weight, target, linear_bias=bias, logits_bytes=budget, **options)

            def sharded(x, weight, bias=None, loss=one_process):
                return loss(
                    replicated(x), *(sharded_rows(t, vocab) for t in (weight, bias) if t is not None)
                ).to_local()

            exact = outputs_and_gradients(full, *(t.double() for t in leaves))
            # test_patch_cross_entropy.py shows that one process is as exact as plain PyTorch
            one = outputs_and_gradients(one_process, *leaves)
            ours = outputs_and_gradients(sharded, x, *(shard_of(t) for t in leaves[1:]))
            compare_parts(ours, one, exact, whole=2)
            with torch.no_grad():
                loss = sharded(x, *(shard_of(t) for t in leaves[1:]))
            assert_as_exact_as_plain(loss, one[0], exact[0])


def compare_parts(ours, others, exact, whole):
    """The first ``whole`` results must be the same on all ranks; of the others every rank has its rows."""
    for i, (a, b, c) in enumerate(zip(ours, others, exact, strict=True)):
        if i < whole:
            assert_as_exact_as_plain(a, b, c)
        else:
            bound = 2 * max(relative_error(b, c), 4 * torch.finfo(a.dtype).eps)
            assert float((a.double() - shard_of(c)).norm()) <= bound * float(c.norm())


def check_kernels():
    """The Triton backend under Triton's interpreter."""
    x, weight, bias, target = inputs(dtype=torch.float32)
    for options in ({}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss_weight": 0.01}):

        def loss(x, weight, bias, options=options, **more):
            return linear_patch_cross_entropy(x, weight, target, linear_bias=bias, **options, **more)

        one = outputs_and_gradients(loss, x, weight, bias)
        exact = outputs_and_gradients(loss, *(t.double() for t in (x, weight, bias)))

        def parallel(x, weight, bias, loss=loss):
            shards = (sharded_rows(weight, VOCAB), sharded_rows(bias, VOCAB))
            return loss(replicated(x), *shards, backend="triton").to_local()

        compare_parts(outputs_and_gradients(parallel, x, shard_of(weight), shard_of(bias)), one, exact, whole=2)
    ids = torch.randint(0, VOCAB, (2, 8))
    embedding = functools.partial(patch_embedding, patch_size=4)
    one, exact = (outputs_and_gradients(functools.partial(embedding, ids), w) for w in (weight, weight.double()))
    parallel = outputs_and_gradients(
        lambda local: embedding(replicated(ids), sharded_rows(local, VOCAB), backend="triton").to_local(),
        shard_of(weight),
    )
    compare_parts(parallel, one, exact, whole=1)


def check_large_logits():
    """log-sum-exp rounded near 1e6 would be off by 0.03. All logits are fp32 numbers, so that no product rounds."""
    _, _, _, target = inputs()
    x = torch.randint(-2, 3, (ROWS, HIDDEN)).float()
    weight, bias = torch.randint(-8, 9, (VOCAB, HIDDEN)) / 8, 1e6 + torch.randint(-8, 9, (VOCAB,)) / 8
    for options in ({}, {"label_smoothing": 0.1}):

        def loss(x, weight, bias, options=options, **more):
            return linear_patch_cross_entropy(x, weight, target, linear_bias=bias, **options, **more)

        def parallel(x, weight, bias, loss=loss):
            return loss(replicated(x), sharded_rows(weight, VOCAB), sharded_rows(bias, VOCAB)).to_local()

        one = outputs_and_gradients(loss, x, weight, bias)
        exact = outputs_and_gradients(loss, *(t.double() for t in (x, weight, bias)))
        compare_parts(outputs_and_gradients(parallel, x, shard_of(weight), shard_of(bias)), one, exact, whole=2)


def check_errors_ignored_rows_and_frozen_parts(vocab):
    x, weight, _, target = inputs(vocab=vocab)
    local = shard_of(weight).clone().requires_grad_()
    hidden = x.clone().requires_grad_()
    loss = loss_of_shards(hidden, sharded_rows(local, vocab), torch.full_like(target, -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not local.grad.any()
    for frozen in (0, 1):
        leaves = [hidden.detach().clone(), local.detach().clone()]
        leaves[1 - frozen].requires_grad_()
        loss_of_shards(leaves[0], sharded_rows(leaves[1], vocab), target).backward()
        full = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        reference.patch_cross_entropy(full[0] @ full[1].T, target).backward()
        expected = full[0].grad if frozen else shard_of(full[1].grad)
        torch.testing.assert_close(leaves[1 - frozen].grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of_shards(x.float(), sharded_rows(local.float(), vocab), target)
    torch.testing.assert_close(loss, reference.patch_cross_entropy(x @ weight.T, target).float(), rtol=3e-2, atol=0)
    for bad in (vocab, -1):
        target[1, 1] = bad
        with pytest.raises(IndexError, match=rf"in \[0, {vocab}\)"):
            loss_of_shards(x, sharded_rows(local, vocab), target)
    with pytest.raises(ValueError, match="memory='low' is for a head that one process holds"):
        loss_of_shards(x, sharded_rows(local, vocab), target, memory="low")
    mesh = one_mesh()
    table = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"sharded by its rows.*got \(Shard\(dim=1\),\)"):
        loss_of_shards(x, table, target)
    with pytest.raises(ValueError, match="weight must be sharded by its rows"):
        patch_embedding(replicated(torch.zeros(2, 3, dtype=torch.int64)), table, 3)
    if vocab > dist.get_world_size():
        uneven = weight[: vocab - 1] if dist.get_rank() == 0 else weight[:1]
        with pytest.raises(ValueError, match=rf"torch.chunk.* of its {vocab} rows, got {len(uneven)}"):
            loss_of_shards(x, sharded_rows(uneven, vocab), target)
        with pytest.raises(ValueError, match=rf"torch.chunk.* of its {vocab} rows, got {len(uneven)}"):
            patch_embedding(replicated(torch.zeros(2, 3, dtype=torch.int64)), sharded_rows(uneven, vocab), 3)
    table = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="input must be replicated"):
        linear_patch_cross_entropy(distribute_tensor(x, mesh, [Shard(0)]), table, target)


def check_embedding(vocab):
    torch.manual_seed(0)
    pad = vocab // 4
    for dtype, size, padding in itertools.product((torch.float64, torch.float32, torch.bfloat16), (1, 4), (None, pad)):
        weight, ids = torch.randn(vocab, HIDDEN, dtype=dtype), torch.randint(0, vocab, (3, 16))
        weight[pad, 0] = -0.0
        ids[0, :6] = pad

        def full(weight, ids=ids, size=size, padding=padding):
            return reference.patch_embedding(ids, weight, size, padding_idx=padding)

        def sharded(weight, ids=ids, size=size, padding=padding):
            table = sharded_rows(weight, vocab)
            return patch_embedding(replicated(ids), table, size, padding_idx=padding).to_local()

        exact, eager = outputs_and_gradients(full, weight.double()), outputs_and_gradients(full, weight)
        ours = outputs_and_gradients(sharded, shard_of(weight))
        compare_parts(ours, eager, exact, whole=1)
        if size == 1:
            assert torch.equal(ours[0], F.embedding(ids, weight))
            assert torch.equal(ours[0].signbit(), F.embedding(ids, weight).signbit())
        again = outputs_and_gradients(sharded, shard_of(weight))
        assert all(torch.equal(a, b) for a, b in zip(again, ours))
    ids[1, 1] = vocab
    with pytest.raises(IndexError, match=rf"in \[0, {vocab}\), got {vocab}"):
        patch_embedding(replicated(ids), sharded_rows(shard_of(weight), vocab), 4)


def check_modules_with_sharded_tensors():
    """A tied head and embedding, sharded as torch's tensor parallelism does."""
    mesh = one_mesh()
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 12))
    target = next_patch_targets(ids, 4)
    embedding = PatchEmbedding(VOCAB, HIDDEN, 4, dtype=torch.float64)
    head = PatchLMHead(HIDDEN, VOCAB, bias=True, dtype=torch.float64)
    head.weight = embedding.weight
    expected = head(embedding(ids), target)
    expected.backward()
    gradients = [embedding.weight.grad, head.bias.grad]
    shared = torch.nn.Parameter(distribute_tensor(embedding.weight.detach(), mesh, [Shard(0)]))
    embedding.weight = head.weight = shared
    head.bias = torch.nn.Parameter(distribute_tensor(head.bias.detach(), mesh, [Shard(0)]))
    hidden = embedding(replicated(ids))
    loss = head(hidden, target)
    assert isinstance(hidden, DTensor) and isinstance(loss, DTensor)
    loss.backward()
    torch.testing.assert_close(loss.to_local(), expected.detach())
    for parameter, gradient in zip((shared, head.bias), gradients):
        assert parameter.grad.placements == (Shard(0),)
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
    weight, bias = (t.detach().redistribute(mesh, [Replicate()]) for t in (shared, head.bias))
    of_whole = linear_patch_cross_entropy(hidden.detach(), weight, replicated(target), linear_bias=bias)
    torch.testing.assert_close(of_whole.to_local(), loss.to_local())


def check_parameters_of_fsdp():
    """Outside of its module, a parameter of FSDP2 looks like a sharded vocabulary but meets plain tensors."""
    torch.manual_seed(dist.get_rank())  # every process has inputs of its own
    model = torch.nn.Sequential(PatchEmbedding(VOCAB, HIDDEN, 2), PatchLMHead(HIDDEN, VOCAB, bias=True))
    for unit in (*model, model):
        fully_shard(unit)
    embedding, head = model
    ids, x = torch.randint(0, VOCAB, (3, 4)), torch.randn(3, 2, HIDDEN)
    target = next_patch_targets(ids, 2)
    assert head.weight.placements == (Shard(0),)
    with pytest.raises(ValueError, match=r"weight is a DTensor but input_ids is a plain tensor.* FSDP2"):
        patch_embedding(ids, embedding.weight, 2)
    with pytest.raises(ValueError, match=r"linear_weight is a DTensor but input is a plain tensor.* FSDP2"):
        linear_patch_cross_entropy(x, head.weight, target)
    with pytest.raises(ValueError, match=r"linear_weight is a DTensor but linear_bias is a plain tensor"):
        linear_patch_cross_entropy(replicated(x), head.weight, target, linear_bias=torch.zeros(len(head.weight)))
    with pytest.raises(ValueError, match=r"input is a DTensor but linear_weight is a plain tensor"):
        linear_patch_cross_entropy(replicated(x), head.weight.full_tensor(), target)
    whole = head.weight.full_tensor(), head.bias.full_tensor()
    expected = linear_patch_cross_entropy(x, whole[0], target, linear_bias=whole[1])
    torch.testing.assert_close(head(x, target), expected)
    other_mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
    elsewhere = DTensor.from_local(x, other_mesh, [Replicate(), Replicate()], run_check=False)
    with pytest.raises(ValueError, match="linear_weight and input must be on one mesh"):
        linear_patch_cross_entropy(elsewhere, sharded_rows(shard_of(whole[0]), VOCAB), target)


def check_communication():
    """Four targets take as many reductions as one: two, and one for dx."""
    counts = []
    for slots in (1, 4):
        x, weight, _, target = inputs(slots)
        head = sharded_rows(shard_of(weight).clone().requires_grad_(), VOCAB)
        calls, own = [], dist.all_reduce
        dist.all_reduce = lambda *arguments, calls=calls, own=own: calls.append(1) or own(*arguments)
        loss_of_shards(x.requires_grad_(), head, target).backward()
        dist.all_reduce = own
        counts.append(len(calls))
    return counts


def check_sequence():
    """Every rank has its part of a sequence's patches. Its last target is the next rank's first patch."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), 3
    lengths = (9, 6, 12)[: dist.get_world_size()]
    torch.manual_seed(0)
    labels, weight = torch.randint(0, VOCAB, (2, sum(lengths))), torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    labels[1, 4:11] = -100
    whole = next_patch_targets(labels, size)
    part = labels.split(lengths, 1)[rank]
    ours = next_patch_targets(part, size, process_group=group)
    assert torch.equal(ours, whole.split([n // size for n in lengths], 1)[rank])
    leaf = weight.clone().requires_grad_()
    x = patch_embedding(labels.clamp(min=0), leaf, size)
    reference.patch_cross_entropy(x @ leaf.T, whole).backward()
    local = weight.clone().requires_grad_()
    x = patch_embedding(part.clamp(min=0), local, size)
    count = (ours != -100).sum()
    dist.all_reduce(count)
    (linear_patch_cross_entropy(x, local, ours, reduction="sum") / count).backward()
    dist.all_reduce(local.grad)
    torch.testing.assert_close(local.grad, leaf.grad)
    with pytest.raises(ValueError, match="every process needs a patch"):
        next_patch_targets(part[:, :0], size, process_group=group)


def check_tensor_parallel_model():
    """An enabled Llama, its embedding and head sharded by torch's tensor parallelism, in a patch and a token step."""
    import transformers

    from patchkernels import hf

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 8))
    mesh = one_mesh()
    for embedding_style in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        model = hf.enable(transformers.LlamaForCausalLM(config).double(), 4)
        expected = {}
        for size in (4, 1):
            model.patch_size = size
            loss = model(input_ids=ids, labels=ids).loss
            expected[size] = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        plan = {"model.embed_tokens": embedding_style, "lm_head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, mesh, plan)
        assert isinstance(model.lm_head.weight, DTensor)
        for size in (4, 1):
            model.patch_size = size
            loss = model(input_ids=ids, labels=ids).loss
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for a, b in zip([loss.detach(), *gradients], expected[size], strict=True):
                a = a.full_tensor() if isinstance(a, DTensor) else a
                assert relative_error(a, b) < 1e-6


def test_a_tensor_parallel_model():
    pytest.importorskip("transformers")
    run(check_tensor_parallel_model, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_and_gradients(world_size):
    run(check_all, world_size)


def check_all():
    for vocab in (VOCAB, SMALL_VOCAB) if dist.get_world_size() == 3 else (VOCAB,):
        check_losses(vocab)
        check_errors_ignored_rows_and_frozen_parts(vocab)
        check_embedding(vocab)
    check_kernels()
    check_large_logits()
    check_modules_with_sharded_tensors()
    check_parameters_of_fsdp()
    check_sequence()


def test_four_targets_need_no_more_reductions_than_one():
    for one, four in run(check_communication, 2):
        assert one == four == 3


def test_one_process_is_a_group_too():
    run(check_sequence, 1)
