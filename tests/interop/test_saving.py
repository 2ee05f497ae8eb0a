"""What a written folder says of settings that a decoder leaves to their defaults."""

import json

from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.interop import save_pretrained


def test_the_size_of_the_vocabulary_is_written_out(tmp_path):
    model = Decoder(ModelConfig(encoding="rope", num_layers=1, num_heads=2, model_dim=16), rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "written")
    assert (
        json.loads((tmp_path / "written" / "config.json").read_text())["vocab_size"] == 256 == model.config.num_tokens
    )
