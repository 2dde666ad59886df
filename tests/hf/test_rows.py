"""Rows of a run hold the right examples, joined without padding, and the collator cuts them into patches."""

from __future__ import annotations

import pytest
import torch

from patchkernels.hf import PatchCollator, PatchRows, PatchStream, example_schedule
from patchkernels.hf.rows import join
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


def test_documents_of_packed_examples_begin_on_patch_boundaries():
    packed = {"input_ids": torch.arange(10, 17), "position_ids": [0, 1, 2, 3, 4, 0, 1]}
    padded = {
        "input_ids": torch.arange(17, 23), "position_ids": [9, 0, 1, 2, 3, 9],
        "attention_mask": [0, 1, 1, 1, 1, 0], "labels": torch.arange(17, 23),
    }  # fmt: skip
    row = join([packed, padded], 4)
    assert row["input_ids"].tolist() == row["labels"].tolist() == [*range(10, 17), *range(18, 22)]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
    lengths = {"seq_lengths": [5, 2, 4]}
    by_lengths = join([{"input_ids": row["input_ids"], "labels": row["labels"], **lengths}], 4)
    assert by_lengths["seq_lengths"] == lengths["seq_lengths"] and "position_ids" not in by_lengths
    for same in (row, by_lengths):
        batch = PatchCollator(pad_token_id=9)([same, {"input_ids": torch.tensor([5, 6, 7]), "patch_size": 4}])
        assert batch["input_ids"][0].tolist() == [10, 11, 12, 13, 14, 9, 9, 9, 15, 16, 9, 9, 18, 19, 20, 21]
        assert batch["position_ids"][0].tolist() == [*range(8), *range(4), *range(4)]
        assert batch["input_ids"][1].tolist() == [5, 6, 7] + [9] * 13
        assert batch["position_ids"][1].tolist() == [0, 1, 2, 3] + [0] * 12
        assert batch["shift_labels"][0].tolist() == [[14, -100, -100, -100]] + [[-100] * 4] * 3
        assert batch["shift_labels"][1].eq(-100).all() and "attention_mask" not in batch


def test_what_a_collator_says_of_documents_is_counted_in_patches():
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    lengths = (6, 3, 4)
    batch = PatchCollator(collate)([{"input_ids": list(range(length)), "patch_size": 4} for length in lengths])
    assert batch["input_ids"].tolist() == [[*range(6), 0, 0, *range(3), 0, *range(4)]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 3, 4]
    assert batch["max_length_q"] == batch["max_length_k"] == 2
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 2]]
    assert batch["shift_labels"].tolist() == [[[4, 5, -100, -100]] + [[-100] * 4] * 3]
    one = PatchCollator(collate)([{"input_ids": list(range(6)), "patch_size": 4}])
    assert one["position_ids"].tolist() == [[*range(6), 0, 0]]
    assert one["cu_seq_lens_q"].tolist() == [0, 2]


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
    with pytest.raises(ValueError, match=r"add up to the 3 tokens of the example, got \[2, 2\]"):
        join([{"input_ids": [1, 2, 3], "seq_lengths": [2, 2]}], 4)
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match="begins documents inside patches of 4 tokens"):
        PatchCollator(lambda rows: {"input_ids": ids, "labels": ids, "position_ids": ids + 1})(
            [{"input_ids": ids[0], "patch_size": 4}]
        )
