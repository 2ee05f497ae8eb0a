"""Families of published models, one file each: a table from the names of tensors to places in the decoder, and the
settings of config.json, in and out.

To add one:

1. Write `<model_type>.py` with a `FAMILY` (`family.py` explains its fields): a table of `Weight`s (`..weights` explains
   their language; parts of Llama's serve most), `read`, which turns config.json into a ModelConfig, and `write`, its
   reverse. Read every setting that changes the logits, or refuse other values with `settings.only`; what is left
   unread is refused by name. If llama.cpp has it too, add `gguf`, with its names of tensors and settings.
2. Add it to FAMILIES below. The order is that in which `save_pretrained` looks for one that can hold a model.
3. Add a config.json to `CONFIGS` of tests/support/published.py, with one row for each way in which the family can
   vary. The tests of tests/interop do the rest: against stored logits (make those with
   `python tests/goldens/regenerate.py published`), and live against transformers with `-m oracle`.

What the decoder cannot compute is a field of ModelConfig to add first; nothing here computes anything.
"""

from types import MappingProxyType

from nope_jax.interop.families import (
    bloom,
    cohere,
    cohere2,
    custom_t5,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    granite,
    llama,
    mistral,
    mpt,
    olmo2,
    olmo3,
    qwen2,
    qwen3,
    smollm3,
    t5,
)
from nope_jax.interop.families.family import Family

FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {
        module.FAMILY.name: module.FAMILY
        for module in (
            llama,
            mistral,
            qwen2,
            qwen3,
            smollm3,
            olmo2,
            olmo3,
            exaone4,
            granite,
            gemma,
            gemma2,
            gemma3,
            cohere,
            cohere2,
            gpt2,
            gpt_neox,
            gptj,
            bloom,
            mpt,
            falcon,
            t5,
            custom_t5,
        )
    }
)
"""All families by `model_type`."""

_EXPERTS = (
    "cohere2_moe dbrx deepseek_v2 deepseek_v3 ernie4_5_moe exaone_moe glm4_moe granitemoe minimax_m2 mixtral olmoe "
    "phimoe qwen2_moe qwen3_moe"
)
_RECURRENT = (
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_next "
    "recurrent_gemma rwkv xlstm zamba zamba2"
)
REFUSED: MappingProxyType[str, str] = MappingProxyType(
    dict.fromkeys(_EXPERTS.split(), "experts")
    | dict.fromkeys(_RECURRENT.split(), "recurrent layers")
    | {
        "gemma3": "images (the text model is gemma3_text)",
        "gemma4": "images, and embeddings for every layer (its RoPE has ProportionalScaling)",
        "gemma4_text": "embeddings for every layer (its RoPE has ProportionalScaling)",
        "gpt_oss": "experts (its attention sinks are the encoding AttentionSink)",
        "lfm2": "convolutions in place of attention",
        "lfm2_moe": "convolutions in place of attention, and experts",
        "lfm3": "convolutions in place of attention (its RoPE has ProportionalScaling)",
    }
)
"""What known models have that the decoder has not, by `model_type`."""

GGUF_FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf}
)
"""All families that are read from GGUF, by `general.architecture`."""
