"""The command ``plan``: computes the cost of a run beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from patchkernels.model.cost import count_flops, count_parameters, memory_bytes, step_flops, wire_bytes
from patchkernels.training.config import ModelConfig, ScheduleConfig, check_at_least_one
from patchkernels.training.evidence import statement


@dataclass(frozen=True)
class PlanConfig:
    """Prints what a run will cost: steps, FLOPs, hours and memory, against token-level training on the same data."""

    model: OmitArgPrefixes[ModelConfig] = field(default_factory=lambda: ModelConfig("370m"))
    schedule: OmitArgPrefixes[ScheduleConfig] = field(
        default_factory=lambda: ScheduleConfig(tokens=10e9, batch_size=256, context=2048)
    )
    tflops: float = 400.0
    """Model TFLOP/s that one GPU achieves."""
    gpus: int = 1
    """Number of GPUs of the run."""
    rows_per_gpu: int = 8
    """Rows that a GPU computes at a time, for the memory estimate."""
    shards: int = 1
    """GPUs that FSDP shards a replica's parameters over, for the memory estimate."""
    tensor_parallel: int = 1
    """GPUs that every matrix is split over, for the memory estimate."""

    def check(self) -> None:
        """Raises ``ValueError`` for a setting out of its range."""
        if self.schedule.epochs != 1.0:
            raise ValueError(f"plan counts tokens, not epochs: got epochs={self.schedule.epochs:g}")
        self.schedule.check()
        if self.schedule.tokens is None:
            raise ValueError("plan needs tokens: there is no corpus to count them in")
        if self.tflops <= 0:
            raise ValueError(f"tflops must be positive, got {self.tflops}")
        check_at_least_one(self, "gpus", "rows_per_gpu")
        if min(self.shards, self.tensor_parallel) < 1 or self.gpus % (self.shards * self.tensor_parallel):
            raise ValueError(
                f"shards times tensor_parallel must divide gpus, got {self.shards} x {self.tensor_parallel} of "
                f"{self.gpus}"
            )


def plan(config: PlanConfig) -> dict[str, Any]:
    """The figures that ``patchkernels plan`` prints.

    Raises:
        ValueError: the phases do not fit these numbers of tokens, rows and positions.
    """
    config.check()
    schedule, context = config.schedule.schedule(), config.schedule.context
    model = config.model.architecture(max_position_embeddings=context)
    is_sharded_alone = config.shards > 1 and config.tensor_parallel == 1
    flops_per_hour = config.tflops * 1e12 * config.gpus * 3600
    rows: list[dict[str, Any]] = []
    for phase, steps, flops in zip(schedule.phases, schedule.steps, step_flops(model, schedule)):
        rows.append({
            "patch_size": phase.patch_size, "share": phase.share, "steps": steps,
            "raw_tokens": steps * schedule.batch_size * schedule.row_tokens(phase),
            "flops": steps * flops, "hours": steps * flops / flops_per_hour,
        })  # fmt: skip
    total_flops, raw_tokens = sum(row["flops"] for row in rows), schedule.raw_tokens(schedule.total_steps)
    token_level_flops = count_flops(model, 1, context, 1) / context * raw_tokens
    return {
        "phases": rows,
        "steps": schedule.total_steps,
        "flops": total_flops,
        "hours": total_flops / flops_per_hour,
        "token_level_flops": token_level_flops,
        "cost_in_flops": total_flops / token_level_flops,
        "cost_in_positions": schedule.cost,
        "parameters": (parameters := count_parameters(model)),
        "tokens_per_parameter": raw_tokens / parameters,
        "memory_bytes": memory_bytes(model, config.rows_per_gpu, context, config.shards, config.tensor_parallel),
        "wire_bytes": wire_bytes(model, config.shards, config.gpus // config.shards) if is_sharded_alone else {},
    }


def print_plan(config: PlanConfig) -> None:
    result = plan(config)
    table = Table("phase", "patch size", "share of data", "steps", "raw tokens", "FLOPs", "hours")
    for number, row in enumerate(result["phases"], 1):
        table.add_row(str(number), str(row["patch_size"]), f"{row['share']:.4f}", f"{row['steps']:,}",
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
    if received := result["wire_bytes"]:
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in received.items())
        console.print(f"A GPU receives {sum(received.values()) / 1e9:.2f} GB a step ({listed}), whatever its rows.")
    if any(row["patch_size"] > 1 for row in result["phases"]):
        console.print(statement(result["parameters"], result["tokens_per_parameter"]))
