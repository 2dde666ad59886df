"""The tokenizer of a corpus: trained, found, loaded, saved."""

from __future__ import annotations

import pytest

from patchkernels.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_NAMES,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [f"document {i}: " + " ".join(f"word{j * i % 17}" for j in range(40)) for i in range(60)]


@pytest.fixture
def trained(tmp_path):
    file = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 300, file)
    return file


def test_every_text_is_encoded_without_loss(trained):
    tokenizer, end_of_text = load_tokenizer(trained)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.id_to_token(end_of_text) == END_OF_TEXT
    for text in (*TEXTS, "never seen: \u00e9\u6f22\U0001f600\t\r\n"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert end_of_text not in ids


@pytest.mark.parametrize("name", END_OF_TEXT_NAMES)
def test_end_of_text_is_found_by_any_of_its_names(trained, name):
    trained.write_text(trained.read_text().replace(END_OF_TEXT, name))
    tokenizer, end_of_text = load_tokenizer(trained)
    assert tokenizer.id_to_token(end_of_text) == name


def test_saved_it_is_what_transformers_loads(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(trained, folder, 77)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token, loaded.bos_token, loaded.model_max_length) == (END_OF_TEXT, END_OF_TEXT, 77)
    assert loaded(TEXTS[0]).input_ids == load_tokenizer(trained)[0].encode(TEXTS[0]).ids


def test_a_tokenizer_is_a_file_or_in_a_folder(trained, tmp_path):
    assert find_tokenizer(str(trained)) == find_tokenizer(str(tmp_path)) == trained
    with pytest.raises(FileNotFoundError, match="no tokenizer file '/nowhere'"):
        find_tokenizer("/nowhere")


def test_a_tokenizer_that_is_of_no_use(trained):
    trained.write_text(trained.read_text().replace(END_OF_TEXT, "the end"))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no end-of-text token: none of \('<\|endoftext\|>'"):
        load_tokenizer(trained)
    trained.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(trained)
