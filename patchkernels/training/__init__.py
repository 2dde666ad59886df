"""The training run: ``fit`` for a model of your own. ``patchkernels train`` is the same run of a ``PatchLM``."""

from patchkernels.training.fit import fit
from patchkernels.training.run import NonFiniteError
from patchkernels.training.stop import Stopped

__all__ = ["NonFiniteError", "Stopped", "fit"]
