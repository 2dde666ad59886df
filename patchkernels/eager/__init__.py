"""The operators' arithmetic in plain PyTorch: the backend for CPUs and for fp64.

Every module has the same functions as the module of the same name in :mod:`patchkernels.kernels`.
"""
