"""What the machine reports: a wrong access or a wrong meeting of threads, which a GPU would pass over in silence."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what no correct kernel does. The text names the rule, the instruction, the threads and the data."""
