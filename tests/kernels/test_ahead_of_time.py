"""Every kernel's default configurations, built ahead of time for CUDA 8.0, 9.0, 10.0 and gfx942."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton builds for Linux alone")

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    script = Path(__file__).parents[1] / "support" / "ahead_of_time.py"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_default_configurations_build_without_spills(report, target):
    cases = {name: case for name, case in report.items() if name.endswith(target)}
    for kernel in (
        "cross_entropy", "slice_statistics", "patch_embedding", "block_sums", "backward", "scale", "coefficients",
        "weighted_sum",
    ):  # fmt: skip
        assert any(name.startswith(kernel) for name in cases)
    # What cross entropy keeps for all options while it walks through a row may be written to the stack, once a row
    # (test_configurations.py shows that it is not in an inner loop). On sm_80 it may be a register, where the threads
    # of a warp meet again if they have come apart, which they do not.
    rarely = {"both-all": 32, "loss-plain-sm_80": 8}
    allowed = {name: max((rarely[part] for part in rarely if part in name), default=0) for name in cases}
    spilled = {name: case["spilled_bytes"] for name, case in cases.items() if case["spilled_bytes"] > allowed[name]}
    assert spilled == {}
    assert max(case["shared_bytes"] for case in cases.values()) <= SHARED_LIMIT[target]
    assert max(case["threads"] for case in cases.values()) <= 1024


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("cross_entropy-bf16-128256-both-plain-sm_90", "vector_loads"),
        ("cross_entropy-bf16-128256-both-plain-sm_90", "vector_stores"),
        ("patch_embedding-bf16-4096-padding=False-sm_90", "vector_loads"),
        ("patch_embedding-bf16-4096-padding=False-sm_90", "vector_stores"),
        ("backward-bf16-4096-sm_90", "vector_loads"),
        ("backward-bf16-4096-sm_90", "vector_stores"),
    ],
)
def test_aligned_rows_move_in_16_byte_vectors(report, case, kind):
    assert report[case][kind] > 0
