"""Every example runs from the command line, and docs/dropin.md shows the lines that plain.py changed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import write_random_text

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_random_text(tmp_path_factory.mktemp("text"), documents=60, words=400, vocabulary=300)


def run(file: Path, text: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": str(text.parent / "cache"), "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *launcher, str(file), "--text", str(text), "--vocab", "300", *arguments],
        capture_output=True, text=True, env=environment, cwd=text.parent, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def original(source: str) -> str:
    """The source before patch training: each line with a comment ``# was:`` is replaced by the text of that comment."""
    lines = []
    for line in source.splitlines():
        found = re.fullmatch(r"(\s*).*  # was: ?(.*?)(?:  # fmt.*)?", line)
        if found is None:
            lines.append(line)
        elif found[2]:
            lines.append(found[1] + found[2])
    return "\n".join(lines) + "\n"


def test_plain(text, tmp_path):
    source = (EXAMPLES / "plain.py").read_text()
    assert source.count("# was:") == 4
    page = (ROOT / "docs" / "dropin.md").read_text()
    for line in source.splitlines():
        if "# was:" in line:
            new, old = (part.strip() for part in line.split("  # fmt")[0].split("# was:"))
            assert re.search(rf"^[+] +{re.escape(new)}$", page, re.MULTILINE), new
            assert not old or re.search(rf"^- +{re.escape(old)}$", page, re.MULTILINE), old
    found = losses(run(EXAMPLES / "plain.py", text, "--steps", "31"))
    assert found[-1] < found[0]
    before = tmp_path / "plain_before.py"
    before.write_text(original(source))
    assert "PatchEmbedding(" not in before.read_text()
    found = losses(run(before, text, "--steps", "3"))
    assert all(4 < value < 8 for value in found)


def test_hugging_face_trainer(text, tmp_path):
    pytest.importorskip("transformers")
    output = run(EXAMPLES / "hf_trainer.py", text, "--steps", "12", "--out", str(tmp_path))
    assert "'eval_loss'" in output
    sizes = re.findall(r"'patch_size': '?(\d)", output)
    assert sizes == ["4", "1"]
    assert (tmp_path / "model" / "config.json").is_file()
    assert (tmp_path / "checkpoint-4").is_dir()  # where the second phase begins
    run(EXAMPLES / "hf_trainer.py", text, "--steps", "12", "--out", str(tmp_path), "--resume")


def test_own_model(text, tmp_path):
    """Stopped after the first phase and resumed, on one process, and on two with FSDP2 and with Muon."""
    file, launcher = EXAMPLES / "own_model.py", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--tokens", "30000", "--out")
    alone = run(file, text, *options, str(tmp_path / "one"))
    assert "K=4: 2 steps, K=1: 5 steps" in alone and losses(alone)[-1] < losses(alone)[0]
    assert (tmp_path / "one" / "plot.png").is_file()
    again = run(file, text, *options, str(tmp_path / "one"), "--resume")
    assert "done" in again and not losses(again)  # all steps are done
    together = run(file, text, *options, str(tmp_path / "two"), launcher=launcher)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    muon = run(file, text, "--tokens", "20000", "--out", str(tmp_path / "muon"), "--muon", launcher=launcher)
    assert losses(muon)[-1] < losses(muon)[0]


def test_accelerate(text):
    pytest.importorskip("accelerate")
    file = EXAMPLES / "accelerate_loop.py"
    alone = run(file, text, "--examples", "384")
    assert re.findall(r"K=(\d)", alone) == ["4", "1", "1"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    together = run(file, text, "--examples", "384", launcher=launcher)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(text):
    assert "'validation_loss'" in run(EXAMPLES / "lightning_module.py", text, "--steps", "9")
