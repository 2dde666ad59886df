"""The library's model as a LightningModule, with a callback that switches the phase.

Run: python examples/lightning_module.py
"""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.data.corpus import DataConfig, prepare

CONTEXT = 256


class Phases(lightning.Callback):
    """Sets the patch size, first K and then 1. It follows from the step, which Lightning's checkpoints hold."""

    def __init__(self, patch_size, until):
        self.patch_size, self.until = patch_size, until

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.patch_size = self.patch_size if trainer.global_step < self.until else 1


class Module(lightning.LightningModule):
    def __init__(self, vocab):
        super().__init__()
        self.model = PatchLM(PatchLMConfig(vocab, 128, 352, 4, 4, max_position_embeddings=CONTEXT))
        self.patch_size = 1

    def training_step(self, batch, _):
        loss = self.model(batch[0], batch[0], self.patch_size)
        self.log_dict({"loss": loss, "patch_size": float(self.patch_size)}, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.log("validation_loss", self.model(batch[0], batch[0], 1))  # token-level in every phase

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.95))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--text", help="a file or folder of text; default: the standard library of this Python")
    parser.add_argument("--vocab", type=int, default=2048)
    arguments = parser.parse_args()
    corpus = prepare(DataConfig(path=arguments.text, vocab_size=arguments.vocab))

    def loader(tokens, most, shuffle):
        ids = torch.from_numpy(tokens.ids[: len(tokens) // CONTEXT * CONTEXT].astype("int64")).view(-1, CONTEXT)
        return DataLoader(TensorDataset(ids[:most]), batch_size=16, shuffle=shuffle)

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=arguments.steps, callbacks=[Phases(4, arguments.steps * 2 // 3)], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module(corpus.vocab_size)
    held_out = loader(corpus.validation, 64, False)
    trainer.fit(module, loader(corpus.train, None, True), held_out)
    (values,) = trainer.validate(module, held_out, verbose=False)
    print({name: round(value, 4) for name, value in values.items()})


if __name__ == "__main__":
    main()
