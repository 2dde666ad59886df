"""The log after a crash."""

from __future__ import annotations

from patchkernels.training.log import Log, read_log


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Log(path, 2).close()
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    Log(path, 0).close()
    assert read_log(path) == []
