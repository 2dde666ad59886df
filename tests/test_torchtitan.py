"""The parts for torchtitan against the reference in fp64, on a CPU, where torchtitan's Trainer does not run."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
from oracle import relative_error

from patchkernels import next_patch_targets, reference

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import config_registry as deepseek_configurations
from torchtitan.models.llama3 import config_registry as llama_configurations
from torchtitan.models.qwen3 import config_registry as qwen_configurations

from patchkernels import torchtitan as titan

MODELS = {
    "llama3": llama_configurations.llama3_debugmodel,
    "qwen3": qwen_configurations.qwen3_debugmodel,
    "qwen3_moe": qwen_configurations.qwen3_moe_debug,
    "deepseek_v3": deepseek_configurations.deepseek_v3_debugmodel,
}


def configuration(name):
    """The model with two layers, and with attention that has a backward on a CPU."""
    config = MODELS[name]()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return config


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_patches(name, size):
    config = titan.with_patches(configuration(name))
    torch.manual_seed(0)
    dense = name in ("llama3", "qwen3")  # rotary tables of complex numbers, and routers, stay in fp32
    own, model = (c.model_spec.model.build() for c in (configuration(name), config))
    own, model = (own.double(), model.double()) if dense else (own, model)
    exactness = 1 if dense else 10
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.load_state_dict(own.state_dict())
    assert list(model.state_dict()) == list(own.state_dict())
    rows = torch.randint(0, 2000, (2 * size, 17))
    stream = [({"input": part[:, :-1]}, part[:, 1:]) for part in rows.chunk(size)]
    batch, labels = titan.patch_batch(stream)
    positions = batch.get("positions")
    if size == 1:
        assert batch is stream[0][0] and labels is stream[0][1]
    loss_fn = config.loss.loss_fn.build()
    loss, _ = loss_fn(model(batch["input"], positions=positions), labels, (labels != -100).sum())
    loss.backward()
    # the expected loss: K rows laid end to end, each label being the next id of its own row
    ids = torch.cat([part for _, part in stream]) if size == 1 else rows[:, :-1].reshape(2, -1)
    if size == 1:
        logits = own(rows[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    else:
        following = rows[:, 1:].reshape(2, -1)
        unshifted = torch.cat([torch.full((2, 1), -100), following[:, :-1]], 1)
        embedding = own.tok_embeddings
        own.tok_embeddings = torch.nn.Identity()  # torchtitan's own embedding is averaged outside of the model
        means = embedding(ids).unflatten(1, (-1, size)).mean(2)
        logits = own(means, positions=positions)
        expected = reference.patch_cross_entropy(logits, next_patch_targets(unshifted, size))
    expected.backward()
    assert relative_error(loss, expected) < 1e-6 * exactness  # torchtitan's token-level loss is in fp32
    ours = dict(model.named_parameters())
    total = torch.stack([p.grad.norm() for p in own.parameters() if p.grad is not None]).norm()
    for key, parameter in own.named_parameters():
        if parameter.grad is None:  # an expert that no position was routed to
            assert ours[key].grad is None
            continue
        key = key if key in ours else "tok_embeddings.weight"  # tied
        error = float((ours[key].grad - parameter.grad).norm())
        # in fp32 relative to all gradients, since those of experts are small differences
        assert error <= 1e-5 * float(parameter.grad.norm() if dense else total), key
    if size > 1:
        assert relative_error(model.tok_embeddings.weight.grad, embedding.weight.grad) < (1e-9 if dense else 1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_mixtures_of_experts_keep_all_but_the_embedding_and_the_loss(name):
    own, config = configuration(name), titan.with_patches(configuration(name))
    assert type(config) is titan.TitanPatchTrainer.Config
    with torch.device("meta"):
        model = config.model_spec.model.build()
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, own.model_spec.model.build())]
        assert shapes[0] == shapes[1]
    assert type(model.tok_embeddings) is titan.TitanPatchEmbedding
    for field in ("training", "optimizer", "lr_scheduler", "parallelism", "checkpoint", "dataloader"):
        assert getattr(config, field) == getattr(own, field)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_loss_in_chunks(size, chunks):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 8, 16), torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (2, 8, size))
    labels[0, 3:5] = -100
    target = labels.squeeze(-1) if size == 1 else labels
    config = titan.with_patch_loss(ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=CrossEntropyLoss.Config()))
    wrapper = config.build()
    wrapper.set_lm_head(head)
    leaf = hidden.clone().requires_grad_()
    x = leaf * 1.0
    loss, _ = wrapper(x, target, (labels != -100).sum())
    loss.backward()
    found = [loss.detach(), leaf.grad, head.weight.grad.clone()]
    head.weight.grad = None
    leaf = hidden.clone().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    expected = reference.patch_cross_entropy(leaf @ weight.T, labels)
    expected.backward()
    for a, b in zip(found, (expected.detach(), leaf.grad, weight.grad)):
        assert relative_error(a, b) < 1e-6
    with torch.no_grad():
        loss, _ = wrapper(hidden, target, (labels != -100).sum())
    assert relative_error(loss, expected) < 1e-6


def test_batches_of_each_phase_also_from_the_middle(monkeypatch):
    rows = [({"input": torch.full((2, 4), i), "positions": torch.arange(4)}, torch.full((2, 4), i)) for i in range(40)]
    monkeypatch.setattr(titan.Trainer, "batch_generator", lambda self, data: iter(data))

    class Config:
        class training:
            steps = 6

    def shapes(first, data):
        trainer = object.__new__(titan.TitanPatchTrainer)
        trainer.config, trainer.patch_phases = Config, titan.parse_phases("4:1/3,2:1/3,1:1/3")
        trainer.step = first
        generator, found = trainer.batch_generator(data), []
        for trainer.step in range(first, 7):
            batch, labels = next(generator)
            found.append((tuple(batch["input"].shape), tuple(labels.shape), int(batch["input"].flatten()[0])))
        return found

    whole = shapes(1, rows)
    assert [entry[0] for entry in whole] == [(2, 4, 4)] * 2 + [(2, 4, 2)] * 2 + [(2, 4)] * 2
    assert [entry[2] for entry in whole] == [0, 4, 8, 10, 12, 13]
    for first, read in ((2, 4), (3, 8), (5, 12)):  # the dataloader continues where it was
        assert shapes(first, rows[read:]) == whole[first - 1 :]


def test_bad_input():
    with pytest.raises(ValueError, match="every phase needs a step: 2 steps"):
        titan.phase_ends(titan.parse_phases("8:1/10,1:9/10"), 2)
    with pytest.raises(ValueError, match=r"CrossEntropyLoss, got TitanPatchCrossEntropy\.Config"):
        titan.with_patch_loss(titan.TitanPatchCrossEntropy.Config())


def test_versions_that_are_not_known_are_refused(monkeypatch):
    spec = importlib.util.spec_from_file_location("again", titan.__file__)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(ImportError, match=r"knows torchtitan 0\.3\.0, found 0\.9\.9"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
