"""Trains a transformers model in two phases with Accelerate. Run: python examples/accelerate_loop.py

In several processes: accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import argparse

import accelerate
import torch
import transformers
from torch.utils.data import DataLoader

from patchkernels import hf
from patchkernels.data.corpus import DataConfig, prepare
from patchkernels.hf import PatchCollator, PatchRows, example_schedule
from patchkernels.schedule import parse_phases

CONTEXT, ROWS = 128, 16  # tokens of an example, rows of an optimizer step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4800, help="pieces of text to read in all")
    parser.add_argument("--text", help="a file or folder of text; default: the standard library of this Python")
    parser.add_argument("--vocab", type=int, default=2048)
    arguments = parser.parse_args()
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():
        corpus = prepare(DataConfig(path=arguments.text, vocab_size=arguments.vocab))
    ids = torch.from_numpy(corpus.train.ids[: len(corpus.train) // CONTEXT * CONTEXT].astype("int64"))
    examples = [{"input_ids": row} for row in ids.view(-1, CONTEXT)]
    schedule = example_schedule(parse_phases("4:2/3,1:1/3"), arguments.examples, ROWS, "positions")
    rows = PatchRows(examples, schedule, seed=0, shuffle=True)  # each of 1 or 4 examples
    loader = DataLoader(rows, batch_size=ROWS // accelerator.num_processes, collate_fn=PatchCollator())

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=corpus.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = hf.enable(transformers.LlamaForCausalLM(config))  # a batch with shift_labels is a patch step
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == schedule.total_steps - 1:
            mean = accelerator.reduce(loss.detach(), "mean").item()
            size = batch["shift_labels"].shape[2] if "shift_labels" in batch else 1
            accelerator.print(f"step {step:>4}  K={size}  loss {mean:.4f}")


if __name__ == "__main__":
    main()
