"""How many instructions a logit costs, counted where the compiled cross entropy kernels are executed as PTX.

While an H100 moves a byte, at 3.35 TB/s and 1.7 GHz, its 132 multiprocessors can issue 8.6 instructions (128 a cycle
each) and finish 1.07 of the slow ones: exponentials and inverse square roots (16 a cycle). A kernel that needs more for
a logit than its bytes allow takes longer than its bytes.
"""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu

if not triton_on_cpu.ARCHITECTURE:
    pytest.skip("kernels are compiled only with PTX_MACHINE set", allow_module_level=True)

import triton

from patchkernels.kernels import cross_entropy
from patchkernels.numerics import LossOptions

ROWS, VOCAB = 2, 32000
ISSUED, SLOW = 132 * 128 * 1.7e9 / 3.35e12, 132 * 16 * 1.7e9 / 3.35e12  # instructions of a thread for each byte
PLAIN, SMOOTHING, SOFTCAP = LossOptions(), LossOptions(label_smoothing=0.1), LossOptions(softcap=30.0)


@pytest.mark.parametrize(
    ("options", "dtype", "gradient", "allowed"),  # allowed: of what the bytes allow
    [
        (PLAIN, torch.bfloat16, False, 0.8),
        (PLAIN, torch.bfloat16, True, 0.7),
        (SMOOTHING, torch.bfloat16, False, 0.95),
        (SMOOTHING, torch.bfloat16, True, 0.75),
        (LossOptions(z_loss_weight=1e-4), torch.bfloat16, True, 0.7),
        (SOFTCAP, torch.float32, True, 1.0),
        # Three slow instructions in each pass, of which neighbours share one: more than the bytes allow.
        (SOFTCAP, torch.bfloat16, True, 1.25),
        (SOFTCAP, torch.bfloat16, False, 1.3),
    ],
)
def test_a_logit_costs_no_more_instructions_than_its_bytes_allow(options, dtype, gradient, allowed):
    logits, target = torch.randn(ROWS, VOCAB).to(dtype), torch.randint(0, VOCAB, (ROWS, 4))
    losses, c = torch.empty(ROWS, 4), torch.rand(ROWS, 4)
    with triton.runtime.driver.active.record() as launches:
        cross_entropy.loss_and_gradient_(logits, target, c if gradient else None, losses, options)
    (launch,) = launches
    counted, bytes_of_logit = launch.counters.by_op, dtype.itemsize * (2 if gradient else 1)
    slow = counted.get("ex2", 0) + counted.get("rsqrt", 0) + 2 * counted.get("div", 0)
    issued = launch.counters.instructions - counted.get("mov", 0)  # PTX is full of moves, machine code is not
    logits_of_warps = ROWS * VOCAB / 32
    assert slow / logits_of_warps <= allowed * SLOW * bytes_of_logit
    assert issued / logits_of_warps <= allowed * ISSUED * bytes_of_logit
