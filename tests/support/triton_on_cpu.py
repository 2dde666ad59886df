"""Where Triton kernels run in the tests when there is no GPU; import it before any kernel is defined.

Interpreted, unless the environment says otherwise:

    PTX_MACHINE=80|90|100    compiled for that architecture, and executed as PTX by ``ptx_machine``
    PTX_ORDER=interleaved|forward|backward|random    in which order its warps run
"""

from __future__ import annotations

import os

import torch

ARCHITECTURE = int(os.environ.get("PTX_MACHINE", "0"))

if torch.cuda.is_available():
    assert not ARCHITECTURE, "PTX_MACHINE is for a machine without a GPU"
elif ARCHITECTURE:
    os.environ.pop("TRITON_INTERPRET", None)
    import ptx_machine

    from patchkernels.ops import backend

    order = os.environ.get("PTX_ORDER", "interleaved")
    ptx_machine.install(ARCHITECTURE, order=order, poison=True, kept=frozenset({"picked_ptr"}))
    backend._runs_on_cpu = lambda: True
else:
    os.environ["TRITON_INTERPRET"] = "1"
