"""The training step: forward, backward and AdamW under bf16 autocast, at equal positions whatever K is.

Patch sizes and Hugging Face's LLaMA of equal shape are contenders of one comparison; so are the parts of a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import peers, shapes
from bench.compare import Comparison, Group
from bench.conftest import device
from bench.replay import replay
from patchkernels import PatchLM, PatchLMConfig, next_patch_targets, reference
from patchkernels.model import rotary_table
from patchkernels.plan import count_flops

pytestmark = pytest.mark.benchmark(timer=replay)
PEERS = ("Hugging Face LLaMA", "Hugging Face LLaMA, compiled", "Hugging Face LLaMA with Liger")
STEPS = (
    *(f"PatchLM, K={k}" for k in shapes.STEP_PATCH_SIZES),
    *(f"PatchLM compiled, K={k}" for k in (1, 4)),
    *PEERS,
)
PARTS = tuple(f"{part}, K={k}" for k in (1, 4) for part in ("embedding", "transformer", "head and loss", "optimizer"))


def groups(scale: str) -> list[Group]:
    return [
        Group("-".join(map(str, (kind, *shape))), contenders, partial(compare, shape))
        for shape in shapes.STEP[scale]
        for kind, contenders, compare in (("step", STEPS, compare_steps), ("parts", PARTS, compare_parts))
    ]


def settings(shape: shapes.Step) -> PatchLMConfig:
    return PatchLMConfig.preset(shape.preset, max_position_embeddings=shape.context)


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def ids_of(shape: shapes.Step, patch_size: int, on: torch.device) -> Tensor:
    return torch.randint(0, settings(shape).vocab_size, (shape.rows, shape.context * patch_size), device=on)


def autocast(on: torch.device) -> torch.autocast:
    return torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda")


def step(loss: Any, adam: torch.optim.Optimizer, on: torch.device) -> list[Tensor]:
    with autocast(on):
        value = loss()
    value.backward()
    adam.step()
    adam.zero_grad(set_to_none=True)
    return []


def check(ours: PatchLM, call: Any, ids: Tensor, patch_size: int) -> None:
    """The fused loss, of the model or compiled, is that of the logits."""
    with torch.no_grad(), autocast(ids.device):
        logits, target = ours(ids, patch_size=patch_size), next_patch_targets(ids, patch_size)
        expected = reference.patch_cross_entropy(logits.float(), target)
    with autocast(ids.device):
        torch.testing.assert_close(call(ids, ids, patch_size).detach(), expected, rtol=1e-3, atol=0)


def hugging_face(ours: PatchLM, liger: Any = None) -> Any:
    """The LLaMA of transformers with the same weights, or :class:`peers.Missing`."""
    transformers = peers.optional("transformers", "transformers")
    if isinstance(transformers, peers.Missing):
        return transformers
    config = ours.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
            rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta, use_cache=False,
        )
    )  # fmt: skip
    model.load_state_dict(ours.state_dict())
    if liger is not None:
        liger.apply_liger_kernel_to_llama(model=model)
    return model.to(next(ours.parameters()).device)


def compare_steps(shape: shapes.Step) -> Comparison:
    on, config = device(), settings(shape)
    positions = shape.rows * shape.context
    losses: dict[str, Any] = {}
    models: dict[str, nn.Module] = {}
    ours = PatchLM(config).to(on)
    compiled = torch.compile(ours, dynamic=False)
    for name, call, sizes in (("PatchLM", ours, shapes.STEP_PATCH_SIZES), ("PatchLM compiled", compiled, (1, 4))):
        for k in sizes:
            ids = ids_of(shape, k, on)
            check(ours, call, ids, k)
            losses[f"{name}, K={k}"] = partial(call, ids, ids, k)
            models[f"{name}, K={k}"] = ours
    ids = ids_of(shape, 1, on)
    plain = hugging_face(ours)
    patched = peers.bind(peers.on_gpu("liger-kernel", "liger_kernel.transformers", on), partial(hugging_face, ours))
    for name, theirs in zip(PEERS, (plain, plain, patched)):
        if not isinstance(theirs, peers.Missing):
            call = torch.compile(theirs, dynamic=False) if "compiled" in name else theirs
            losses[name] = lambda call=call: call(input_ids=ids, labels=ids).loss
            with autocast(on):
                torch.testing.assert_close(losses[name](), ours(ids, ids), rtol=1e-2, atol=0)
        models[name] = theirs
    adams = {id(m): optimizer(m) for m in models.values() if not isinstance(m, peers.Missing)}
    contenders = {
        name: m if isinstance(m, peers.Missing) else partial(step, losses[name], adams[id(m)], on)
        for name, m in models.items()
    }
    return Comparison(
        operator="training step",
        case="forward + backward + AdamW",
        shape={"preset": shape.preset, "rows": shape.rows, "positions": shape.context},
        dtype=torch.bfloat16 if on.type == "cuda" else torch.float32,
        device=on,
        contenders=contenders,
        flops=count_flops(config, shape.rows, shape.context, 1),
        extra={
            name: {"raw_tokens": positions * int(name.split("K=")[1]) if "K=" in name else positions}
            for name in contenders
        }
        | {
            f"PatchLM, K={k}": {
                "raw_tokens": positions * k,
                "flops_per_raw_token": count_flops(config, shape.rows, shape.context, k) / (positions * k),
            }
            for k in shapes.STEP_PATCH_SIZES
        },
        budget_seconds=6.0,
    )


def compare_parts(shape: shapes.Step) -> Comparison:
    on, config = device(), settings(shape)
    model = PatchLM(config).to(on)
    adam = optimizer(model)
    body, head = model.model, model.lm_head
    contenders: dict[str, Any] = {}

    def embed(ids: Tensor, k: int, upstream: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(body.embed_tokens(ids, k), body.embed_tokens.weight, upstream))

    def transform(x: Tensor, upstream: Tensor) -> list[Tensor]:
        with autocast(on):
            rotary = rotary_table(x, None, config)
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
        for parameter, gradient in zip(model.parameters(), fixed):
            parameter.grad = gradient
        adam.step()
        model.zero_grad(set_to_none=True)
        return []

    fixed = [torch.full_like(parameter, 1e-3) for parameter in model.parameters()]
    x = torch.randn(shape.rows, shape.context, config.hidden_size, device=on, requires_grad=True)
    upstream = torch.randn_like(x)
    for k in (1, 4):
        ids = ids_of(shape, k, on)
        contenders[f"embedding, K={k}"] = partial(embed, ids, k, upstream)
        contenders[f"transformer, K={k}"] = partial(transform, x, upstream)
        contenders[f"head and loss, K={k}"] = partial(loss, x, next_patch_targets(ids, k))
        contenders[f"optimizer, K={k}"] = update
    return Comparison(
        operator="parts of a step",
        case="forward + backward",
        shape={"preset": shape.preset, "rows": shape.rows, "positions": shape.context},
        dtype=torch.bfloat16 if on.type == "cuda" else torch.float32,
        device=on,
        contenders=contenders,
        budget_seconds=3.0,
    )


def test_training_step(comparison, contender, record):
    record(comparison, contender)
