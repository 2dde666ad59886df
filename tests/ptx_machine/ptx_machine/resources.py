"""What a compiled kernel takes of a GPU: registers, spilled bytes, shared memory, and how many CTAs fit beside it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

# Of an H100 (CUDA programming guide, compute capability 9.0).
REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256  # registers that a warp gets at a time
THREADS = 2048
CTAS = 32
SHARED = 228 * 1024
SHARED_OF_SYSTEM = 1024  # that each CTA takes for itself
SHARED_UNIT = 128


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread
    spilled: int  # bytes of stack and local memory of a thread
    spills_in_loop: bool  # whether some of them are read or written in an innermost loop
    shared: int  # bytes of a CTA
    threads: int  # of a CTA

    @property
    def ctas(self) -> int:
        """CTAs that an H100's multiprocessor holds at a time."""
        warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        shared = -(-(self.shared + SHARED_OF_SYSTEM) // SHARED_UNIT) * SHARED_UNIT
        return min(REGISTERS // (warp * (self.threads // 32)), SHARED // shared, THREADS // self.threads, CTAS)

    @property
    def occupancy(self) -> float:
        """Threads that an H100's multiprocessor holds, of those that it could."""
        return self.ctas * self.threads / THREADS


def registers_and_spills(cubin: bytes) -> tuple[int, int, bool]:
    """Of the one kernel of a binary: registers of a thread, bytes that it spills, and whether it does so in a loop."""
    usage = cuobjdump(cubin, "-res-usage")
    registers = re.search(r"REG:(\d+)", usage)
    if not registers:
        raise ValueError(f"cuobjdump reports no registers:\n{usage}")
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return int(registers[1]), spilled, spilled > 0 and spills_in_loop(cuobjdump(cubin, "-sass"))


def spills_in_loop(sass: str) -> bool:
    """Whether local memory is accessed between a jump backwards and its target, without another such loop in between.

    A loop around others, over rows say, does little of its own. Code behind the kernel's end is not looked at: rare
    branches stand there, and jump back to where they came from.
    """
    body = re.split(r"/\*[0-9a-f]{4,}\*/\s+EXIT\s*;", sass)[0]
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]+?)\s*;", body)]
    accesses = [at for at, text in instructions if re.search(r"\b(STL|LDL)\b", text)]
    jumps = [
        (at, int(found[1], 16)) for at, text in instructions if (found := re.search(r"\bBRA.* 0x([0-9a-f]+)", text))
    ]
    loops = {(target, at) for at, target in jumps if target <= at}
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return any(begin <= access <= end for begin, end in inner for access in accesses)


def cuobjdump(cubin: bytes, option: str) -> str:
    """The output of NVIDIA's tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
