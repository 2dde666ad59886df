"""The right attention runs, and every implementation gives the same values."""

from __future__ import annotations

import itertools
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from flash_stand_ins import EarlyFlashAttention3, module_of
from oracle import compare

from patchkernels.model import attention as module
from patchkernels.model.attention import (
    attention,
    choose_attention,
    document_edges,
    document_positions,
    pack_documents,
    reason_unavailable,
)

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("major", [7, 8, 9, 10, 12])
@pytest.mark.parametrize("installed", list(itertools.product([False, True], repeat=3)))
def test_auto_takes_the_best_that_is_installed_and_has_kernels(gpu, major, installed):
    names = list(itertools.compress(("flash2", "flash3", "flash4"), installed))
    gpu(major, *names)
    best = {7: (), 8: ("flash2",), 9: ("flash4", "flash3", "flash2")}.get(major, ("flash4", "flash2"))
    expected = next((name for name in best if name in names), "sdpa")
    assert choose_attention("auto", CUDA, torch.bfloat16, 64) == expected
    assert choose_attention("auto", CUDA, torch.float32, 64) == "sdpa"


def test_the_choice_is_logged_once_with_its_reasons(gpu, caplog):
    gpu(10, "flash2", "flash3")
    with caplog.at_level(logging.INFO, "patchkernels"):
        for _ in range(3):
            choose_attention("auto", CUDA, torch.bfloat16, 64)
            choose_attention("auto", torch.device("cpu"), torch.float32, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cuda:0 in torch.bfloat16: flash2; not flash4: flash-attn-4 is not installed; "
        "not flash3: it has no kernels for compute capability 10.x",
        "attention on cpu in torch.float32: sdpa",
    ]


@pytest.mark.parametrize(
    ("major", "head_size", "expected"),
    [(9, 256, "flash4"), (9, 100, "flash2"), (9, 264, "sdpa"), (10, 256, "flash4"), (10, 192, "flash2"),
     (12, 128, "flash4"), (12, 256, "flash2")],
)  # fmt: skip
def test_auto_minds_the_head_size(gpu, major, head_size, expected):
    gpu(major, "flash2", "flash3", "flash4")
    assert choose_attention("auto", CUDA, torch.float16, head_size) == expected


def test_asked_for_by_name_and_not_to_be_had_raises(gpu):
    gpu(8, "flash3")
    for name, device, dtype, head_size, message in (
        ("flash3", CUDA, torch.bfloat16, 64, r"'flash3' cannot run.*compute capability 8\.x"),
        ("flash2", CUDA, torch.bfloat16, 64, "flash-attn is not installed"),
        ("flash2", CUDA, torch.float32, 64, r"bfloat16 or float16, got torch\.float32"),
        ("flash2", CUDA, torch.bfloat16, 512, r"heads of size 512 on compute capability 8\.x"),
        ("flash2", torch.device("cpu"), torch.bfloat16, 64, "on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            choose_attention(name, device, dtype, head_size)


def test_flash_attn_of_early_cute_does_not_pass_for_flash_attn_4(gpu, caplog):
    """The source distribution of flash-attn 2.8.3 holds a ``flash_attn.cute``, which may overwrite a newer one."""
    gpu(9, "flash2")
    assert reason_unavailable("flash4", CUDA, torch.bfloat16, 64) == "flash-attn-4 is not installed"
    gpu(9, "flash4", "flash2")
    reason = "flash-attn-4 4.0.0b36 has another interface: flash_attn.cute.flash_attn_varlen_func: .*'max_seqlen_q'"
    with caplog.at_level(logging.INFO, "patchkernels"):
        assert choose_attention("auto", CUDA, torch.bfloat16, 64) == "flash2"
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "attention on cuda:0 in torch.bfloat16: flash2; not flash4: flash-attn-4 4.0."
    )
    with pytest.raises(RuntimeError, match=reason):
        choose_attention("flash4", CUDA, torch.bfloat16, 64)


def test_other_interfaces_are_a_reason(gpu, monkeypatch):
    gpu(9, "flash3")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module_of("flash_attn_interface", EarlyFlashAttention3))
    assert "missing a required argument: 'seqused_q'" in reason_unavailable("flash3", CUDA, torch.bfloat16, 64)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module_of("flash_attn_interface", object))
    assert reason_unavailable("flash3", CUDA, torch.bfloat16, 64).endswith("flash_attn_func is missing")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert reason_unavailable("flash3", CUDA, torch.bfloat16, 64).endswith("holds no module flash_attn_interface")


def test_a_broken_installation_is_not_hidden(gpu, monkeypatch, tmp_path):
    gpu(9, "flash3")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.syspath_prepend(tmp_path)
    for content, error in (
        ("raise ImportError('undefined symbol')", "undefined symbol"),
        ("import flash_attn_3._C", "No module named 'flash_attn_3'"),
    ):
        (tmp_path / "flash_attn_interface.py").write_text(content)
        with pytest.raises(ImportError, match=error):
            choose_attention("auto", CUDA, torch.bfloat16, 64)


def test_distributions_are_found_by_their_installed_names(gpu, monkeypatch, tmp_path):
    """FlashAttention 3 calls itself flash_attn_3."""
    version = module.metadata.version
    gpu(9)
    monkeypatch.setattr(module.metadata, "version", version)
    folder = tmp_path / "flash_attn_3-3.0.0b1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn_3\nVersion: 3.0.0b1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        reason_unavailable("flash3", CUDA, torch.bfloat16, 64)
        == "flash-attn-3 3.0.0b1 holds no module flash_attn_interface"
    )


def inputs(dtype: torch.dtype = torch.bfloat16, length: int = 12, head_size: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, length, heads, head_size).to(dtype) for heads in (4, 2, 2)]


def reference(q, k, v, document_ids):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bphd,bqhd->bhpq", q, k) / q.shape[-1] ** 0.5
    mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]
    return torch.einsum("bhpq,bqhd->bphd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 1 + [3] * 10 + [9]])


@pytest.mark.parametrize("document_ids", [None, DOCUMENTS, DOCUMENTS[:, ::12], torch.arange(26).view(2, 13)])
@pytest.mark.parametrize(
    ("name", "head_size"), [("sdpa", 8), ("flash2", 8), ("flash2", 12), ("flash3", 8), ("flash4", 8)]
)
def test_values_and_gradients(cpu_as_gpu, name, head_size, document_ids):
    cpu_as_gpu(9, *([] if name == "sdpa" else [name]))
    length = 12 if document_ids is None else document_ids.shape[1]
    documents = None if document_ids is None else pack_documents(document_ids, name, torch.bfloat16, head_size)
    ids = torch.zeros(2, length) if document_ids is None else document_ids
    compare(
        lambda q, k, v: attention(q, k, v, documents=documents, implementation=name),
        lambda q, k, v: reference(q, k, v, ids),
        *inputs(length=length, head_size=head_size),
    )


def test_edges_of_documents():
    """Empty documents fill up to a power of two, but not further than one document a position."""
    edges = document_edges(DOCUMENTS)
    assert edges.tolist() == [0, 5, 12, 13, 23, 24, 24, 24, 24]
    assert edges.dtype == torch.int32
    assert document_edges(torch.zeros(3, 1)).tolist() == [0, 1, 2, 3]
    assert document_edges(torch.arange(5)[None]).tolist() == [0, 1, 2, 3, 4, 5]
    assert document_edges(torch.zeros(1, 7)).tolist() == [0, 7]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "flash2", "flash3"])
def test_one_graph(cpu_as_gpu, name, packed):
    """What is imported, read and logged for the choice is not traced. The kernels are operators of the graph."""
    cpu_as_gpu(9, *([] if name == "sdpa" else [name]))
    documents = pack_documents(DOCUMENTS, name, torch.bfloat16, 8) if packed else None
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in inputs()]
    upstream = torch.randn_like(leaves[0])
    results = []
    for function in (compiled, attention):
        out = function(*leaves, documents=documents, implementation=name)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_flash_attention_4_runs_beside_the_graph(cpu_as_gpu):
    """It hands the addresses of tensors to its kernels, which tensors that torch.compile traces with do not have."""
    cpu_as_gpu(9, "flash4")
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="flash-attn-4 are not registered as operators"):
        torch.compile(attention, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.compiler.reset()
    assert torch.equal(torch.compile(attention, backend="aot_eager")(q, k, v), attention(q, k, v))


def test_positions_restart_with_every_document():
    expected = torch.tensor([[*range(5), *range(7)], [0, *range(10), 0]])
    assert torch.equal(document_positions(DOCUMENTS), expected)


def test_unknown_name():
    with pytest.raises(ValueError, match="'flash9'"):
        attention(*inputs(), implementation="flash9")


def test_single_query_head_equals_torch():
    q, k, v = (t[:, :, :1] for t in inputs(torch.float32))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attention(q, k, v), expected.transpose(1, 2))
