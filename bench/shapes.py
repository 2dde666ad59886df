"""The shapes that are measured: ``published`` on a GPU, ``small`` on a CPU, ``tiny`` to test the benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Embedding(NamedTuple):
    """Patch embedding of ``tokens`` ids, looked up in a table (V, D)."""

    patch_size: int
    V: int
    D: int
    ids: str  # distribution of the token ids: uniform or zipf
    tokens: int


class Logits(NamedTuple):
    """Cross entropy of logits (N, V) with K targets a row."""

    K: int
    N: int
    V: int


class Linear(NamedTuple):
    """Cross entropy of an input (N, D) and a head (V, D) with K targets a row."""

    K: int
    N: int
    D: int
    V: int


class Step(NamedTuple):
    """A training step of the model of a preset."""

    preset: str
    rows: int
    context: int  # positions of a row, each a patch of any size


class Loop(NamedTuple):
    """The loop over training steps, token by token."""

    model: str  # a preset, or one with changes
    vocab_size: int
    rows: int
    context: int


PATCH_SIZES = (1, 2, 4, 8, 16)
VOCABULARIES = (32000, 50257, 128256, 151936)

EMBEDDING = {
    "tiny": [Embedding(4, 100, 16, "zipf", 64)],
    "small": [Embedding(k, 32000, 512, "zipf", 8192) for k in PATCH_SIZES]
    + [Embedding(k, 4096, 128, "zipf", 512 * k) for k in (1, 4)]
    + [Embedding(4, 128256, 256, "zipf", 8192)],
    "published": [Embedding(k, 128256, 4096, "zipf", 2**16) for k in PATCH_SIZES]
    + [Embedding(4, 128256, 4096, "uniform", 2**16)]
    + [Embedding(4, v, 2048, "zipf", 2**16) for v in VOCABULARIES]
    + [Embedding(4, 128256, d, "zipf", 2**16) for d in (768, 2048, 8192)],
}

LOGITS = {
    "tiny": [Logits(4, 8, 200)],
    "small": [Logits(k, n, v) for n, v in ((512, 32000), (256, 128256)) for k in (1, 4)],
    "published": [
        Logits(k, n, v) for n, v in ((8192, 32000), (16384, 50257), (4096, 128256), (2048, 151936)) for k in (1, 4)
    ],
}

LINEAR = {
    "tiny": [Linear(4, 8, 16, 200)],
    "small": [Linear(k, *shape) for shape in ((512, 512, 32000), (131, 192, 10007)) for k in (1, 4)],
    "published": [
        Linear(k, *shape)
        for shape in (
            (4096, 4096, 128256),
            (16384, 4096, 128256),
            (8192, 2048, 32000),
            (16384, 768, 50257),
            (32768, 1024, 32000),
            (2048, 2560, 151936),
            (4099, 1536, 50257),
        )
        for k in (1, 4)
    ],
}

STEP_PATCH_SIZES = (1, 2, 4, 8)
STEP = {
    "tiny": [Step("demo", 1, 16)],
    "small": [Step("demo", 4, 256)],
    "published": [Step("124m", 16, 2048), Step("370m", 16, 2048), Step("1.3b", 8, 2048)],
}

LOOP = {
    "tiny": [Loop("demo:hidden_size=16,num_hidden_layers=1", 300, 2, 16)],
    "small": [
        Loop("demo:hidden_size=64,intermediate_size=176,num_hidden_layers=3", 512, 8, 128),
        Loop("demo", 4096, 16, 128),
    ],
    "published": [Loop("124m", 50257, 16, 1024)],
}
