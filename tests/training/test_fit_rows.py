"""The rows of ``fit``: what is accepted, what is refused, and the random numbers that they draw."""

from __future__ import annotations

import pytest
import torch
from fit_runs import (
    CONTEXT,
    Model,
    assert_equal,
    assert_resumes,
    new_model,
    token_rows,
    train,
)
from torch.utils.data import DataLoader, Dataset

from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log


class Marked(Dataset):
    """Rows whose labels are masked at random as they are read."""

    def __len__(self):
        return 48

    def __getitem__(self, number):
        row = token_rows()[number]
        return {"input_ids": row, "labels": row.masked_fill(torch.rand(CONTEXT) < 0.3, -100)}


@pytest.mark.parametrize(
    "rows",
    [Marked, lambda: DataLoader(token_rows(), batch_size=None, shuffle=True)],
    ids=["dataset that masks at random", "loader that shuffles"],
)
def test_rows_that_draw_random_numbers(tmp_path, rows):
    options = {"tokens": 60 * 2 * CONTEXT, "validation": None, "batch_size": 2}
    assert_resumes(tmp_path, new_model, rows=rows, at=13, **options)


def test_random_rows_depend_on_the_seed_and_leave_the_generator_alone(tmp_path):
    losses = {}
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 7)  # makes no difference
        train(tmp_path / str(len(losses)), new_model(), rows=Marked(), seed=seed, shuffle=False, tokens=8 * 2 * CONTEXT)
        losses[len(losses)] = [line["loss"] for line in read_log(tmp_path / str(len(losses)) / "log.jsonl")[1:]]
    assert losses[0] == losses[1] != losses[2]


def test_a_stream_is_begun_once(tmp_path):
    begun = []

    class Rows:
        def __iter__(self):
            begun.append(None)
            return iter(token_rows(72))

    train(tmp_path, new_model(), rows=Rows())
    assert len(begun) == 1


class Failing(Dataset):
    """Rows of which one cannot be read, as long as the disk fails."""

    fails = True

    def __len__(self):
        return 200

    def __getitem__(self, number):
        if number == 40 and self.fails:
            raise OSError("the disk has failed")
        return token_rows(200)[number]


def test_a_run_is_saved_when_its_rows_fail(tmp_path):
    options = {"shuffle": False, "save_every": 100, "phases": "1:1"}
    expected = train(tmp_path / "expected", new_model(), rows=token_rows(200), **options)
    rows = Failing()
    with pytest.raises(OSError, match="the disk has failed"):
        train(tmp_path / "run", new_model(), rows=rows, **options)
    assert [folder.name for folder in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000020"]
    rows.fails = False
    assert_equal(train(tmp_path / "run", new_model(), rows=rows, **options, resume=True), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: [torch.zeros(4, dtype=torch.bool)], r"row 0: input_ids must be integers.*torch.bool"),
        (lambda: [{"input_ids": [1, 2], "attention_mask": [[1, 1]]}], r"row 0: attention_mask must be .*\(1, 2\)"),
        (lambda: [{"input_ids": [1, 2], "labels": [1.0, 2.0]}], "row 0: labels must be integers.*float64"),
        (lambda: [[1, 2, 3], {"input_ids": [1, 2, 3]}], "row 1: either all rows are dictionaries or none, got dict"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, new_model(), rows=rows(), validation=None, phases="1:1")


def test_phases_without_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 8 tokens have no targets at patch size 8: expected two patches"):
        train(tmp_path, new_model(), phases="8:1/2,1:1/2", convention="tokens")


def test_integers_of_every_kind_are_token_ids(tmp_path):
    expected = train(tmp_path / "int64", new_model())
    for dtype in (torch.int32, torch.uint8, torch.uint16):
        assert_equal(train(tmp_path / str(dtype), new_model(), rows=token_rows().to(dtype)), expected)


def test_validation_rows_without_targets_are_refused(tmp_path):
    rows = [{"input_ids": row, "labels": torch.full((CONTEXT,), -100)} for row in token_rows(3)]
    with pytest.raises(ValueError, match="the validation rows have no targets"):
        train(tmp_path / "run", new_model(), validation=rows)
    assert not (tmp_path / "run").exists()


def test_rows_without_targets_are_warned_of(tmp_path, caplog):
    rows = [{"input_ids": row, "labels": torch.full((CONTEXT,), -100)} for row in token_rows(8)]
    train(tmp_path, new_model(), rows=rows, validation=None, tokens=8 * CONTEXT, phases="1:1")
    assert "all labels of the rows are ignored" in caplog.text


def test_dictionaries_with_ids_alone(tmp_path):
    """Rows of a dataset are dictionaries. With token ids alone they fit any model."""

    class OnlyIds(Model):
        def forward(self, input_ids):
            return super().forward(input_ids, input_ids, self.tokens.patch_size)

    expected = train(tmp_path / "tensor", new_model(OnlyIds))
    rows = [{"input_ids": row.tolist(), "text": "x"} for row in token_rows()]
    assert_equal(train(tmp_path / "dictionaries", new_model(OnlyIds), rows=rows), expected)
    mixed = [*rows[:20], {**rows[20], "labels": rows[20]["input_ids"]}, *rows[21:]]
    with pytest.raises(ValueError, match="row 20 has labels, but the first row has none"):
        train(tmp_path / "mixed", new_model(), rows=mixed)


def test_a_stream_of_several_epochs_is_told_which(tmp_path):
    class Rows:
        def __init__(self) -> None:
            self.epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(token_rows(20).roll(self.epoch, 0))

    expected = torch.cat([token_rows(20).roll(epoch, 0) for epoch in range(4)])
    losses = [
        train(tmp_path / str(n), new_model(), rows=rows)["hidden.weight"]
        for n, rows in enumerate((Rows(), iter(expected)))
    ]
    assert torch.equal(*losses)
