"""Device, versions and commit of a measurement."""

from __future__ import annotations

import subprocess

import pytest
import torch

from patchkernels.experiment import provenance


@pytest.mark.parametrize(("threads", "words"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_is_named_with_its_threads(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert provenance.processor()
    assert provenance.device_name(torch.device("cpu")) == f"{provenance.processor()}, {words}"


def test_a_processor_without_a_model_name(monkeypatch):
    monkeypatch.setattr(provenance.Path, "read_text", lambda self: "processor\t: 0\n")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "riscv64")
    assert provenance.processor() == "riscv64"


def test_the_commit_is_that_of_the_checkout_itself(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@y.z")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "--message", "x")
    file = tmp_path / "experiment.py"
    file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() is None, "installed below a repository of something else"
    git("add", file.name)
    git("commit", "--quiet", "--message", "y")
    assert provenance.commit() == git("rev-parse", "--short=10", "HEAD")
    file.write_text("changed")
    assert provenance.commit() == git("rev-parse", "--short=10", "HEAD") + "-dirty"
