"""What a kernel does not write is seen: its outputs are filled with NaN before a launch.

An output is a tensor that the kernel stores to and never reads, which the instructions show: each address is followed
back to the parameters it was computed from.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .liveness import defined_and_used
from .parse import ACCESSES, Address, Instruction, Program, Symbol


def accesses_by_parameter(program: Program) -> tuple[frozenset[str], frozenset[str]]:
    """The parameters through which the kernel stores, and those through which it reads or changes memory."""
    instructions = [i for block in program.blocks for i in block.body]
    origins = _origins(instructions)
    stored: set[str] = set()
    read: set[str] = set()
    for i in instructions:
        if i.op in ACCESSES and "param" not in i.modifiers:
            (address,) = (operand for operand in i.operands if isinstance(operand, Address))
            if not isinstance(address.base, Symbol):
                (stored if i.op == "st" else read).update(origins.get(getattr(address.base, "name", ""), ()))
    return frozenset(stored), frozenset(read)


def _origins(instructions: list[Instruction]) -> dict[str, set[str]]:
    """For each register, the parameters from which its value may have been computed, without a detour by memory."""
    origins: dict[str, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for i in instructions:
            defined, used = defined_and_used(i)
            if i.op == "ld" and "param" in i.modifiers:
                found = {i.operands[1].base.name}
            elif i.op in ACCESSES:
                continue
            else:
                found = set().union(*(origins.get(name, ()) for name in used))
            for name in defined:
                known = origins.setdefault(name, set())
                changed |= not found <= known
                known |= found
    return origins


def fill_outputs(
    stored: Collection[str], read: Collection[str], tensors: dict[str, tuple[str, Tensor]], kept: Collection[str]
) -> None:
    """Fills every output with NaN, or with the largest integer.

    Args:
        stored, read: parameters, as of :func:`accesses_by_parameter`.
        tensors: by parameter, the argument's name and value.
        kept: names of outputs that a kernel writes in part, on purpose; they keep their values.
    """
    in_use = {tensor.untyped_storage().data_ptr() for name, (_, tensor) in tensors.items() if name in read}
    for parameter, (name, tensor) in tensors.items():
        if parameter in stored and name not in kept and tensor.untyped_storage().data_ptr() not in in_use:
            nan = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            tensor.detach().fill_(nan)
