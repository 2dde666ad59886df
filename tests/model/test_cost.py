"""FLOPs against the matrix products that they count, and estimated memory against the documentation's table."""

from __future__ import annotations

import pytest
from checkout import CHECKOUT

from patchkernels.model.config import PRESETS, PatchLMConfig
from patchkernels.model.cost import count_flops, memory_bytes


@pytest.mark.parametrize(("patch_size", "low"), [(2, 0.4), (4, 0.18), (8, 0.08)])
def test_counted_flops_of_a_patch_step_on_the_same_tokens(patch_size, low):
    config = PatchLMConfig.preset("370m")
    ratio = count_flops(config, 1, 2048 // patch_size, patch_size) / count_flops(config, 1, 2048, 1)
    assert low < ratio <= 1 / patch_size  # less, because attention is quadratic


def test_counted_flops_are_the_products():
    c = PatchLMConfig(300, 16, 24, 3, 2, num_key_value_heads=1)
    positions = 10
    linear = c.hidden_size * (2 * 16 + 2 * 8) + 3 * c.hidden_size * c.intermediate_size
    attention = 2 * positions * c.hidden_size
    forward = 2 * positions * (c.num_hidden_layers * (linear + attention) + c.hidden_size * c.vocab_size)
    assert count_flops(c, 5, positions, 4) == 5 * 3 * forward


def test_the_memory_table_of_the_page_is_that_of_the_formula():
    page = (CHECKOUT / "docs" / "scaling.md").read_text()
    found = 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 10 or cells[0] not in PRESETS:
            continue
        rows, positions = map(int, cells[4].split(" x "))
        config = PatchLMConfig.preset(cells[0], max_position_embeddings=positions, activation_checkpointing=True)
        parts = memory_bytes(config, rows, positions, int(cells[2]), int(cells[3]))
        assert cells[9] == f"{sum(parts.values()) / 2**30:.1f}"
        found += 1
    assert found == 9
