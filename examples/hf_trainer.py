"""Trains a tiny Llama in two phases with the Trainer of transformers. Run: python examples/hf_trainer.py"""

import argparse

import datasets
import torch
import transformers

from patchkernels.data.corpus import DataConfig, prepare
from patchkernels.hf import PatchTrainer

CONTEXT = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/hf-trainer")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--text", help="a file or folder of text; default: the standard library of this Python")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    arguments = parser.parse_args()
    corpus = prepare(DataConfig(path=arguments.text, vocab_size=arguments.vocab))

    def rows(tokens):
        ids = tokens.ids[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        return datasets.Dataset.from_dict({"input_ids": ids}).with_format("torch")

    config = transformers.LlamaConfig(
        vocab_size=corpus.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=corpus.end_of_text, eos_token_id=corpus.end_of_text,
    )  # fmt: skip
    training = transformers.TrainingArguments(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(arguments.steps // 3, 1),
        save_steps=max(arguments.steps // 2, 1),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = PatchTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=training,
        train_dataset=rows(corpus.train),
        eval_dataset=rows(corpus.validation).select(range(min(64, len(corpus.validation) // CONTEXT))),
        phases="4:2/3,1:1/3",
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model(f"{arguments.out}/model")  # AutoModelForCausalLM loads it
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
