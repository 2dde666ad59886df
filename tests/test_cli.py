"""The command line: exit codes, and the flags of every command."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
from checkout import CHECKOUT

from patchkernels.cli import main, parse
from patchkernels.training.config import flat_settings

SCHEDULE = {
    "--tokens 1e6": ("tokens", 1e6),
    "--phases 8:1/2,1:1/2": ("phases", "8:1/2,1:1/2"),
    "--shares-of steps": ("shares_of", "steps"),
    "--convention tokens": ("convention", "tokens"),
    "--batch-size 32": ("batch_size", 32),
    "--context 64": ("context", 64),
}
TRAIN = {
    "--out y": ("out", "y"),
    "--model 370m": ("preset", "370m"),
    "--qk-norm": ("qk_norm", True),
    "--attention sdpa": ("attention", "sdpa"),
    **SCHEDULE,
    "--epochs 1.0": ("epochs", 1.0),  # another value is refused beside --tokens
    "--piece-tokens 512": ("piece_tokens", 512),
    "--packed-documents": ("packed_documents", True),
    "--lr 1e-3": ("lr", 1e-3),
    "--warmup 0.1": ("warmup", 0.1),
    "--decay 0.2": ("decay", 0.2),
    "--lr-shape cosine": ("lr_shape", "cosine"),
    "--lr-scope phase": ("lr_scope", "phase"),
    "--optimizer-at-switch reset": ("optimizer_at_switch", "reset"),
    "--betas 0.8 0.9": ("betas", (0.8, 0.9)),
    "--weight-decay 0.2": ("weight_decay", 0.2),
    "--clip 2": ("clip", 2.0),
    "--accumulation 4": ("accumulation", 4),
    "--slot-exponent 0.5": ("slot_exponent", 0.5),
    "--bf16 True": ("bf16", True),
    "--compile True": ("compile", True),
    "--activation-checkpointing": ("activation_checkpointing", True),
    "--device cpu": ("device", "cpu"),
    "--parallel ddp": ("parallel", "ddp"),
    "--seed 7": ("seed", 7),
    "--log-every 2": ("log_every", 2),
    "--eval-every 4": ("eval_every", 4),
    "--eval-rows 8": ("eval_rows", 8),
    "--save-every 3": ("save_every", 3),
    "--keep 1": ("keep", 1),
    "--minutes 5": ("minutes", 5.0),
    "--resume": ("resume", True),
    "--data.path x": ("path", "x"),
    "--data.text-field content": ("text_field", "content"),
    "--data.endings .py .md": ("endings", (".py", ".md")),
    "--data.tokenizer t.json": ("tokenizer", "t.json"),
    "--data.vocab-size 512": ("vocab_size", 512),
    "--data.validation-fraction 0.2": ("validation_fraction", 0.2),
    "--data.cache-dir z": ("cache_dir", "z"),
}
PLAN = {
    "--model 124m": ("preset", "124m"),
    **SCHEDULE,
    "--activation-checkpointing": ("activation_checkpointing", True),
    "--tflops 100": ("tflops", 100.0),
    "--gpus 2": ("gpus", 2),
    "--rows-per-gpu 4": ("rows_per_gpu", 4),
    "--shards 2": ("shards", 2),
    "--tensor-parallel 1": ("tensor_parallel", 1),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "patchkernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def settings(command: Any) -> dict[str, Any]:
    """The settings of a command by their short names."""
    return flat_settings(dataclasses.asdict(command))


def test_command_line():
    done = run("plan", "--model", "124m", "--tokens", "1e9", "--phases", "4:2/3,1:1/3")
    assert done.returncode == 0, done.stderr
    assert "0.500x the positions" in " ".join(done.stdout.split())
    done = run("train", "--phases", "4:2")
    assert (done.returncode, done.stderr) == (
        1,
        "patchkernels: ValueError: the shares must add up to 1, got 2 from '4:2'\n",
    )


@pytest.mark.parametrize(
    ("command", "flag", "value", "code", "message"),
    [
        ("train", "--model", "9b", 1, "preset must be one of"),
        ("plan", "--model", "9b", 1, "preset must be one of"),
        ("train", "--model", "demo:layers=3", 1, "a model looks like 'demo:hidden_size=64'"),
        ("train", "--model", "demo:vocab_size=512", 1, "vocab_size is set by --data.vocab-size"),
        ("experiment", "--model", "demo:vocab_size=512", 1, "vocab_size is set by --data.vocab-size"),
        ("plan", "--model", "none.json", 1, "there is no file none.json"),
        ("experiment", "--model", "9b", 1, "preset must be one of"),
        ("train", "--lr", "-1", 1, "expected a finite lr > 0"),
        ("train", "--convention", "steps", 1, "convention must be one of"),
        ("train", "--attention", "flash9", 1, "attention must be one of"),
        ("train", "--batch-size", "0", 2, "batch_size must be a whole number and at least 1"),
        ("plan", "--batch-size", "0", 1, "batch_size must be a whole number and at least 1"),
        ("experiment", "--batch-size", "0", 2, "batch_size must be positive"),
        ("train", "--epochs", "0", 2, "epochs must be positive and at most"),
        ("plan", "--epochs", "2", 1, "plan counts tokens, not epochs"),
        ("train", "--epochs", "2000000", 2, "epochs must be positive and at most"),
        ("train", "--slot-exponent", "nan", 2, "slot_exponent must be between -10 and 10"),
        ("train", "--slot-exponent", "200", 2, "slot_exponent must be between -10 and 10"),
        ("train", "--data.validation-fraction", "2", 2, "validation_fraction must be between 0 and 1"),
        ("plan", "--tflops", "0", 1, "tflops must be positive"),
    ],
)
def test_a_bad_value_is_reported_before_any_work_without_the_names_of_the_parser(
    capsys, tmp_path, monkeypatch, command, flag, value, code, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main([command, flag, value])
    assert done.value.code == code
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error and value in error
    assert "dummy" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "flags"), [("train", TRAIN), ("plan", PLAN)])
def test_every_setting_has_its_short_flag(command, flags):
    words = " ".join(flags).split()
    found = settings(parse([command, *words]))
    assert {name: found[name] for name, _ in flags.values()} == dict(flags.values())
    if command == "train":
        assert found.keys() == dict(flags.values()).keys()


def test_booleans_can_be_switched_off_and_nones_be_named():
    off = ["--no-qk-norm", "--no-packed-documents", "--no-resume"]
    found = settings(parse(["train", *off, "--no-activation-checkpointing", "--tokens", "None", "--minutes", "None",
                            "--bf16", "False", "--compile", "None"]))  # fmt: skip
    assert not any(found[flag[5:].replace("-", "_")] for flag in off)
    assert found["tokens"] is None and found["minutes"] is None
    assert found["bf16"] is False and found["compile"] is None


def test_the_commands_have_their_own_defaults():
    train, plan = settings(parse(["train"])), settings(parse(["plan"]))
    names = ("preset", "tokens", "batch_size", "context")
    assert [train[name] for name in names] == ["0.4m", None, 8, 128]
    assert [plan[name] for name in names] == ["370m", 10e9, 256, 2048]


def test_help_names_no_internal_setting(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["train", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "--data.path" in text and "--phases" in text
    assert "document-multiple" not in text
