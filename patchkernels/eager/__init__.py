"""The operators' arithmetic in plain PyTorch: what runs on CPUs, and in fp64.

Every module holds the functions of the module of the same name in :mod:`patchkernels.kernels`.
"""
