"""Runs code without a trace in the random states and without the caller's settings of precision."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside the block, models compute in fp32 with gradients; after it, all random states are what they were.

    In the block transformers does not warn: its warnings would be about a copy that the caller does not know of.
    The random states are those of torch on the CPU and on the devices of the model, of numpy and of Python.
    """
    import numpy
    import transformers

    verbosity = transformers.logging.get_verbosity()
    numpy_state, python_state = numpy.random.get_state(), random.getstate()  # noqa: NPY002 (the global one)
    dtype = torch.get_default_dtype()
    devices = {parameter.device for parameter in model.parameters()}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    try:
        torch.set_default_dtype(torch.float32)
        transformers.logging.set_verbosity_error()
        with (
            torch.random.fork_rng(accelerators, device_type=kind),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast(kind, enabled=False),
            without_tf32(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        transformers.logging.set_verbosity(verbosity)
        numpy.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of fp32 matrices are computed in fp32 inside the block."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv)
    precisions = [setting.fp32_precision for setting in settings]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by these attributes alone, which leaves the older setting undefined
        precision = ""
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if precision:
            torch.set_float32_matmul_precision(precision)
        for setting, value in zip(settings, precisions):
            setting.fp32_precision = value
