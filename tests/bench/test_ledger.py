"""The ledger: what operations are said to cost, what a call is found to do, and what its command prints."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from checkout import CHECKOUT
from torch._subclasses.fake_tensor import FakeTensorMode

if torch.cuda.is_available():
    pytest.skip("tensors without data are for a machine without a GPU", allow_module_level=True)
pytest.importorskip("bench.fake_cuda")  # imports the kernels, and they import Triton

from bench import shapes
from bench.fake_cuda import FakeCuda
from bench.ledger import __main__ as command
from bench.ledger import cases, measured
from bench.ledger.compiled import compiled_graphs, kernels_of
from bench.ledger.counting import Ledger, Rates, count, seconds_of
from patchkernels import PatchLMConfig
from patchkernels.ops.linear_buffers import LOGITS_BYTES

N, D = 6, 10
RATES = Rates("a GPU", tflops=2.0, terabytes=0.5)


def entries(function, *inputs):
    """The entries of a call. Tensors are float32 on the GPU; a shape stands for each."""
    ledger = Ledger()
    with FakeCuda(ledger):
        tensors = [torch.zeros(shape, device="cuda") for shape in inputs]
        ledger.entries.clear()
        function(*tensors)
    return ledger.entries


SQUARE, VECTOR = 4 * N * D, 4 * D
OPERATIONS = {  # read, written, FLOPs, launches; None: no kernel
    "a sum": (lambda x, y: x + y, SQUARE + VECTOR, SQUARE, 0, 1),
    "a number": (lambda x, y: x * 2, SQUARE, SQUARE, 0, 1),
    "in place": (lambda x, y: x.add_(y), SQUARE + VECTOR, SQUARE, 0, 1),
    "the same tensor twice": (lambda x, y: x * x, SQUARE, SQUARE, 0, 1),
    "zeroing": (lambda x, y: x.zero_(), 0, SQUARE, 0, 1),
    "a copy": (lambda x, y: x.copy_(y.expand(N, D)), VECTOR, SQUARE, 0, 1),
    "a cast": (lambda x, y: x.bfloat16(), SQUARE, SQUARE // 2, 0, 1),
    "a cast to what it is": (lambda x, y: x.float(), None),
    "a part": (lambda x, y: x[:2] + 1, SQUARE // 3, SQUARE // 3, 0, 1),
    "views": (lambda x, y: x.T.unsqueeze(0)[:, 1].expand(5, N).view(-1, N), None),
    "memory": (lambda x, y: torch.empty_like(x), None),
    "nothing": (lambda x, y: x[:0] + 1, None),
    "a product": (lambda x, y: x @ x.T, SQUARE, 4 * N * N, 2 * N * N * D, 1),
    "a product into memory": (
        lambda x, y: torch.mm(x[:, :N], x[:, :N], out=torch.empty(N, N, device="cuda")),
        4 * N * N, 4 * N * N, 2 * N**3, 1,
    ),
    "a sum of products": (lambda x, y: x[:, :N].addmm_(x, x.T), 4 * N * N + SQUARE, 4 * N * N, 2 * N * N * D, 1),
    "products instead of a sum": (lambda x, y: x[:, :N].addmm_(x, x.T, beta=0), SQUARE, 4 * N * N, 2 * N * N * D, 1),
    "a lookup": (
        lambda x, y: F.embedding(torch.zeros(3, dtype=torch.int64, device="cuda"), x)[:0],
        3 * 8 + 3 * VECTOR, 3 * VECTOR, 0, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    function, *expected = OPERATIONS[name]
    found = [entry for entry in entries(function, (N, D), (D,)) if entry.name != "zeros"]
    if expected == [None]:
        assert not found
    else:
        assert tuple(found[-1].work) == tuple(expected)


def test_an_entry_takes_the_longer_of_its_times():
    (product,) = entries(lambda x: x @ x.T, (N, D))
    assert product.seconds(RATES) == pytest.approx((SQUARE + 4 * N * N) / 0.5e12)
    assert product.seconds(RATES._replace(tflops=1e-9)) == pytest.approx(2 * N * N * D / 1e3)


def test_memory_is_held_as_long_as_a_tensor_is():
    def call(x):
        y = x + 1
        z = y + 1
        del y
        (z[:1] * 2).sum()

    held = [entry.held for entry in entries(call, (N, D))]
    part = 4 * D
    assert held == [2 * SQUARE, 3 * SQUARE, 2 * SQUARE + part, 2 * SQUARE + part + 4]


def test_what_is_saved_for_the_backward_goes_with_it():
    def make():
        x = torch.zeros(N, D, device="cuda", requires_grad=True)

        def call(backward):
            yield "forward"
            out = x.exp().exp().exp()  # saves the three results
            yield "backward"
            backward(out, torch.ones_like(out))

        return call

    forward, backward = count(make, "exponentials")
    assert [entry.name for entry in forward.entries] == ["exp"] * 3
    assert [entry.name for entry in backward.entries] == ["ones_like", "mul", "mul", "mul"]
    # x, three results and the upstream gradient; then one gradient more for each result that goes. If torch.compile has
    # run in this process, it holds on to one tensor more.
    held = [entry.held // SQUARE for entry in backward.entries]
    assert held[0] == 5 and max(held) <= 7 and held[-1] <= 6


def test_kernels_and_the_bodies_of_operators_are_entered():
    (found,) = count(cases.linear(shapes.Linear(4, 32, 16, 128)).contenders["patchkernels"], "patchkernels")
    names = [entry.name for entry in found.entries]
    assert names.count("mm") + names.count("addmm") == 3 and names.count("patch_cross_entropy_kernel") == 1
    assert found.total().flops == 3 * 2 * 32 * 16 * 128


LEAST = {  # N, D, V: how many times as long as the three bare products, at most
    (4096, 4096, 128256): 1.04, (8192, 2048, 32000): 1.09, (16384, 1024, 32000): 1.17, (16384, 768, 50257): 1.21,
    (2048, 2560, 151936): 1.06, (16384, 4096, 128256): 1.05,
}  # fmt: skip


@pytest.mark.parametrize("shape", LEAST)
def test_the_fused_loss_is_at_the_limit(shape):
    rows, hidden, vocab = shape
    case, rates = cases.linear(shapes.Linear(4, *shape)), command.RATES[0]
    found, low = (count(make, name)[0] for name, make in case.contenders.items())
    floor = sum(seconds_of(product, rates) for product in case.floor["forward + backward"])
    assert found.seconds(rates) <= (LEAST[shape] + 0.005) * floor
    logits, chunks = 2 * rows * vocab, -(-2 * rows * vocab // LOGITS_BYTES["cuda"])
    assert found.total().launches <= 5 + 4 * chunks
    if chunks == 1:
        assert found.extra <= 1.05 * logits
    else:
        assert found.extra <= 1.05 * (LOGITS_BYTES["cuda"] + 4 * vocab * hidden)
    assert low.seconds(rates) <= 1.40 * found.seconds(rates)
    assert low.extra <= 1.05 * (max(logits / 128, 2 * 2048 * rows) + 4 * rows * hidden)


@pytest.mark.parametrize("shape", command.LOGITS)
def test_given_logits_are_read_once_and_written_once(shape):
    case = cases.logits(shapes.Logits(4, *shape))
    (found,) = count(case.contenders["patchkernels"], "patchkernels")
    (least,) = case.floor["forward + backward"]
    assert found.total().read + found.total().written <= 1.01 * (least.read + least.written)
    assert found.total().launches <= 5


@pytest.mark.parametrize("slots", [1, 4])
def test_patch_embedding_moves_little_more_than_it_must(slots):
    case = cases.embedding(shapes.Embedding(slots, 128256, 4096, "different", 65536))
    bag_and_mean = [count(case.contenders[name], name) for name in ("F.embedding_bag", "mean of F.embedding")]
    for place, ours in enumerate(count(case.contenders["patchkernels"], "patchkernels")):
        (least,) = case.floor[ours.name]
        moved, work = ours.total().read + ours.total().written, ours.total()
        assert moved <= 1.05 * (least.read + least.written)
        assert work.launches <= 12
        if ours.name == "backward":
            theirs = [counts[place].total() for counts in bag_and_mean]
            assert all(their.read + their.written >= 1.5 * moved for their in theirs)


def test_a_training_step_has_all_of_its_products():
    case = cases.step(shapes.Step("demo", 2, 32), 4)
    (found,) = count(case.contenders["patchkernels"], "patchkernels")
    attention = sum(entry.work.flops for entry in found.entries if "flash" in entry.name)
    pairs = 4 * 2 * 4 * 32**2 * 32  # layers, rows, heads, positions^2, head size
    assert attention == 7 * pairs, "2 products of half the pairs forward, 5 backward"
    assert found.total().flops - attention == case.floor["step"][0].flops - 6 * 2 * pairs
    assert {"_fused_adamw_", "_foreach_norm", "patch_embedding_backward_kernel"} <= {e.name for e in found.entries}


def test_generated_kernels_have_the_bytes_of_what_they_read_and_write():
    """``sum(relu(2 w))``: the forward reads w, the backward reads it again and writes its gradient."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.empty(512, 1024))
        graphs = compiled_graphs(lambda ids: (2 * weight).relu().sum() + 0 * ids.sum(), (1,))
    with FakeCuda():
        forward, backward = (kernels_of(graph, place > 0) for place, graph in enumerate(graphs))
    size = 4 * 512 * 1024
    assert [kernel.operation for kernel in (*forward, *backward)] == [None] * len((*forward, *backward))
    assert size <= sum(k.read for k in forward) <= 1.01 * size and sum(k.written for k in forward) <= 0.01 * size
    assert size <= sum(k.read for k in backward) <= 1.01 * size
    assert size <= sum(k.written for k in backward) <= 1.01 * size


def test_a_compiled_step_has_the_same_products_and_moves_less():
    case = cases.step(shapes.Step("demo", 8, 256), 4)
    eager, compiled = (count(make, name)[0] for name, make in case.contenders.items())
    assert compiled.total().flops == eager.total().flops
    assert compiled.extra is None and eager.extra > 0
    ours = [entry.name for entry in compiled.entries if entry.name.endswith("_kernel")]
    assert ours == [entry.name for entry in eager.entries if entry.name.endswith("_kernel")]
    assert compiled.total().launches < 0.6 * eager.total().launches
    optimizer = [entry.work for entry in compiled.entries if entry.name.startswith(("_foreach", "_fused"))]
    outside = sum(work.read + work.written for work in optimizer)
    moved, eager_moved = (sum(found.total()[:2]) - outside for found in (compiled, eager))
    assert moved < 0.5 * eager_moved


def test_a_compiled_layer_moves_no_more_than_it_must():
    """In units of the layer's input, besides its products, its attention and the casts of parameters and gradients.

    Forward: both norms with their residuals read 2 and write 2; the rotation reads and writes q and k; the MLP's
    product reads two and writes one, each ``inner / hidden`` wide. Backward: a norm reads its input, the residual's
    gradient and one for each projection (3 and 2), and writes one; the MLP reads three and writes two.
    """
    moved = {}
    for layers in (1, 2):
        config = PatchLMConfig.preset("1.3b", max_position_embeddings=512, num_hidden_layers=layers)
        graphs = cases.compiled_step(config, (8, 512), 1)
        with FakeCuda():
            kernels = [k for place, graph in enumerate(graphs) for k in kernels_of(graph, place > 0)]
        moved[layers] = sum(k.read + k.written for k in kernels if k.operation is None)
    hidden, inner = 2048, 5504
    casts = 2 * (2 + 4) * (4 * hidden**2 + 3 * hidden * inner)
    units = (moved[2] - moved[1] - casts) / (2 * 8 * 512 * hidden)
    least = 2 * 4 + 4 + 3 * inner / hidden + (3 + 3) + (3 + 2) + 4 + 5 * inner / hidden
    assert least <= units <= 1.01 * least


def test_the_command(capsys):
    command.main(["linear", "N=64", "D=32", "V=256", "--entries", "--rates", "slow:1:0.001"])
    text = capsys.readouterr().out
    header, _, ours, low, *rest = text.splitlines()
    assert header.startswith("| operator | shape") and "slow ms" in header and "H100" not in text
    assert "K=4 N=64 D=32 V=256 | patchkernels |" in ours and "memory=low" in low
    assert any(line.startswith("| patch_cross_entropy_kernel |") for line in rest)


def test_measured_seconds_are_medians_of_the_passes(monkeypatch):
    """With stand-ins for the GPU's events: the time is the number of passes that have run."""
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measured, "flush_and_sleep", lambda queueing: next(clock))
    monkeypatch.setattr(cases, "GPU", torch.device("cpu"))
    case = cases.embedding(shapes.Embedding(4, 9, 16, "different", 8))
    assert measured.measure(case.contenders["patchkernels"]) == {"forward": 1.0, "backward": 1.0}


def test_the_table_of_the_page_is_that_of_the_command():
    """Of the operators; a training step depends on how this version of PyTorch divides its operations."""
    page = (CHECKOUT / "docs" / "performance.md").read_text(encoding="utf-8")
    for case in [case for case in command.all_cases() if case.operator != "training step"]:
        for contender, make in case.contenders.items():
            for found in count(make, contender):
                cells = command.line(case, found, command.RATES, None)
                assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["softmax"], "invalid choice: 'softmax'"),
        (["linear", "M=3"], "linear has the settings K=4, N=4096, D=4096, V=128256; got 'M=3'"),
        (["linear", "N=many"], "N must be an integer, got 'many'"),
        (["linear", "N=0"], "N must be at least 1, got '0'"),
        (["step", "preset=9b"], "preset must be one of"),
        (["--rates", "H100"], "rates look like H100:700:3.0"),
        (["--rates", "H100:700:0"], "rates must be positive"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err
