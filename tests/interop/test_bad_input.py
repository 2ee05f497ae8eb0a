"""What is not supported or damaged is refused by name, in one line, before any weight is read."""

import json

import numpy as np
import pytest
import tokenizers

from nope_jax.errors import is_refusal
from nope_jax.interop import load_pretrained, save_pretrained
from tests.support.gguf_files import write_gguf
from tests.support.published import CONFIGS, weight, write_safetensors

LLAMA = {**CONFIGS["llama"], "num_hidden_layers": 1}


def llama_tensors():
    D, F, V = 32, 40, 48
    layer = {
        "self_attn.q_proj": (D, D), "self_attn.k_proj": (16, D), "self_attn.v_proj": (16, D),
        "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return {name: weight(name, shape) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A whole model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(path / "model.safetensors", llama_tensors())
    return path


def refusal(spec, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_pretrained(spec)
    assert is_refusal(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_is_whole(folder):
    assert load_pretrained(f"hf:{folder}")[1] is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "opt"}, "model_type 'opt' is not supported, only llama, "),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported: it has experts; supported are llama, "),
        ({"model_type": "gpt_oss"}, "it has experts .its attention sinks are the encoding AttentionSink.; supported"),
        ({"model_type": "lfm3"}, "it has convolutions in place of attention .its RoPE has ProportionalScaling."),
        ({"model_type": "recurrent_gemma"}, "it has recurrent layers; supported are llama, "),
        ({"model_type": None}, "model_type None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq' is not supported"),
        ({"num_local_experts": 8}, "settings that are not supported: num_local_experts '8'"),
        ({"auto_map": {"AutoModel": "own.py"}}, "not supported: auto_map"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported, only 'silu'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported, only default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor must be a number, not None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mood": 1}}, "not supported: mood"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "not supported: full_attention"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 must divide hidden_size 32"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 must divide"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight, though its config ties"),
        ({"num_hidden_layers": 2}, "has no tensor model.layers.1.self_attn.q_proj.weight, .* and 6 more"),
        ({"vocab_size": 64}, r"model.embed_tokens.weight has shape \[48, 32\], but by its config \[64, 32\]"),
        ({"attention_bias": True}, "has no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_settings_that_are_not_supported(folder, settings, match):
    (folder / "config.json").write_text(json.dumps(LLAMA | settings))
    refusal(f"hf:{folder}", match)


def test_recurrent_layers(folder):
    config = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "layer_types": ["linear_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    refusal(str(folder), "layer_types 'linear_attention' is not supported")


def test_tensors_that_the_config_does_not_account_for(folder):
    extra = {"model.layers.0.mlp.router.weight": np.zeros((2, 32), np.float32)}
    write_safetensors(folder / "model.safetensors", llama_tensors() | extra)
    refusal(str(folder), "does not account for: model.layers.0.mlp.router.weight")


def test_files_that_are_truncated_or_no_safetensors(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for content, match in [
        (whole[:-4], "is truncated: it has .* and .* ends at"),
        (whole[:100], "truncated or not safetensors"),
        (b"", "truncated or not safetensors"),
        (b"\x80\x02}q\x00." * 400, "not safetensors"),
    ]:
        (folder / "model.safetensors").write_bytes(content)
        refusal(str(folder), match)


def test_integers_and_float8_are_not_weights(folder):
    content = (folder / "model.safetensors").read_bytes().replace(b'"F32"', b'"F8X"', 1)
    (folder / "model.safetensors").write_bytes(content)
    refusal(str(folder), "is F8X, which is not supported, only F64, F32, F16, BF16")


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refusal(str(folder), "only pytorch_model.bin, and pickles are not read")


def test_a_shard_is_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(str(folder), "names model-00001-of-00002.safetensors, which is not there")


def test_a_tokenizer_with_more_tokens_than_rows(folder):
    vocabulary = {f"w{i}": i for i in range(48)} | {"</s>": 48}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0")).save(str(folder / "tokenizer.json"))
    refusal(str(folder), "its tokenizer has 49 tokens, but its embedding 48 rows")


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refusal(f"hf:{tmp_path}/absent", "there is no such folder")
    refusal(
        "someone/some-model", "neither a folder nor in the local cache .* cannot be downloaded: OSError: no network$"
    )
    refusal(f"gguf:{tmp_path}/absent.gguf", "there is no such GGUF file")
    refusal("hf:", "must name a model")
    refusal(str(tmp_path), "has no config.json")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        load_pretrained(str(tmp_path), dtype="float16")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refusal("someone/some-model", r"pip install 'nope_jax\[interop\]'")
    file = write_gguf(folder / "model.gguf", LLAMA, llama_tensors())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refusal(f"gguf:{file}", r"pip install 'nope_jax\[interop\]'")


def test_gguf(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", LLAMA, llama_tensors())
    whole = file.read_bytes()
    for content, match in [
        (whole[:-40], "is truncated: it has .* bytes, and .* ends at"),
        (whole[:300], "truncated or damaged"),
        (b"GGML" + whole[4:], "is not a GGUF file"),
        (whole.replace(b"llama", b"mamba"), "architecture 'mamba' is not supported, only llama"),
        (b"GGUF\x01" + whole[5:], "GGUF version 1 is not supported"),
    ]:
        file.write_bytes(content)
        refusal(f"gguf:{file}", match)
    write_gguf(file, LLAMA, llama_tensors(), more={"llama.expert_count": 8})
    refusal(f"gguf:{file}", "expert_count 8 is not supported, only 0")
    write_gguf(file, LLAMA, llama_tensors(), more={"llama.mood": 8})
    refusal(f"gguf:{file}", "not supported: mood")
    write_gguf(
        file, LLAMA, llama_tensors(), tokenizer={"model": "gpt2", "pre": "klingon", "tokens": ["a"], "merges": ["a b"]}
    )
    refusal(f"gguf:{file}", "pre-tokenizer 'klingon' is not supported, only bloom")
    write_gguf(file, LLAMA, llama_tensors(), tokenizer={"model": "t5", "tokens": ["a"]})
    refusal(f"gguf:{file}", "tokenizer of kind 't5' is not supported")


def test_a_folder_that_is_not_empty_is_not_written_to(folder):
    model, _ = load_pretrained(str(folder))
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        save_pretrained(model, folder)
    with pytest.raises(ValueError, match="family must be one of"):
        save_pretrained(model, folder / "new", family="lama")
