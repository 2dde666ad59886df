"""Triton kernels of patchkernels, installed as ``patchkernels.kernels``.

``kernels`` is another distribution's name on the package index, so a checkout's folder must never answer to it.
"""

if __name__ != "patchkernels.kernels":
    raise ImportError(
        f"these are the kernels of patchkernels; import them as 'patchkernels.kernels', not as {__name__!r}"
    )
