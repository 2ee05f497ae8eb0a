"""Published models, in and out: Hugging Face folders and names, and GGUF files.

    model, tokenizer = load_pretrained("hf:HuggingFaceTB/SmolLM2-135M")     # a name, or a folder
    model, tokenizer = load_pretrained("gguf:SmolLM2-135M.Q4_1.gguf")
    save_pretrained(model, "folder", tokenizer=tokenizer)                    # transformers loads it

`published(...)` reads the settings alone. `families` says which models are supported, and how to add one.
"""

from jax.sharding import Mesh

from nope_jax.data.tokenizers import Tokenizer
from nope_jax.interop.families import FAMILIES
from nope_jax.interop.gguf import GGUFModel
from nope_jax.interop.huggingface import HuggingFaceModel
from nope_jax.interop.published import Dtype, PublishedModel
from nope_jax.interop.saving import save_pretrained
from nope_jax.models import Decoder

__all__ = ["FAMILIES", "Dtype", "PublishedModel", "load_pretrained", "published", "save_pretrained"]

_SOURCES = {"hf": HuggingFaceModel, "gguf": GGUFModel}


def published(spec: str) -> PublishedModel:
    """Find a published model and read its settings, but no weights.

    Args:
        spec: hf:FOLDER, hf:NAME or hf:NAME@REVISION for a model of Hugging Face, gguf:FILE, or a bare folder.

    Raises:
        ValueError: there is no such model, or it is not supported.
    """
    kind, colon, name = spec.partition(":")
    if not colon or kind not in _SOURCES:
        return HuggingFaceModel(spec)
    if not name:
        raise ValueError(f"{spec} must name a model after the colon, as in hf:NAME_OR_FOLDER or gguf:FILE")
    return _SOURCES[kind](name)


def load_pretrained(
    path_or_name: str, *, mesh: Mesh | None = None, dtype: Dtype = "float32"
) -> tuple[Decoder, Tokenizer | None]:
    """Load a published model.

    Args:
        path_or_name: As `published`.
        mesh: Devices to shard the parameters over; None puts them all on the first device of this process.
        dtype: Of parameters and computation.

    Returns:
        The decoder, and its tokenizer, or None if there is none beside the weights.

    Raises:
        ValueError: there is no such model, it is not supported, its files are damaged, or its tokenizer does not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    source = published(path_or_name)
    tokenizer = source.tokenizer
    return source.load(mesh, dtype), tokenizer
