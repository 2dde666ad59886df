"""Batches without a target, rows of unlike length and packed rows train as in a loop without batches and padding."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from trainer_runs import (  # noqa: E402
    CONSTANT_RATE,
    CONSTANT_TOKENS,
    arguments,
    examples,
    logged,
    one_document,
    tiny,
    tokenizer,
    train,
    train_by_hand,
    varied,
    with_few_targets,
)

from patchkernels.hf import PatchRows  # noqa: E402


@pytest.mark.parametrize(
    "settings",
    [{}, {"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}],
    ids=["one_row", "two_rows", "two_batches"],
)
def test_batches_without_a_target(tmp_path, settings):
    settings = {"per_device_train_batch_size": 1, "weight_decay": 0.1, **CONSTANT_RATE, **CONSTANT_TOKENS, **settings}
    run, model = train(tmp_path, model=varied(), dataset=with_few_targets(), **settings), varied()
    expected = train_by_hand(run, model)
    assert 0 in expected[:6] and 0 in expected[6:]
    torch.testing.assert_close(logged(run), expected, rtol=1e-4, atol=0)
    for found, weight in zip(run.model.parameters(), model.parameters()):
        torch.testing.assert_close(found, weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}, {"reduction": "slot_mean"}])
@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_a_run_without_any_target_decays_the_weights(tmp_path, settings, accepts_loss_kwargs):
    model, before = tiny(), tiny()
    model.accepts_loss_kwargs = accepts_loss_kwargs  # whether the Trainer tells the model the number of targets
    dataset = [{"input_ids": torch.arange(5, 11), "labels": torch.tensor([5, -100, -100, -100, -100, -100])}] * 48
    settings = {"weight_decay": 0.1, **CONSTANT_RATE, **CONSTANT_TOKENS, **settings}
    run = train(tmp_path, model=model, dataset=dataset, **settings)
    assert logged(run) == [0.0] * 12
    for found, weight in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(found, weight * (1 - 1e-2 * 0.1) ** 12 if weight.ndim > 1 else weight)


def test_a_loss_that_is_nan_is_logged_as_nan(tmp_path):
    run = train(tmp_path, learning_rate=math.inf, **CONSTANT_RATE)
    assert [math.isnan(loss) for loss in logged(run)] == [False] + [True] * 11
    assert run.args.logging_nan_inf_filter


def test_evaluation_handles_a_loss_that_is_nan_as_without_phases(tmp_path):
    labelled = [{**example, "labels": example["input_ids"]} for example in examples(4, seed=1)]
    labelled[3]["labels"] = torch.full((16,), -100)
    settings = {"learning_rate": 0.0, "weight_decay": 0.0, "per_device_eval_batch_size": 1}
    run = train(tmp_path, evaluation=labelled, eval_strategy="steps", eval_steps=12, **settings)
    plain = transformers.Trainer(model=tiny(), args=arguments(tmp_path, **settings), eval_dataset=labelled)
    expected = plain.evaluate()["eval_loss"]
    for found in (run.state.log_history[-2]["eval_loss"], run.evaluate()["eval_loss"]):
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


def ignore_end_of_text(row):
    yield row["input_ids"], row["input_ids"].where(row["input_ids"] != 2, -100)


def split_documents(row):
    begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
    for begin, end in zip(begins, [*begins[1:], None]):
        yield row["input_ids"][begin:end], row["input_ids"][begin:end]


def with_end_of_text(ragged):
    return [{"input_ids": torch.cat([e["input_ids"], torch.tensor([2])]).tolist()} for e in ragged]


def packed(ragged):
    return [{**e, "position_ids": torch.cat([torch.arange(2), torch.arange(len(e["input_ids"]) - 2)])} for e in ragged]


def packed_shorter_than_a_patch(ragged):
    """Documents of two tokens, two in a patch, before a longer one; or of one token each."""

    def positions(length):
        lengths = [2, 2, length - 4] if length > 4 else [1] * length
        return torch.cat([torch.arange(n) for n in lengths])

    return [{**e, "position_ids": positions(len(e["input_ids"]))} for e in ragged]


def answers(ragged):
    return [{**e, "labels": e["input_ids"].where(torch.arange(len(e["input_ids"])) > 1, -100)} for e in ragged]


@pytest.mark.parametrize("convention", ["positions", "tokens"])
@pytest.mark.parametrize(
    ("convert", "collator", "documents"),
    [
        (list, None, one_document),
        (packed, None, split_documents),
        (packed_shorter_than_a_patch, None, split_documents),
        (list, lambda: transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False), one_document),
        (
            with_end_of_text,
            lambda: transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False),
            ignore_end_of_text,
        ),
        (answers, lambda: transformers.DataCollatorForSeq2Seq(tokenizer()), one_document),
        (list, lambda: transformers.DataCollatorWithFlattening(), one_document),
        (list, lambda: transformers.DataCollatorWithPadding(tokenizer()), one_document),
    ],
    ids=["default", "packed", "packed_short", "causal", "padding_is_end_of_text", "seq2seq", "flattening", "padding"],
)
def test_rows_of_unlike_length(tmp_path, convert, collator, documents, convention):
    dataset = convert([{"input_ids": e["input_ids"][: 3 + i % 13]} for i, e in enumerate(examples())])
    # With its usual epsilon AdamW makes steps of the learning rate of gradients that are zero but for rounding errors.
    settings = {"convention": convention, "max_steps": 6, "learning_rate": 2e-3, "adam_epsilon": 1e-4, **CONSTANT_RATE}
    run = train(tmp_path, model=varied(), dataset=dataset, collator=collator and collator(), **settings)
    torch.testing.assert_close(logged(run), train_by_hand(run, varied(), documents), rtol=1e-4, atol=0)


def test_examples_that_the_patch_size_does_not_divide(tmp_path):
    dataset = [{"input_ids": example["input_ids"][:13]} for example in examples()]
    run = train(tmp_path, model=varied(), dataset=dataset, **CONSTANT_RATE, **CONSTANT_TOKENS)
    torch.testing.assert_close(logged(run), train_by_hand(run, varied()), rtol=1e-4, atol=0)
    rows = PatchRows(dataset, run.schedule, 0, False)
    target = run.data_collator([rows[0], rows[1]])["shift_labels"]
    assert (target != -100).sum(dim=(1, 2)).tolist() == [9, 9]  # of 13 tokens all but those of the first patch


def without_empty_rows(row):
    return one_document(row) if len(row["input_ids"]) else iter(())


def test_examples_without_tokens(tmp_path):
    dataset = [
        {"input_ids": example["input_ids"].numpy().astype("uint16")} if i % 4 == 0 else {"input_ids": []}
        for i, example in enumerate(examples())
    ]
    run = train(tmp_path, model=varied(), dataset=dataset, per_device_train_batch_size=2, **CONSTANT_RATE)
    losses = logged(run)
    assert 0 in losses
    torch.testing.assert_close(losses, train_by_hand(run, varied(), without_empty_rows), rtol=1e-4, atol=0)


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=128, resid_pdrop=0.0)
    )


def with_column(name):
    return [{**example, name: [n % 3] * 8 + [1] * 8} for n, example in enumerate(examples())]


class Stream(torch.utils.data.IterableDataset):
    """Examples in an order that depends on the epoch, as those of a shuffled stream of datasets."""

    def __init__(self, rows):
        self.rows, self.epoch, self.epochs = rows, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.rows[self.epoch :] + self.rows[: self.epoch])


def test_columns_that_the_model_reads_and_batches_have_not(tmp_path):
    rows = with_column("token_type_ids")
    message = r"remove the columns \['token_type_ids'\]"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=gpt2(), dataset=rows)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=gpt2(), dataset=Stream(rows))
    run = train(tmp_path, model=gpt2(), dataset=with_column("unused"), evaluation=rows)
    with pytest.raises(ValueError, match=message):
        run.evaluate()


@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_a_collator_reads(tmp_path, stream):
    """The tokens that a column of the dataset leaves out are no targets, in every phase."""

    def collate(rows):
        ids, masks = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "loss_mask"))
        return {"input_ids": ids, "labels": ids.masked_fill(masks == 0, -100)}

    rows = with_column("loss_mask")
    masked = [
        {
            "input_ids": row["input_ids"],
            "labels": row["input_ids"].masked_fill(torch.tensor(row["loss_mask"]) == 0, -100),
        }
        for row in rows
    ]
    expected = logged(train(tmp_path, dataset=Stream(masked) if stream else masked))
    dataset = Stream(rows) if stream else rows
    assert logged(train(tmp_path, dataset=dataset, collator=collate, remove_unused_columns=False)) == expected


def test_a_stream_is_told_its_epoch_and_read_by_every_process(tmp_path):
    stream = Stream(examples(20))
    run = train(tmp_path, dataset=stream)
    read = 4 * sum(steps * phase.patch_size for steps, phase in zip(run.schedule.steps, run.schedule.phases))
    assert stream.epochs == list(range(-(-read // 20))) and len(stream.epochs) > 2
    assert run.accelerator.dataloader_config.dispatch_batches is False


def test_a_tokenizer_pads_on_the_right_in_patch_phases(tmp_path):
    ragged = [{"input_ids": list(range(3, 6 + i % 5))} for i in range(48)]
    losses = []
    for side in ("right", "left"):
        pads = transformers.DataCollatorForLanguageModeling(tokenizer(padding_side=side), mlm=False)
        run = train(tmp_path, dataset=ragged, collator=pads)
        losses.append(logged(run)[: run.schedule.starts[1]])
        assert len(losses[-1]) > 2 and pads.tokenizer.padding_side == side
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
