"""Every family, from a folder of Hugging Face, in and out; its logits are those that transformers once gave."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax.encodings import (
    T5,
    ALiBi,
    HeadScale,
    NoPE,
    NTKScaling,
    RoPE,
    UniformScale,
    Windowed,
    YaRNScaling,
    rope_frequencies,
)
from nope_jax.interop import FAMILIES, huggingface, load_pretrained, published, save_pretrained
from nope_jax.interop.parameters import published_tensors
from nope_jax.interop.safetensors import read_header
from nope_jax.interop.settings import Settings
from tests.goldens import regenerate
from tests.support.drawn_model import drawn_model
from tests.support.published import CONFIGS, POSITIONS, VOCABULARY, golden_tokens, tokens, weight, write_folder

GOLDENS = regenerate.load("published")


def folder_of(folder, settings):
    """A folder with these settings and the weights of the formula."""
    family = FAMILIES[settings["model_type"]]
    config = family.read(Settings(settings, "config.json"))
    tensors = published_tensors(config, family.weights)
    return write_folder(folder, settings, {tensor.name: tensor.shape for tensor in tensors})


ALIKE = {"mistral", "olmo3", "exaone4", "cohere", "gemma"}
"""Families whose decoders differ from those of another in what that one has in another place."""
FIRST = {config["model_type"]: name for name, config in reversed(CONFIGS.items()) if config["model_type"] not in ALIKE}
"""The first config of each other family; the rest are slow tests."""


@pytest.fixture(
    scope="module",
    params=[name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
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


QUICK = ("llama",)
"""Whose family is chosen on the way out; that every family is written right, the test after the next one shows."""


@pytest.mark.parametrize(
    "loaded",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
    indirect=True,
)
def test_out_and_in_again_is_the_same_to_the_bit(loaded, tmp_path):
    _, _, model = loaded
    save_pretrained(model, tmp_path / "saved")
    again, _ = load_pretrained(f"hf:{tmp_path / 'saved'}")
    assert same(model, again)


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
    "EleutherAI/pythia-70m": (
        {
            "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048,
            "num_hidden_layers": 6, "num_attention_heads": 8, "rotary_pct": 0.25, "rotary_emb_base": 10000,
            "max_position_embeddings": 2048, "use_parallel_residual": True,
        },
        70_426_624,
    ),
    "EleutherAI/gpt-j-6b": (
        {
            "model_type": "gptj", "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28,
            "n_head": 16, "n_inner": None, "rotary": True, "rotary_dim": 64,
        },
        6_050_882_784,
    ),
    "bigscience/bloom-560m": (
        {
            "model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
            "offset_alibi": 100, "seq_length": 2048, "skip_bias_add": True,
        },
        559_214_592,
    ),
    "bigscience/bloom": (
        {"model_type": "bloom", "vocab_size": 250880, "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112},
        176_247_271_424,
    ),
    "mosaicml/mpt-7b": (
        {
            "model_type": "mpt", "architectures": ["MPTForCausalLM"], "vocab_size": 50432, "d_model": 4096,
            "n_layers": 32, "n_heads": 32, "max_seq_len": 2048, "expansion_ratio": 4, "no_bias": True,
            "learned_pos_emb": True, "norm_type": "low_precision_layernorm",
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None},
            "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
        },
        6_649_286_656,
    ),
    "tiiuae/falcon-7b": (
        {
            "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
            "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True, "parallel_attn": True,
        },
        6_921_720_704,
    ),
    "tiiuae/falcon-40b": (
        {
            "model_type": "falcon", "vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60,
            "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
        },
        41_303_293_952,
    ),
    "tiiuae/falcon-rw-1b": (
        {
            "model_type": "falcon", "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24,
            "num_attention_heads": 32, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False,
        },
        1_311_625_216,
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": (
        {
            "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rope_theta": 50000, "max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 4,
        },
        8_028_033_024,
    ),
    "google/gemma-2b": (
        {
            "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
            "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
            "max_position_embeddings": 8192, "hidden_act": "gelu",
        },
        2_506_172_416,
    ),
    "google/gemma-2-2b": (
        {
            "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
            "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        2_614_341_888,
    ),
    "google/gemma-3-1b-pt": (
        {
            "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "AntNLP/TinyLlama-NoPE-1.1B": (
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048, "nope": True,
        },
        1_100_048_384,
    ),
    "google-t5/t5-small": (  # 60,506,624 less those of the encoder and of cross-attention
        {"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
         "num_heads": 8, "n_positions": 512},
        60_506_624 - 18_881_280 - 6 * (4 * 512 * 512 + 512),
    ),
    "McGill-NLP/codellm_1b_nope": (  # 6.85 GB in float32, with 24 layers of cross-attention that nothing reads
        {
            "model_type": "custom_decoder_only_t5", "vocab_size": 49152, "d_model": 1024, "d_kv": 128, "d_ff": 16384,
            "num_layers": 24, "num_heads": 32, "tie_word_embeddings": False, "position_encoding_type": "none",
        },
        1_308_673_024,
    ),
}  # fmt: skip


OF_FAMILY = {settings["model_type"]: name for name, (settings, _) in reversed(REAL.items())}
"""The first of each family."""
AS_TINY = {"llama", "qwen2", "qwen3", "smollm3", "olmo2", "cohere2", "gemma2", "gemma3_text", "custom_decoder_only_t5"}
"""Families whose config.json says the shapes of these as it does those of the tiny ones above."""
QUICK_TO_COUNT = {name for family, name in OF_FAMILY.items() if family not in AS_TINY}


@pytest.mark.parametrize(
    "name", [name if name in QUICK_TO_COUNT else pytest.param(name, marks=pytest.mark.slow) for name in REAL]
)
def test_published_models_have_as_many_parameters_as_they_should(name):
    settings, count = REAL[name]
    family = FAMILIES[settings["model_type"]]
    tensors = published_tensors(family.read(Settings(settings, "config.json")), family.weights)
    assert sum(math.prod(tensor.shape) for tensor in tensors) == count


# What config.json does not say.


def test_factors_of_a_model_without_positions(tmp_path):
    settings = CONFIGS["llama without positions"]
    folder = folder_of(tmp_path / "folder", settings)
    plain, _ = load_pretrained(str(folder))
    assert plain.config.encoding == NoPE()
    shapes = {name: tensor.shape for name, tensor in read_header(folder / "model.safetensors").items()}
    factors = {f"model.layers.{layer}.self_attn.scale_param": (4,) for layer in range(settings["num_hidden_layers"])}
    model, _ = load_pretrained(str(write_folder(tmp_path / "scaled", settings, shapes | factors)))
    assert model.config.encoding == HeadScale(NoPE())
    expected = np.stack([weight(name, shape) for name, shape in factors.items()])
    np.testing.assert_array_equal(model.blocks[0].attention.position["head_scale"][...], expected)
    save_pretrained(model, tmp_path / "saved")
    again = published(str(tmp_path / "saved"))
    assert (again.config.model.encoding, again.family.name) == (NoPE(), "smollm3")


def test_names_whose_authors_patch_the_code(tmp_path, monkeypatch):
    settings = {name: value for name, value in CONFIGS["llama without positions"].items() if name != "nope"}
    folder = folder_of(tmp_path / "folder", settings)
    monkeypatch.setattr(huggingface, "find_folder", lambda name, **_: folder)
    assert published("hf:AntNLP/TinyLlama-NoPE-1.1B@main").config.model.encoding == NoPE()
    assert published("hf:someone/else").config.model.encoding == RoPE()


def test_a_t5_is_its_decoder(tmp_path):
    settings = CONFIGS["t5 1.1"]
    folder = folder_of(tmp_path / "folder", settings)
    own = {name: tensor.shape for name, tensor in read_header(folder / "model.safetensors").items()}
    rest = {
        "encoder.embed_tokens.weight": (48, 32),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 32),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": (64, 32),
    }
    whole, _ = load_pretrained(str(write_folder(tmp_path / "whole", settings, own | rest)))
    assert same(whole, load_pretrained(str(folder))[0])
    with pytest.raises(ValueError, match="config.json of t5 cannot say that a decoder has no encoder"):
        save_pretrained(whole, tmp_path / "saved", family="t5")


def test_mpt_with_steeper_slopes():
    settings = {**CONFIGS["mpt 6 heads, scaled"], "attn_config": {"alibi_bias_max": 16}}
    config = FAMILIES["mpt"].read(Settings(settings, "config.json"))
    # Powers of 2^(-16/8), every second first.
    assert config.encoding == ALiBi(slopes=[2**-4, 2**-8, 2**-12, 2**-16, 2**-2, 2**-6])
    assert FAMILIES["mpt"].write(config)["attn_config"]["alibi_bias_max"] == 16


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config: clip_qkv 6 is not supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi False is not supported, only True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ("falcon two norms", {"parallel_attn": False}, "parallel_attn False is not supported"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True is not supported, only False"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported, only None"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish' is not supported"),
        ("codellm", {"position_encoding_type": "abs_learned"}, "position_encoding_type 'abs_learned' is not supported"),
    ],
)
def test_variants_that_are_not_supported(name, settings, match):
    config = CONFIGS[name] | settings
    with pytest.raises(ValueError, match=match):
        FAMILIES[config["model_type"]].read(Settings(config, "config.json"))


# What tuning makes of a model, written as transformers says it.


SHAPE = {"vocab_size": 48, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "mlp_dim": 40}
"""That of the published ones, whose programs are compiled."""
TINY = ModelConfig(**SHAPE, embedding_scale=1.0, train_length=24)


def tiny(**fields):
    return drawn_model(dataclasses.replace(TINY, **fields))


def written(model, folder, **keywords):
    """What config.json says of a saved model, and the config that is read from it."""
    save_pretrained(model, folder, **keywords)
    return json.loads((folder / "config.json").read_text()), published(str(folder)).config.model


def saved(model, folder, **keywords):
    return written(model, folder, **keywords)[0], load_pretrained(str(folder))[0]


def test_yarn_and_ntk_go_out_and_in(tmp_path):
    yarn = tiny(encoding=RoPE(scaling=YaRNScaling(2.0, 24)))
    settings, again = written(yarn, tmp_path / "yarn")
    assert settings["rope_scaling"]["rope_type"] == "yarn"
    assert again.encoding == yarn.config.encoding
    ntk = tiny(encoding=Windowed(RoPE(scaling=NTKScaling(2.0)), 9))
    settings, again = written(ntk, tmp_path / "ntk")
    assert settings["rope_theta"] == pytest.approx(10_000 * 2 ** (8 / 6))
    base = settings["rope_theta"]
    assert again.encoding == Windowed(RoPE(base), 9)
    np.testing.assert_allclose(rope_frequencies(8, base=base), rope_frequencies(8, scaling=NTKScaling(2.0)), rtol=1e-6)


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
    ids = tokens(2, 48)
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-5)


def test_factors_that_differ_do_not_fit_a_norm_that_the_heads_share(tmp_path):
    model = tiny(encoding=HeadScale(RoPE()), qk_norm="head")
    scale = model.blocks[0].attention.position["head_scale"]
    scale[...] = np.full(scale.shape, 1.5, np.float32)
    _, again = written(model, tmp_path / "equal")
    assert (again.encoding, again.qk_norm) == (RoPE(), "head")
    scale[0, 1] = 2.0
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


@pytest.mark.parametrize(
    "fields",
    [
        {"biases": ("qkv", "out", "mlp"), "tie_embeddings": True},
        pytest.param({"encoding": "nope"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_factor_of_embeddings_goes_into_what_layers_add(tmp_path, fields):
    model = tiny(**{"encoding": ("nope", "rope"), "norm_eps": 0.3} | fields, embedding_scale=3.0)
    settings, again = saved(model, tmp_path / "saved", family="smollm3")
    assert again.config.embedding_scale == 1 and settings["rms_norm_eps"] == pytest.approx(0.3 / 9)
    ids = tokens(2, 48)
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-5)


@pytest.mark.parametrize("fields", [{"qk_norm": "head"}, {"norm_place": "post"}, {"encoding": "learned"}], ids=str)
def test_a_factor_of_embeddings_that_more_than_norms_read_stays(tmp_path, fields):
    with pytest.raises(ValueError, match="cannot say .*model.embedding_scale 3.0"):
        save_pretrained(tiny(**{"encoding": "rope"} | fields, embedding_scale=3.0), tmp_path / "saved", family="qwen3")


def test_a_decoder_with_scaled_embeddings_is_a_granite(tmp_path):
    model = tiny(encoding="rope", embedding_scale=None)
    settings, again = saved(model, tmp_path / "saved")
    assert settings["model_type"] == "granite"
    ours, theirs = model.config.with_defaults(), again.config.with_defaults()
    assert dataclasses.replace(theirs, encoding=ours.encoding) == ours and again.config.encoding == RoPE()
    assert same(model, again)
