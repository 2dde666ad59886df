"""Short runs of ``fit``: a user's model, optimizers, and rows, and what is compared afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchkernels import PatchEmbedding, PatchLMHead, next_patch_targets
from patchkernels.training import fit
from patchkernels.training.log import read_log
from patchkernels.training.row_batches import RowBatches, StreamBatches

VOCAB, CONTEXT, WIDTH = 48, 8, 16
TIMES = ("seconds", "compile_seconds", "raw_tokens_per_second", "positions_per_second")


def token_rows(count: int = 48) -> torch.Tensor:
    return torch.randint(VOCAB, (count, CONTEXT), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A user's model with dropout, with a buffer that training changes, and with a parameter that is never used."""

    def __init__(self, dropout: float = 0.1, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.tokens = PatchEmbedding(VOCAB, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = PatchLMHead(WIDTH, VOCAB)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, patch_size: int) -> torch.Tensor:
        x = self.hidden(self.tokens(input_ids, patch_size)).tanh()
        if self.training:
            self.average.lerp_(x.detach().to(self.average.dtype).mean((0, 1)), self.rate)
        return self.head(self.dropout(x) + self.average, target=next_patch_targets(labels, patch_size))


class WithEmbedding(Model):
    """The same model, whose patch size is that of its embedding."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
        return {"loss": super().forward(input_ids, labels, self.tokens.patch_size)}["loss"]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrix = model.get_parameter("hidden.weight")
    others = [parameter for parameter in model.parameters() if parameter is not matrix]
    return [torch.optim.Muon([matrix], lr=1e-2), torch.optim.AdamW(others, lr=1e-3)]


def momentum(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)]


def new_model(cls: Callable[[], nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def train(out: Path, model: nn.Module, make: Any = adamw, rows: Any = None, **options: Any) -> dict[str, Any]:
    """Fits the model in 6 steps of patches and 12 of tokens, and returns its state."""
    settings = {"phases": "4:2/3,1:1/3", "batch_size": 2, "tokens": 36 * 2 * CONTEXT, "save_every": 5, "log_every": 1}
    settings |= {"validation": token_rows(5), "eval_every": 4, **options}
    fit(model, make(model), token_rows() if rows is None else rows, out=out, **settings)
    return {name: copy.deepcopy(value) for name, value in model.state_dict().items()}


def untimed(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(out / "log.jsonl")]


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        assert same, f"{name} is not the same bit for bit"


def crash_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Makes a run crash as the given step begins, when it reads its batch."""
    for cls in (RowBatches, StreamBatches):
        read = cls.batch

        def batch(self: Any, at: int, read: Any = read) -> Any:
            if at == step:
                raise KeyboardInterrupt
            return read(self, at)

        patch.setattr(cls, "batch", batch)


def assert_resumes(tmp_path, model: Any, make: Any = adamw, rows: Any = token_rows, at: int = 7, **options: Any) -> Any:
    """A run that crashes at a step and is resumed is the same as one that does not, bit for bit."""
    straight = train(tmp_path / "straight", model(), make, rows(), **options)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", model(), make, rows(), **options)
    resumed = train(tmp_path / "run", model(), make, rows(), **options, resume=True)
    assert_equal(resumed, straight)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
    return straight
