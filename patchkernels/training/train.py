"""The training run from start to end: corpus, model, then step after step until all phases are done."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import torch
from rich.console import Console

from patchkernels.data.batches import Batches, read_rows, validation_rows
from patchkernels.data.corpus import Corpus
from patchkernels.data.tokenizer import save_tokenizer
from patchkernels.files import replace_file
from patchkernels.model.attention import choose_attention
from patchkernels.model.cost import step_flops
from patchkernels.model.patch_lm import PatchLM
from patchkernels.training.config import OptimizerConfig, TrainConfig, flat_settings
from patchkernels.training.console import Display, prepare_aloud
from patchkernels.training.evaluation import check_initial, evaluate, initial_losses
from patchkernels.training.log import Log
from patchkernels.training.loop import checkpoint_to_resume, loop
from patchkernels.training.plot import plot
from patchkernels.training.processes import (
    Processes,
    choose_device,
    environment,
    full_state_dict,
    joined,
    parallelize,
)
from patchkernels.training.run import Run
from patchkernels.training.stop import StopRequest


def train(config: TrainConfig) -> Path:
    """Trains a model through all phases and returns the run's folder.

    Raises:
        ValueError: the settings are invalid, or the checkpoint is of other settings.
        FileExistsError: the folder already holds a run, and ``resume`` is not set.
        FileNotFoundError: there is no checkpoint to resume from, or no such text.
        NonFiniteError: the loss diverged. The last checkpoint is from before that.
        RuntimeError: the loss before the first step is not log V, so that targets are lost; or the requested attention
            cannot run here.
        Stopped: a signal came, or ``minutes`` are over. The run is saved and can be resumed.
    """
    config.check()
    stop = StopRequest(config.run.minutes)
    processes = environment(choose_device(config.run.device))
    config = config.on(processes.device)
    config.check_batch_size(processes.world_size)
    document_multiple = config.document_multiple()
    dtype = torch.bfloat16 if config.run.bf16 else torch.float32
    head_size = config.model.architecture().head_size
    attention = choose_attention(config.run.attention, processes.device, dtype, head_size)  # raises if it cannot run
    out = Path(config.run.out)
    checkpoint = checkpoint_to_resume(out, config.checkpoint.resume)
    out.mkdir(parents=True, exist_ok=True)
    with joined(processes):
        with processes.first_on_its_node():
            console = Console(quiet=not processes.is_first)
            corpus = prepare_aloud(config.data, console, document_multiple=document_multiple)
        run = prepare_run(config, corpus, processes, stop)
        if checkpoint:
            run.restore(checkpoint)
        if processes.is_first:
            settings = json.dumps(dataclasses.asdict(config), indent=1)
            replace_file(out / "config.json", lambda path: path.write_text(settings))
        title = f"{config.model.preset} (attention {attention})"
        begin = functools.partial(measure_start, vocab_size=corpus.vocab_size)
        loop(run, title, begin, functools.partial(finish, corpus=corpus))
    return out


def prepare_run(config: TrainConfig, corpus: Corpus, processes: Processes, stop: StopRequest) -> Run:
    """The run of these settings on this corpus: a new model, AdamW, and the schedule of the steps."""
    schedule, context = config.schedule.schedule(len(corpus.train)), config.schedule.context
    seed, packed = config.run.seed, config.run.packed_documents
    architecture = config.model.architecture(
        vocab_size=corpus.vocab_size,
        max_position_embeddings=max(context, *(schedule.positions(phase) for phase in schedule.phases)),
        attention=config.run.attention,
    )
    torch.manual_seed(seed)  # the same weights in every process
    model = PatchLM(architecture).to(processes.device)
    bf16, compiled = bool(config.run.bf16), bool(config.run.compile)
    if compiled and processes.world_size == 1:
        model.compile_layers()
    parallel_model = parallelize(
        model, model.model.layers, config.run.parallel, processes, bf16=bf16, compiled=compiled
    )
    torch.manual_seed(seed + 1 + processes.rank)
    held_out = validation_rows(corpus.validation, context, config.log.eval_rows)
    return Run(
        Path(config.run.out),
        parallel_model,
        [new_optimizer(model, config.optimizer)],
        Batches(corpus.train, schedule, seed, packed=packed, rank=processes.rank, world_size=processes.world_size),
        schedule,
        config.loop(),
        {**flat_settings(config.identity()), "corpus": corpus.digest},
        processes,
        stop,
        held_out=read_rows(corpus.validation, held_out, context, packed),
        step_flops=step_flops(architecture, schedule),
        bytes_per_token=corpus.bytes_per_token,
        warms_up=True,
    )


def new_optimizer(model: PatchLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW. The weights of norms do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def measure_start(run: Run, log: Log, display: Display, vocab_size: int) -> None:
    """Logs the losses of the new model, and raises ``RuntimeError`` unless they are those of random guessing."""
    values = run.progress() | evaluate(run, run.phase.patch_size) | initial_losses(run)
    log.write(**values)
    display.step(0, values)
    architecture = patch_lm_of(run).config
    check_initial(values, vocab_size, architecture.hidden_size * architecture.initializer_range**2)


def patch_lm_of(run: Run) -> PatchLM:
    assert isinstance(run.model, PatchLM)
    return run.model


def finish(run: Run, display: Display, corpus: Corpus) -> None:
    """Saves the model with its tokenizer in Hugging Face's format, draws the plot, and prints where everything is."""
    model = patch_lm_of(run)
    if run.processes.world_size > 1:
        weights = full_state_dict(run.model)
        if not run.processes.is_first:
            return
        model = PatchLM(model.config)
        model.load_state_dict(weights)
    out, folder, end_of_text = run.out, run.out / "model", corpus.end_of_text
    model.save_pretrained(folder, bos_token_id=end_of_text, eos_token_id=end_of_text)
    save_tokenizer(corpus.tokenizer_file, folder, model.config.max_position_embeddings)
    plot(out / "log.jsonl", out / "plot.png")
    display.say(
        f"done: {run.schedule.raw_tokens(run.step):,} raw tokens, {run.flops():.3e} FLOPs, "
        f"{run.seconds:.0f} s of training.\n"
        f"saved: {folder} (model and tokenizer), {out / 'log.jsonl'}, {out / 'plot.png'}, {out / 'checkpoints'}\n"
        f'next: AutoModelForCausalLM.from_pretrained("{folder}") in transformers, or PatchLM.from_pretrained;\n'
        f"      patchkernels plan --help  for the cost of a larger run"
    )
