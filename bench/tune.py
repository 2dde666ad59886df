"""Searches launch configurations on the GPU at hand: ``python -m bench.tune``. Nothing is changed by it.

The defaults are in ``launch_config`` of each module in ``kernels/``; where another line below is faster on your GPU,
that is the place for it. The configurations of a case are timed in turn, each checked against the default's result.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import interleaved
from patchkernels.kernels import cross_entropy, patch_embedding
from patchkernels.patch_cross_entropy import LossOptions

SECONDS = 1.0  # of timing a case


def configurations(block: str, columns: int) -> list[dict[str, int]]:
    """Warps, and elements a thread holds at a time."""
    pairs = itertools.product((1, 2, 4, 8, 16, 32), (4, 8, 16, 32))
    found = [{block: 32 * warps * each, "num_warps": warps} for warps, each in pairs]
    return [c for c in found if 128 <= c[block] <= max(2 * columns, 128)]


def losses(rows: int, vocab: int, device: torch.device) -> Callable[[], Tensor]:
    """Loss and dlogits of a chunk of logits, as the fused linear loss forms them."""
    logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, vocab, (rows, 4), device=device)
    c, out = torch.ones(rows, 4, device=device), torch.empty(rows, 4, device=device)
    work = torch.empty_like(logits)

    def run() -> Tensor:
        work.copy_(logits)  # in every configuration's time alike
        cross_entropy.loss_and_gradient_(work, target, c, out, LossOptions())
        return work

    return run


def embeddings(tokens: int, table: int, hidden: int, device: torch.device, backward: bool) -> Callable[[], Tensor]:
    ids = torch.randint(0, table, (tokens // 4, 4), device=device)
    weight = torch.randn(table, hidden, device=device, dtype=torch.bfloat16)
    grad = torch.randn(tokens // 4, hidden, device=device, dtype=torch.bfloat16)
    if backward:
        return lambda: patch_embedding.backward(grad, ids, table, None)
    return lambda: patch_embedding.forward(ids, weight, None)


def search(module: Any, configs: list[dict[str, int]], run: Callable[[], Tensor]) -> Iterator[tuple[float, str]]:
    """(seconds, configuration), fastest first; the module is left as it was."""
    default = module.launch_config
    expected = run().clone()
    functions: dict[str, Callable[[], Tensor]] = {"default": run}

    def under(config: dict[str, int]) -> Tensor:
        module.launch_config = lambda columns: config
        try:
            return run()
        finally:
            module.launch_config = default

    for config in configs:
        torch.testing.assert_close(under(config).float(), expected.float(), rtol=2e-2, atol=1e-3)
        functions[", ".join(f"{k}={v}" for k, v in config.items())] = lambda config=config: under(config)
    seconds = interleaved(functions, expected.device, SECONDS)
    yield from sorted((sorted(times)[len(times) // 2], name) for name, times in seconds.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="of logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 50257, 128256, 151936])
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--table", type=int, default=32000, help="rows of the embedding table")
    parser.add_argument("--hidden", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench.tune: launch configurations are searched on a GPU, and torch sees none\n")
    device = torch.device(options.device)
    cases = [(f"cross entropy, {options.rows} x {v}", cross_entropy, configurations("BLOCK_V", v),
              losses(options.rows, v, device)) for v in options.vocab]  # fmt: skip
    for hidden, backward in itertools.product(options.hidden, (False, True)):
        name = f"patch embedding {'backward' if backward else 'forward'}, {options.tokens} tokens, D={hidden}"
        run = embeddings(options.tokens, options.table, hidden, device, backward)
        cases.append((name, patch_embedding, configurations("BLOCK_D", hidden), run))
    for name, module, configs, run in cases:
        print(name)
        for seconds, config in search(module, configs, run):
            print(f"  {seconds * 1e3:9.4f} ms  {config}")


if __name__ == "__main__":
    main()
