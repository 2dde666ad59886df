"""``fit``: any module, optimizer and rows through all phases, and as if nothing had happened when it is resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fit_runs
import pytest
import torch
import torch.nn.functional as F
from distributed import run
from fit_runs import (
    CONTEXT,
    VOCAB,
    WIDTH,
    Model,
    WithEmbedding,
    adamw,
    assert_equal,
    crash_at,
    momentum,
    muon_and_adamw,
    new_model,
    token_rows,
    train,
    untimed,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.training import NonFiniteError
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log
from patchkernels.training.processes import full_tensor


def test_the_losses_and_weights_of_a_loop_written_by_hand(tmp_path):
    model, expected = new_model(), new_model()
    train(
        tmp_path, model, tokens=24 * 2 * CONTEXT, phases=[(2, 1 / 2), (1, 1 / 2)], shuffle=False, warmup=0.0, decay=0.0
    )
    (optimizer,), losses, rows = adamw(expected), [], iter(token_rows())
    torch.manual_seed(1)
    for size in [2] * 6 + [1] * 12:
        ids = torch.stack([torch.cat(list(itertools.islice(rows, size))) for _ in range(2)])
        loss = expected(ids, ids, size)
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["loss"] for line in lines[1:]] == losses
    assert_equal(model.state_dict(), expected.state_dict())
    held_out, expected = token_rows(5), expected.eval()
    with torch.no_grad():
        assert lines[-1]["validation_loss"] == pytest.approx(float(expected(held_out, held_out, 1)), rel=1e-6)
    assert [line["patch_size"] for line in lines[1:]] == [2] * 6 + [1] * 12
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 6, 7, 8, 10, 12, 14, 16, 18]
    assert model.training and (tmp_path / "plot.png").is_file()


class Stream(IterableDataset):
    """Rows that can only be read in order, from the beginning each time, as dictionaries with labels."""

    def __len__(self):
        return 20

    def __iter__(self):
        for row in token_rows(20):
            labels = row.clone()
            labels[:3] = -100
            yield {"input_ids": row.tolist(), "labels": labels.numpy()}


ROWS: dict[str, Callable[[], Any]] = {
    "tensor": token_rows,
    "dataset": lambda: datasets.Dataset.from_dict({"input_ids": token_rows().tolist(), "other": [0] * 48}),
    "iterable dataset": lambda: datasets.Dataset.from_dict({"input_ids": token_rows().tolist()}).to_iterable_dataset(),
    "stream with labels": Stream,
    "generator": lambda: (row.numpy() for row in token_rows(72)),
}


@pytest.mark.parametrize("at", [3, 6, 7, 13])
@pytest.mark.parametrize(
    ("rows", "make", "options"),
    [
        ("tensor", adamw, {}),
        ("dataset", muon_and_adamw, {"optimizer_at_switch": "reset", "accumulation": 2}),
        ("iterable dataset", momentum, {"lr_scope": "phase", "lr_shape": "cosine"}),
        ("stream with labels", adamw, {"accumulation": 2, "bf16": True}),
        ("generator", muon_and_adamw, {"convention": "tokens", "phases": "4:1/2,1:1/2"}),
    ],
    ids=list(ROWS),
)
def test_resumed_is_as_if_nothing_had_happened(tmp_path, monkeypatch, at, rows, make, options):
    options = {**options, "rows": None, "make": make}
    straight = train(tmp_path / "straight", new_model(), **{**options, "rows": ROWS[rows]()})
    with monkeypatch.context() as patch:
        crash_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", new_model(), **{**options, "rows": ROWS[rows]()})
    resumes = bool(checkpoints(tmp_path / "run" / "checkpoints"))
    assert resumes == (at > 5)
    torch.rand(7)  # the generator is another one when the run goes on
    resumed = train(tmp_path / "run", new_model(), **{**options, "rows": ROWS[rows](), "resume": resumes})
    assert_equal(resumed, straight)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
    assert straight["average"].any()


def test_every_interface_gives_the_same_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    from patchkernels import hf

    expected = train(tmp_path / "patch_size", new_model())
    assert_equal(train(tmp_path / "embedding", new_model(WithEmbedding)), expected)
    compiled = torch.compile(model := new_model(), backend="aot_eager")
    train(tmp_path / "compiled", compiled)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name])

    config = PatchLMConfig(VOCAB, WIDTH, 24, 1, 2, max_position_embeddings=CONTEXT, initializer_range=0.2)
    ours = new_model(lambda: PatchLM(config))
    ours.save_pretrained(tmp_path / "model")
    enabled = hf.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 2)
    expected = train(tmp_path / "ours", ours)
    found = train(tmp_path / "enabled", enabled)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    assert [len(line.get("validation_slot_losses", [])) for line in read_log(tmp_path / "ours" / "log.jsonl")[:2]] == [
        4,
        0,
    ]


def test_a_step_is_the_mean_over_its_targets_however_it_is_divided(tmp_path):
    """Rows have different numbers of targets, and one has none."""
    rows = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(CONTEXT) >= 3 * n, -100)}
        for n, row in enumerate(token_rows(4))
    ]
    options = {"rows": rows, "batch_size": 4, "tokens": 12 * CONTEXT, "phases": "1:1", "validation": None}
    for name, parts in (("whole", 1), ("parts", 4)):
        train(tmp_path / name, new_model(lambda: Model(0.0, rate=0.0)), **options, accumulation=parts)
    whole, parts = ([line["loss"] for line in untimed(tmp_path / name)[1:]] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-5)
    model = new_model(lambda: Model(0.0, rate=0.0)).eval()
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logits = model.head(model.hidden(model.tokens(ids, 1)).tanh())[:, :-1]
    assert whole[0] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item(), rel=1e-6)


def test_rows_without_any_target_change_nothing(tmp_path):
    rows = [{"input_ids": row, "labels": torch.full((CONTEXT,), -100)} for row in token_rows(8)]
    model = new_model(lambda: Model(dropout=0.0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(tmp_path, model, momentum, rows=rows, tokens=8 * CONTEXT, phases="2:1/2,1:1/2", validation=None)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {line.get("loss", 0.0) for line in untimed(tmp_path)} == {0.0}


def fit_on_processes(out: Path, parallel: str, optimizer: str) -> list[dict[str, Any]]:
    """The weights of a run without dropout, of one with dropout, and of the same one that crashed and was resumed."""

    def weights_of(folder: str, dropout: float, resume: bool = False) -> dict[str, Any]:
        model = inner = new_model(lambda: Model(dropout, rate=0.0))
        if parallel == "fsdp":
            fully_shard(model)
        optimizers = getattr(fit_runs, optimizer)(model)
        if parallel == "ddp":
            model = DistributedDataParallel(model, find_unused_parameters=True)
        train(out / folder, model, lambda _: optimizers, batch_size=4, accumulation=2, resume=resume)
        return {name: full_tensor(parameter).tolist() for name, parameter in inner.named_parameters()}

    found = [weights_of("two", 0.0), weights_of("straight", 0.2)]
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            weights_of("resumed", 0.2)
    return [*found, weights_of("resumed", 0.2, resume=True)]


@pytest.mark.parametrize(
    ("parallel", "optimizer"), [("fsdp", "adamw"), ("ddp", "muon_and_adamw"), ("fsdp", "muon_and_adamw")]
)
def test_several_processes(tmp_path, parallel, optimizer):
    """Without dropout two processes give the run of one; with dropout a resumed run is the same, bit for bit."""
    model = new_model(lambda: Model(0.0, rate=0.0))
    train(tmp_path / "one", model, getattr(fit_runs, optimizer), batch_size=4, accumulation=2)
    first, second = run(fit_on_processes, 2, tmp_path, parallel, optimizer)
    assert first == second
    without_dropout, straight, resumed = first
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.tensor(without_dropout[name]), parameter.detach(), rtol=2e-2, atol=2e-4)
    assert resumed == straight != without_dropout


def fit_unprepared(out: Path) -> list[str]:
    """The errors of models that several processes cannot train."""
    errors = []
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    for prepare in (
        lambda model: None,
        lambda model: fully_shard(tensor_parallel(model, mesh["model"]), mesh=mesh["data"]),
    ):
        prepare(model := new_model())
        try:
            train(out, model)
        except ValueError as error:
            errors.append(str(error))
    return errors


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"hidden": ColwiseParallel()})


def test_several_processes_need_data_parallelism(tmp_path):
    for plain, tensor in run(fit_unprepared, 2, tmp_path / "run"):
        assert "fully_shard or wrapped in DistributedDataParallel, got Model" in plain
        assert "tensor parallelism" in tensor
    assert not (tmp_path / "run").exists()


class NoLabels(Model):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_ids, input_ids, self.tokens.patch_size)


class Table:
    """Columns by name, as in a table of pandas."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, name: object) -> object:
        raise KeyError(name)


class SparseBuffer(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.eye(3).to_sparse())


def with_scheduler(model: nn.Module) -> list[torch.optim.Optimizer]:
    (optimizer,) = adamw(model)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return [optimizer]


class NoPatches(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": lambda: NoPatches(2, 2)}, TypeError, r"\(input_ids, labels, patch_size\).*forward\(input"),
        ({"model": NoLabels, "rows": Stream}, ValueError, "NoLabels.forward takes none"),
        ({"rows": lambda: 3}, TypeError, "a dataset or an iterable of rows of token ids, got int"),
        ({"rows": lambda: datasets.DatasetDict()}, TypeError, "got DatasetDict"),
        ({"rows": list}, ValueError, "there are no rows"),
        ({"rows": lambda: iter([])}, ValueError, "there are no rows"),
        ({"rows": lambda: [[0.5, 1.0]]}, ValueError, r"row 0: input_ids must be integers, one for .*torch.float64"),
        ({"rows": lambda: [token_rows(2)]}, ValueError, r"row 0: input_ids must be integers, one for .*\(2, 8\)"),
        ({"rows": lambda: [{"input_ids": [1, 2], "labels": [1]}]}, ValueError, "row 0: labels must be 2 .*got 1"),
        ({"rows": lambda: [{"text": "abc"}]}, ValueError, r"row 0 must hold input_ids, got \['text'\]"),
        ({"rows": lambda: [[1, 2, 3, 4], [1, 2, 3]], "validation": None}, ValueError, "row 1: .* must be 4 .*got 3"),
        ({"rows": Stream, "tokens": None}, ValueError, "rows without a length need tokens"),
        ({"rows": lambda: ["some text"]}, ValueError, "row 0: input_ids must be integers"),
        ({"rows": lambda: [[[1, 2], [3]]]}, ValueError, "row 0: input_ids must be integers"),
        ({"rows": lambda: token_rows().flatten()}, ValueError, r"got torch.int64 of shape \(\); .*reshape\(-1, T\)"),
        ({"rows": lambda: DataLoader(token_rows(), batch_size=4)}, ValueError, "gives rows with batch_size=None"),
        ({"rows": lambda: Table()}, TypeError, r"read by their numbers, but Table\[0\] fails"),
        ({"tokens": "5000"}, TypeError, "tokens must be a number, got '5000'"),
        ({"clip": None}, ValueError, "clip must be positive, got None"),
        ({"batch_size": 4.0}, ValueError, "batch_size must be a whole number"),
        ({"accumulation": 1.0}, ValueError, "accumulation must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0 on, got -1"),
        ({"resume": "yes"}, ValueError, "resume must be True, False or 'auto', got 'yes'"),
        ({"make": lambda model: None}, TypeError, r"torch.optim.Optimizer, got \['NoneType'\]"),
        ({"make": lambda model: torch.optim.AdamW}, TypeError, r"torch.optim.Optimizer, got \['AdamW'\]"),
        ({"make": with_scheduler}, ValueError, "AdamW has a scheduler of its learning rate"),
        ({"model": lambda: new_model().requires_grad_(False)}, ValueError, "no parameter .* requires gradients"),
        ({"model": SparseBuffer}, TypeError, "edges cannot be saved: a tensor of torch.float32 and torch.sparse_coo"),
        ({"tokens": float("nan")}, ValueError, "tokens must be positive and finite, got nan"),
        ({"validation": lambda: torch.zeros(2, 5, dtype=torch.long)}, ValueError, "must have 8 tokens, .* got 5"),
        ({"make": lambda model: adamw(new_model())}, ValueError, "parameters that are not the model's"),
        ({"make": lambda model: []}, TypeError, r"torch.optim.Optimizer, got \[\]"),
        ({"model": lambda: Model().to("meta")}, ValueError, r"on one device, got \['meta'\]"),
        ({"phases": "4:2"}, ValueError, "add up to 1"),
        ({"phases": "16:1/2,1:1/2", "convention": "tokens"}, ValueError, "divisible by the patch size"),
        ({"batch_size": 3, "accumulation": 2}, ValueError, "batch_size must be divisible by accumulation"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
        ({"minutes": -1.0}, ValueError, "minutes must be positive"),
        ({"keep": 0}, ValueError, "keep must be a whole number and at least 1"),
        ({"warmup": 1.5}, ValueError, "warmup in"),
        ({"optimizer_at_switch": "keep"}, ValueError, "optimizer_at_switch must be one of"),
        ({"resume": True}, FileNotFoundError, "nothing to resume"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_any_work(tmp_path, changes, error, message):
    changes = dict(changes)
    model, rows = new_model(changes.pop("model", Model)), changes.pop("rows", token_rows)()
    if callable(changes.get("validation")):
        changes["validation"] = changes["validation"]()
    with pytest.raises(error, match=message):
        train(tmp_path / "run", model, rows=rows, **changes)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, new_model())
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run"):
        train(tmp_path, new_model())
    with pytest.raises(FileExistsError, match="is a file: expected a folder"):
        train(tmp_path / "log.jsonl", new_model())
    for changes, message in (
        ({"rows": token_rows() + 1 - 1, "batch_size": 4}, "batch_size: 2 there, 4 here"),
        ({"rows": token_rows().flip(0)}, "rows: "),
        ({"make": momentum}, "groups 0 amsgrad: .*optimizers 0: .*AdamW.*SGD"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"validation": token_rows(6)}, "validation: "),
        (
            {"make": lambda model: [torch.optim.AdamW(model.parameters(), lr=2e-2)]},
            r"\(groups 0 lr: 0.01 there, 0.02 here\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, new_model(), **changes, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_rates_are_those_of_the_optimizers_times_the_schedule(tmp_path):
    model = new_model()
    optimizers, rates = muon_and_adamw(model), []
    step = optimizers[1].step
    optimizers[1].step = lambda: (rates.append([o.param_groups[0]["lr"] for o in optimizers]), step())
    train(tmp_path, model, lambda _: optimizers, warmup=0.5, decay=0.2)
    assert rates[0] == pytest.approx([1e-2 / 9, 1e-3 / 9]) and max(rates) == [1e-2, 1e-3]
    assert rates[-1] == pytest.approx([1e-2 / 4, 1e-3 / 4])
    assert [o.param_groups[0]["lr"] for o in optimizers] == [1e-2, 1e-3], "afterwards they are what they were"


def test_parameters_without_an_optimizer_are_named(tmp_path, caplog):
    model = new_model()
    train(tmp_path / "a", model, lambda _: [torch.optim.SGD(model.head.parameters(), lr=0.1)], tokens=8 * 2 * CONTEXT)
    assert "4 parameters that require gradients are in no optimizer" in caplog.text


def test_divergence_leaves_the_last_checkpoint(tmp_path):
    class Diverging(Model):
        def forward(self, input_ids, labels, patch_size):
            return super().forward(input_ids, labels, patch_size) / (patch_size - 1)

    with pytest.raises(NonFiniteError, match=r"step 7: .*stopped before the update"):
        train(tmp_path, new_model(Diverging), validation=None)
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step-00000005", "step-00000006"]


def test_what_forward_returns(tmp_path):
    class Vector(Model):
        def forward(self, input_ids, labels, patch_size):
            return super().forward(input_ids, labels, patch_size).expand(2)

    with pytest.raises(TypeError, match=r"Vector.forward must return the loss.*got Tensor of shape \(2,\)"):
        train(tmp_path, new_model(Vector))


def test_an_iterator_that_ends_too_early(tmp_path):
    with pytest.raises(ValueError, match="the rows have ended and cannot be read again"):
        train(tmp_path, new_model(), rows=iter(token_rows(10)))
