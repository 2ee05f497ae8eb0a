"""`save_pretrained`: a decoder as a folder that transformers loads."""

import dataclasses
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx

from nope_jax.config import ModelConfig
from nope_jax.data.tokenizers import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from nope_jax.encodings import Encoding, HeadScale, UniformScale, Wrapper
from nope_jax.interop.families import FAMILIES, Family
from nope_jax.interop.parameters import Published, Slice, published_tensors, published_values
from nope_jax.interop.rotary import head_dim, per_layer, plain, shortest_period
from nope_jax.interop.safetensors import write_file
from nope_jax.interop.settings import Settings
from nope_jax.models import Decoder

SHARD = 4 * 2**30
"""Largest size of a file of weights, bytes."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def save_pretrained(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    bos: bool | None = None,
    family: str | None = None,
) -> None:
    """Write a decoder as a Hugging Face folder: config.json, model.safetensors, generation_config.json, tokenizer.

    Scalings of RoPE are written as `rope_scaling`, NTK-aware scaling as a larger `rope_theta`; factors of HeadScale and
    UniformScale are multiplied into the queries' weights, which is the same. So is to divide the weights of what layers
    add, and the epsilon of norms, by the factor of the embeddings, where the family has none. Weights keep their dtype.

    Args:
        model: The decoder.
        path: A folder that does not exist yet, or is empty.
        tokenizer: Its tokenizer, or the folder of a published model to copy the tokenizer's files from; None for none.
            Bytes are written as byte-level BPE without merges.
        bos: Whether its sequences start with the tokenizer's BOS token (`data.bos`), which the written tokenizer then
            adds; None: as the tokenizer says itself.
        family: One of FAMILIES; None takes the first that can hold the model.

    Raises:
        ValueError: the folder is not empty, or the family (or none of them) can hold the model, or its tokenizer cannot
            be written; the message says what of it cannot be said.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or empty folder")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    config, factors = _folded(model)
    names = [family] if family else list(FAMILIES)
    try:
        own, settings, tensors = _fitting(config, names)
    except ValueError as error:
        smaller = _unscaled(config)
        if smaller is None:
            raise
        try:
            own, settings, tensors = _fitting(smaller, names)
        except ValueError:
            raise error from None
        factors |= _divided(model)
    dtype = np.dtype(model.embedding[...].dtype)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        special = _write_tokenizer(folder, tokenizer, bos)
    _write_weights(model, folder, tensors, factors, dtype)
    if jax.process_index() != 0:
        return
    settings = {
        "architectures": [own.architecture],
        "model_type": own.name,
        **settings,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # not the defaults of the family
        **special,
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
    }
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _fitting(config: ModelConfig, names: list[str]) -> tuple[Family, dict[str, Any], list[Published]]:
    """The first family that can hold a model, its settings and its tensors.

    Raises:
        ValueError: none can; the message is about the one that comes nearest.
    """
    refusals = []
    for name in names:
        family = FAMILIES[name]
        try:
            settings = family.write(config)
            differing = _differing(config, family.read(Settings(settings, "config.json")))
            if not differing:
                return family, settings, published_tensors(config, family.weights)
        except ValueError as error:
            differing = [str(error)]
            refusals.append((len(dataclasses.fields(config)), name, differing))
        else:
            refusals.append((len(differing), name, differing))
    _, name, differing = min(refusals, key=lambda refusal: refusal[0])
    nearest = f" of {name}, which comes nearest of {len(names)} families," if len(names) > 1 else f" of {name}"
    raise ValueError(f"config.json{nearest} cannot say {', '.join(differing)}")


def _differing(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """The fields in which two models differ, with our values."""
    first, second = _explicit(ours), _explicit(theirs)
    return [
        f"model.{name} {getattr(ours, name)!r}"
        for name, value in first.items()
        if not (
            math.isclose(value, second[name], rel_tol=1e-12)
            if isinstance(value, float) and isinstance(second[name], float)
            else value == second[name]
        )
    ]


def _explicit(config: ModelConfig) -> dict[str, Any]:
    """The fields that determine a model's function, without defaults that stand for other values."""
    config = config.with_defaults()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("attention", "dtype", "remat", "train_length"):
        del values[name]
    values |= {name: float(value) for name, value in values.items() if name.endswith("_scale")}
    return values | {"encoding": [plain(encoding, head_dim(config)) for encoding in per_layer(config)]}


def _folded(model: Decoder) -> tuple[ModelConfig, dict[Slice, np.ndarray]]:
    """The config without wrappers of one factor per head, and those factors for the weights that make the queries.

    Raises:
        ValueError: heads differ in their factors, but share the scale of the norm after the projection.
    """
    config, period = dataclasses.replace(model.config, vocab_size=model.config.num_tokens), len(model.encodings)
    encodings, factors = [], {}
    parameters = dict(nnx.to_flat_state(nnx.state(model)))
    for layer, encoding in enumerate(per_layer(config)):
        slot, row = layer % period, layer // period
        inner, factor = _without_factors(encoding)
        encodings.append(inner)
        scale = ("blocks", slot, "attention", "position", "head_scale")
        by_head = np.full(config.num_heads, factor, np.float64)
        if scale in parameters:
            by_head *= np.asarray(parameters[scale][...][row], np.float64)
        if inner == encoding:
            continue
        names: dict[str, np.ndarray] = {"query": by_head[:, None], "query_bias": by_head[:, None]}
        if config.qk_norm is not None:
            if config.qk_norm == "head" and len(set(by_head.tolist())) > 1:
                raise ValueError(
                    f"HeadScale of layer {layer} cannot be saved: its heads have different factors, but share the "
                    "scale of one query norm (model.qk_norm head)"
                )
            names = {"query_norm": by_head[:1] if config.qk_norm == "head" else np.repeat(by_head, head_dim(config))}
        for name, values in names.items():
            factors[Slice(("blocks", slot, "attention", name), row)] = values
    return dataclasses.replace(config, encoding=shortest_period(encodings)), factors


def _unscaled(config: ModelConfig) -> ModelConfig | None:
    """The config of the same model with a residual stream that is smaller by the factor of the embeddings.

    None if there is no such: if a part of the model reads the stream other than through a norm, or the epsilon of
    norms, which has to become smaller with the stream, is also that of a QK norm.
    """
    scale = _embedding_scale(config)
    reads_embeddings = any(type(encoding.unwrapped).input is not Encoding.input for encoding in per_layer(config))
    if scale == 1 or config.norm_place != "pre" or config.embedding_norm or config.qk_norm or reads_embeddings:
        return None
    return dataclasses.replace(config, embedding_scale=1.0, norm_eps=config.norm_eps / scale**2)


def _embedding_scale(config: ModelConfig) -> float:
    scale = config.with_defaults().embedding_scale
    assert scale is not None  # with defaults
    return scale


def _divided(model: Decoder) -> dict[Slice, np.ndarray]:
    """The factors of the weights of what layers add to the stream, for one without the factor of the embeddings."""
    added = ("attention", "out"), ("attention", "out_bias"), ("mlp", "down"), ("mlp", "down_bias")
    period, layers = len(model.encodings), range(model.config.num_layers)
    slices = (Slice(("blocks", i % period, *path), i // period) for i in layers for path in added)
    return dict.fromkeys(slices, np.asarray(1 / _embedding_scale(model.config)))


def _without_factors(encoding: Encoding) -> tuple[Encoding, float]:
    """The encoding without wrappers of one factor per head, and the product of those that are the same for all."""
    if not isinstance(encoding, Wrapper):
        return encoding, 1.0
    inner, factor = _without_factors(encoding.encoding)
    if isinstance(encoding, HeadScale):
        return inner, factor
    if isinstance(encoding, UniformScale):
        return inner, factor * encoding.factor
    return dataclasses.replace(encoding, encoding=inner), factor


def _write_weights(
    model: Decoder, folder: Path, tensors: list[Published], factors: dict[Slice, np.ndarray], dtype: np.dtype
) -> None:
    """Write the weights into files of at most SHARD bytes, one tensor in memory at a time."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room, total = SHARD, 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][tensor.name] = tensor.shape
        room, total = room - size, total + size
    values = published_values(model, tensors, factors)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        of_shard = (next(values) for _ in shapes)
        if jax.process_index() == 0:
            write_file(folder / name, shapes, dtype, of_shard)
        else:
            for _ in of_shard:  # every process takes part in gathering
                pass
    if len(shards) > 1 and jax.process_index() == 0:
        weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer | str | os.PathLike[str] | None, bos: bool | None
) -> dict[str, int]:
    """Write the tokenizer, and return the ids of its special tokens as config.json names them."""
    match tokenizer:
        case ByteTokenizer():
            # By their ids alone: a name of its own would make the separator a token that text can spell.
            _write_json(folder, _byte_level(tokenizer.vocab_size), tokenizer.bos, bos)
            names: dict[str, Any] = {}
        case JsonTokenizer():
            _write_json(folder, tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str()), tokenizer.bos, bos)
            eos, first = (tokenizer.tokenizer.id_to_token(i) for i in (tokenizer.separator, tokenizer.bos))
            names = {"eos_token": eos, "bos_token": first}
        case SentencePieceTokenizer():
            (folder / "tokenizer.model").write_bytes(tokenizer.processor.serialized_model_proto())
            if bos is not None:
                (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": bos}, indent=2) + "\n")
        case str() | os.PathLike():
            source = Path(tokenizer).expanduser()
            files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
            if not files:
                raise ValueError(f"tokenizer {source} is no folder with a tokenizer")
            for file in files:
                shutil.copyfile(file, folder / file.name)
        case None:
            pass
        case _:
            kind = type(tokenizer).__name__
            raise ValueError(f"tokenizer must be bytes, or be read from a file that transformers reads, not a {kind}")
    if isinstance(tokenizer, ByteTokenizer | JsonTokenizer):
        names = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    if isinstance(tokenizer, ByteTokenizer | JsonTokenizer | SentencePieceTokenizer):
        return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.separator}
    return {}


def _write_json(folder: Path, tokenizer: tokenizers.Tokenizer, first: int, bos: bool | None) -> None:
    """Write a tokenizer.json that starts sequences with the token `first` or not, as `bos` says."""
    if bos is not None and bos != (len(tokenizer.encode("a")) > len(tokenizer.encode("a", add_special_tokens=False))):
        name = tokenizer.id_to_token(first)
        template = tokenizers.processors.TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", "$B:1"], special_tokens=[(name, first)]
        )
        tokenizer.post_processor = template if bos else None
    tokenizer.save(str(folder / "tokenizer.json"))


def _byte_level(count: int) -> tokenizers.Tokenizer:
    """Bytes as byte-level BPE without merges: the same tokens, but for invalid UTF-8, of which it knows nothing.

    Byte-level BPE writes a byte that is no visible character of Latin-1 as one of those from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    vocabulary = {chr(byte if byte in visible else next(others)): byte for byte in range(count)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
