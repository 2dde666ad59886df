"""What operators and training steps do on a GPU, counted without one: ``python -m bench.ledger``.

The code runs as on a GPU, with tensors that hold no data (:mod:`bench.fake_cuda`), and every operation and kernel is
entered in a ledger with its bytes, FLOPs and launches (:mod:`bench.ledger.operations`,
:mod:`patchkernels.kernels.traffic`). At a given rate of memory and of arithmetic an entry takes the longer of its two
times. The sum bounds the time on a GPU from below: launches cost nothing, and every operation is as fast as its bytes
or its FLOPs allow.
"""
