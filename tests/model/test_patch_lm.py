"""PatchLM against the paper's model, and against itself: causal, packed, compiled, checkpointed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.model import patch_lm as model_module
from patchkernels.model.attention import document_edges
from patchkernels.model.config import PRESETS
from patchkernels.numerics import IGNORE_INDEX

transformers = pytest.importorskip("transformers")

SMALL = PatchLMConfig(67, 32, 48, 2, 4, num_key_value_heads=2, max_position_embeddings=64, attention="sdpa")


def build(**changes) -> PatchLM:
    torch.manual_seed(0)
    model = PatchLM(PatchLMConfig(**{**vars(SMALL), **changes})).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def reference_llama(model: PatchLM, tmp_path):
    """transformers' LLaMA with the same weights. Its RMSNorm, which would cast to fp32, is replaced by one in fp64."""
    model.save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    reference.config._attn_implementation = "sdpa"

    def norm(self, x):
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.variance_epsilon)

    for module in reference.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)
    return reference


def patch_train_loss(reference, ids, labels, patch_size):
    """PatchTrain's loss: one log-softmax, then the mean over slots of ``nll_loss``, a mean over valid rows."""
    embedded = reference.get_input_embeddings()(ids).unflatten(1, (-1, patch_size)).mean(2)
    logits = reference(inputs_embeds=embedded).logits
    log_p = F.log_softmax(logits[:, :-1].flatten(0, 1), -1)
    target = labels[:, patch_size:].reshape(-1, patch_size)
    return sum(F.nll_loss(log_p, target[:, k]) for k in range(patch_size)) / patch_size


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients_of_the_papers_reference_model(tmp_path, patch_size, ignored):
    model = build()
    reference = reference_llama(model, tmp_path)
    ids = torch.randint(0, 67, (3, 32))
    labels = ids.clone()
    if ignored:
        labels[torch.rand(3, 32) < 0.3] = IGNORE_INDEX
    loss = model(ids, labels, patch_size, reduction="slot_mean")
    expected = patch_train_loss(reference, ids, labels, patch_size)
    loss.backward(), expected.backward()
    assert relative_error(loss, expected) < 1e-6
    reference_parameters = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, reference_parameters[name].grad) < 1e-6, name


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_repeated_tokens_give_the_token_level_loss(patch_size):
    """If every token is repeated K times, a patch's mean is its token's embedding, and its K targets are equal."""
    model = build()
    ids = torch.randint(0, 67, (2, 8))
    repeated = ids.repeat_interleave(patch_size, 1)
    torch.testing.assert_close(model(repeated, repeated, patch_size), model(ids, ids))


@pytest.mark.parametrize("patch_size", [1, 4])
def test_loss_at_initialisation_is_log_of_the_vocabulary(patch_size):
    model = PatchLM(PatchLMConfig.preset("demo"))
    ids = torch.randint(0, 4096, (2, 64))
    assert abs(model(ids, ids, patch_size).item() - math.log(4096)) < 0.1


@pytest.mark.parametrize("patch_size", [1, 2])
def test_causal(patch_size):
    model, ids = build(), torch.randint(0, 67, (1, 16))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 67
    before, after = model(ids, patch_size=patch_size), model(changed, patch_size=patch_size)
    torch.testing.assert_close(before[:, : 8 // patch_size], after[:, : 8 // patch_size])
    assert not torch.allclose(before[:, 8 // patch_size :], after[:, 8 // patch_size :])


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_packed_documents_are_as_if_alone(patch_size):
    model, ids = build(), torch.randint(0, 67, (2, 24))
    documents = torch.tensor([[0] * 8 + [1] * 16, [3] * 20 + [7] * 4])
    packed = model(ids, patch_size=patch_size, document_ids=documents)
    losses = model(ids, ids, patch_size, reduction="none", document_ids=documents)
    for row, spans in enumerate([[(0, 8), (8, 24)], [(0, 20), (20, 24)]]):
        for begin, end in spans:
            alone = ids[row : row + 1, begin:end]
            place = slice(begin // patch_size, end // patch_size)
            torch.testing.assert_close(packed[row : row + 1, place], model(alone, patch_size=patch_size))
            expected = model(alone, alone, patch_size, reduction="none")
            torch.testing.assert_close(losses[row : row + 1, place], expected)


def test_an_id_that_comes_again_is_another_document():
    model, ids = build(), torch.randint(0, 67, (1, 24))
    again, others = (torch.tensor([[0] * 8 + [1] * 8 + [last] * 8]) for last in (0, 2))
    assert torch.equal(model(ids, document_ids=again), model(ids, document_ids=others))


@pytest.mark.parametrize("settings", [{"qk_norm": True}, {"tie_word_embeddings": True}, {"head_dim": 12}])
def test_variants_train(settings):
    model, ids = build(**settings), torch.randint(0, 67, (2, 16))
    model(ids, ids, 4).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_activation_checkpointing_changes_no_gradient():
    ids = torch.randint(0, 67, (2, 16))
    plain, checkpointed = build(), build(activation_checkpointing=True)
    for model in (plain, checkpointed):
        model(ids, ids, 2).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_compiles_and_a_phase_switch_costs_one_recompile(options):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)
    for patch_size, count in ((4, 1), (4, 1), (1, 2), (1, 2)):
        ids = torch.randint(0, 67, (2, 16 * patch_size))
        torch.testing.assert_close(compiled(ids, ids, patch_size), model(ids, ids, patch_size))
        assert counter.frame_count == count


def test_a_copy_of_a_compiled_model_has_its_own_layers(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend="eager", **options))
    model_module.compiled_layers.cache_clear()
    model, ids = build(), torch.randint(0, 67, (1, 8))
    expected = model(ids, ids)
    model.compile_layers()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(model(ids, ids), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    loss = copied(ids, ids)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    model_module.compiled_layers.cache_clear()


def test_attention_runs_in_autocasts_dtype(monkeypatch):
    seen = []
    original = model_module.attention
    monkeypatch.setattr(
        model_module,
        "attention",
        lambda q, k, v, **o: seen.append({q.dtype, k.dtype, v.dtype}) or original(q, k, v, **o),
    )
    with torch.autocast("cpu", torch.bfloat16):
        build(qk_norm=True).float()(torch.zeros(1, 4, dtype=torch.long))
    assert seen == [{torch.bfloat16}] * 2


def test_the_residual_stream_has_autocasts_dtype():
    model, seen = build(qk_norm=True).float(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
    model(ids, ids)
    assert loss.dtype == torch.float32
    assert seen == [(torch.bfloat16,) * 2] * 2 + [(torch.float32,) * 2] * 2


PACKED = torch.tensor([[0] * 8 + [1] * 16, [3] * 20 + [7] * 4])


def loss_and_gradients(
    model: torch.nn.Module, ids: torch.Tensor, documents: torch.Tensor = PACKED
) -> list[torch.Tensor]:
    """The loss of packed documents, and the gradients of all parameters. Parameters in fp32 are used in bf16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
        loss = model(ids, ids, 2, document_ids=documents)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_as_exact(ours, plain, exact) -> None:
    for value, plain_value, exact_value in zip(ours, plain, exact, strict=True):
        bound = max(2 * relative_error(plain_value, exact_value), 2 * torch.finfo(torch.bfloat16).eps)
        assert relative_error(value, exact_value) < bound


@pytest.mark.parametrize(
    ("name", "options"),
    [("flash2", {}), ("flash3", {"qk_norm": True, "head_dim": 16}), ("flash4", {"activation_checkpointing": True})],
)
def test_flash_attention_is_as_exact_as_pytorchs(cpu_as_gpu, name, options):
    """For packed documents. The measure is the error against fp64, in the loss and in every gradient."""
    cpu_as_gpu(9, name)
    ids = torch.randint(0, 67, (2, 24))
    ours = loss_and_gradients(build(**options, attention=name).float(), ids)
    plain = loss_and_gradients(build(**options).float(), ids)
    assert_as_exact(ours, plain, loss_and_gradients(build(**options), ids))


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_compiled_steps_of_packed_documents_share_graphs(cpu_as_gpu, name):
    """Also if the number of documents changes: here four, then three."""
    from torch._dynamo.testing import CompileCounterWithBackend

    cpu_as_gpu(9, name)
    counter = CompileCounterWithBackend("aot_eager")
    options = {"activation_checkpointing": True, "num_hidden_layers": 1}
    exact, model = build(**options), build(**options, attention=name).float()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    ids, graphs = torch.randint(0, 67, (2, 24)), []
    for documents in (PACKED, PACKED // 2):
        ours, eager, in_fp64 = (loss_and_gradients(m, ids, documents) for m in (compiled, model, exact))
        assert_as_exact(ours, eager, in_fp64)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


def test_packed_documents_are_one_graph_with_pytorchs_attention():
    model, ids = build().float(), torch.randint(0, 67, (2, 24))
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(model, fullgraph=True, backend="eager")(ids, ids, document_ids=PACKED)
        torch.testing.assert_close(loss, model(ids, ids, document_ids=PACKED))


class Synchronisations(TorchDispatchMode):
    """Counts the operators for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero, torch.ops.aten.equal
        )  # fmt: skip
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 3])
def test_packed_documents_synchronise_once_a_step_with_flash_attention(cpu_as_gpu, layers):
    """On a CPU ids are checked as well, which costs more synchronisations, but no more with FlashAttention."""
    cpu_as_gpu(9, "flash2")
    counts = []
    for name in ("sdpa", "flash2"):
        model = build(num_hidden_layers=layers, attention=name, activation_checkpointing=True).float()
        with Synchronisations() as counted:
            loss_and_gradients(model, torch.randint(0, 67, (2, 24)))
        counts.append(counted.count)
    assert counts[1] == counts[0] + 1


def test_a_step_of_packed_documents_never_waits_for_the_gpu():
    """With PyTorch's attention. Tensors on ``meta`` have no values: whatever would read one raises an error."""
    with torch.device("meta"):
        ids = torch.zeros(2, 24, dtype=torch.long)
        PatchLM(SMALL)(ids, ids, 2, document_ids=ids).backward()
    with pytest.raises(RuntimeError, match="meta"):
        document_edges(ids)


def test_the_mask_of_packed_documents_is_made_once_a_step(monkeypatch):
    masks = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **o: masks.append(o["attn_mask"]) or original(*a, **o)
    )
    build()(torch.zeros(2, 24, dtype=torch.long), document_ids=PACKED)
    assert len(masks) == 2
    assert masks[0] is masks[1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    with torch.device("meta"):
        model = PatchLM(PatchLMConfig.preset(name))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = {
        "0.4m": (0.41, 0.42), "demo": (1, 2), "42m": (40, 45), "124m": (120, 130), "370m": (350, 400),
        "780m": (740, 820), "1.3b": (1250, 1400), "2.7b": (2600, 2800), "8b": (8030, 8031), "70b": (70553, 70554),
    }[name]  # fmt: skip
    assert low < millions < high


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a positive integer, got 1.5"),
        ({"num_attention_heads": 5}, "divide hidden_size, got 5 and 32"),
        ({"num_key_value_heads": 3}, "divide num_attention_heads, got 3 and 4"),
        ({"head_dim": 7}, "even.*got 7"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"attention": "magic"}, "'magic'"),
    ],
)
def test_nonsense_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        PatchLMConfig(**{**vars(SMALL), **changes})


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"370m.*got '9b'"):
        PatchLMConfig.preset("9b")


IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"\(B, T\), got \(8,\)"),
        ({"patch_size": 3}, ValueError, "got 8 and 3"),
        ({"patch_size": 0}, ValueError, "got 8 and 0"),
        ({"labels": IDS[:, :4]}, ValueError, r"labels must have.*\(2, 4\)"),
        ({"input_ids": IDS.repeat(1, 9)}, ValueError, "72 positions"),
        ({"input_ids": IDS + 67}, IndexError, r"\[0, 67\), got 67"),
        ({"labels": IDS + 67}, IndexError, r"\[0, 67\)"),
        ({"document_ids": IDS.cumsum(1) + torch.arange(8), "patch_size": 2}, ValueError, "patch boundary"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        build()(**{"input_ids": IDS, **arguments})
