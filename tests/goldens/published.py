"""Logits of a tiny model of every published family (tests/support/published.py), from transformers."""


def make():
    """For every config: logits of two rows, within and beyond the trained length, at some positions and tokens."""
    import copy

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.published import CONFIGS, POSITIONS, VOCABULARY, golden_tokens, weight

    goldens = {}
    for name, settings in CONFIGS.items():
        config = AutoConfig.for_model(**copy.deepcopy(settings))  # which it changes
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for own, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(weight(own, tuple(parameter.shape))))
        ids = torch.as_tensor(golden_tokens(settings.get("n_positions")))
        logits = model(ids, use_cache=False).logits
        goldens[name] = logits[:, POSITIONS][..., VOCABULARY].tolist()
    return goldens
