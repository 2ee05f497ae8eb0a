"""A folder of texts, a config of them, and a tokenizer of words."""

import numpy as np
import pytest
import tokenizers

from nope_jax.config import DataConfig


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 documents of 0 to 60 letters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        letters = random.integers(ord("a"), ord("z") + 1, i * 20 % 61, np.uint8)
        (folder / f"{i}.txt").write_bytes(letters.tobytes())
    return folder


@pytest.fixture
def config(texts, tmp_path):
    return DataConfig(source=f"text:{texts}", dir=str(tmp_path / "data"), context_length=16, batch_size=8)


@pytest.fixture
def tokenizer_json(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 10, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path
