"""TRL's SFTTrainer runs in phases through the mixin, and does what a loop without batches and packing does."""

from __future__ import annotations

import copy
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
from trainer_runs import one_document, tokenizer, train_by_hand, varied  # noqa: E402

from patchkernels.hf import PatchTraining  # noqa: E402

CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + ' t2 ' }}"
    "{% endgeneration %}{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)


class PatchSFT(PatchTraining, trl.SFTTrainer):
    pass


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL would tell its authors about the run
    datasets.disable_progress_bars()


def words(numbers, low=3, high=12):
    return " ".join(f"t{numbers.randrange(3, 64)}" for _ in range(numbers.randrange(low, high)))


def texts(count=48):
    numbers = random.Random(0)
    return [{"text": words(numbers)} for _ in range(count)]


def prompts(count=48):
    numbers = random.Random(0)
    return [{"prompt": words(numbers), "completion": f" {words(numbers)}"} for _ in range(count)]


def chats(count=48):
    numbers = random.Random(0)
    roles = ("user", "assistant", "user", "assistant")
    return [{"messages": [{"role": r, "content": words(numbers, 2, 5)} for r in roles]} for _ in range(count)]


def sft(folder, dataset, model=None, resume=None, trainer=PatchSFT, **settings):
    own = {name: settings.pop(name) for name in ("phases", "convention", "peft_config") if name in settings}
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, seed=5,
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 6,
           "max_length": 32, "save_strategy": "no", "gradient_checkpointing": False, **settings},
    )  # fmt: skip
    run = trainer(
        model=model or varied(), args=arguments, train_dataset=datasets.Dataset.from_list(dataset),
        eval_dataset=datasets.Dataset.from_list(dataset[:4]), **own,
        processing_class=tokenizer(pad_token="t1", chat_template=CHAT),
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return run


def logged(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def split_documents(row):
    yield from zip(row["input_ids"].split(row["seq_lengths"]), row["labels"].split(row["seq_lengths"]))


PACKED = {"packing": True}  # into rows of 32 tokens


@pytest.mark.parametrize(
    ("dataset", "settings", "documents"),
    [
        (texts, {}, one_document),
        (texts, {"convention": "tokens", "gradient_accumulation_steps": 2}, one_document),
        (texts, {"padding_free": True, "max_length": None}, one_document),
        (texts, PACKED, split_documents),
        (texts, {**PACKED, "pad_to_multiple_of": 5, "gradient_checkpointing": True}, split_documents),
        (texts, {**PACKED, "packing_strategy": "wrapped"}, one_document),
        (prompts, {"completion_only_loss": True}, one_document),
        (prompts, {"completion_only_loss": True, **PACKED}, split_documents),
        (chats, {"assistant_only_loss": True}, one_document),
    ],
    ids=[
        "text",
        "tokens",
        "padding_free",
        "packing",
        "multiple",
        "wrapped",
        "completion",
        "completion_packing",
        "chat",
    ],
)
def test_a_loop_written_by_hand(tmp_path, dataset, settings, documents):
    run = sft(tmp_path, dataset(), **settings)
    assert 1 in [entry.get("patch_size") for entry in run.state.log_history]
    assert 4 in [entry.get("patch_size") for entry in run.state.log_history]
    torch.testing.assert_close(logged(run), train_by_hand(run, varied(), documents), rtol=1e-4, atol=0)
    labels = [label for row in run.train_dataset["labels"] for label in row]
    assert (-100 in labels) == ("completion_only_loss" in settings or "assistant_only_loss" in settings)


def test_evaluation_is_that_of_trl_in_every_phase(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 4}
    run, plain = sft(tmp_path, texts(), **settings), sft(tmp_path, texts(), trainer=trl.SFTTrainer, **settings)
    found, expected = (
        [(entry["eval_loss"], entry["eval_entropy"]) for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (run, plain)
    )
    assert len(found) == 4
    assert found == expected


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"learning_rate": 0.0, "weight_decay": 0.0}
    run = sft(tmp_path, texts(), peft_config=adapters, **settings)
    torch.testing.assert_close(logged(run), logged(sft(tmp_path, texts(), **settings)), rtol=1e-5, atol=0)
    trained = sft(tmp_path, texts(), peft_config=adapters)
    assert logged(trained)[0] == logged(run)[0]
    assert logged(trained)[1:] != logged(run)[1:]


def test_resumed_in_the_phase_of_patches_and_at_the_switch(tmp_path):
    whole = sft(tmp_path, texts(), save_strategy="steps", save_steps=1, **PACKED)
    for step in (1, whole.schedule.starts[1]):
        assert logged(
            sft(tmp_path / "again", texts(), resume=str(tmp_path / f"checkpoint-{step}"), **PACKED)
        ) == logged(whole)


def test_bad_input(tmp_path):
    class PatchReward(PatchTraining, trl.RewardTrainer):
        pass

    class OwnLoss(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class PatchOwnLoss(PatchTraining, OwnLoss):
        pass

    with pytest.raises(TypeError, match="compute_loss of PatchOwnLoss must call the model"):
        sft(tmp_path, texts(), trainer=PatchOwnLoss)
    with pytest.raises(ValueError, match="only the SFTTrainer predicts next tokens, got RewardTrainer"):
        PatchReward(model=varied())
    with pytest.raises(ValueError, match="needs loss_type='nll', got loss_type='dft'"):
        sft(tmp_path, texts(), loss_type="dft")
    with pytest.raises(TypeError, match="not its name 'a/model'"):
        sft(tmp_path, texts(), model="a/model")


def test_the_loss_of_routers_is_weighted_as_in_trl(tmp_path):
    """The weight does not depend on the number of batches of a step, in any phase."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, router_aux_loss_coef=0.5,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    equal = [{"text": " ".join(["t5 t9 t11 t7"] * 4)} for _ in range(48)]  # all batches have the same loss of routers
    for phases in ("4:1", "1:1"):
        one, four = (
            sft(tmp_path, equal, model=copy.deepcopy(model), phases=phases, learning_rate=0.0, max_steps=1,
                per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)
            for parts in (1, 4)
        )  # fmt: skip
        assert logged(one)[0] > 1.0
        torch.testing.assert_close(logged(one), logged(four), rtol=1e-4, atol=0)
