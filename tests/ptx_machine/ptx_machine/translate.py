"""Basic blocks as Python functions over numpy arrays, which hold one value for every thread of a batch.

A block becomes the source of one function ``block(b, mask)``, a line or two for each instruction, and is compiled once.
``b`` is the :class:`~ptx_machine.batch.Batch`, ``mask`` says which threads execute the block (None: all of them).
Values are computed for all threads, which is as cheap, and only the active ones keep them; memory is touched for the
active ones alone. A value that is the same for all threads is an array of length 1.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .batch import SPECIAL_REGISTERS
from .decode import operation
from .liveness import ending_of, live_out_of
from .operations import DTYPES, UNSIGNED, Operation, size_of
from .parse import Address, Constant, Instruction, Program, Register, Special, Symbol, Vector

NOTHING = {"membar", "fence", "nanosleep", "griddepcontrol"}  # order or wait in ways that the machine does not model
SPACES = ("global", "shared", "local", "param")
SCOPES = {"cta", "cluster", "gpu", "sys"}
ORDERS = {"relaxed", "acquire", "release", "acq_rel", "volatile", "weak"}
CACHES = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc"}
ATOMIC = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}


@dataclass
class Code:
    """A block that can be run."""

    function: Callable  # (batch, mask) to the predicate of its last instruction, or None where it has none
    ending: str  # "next", "jump", "leave", "barrier" or "warp barrier"
    target: int  # of a jump
    instructions: int
    by_op: dict[str, int] = field(default_factory=dict)


def compile_program(program: Program) -> list[Code]:
    """Raises NotImplementedError for an instruction that is not known, before anything runs."""
    live = live_out_of(program)
    return [_compile(program, n, live[n]) for n in range(len(program.blocks))]


def _compile(program: Program, number: int, live_out: set[str]) -> Code:
    block = program.blocks[number]
    writer = _Writer(program)
    for i in block.body:
        writer.instruction(i)
    writer.keep(live_out)
    last = block.body[-1]
    ending, target = ending_of(last, program.labels)
    conditional = writer.predicate(last.predicate) if ending in ("jump", "leave") and last.predicate else "None"
    lines = ["def block(b, mask):", "    R = b.registers", *("    " + line for line in writer.lines)]
    source = "\n".join([*lines, f"    return {conditional}", ""])
    file = f"<{program.name} block {number} {id(program):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), writer.names)
    by_op: dict[str, int] = {}
    for i in block.body:
        by_op[i.op] = by_op.get(i.op, 0) + 1
    return Code(writer.names["block"], ending, target, len(block.body), by_op)


class _Writer:
    """Writes the source of one block.

    A register has a Python variable for every type as which it was written or read, so that most instructions need no
    conversion. Methods that are named after an instruction, with an underscore before it, translate that instruction;
    the others compute a value from values alone, and are looked up in ``decode.py``.
    """

    def __init__(self, program: Program):
        self.program = program
        self.lines: list[str] = []
        self.names: dict[str, object] = {"np": np}  # what the source refers to
        self.variables: dict[str, dict[str, str]] = {}  # register: numpy type: variable
        self.defined: set[str] = set()
        self.count = 0

    def name(self, value: object, prefix: str) -> str:
        """A name in the source for a Python object."""
        self.count += 1
        name = f"{prefix}{self.count}"
        self.names[name] = value
        return name

    def assign(self, expression: str) -> str:
        self.count += 1
        self.lines.append(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def dtype(self, dtype: type) -> str:
        self.names[dtype.__name__ + "_"] = np.dtype(dtype)
        return dtype.__name__ + "_"

    # Operands.

    def read(self, operand, kind: str) -> str:
        """A variable that holds the operand as this type."""
        dtype = DTYPES[kind]
        if isinstance(operand, Constant):
            return self.name(_constant(operand, dtype), "c")
        if isinstance(operand, Register):
            return self._register(operand.name, dtype)
        if isinstance(operand, Special) and operand.name in SPECIAL_REGISTERS:
            return self.assign(f"b.special({operand.name!r}).astype({self.dtype(dtype)})")
        if isinstance(operand, Symbol) and operand.name in self.program.arrays:
            return self.assign(f"b.symbol({operand.name!r}).astype({self.dtype(dtype)})")
        raise NotImplementedError(f"{operand} is not known")

    def _register(self, register: str, dtype: type) -> str:
        known = self.variables.setdefault(register, {})
        if dtype.__name__ in known:
            return known[dtype.__name__]
        size, wanted = self.program.registers[register], np.dtype(dtype).itemsize
        bits = np.bool_ if size == 1 else UNSIGNED[size]
        if not known:
            known[bits.__name__] = self.assign(f"R[{register!r}]")
        if wanted == size:
            if dtype.__name__ not in known:
                known[dtype.__name__] = self.assign(f"{next(iter(known.values()))}.view({self.dtype(dtype)})")
        elif wanted < size and dtype is not np.bool_:
            low = f"{self._register(register, bits)}.astype({self.dtype(UNSIGNED[wanted])})"
            known[dtype.__name__] = self.assign(f"{low}.view({self.dtype(dtype)})")
        else:
            raise NotImplementedError(f"{register} of {size} bytes is read as {dtype.__name__}")
        return known[dtype.__name__]

    def define(self, operand, dtype: type, expression: str, predicate: tuple[str, bool] | None) -> None:
        """Gives a register the value of an expression of this type, extended where the register is wider."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return
        if not isinstance(operand, Register):
            raise NotImplementedError(f"a result in {operand}")
        size = self.program.registers[operand.name]
        if np.dtype(dtype).itemsize != size:
            wide = np.dtype(f"i{size}").type if np.dtype(dtype).kind == "i" else UNSIGNED[size]
            expression, dtype = f"({expression}).astype({self.dtype(wide)})", wide
        if predicate:
            old = self._register(operand.name, dtype)
            expression = f"np.where({self.predicate(predicate)}, {expression}, {old})"
        self.variables[operand.name] = {dtype.__name__: self.assign(expression)}
        self.defined.add(operand.name)

    def predicate(self, predicate: tuple[str, bool]) -> str:
        register, wanted = predicate
        value = self._register(register, np.bool_)
        return value if wanted else self.assign(f"~{value}")

    def active(self, i: Instruction) -> str:
        """An expression for the mask of the threads that execute the instruction."""
        return f"b.both(mask, {self.predicate(i.predicate)})" if i.predicate else "mask"

    def keep(self, live_out: set[str]) -> None:
        """Writes the registers back that other blocks read."""
        for register in sorted(self.defined & live_out):
            size = self.program.registers[register]
            value = self._register(register, np.bool_ if size == 1 else UNSIGNED[size])
            self.lines.append(
                f"R[{register!r}] = {value} if mask is None else np.where(mask, {value}, R[{register!r}])"
            )

    # Instructions.

    def instruction(self, i: Instruction) -> None:
        special = getattr(self, "_" + i.op, None)
        try:
            if special:
                special(i)
            elif i.op not in NOTHING:
                self._compute(i, operation(i))
        except NotImplementedError as error:
            text = str(error)
            raise NotImplementedError(text if i.where in text else f"{i.where} ({text})") from None

    def _compute(self, i: Instruction, op: Operation) -> None:
        sources = [self.read(o, kind) for o, kind in zip(i.operands[1:], op.kinds, strict=True)]
        function = self.name(op.function, "f")
        if op.carry:
            carry = self.variables.get("carry", {}).get("bool", self.name(np.zeros(1, bool), "c"))
            pair = self.assign(f"{function}({', '.join([*sources, carry])})")
            if "cc" in i.modifiers:
                self.variables["carry"] = {"bool": self.assign(f"{pair}[1]")}
            self.define(i.operands[0], DTYPES[op.result], f"{pair}[0]", i.predicate)
        else:
            self.define(i.operands[0], DTYPES[op.result], f"{function}({', '.join(sources)})", i.predicate)

    def _bra(self, i: Instruction) -> None:
        """How a block ends is the scheduler's to do."""

    _ret = _exit = _barrier = _bra

    def _bar(self, i: Instruction) -> None:
        if "warp" in i.modifiers:
            self.lines.append(f"b.members = {self.read(i.operands[0], 'u32')}")

    def _mov(self, i: Instruction) -> None:
        (kind,) = i.modifiers
        target, source = i.operands
        dtype = DTYPES[kind]
        if isinstance(target, Vector):
            part = UNSIGNED[size_of(kind) // len(target.items)]
            whole = self.read(source, f"b{8 * size_of(kind)}")
            for n, item in enumerate(target.items):
                shift = self.name(DTYPES[f"b{8 * size_of(kind)}"](8 * np.dtype(part).itemsize * n), "c")
                self.define(item, part, f"({whole} >> {shift}).astype({self.dtype(part)})", i.predicate)
        elif isinstance(source, Vector):
            each = size_of(kind) // len(source.items)
            whole = UNSIGNED[size_of(kind)]
            parts = [
                f"({self.read(o, f'b{8 * each}')}.astype({self.dtype(whole)}) << {self.name(whole(8 * each * n), 'c')})"
                for n, o in enumerate(source.items)
            ]
            self.define(target, whole, " | ".join(parts), i.predicate)
        else:
            self.define(target, dtype, self.read(source, kind), i.predicate)

    def _cvta(self, i: Instruction) -> None:
        if "global" not in i.modifiers:  # a global address is a generic one; others need a window that is not modelled
            raise NotImplementedError(i.where)
        self.define(i.operands[0], np.uint64, self.read(i.operands[1], "u64"), i.predicate)

    def _createpolicy(self, i: Instruction) -> None:
        """Cache hints change nothing here."""
        self.define(i.operands[0], np.uint64, self.name(np.zeros(1, np.uint64), "c"), i.predicate)

    # Memory.

    def _place(self, i: Instruction, others: set[str]) -> tuple[str, str, int]:
        """The space of an access, its type, and how many elements it has; other modifiers must be known."""
        space = next((m.split("::")[0] for m in i.modifiers if m.split("::")[0] in SPACES), "")
        kind = next((m for m in reversed(i.modifiers) if m in DTYPES), "")
        vector = next((m for m in i.modifiers if m in ("v2", "v4", "v8")), "v1")
        hints = {m for m in i.modifiers if m.startswith(("L1::", "L2::"))}
        known = {kind, vector, *hints, *others, *SCOPES, *ORDERS, *CACHES, "unified"}
        if not kind or {m for m in i.modifiers if m.split("::")[0] != space} - known or not space:
            raise NotImplementedError(i.where)
        return space, kind, int(vector[1:])

    def _address(self, address: Address) -> str:
        base, offset = address.base, address.offset
        if isinstance(base, Register) and self.program.registers[base.name] == 4:
            value = f"{self.read(base, 'u32')}.astype({self.dtype(np.int64)})"
        else:
            value = self.read(base, "s64")
        return f"{value} + {offset}" if offset else value

    def _ld(self, i: Instruction) -> None:
        space, kind, count = self._place(i, set())
        targets = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
        dtype = DTYPES[kind]
        if space == "param":
            value = f"b.parameter({i.operands[1].base.name!r}, {self.dtype(dtype)}, {i.operands[1].offset})"
            self.define(targets[0], dtype, value, i.predicate)
            return
        at = f"{self.name(i, 'i')}, {self.active(i)}, {space!r}, {self._address(i.operands[1])}"
        loaded = self.assign(f"b.load({at}, {size_of(kind)}, {count})")
        for n, target in enumerate(targets):
            self.define(target, dtype, f"{loaded}[{n}].view({self.dtype(dtype)})", i.predicate)

    def _st(self, i: Instruction) -> None:
        space, kind, _ = self._place(i, set())
        size = size_of(kind)
        sources = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
        values = ", ".join(self.read(s, f"b{8 * size}") for s in sources)
        at = f"{self.name(i, 'i')}, {self.active(i)}, {space!r}, {self._address(i.operands[0])}"
        self.lines.append(f"b.store({at}, {size}, [{values}])")

    def _atom(self, i: Instruction) -> None:
        has_result = i.op == "atom"
        name = next((m for m in i.modifiers if m in ATOMIC), "")
        space, kind, count = self._place(i, {name, "noftz"})
        target, address, *sources = i.operands if has_result else (None, *i.operands)
        groups = [s.items if isinstance(s, Vector) else (s,) for s in sources[: 2 if name == "cas" else 1]]
        change = self.name(_change(name, kind, i), "f")
        values = ", ".join("[" + ", ".join(self.read(s, kind) for s in group) + "]" for group in groups)
        at = f"{self.name(i, 'i')}, {self.active(i)}, {space!r}, {self._address(address)}"
        old = self.assign(f"b.atomic({at}, {self.dtype(DTYPES[kind])}, {count}, {change}, [{values}])")
        if has_result:
            for n, item in enumerate(target.items if isinstance(target, Vector) else (target,)):
                self.define(item, DTYPES[kind], f"{old}[{n}]", i.predicate)

    _red = _atom

    # Threads of a warp together.

    def _shfl(self, i: Instruction) -> None:
        _, mode, kind = i.modifiers
        target, source, b, c, members = i.operands
        if kind != "b32" or mode not in ("bfly", "idx", "up", "down"):
            raise NotImplementedError(i.where)
        lanes = f"{mode!r}, {self.read(b, 'u32')}, {self.read(c, 'u32')}"
        at = f"{self.name(i, 'i')}, {self.active(i)}, {self.read(members, 'u32')}"
        value = f"b.shuffle({at}, {self.read(source, 'b32')}, {lanes})"
        self.define(target, np.uint32, value, i.predicate)

    def _vote(self, i: Instruction) -> None:
        sync, mode, kind = i.modifiers
        if sync != "sync" or mode not in ("ballot", "any", "all", "uni"):
            raise NotImplementedError(i.where)
        at = f"{self.name(i, 'i')}, {self.active(i)}, {self.read(i.operands[2], 'u32')}"
        value = f"b.vote({at}, {mode!r}, {self.read(i.operands[1], 'pred')})"
        self.define(i.operands[0], DTYPES[kind], value, i.predicate)

    def _redux(self, i: Instruction) -> None:
        name, kind = i.modifiers[1], i.modifiers[-1]
        if set(i.modifiers[2:-1]) - {"NaN"} or kind not in ("u32", "s32", "b32", "f32"):
            raise NotImplementedError(i.where)
        name += "_or_nan" if "NaN" in i.modifiers else ""
        at = f"{self.name(i, 'i')}, {self.active(i)}, {self.read(i.operands[2], 'u32')}"
        value = f"b.reduce({at}, {name!r}, {self.read(i.operands[1], kind)})"
        self.define(i.operands[0], DTYPES[kind], value, i.predicate)

    def _activemask(self, i: Instruction) -> None:
        self.define(i.operands[0], np.uint32, f"b.active_lanes({self.active(i)})", None)

    def _ldmatrix(self, i: Instruction) -> None:
        count, transposed = self._matrices(i)
        targets = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
        at = f"{self.name(i, 'i')}, {self.active(i)}, {self._address(i.operands[1])}"
        loaded = self.assign(f"b.load_matrices({at}, {count}, {transposed})")
        for n, target in enumerate(targets):
            self.define(target, np.uint32, f"{loaded}[{n}]", i.predicate)

    def _stmatrix(self, i: Instruction) -> None:
        _, transposed = self._matrices(i)
        sources = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
        values = ", ".join(self.read(s, "b32") for s in sources)
        at = f"{self.name(i, 'i')}, {self.active(i)}, {self._address(i.operands[0])}"
        self.lines.append(f"b.store_matrices({at}, [{values}], {transposed})")

    def _matrices(self, i: Instruction) -> tuple[int, bool]:
        rest = [m.split("::")[0] for m in i.modifiers if m not in ("sync", "aligned")]
        count = next((int(m[1:]) for m in rest if m in ("x1", "x2", "x4")), 0)
        transposed = "trans" in rest
        if not count or set(rest) - {"m8n8", f"x{count}", "trans", "shared", "b16"}:
            raise NotImplementedError(i.where)
        return count, transposed


def _constant(operand: Constant, dtype: type) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if dtype is np.bool_:
        return np.array([operand.bits != 0])
    if operand.floating == "f64" and dtype is np.float32:
        return np.array([operand.bits], np.uint64).view(np.float64).astype(np.float32)
    return np.array([operand.bits % 256**size], UNSIGNED[size]).view(dtype)


def _change(name: str, kind: str, i: Instruction) -> Callable:
    """What an atomic instruction makes of the old value and its operands, all of one type."""
    if name in ("exch", "cas"):
        exchange = lambda old, new: new  # noqa: E731
        return exchange if name == "exch" else lambda old, expected, new: np.where(old == expected, new, old)
    if name in ("inc", "dec"):
        zero, one = np.uint32(0), np.uint32(1)
        up = lambda old, last: np.where(old >= last, zero, old + one)  # noqa: E731
        down = lambda old, last: np.where((old == zero) | (old > last), last, old - one)  # noqa: E731
        return up if name == "inc" else down
    plain = Instruction(i.text, i.line, i.source, name, (kind,), (None, None, None), None)
    return operation(plain).function
