"""A user's model with our modules on several processes: every grouping of FSDP2, DDP and tensor parallel."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run
from oracle import relative_error
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from patchkernels import PatchEmbedding, PatchLMHead, next_patch_targets
from patchkernels.training.processes import full_tensor

VOCAB, HIDDEN = 37, 8


class Small(torch.nn.Module):
    """A user's model that contains our two modules."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(VOCAB, HIDDEN, 4)
        self.block = torch.nn.Linear(HIDDEN, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = PatchLMHead(HIDDEN, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, target):
        return self.head(self.norm(self.block(self.embedding(ids)).tanh()), target)


def group(model, name, embedding, block, norm, head, **policy):
    """Groups modules into FSDP units in the way called ``name``. All other modules belong to the root unit."""
    if name == "own units":
        for unit in (embedding, head, block):
            fully_shard(unit, **policy)
    elif name == "norm and head":
        fully_shard(embedding, **policy)
        fully_shard([norm, head], **policy)
    elif name == "tied unit":
        fully_shard([embedding, norm, head], **policy)
    fully_shard(model, **policy)


def gradients_of_one(model, step, batches):
    for batch in batches:
        (step(model, batch) / len(batches)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def largest_error(found, expected) -> float:
    """The largest relative error of all gradients; NaN if one of them holds NaN."""
    return max_of([relative_error(full_tensor(a), b) for a, b in zip(found, expected, strict=True)])


def max_of(errors) -> float:
    """The maximum. Unlike with Python's ``max`` it is NaN if one value is, so that every comparison fails."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def small_step(model, ids):
    return model(ids, next_patch_targets(ids, 4))


def hugging_face_step(model, ids):
    return model(input_ids=ids, labels=ids).loss


def check_groupings(folder):
    from patchkernels import hf

    batches = [torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    errors = {}
    for kind in ("small", "llama"):
        for tied in (False, True):
            torch.manual_seed(0)
            if kind == "small":
                model, step = Small(tied), small_step
            else:
                import transformers

                config = transformers.LlamaConfig(
                    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=12, tie_word_embeddings=tied, use_cache=False,
                )  # fmt: skip
                model, step = hf.enable(transformers.LlamaForCausalLM(config), 4), hugging_face_step
            expected = gradients_of_one(model, step, batches)
            for name in ("ddp", "root", "tied unit", *([] if tied else ["own units", "norm and head"])):
                ours = copy.deepcopy(model)
                inner = ours if kind == "small" else ours.model
                parts = (inner.embedding, inner.block, inner.norm, inner.head) if kind == "small" else (
                    inner.embed_tokens, inner.layers[0], inner.norm, ours.lm_head)  # fmt: skip
                if name == "ddp":
                    ours = DistributedDataParallel(ours)
                else:
                    group(ours, name, *parts)
                for _ in range(2):  # in the second step the units have been resharded
                    ours.zero_grad()
                    step(ours, batches[dist.get_rank()]).backward()
                found = [parameter.grad for parameter in ours.parameters()]
                errors[kind, tied, name] = largest_error(found, expected.values())
                if name == "own units":
                    check_checkpoint(ours, model, Path(folder) / kind)
    return errors


def check_checkpoint(ours, model, folder):
    """One process loads the weights and the optimizer that two processes saved with DCP."""
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    optimizer.step()
    weights, moments = get_state_dict(ours, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    expected = {name: full_tensor(p.detach()) for name, p in ours.named_parameters()}
    if dist.get_rank() == 0:
        alone = copy.deepcopy(model)
        other = torch.optim.AdamW(alone.parameters(), lr=0.1)
        weights, moments = get_state_dict(alone, other)
        state = {"model": weights, "optimizer": moments}
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
        set_state_dict(alone, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            assert other.state[parameter]["step"] == 1


def test_groupings_of_fsdp2_ddp_and_dcp(tmp_path):
    pytest.importorskip("transformers")
    for errors in run(check_groupings, 2, str(tmp_path)):
        assert len(errors) == 16
        assert max_of(errors.values()) < 2e-6, errors


def check_mixed_precision():
    """bf16 parameters under FSDP2: the loss stays in fp32, and a count is not rounded to bf16."""
    import transformers

    from patchkernels import hf

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model = hf.enable(transformers.LlamaForCausalLM(config), 4)
    ids = torch.randint(3, VOCAB, (3, 16))
    expected = model(input_ids=ids, labels=ids).loss
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    group(model, "norm and head", model.model.embed_tokens, None, model.model.norm, model.lm_head, mp_policy=policy)
    loss = model(input_ids=ids, labels=ids).loss
    counted = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4093)).loss
    torch.testing.assert_close(counted, loss * (3 * 3 * 4) / 4093)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_mixed_precision():
    pytest.importorskip("transformers")
    run(check_mixed_precision, 2)


def check_fsdp2_with_tensor_parallel():
    import transformers

    from patchkernels import hf

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model = hf.enable(transformers.LlamaForCausalLM(config).double(), 4)
    batches = [torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = gradients_of_one(model, hugging_face_step, batches)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replicated = Replicate()
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=replicated),
        "model.layers.0.mlp.gate_proj": ColwiseParallel(),
        "model.layers.0.mlp.up_proj": ColwiseParallel(),
        "model.layers.0.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=replicated),
    }
    parallelize_module(model, mesh["tp"], plan)
    for unit in (model.model.layers[0], model.lm_head, model):
        fully_shard(unit, mesh=mesh["dp"])
    hugging_face_step(model, batches[mesh["dp"].get_local_rank()]).backward()
    return largest_error([parameter.grad for parameter in model.parameters()], expected.values())


def test_fsdp2_with_tensor_parallel():
    pytest.importorskip("transformers")
    assert max_of(run(check_fsdp2_with_tensor_parallel, 4)) < 1e-6
