"""Where the checkout is, and how a test process leaves it."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def leave_checkout() -> None:
    """Takes the checkout off ``sys.path``, once ``patchkernels`` is imported.

    transformers imports whatever answers to the name ``kernels``, and in the root of a checkout that is our folder.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]
