"""Makes ``python -m patchkernels`` and ``torchrun -m patchkernels`` the same as the command ``patchkernels``."""

from patchkernels.cli import main

main()
