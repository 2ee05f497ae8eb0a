"""The tiny published models as transformers runs them, in float32 on CPU torch."""

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def model_of(settings: dict[str, Any]) -> Any:
    """A model of transformers with these settings and random weights."""
    from transformers import AutoConfig

    if settings["model_type"] == _CUSTOM:
        return _custom()({"tie_word_embeddings": True, **settings})
    config = AutoConfig.for_model(**copy.deepcopy(settings))  # which it changes
    model = _class(settings)._from_config(config, **_keywords(settings)).eval()
    if settings.get("tie_word_embeddings") is False:
        model.lm_head.weight = copy.deepcopy(model.lm_head.weight)  # T5 ties it all the same, but what is published not
    return _adapted(model, settings)


def loaded(folder: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model in a folder, and what transformers says of its tensors."""
    if settings["model_type"] == _CUSTOM:
        return _custom().from_pretrained(folder)
    model, told = _class(settings).from_pretrained(folder, **_keywords(settings), output_loading_info=True)
    return _adapted(model.eval(), settings), told


def logits_of(model: Any, ids: Any, **keywords: Any) -> np.ndarray:
    """Logits of the tokens."""
    import torch

    known = inspect.signature(model.forward).parameters
    keywords = {name: torch.as_tensor(value) for name, value in keywords.items() if name in known}
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False, **keywords).logits.numpy()


_CUSTOM = "custom_decoder_only_t5"  # which transformers has not


def _custom() -> Any:
    from tests.support.decoder_only_t5 import DecoderOnlyT5

    return DecoderOnlyT5


def _class(settings: dict[str, Any]) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(**copy.deepcopy(settings))
    if settings["model_type"] == "t5":
        return transformers.T5ForConditionalGeneration
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _keywords(settings: dict[str, Any]) -> dict[str, Any]:
    # Falcon's eager attention adds ALiBi a second time; its default, sdpa, adds it once.
    return {"attn_implementation": "sdpa" if settings.get("alibi") else "eager"}


def _adapted(model: Any, settings: dict[str, Any]) -> Any:
    if settings.get("nope"):  # as AntNLP's code does it: no rotation
        model.model.rotary_emb.forward = lambda x, position_ids: (_like(x, 1.0), _like(x, 0.0))
    if settings["model_type"] == "t5":

        def forward(ids: Any, use_cache: bool = False, attention_mask: Any = None) -> Any:
            hidden = model.decoder(ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0
            return SimpleNamespace(logits=model.lm_head(hidden * scale))

        model.forward = forward
    return model


def _like(x: Any, value: float) -> Any:
    return x.new_full((1, 1, 1), value)
