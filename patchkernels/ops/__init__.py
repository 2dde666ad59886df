"""The contract, autograd and registration of every operator. The arithmetic is in ``kernels`` and ``eager``."""
