"""A model of your own through both phases, on one process or on several with FSDP2.

Run: python examples/own_model.py
     python examples/own_model.py --muon      (made for GPUs, slow on a CPU)
     torchrun --nproc-per-node 2 examples/own_model.py
     python examples/own_model.py --resume
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from patchkernels import PatchEmbedding, PatchLMHead, next_patch_targets
from patchkernels.data.corpus import DataConfig, prepare
from patchkernels.training import fit

CONTEXT = 128  # positions of a row, in every phase


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm_2(x))).square())


class GPT(nn.Module):
    def __init__(self, vocab, width=128, heads=4, layers=4):
        super().__init__()
        self.tokens = PatchEmbedding(vocab, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = PatchLMHead(width, vocab)
        for weight in (self.tokens.weight, self.positions.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, input_ids, labels, patch_size):
        x = self.tokens(input_ids, patch_size)
        x = x + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x), target=next_patch_targets(labels, patch_size))


def optimizers(model, muon):
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2] if muon else []
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95))
    return [torch.optim.Muon(matrices, lr=0.02), adamw] if muon else [adamw]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=500_000, help="raw tokens to read")
    parser.add_argument("--out", default="runs/own")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--text", help="a file or folder of text; default: the standard library of this Python")
    parser.add_argument("--vocab", type=int, default=2048)
    arguments = parser.parse_args()
    corpus = prepare(DataConfig(path=arguments.text, vocab_size=arguments.vocab))
    rows, held_out = (
        t.ids[: len(t) // CONTEXT * CONTEXT].reshape(-1, CONTEXT) for t in (corpus.train, corpus.validation)
    )
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group()
    torch.manual_seed(0)
    model = GPT(corpus.vocab_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model.cuda()
    if dist.is_initialized():
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    fit(
        model,
        optimizers(model, arguments.muon),
        rows,
        validation=held_out[:64],
        phases="4:2/3,1:1/3",
        tokens=arguments.tokens,
        batch_size=16,
        out=arguments.out,
        resume=arguments.resume,
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
