"""Rows of a run hold the right examples, joined without padding, and the collator cuts them into patches."""

from __future__ import annotations

import pytest
import torch

from patchkernels.hf import PatchCollator, PatchRows, PatchStream, example_schedule
from patchkernels.schedule import parse_phases


def test_rows_are_joined_without_padding_and_cut_into_patches():
    ids = torch.arange(1, 9)
    padded = [{"input_ids": ids, "attention_mask": ids > 3, "labels": ids.where(ids != 5, -100)}] * 4
    schedule = example_schedule(parse_phases("4:4/5,1:1/5"), 5, 1, "positions")
    assert schedule.steps == [1, 1]
    row = PatchRows(padded, schedule, 0, False)[0]
    assert row["input_ids"].tolist() == [4, 5, 6, 7, 8] * 4
    assert row["labels"].tolist() == [4, -100, 6, 7, 8] * 4
    batch = PatchCollator(pad_token_id=9)(
        [row, {**row, "input_ids": row["input_ids"][:5], "labels": row["labels"][:5]}]
    )
    assert batch["input_ids"].shape == (2, 20)
    assert batch["shift_labels"].shape == (2, 5, 4)
    assert batch["attention_mask"].sum(1).tolist() == [20, 5]
    assert batch["input_ids"][1, 5:].eq(9).all() and batch["labels"][1, 5:].eq(-100).all()


def test_rows_of_a_stream_are_those_of_a_dataset_read_in_order():
    examples = [{"input_ids": torch.full((3,), i)} for i in range(7)]
    schedule = example_schedule(parse_phases("4:1/2,2:1/4,1:1/4"), 32, 2, "positions")
    rows = PatchRows(examples, schedule, seed=0, shuffle=False)
    stream = list(PatchStream(examples, schedule))
    assert len(stream) == len(rows) == 2 * (2 + 2 + 4)
    for a, b in zip(stream, (rows[i] for i in range(len(rows)))):
        assert a["patch_size"] == b["patch_size"] and torch.equal(a["input_ids"], b["input_ids"])
    read = torch.cat([row["input_ids"] for row in stream])[::3]
    assert read.tolist() == [i % 7 for i in range(32)]  # from the first example again after the last


def test_bad_input():
    schedule = example_schedule(parse_phases("1:1"), 4, 1, "positions")
    with pytest.raises(ValueError, match="dataset is empty"):
        PatchRows([], schedule, 0, True)
    with pytest.raises(ValueError, match="dataset is empty"):
        next(iter(PatchStream([], schedule)))
    with pytest.raises(ValueError, match=r"one patch size, got \[1, 4\]"):
        PatchCollator()([{"input_ids": [1], "patch_size": 4}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"input_ids \(T\) and labels \(T\), got \(3,\) and \(2,\)"):
        PatchRows([{"input_ids": [1, 2, 3], "labels": [1, 2]}], schedule, 0, False)[0]
    with pytest.raises(ValueError, match="must give labels"):
        PatchCollator(lambda rows: {"input_ids": torch.ones(1, 4)})([{"patch_size": 4}])
