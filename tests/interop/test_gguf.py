"""Models and tokenizers in GGUF are those of the folder and of the tokenizer that they were made from."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from nope_jax.data.tokenizers import load_tokenizer, tokenizer_digest
from nope_jax.interop import load_pretrained, published
from nope_jax.interop.families import GGUF_FAMILIES
from nope_jax.interop.weights import PLACES, Weight
from tests.interop.test_families import arrays, folder_of, same
from tests.support import numpy_llama
from tests.support.gguf_files import write_gguf
from tests.support.published import CONFIGS, tokens, weight

TEXT = [
    "The year 1984 isn't 12,345 days long.\n\n",
    "def f(x):\n    return x*x  # naïve 東京 💡\n",
    "  \t\tŒuvre № 42²!",
]


def tensors_of(config, folder):
    """The tensors of the folder by name."""
    header = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    return {name: weight(name, tuple(entry["shape"])) for name, entry in json.loads(header[8 : 8 + length]).items()}


# What GGUF does not say, but llama.cpp takes for granted.
GRANTED = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {
        "query_pre_attn_scalar": 12, "sliding_window_pattern": 6, "num_hidden_layers": 6, "rope_scaling": None,
        "rope_local_base_freq": 1e4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_a_model_is_that_of_the_folder(name, tmp_path):
    family = GGUF_FAMILIES[name].name
    config = next(config for config in CONFIGS.values() if config["model_type"] == family) | GRANTED.get(name, {})
    config = config | {"seq_length": 24} if name == "bloom" else config
    folder = folder_of(tmp_path / "folder", config)
    file = write_gguf(tmp_path / "model.gguf", config, tensors_of(config, folder))
    expected, _ = load_pretrained(str(folder))
    model, tokenizer = load_pretrained(f"gguf:{file}")
    assert tokenizer is None
    assert model.config.encoding == expected.config.encoding
    if name.startswith("gemma"):  # whose norms lose bits when 1 is added to them
        theirs = arrays(expected)
        for path, value in arrays(model).items():
            np.testing.assert_allclose(value, theirs[path], atol=1e-6)
    else:
        assert same(model, expected)
    for field in dataclasses.fields(expected.config):  # whose decoders are the same then
        ours, theirs = (getattr(decoder.config, field.name) for decoder in (model, expected))
        assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs), field.name


def test_losses_are_those_of_an_independent_forward_pass(tmp_path):
    config = CONFIGS["llama"] | {"rms_norm_eps": 1e-5, "rope_theta": 100.0, "intermediate_size": 64}
    weights = tensors_of(config, folder_of(tmp_path / "folder", config))
    file = write_gguf(tmp_path / "model.gguf", config, weights, quantised="Q8_0")
    model, _ = load_pretrained(f"gguf:{file}")
    (ids,) = tokens(1, 21)
    (logits,) = np.asarray(model(ids[None, :-1]), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(losses, numpy_llama.nll(str(file), ids), atol=1e-4)


def test_quantised_weights_are_near_and_bfloat16_is_kept(tmp_path):
    config = {**CONFIGS["qwen2"], "intermediate_size": 64}
    folder = folder_of(tmp_path / "folder", config)
    weights = tensors_of(config, folder)
    exact, near = (
        load_pretrained(f"gguf:{write_gguf(tmp_path / f'{kind}.gguf', config, weights, quantised=kind)}")[0]
        for kind in (None, "Q8_0")
    )
    for path, value in arrays(exact).items():
        np.testing.assert_allclose(arrays(near)[path], value, atol=0.02)
    assert not same(exact, near)
    half, _ = load_pretrained(str(folder), dtype="bfloat16")
    for path, value in arrays(half).items():
        assert value.dtype == "bfloat16"
        np.testing.assert_allclose(value.astype(np.float32), arrays(exact)[path], rtol=2**-8)


def test_scalings_of_rope(tmp_path):
    config = CONFIGS["llama"]
    weights = tensors_of(config, folder_of(tmp_path / "folder", config))
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2}
    linear = published(f"gguf:{write_gguf(tmp_path / 'linear.gguf', config, weights, more=more)}").config.model
    assert linear.encoding.scaling.factor == 2
    factors = np.array([1, 2, 4, 8], np.float32)  # Llama 3.1's
    file = write_gguf(tmp_path / "factors.gguf", config, weights | {"rope_freqs.weight": factors})
    model, _ = load_pretrained(f"gguf:{file}")
    assert model.config.encoding.scaling.long_factors == (1.0, 2.0, 4.0, 8.0)
    assert model.config.encoding.scaling.amplitude == 1


def test_identity_changes_with_the_model(tmp_path):
    config = CONFIGS["llama"]
    folder = folder_of(tmp_path / "folder", config)
    weights = tensors_of(config, folder)
    identities = [published(str(folder)).identity]
    for count in (1, 2):
        file = write_gguf(tmp_path / "model.gguf", config, weights, more={"llama.rope.scaling.factor": count})
        identities.append(published(f"gguf:{file}").identity)
    assert len(set(identities)) == 3
    assert identities[0] == published(f"hf:{folder}").identity


def byte_level(*splits):
    """A byte-level BPE trained on a little text, with its own way to split it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


# What the tokenizer.json of SmolLM, GPT-2 and Llama 3 have.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "llama-bpe": (
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_byte_level_tokenizer_is_the_original(name, tmp_path):
    original = byte_level(*SPLITS[name])
    settings = json.loads(original.to_str())["model"]
    vocabulary = sorted(settings["vocab"], key=settings["vocab"].get)
    own = {
        "model": "gpt2",
        "pre": name,
        "tokens": vocabulary,
        "token_type": [3 if token.startswith("<|") else 1 for token in vocabulary],
        "merges": [" ".join(merge) for merge in settings["merges"]],
        "eos_token_id": 0,
    }
    config = CONFIGS["llama"] | {"vocab_size": 320}
    weights = tensors_of(config, folder_of(tmp_path / "folder", config))
    file = write_gguf(tmp_path / "model.gguf", config, weights, tokenizer=own)
    _, tokenizer = load_pretrained(f"gguf:{file}")
    assert (tokenizer.vocab_size, tokenizer.separator) == (len(vocabulary), 0)
    for text in [*TEXT, "".join(TEXT), "<|im_start|>user 007<|endoftext|>"]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == original.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert published(f"gguf:{file}").config.data.tokenizer == str(file)
    assert tokenizer_digest(str(file)) == tokenizer_digest(str(file.rename(tmp_path / "other.gguf")))


def test_a_sentencepiece_tokenizer_is_the_original(tmp_path):
    prefix = tmp_path / "own"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT * 20 for line in text.splitlines()), model_prefix=str(prefix),
        vocab_size=330, model_type="bpe", byte_fallback=True, character_coverage=0.98, minloglevel=9,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    ids = range(original.vocab_size())
    kinds = [
        6 if original.is_byte(i) else 2 if original.is_unknown(i) else 3 if original.is_control(i) else 1 for i in ids
    ]
    own = {
        "model": "llama",
        "tokens": [original.id_to_piece(i) for i in ids],
        "scores": [float(original.get_score(i)) for i in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    config = CONFIGS["llama"] | {"vocab_size": 330}
    weights = tensors_of(config, folder_of(tmp_path / "folder", config))
    file = write_gguf(tmp_path / "model.gguf", config, weights, tokenizer=own)
    assert published(f"gguf:{file}").config.data.bos
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.bos, tokenizer.separator) == (1, 2)
    for text in [*TEXT, "".join(TEXT), "ß and 1 2 3"]:
        assert tokenizer.encode(text).tolist() == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


SIZES = {"D": 6, "N": 4, "K": 2, "H": 4, "F": 5, "V": 7}
QKV = "attention/query", "attention/key", "attention/value"


@pytest.mark.parametrize(
    ("weight", "shape"),
    [
        (Weight("", "(K * H) D", *QKV), (32, 6)),
        (Weight("", "D (* H)", *QKV), (6, 32)),
        (Weight("", "(N h c) D", "attention/query"), (16, 6)),
        (Weight("", "(* H)", *(f"{place}_bias" for place in QKV)), (32,)),
        (Weight("", "D (N H)", "attention/out"), (6, 16)),
        (Weight("", "(* F) D", "mlp/gate", "mlp/up"), None),
    ],
)
def test_packing_is_the_reverse_of_unpacking(weight, shape):
    if shape is None:
        weight, shape = Weight("", "* D", "mlp/gate", "mlp/up"), (10, 6)
    assert weight.shape(SIZES, ()) == shape
    whole = np.arange(math.prod(shape)).reshape(shape)
    parts = weight.unpack(whole, SIZES)
    for part, place in zip(parts, weight.places, strict=True):
        assert part.shape == tuple(SIZES[axis] for axis in PLACES[place].split())
    np.testing.assert_array_equal(weight.pack(parts, SIZES), whole)
    values = itertools.chain.from_iterable(part.ravel().tolist() for part in parts)
    assert sorted(values) == list(range(whole.size))
