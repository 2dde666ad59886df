"""The training step: forward, backward and AdamW, on a GPU under bf16 autocast, with equal positions for every K.

One comparison times whole steps: several patch sizes, and Hugging Face's LLaMA of the same shape. Another times the
parts of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import peers, shapes
from bench.compare import Comparison, Group
from bench.conftest import device
from bench.replay import replay
from patchkernels import PatchLM, PatchLMConfig, next_patch_targets, reference
from patchkernels.model.cost import count_flops
from patchkernels.model.rotary import rotary_table

pytestmark = pytest.mark.benchmark(timer=replay)
COMPILED_PATCH_SIZES = (1, 4)
PART_PATCH_SIZES = (1, 4)
PEERS = ("Hugging Face LLaMA", "Hugging Face LLaMA, compiled", "Hugging Face LLaMA with Liger")
STEPS = (
    *(f"PatchLM, K={k}" for k in shapes.STEP_PATCH_SIZES),
    *(f"PatchLM compiled, K={k}" for k in COMPILED_PATCH_SIZES),
    *PEERS,
)
PARTS = tuple(
    f"{part}, K={k}" for k in PART_PATCH_SIZES for part in ("embedding", "transformer", "head and loss", "optimizer")
)


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (kind, *shape))), contenders, partial(compare, shape))
        for shape in shapes.STEP[scale]
        for kind, contenders, compare in (("step", STEPS, compare_steps), ("parts", PARTS, compare_parts))
    ]


def config_of(shape: shapes.Step) -> PatchLMConfig:
    return PatchLMConfig.preset(shape.preset, max_position_embeddings=shape.context)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def token_ids(shape: shapes.Step, patch_size: int, on: torch.device) -> Tensor:  # (rows, context * K)
    return torch.randint(0, config_of(shape).vocab_size, (shape.rows, shape.context * patch_size), device=on)


def autocast(on: torch.device) -> torch.autocast:
    return torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda")


def take_step(loss: Any, optimizer: torch.optim.Optimizer, on: torch.device) -> list[Tensor]:
    """Takes a training step. It returns no results, since they change with every step; they are checked beforehand."""
    with autocast(on):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return []


def check_loss(model: PatchLM, call: Any, ids: Tensor, patch_size: int) -> None:
    """``AssertionError`` unless ``call``, the model or its compiled form, returns the loss of the model's logits."""
    with torch.no_grad(), autocast(ids.device):
        logits, target = model(ids, patch_size=patch_size), next_patch_targets(ids, patch_size)
        expected = reference.patch_cross_entropy(logits.float(), target)
    with autocast(ids.device):
        torch.testing.assert_close(call(ids, ids, patch_size).detach(), expected, rtol=1e-3, atol=0)


def hugging_face(model: PatchLM, liger: Any = None) -> Any:
    """The LLaMA of transformers with the weights of ``model``, or :class:`peers.Missing`.

    If ``liger`` is the module ``liger_kernel.transformers``, Liger's kernels replace some of the layers.
    """
    transformers = peers.optional("transformers", "transformers")
    if isinstance(transformers, peers.Missing):
        return transformers
    config = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
            rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta, use_cache=False,
        )
    )  # fmt: skip
    llama.load_state_dict(model.state_dict())
    if liger is not None:
        liger.apply_liger_kernel_to_llama(model=llama)
    return llama.to(next(model.parameters()).device)


class Step(NamedTuple):
    """A contender: the model whose parameters a step changes, and the function that computes its loss."""

    model: nn.Module
    loss: Callable[[], Tensor]


def our_steps(model: PatchLM, shape: shapes.Step, on: torch.device) -> dict[str, Step]:
    compiled = torch.compile(model, dynamic=False)
    steps = {}
    for name, call, patch_sizes in (
        ("PatchLM", model, shapes.STEP_PATCH_SIZES),
        ("PatchLM compiled", compiled, COMPILED_PATCH_SIZES),
    ):
        for k in patch_sizes:
            ids = token_ids(shape, k, on)
            check_loss(model, call, ids, k)
            steps[f"{name}, K={k}"] = Step(model, partial(call, ids, ids, k))
    return steps


def peer_steps(model: PatchLM, shape: shapes.Step, on: torch.device) -> dict[str, Step | peers.Missing]:
    """The peers at K = 1, each with the weights of ``model``. Their loss must be that of ``model``."""
    ids = token_ids(shape, 1, on)
    llama = hugging_face(model)
    with_liger = peers.bind(peers.on_gpu("liger-kernel", "liger_kernel.transformers", on), partial(hugging_face, model))
    steps: dict[str, Step | peers.Missing] = {}
    for name, peer in zip(PEERS, (llama, llama, with_liger)):
        if isinstance(peer, peers.Missing):
            steps[name] = peer
            continue
        call = torch.compile(peer, dynamic=False) if "compiled" in name else peer
        steps[name] = Step(peer, lambda call=call: call(input_ids=ids, labels=ids).loss)
        with autocast(on):
            torch.testing.assert_close(steps[name].loss(), model(ids, ids), rtol=1e-2, atol=0)
    return steps


def compare_steps(shape: shapes.Step) -> Comparison:
    on, config = device(), config_of(shape)
    model = PatchLM(config).to(on)
    steps = our_steps(model, shape, on) | peer_steps(model, shape, on)
    # Contenders that share a model share its optimizer too, so that its state is in memory once.
    optimizers = {id(s.model): optimizer_of(s.model) for s in steps.values() if not isinstance(s, peers.Missing)}
    return Comparison(
        operator="training step",
        case="forward + backward + AdamW",
        shape=shape_of(shape),
        dtype=torch.bfloat16 if on.type == "cuda" else torch.float32,
        device=on,
        contenders={
            name: peers.bind(s, lambda s: partial(take_step, s.loss, optimizers[id(s.model)], on))
            for name, s in steps.items()
        },
        flops=count_flops(config, shape.rows, shape.context, 1),
        extra={name: tokens_and_flops(name, shape) for name in steps},
        budget_seconds=6.0,
    )


def shape_of(shape: shapes.Step) -> dict[str, Any]:
    return {"preset": shape.preset, "rows": shape.rows, "positions": shape.context}


def tokens_and_flops(name: str, shape: shapes.Step) -> dict[str, Any]:
    """The raw tokens that a contender's step reads and, for our uncompiled model, the FLOPs per raw token.

    The report computes the cost of a whole run from these.
    """
    patch_size = int(name.split("K=")[1]) if "K=" in name else 1
    raw_tokens = shape.rows * shape.context * patch_size
    if not name.startswith("PatchLM, K="):
        return {"raw_tokens": raw_tokens}
    flops = count_flops(config_of(shape), shape.rows, shape.context, patch_size)
    return {"raw_tokens": raw_tokens, "flops_per_raw_token": flops / raw_tokens}


def compare_parts(shape: shapes.Step) -> Comparison:
    on, config = device(), config_of(shape)
    model = PatchLM(config).to(on)
    optimizer = optimizer_of(model)
    body, head = model.model, model.lm_head

    def embed(ids: Tensor, k: int, upstream: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(body.embed_tokens(ids, k), body.embed_tokens.weight, upstream))

    def transform(x: Tensor, upstream: Tensor) -> list[Tensor]:
        with autocast(on):
            rotary = rotary_table(x, None, config.head_size, config.rope_theta)
            out = x
            for block in body.layers:
                out = block(out, rotary, None)
            out = body.norm(out)
        out.backward(upstream)
        model.zero_grad(set_to_none=True)
        return []

    def loss(x: Tensor, target: Tensor) -> list[Tensor]:
        with autocast(on):
            value = head(x, target)
        return list(torch.autograd.grad(value, (x, head.weight)))

    def update() -> list[Tensor]:
        for parameter, gradient in zip(model.parameters(), parameter_gradients):
            parameter.grad = gradient
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return []

    parameter_gradients = [torch.full_like(parameter, 1e-3) for parameter in model.parameters()]
    x = torch.randn(shape.rows, shape.context, config.hidden_size, device=on, requires_grad=True)
    upstream = torch.randn_like(x)
    contenders: dict[str, Any] = {}
    for k in PART_PATCH_SIZES:
        ids = token_ids(shape, k, on)
        contenders[f"embedding, K={k}"] = partial(embed, ids, k, upstream)
        contenders[f"transformer, K={k}"] = partial(transform, x, upstream)
        contenders[f"head and loss, K={k}"] = partial(loss, x, next_patch_targets(ids, k))
        contenders[f"optimizer, K={k}"] = update
    return Comparison(
        operator="parts of a step",
        case="forward + backward",
        shape=shape_of(shape),
        dtype=torch.bfloat16 if on.type == "cuda" else torch.float32,
        device=on,
        contenders=contenders,
        budget_seconds=3.0,
    )


def test_training_step(comparison, contender, record):
    record(comparison, contender)
