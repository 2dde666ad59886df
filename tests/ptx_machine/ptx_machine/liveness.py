"""How blocks follow each other, and which registers each must leave behind for those that may follow it."""

from __future__ import annotations

from .parse import Address, Constant, Instruction, Program, Register, Vector


def ending_of(last: Instruction, labels: dict[str, int]) -> tuple[str, int]:
    """How a block goes on after its last instruction, and the block to which it jumps: "next", "jump", "leave",
    "barrier" or "warp barrier"."""
    if last.op == "bra":
        if len(last.operands) != 1 or last.operands[0].name not in labels:
            raise NotImplementedError(last.where)
        return "jump", labels[last.operands[0].name]
    if last.op in ("ret", "exit"):
        return "leave", -1
    if last.op == "trap":
        raise NotImplementedError(last.where)
    if last.is_barrier:
        if "warp" in last.modifiers:
            return "warp barrier", -1
        plain = set(last.modifiers) <= {"sync", "cta", "aligned"} and last.operands == (Constant(0),)
        if not plain or last.predicate:
            raise NotImplementedError(last.where)
        return "barrier", -1
    return "next", -1


def _registers(operand) -> list[str]:
    if isinstance(operand, Register):
        return [operand.name]
    if isinstance(operand, Vector):
        return [name for item in operand.items for name in _registers(item)]
    return _registers(operand.base) if isinstance(operand, Address) else []


def defined_and_used(i: Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction writes, and those that it reads."""
    writes = i.operands and i.op not in ("st", "red", "bra", "bar", "barrier", "stmatrix")
    defined = _registers(i.operands[0]) if writes and not isinstance(i.operands[0], Address) else []
    used = [name for operand in i.operands[1 if writes else 0 :] for name in _registers(operand)]
    if i.predicate:
        used += [i.predicate[0], *defined]  # where the predicate is false, the old value stays
    return defined, used


def live_out_of(program: Program) -> list[set[str]]:
    """For each block, the registers that may be read after it."""
    first_use, defines, follows = [], [], []
    for number, block in enumerate(program.blocks):
        used: set[str] = set()
        defined: set[str] = set()
        for i in block.body:
            d, u = defined_and_used(i)
            used |= set(u) - defined
            defined |= set(d)
        first_use.append(used)
        defines.append(defined)
        last, after = block.body[-1], []
        ending, target = ending_of(last, program.labels)
        if ending == "jump":
            after.append(target)
        if ending not in ("jump", "leave") or last.predicate:
            after.append(number + 1)
        follows.append([n for n in after if n < len(program.blocks)])
    live_in: list[set[str]] = [set() for _ in program.blocks]
    live_out: list[set[str]] = [set() for _ in program.blocks]
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(program.blocks))):
            live_out[n] = set().union(*(live_in[f] for f in follows[n]))
            before = first_use[n] | (live_out[n] - defines[n])
            changed |= before != live_in[n]
            live_in[n] = before
    return live_out
