"""What the plot of a run shows."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from patchkernels.training.plot import plot


def line(step, phase, patch_size, **values):
    return {
        "step": step,
        "phase": phase,
        "patch_size": patch_size,
        "raw_tokens": 10 * step,
        "seconds": 0.5 * step,
        **values,
    }


def test_phases_are_named_and_the_losses_of_patches_are_shown(tmp_path, monkeypatch):
    lines = [
        line(0, 1, 4, validation_loss=9.0, validation_slot_losses=[9.0, 9.1, 9.2, 9.3]),
        line(2, 1, 4, loss=8.0),
        line(4, 1, 4, validation_loss=7.0, validation_slot_losses=[7.0, 7.1, 7.2, 7.3]),
        line(6, 2, 2, validation_loss=6.0, validation_slot_losses=[6.0, 6.1]),
        line(8, 3, 1, validation_loss=5.0),
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), savefig(self, *args, **kw)))
    plot(tmp_path / "log.jsonl", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [panel.get_xlabel() for panel in panels] == ["raw tokens", "training seconds"], "without FLOPs"
    token_level, *slots, first, second = panels[0].get_lines()
    assert token_level.get_xydata().tolist() == [[0, 9], [40, 7], [60, 6], [80, 5]]
    assert [slot.get_xydata().tolist() for slot in slots[:4]] == [[[0, 9 + k / 10], [40, 7 + k / 10]] for k in range(4)]
    assert [slot.get_xydata().tolist() for slot in slots[4:]] == [[[60, 6.0]], [[60, 6.1]]]
    assert [divider.get_xdata()[0] for divider in (first, second)] == [40, 60]
    assert [(text.get_text(), text.xy[0]) for text in panels[0].texts] == [("K = 4", 20), ("K = 2", 50), ("K = 1", 70)]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == [
        "token-level",
        "patches, slot 1 (dark) to K",
    ]
