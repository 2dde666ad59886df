"""Arguments that must raise a documented error: one written here in the library, not one of torch or Triton."""

from __future__ import annotations

import linecache
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import patchkernels
import patchkernels.kernels
from soak.cases import BadInputCase, EmbeddingCase, LossCase, TargetsCase
from soak.problems import Outputs, Problem, block_sizes, problem
from soak.tensors import DEVICE

FOLDERS = [Path(package.__file__).resolve().parent for package in (patchkernels, patchkernels.kernels)]
NOT_A_LABEL = -7  # no ignore_index that is drawn, and no class


class Mistake(NamedTuple):
    """Arguments that replace good ones, and the errors of which one must be raised."""

    changes: dict[str, Any]
    errors: tuple[type[Exception], ...]


def check(case: BadInputCase) -> None:
    """Asserts that a call with one mistake raises, or gives NaN where raising would have to wait for a GPU."""
    with block_sizes(case.good):
        good = problem(case.good)
        mistakes = _mistakes(case.good, good)
        changes, errors = mistakes[case.mistake % len(mistakes)]
        arguments = {**good.leaves, **good.constants, **good.arguments, **changes}
        given = {name: _described(value) for name, value in changes.items()}
        error, outputs = _called(good, arguments)
    expected = " or ".join(kind.__name__ for kind in errors)
    if error is None:
        silent = _gives_nan(case.good) or _has_zero_weights(case.good)
        assert IndexError in errors and silent, f"{given} must raise {expected}"
        _check_nan(case.good, changes, outputs)
    else:
        assert isinstance(error, errors), f"{given} must raise {expected}, got {error!r}"
        assert _raised_here(error), f"{given} must raise an error of this library, got {error!r}"


def _called(good: Problem, arguments: dict[str, Any]) -> tuple[Exception | None, Outputs]:
    try:
        return None, good.name_outputs(good.call(**arguments))
    except Exception as error:
        return error, {}


def _described(value: Any) -> Any:
    return f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value


def _gives_nan(case: Any) -> bool:
    """Whether a label out of range gives NaN instead of an error."""
    return case.backend == "triton" or DEVICE != "cpu"


def _has_zero_weights(case: Any) -> bool:
    """Whether a label out of range may be one of weight 0, which is ignored."""
    return isinstance(case, LossCase) and case.target_weight is not None and "zeros" in case.target_weight


def _check_nan(case: Any, changes: dict[str, Any], outputs: Outputs) -> None:
    if isinstance(case, LossCase):
        loss = outputs["loss"]
        bad = changes["target"] == NOT_A_LABEL if case.reduction == "none" else torch.ones_like(loss).bool()
        assert _has_zero_weights(case) or bool(loss[bad].isnan().all()), "a target out of range must give NaN"
    else:
        bad = (changes["input_ids"] < 0).unflatten(-1, (-1, case.patch_size)).any(-1)
        assert torch.equal(outputs["embedding"].isnan().any(-1), bad), "an id out of range must give NaN"


def _raised_here(error: Exception) -> bool:
    """Whether the innermost frame of an error is a ``raise`` statement of the library."""
    frame = error.__traceback__
    assert frame is not None
    while frame.tb_next is not None:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename)
    line = linecache.getline(str(file), frame.tb_lineno).strip()
    return line.startswith("raise") and any(folder in file.resolve().parents for folder in FOLDERS)


def _mistakes(case: Any, good: Problem) -> list[Mistake]:
    find = {EmbeddingCase: _embedding_mistakes, LossCase: _loss_mistakes, TargetsCase: _targets_mistakes}
    return find[type(case)](case, good)


def _numbers(name: str, *values: Any) -> list[Mistake]:
    return [Mistake({name: value}, (ValueError,)) for value in values]


def _dtypes(name: str, tensor: Tensor, *dtypes: torch.dtype, errors: Any = (TypeError,)) -> list[Mistake]:
    return [Mistake({name: torch.zeros(tensor.shape, dtype=dtype, device=DEVICE)}, errors) for dtype in dtypes]


def _shapes(name: str, *tensors: Tensor) -> list[Mistake]:
    return [Mistake({name: tensor}, (ValueError,)) for tensor in tensors]


NOT_FLOATS = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
NOT_LABELS = (torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16)


def _targets_mistakes(case: TargetsCase, good: Problem) -> list[Mistake]:
    labels = good.constants["labels"]
    found = _dtypes("labels", labels, *NOT_LABELS) + _numbers("patch_size", 0, -1)
    found += _shapes("labels", torch.zeros((), dtype=torch.int64, device=DEVICE))
    found += [Mistake({"ignore_index": 2**63}, (ValueError,))]
    if labels.dtype == torch.int32:
        found += _numbers("ignore_index", 2**31, -(2**31) - 1)
    if case.patch_size > 1:
        found += _shapes("labels", labels.new_zeros(*case.leading, case.patch_size + 1))
    return found


def _embedding_mistakes(case: EmbeddingCase, good: Problem) -> list[Mistake]:
    ids, weight = good.constants["input_ids"], good.leaves["weight"]
    found = _dtypes("input_ids", ids, *NOT_LABELS) + _dtypes("weight", weight, *NOT_FLOATS)
    found += _shapes("weight", weight[0], weight[None], weight.to("meta"))
    found += _shapes("input_ids", ids.new_zeros(()))
    found += _numbers("padding_idx", case.vocab, -case.vocab - 1) if not case.module else []  # nn.Embedding asserts
    found += _numbers("patch_size", 0, -1)
    if not case.module:
        found += _numbers("backend", "cuda")
    if case.backend == "triton":
        found += [Mistake({"weight": weight.double()}, (RuntimeError, TypeError))]
    if case.patch_size > 1:
        found += _shapes("input_ids", ids.new_zeros(*case.leading, case.patch_size + 1))
    if ids.numel():
        for bad in (-1, -(2**31)):
            found.append(Mistake({"input_ids": _with_one(ids, bad)}, (IndexError,)))
    return found


def _loss_mistakes(case: LossCase, good: Problem) -> list[Mistake]:
    x, target = good.leaves.get("input"), good.constants["target"]
    found = _dtypes("target", target, *NOT_LABELS)
    found += _numbers("label_smoothing", -0.1, 1.1, math.nan) + _numbers("z_loss_weight", -1.0, math.nan, math.inf)
    found += _numbers("softcap", 0.0, -1.0, math.nan, math.inf, 1e39, 1e-46)
    found += _numbers("reduction", "average", None) + _numbers("backend", "cuda")
    found += [Mistake({"ignore_index": 2**63}, (ValueError,))]
    if target.dtype == torch.int32:
        found += _numbers("ignore_index", 2**31, -(2**31) - 1)
    found += _shapes("target", target[None, None], target.to("meta"), target.new_zeros(*case.leading, 0))
    found += _shapes("target_weight", torch.ones(*target.shape, 3, device=DEVICE))
    found += _shapes("target_weight", torch.ones(case.slots or 1, device=DEVICE, requires_grad=True))
    found += _shapes("target_weight", torch.ones(case.slots or 1, device="meta"))
    if target.numel():
        found.append(Mistake({"target": _with_one(target, NOT_A_LABEL)}, (IndexError,)))
    if x is not None and case.form == "logits":
        found += _dtypes("input", x, *NOT_FLOATS) + _shapes("input", x.to("meta"), x[..., :0])
    if case.backend == "triton" and case.form == "logits":
        found += [Mistake({"input": x.double()}, (RuntimeError, TypeError))]
    return found + (_head_mistakes(case, good) if case.form != "logits" else [])


def _head_mistakes(case: LossCase, good: Problem) -> list[Mistake]:
    x, weight = good.leaves.get("input"), good.leaves["weight"]
    found = _numbers("logits_bytes", 0, -1) + _numbers("memory", "tiny")
    if case.tied:  # the embedding would be the one to raise
        return found
    assert x is not None
    found += _dtypes("weight", weight, *NOT_FLOATS, errors=(TypeError, ValueError))
    found += _shapes("weight", weight[0], weight[None], weight[:0], weight.to("meta"))
    found += _shapes("weight", torch.cat([weight, weight], 1))
    found += _dtypes("input", x, *NOT_FLOATS, errors=(TypeError, ValueError))
    if case.autocast is None:
        other = torch.float16 if case.dtype != "float16" else torch.bfloat16
        found += _shapes("weight", weight.to(other))
    if case.bias:
        bias = good.leaves["bias"]
        found += _shapes("bias", bias[None], bias.repeat(2), bias.to("meta"))
    return found


def _with_one(ids: Tensor, bad: int) -> Tensor:
    """A copy of which the first element is bad."""
    ids = ids.contiguous().clone()
    ids.view(-1)[0] = bad
    return ids
