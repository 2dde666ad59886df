"""The right attention runs, and every implementation gives the same values."""

from __future__ import annotations

import itertools
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from patchkernels.model import attention as module
from patchkernels.model.attention import attention, choose_attention, document_positions

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_choice():
    module._choose_cached.cache_clear()
    yield
    module._choose_cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU with given FlashAttention packages: functions that record their call and use SDPA."""

    def install(major: int, *names: str) -> list[tuple[str, dict]]:
        calls = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        for name, (package, _, _) in module.FLASH.items():
            monkeypatch.setitem(sys.modules, package, None)  # not installed
            if name in names:
                fake = types.ModuleType(package)

                def varlen(q, k, v, *, name=name, **kwargs):
                    calls.append((name, kwargs))
                    edges = kwargs["cu_seqlens_q"].tolist()
                    parts = [
                        module._sdpa(*(t[None, a:b] for t in (q, k, v)), None)[0] for a, b in itertools.pairwise(edges)
                    ]
                    return torch.cat(parts), None

                def dense(q, k, v, *, name=name, **kwargs):
                    calls.append((name, kwargs))
                    return module._sdpa(q, k, v, None)

                fake.flash_attn_func, fake.flash_attn_varlen_func = dense, varlen
                monkeypatch.setitem(sys.modules, package, fake)
        return calls

    return install


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (9, ("flash2", "flash3", "flash4"), "flash4"),
        (9, ("flash2", "flash3"), "flash3"),
        (10, ("flash2", "flash3"), "flash2"),
        (8, ("flash2", "flash3", "flash4"), "flash2"),
        (7, ("flash2",), "sdpa"),
        (9, (), "sdpa"),
    ],
)
def test_auto_takes_the_best_that_fits_and_says_so_once(gpu, caplog, major, installed, expected):
    gpu(major, *installed)
    with caplog.at_level(logging.INFO, "patchkernels"):
        assert [choose_attention("auto", CUDA, torch.bfloat16) for _ in range(3)] == [expected] * 3
    assert [record.getMessage() for record in caplog.records] == [f"attention on cuda:0 in torch.bfloat16: {expected}"]
    assert choose_attention("auto", CUDA, torch.float32) == "sdpa"


def test_asked_for_by_name_and_not_to_be_had_raises(gpu):
    gpu(8, "flash3")
    with pytest.raises(RuntimeError, match=r"flash3.*compute capability 8\.x"):
        choose_attention("flash3", CUDA, torch.bfloat16)
    with pytest.raises(RuntimeError, match="flash-attn is not installed"):
        choose_attention("flash2", CUDA, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"bfloat16 or float16, got torch\.float32"):
        choose_attention("flash2", CUDA, torch.float32)
    with pytest.raises(RuntimeError, match="on cpu"):
        choose_attention("flash2", torch.device("cpu"), torch.bfloat16)


def test_a_broken_installation_is_not_hidden(gpu, monkeypatch):
    gpu(8)

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        choose_attention("auto", CUDA, torch.bfloat16)


def inputs(heads: int = 4, key_heads: int = 2):
    return [torch.randn(2, 12, h, 8) for h in (heads, key_heads, key_heads)]


def reference(q, k, v, documents):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bphd,bqhd->bhpq", q, k) / q.shape[-1] ** 0.5
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return torch.einsum("bhpq,bqhd->bphd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 1 + [3] * 10 + [9]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("flash", [False, True])
def test_values(gpu, monkeypatch, documents, flash):
    q, k, v = inputs()
    if flash:
        calls = gpu(9, "flash3")
        monkeypatch.setattr(module, "choose_attention", lambda *_: "flash3")
    out = attention(q, k, v, document_ids=documents)
    expected = reference(q, k, v, torch.zeros(2, 12) if documents is None else documents)
    torch.testing.assert_close(out, expected)
    if flash and documents is not None:
        assert calls[0][1]["cu_seqlens_q"].tolist() == [0, 5, 12, 13, 23, 24]
        assert calls[0][1]["max_seqlen_k"] == 10
        assert calls[0][1]["causal"]


def test_positions_restart_with_every_document():
    expected = torch.tensor([[*range(5), *range(7)], [0, *range(10), 0]])
    assert torch.equal(document_positions(DOCUMENTS), expected)


def test_unknown_name():
    with pytest.raises(ValueError, match="'flash9'"):
        attention(*inputs(), implementation="flash9")


def test_single_query_head_equals_torch():
    q, k, v = inputs(1, 1)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attention(q, k, v), expected.transpose(1, 2))
