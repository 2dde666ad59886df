"""The operators: contract, autograd and registration of each. Their arithmetic is in ``kernels`` and ``eager``."""
