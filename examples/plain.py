"""A GPT and its training loop in plain PyTorch. Run: python examples/plain.py

A line that patch training changed ends with a comment that shows the line before. A new line ends with an empty one.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

from patchkernels import PatchEmbedding, PatchLMHead, next_patch_targets
from patchkernels.data.corpus import DataConfig, prepare


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab, width, heads, layers, context):
        super().__init__()
        self.wte = PatchEmbedding(vocab, width)  # was: self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = PatchLMHead(width, vocab)  # was: self.head = nn.Linear(width, vocab, bias=False)
        for weight in (self.wte.weight, self.wpe.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids):
        x = self.wte(ids)
        x = x + self.wpe.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.ln(x)
        return self.head(x, next_patch_targets(ids, self.wte.patch_size))  # was: return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--text", help="a file or folder of text; default: the standard library of this Python")
    parser.add_argument("--vocab", type=int, default=2048)
    arguments = parser.parse_args()
    corpus = prepare(DataConfig(path=arguments.text, vocab_size=arguments.vocab))
    tokens, held_out = (torch.from_numpy(t.ids.astype("int64")) for t in (corpus.train, corpus.validation))
    torch.manual_seed(0)
    model = GPT(corpus.vocab_size, width=128, heads=4, layers=4, context=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(arguments.steps):
        model.wte.patch_size = 4 if step < arguments.steps * 2 // 3 else 1  # was:
        starts = torch.randint(len(tokens) - 256, (16,))
        loss = model(torch.stack([tokens[start : start + 256] for start in starts]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:>4}  K={getattr(model.wte, 'patch_size', 1)}  loss {loss.item():.4f}", flush=True)
    rows = held_out[: len(held_out) // 256 * 256].view(-1, 256)[:16]
    with torch.no_grad():
        loss = model(rows).item()
    print(f"held-out loss {loss:.4f}, {loss / math.log(2) / corpus.bytes_per_token:.3f} bits a byte")


if __name__ == "__main__":
    main()
