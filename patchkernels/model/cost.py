"""The size of a model and the cost of training it: parameters, FLOPs of a step, and memory on a GPU."""

from __future__ import annotations

import dataclasses

import torch

from patchkernels.model.config import PatchLMConfig
from patchkernels.model.patch_lm import PatchLM
from patchkernels.ops.linear_buffers import LOGITS_BYTES
from patchkernels.schedule import Schedule


def count_parameters(config: PatchLMConfig) -> int:
    """The parameters of a model, counted without allocating it."""
    return _parameters(config)[0]


def count_flops(config: PatchLMConfig, rows: int, positions: int, patch_size: int) -> int:
    """FLOPs of one forward and backward over ``rows`` rows of ``positions`` positions, counted on the meta device.

    These are the usual model FLOPs: matrix products only, attention over all pairs of positions, no recomputation.
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
    return rows * int(counter.get_total_flops())  # FLOPs are proportional to the rows, so one is enough


def step_flops(config: PatchLMConfig, schedule: Schedule) -> list[int]:
    """FLOPs of one optimizer step, for each phase."""
    return [
        count_flops(config, schedule.batch_size, schedule.positions(phase), phase.patch_size)
        for phase in schedule.phases
    ]


def memory_bytes(
    config: PatchLMConfig, rows: int, positions: int, shards: int = 1, tensor_parallel: int = 1
) -> dict[str, int]:
    """An estimate of the memory that training takes on one GPU, for fp32 parameters, bf16 autocast and AdamW.

        16 N / (S TP)  +  4 (N_b + N_r) / TP  +  activations / TP  +  logits  +  4 V D / TP

    N is the number of parameters, S = ``shards`` the number of FSDP's shards, TP = ``tensor_parallel`` the number of
    processes over which tensor parallelism divides each layer.

    - Parameters, gradients and AdamW's two moments take 4 bytes each, 16 per parameter.
    - With FSDP (S > 1) two units are whole at a time, the one at work and the one fetched ahead: a block of N_b
      parameters, and the root of N_r (embedding, last norm and head).
    - Activations take ``2 (10 D + 2 H_q + 4 H_kv + 4 F)`` bytes per position in each layer, where H_q and H_kv are the
      widths of queries and keys and F that of the MLP. With activation checkpointing every layer keeps ``2 D`` bytes
      per position, and only one layer at a time keeps everything.
    - The logits take 2 bytes each, up to ``LOGITS_BYTES``, and the head ``2 V D`` bytes for its copy in bf16. Logits
      that do not fit take another ``4 V D`` bytes, for a sum of the head's gradient over chunks.

    A patch phase with as many positions per step needs the same. With as many raw tokens per step, its activations take
    1/K of this.
    """
    parameters, in_layers = _parameters(config)
    layers = config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_size, config.key_value_heads * config.head_size
    layer = 2 * (10 * config.hidden_size + 2 * queries + 4 * keys + 4 * config.intermediate_size) * rows * positions
    layer_inputs = 2 * config.hidden_size * rows * positions * layers
    activations = layer_inputs + layer if config.activation_checkpointing else layer * layers
    logits = 2 * rows * positions * config.vocab_size // tensor_parallel
    head = (2 if logits <= LOGITS_BYTES["cuda"] else 6) * config.vocab_size * config.hidden_size // tensor_parallel
    whole_units = 4 * (in_layers // layers + parameters - in_layers) // tensor_parallel
    return {
        "parameters": 4 * parameters // (shards * tensor_parallel),
        "gradients": 4 * parameters // (shards * tensor_parallel),
        "AdamW moments": 8 * parameters // (shards * tensor_parallel),
        **({"units at work": whole_units} if shards > 1 else {}),
        "activations": activations // tensor_parallel,
        "logits, head in bf16": min(logits, LOGITS_BYTES["cuda"]) + head,
    }


def wire_bytes(config: PatchLMConfig, shards: int, replicas: int = 1) -> dict[str, int]:
    """Bytes that one GPU receives in a step with FSDP2, for parameters in bf16 and sums of gradients in fp32.

        gathers          2 (2 N_b + N_r) (S - 1) / S        blocks are gathered forward and backward, the root once
        sums in shards   4 (N_b + N_r) (S - 1) / S
        over replicas    4 (N_b + N_r) / S  2 (R - 1) / R   ring all-reduce of the shards of gradients

    N_b is the number of parameters in blocks, N_r that in the root (embedding, last norm and head), S = ``shards`` and
    R = ``replicas`` the number of groups of S GPUs. Every part of ``accumulation`` gathers anew.
    """
    parameters, in_blocks = _parameters(config)
    others, other_replicas = (shards - 1) / shards, 2 * (replicas - 1) / replicas
    return {
        "gathers": int(2 * (parameters + in_blocks) * others),
        "sums in shards": int(4 * parameters * others),
        **({"over replicas": int(4 * parameters / shards * other_replicas)} if replicas > 1 else {}),
    }


def _parameters(config: PatchLMConfig) -> tuple[int, int]:
    """The number of all parameters, and of those in the layers."""
    with torch.device("meta"):
        model = PatchLM(config)
    everything, in_layers = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.layers))
    return everything, in_layers
