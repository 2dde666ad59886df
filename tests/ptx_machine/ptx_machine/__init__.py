"""Runs Triton kernels on CPU tensors as the PTX that the JIT compiled, with checks that a GPU does not make.

    driver = ptx_machine.install(90)    # or 80, 100; before the kernels are defined
    kernel[grid](tensors of the CPU)    # raises Fault at the first wrong access
    with driver.record() as launches:   # and counts what a launch does
        kernel[grid](...)

Needs numpy, torch and triton, and no GPU. docs/ptx-machine.md says what is checked and what is not modelled.
"""

from .driver import Launch, MachineDriver, install
from .faults import Fault
from .machine import Options

__all__ = ["Fault", "Launch", "MachineDriver", "Options", "install"]
