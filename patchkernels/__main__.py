"""``python -m patchkernels`` is ``patchkernels``."""

from patchkernels.cli import main

main()
