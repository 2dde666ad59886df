"""What a run will cost before it is run: steps, FLOPs, cost ratio, memory, hours."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from patchkernels.linear_parts import LOGITS_BYTES
from patchkernels.model import PatchLM, PatchLMConfig
from patchkernels.schedule import Schedule, parse_phases


def count_flops(config: PatchLMConfig, rows: int, positions: int, patch_size: int) -> int:
    """FLOPs of one forward and backward, counted by ``FlopCounterMode`` on the meta device.

    Matrix products alone, attention's full square included, recomputation left out: the usual model FLOPs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(
        config, attention="sdpa", activation_checkpointing=False, max_position_embeddings=max(positions, 1)
    )
    with torch.device("meta"):
        model = PatchLM(config)
        ids = torch.zeros(1, positions * patch_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids, patch_size).backward()
    return rows * int(counter.get_total_flops())  # linear in the rows


def memory_bytes(
    config: PatchLMConfig, rows: int, positions: int, shards: int = 1, tensor_parallel: int = 1
) -> dict[str, int]:
    """An estimate for one GPU, fp32 parameters under bf16 autocast with AdamW, N parameters on S shards:

        16 N / S  +  4 (N_b + N_r)  +  activations / TP  +  logits  +  4 V D / TP

    Parameters, gradients and two moments: 16 bytes a parameter, divided by S = FSDP's shards times tensor parallel.
    With shards, the unit at work and the one fetched ahead are whole: a block and the root (embedding, norm, head).
    Activations a layer and position, in bf16: ``2 (10 D + 2 H_q + 4 H_kv + 4 F)`` bytes (with activation checkpointing
    a block's input alone, and one block besides). Logits: the budget of the fused loss; ``4 V D``: the head's gradient
    in fp32. The phase changes none of it at constant positions a step; at constant raw tokens activations are divided
    by K.
    """
    with torch.device("meta"):
        model = PatchLM(config)
    parameters, units = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers))
    layers = config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_size, config.key_value_heads * config.head_size
    block = 2 * (10 * config.hidden_size + 2 * queries + 4 * keys + 4 * config.intermediate_size) * rows * positions
    kept = 2 * config.hidden_size * rows * positions * layers + block
    logits = min(LOGITS_BYTES["cuda"], 2 * rows * positions * config.vocab_size // tensor_parallel)
    whole = 4 * (units // layers + parameters - units) // tensor_parallel
    return {
        "parameters": 4 * parameters // (shards * tensor_parallel),
        "gradients": 4 * parameters // (shards * tensor_parallel),
        "AdamW moments": 8 * parameters // (shards * tensor_parallel),
        **({"units at work": whole} if shards > 1 else {}),
        "activations": (kept if config.activation_checkpointing else block * layers) // tensor_parallel,
        "logits and head gradient": logits + 4 * config.vocab_size * config.hidden_size // tensor_parallel,
    }


@dataclass
class PlanConfig:
    """What `patchkernels plan` is asked."""

    model: str = "370m"
    """A preset: demo, 42m, 124m, 370m, 780m, 1.3b, 2.7b, 8b, 70b."""
    tokens: float = 10e9
    """Raw tokens in all."""
    phases: str = "4:2/3,1:1/3"
    """Patch size and share of each phase."""
    shares_of: str = "data"
    """Shares of the data (lambda) or of the steps (r)."""
    convention: str = "positions"
    """Constant positions a step, or constant raw tokens."""
    batch_size: int = 256
    """Rows a step, over all GPUs."""
    context: int = 2048
    """Positions of a row in the token phase."""
    tflops: float = 400.0
    """Model TFLOP/s that one GPU achieves."""
    gpus: int = 1
    rows_per_gpu: int = 8
    """Rows on a GPU at a time, for the memory estimate."""
    shards: int = 1
    """GPUs that FSDP shards a replica's parameters over, for the memory estimate."""
    tensor_parallel: int = 1
    """GPUs that share every matrix, for the memory estimate."""
    activation_checkpointing: bool = False


def plan(config: PlanConfig) -> dict[str, Any]:
    """The figures of the table that ``patchkernels plan`` prints. ``ValueError`` on nonsense."""
    if not 0 < config.tokens < math.inf:
        raise ValueError(f"tokens must be positive and finite, got {config.tokens}")
    if config.tflops <= 0 or config.gpus < 1 or config.rows_per_gpu < 1:
        raise ValueError(
            f"tflops, gpus and rows_per_gpu must be positive, got {config.tflops}, {config.gpus}, {config.rows_per_gpu}"
        )
    if min(config.shards, config.tensor_parallel) < 1 or config.gpus % (config.shards * config.tensor_parallel):
        raise ValueError(
            f"shards times tensor_parallel must divide gpus, got {config.shards} x {config.tensor_parallel} of "
            f"{config.gpus}"
        )
    phases = parse_phases(config.phases, config.shares_of, config.convention)
    schedule = Schedule(phases, int(config.tokens), config.batch_size, config.context, config.convention)
    model = PatchLMConfig.preset(
        config.model,
        max_position_embeddings=config.context,
        activation_checkpointing=config.activation_checkpointing,
    )
    rate = config.tflops * 1e12 * config.gpus * 3600
    rows: list[dict[str, Any]] = []
    for phase, steps in zip(schedule.phases, schedule.steps):
        flops = steps * count_flops(model, config.batch_size, schedule.positions(phase), phase.patch_size)
        tokens = steps * config.batch_size * schedule.row_tokens(phase)
        rows.append({"patch_size": phase.patch_size, "share": phase.share, "steps": steps, "raw_tokens": tokens,
                     "flops": flops, "hours": flops / rate})  # fmt: skip
    token_level = count_flops(model, 1, config.context, 1) / config.context * schedule.raw_tokens(schedule.total_steps)
    total = sum(row["flops"] for row in rows)
    return {
        "phases": rows,
        "steps": schedule.total_steps,
        "flops": total,
        "hours": total / rate,
        "token_level_flops": token_level,
        "cost_in_flops": total / token_level,
        "cost_in_positions": schedule.cost,
        "memory_bytes": memory_bytes(model, config.rows_per_gpu, config.context, config.shards, config.tensor_parallel),
    }


def print_plan(config: PlanConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    result = plan(config)
    table = Table("phase", "patch size", "share of data", "steps", "raw tokens", "FLOPs", "hours")
    for index, row in enumerate(result["phases"], 1):
        table.add_row(str(index), str(row["patch_size"]), f"{row['share']:.4f}", f"{row['steps']:,}",
                      f"{row['raw_tokens']:.3e}", f"{row['flops']:.3e}", f"{row['hours']:.2f}")  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{result['steps']:,} steps, {result['flops']:.3e} FLOPs, {result['hours']:.2f} hours on {config.gpus} GPU(s) "
        f"at {config.tflops:g} TFLOP/s each.\nAgainst token-level training on the same data: "
        f"{result['cost_in_flops']:.3f}x the FLOPs ({result['cost_in_positions']:.3f}x the positions)."
    )
    parts = result["memory_bytes"]
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    console.print(f"Memory, estimated: {sum(parts.values()) / 2**30:.2f} GiB a GPU ({listed}).")
