"""The shell scripts in bench/, with stand-ins for what a test machine does not have."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from checkout import CHECKOUT
from source_tree import ENDINGS, documents, write_tree

from patchkernels.data.parquet import CorpusConfig, pack_corpus
from patchkernels.data.sources import find_source


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def run_script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(CHECKOUT / "bench" / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_linux_corpus(tree, tmp_path):
    """The commands that would download and unpack Debian's package are stand-ins."""
    commands = tmp_path / "bin"
    commands.mkdir()
    package = tmp_path / "pkg/usr/src"
    package.mkdir(parents=True)
    subprocess.run(["tar", "-cJf", package / "linux-source-6.1.tar.xz", "-C", tmp_path, "tree"], check=True)
    subprocess.run(["tar", "-cf", tmp_path / "fs.tar", "-C", tmp_path / "pkg", "./usr"], check=True)
    stand_ins = {
        "apt-cache": 'printf "linux-source\\n  Depends: linux-source-6.1\\n"',
        "apt-get": '[ "$1 $2" = "download linux-source-6.1" ] && touch linux-source-6.1_6.1.9-1_all.deb',
        "dpkg-deb": f"case $1 in --field) echo 6.1.9-1;; --fsys-tarfile) cat {tmp_path}/fs.tar;; esac",
        "patchkernels": f'PYTHONPATH={CHECKOUT} exec {sys.executable} -m patchkernels "$@"',
    }
    for name, body in stand_ins.items():
        file = commands / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "linux.parquet"
    done = run_script("linux_corpus.sh", str(out), PATH=f"{commands}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert find_source(str(out), "text").origin == "linux-source-6.1 6.1.9-1"
    assert [d.path for d in documents(out)] == [d.path for d in documents(tree, ENDINGS)]
    missing = run_script("linux_corpus.sh")
    assert missing.returncode != 0 and "usage" in missing.stderr


def test_experiment_gpu_on_a_cpu(tree, tmp_path):
    """The script for a machine with a GPU and without network runs on a CPU, with a small budget."""
    corpus = tmp_path / "kernel.parquet"
    pack_corpus(CorpusConfig(str(corpus), str(tree), endings=ENDINGS))
    folder = tmp_path / "out"
    options = ["--tokens", "1536", "--context", "16", "--batch-size", "2", "--model", "demo", "--device", "cpu",
               "--compile", "False", "--data.vocab-size", "300", "--no-tune", "--seeds", "1"]  # fmt: skip
    out_of_time = run_script(
        "experiment_gpu.sh", str(corpus), str(folder), *options, PYTHON=sys.executable, MINUTES="0.01"
    )
    assert out_of_time.returncode == 75, out_of_time.stderr
    done = run_script("experiment_gpu.sh", str(corpus), str(folder), *options, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    for name in ("42m", "124m"):
        report = (folder / name / "report.md").read_text()
        assert "ρ of B" in report and "unfinished" not in report
        assert {path.name for path in (folder / name).glob("*.*")} >= {"report.md", "results.jsonl", "loss.png"}
    missing = run_script("experiment_gpu.sh", str(corpus))
    assert missing.returncode != 0 and "usage" in missing.stderr
