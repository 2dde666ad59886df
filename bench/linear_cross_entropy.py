"""Fused linear cross entropy on a CPU beside its peers, at K = 1 and K = 4: time and peak extra memory.

    python -m bench.linear_cross_entropy [--rows 1024 --hidden 512 --vocab 32000]

Forward and backward, fp32. The cases are timed in turn (A B C A B C ...), so that a slow spell of the machine hits
all of them, and their losses and gradients are compared first. Memory is the growth of the resident set in a fresh
process for each case, gradients included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkernels import linear_patch_cross_entropy

ROUNDS = 7


def shared_logits(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """PatchTrain's eager loss: one log-softmax, one nll_loss a slot."""
    log_p = F.log_softmax(x @ weight.T, -1)
    return torch.stack([F.nll_loss(log_p, t) for t in target.T]).mean()


def repeated_rows(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    slots = target.shape[1]
    return F.linear_cross_entropy(x.repeat_interleave(slots, 0), weight, target.flatten())


CASES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "K=1 patchkernels": (1, linear_patch_cross_entropy),
    "K=1 F.linear_cross_entropy": (1, repeated_rows),
    "K=4 patchkernels": (4, linear_patch_cross_entropy),
    "K=4 eager, shared logits": (4, shared_logits),
    "K=4 F.linear_cross_entropy, repeated rows": (4, repeated_rows),
}
BASELINE = {1: "K=1 F.linear_cross_entropy", 4: "K=4 eager, shared logits"}


def inputs(shape: argparse.Namespace, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(slots)
    x = torch.randn(shape.rows, shape.hidden, generator=generator)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator) / shape.hidden**0.5
    target = torch.randint(0, shape.vocab, (shape.rows, slots), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), target


def step(name: str, x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    loss = CASES[name][1](x, weight, target)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_extra_bytes(name: str, shape: argparse.Namespace) -> int:
    """Run in a fresh process: what the allocator keeps from other cases does not count."""
    arguments = inputs(shape, CASES[name][0])
    step(name, arguments[0][:8], arguments[1][:64], arguments[2][:8] % 64)  # threads, lazy libraries
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    results = step(name, *arguments)
    done.set()
    watcher.join()
    return max(highest, resident()) - before if results else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("--rows", 1024), ("--hidden", 512), ("--vocab", 32000)):
        parser.add_argument(option, type=int, default=default)
    shape = parser.parse_args()
    arguments = {slots: inputs(shape, slots) for slots in BASELINE}
    for name, (slots, _) in CASES.items():
        expected = step(BASELINE[slots], *arguments[slots])
        torch.testing.assert_close(step(name, *arguments[slots]), expected, rtol=1e-4, atol=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, (slots, _) in CASES.items():
            start = time.perf_counter()
            step(name, *arguments[slots])
            seconds[name].append(time.perf_counter() - start)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(CASES, pool.starmap(peak_extra_bytes, [(name, shape) for name in CASES], chunksize=1)))
    print(f"N={shape.rows} D={shape.hidden} V={shape.vocab}, fp32, {torch.get_num_threads()} threads,", end=" ")
    print(f"torch {torch.__version__}, median of {ROUNDS}")
    for name, (slots, _) in CASES.items():
        ratios = [mine / base for mine, base in zip(seconds[name], seconds[BASELINE[slots]])]
        print(
            f"{name:42s} {statistics.median(seconds[name]):7.3f} s  {statistics.median(ratios):5.2f}x time  "
            f"{memory[name] / 2**20:6.0f} MiB  {memory[name] / memory[BASELINE[slots]]:5.2f}x memory"
        )


if __name__ == "__main__":
    main()
