"""The tokenizer of a corpus: training, loading, finding the token that ends a document, and saving for a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from patchkernels.files import replace_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_VOCAB_SIZE = 4096
TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")  # its names in common tokenizers


def find_tokenizer(path: str) -> Path:
    """The tokenizer file at ``path``, or in the folder ``path``. ``FileNotFoundError`` if there is none."""
    file = Path(path).expanduser()
    file = file / TOKENIZER_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer file {str(file)!r}")
    return file


def train_tokenizer(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Trains a byte-level BPE of at most ``vocab_size`` tokens, end-of-text among them, and writes it to ``file``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def load_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    """The tokenizer in ``file`` and the id of its end-of-text token. ``ValueError`` if it is unusable or has none."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer that tokenizers reads: {error}") from error
    for name in END_OF_TEXT_NAMES:
        end_of_text = tokenizer.token_to_id(name)
        if end_of_text is not None:
            return tokenizer, end_of_text
    raise ValueError(f"{file} has no end-of-text token: none of {END_OF_TEXT_NAMES}")


def save_tokenizer(file: Path, folder: Path, max_length: int) -> None:
    """Copies the tokenizer in ``file`` into a model's folder, so that transformers' ``AutoTokenizer`` loads it there.

    ``max_length`` is the number of tokens that the model can read. End-of-text also serves as the token that begins a
    text.
    """
    tokenizer, end_of_text = load_tokenizer(file)
    name = tokenizer.id_to_token(end_of_text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "bos_token": name,
                "model_max_length": max_length}  # fmt: skip
    content = file.read_text()
    replace_file(folder / TOKENIZER_FILE, lambda path: path.write_text(content))
    replace_file(folder / "tokenizer_config.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
