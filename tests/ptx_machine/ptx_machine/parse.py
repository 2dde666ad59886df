"""PTX text as data: parameters, registers, arrays, and the instructions of a kernel in basic blocks.

Only the syntax is known here. What an instruction does is decided in ``arithmetic.py`` and ``translate.py``.
"""

from __future__ import annotations

import bisect
import re
import struct
from dataclasses import dataclass, field

REGISTER_BYTES = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8}  # a predicate is held as one boolean
ENDS_BLOCK = {"bra", "ret", "exit", "trap"}
ACCESSES = {"ld", "st", "atom", "red", "ldmatrix", "stmatrix"}


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Constant:
    """A literal. ``floating`` is the format of its bits, "f32" or "f64", or None for an integer."""

    bits: int
    floating: str | None = None


@dataclass(frozen=True)
class Special:
    """A register that the hardware fills, such as ``tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a label, a parameter or an array."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Constant
    offset: int


@dataclass(frozen=True)
class Instruction:
    """``@predicate op.modifiers operands``, with the place it came from."""

    text: str
    line: int  # of the PTX
    source: str  # file and line of the Triton kernel, "" where the PTX does not say
    op: str
    modifiers: tuple[str, ...]
    operands: tuple
    predicate: tuple[str, bool] | None  # a register and the value for which the instruction is executed

    @property
    def where(self) -> str:
        source = f", {self.source}" if self.source else ""
        return f"PTX line {self.line}{source}: {self.text}"

    @property
    def ends_block(self) -> bool:
        return self.op in ENDS_BLOCK or self.is_barrier

    @property
    def is_barrier(self) -> bool:
        return self.op in ("bar", "barrier")


@dataclass
class Block:
    """Instructions that are executed one after the other; only the last may jump, wait or leave."""

    body: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Array:
    """An array of shared, local or global memory that the module declares."""

    space: str
    offset: int  # among the arrays of its space
    size: int  # 0 for the one whose size is chosen at the launch
    data: bytes = b""  # of a global array


@dataclass
class Program:
    """One kernel."""

    name: str
    parameters: list[tuple[str, str]]  # name and type, in order
    threads: int  # of a CTA
    registers: dict[str, int]  # bytes of each; a name that is declared again in an inner scope gets a suffix
    arrays: dict[str, Array]
    blocks: list[Block]
    labels: dict[str, int]  # the index of the block that each one begins

    def size_of(self, space: str) -> int:
        """Bytes that the arrays of a space take together."""
        return max((a.offset + a.size for a in self.arrays.values() if a.space == space), default=0)


def parse(ptx: str, one_access_a_block: bool = False) -> Program:
    """The kernel of a module that holds exactly one.

    Args:
        one_access_a_block: end a block after every access to memory as well, so that a scheduler that changes warps
            between blocks can order accesses in every way.

    Raises:
        NotImplementedError: for device functions, or a statement that cannot be read.
    """
    text = re.sub(r"//.*", _keep_source, ptx)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(entries) != 1 or re.search(r"^\s*(\.visible\s+)?\.func\b", text, re.M):
        raise NotImplementedError(f"a module of {len(entries)} kernels, or one with device functions")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if not threads:
        raise NotImplementedError(f"{name} does not say how many threads it needs (.reqntid)")
    reader = _Reader(text, _arrays(text))
    reader.read(entries[0].end())
    blocks, labels = _split(reader.statements, one_access_a_block)
    return Program(
        name,
        [_parameter(p) for p in _split_commas(parameters)],
        int(threads[1]),
        reader.registers,
        reader.arrays,
        blocks,
        labels,
    )


def _keep_source(comment: re.Match) -> str:
    """Comments go, except the one behind ``.loc``, which holds the file's name and the line."""
    found = re.match(r"// ([\w.-]+:\d+):\d+", comment[0])
    return f"@{found[1]}" if found else ""


def _parameter(text: str) -> tuple[str, str]:
    kind = re.search(r"\.([usfb]\d+)\b", text)
    if not kind or "[" in text:
        raise NotImplementedError(f"a parameter that is no scalar: {text}")
    return text.split()[-1], kind[1]


def _arrays(text: str) -> dict[str, Array]:
    """Arrays of the module and of the kernel's body."""
    arrays: dict[str, Array] = {}
    pattern = (
        r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.([bus]\d+)\s+([\w$]+)\[(\d*)\]"
        r"(?:\s*=\s*\{([^}]*)\})?"
    )
    tops: dict[str, int] = {}
    for space, alignment, kind, name, count, values in re.findall(pattern, text):
        each = int(kind[1:]) // 8
        start = -(-tops.get(space, 0) // 16) * 16 if space == "global" else _round_up(tops.get(space, 0), alignment)
        size = int(count or 0) * each
        numbers = [int(v, 0) % 256**each for v in _split_commas(values)]
        data = b"".join(v.to_bytes(each, "little") for v in numbers).ljust(size, b"\0")
        arrays[name] = Array(space, start, size, data)
        tops[space] = start + size
    for name, array in arrays.items():
        if array.space == "shared" and not array.size:  # its size is chosen at the launch: it comes last
            arrays[name] = Array("shared", _round_up(tops["shared"], "16"), 0)
    return arrays


def _round_up(value: int, alignment: str) -> int:
    step = int(alignment or 16)
    return -(-value // step) * step


def _split_commas(text: str) -> list[str]:
    """The parts between commas that stand in no bracket."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)
    return [p.strip() for p in parts if p.strip()]


class _Reader:
    """Walks through the body of a kernel; fills ``statements`` with labels and instructions."""

    TOKEN = re.compile(
        r"\s*(?:(?P<loc>\.loc\b[^\n]*)|(?P<file>\.(?:file|pragma)\b[^\n]*)|(?P<open>\{)|(?P<close>\})"
        r"|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;]+);)"
    )
    STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
    DECLARATION = re.compile(r"\.reg\s+\.([busf]\d+|pred)\s+(.*)", re.S)

    def __init__(self, text: str, arrays: dict[str, Array]):
        self.text, self.arrays = text, arrays
        self.registers: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]  # names as written to names of registers
        self.statements: list[str | Instruction] = []  # a label is a string
        self.newlines = [m.start() for m in re.finditer("\n", text)]

    def read(self, position: int) -> None:
        source = ""
        while self.scopes:
            token = self.TOKEN.match(self.text, position)
            if not token:
                raise NotImplementedError(f"PTX that cannot be read: {self.text[position : position + 80]!r}")
            position = token.end()
            if token["loc"]:
                source = token["loc"].partition("@")[2]
                source = "" if source.endswith(":0") else source  # line 0: the compiler's own code
            elif token["open"]:
                self.scopes.append({})
            elif token["close"]:
                self.scopes.pop()
            elif token["label"]:
                self.statements.append(token["label"])
            elif token["statement"]:
                line = bisect.bisect(self.newlines, token.start("statement")) + 1
                self._statement(token["statement"].strip(), line, source)

    def _statement(self, text: str, line: int, source: str) -> None:
        if declared := self.DECLARATION.fullmatch(text):
            self._declare(declared[1], declared[2])
        elif not text.startswith((".shared", ".local")):
            match = self.STATEMENT.fullmatch(text)
            if not match:
                raise NotImplementedError(f"PTX line {line}: {text!r}")
            unless, predicate, opcode, operands = match.groups()
            op, *modifiers = re.split(r"(?<!:)\.", opcode)
            self.statements.append(
                Instruction(
                    " ".join(text.split()), line, source, op, tuple(modifiers),
                    tuple(self._operand(part) for part in _split_commas(operands)),
                    (self._register(predicate), not unless) if predicate else None,
                )
            )  # fmt: skip

    def _declare(self, kind: str, names: str) -> None:
        size = REGISTER_BYTES[kind if kind == "pred" else "b" + kind[1:]]
        for name in _split_commas(names):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = each if each not in self.registers else f"{each}_{len(self.registers)}"
                self.registers[unique] = size
                self.scopes[-1][each] = unique

    def _register(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text: str):
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split_commas(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if register := self._register(text):
            return Register(register)
        return _literal(text) or (Special(text[1:]) if text.startswith("%") else Symbol(text))


def _literal(text: str) -> Constant | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Constant(int(text[2:], 16), "f32")
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Constant(int(text[2:], 16), "f64")
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Constant(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
    return None


def _split(statements: list[str | Instruction], one_access_a_block: bool) -> tuple[list[Block], dict[str, int]]:
    """Basic blocks, in the order of the text, and the block that each label begins."""
    blocks, labels = [Block()], {}
    for statement in statements:
        if isinstance(statement, str):
            if blocks[-1].body:
                blocks.append(Block())
            labels[statement] = len(blocks) - 1
            continue
        blocks[-1].body.append(statement)
        is_access = statement.op in ACCESSES and "param" not in statement.modifiers
        if statement.ends_block or (one_access_a_block and is_access):
            blocks.append(Block())
    if not blocks[-1].body:
        blocks.pop()
    return blocks, {name: at for name, at in labels.items() if at < len(blocks)}
