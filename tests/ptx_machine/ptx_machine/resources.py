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


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory, of the one kernel of a binary."""
    usage = cuobjdump(cubin, "-res-usage")
    registers = re.search(r"REG:(\d+)", usage)
    if not registers:
        raise ValueError(f"cuobjdump reports no registers:\n{usage}")
    return int(registers[1]), sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def cuobjdump(cubin: bytes, option: str) -> str:
    """The output of NVIDIA's tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
