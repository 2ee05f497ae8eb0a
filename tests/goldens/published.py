"""Logits of a tiny model of every published family (tests/support/published.py), from transformers."""


def make():
    """For every config: logits of two rows, within and beyond the trained length, at some positions and tokens."""
    import torch

    from tests.support.published import CONFIGS, POSITIONS, VOCABULARY, golden_tokens, weight
    from tests.support.transformers_models import logits_of, model_of

    goldens = {}
    for name, settings in CONFIGS.items():
        model = model_of(settings)
        for own, parameter in model.named_parameters():
            published = own.replace("lm_head", "embed_out") if settings["model_type"] == "gpt_neox" else own
            parameter.copy_(torch.as_tensor(weight(published, tuple(parameter.shape))))
        longest = settings["n_positions"] if settings["model_type"] == "gpt2" else None
        logits = logits_of(model, golden_tokens(longest))
        goldens[name] = logits[:, POSITIONS][..., VOCABULARY].tolist()
    return goldens
