"""The training run: corpus -> batches -> PatchLM, phase after phase; checkpoints, log, model and plot at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from patchkernels.attention import choose
from patchkernels.batches import Batches, read_rows, validation_rows
from patchkernels.checkpoint import checkpoints, load_checkpoint, read_state, save_checkpoint, save_distributed
from patchkernels.data import Corpus, save_tokenizer
from patchkernels.metrics import Display, Log, plot, prepare_aloud
from patchkernels.model import PatchLM, PatchLMConfig, patch_targets
from patchkernels.plan import count_flops
from patchkernels.pretrained import replace_file
from patchkernels.processes import (
    Processes,
    choose_device,
    environment,
    joined,
    parallelize,
    synchronized,
    whole,
    whole_weights,
)
from patchkernels.schedule import Phase, Schedule, parse_phases
from patchkernels.train_config import TrainConfig


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is no longer a number; nothing was updated with it."""


class Stopped(SystemExit):
    """The step was finished and saved. The exit code is 128 + the signal, or ``OUT_OF_TIME``."""


OUT_OF_TIME = 75  # sysexits.h: a temporary failure, try again
INITIAL_SPREAD = 0.05  # how far from what is expected a first loss may be, relatively


def train(config: TrainConfig) -> Path:
    """Runs all phases and returns the run's folder.

    Raises:
        ValueError: settings that make no sense, or a checkpoint of other settings.
        FileExistsError: a folder that already holds a run, without ``resume``.
        NonFiniteError: the loss diverged; the last checkpoint is from before.
        RuntimeError: before the first step the loss is not log V: targets are lost.
        Stopped: by a signal, or after ``config.minutes``; a resumed run goes on.
    """
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    phases = parse_phases(config.phases, config.shares_of, config.convention)
    processes = environment(choose_device(config.device))
    if config.batch_size % (processes.world_size * config.accumulation):
        raise ValueError(
            f"batch_size must be divisible by {processes.world_size} processes times accumulation, "
            f"got {config.batch_size} and {config.accumulation}"
        )
    # each raises here, before any work, if it cannot be had
    PatchLMConfig.preset(config.model)
    attention = choose(config.attention, processes.device, torch.bfloat16 if config.bf16 else torch.float32)
    out = Path(config.out)
    saved = checkpoints(out / "checkpoints")
    if saved and not config.resume:
        raise FileExistsError(f"{out} holds a run; pass --resume to go on with it, or another --out")
    if config.resume and not saved:
        raise FileNotFoundError(f"nothing to resume: {out} holds no checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    data = config.data
    if config.packed_documents:
        data = dataclasses.replace(data, document_multiple=math.lcm(*(p.patch_size for p in phases)))
    with joined(processes):
        with processes.first_on_its_node():
            corpus = prepare_aloud(data, Console(quiet=not processes.speaks))
        run = Run(config, corpus, config.schedule(len(corpus.train)), processes, attention, deadline)
        if saved:
            run.restore(saved[-1])
        if processes.speaks:
            text = json.dumps(dataclasses.asdict(config), indent=1)
            replace_file(out / "config.json", lambda path: path.write_text(text))
        run.loop(out)
    return out


def check_initial(values: dict[str, Any], vocab_size: int, variance: float) -> None:
    """Before the first step the loss is about ``log V + variance / 2``, at every patch size and in every slot.

    ``variance`` is that of a logit, ``D std^2`` behind the last norm: 0.05 for the demo, 1.6 where D = 4096.
    The loss of a model that loses K - 1 of its K targets falls all the same: only its value at the start tells.

    Raises:
        RuntimeError: a loss is not.
    """
    expected = math.log(vocab_size) + variance / 2
    for size, slots in values["initial_slot_losses"].items():
        losses = [values["initial_losses"][size], *slots]
        if any(abs(loss - expected) > INITIAL_SPREAD * expected for loss in losses):
            raise RuntimeError(
                f"before the first step the loss at K = {size} and those of its slots are {losses}, and log V is "
                f"{math.log(vocab_size):.3f}: targets are lost"
            )


class Run:
    """The state of a run: model, optimizer, step. Everything else follows from the step."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        schedule: Schedule,
        processes: Processes,
        attention: str,
        deadline: float = math.inf,  # of time.monotonic()
    ) -> None:
        self.config, self.corpus, self.schedule = config, corpus, schedule
        self.processes, self.device, self.attention = processes, processes.device, attention
        self.lr = config.learning_rate()
        torch.manual_seed(config.seed)  # the same weights on every rank
        longest = max(schedule.positions(phase) for phase in schedule.phases)
        self.model_config = PatchLMConfig.preset(
            config.model,
            vocab_size=corpus.vocab_size,
            max_position_embeddings=max(longest, config.context),
            qk_norm=config.qk_norm,
            attention=config.attention,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.model = PatchLM(self.model_config).to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.parallel = parallelize(self.model, self.model.model.layers, config.parallel, processes)
        self.call = torch.compile(self.parallel, dynamic=False) if config.compile else self.parallel
        torch.manual_seed(config.seed + 1 + processes.rank)
        self.optimizer = self.new_optimizer()
        packed = config.packed_documents
        self.batches = Batches(
            corpus.train, schedule, config.seed, packed=packed, rank=processes.rank, world_size=processes.world_size
        )
        rows = validation_rows(corpus.validation, config.context, config.eval_rows)
        self.validation = read_rows(corpus.validation, rows, config.context, packed)
        self.step = 0
        self.seconds = 0.0  # of training steps; compilation, evaluation and saving left out
        self.compile_seconds = 0.0
        self.prepared: set[int] = set()  # phases
        self.deadline, self.stop_code = deadline, 0
        self.phase_flops = [
            count_flops(self.model_config, config.batch_size, schedule.positions(phase), phase.patch_size)
            for phase in schedule.phases
        ]

    def new_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, fused=True)

    @property
    def parallel_name(self) -> str:
        return f" ({self.config.parallel})" if self.processes.world_size > 1 else ""

    def state(self) -> dict[str, Any]:
        return {"config": self.config.identity(), "corpus": self.corpus.digest, "seconds": self.seconds,
                "compile_seconds": self.compile_seconds}  # fmt: skip

    def restore(self, folder: Path) -> None:
        state = read_state(folder)
        mine = {**self.config.identity(), "corpus": self.corpus.digest}
        theirs = {**state["config"], "corpus": state["corpus"]}
        differing = [k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)]
        if differing:
            changes = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in sorted(differing))
            raise ValueError(f"the checkpoint {folder} is of another configuration ({changes})")
        load_checkpoint(folder, self.model, self.optimizer)
        self.step, self.seconds, self.compile_seconds = (state[k] for k in ("step", "seconds", "compile_seconds"))

    def loop(self, out: Path) -> None:
        config, total, speaks = self.config, self.schedule.total_steps, self.processes.speaks
        log = Log(out / "log.jsonl" if speaks else None, self.step)
        with self.signals(), contextlib.closing(log), Display(total, quiet=not speaks) as display:
            where = f"{self.processes.world_size} x {self.device.type}" if self.parallel_name else str(self.device)
            display.say(
                f"{config.model}, {self.parameters / 1e6:.2f}M parameters on {where}{self.parallel_name}, "
                f"attention {self.attention}; "
                f"{total} steps, phases "
                + ", ".join(f"K={p.patch_size}: {s} steps" for p, s in zip(self.schedule.phases, self.schedule.steps))
                + f"; cost {self.schedule.cost:.3f} of token-level training"
            )
            if self.step == 0:
                values = self.initial()
                log.write(**values)
                display.step(0, values)
                variance = self.model_config.hidden_size * self.model_config.initializer_range**2
                check_initial(values, self.corpus.vocab_size, variance)
            while self.step < total:
                index, within = self.schedule.locate(self.step)
                if within == 0 and self.step and config.optimizer_at_switch == "reset":
                    self.optimizer = self.new_optimizer()
                if index not in self.prepared:
                    self.prepare(index)
                began, tokens_before = time.perf_counter(), self.schedule.raw_tokens(self.step)
                values = self.train_step(index)
                took = time.perf_counter() - began
                self.seconds += took
                self.step += 1
                tokens = self.schedule.raw_tokens(self.step)
                last = self.step == total
                switch = last or self.schedule.locate(self.step)[1] == 0
                logged = switch or self.step % config.log_every == 0
                recovering = index > 0 and (within + 1).bit_count() == 1  # 1, 2, 4, 8, ... steps after a switch
                evaluated = switch or recovering or self.step % config.eval_every == 0
                if logged or evaluated:
                    phase = self.schedule.phases[index]
                    values |= {
                        "step": self.step, "phase": index + 1, "patch_size": phase.patch_size, "raw_tokens": tokens,
                        "flops": self.flops(), "seconds": self.seconds, "compile_seconds": self.compile_seconds,
                        "raw_tokens_per_second": (tokens - tokens_before) / took,
                        "positions_per_second": config.batch_size * self.schedule.positions(phase) / took,
                    }  # fmt: skip
                    if evaluated:
                        values |= self.evaluate(phase)
                    log.write(**values)
                display.step(self.step, values if logged or evaluated else None)
                if switch or self.stop_code or self.step % config.save_every == 0:
                    save = save_distributed if self.processes.world_size > 1 else save_checkpoint
                    save(out / "checkpoints", self.step, self.model, self.optimizer, self.state(), config.keep)
                if self.stop_code and not last:
                    why = "out of time" if self.stop_code == OUT_OF_TIME else f"signal {self.stop_code - 128}"
                    display.say(f"stopped after step {self.step} ({why}); --resume goes on")
                    raise Stopped(self.stop_code)
            self.finish(out, display)
            if self.stop_code not in (0, OUT_OF_TIME):  # a signal that came too late to stop this run stops the caller
                raise Stopped(self.stop_code)

    def initial(self) -> dict[str, Any]:
        """Before any step: token-level validation loss, and at every patch size of the run the loss as it is trained on
        and that of each slot."""
        sizes = [size for size in sorted({p.patch_size for p in self.schedule.phases}) if self.has_patches(size)]
        with torch.no_grad():
            losses = {str(k): float(self.loss(*next(self.validation_parts(k)), k, compiled=False)) for k in sizes}
        return {
            "step": 0, "phase": 1, "patch_size": self.schedule.phases[0].patch_size, "raw_tokens": 0, "flops": 0,
            "seconds": 0.0, "compile_seconds": 0.0, **self.evaluate(self.schedule.phases[0]), "initial_losses": losses,
            "initial_slot_losses": {str(size): self.slot_losses(size) for size in sizes},
        }  # fmt: skip

    def prepare(self, index: int) -> None:
        """A step of the phase that is thrown away: what compiling and first allocations take is not training time."""
        began = time.perf_counter()
        ids, labels, documents = self.read()[0]
        self.loss(ids, labels, documents, self.schedule.phases[index].patch_size).backward()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.prepared.add(index)
        self.compile_seconds += time.perf_counter() - began

    def read(self) -> list[tuple[Any, Any, Any]]:
        """The step's rows in ``accumulation`` parts: ids, labels, document ids."""
        batch = [None if t is None else t.to(self.device) for t in self.batches.batch(self.step)]
        count = self.config.accumulation
        return list(zip(*([None] * count if t is None else t.chunk(count) for t in batch)))

    def train_step(self, index: int) -> dict[str, Any]:
        config, phase = self.config, self.schedule.phases[index]
        lr = self.lr.at(self.step, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = self.read()
        loss = torch.zeros((), device=self.device)
        shares = self.shares(parts, phase)
        for i, (ids, labels, documents) in enumerate(parts):
            with synchronized(self.parallel, last=i + 1 == config.accumulation):
                part = self.loss(ids, labels, documents, phase.patch_size) * shares[i]
                part.backward()
            loss += part.detach()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        # a signal that one process got, or the first clock that is past the deadline, stops all after the same step
        flags = [torch.tensor(float(f)) for f in (self.stop_code, time.monotonic() > self.deadline)]
        loss_value, norm_value, stop, late = self.processes.mean(loss, norm, *flags)
        self.stop_code = self.stop_code or (128 + signal.SIGTERM if stop else OUT_OF_TIME if late else 0)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}, lr {lr:.3g}; stopped before "
                "the update. The last checkpoint is from before: a smaller --lr needs a new run"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss_value, "grad_norm": norm_value, "lr": lr}

    def shares(self, parts: list[tuple[Any, Any, Any]], phase: Phase) -> list[float]:
        """What each part's mean counts: parts of packed documents hold unlike numbers of targets."""
        if not self.config.packed_documents:
            return [1 / self.config.accumulation] * self.config.accumulation
        targets = [patch_targets(labels, phase.patch_size, documents) for _, labels, documents in parts]
        counts = torch.stack([(target != -100).sum() for target in targets])
        (mean,) = self.processes.mean(counts.sum())
        return [count / max(mean, 1) for count in counts.tolist()]

    def loss(
        self, ids: Any, labels: Any, documents: Any, patch_size: int, reduction: str = "mean", compiled: bool = True
    ) -> Tensor:
        model = self.call if compiled else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss: Tensor = model(ids, labels, patch_size, reduction, documents)
        return loss

    @torch.no_grad()
    def evaluate(self, phase: Phase) -> dict[str, Any]:
        """Token-level loss in every phase; in a patch phase also that of each slot, on the same text."""
        token = self.slot_losses(1)[0]
        bits = token / math.log(2) / self.corpus.bytes_per_token
        values: dict[str, Any] = {"validation_loss": token, "validation_bits_per_byte": bits}
        if phase.patch_size > 1 and self.has_patches(phase.patch_size):
            values["validation_slot_losses"] = self.slot_losses(phase.patch_size)
        return values

    @torch.no_grad()
    def slot_losses(self, patch_size: int) -> list[float]:
        """The mean loss of each of the K slots over the held-out rows, cut to whole patches."""
        total, count = (torch.zeros(patch_size, dtype=torch.float64) for _ in range(2))
        for part in self.validation_parts(patch_size):
            losses = self.loss(*part, patch_size, "none", compiled=False).double().cpu()
            total += losses.sum((0, 1))
            count += (losses != 0).sum((0, 1))  # an ignored target's loss is exactly 0
        return (total / count.clamp(min=1)).tolist()

    def has_patches(self, patch_size: int) -> bool:
        """Whether a held-out row has a patch and one to predict."""
        return self.config.context >= 2 * patch_size

    def validation_parts(self, patch_size: int) -> Iterator[tuple[Any, Any, Any]]:
        length = self.config.context // patch_size * patch_size
        for rows in range(0, len(self.validation[0]), self.config.batch_size):
            part = (slice(rows, rows + self.config.batch_size), slice(length))
            ids, labels, documents = (None if t is None else t[part].to(self.device) for t in self.validation)
            yield ids, labels, documents

    def flops(self) -> int:
        """Counted FLOPs of the steps so far."""
        done = [min(max(self.step - a, 0), s) for a, s in zip(self.schedule.starts, self.schedule.steps)]
        return sum(n * f for n, f in zip(done, self.phase_flops))

    def finish(self, out: Path, display: Display) -> None:
        model = self.model
        if self.processes.world_size > 1:
            weights = whole_weights(self.model)
            if not self.processes.speaks:
                return
            model = PatchLM(self.model_config)
            model.load_state_dict(weights)
        folder = out / "model"
        end_of_text = self.corpus.end_of_text
        model.save_pretrained(folder, bos_token_id=end_of_text, eos_token_id=end_of_text)
        save_tokenizer(self.corpus, folder, self.model_config.max_position_embeddings)
        plot(out / "log.jsonl", out / "plot.png")
        display.say(
            f"done: {self.schedule.raw_tokens(self.step):,} raw tokens, {self.flops():.3e} FLOPs, "
            f"{self.seconds:.0f} s of training.\n"
            f"saved: {folder} (model and tokenizer), {out / 'log.jsonl'}, {out / 'plot.png'}, {out / 'checkpoints'}\n"
            f'next: AutoModelForCausalLM.from_pretrained("{folder}") in transformers, or PatchLM.from_pretrained;\n'
            f"      patchkernels plan --help  for the cost of a larger run"
        )

    @contextlib.contextmanager
    def signals(self) -> Any:
        """SIGTERM and SIGINT let the step finish."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_code = 128 + number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    from patchkernels.cli import main

    main(["train", *sys.argv[1:]])
