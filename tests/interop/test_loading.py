"""Loading holds one tensor on the host, gives each device its part, and finds what lies beside the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from nope_jax.data.tokenizers import load_tokenizer, tokenizer_digest
from nope_jax.interop import load_pretrained, published, save_pretrained, saving
from nope_jax.paths import is_published
from tests.interop.test_families import folder_of, same
from tests.support.published import CONFIGS

ROOT = Path(__file__).parents[2]
LARGE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
PEAK = """
import resource, sys
from nope_jax.interop import load_pretrained
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_pretrained(sys.argv[1])     # JAX itself, and the compiler
before = peak()
model, _ = load_pretrained(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow  # 200 MB
def test_the_host_holds_one_tensor_besides_the_parameters(tmp_path):
    small = folder_of(tmp_path / "small", LARGE | {"num_hidden_layers": 1})
    large = folder_of(tmp_path / "large", LARGE)
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    size = (large / "model.safetensors").stat().st_size - (small / "model.safetensors").stat().st_size
    largest = 4 * 512 * 2048
    assert int(done.stdout) < size + 3 * largest < 1.2 * size


def test_shards_go_out_and_in(tmp_path, monkeypatch):
    model, _ = load_pretrained(str(folder_of(tmp_path / "model", CONFIGS["gpt2"])))
    monkeypatch.setattr(saving, "SHARD", 20_000)
    save_pretrained(model, tmp_path / "saved")
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert same(load_pretrained(str(tmp_path / "saved"))[0], model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_names_without_the_prefix_of_the_model(tmp_path, name):
    config = CONFIGS[name] | {"tie_word_embeddings": True}
    folder = folder_of(tmp_path / "model", config)
    expected, _ = load_pretrained(str(folder))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"transformer.', b'"').replace(b'"model.', b'"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert same(load_pretrained(str(folder))[0], expected)


@pytest.fixture
def with_tokenizer(tmp_path):
    """A folder of a model and a tokenizer that starts sequences with <s>, but is told to end them with <end>."""
    folder = folder_of(tmp_path / "model", CONFIGS["llama"])
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<end>", "a", "b"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_tokenizer_of_a_folder(with_tokenizer, tmp_path):
    source = published(f"hf:{with_tokenizer}")
    assert source.config.data.bos
    assert source.config.data.context_length == source.config.model.train_length == 24
    model, tokenizer = load_pretrained(str(with_tokenizer))
    again = load_tokenizer(source.config.data.tokenizer)
    assert (again.bos, again.separator, again.vocab_size) == (tokenizer.bos, tokenizer.separator, 6) == (1, 3, 6)
    assert again.encode("a b").tolist() == [4, 5]
    digest = tokenizer_digest(str(with_tokenizer))
    for number, given in enumerate([tokenizer, with_tokenizer]):
        saved = tmp_path / f"saved{number}"
        save_pretrained(model, saved, tokenizer=given)
        copy = load_pretrained(str(saved))[1]
        assert (copy.bos, copy.separator, copy.encode("b").tolist()) == (1, 3, [5])
    (with_tokenizer / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(with_tokenizer)).separator == 2
    assert tokenizer_digest(str(with_tokenizer)) != digest


def test_what_names_a_published_model():
    assert is_published("hf:gpt2")
    assert is_published("gguf:model.gguf")
    assert not is_published("runs/nope")
    assert not is_published("gs://bucket/run")
