"""Short runs of a PatchTrainer, and the same runs as plain loops, one document after the other, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkernels import next_patch_targets

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from patchkernels.hf import PatchRows, PatchTrainer  # noqa: E402

VOCAB, TOKENS = 64, 16
CONSTANT_RATE = {"lr_scheduler_type": "constant", "warmup_steps": 0}
CONSTANT_TOKENS = {"convention": "tokens", "phases": [(4, 1 / 2), (1, 1 / 2)]}
Document = tuple[Tensor, Tensor]  # token ids and labels (T)


def tiny(**settings):
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 24, "max_position_embeddings": 64, **settings}  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def varied():
    """A tiny model with weights so large that its loss depends on what it computes; that of a fresh one is log V."""
    return tiny(initializer_range=0.5)


def examples(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (TOKENS,), generator=generator)} for _ in range(count)]


def arguments(folder, **changes):
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
                "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 12, "save_strategy": "no",
                "lr_scheduler_type": "linear", "warmup_steps": 2, "seed": 5}  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **changes})


def train(
    folder, resume=None, model=None, dataset=None, collator=None, evaluation=None, trainer=PatchTrainer, **changes
):
    names = ("phases", "shares_of", "convention", "optimizer_at_switch", "lr_scope", "reduction")
    phases = {name: changes.pop(name) for name in names if name in changes}
    run = trainer(
        model=model or tiny(), args=arguments(folder, **changes), train_dataset=dataset or examples(),
        eval_dataset=evaluation, data_collator=collator, **phases,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return run


def logged(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry and "loss" in entry]


def with_few_targets():
    """Examples of which a third has targets in both phases, a third only in the phase of tokens, and a third none."""
    return [{"input_ids": e["input_ids"][: (16, 3, 1)[i % 3]]} for i, e in enumerate(examples())]


def tokenizer(**settings):
    """A tokenizer of the words t0 to t63. Its token of padding is that of the end of a text, t2."""
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "t0", "pad_token": "t2", "eos_token": "t2", **settings}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)


def one_document(row: dict[str, Any]) -> Iterator[Document]:
    """A row as a single document, in which the examples follow each other."""
    yield row["input_ids"], row.get("labels", row["input_ids"])


def summed_loss(model: Any, ids: Tensor, labels: Tensor, patch_size: int) -> tuple[Tensor, int]:
    """The sum of the losses of a document's targets, and how many these are. A last patch may have fewer tokens."""
    missing = -len(ids) % patch_size
    ids, labels = F.pad(ids, (0, missing), value=1), F.pad(labels, (0, missing), value=-100)
    means = model.get_input_embeddings()(ids).unflatten(0, (-1, patch_size)).mean(1)
    logits = model(inputs_embeds=means[None]).logits[0].float()
    target = next_patch_targets(labels, patch_size)
    loss = F.cross_entropy(logits.repeat_interleave(patch_size, 0), target.flatten(), reduction="sum")
    return loss, int((target != -100).sum())


def train_by_hand(
    trainer: Any, model: Any, documents: Callable[[dict[str, Any]], Iterator[Document]] = one_document
) -> list[float]:
    """Trains ``model`` on the rows of ``trainer``'s run and returns the loss of every step, 0 where it has no target.

    The learning rate is constant, and the optimizer keeps its state where a phase begins.
    """
    args, schedule, losses = trainer.args, trainer.schedule, []
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]  # as in transformers
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=args.weight_decay)
    rows = PatchRows(trainer.train_dataset, schedule, args.seed, shuffle=True)
    for step in range(schedule.total_steps):
        phase, _ = schedule.locate(step)
        total, count = sum(0 * parameter.sum() for parameter in model.parameters()), 0
        for number in range(step * schedule.batch_size, (step + 1) * schedule.batch_size):
            for ids, labels in documents(rows[number]):
                loss, targets = summed_loss(model, ids, labels, schedule.phases[phase].patch_size)
                total, count = total + loss, count + targets
        mean = total / max(count, 1)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses
