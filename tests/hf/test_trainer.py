"""A Trainer run in phases does what a loop written by hand does, also if it is stopped and resumed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import distributed
import pytest
import torch

from patchkernels import hf, next_patch_targets

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from trainer_runs import (  # noqa: E402
    CONSTANT_TOKENS,
    arguments,
    examples,
    logged,
    tiny,
    train,
    with_few_targets,
)

from patchkernels.hf import PatchCollator, PatchRows, PatchTrainer, PatchTraining  # noqa: E402
from patchkernels.hf.trainer_checks import check_supported  # noqa: E402


@pytest.mark.parametrize("lr_scope", ["run", "phase"])
@pytest.mark.parametrize("at_switch", ["carry", "reset"])
def test_a_loop_written_by_hand(tmp_path, lr_scope, at_switch):
    run = train(tmp_path, optimizer_at_switch=at_switch, lr_scope=lr_scope)
    starts, total = [0, 4, 12], 12  # 2/3 of the examples at K = 4 and 1/3 at K = 1: 4 steps and 8
    assert run.schedule.steps == [4, 8]
    model = tiny()
    rows = PatchRows(examples(), run.schedule, seed=5, shuffle=True)
    used = [rows.index(number) for number in range(4 * 16 + 8 * 4)]
    assert sorted(used[:48]) == sorted(used[48:]) == list(range(48))

    def new():
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999))

    optimizer, losses, examples_read = new(), [], 0
    for step in range(total):
        phase = int(step >= 4)
        size = (4, 1)[phase]
        if step == 4 and at_switch == "reset":
            optimizer = new()
        begin, end = (0, total) if lr_scope == "run" else (starts[phase], starts[phase + 1])
        done, length = step - begin, end - begin
        factor = done / 2 if done < 2 else (length - done) / (length - 2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        ids = []
        for _ in range(4):
            ids.append(torch.cat([examples()[i]["input_ids"] for i in used[examples_read : examples_read + size]]))
            examples_read += size
        ids = torch.stack(ids)
        means = model.model.embed_tokens(ids).unflatten(1, (-1, size)).mean(2)
        logits = model(inputs_embeds=means).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].repeat_interleave(size, 1).flatten(0, 1), next_patch_targets(ids, size)[:, :-1].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(logged(run), losses, rtol=1e-4, atol=0)
    assert logged(run, "phase") == [1] * 4 + [2] * 8
    assert logged(run, "patch_size") == [4] * 4 + [1] * 8
    slots = [sum(entry[f"slot_loss_{k}"] for k in range(1, 5)) / 4 for entry in run.state.log_history[:4]]
    torch.testing.assert_close(slots, losses[:4], rtol=1e-4, atol=0)
    assert all(value > 0 for value in logged(run, "raw_tokens_per_second"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [
        "checkpoint-4"
    ]  # written at the switch, though save_strategy is "no"


@pytest.mark.parametrize("settings", [{}, {"optimizer_at_switch": "reset", "lr_scope": "phase", "weight_decay": 0.1}])
def test_resumed_before_at_and_after_the_switch(tmp_path, settings):
    settings |= {"phases": "4:1/2,2:1/4,1:1/4", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model = {"attention_dropout": 0.1}
    whole = train(tmp_path, model=tiny(**model), save_strategy="steps", save_steps=1, **settings)
    switches = whole.schedule.starts[1:]
    for step in (switches[0] - 1, switches[0], switches[0] + 1, switches[1]):
        again = train(tmp_path / "again", str(tmp_path / f"checkpoint-{step}"), tiny(**model), **settings)
        assert logged(again) == logged(whole)
        for a, b in zip(again.model.parameters(), whole.model.parameters()):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of another schedule"):
        train(tmp_path / "again", str(tmp_path / "checkpoint-1"), phases="1:1")


def test_accumulation_changes_nothing(tmp_path):
    ragged = [{"input_ids": e["input_ids"][: 3 + i % 13]} for i, e in enumerate(examples())]
    expected = logged(train(tmp_path, dataset=ragged, per_device_train_batch_size=4))
    found = logged(train(tmp_path, dataset=ragged, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def train_as_one_of_two(folder, resume):
    ragged = [{"input_ids": e["input_ids"][: 3 + i % 13]} for i, e in enumerate(examples())]
    run = train(folder, resume, dataset=ragged, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    slots = [entry.get("slot_loss_2") for entry in run.state.log_history]
    return logged(run), slots, None if resume else few_targets_as_one_of_two(folder)


def few_targets_as_one_of_two(folder):
    settings = {"dataset": with_few_targets(), "per_device_train_batch_size": 1, **CONSTANT_TOKENS}
    own_means = train(folder / "own", average_tokens_across_devices=False, **settings)
    assert all(math.isfinite(loss) for loss in logged(own_means))
    return logged(train(folder / "few", **settings))


def test_two_processes(tmp_path):
    ragged = [{"input_ids": e["input_ids"][: 3 + i % 13]} for i, e in enumerate(examples())]
    alone = train(tmp_path / "one", dataset=ragged)
    slots = [entry.get("slot_loss_2") for entry in alone.state.log_history]
    few = train(tmp_path / "few", dataset=with_few_targets(), per_device_train_batch_size=2, **CONSTANT_TOKENS)
    for losses, slots_of_two, losses_of_few in distributed.run(train_as_one_of_two, 2, tmp_path / "two", None):
        torch.testing.assert_close(losses, logged(alone), rtol=1e-4, atol=0)
        torch.testing.assert_close(slots_of_two[:4], slots[:4], rtol=1e-4, atol=0)
        torch.testing.assert_close(losses_of_few, logged(few), rtol=1e-4, atol=0)
    if transformers.__version__.startswith("5.0."):
        return  # this version does not resume in several processes without GPUs: it looks for "cpu:0"
    for again, *_ in distributed.run(train_as_one_of_two, 2, tmp_path / "two", str(tmp_path / "two" / "checkpoint-4")):
        assert again == losses


def test_evaluation_is_token_level_in_every_phase(tmp_path):
    held_out = examples(6, seed=1)
    run = train(tmp_path, evaluation=held_out, eval_strategy="steps", eval_steps=1, learning_rate=0.0, weight_decay=0.0)
    ids = torch.stack([example["input_ids"] for example in held_out])
    expected = tiny()(input_ids=ids, labels=ids).loss.item()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(found) == 12
    torch.testing.assert_close(found, [expected] * 12, rtol=1e-5, atol=0)


def test_epochs_are_those_of_the_examples(tmp_path):
    run = train(tmp_path, dataset=examples(24), max_steps=-1, num_train_epochs=2, eval_strategy="epoch",
                save_strategy="epoch", evaluation=examples(4))  # fmt: skip
    # 48 examples in all: 32 in 2 steps of 16, 16 in 4 steps of 4
    assert run.schedule.steps == [2, 4]
    assert run.state.global_step == 6
    evaluated = [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluated == [2, 6]
    assert logged(run, "epoch")[0] == pytest.approx(16 / 24)
    assert logged(run, "epoch")[-1] == 2


def test_constant_tokens_a_step(tmp_path):
    run = train(tmp_path, convention="tokens", phases="4:1/2,1:1/2")
    assert run.schedule.steps == [6, 6]
    rows = PatchRows(examples(), run.schedule, 0, False)
    assert [(len(rows[i]["input_ids"]), rows[i]["patch_size"]) for i in (0, 23, 24, 47)] == [(16, 4)] * 2 + [
        (16, 1)
    ] * 2


def test_a_stream(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples())

    class InOrder(PatchTrainer):  # transformers 5.0 has no argument for it
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            loader.dataset.shuffle = False
            return loader

    expected = logged(train(tmp_path, trainer=InOrder))
    assert logged(train(tmp_path, dataset=Stream())) == expected
    resumed = train(tmp_path, str(tmp_path / "checkpoint-4"), dataset=Stream())
    assert logged(resumed) == expected


def test_label_smoothing_and_a_custom_collator(tmp_path):
    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.where(ids % 2 == 0, -100)}

    run = train(tmp_path, collator=collate, label_smoothing_factor=0.2, max_steps=3, learning_rate=0.0)
    rows = PatchRows(examples(), run.schedule, 5, True)
    model, found = tiny(), []
    for step in range(3):
        size = run.schedule.phases[run.schedule.locate(step)[0]].patch_size
        batch = PatchCollator(collate)([rows[i] for i in range(step * 4, step * 4 + 4)])
        means = model.model.embed_tokens(batch["input_ids"]).unflatten(1, (-1, size)).mean(2)
        logits = model(inputs_embeds=means).logits.repeat_interleave(size, 1).flatten(0, 1)
        targets = next_patch_targets(batch["labels"], size).flatten()
        found.append(torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2).item())
    torch.testing.assert_close(logged(run), found, rtol=1e-4, atol=0)


def test_mixed_into_a_custom_trainer(tmp_path):
    class Counting(transformers.Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class PatchCounting(PatchTraining, Counting):
        pass

    class OwnInputs(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    class PatchOwnInputs(PatchTraining, OwnInputs):
        pass

    with pytest.raises(TypeError, match="compute_loss of PatchOwnInputs must call the model with all of its inputs"):
        train(tmp_path, trainer=PatchOwnInputs)

    class OwnLoss(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).logits[:, -1].mean()

    class PatchOwnLoss(PatchTraining, OwnLoss):
        pass

    with pytest.raises(TypeError, match="compute_loss of PatchOwnLoss needs logits, which no patch step has"):
        train(tmp_path, trainer=PatchOwnLoss)

    run = train(tmp_path, trainer=PatchCounting, model=None)
    assert run.steps == 12
    assert logged(run) == logged(train(tmp_path))
    made = PatchCounting(model_init=lambda: tiny(), args=arguments(tmp_path), train_dataset=examples())
    made.train()
    assert logged(made) == logged(run)
    smoothed = arguments(tmp_path, label_smoothing_factor=0.2)
    made = PatchCounting(model_init=lambda: tiny(), args=smoothed, train_dataset=examples())
    made.train()
    assert logged(made) == logged(train(tmp_path, label_smoothing_factor=0.2)) != logged(run)


def test_the_model_that_comes_out_is_an_ordinary_one(tmp_path):
    run = train(tmp_path / "run")
    run.save_model(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again) is transformers.LlamaForCausalLM
    ids = examples()[0]["input_ids"][None]
    torch.testing.assert_close(again(ids).logits, run.model(ids).logits)
    assert type(hf.disable(run.model)) is transformers.LlamaForCausalLM


def test_bad_input(tmp_path):
    old = "group_by_length" in transformers.TrainingArguments.__dataclass_fields__  # transformers 5.0
    ragged_ids = [{"input_ids": list(range(3 + i % 5))} for i in range(48)]

    def pads_left(rows):
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, padding_side="left")
        return {"input_ids": mask, "labels": mask, "attention_mask": mask}

    by_length = {"group_by_length": True} if old else {"train_sampling_strategy": "group_by_length"}
    for settings, message in (
        ({"convention": "rows"}, "'rows'"),
        ({"optimizer_at_switch": "keep"}, "'keep'"),
        ({"lr_scope": "all"}, "'all'"),
        ({"phases": "4"}, "'4'"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        (by_length, "got 'group_by_length'"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"dataset": iter([]), "max_steps": -1}, "max_steps has to be specified"),
        ({"dataset": iter([]), "dataloader_num_workers": 2}, "dataloader_num_workers=2"),
        ({"max_steps": 2, "phases": "8:1/2,1:1/2"}, "14 examples at 4 rows a step leave a phase"),
        ({"dataset": [{"text": "a"}] * 48}, r"must hold input_ids, got \['text'\]"),
        ({"dataset": [{"input_ids": [1.5, 2.0]}] * 48}, "input_ids must be integers, got torch.float32"),
        ({"dataset": [{"input_ids": [1], "inputs_embeds": 0}] * 48}, r"remove the columns \['inputs_embeds'\]"),
        ({"dataset": [{"input_ids": [1, 2], "position_ids": [1, 2]}] * 48}, r"in every document, got \[1, 2\]"),
        ({"dataset": ragged_ids, "collator": pads_left}, "padding_side = 'right'"),
        ({"dataset": [torch.arange(16)] * 48}, "examples must be dictionaries with input_ids, got Tensor"),
        (
            {"convention": "tokens", "phases": "16:1/2,1:1/2"},
            "up to 16 tokens have nothing to predict in patches of 16",
        ),
        (
            {
                "lr_scope": "phase",
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
                "evaluation": examples(4),
            },
            "makes a scheduler for each phase",
        ),
        ({"phases": 4}, "phases look like .* got 4"),
        ({"phases": [(True, 1.0)]}, r"got \(True, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, **settings)
    with pytest.raises(TypeError, match="got Linear"):
        PatchTrainer(model=torch.nn.Linear(2, 2), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="needs a train_dataset"):
        PatchTrainer(model=tiny(), args=arguments(tmp_path)).train()
    with pytest.raises(ValueError, match="gives its loss alone"):
        PatchTrainer(model=tiny(), args=arguments(tmp_path), compute_loss_func=lambda *_: 0)
    run = PatchTrainer(model=tiny(), args=arguments(tmp_path))
    run.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="'fused_linear_cross_entropy': False"):
        check_supported(run, "run")
    run.args.use_liger_kernel = False
    run.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True))
    with pytest.raises(ValueError, match="cp_size"):
        check_supported(run, "run")
    assert json.dumps(PatchTrainer(model=tiny(), args=arguments(tmp_path)).args.to_dict())
