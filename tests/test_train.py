"""The run: both phases, resumed anywhere, stopped, diverging, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchkernels.batches import Batches, read_rows, validation_rows
from patchkernels.checkpoint import checkpoints
from patchkernels.data import DataConfig, prepare
from patchkernels.metrics import Log, read_log
from patchkernels.model import PRESETS, PatchLMConfig
from patchkernels.plan import PlanConfig, count_flops, memory_bytes, plan
from patchkernels.train import OUT_OF_TIME, NonFiniteError, Run, Stopped, train
from patchkernels.train_config import TrainConfig

TINY = PatchLMConfig(300, 16, 24, 1, 2, tie_word_embeddings=True)
TIMES = ("seconds", "compile_seconds", "raw_tokens_per_second", "positions_per_second")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdef", k=3)) for _ in range(50)]
    for i in range(40):
        (root / f"{i}.txt").write_text(" ".join(generator.choices(words, k=150)))
    return root


@pytest.fixture
def config(text, tmp_path):
    data = DataConfig(path=str(text), vocab_size=300, validation_fraction=0.1, cache_dir=str(text.parent / "cache"))
    return TrainConfig(
        out=str(tmp_path / "run"), model="tiny", data=data, batch_size=2, context=16, tokens=1536, phases="4:2/3,1:1/3",
        log_every=1, eval_every=5, eval_rows=4, save_every=3, device="cpu",
    )  # fmt: skip


def weights(run: Path):
    return load_file(run / "model" / "model.safetensors")


def untimed(run: Path):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(run / "log.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    assert untimed(a) == untimed(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def stop_at(monkeypatch, step: int) -> None:
    """A crash as the given step begins, with the reading of its batch."""
    read = Batches.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return read(self, at)

    monkeypatch.setattr(Batches, "batch", batch)


def test_a_run_leaves_model_log_and_plot(config):
    run = train(config)
    start, *lines = read_log(run / "log.jsonl")
    assert (start["step"], start["raw_tokens"], start["flops"]) == (0, 0, 0)
    assert [line["patch_size"] for line in lines] == [4] * 8 + [1] * 16
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[7]["raw_tokens"] == 1024
    assert lines[-1]["raw_tokens"] == 1536
    flops = [count_flops(dataclasses.replace(TINY, vocab_size=300), 2, 16, k) for k in (4, 1)]
    assert lines[-1]["flops"] == 8 * flops[0] + 16 * flops[1]
    evaluated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [5, 8, 9, 10, 12, 15, 16, 20, 24], "1, 2, 4, 8 after the switch too"
    assert all(len(e.get("validation_slot_losses", [])) == (4 if e["patch_size"] == 4 else 0) for e in evaluated)
    assert abs(lines[0]["loss"] - math.log(300)) < 0.3
    assert evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"]
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(checkpoints(run / "checkpoints")) == config.keep

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("abc def", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "abc def"
    assert model(ids).logits.shape == (1, ids.shape[1], 300)


@pytest.mark.parametrize("at", [2, 7, 8, 9, 20])
@pytest.mark.parametrize("switch", ["carry", "reset"])
def test_resumed_is_as_if_nothing_had_happened(config, tmp_path, monkeypatch, at, switch):
    config = dataclasses.replace(config, optimizer_at_switch=switch, save_every=1)
    straight = train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert_same_run(train(dataclasses.replace(config, resume=True)), straight)


SCRIPT = """
import json, sys
from patchkernels.model import PRESETS, PatchLMConfig
from patchkernels.data import DataConfig
from patchkernels.train import TrainConfig, train
values = json.loads(sys.argv[1])
PRESETS["tiny"] = PatchLMConfig(300, 16, 24, 1, 2, tie_word_embeddings=True)
values["data"] = DataConfig(**values["data"])
values["betas"] = tuple(values["betas"])
train(TrainConfig(**values))
"""


def launch(config: TrainConfig) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(config))]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    log = run / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_random_moments(config, tmp_path):
    config = dataclasses.replace(config, tokens=6144, save_every=2)
    straight = launch(dataclasses.replace(config, out=str(tmp_path / "straight")))
    generator = random.Random(os.getpid())
    for attempt in range(4):
        run = Path(config.out)
        found = checkpoints(run / "checkpoints")
        process = launch(dataclasses.replace(config, resume=bool(found)))
        done = int(found[-1].name[5:]) if found else 0
        wait_for_step(run, 31 if attempt == 1 and done < 31 else done + generator.randint(3, 12), process)  # 32: switch
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.communicate()
    (run / "checkpoints" / ".step-00000099.1").mkdir()  # what a kill while saving leaves
    process = launch(dataclasses.replace(config, resume=True))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert straight.communicate(timeout=120) and straight.returncode == 0
    assert_same_run(run, tmp_path / "straight")
    assert not list((run / "checkpoints").glob(".*"))


def test_sigterm_saves_and_exits(config):
    config = dataclasses.replace(config, tokens=60000, save_every=10**6)
    process = launch(config)
    wait_for_step(Path(config.out), 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    (saved,) = checkpoints(Path(config.out) / "checkpoints")
    assert int(saved.name[5:]) == read_log(Path(config.out) / "log.jsonl")[-1]["step"]
    assert "--resume" in output


def test_a_signal_after_the_last_step_stops_the_caller_when_all_is_saved(config, monkeypatch):
    finish = Run.finish
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), finish(*args)))
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    run = Path(config.out)
    log = (run / "log.jsonl").read_text()
    assert (run / "model" / "config.json").exists()
    train(dataclasses.replace(config, resume=True))
    assert (run / "log.jsonl").read_text() == log


def test_out_of_time_saves_and_goes_on(config, tmp_path, monkeypatch):
    straight = train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    codes = []
    for attempt in range(30):
        with monkeypatch.context() as patch:
            read, count = Batches.batch, iter(range(100))

            def batch(self, at, read=read, count=count):
                if next(count) == 5:  # one of them is the phase's preparation
                    time.sleep(0.3)
                return read(self, at)

            patch.setattr(Batches, "batch", batch)
            try:
                run = train(dataclasses.replace(config, minutes=0.25 / 60, save_every=10**6, resume=attempt > 0))
                break
            except Stopped as stopped:
                codes.append(stopped.code)
    assert set(codes) == {OUT_OF_TIME} and len(codes) >= 2
    assert_same_run(run, straight)


def test_the_loss_before_the_first_step_is_that_of_chance_in_every_phase_and_slot(config):
    start = read_log(train(config) / "log.jsonl")[0]
    chance = pytest.approx(math.log(300), rel=0.02)
    assert start["validation_loss"] == chance
    assert start["initial_losses"] == {"1": chance, "4": chance}
    assert {k: len(v) for k, v in start["initial_slot_losses"].items()} == {"1": 1, "4": 4}
    assert all(loss == chance for losses in start["initial_slot_losses"].values() for loss in losses)


def test_validation_is_token_level_in_a_patch_phase(config):
    """Against transformers' model and PyTorch's cross entropy, on the rows that were held out."""
    run = train(dataclasses.replace(config, phases="4:1"))
    (last,) = read_log(run / "log.jsonl")[-1:]
    corpus = prepare(config.data)
    rows = validation_rows(corpus.validation, config.context, config.eval_rows)
    ids, _, _ = read_rows(corpus.validation, rows, config.context, packed=False)
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert last["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert last["validation_bits_per_byte"] == pytest.approx(float(expected) / math.log(2) / corpus.bytes_per_token)


def test_compiling_is_not_training_time(config, monkeypatch):
    loss, slow = Run.loss, set()

    def first_is_slow(self, ids, labels, documents, patch_size, *args, **kwargs):
        if torch.is_grad_enabled() and patch_size not in slow:
            slow.add(patch_size)
            time.sleep(1.0)
        return loss(self, ids, labels, documents, patch_size, *args, **kwargs)

    monkeypatch.setattr(Run, "loss", first_is_slow)
    last = read_log(train(config) / "log.jsonl")[-1]
    assert slow == {1, 4}
    assert last["compile_seconds"] >= 2.0


def test_signal_number_is_the_exit_code():
    assert Stopped(143).code == 143


def test_divergence_stops_the_run_and_the_last_checkpoint_stays(config, monkeypatch):
    loss = Run.loss

    def diverging(self, *args, **kwargs):
        return loss(self, *args, **kwargs) * (float("nan") if self.step == 7 else 1)

    monkeypatch.setattr(Run, "loss", diverging)
    with pytest.raises(NonFiniteError, match=r"step 8: loss nan"):
        train(config)
    newest = checkpoints(Path(config.out) / "checkpoints")[-1]
    assert newest.name == "step-00000006"
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize(
    "changes",
    [
        {"phases": "2:1/4,4:1/4,1:1/2"},
        {"phases": "1:1/2,4:1/2"},
        {"convention": "tokens", "batch_size": 4},
        {"piece_tokens": 128, "phases": "8:1/2,1:1/2"},
        {"shares_of": "steps"},
        {"packed_documents": True},
        {"lr_shape": "cosine", "lr_scope": "phase"},
        {"bf16": True, "activation_checkpointing": True, "qk_norm": True},
    ],
)
def test_options_train(config, changes):
    run = train(dataclasses.replace(config, **changes))
    lines = read_log(run / "log.jsonl")
    assert lines[-1]["validation_loss"] < math.log(300)


def test_accumulation_changes_nothing_but_rounding(config, tmp_path):
    once = train(dataclasses.replace(config, batch_size=4))
    parts = train(dataclasses.replace(config, batch_size=4, accumulation=2, out=str(tmp_path / "parts")))
    for a, b in zip(untimed(once)[1:], untimed(parts)[1:]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_compiled_run_is_the_eager_one(config, tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **o: compiled(model, backend="aot_eager", **o))
    a = train(config)
    b = train(dataclasses.replace(config, compile=True, out=str(tmp_path / "compiled")))
    assert [x["loss"] for x in untimed(a)[1:]] == pytest.approx([x["loss"] for x in untimed(b)[1:]], rel=1e-4)


def test_bad_input(config, tmp_path, monkeypatch):
    run = train(config)
    before = [(run / name).read_bytes() for name in ("log.jsonl", "config.json")]
    with pytest.raises(FileExistsError, match="--resume"):
        train(config)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.0015 there, 0.1 here\)"):
        train(dataclasses.replace(config, lr=0.1, resume=True))
    assert [(run / name).read_bytes() for name in ("log.jsonl", "config.json")] == before
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(dataclasses.replace(config, out=str(tmp_path / "other"), resume=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(dataclasses.replace(config, out=str(tmp_path / "file" / "run")))
    new = dataclasses.replace(config, out=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="'9b'"):
        train(dataclasses.replace(new, model="9b"))
    with pytest.raises(RuntimeError, match=r"flash2.*cannot run"):
        train(dataclasses.replace(new, attention="flash2"))
    with pytest.raises(ValueError, match="'gpu'"):
        train(dataclasses.replace(new, device="gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        train(dataclasses.replace(new, device="cuda"))
    assert not Path(new.out).exists()
    for variables, message in (
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK must be in \[0, WORLD_SIZE\), got 2 of 2"),
        ({"RANK": "x"}, "must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "divisible by 4 processes"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                train(dataclasses.replace(config, out=str(tmp_path / "y")))
    for bad in (
        {"out": config.data.path + "/run"},
        {"batch_size": 0},
        {"accumulation": 4},
        {"parallel": "tp"},
        {"optimizer_at_switch": "keep"},
        {"clip": 0.0},
        {"minutes": 0.0},
        {"tokens": math.nan},
        {"tokens": math.inf},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dataclasses.replace(config, **{"batch_size": 2, **bad})


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_corrupt_checkpoint(config, monkeypatch, file):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    newest = checkpoints(Path(config.out) / "checkpoints")[-1]
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"damaged: {file}"):
        train(dataclasses.replace(config, resume=True))


def test_log_drops_what_a_kill_left_half(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Log(path, 2).close()
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    Log(path, 0).close()
    assert read_log(path) == []


def test_command_line():
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", "from patchkernels.cli import main; main()", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("plan", "--model", "124m", "--tokens", "1e9", "--phases", "4:2/3,1:1/3")
    assert done.returncode == 0, done.stderr
    assert "0.500x the positions" in " ".join(done.stdout.split())
    done = run("train", "--phases", "4:2")
    assert (done.returncode, done.stderr) == (
        1,
        "patchkernels: ValueError: the shares must add up to 1, got 2 from '4:2'\n",
    )


@pytest.mark.parametrize(("patch_size", "low"), [(2, 0.4), (4, 0.18), (8, 0.08)])
def test_counted_flops_of_a_patch_step_on_the_same_tokens(patch_size, low):
    config = PatchLMConfig.preset("370m")
    ratio = count_flops(config, 1, 2048 // patch_size, patch_size) / count_flops(config, 1, 2048, 1)
    assert low < ratio <= 1 / patch_size  # attention is quadratic, so it is less


def test_counted_flops_are_the_products():
    c = PatchLMConfig(300, 16, 24, 3, 2, num_key_value_heads=1)
    positions = 10
    linear = c.hidden_size * (2 * 16 + 2 * 8) + 3 * c.hidden_size * c.intermediate_size
    attention = 2 * positions * c.hidden_size
    forward = 2 * positions * (c.num_hidden_layers * (linear + attention) + c.hidden_size * c.vocab_size)
    assert count_flops(c, 5, positions, 4) == 5 * 3 * forward


def test_plan():
    result = plan(PlanConfig(model="124m", tokens=1e9, batch_size=64, context=1024, tflops=100, gpus=2))
    assert [row["patch_size"] for row in result["phases"]] == [4, 1]
    assert result["cost_in_positions"] == pytest.approx(0.5)
    assert result["cost_in_flops"] == pytest.approx(0.5, rel=0.02)
    assert result["hours"] == pytest.approx(result["flops"] / 2e14 / 3600)
    assert result["memory_bytes"]["parameters"] == pytest.approx(4 * 123.6e6, rel=0.01)
    with pytest.raises(ValueError, match="tflops"):
        plan(PlanConfig(tflops=0))
    with pytest.raises(ValueError, match="tokens must be positive and finite, got inf"):
        plan(PlanConfig(tokens=math.inf))


def test_the_memory_table_of_the_page_is_that_of_the_formula():
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
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
    for bad in ({"shards": 3}, {"tensor_parallel": 0}, {"shards": 2, "tensor_parallel": 8}):
        with pytest.raises(ValueError, match="must divide gpus"):
            plan(PlanConfig(model="demo", gpus=8, **bad))
