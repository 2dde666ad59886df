"""A GPU for attention, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import flash_stand_ins
import pytest
import torch

from patchkernels.model import attention

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``gpu(major, *names)``: GPUs of that compute capability, and the stand-ins for these FlashAttention packages."""
    choose = attention._choose_cached

    def forget() -> None:
        choose.cache_clear()
        attention._functions.clear()
        torch.compiler.reset()

    def become(major: int, *names: str) -> None:
        forget()
        flash_stand_ins.install(monkeypatch, *names)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    yield become
    forget()


@pytest.fixture
def cpu_as_gpu(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As ``gpu``, and tensors on the CPU choose their attention as if they were on that GPU."""
    choose = attention._choose_cached
    monkeypatch.setattr(attention, "_choose_cached", lambda name, device, *rest: choose(name, CUDA, *rest))
    return gpu
