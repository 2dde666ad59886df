"""The tokens that each step reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkernels.data.batches import Batches, read_rows, validation_rows
from patchkernels.data.corpus import Tokens
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Phase, Schedule


def stream(length: int) -> Tokens:
    return Tokens(np.arange(length, dtype=np.uint32), np.array([0]))


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3),
    batch=st.sampled_from([1, 2, 4]),
    convention=st.sampled_from(["positions", "tokens"]),
    world_size=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_every_token_is_read_once_an_epoch(sizes, batch, convention, world_size, seed):
    if batch % world_size:
        return
    phases = tuple(Phase(k, 1 / len(sizes)) for k in sizes)
    schedule = Schedule(phases, 3000, batch, 12, convention)
    corpus = stream(4 * 3000)  # one epoch is more than enough
    ranks = [Batches(corpus, schedule, seed, rank=r, world_size=world_size) for r in range(world_size)]
    read = []
    for step in range(schedule.total_steps):
        length = schedule.row_tokens(phases[schedule.locate(step)[0]])
        rows = [start for rank in ranks for start in rank.row_starts(step)]
        assert len(rows) == batch
        for start in rows:
            read.extend(range(start, start + length))
    assert len(read) == len(set(read)) == schedule.raw_tokens(schedule.total_steps)


def test_a_second_epoch_is_another_permutation_and_reads_everything_again():
    schedule = Schedule((Phase(1, 1.0),), 2 * 64, 4, 8)
    batches = Batches(stream(64), schedule, 0)
    rows = [start for step in range(schedule.total_steps) for start in batches.row_starts(step)]
    assert sorted(rows) == sorted([*range(0, 64, 8)] * 2)


def test_a_batch_is_a_function_of_the_step_alone():
    schedule = Schedule((Phase(4, 0.5), Phase(1, 0.5)), 4000, 2, 8)
    a, b = (Batches(stream(5000), schedule, 3) for _ in range(2))
    forward = [a.row_starts(step) for step in range(schedule.total_steps)]
    assert forward == [b.row_starts(step) for step in reversed(range(schedule.total_steps))][::-1]
    assert forward != [Batches(stream(5000), schedule, 4).row_starts(step) for step in range(schedule.total_steps)]


def test_packed_rows_mask_padding_and_number_documents():
    e = 9
    ids = np.array([1, 2, e, e, 3, 4, 5, e, e, e, e, e, 6, e, e, e], np.uint16)
    tokens = Tokens(ids, np.array([0, 4, 8, 12]))  # the third document is empty: end-of-text alone
    row, labels, documents = read_rows(tokens, [0], 16, packed=True)
    assert row[0].tolist() == ids.tolist()
    x = IGNORE_INDEX
    assert labels[0].tolist() == [1, 2, e, x, 3, 4, 5, e, e, x, x, x, 6, e, x, x]
    assert documents[0].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_validation_rows_are_whole_distinct_and_spread_over_the_stream():
    assert validation_rows(stream(30), 8, 10) == [0, 8, 16]
    assert validation_rows(stream(805), 8, 4) == [0, 200, 400, 600]


def test_bad_input():
    schedule = Schedule((Phase(1, 1.0),), 100, 3, 8)
    with pytest.raises(ValueError, match="7 tokens, one row of the schedule 8"):
        Batches(stream(7), schedule, 0)
    with pytest.raises(ValueError, match="divisible by 2 processes, got 3"):
        Batches(stream(70), schedule, 0, world_size=2)
    with pytest.raises(ValueError, match="7 tokens, fewer than one context of 8"):
        validation_rows(stream(7), 8, 4)
