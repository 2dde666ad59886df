"""The speed of a run: tokens, positions, and the share of the GPUs' peak that the model's FLOPs make (MFU).

MFU = model FLOPs a second / (GPUs x peak)          (PaLM, arXiv 2204.02311, appendix B)
"""

from __future__ import annotations

import torch

from patchkernels.schedule import Phase, Schedule

# Dense bf16, in TFLOP/s, from NVIDIA's data sheets; a name is looked for in torch's name of the GPU, in this order.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L4": 121,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second that the device has by its data sheet; None if it is no GPU, or one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def speed(schedule: Schedule, phase: Phase, steps_per_second: float) -> dict[str, float]:
    """Raw tokens and positions a second, over all processes."""
    rows = schedule.batch_size * steps_per_second
    return {
        "raw_tokens_per_second": rows * schedule.row_tokens(phase),
        "positions_per_second": rows * schedule.positions(phase),
    }
