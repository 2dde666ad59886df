"""Triton kernels of patchkernels, installed as ``patchkernels.kernels``.

The name ``kernels`` belongs to another distribution, so importing this folder under that name is an error.
"""

if __name__ != "patchkernels.kernels":
    raise ImportError(
        f"these are the kernels of patchkernels; import them as 'patchkernels.kernels', not as {__name__!r}"
    )
