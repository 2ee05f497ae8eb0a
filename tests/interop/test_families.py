"""Every family, from a folder of Hugging Face, in and out; its logits are those that transformers once gave."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.encodings import T5, HeadScale, NTKScaling, RoPE, UniformScale, Windowed, YaRNScaling
from nope_jax.interop import FAMILIES, load_pretrained, published, save_pretrained
from nope_jax.interop.parameters import published_tensors
from nope_jax.interop.settings import Settings
from tests.goldens import regenerate
from tests.support.published import CONFIGS, POSITIONS, VOCABULARY, golden_tokens, tokens, write_folder

GOLDENS = regenerate.load("published")


def folder_of(folder, settings):
    """A folder with these settings and the weights of the formula."""
    family = FAMILIES[settings["model_type"]]
    config = family.read(Settings(settings, "config.json"))
    tensors = published_tensors(config, family.weights)
    return write_folder(folder, settings, {tensor.name: tensor.shape for tensor in tensors})


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("published"), CONFIGS[request.param])
    return request.param, folder, load_pretrained(str(folder))[0]


def arrays(model):
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}


def same(first, second):
    first, second = arrays(first), arrays(second)
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def test_every_family_has_a_config():
    assert {config["model_type"] for config in CONFIGS.values()} == FAMILIES.keys()


def test_logits_are_those_of_transformers(loaded):
    name, _, model = loaded
    logits = model(golden_tokens(model.max_length))
    np.testing.assert_allclose(logits[:, POSITIONS][..., VOCABULARY], GOLDENS[name], atol=1e-4, rtol=1e-4)


def test_out_and_in_again_is_the_same_to_the_bit(loaded, tmp_path):
    _, _, model = loaded
    save_pretrained(model, tmp_path / "saved")
    again, _ = load_pretrained(f"hf:{tmp_path / 'saved'}")
    assert same(model, again)
    ids = tokens(1, 20)
    np.testing.assert_array_equal(model(ids), again(ids))


def test_a_family_that_is_asked_for_is_written(loaded, tmp_path):
    name, _, model = loaded
    family = "smollm3" if "nope" in CONFIGS[name] else CONFIGS[name]["model_type"]
    family = "custom_decoder_only_t5" if family == "t5" else family  # a decoder alone is no T5
    save_pretrained(model, tmp_path / "saved", family=family)
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == family
    source = published(str(tmp_path / "saved"))
    ours, theirs = model.config, source.config.model
    assert dataclasses.replace(theirs, encoding=ours.encoding) == ours
    assert same(model, source.load())


REAL = {
    # name on the hub: what its config.json says, and the parameters that its model card or paper counts
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
        124_439_808,
    ),
    "meta-llama/Llama-2-7b-hf": (
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
        },
        6_738_415_616,
    ),
    "meta-llama/Llama-3.1-8B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        8_030_261_248,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True,
        },
        134_515_008,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768, "sliding_window": 4096,
        },
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1e6,
            "max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
            "sliding_window": 32768, "max_window_layers": 24,
        },
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "rope_theta": 5e6,
            "max_position_embeddings": 65536, "no_rope_layer_interval": 4,
        },
        3_075_098_624,
    ),
    "allenai/OLMo-2-1124-7B": (
        {
            "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 500000,
            "max_position_embeddings": 4096,
        },
        7_298_617_344,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_models_have_as_many_parameters_as_they_should(name):
    settings, count = REAL[name]
    family = FAMILIES[settings["model_type"]]
    tensors = published_tensors(family.read(Settings(settings, "config.json")), family.weights)
    assert sum(math.prod(tensor.shape) for tensor in tensors) == count


# What tuning makes of a model, written as transformers says it.


def tiny(**fields):
    return Decoder(
        ModelConfig(vocab_size=48, num_layers=2, num_heads=4, model_dim=32, embedding_scale=1.0, train_length=24)
        if not fields
        else dataclasses.replace(tiny().config, **fields),
        rngs=nnx.Rngs(0),
    )


def saved(model, folder, **keywords):
    save_pretrained(model, folder, **keywords)
    return json.loads((folder / "config.json").read_text()), load_pretrained(str(folder))[0]


def test_yarn_and_ntk_go_out_and_in(tmp_path):
    yarn = tiny(encoding=RoPE(scaling=YaRNScaling(2.0, 24)))
    settings, again = saved(yarn, tmp_path / "yarn")
    assert settings["rope_scaling"]["rope_type"] == "yarn"
    assert again.config.encoding == yarn.config.encoding
    ntk = tiny(encoding=Windowed(RoPE(scaling=NTKScaling(2.0)), 9))
    settings, again = saved(ntk, tmp_path / "ntk")
    assert settings["rope_theta"] == pytest.approx(10_000 * 2 ** (8 / 6))
    ids = tokens(2, 40)
    np.testing.assert_allclose(again(ids), ntk(ids), atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, "all"])
def test_factors_per_head_are_folded_into_the_queries(tmp_path, qk_norm):
    model = tiny(
        encoding=HeadScale(UniformScale(RoPE(), 1.5)),
        biases=("qkv",) if qk_norm is None else (),
        qk_norm=qk_norm,
        norm_place="pre" if qk_norm is None else "post",
    )
    scale = model.blocks[0].attention.position["head_scale"]
    scale[...] = 0.5 + jax.random.uniform(jax.random.key(0), scale.shape)
    _, again = saved(model, tmp_path / "saved")
    assert again.config.encoding == RoPE()
    ids = tokens(2, 20)
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-5)


def test_factors_that_differ_do_not_fit_a_norm_that_the_heads_share(tmp_path):
    model = tiny(encoding=HeadScale(RoPE()), qk_norm="head")
    _, again = saved(model, tmp_path / "equal")
    assert again.config.qk_norm == "head"
    model.blocks[0].attention.position["head_scale"][0, 1] = 2.0
    with pytest.raises(ValueError, match="HeadScale of layer 0 cannot be saved"):
        save_pretrained(model, tmp_path / "different")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"encoding": T5()}, "model.encoding T5"),
        ({"encoding": ("rope", "alibi")}, "model.encoding"),
        ({"encoding": "rope", "mlp": "plain"}, "model.mlp 'plain'"),
        ({"encoding": "rope", "logits_softcap": 3.0}, "model.logits_softcap 3.0"),
    ],
)
def test_what_no_family_can_say_is_refused_by_name(tmp_path, fields, said):
    with pytest.raises(ValueError, match=f"cannot say .*{said}"):
        save_pretrained(tiny(**fields), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_decoder_with_scaled_embeddings_is_a_granite(tmp_path):
    model = tiny(encoding="rope", embedding_scale=None)
    settings, again = saved(model, tmp_path / "saved")
    assert settings["model_type"] == "granite"
    ids = tokens(2, 20)
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-5)
