"""What a written folder says of settings that a decoder leaves to their defaults."""

import json

import numpy as np
import pytest
import tokenizers

from nope_jax import ModelConfig
from nope_jax.data import load_tokenizer
from nope_jax.data.tokenizers import ByteTokenizer, JsonTokenizer
from nope_jax.interop import published, save_pretrained
from tests.support.drawn_model import drawn_model


@pytest.fixture(scope="module")
def model():
    sizes = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "mlp_dim": 40}
    return drawn_model(ModelConfig(encoding="rope", **sizes))


def test_the_size_of_the_vocabulary_is_written_out(model, tmp_path):
    save_pretrained(model, tmp_path / "written")
    assert (
        json.loads((tmp_path / "written" / "config.json").read_text())["vocab_size"] == 256 == model.config.num_tokens
    )


@pytest.mark.parametrize("bos", [False, True])
def test_bytes_are_a_tokenizer_too(model, bos, tmp_path):
    own = ByteTokenizer(separator=10, bos=10)
    save_pretrained(model, tmp_path / "written", tokenizer=own, bos=bos)
    again = published(str(tmp_path / "written"))
    assert again.config.data.bos == bos
    assert (again.tokenizer.separator, again.tokenizer.bos, again.tokenizer.vocab_size) == (10, 10, 256)
    everything = "".join(map(chr, range(0x250))) + "\r\n雪 🦊"  # the letters that stand for bytes among them
    np.testing.assert_array_equal(again.tokenizer.encode(everything), own.encode(everything))
    assert again.tokenizer.decode(own.encode(everything)) == everything


def test_what_a_run_begins_with_is_what_the_written_tokenizer_adds(model, tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<s>": 1, "a": 2}, unk_token="a"))
    plain = JsonTokenizer(words, 3, separator=0, bos=1)
    save_pretrained(model, tmp_path / "with", tokenizer=plain, bos=True)
    assert published(str(tmp_path / "with")).config.data.bos
    assert words.post_processor is None, "that of the caller stays as it was"
    adds = load_tokenizer(str(tmp_path / "with"))
    assert adds.tokenizer.encode("a").ids == [1, 2] and adds.tokenizer.encode("a", "a").ids == [1, 2, 2]
    for bos, said in (False, False), (None, True), (True, True):
        save_pretrained(model, tmp_path / f"{bos}", tokenizer=adds, bos=bos)
        assert published(str(tmp_path / f"{bos}")).config.data.bos == said


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_weights(model, tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be bytes, or be read from a file .* not a WordTokenizer"):
        save_pretrained(model, tmp_path / "written", tokenizer=load_tokenizer("task:copy"))
    assert not [*(tmp_path / "written").iterdir()]
