"""A RoPE and a NoPE layer's attention of SmolLM3, Cohere 2 and Llama 4, and which layers are which (`regenerate.py`).

Small models with random weights run on random tokens; what goes into and comes out of attention is caught on the way,
so that rotation, window or chunks, mask and temperature are all theirs. Windows and chunks are shorter than the text.
"""

LENGTH, LAYERS, WINDOW = 11, 8, 4
SHAPE = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip


def make():
    """All goldens, as a tree of lists and numbers."""
    return {"smollm3": smollm3(), "rnope_swa": cohere2(), "llama4": llama4()}


def smollm3():
    """With the base of SmolLM3-3B's configuration; the model class has another by default."""
    from transformers import SmolLM3Config, SmolLM3Model

    config = SmolLM3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0})
    return {"layers": config.no_rope_layers, **attention(SmolLM3Model, config)}


def cohere2():
    """With the base of Command R7B's configuration; the model class has another by default."""
    from transformers import Cohere2Config, Cohere2Model

    parameters = {"rope_type": "default", "rope_theta": 50_000.0}
    config = Cohere2Config(**SHAPE, sliding_window=WINDOW, rope_parameters=parameters)
    layers = [int(kind == "sliding_attention") for kind in config.layer_types]
    return {"layers": layers, "window": WINDOW, **attention(Cohere2Model, config)}


def llama4():
    """Without its L2 norm of turned queries and keys, and with a temperature that moves within the short text."""
    from transformers import Llama4TextConfig, Llama4TextModel

    config = Llama4TextConfig(
        **SHAPE, head_dim=8, attention_chunk_size=WINDOW, use_qk_norm=False, floor_scale=3, attn_scale=0.7,
        intermediate_size_mlp=16, moe_layers=[],
    )  # fmt: skip
    settings = {"chunk_size": WINDOW, "floor_scale": 3, "scale": 0.7}
    return {"layers": config.no_rope_layers, **settings, **attention(Llama4TextModel, config)}


def attention(model_class, config):
    """What enters and leaves attention of layer 2, a RoPE layer, and of layer 3, a NoPE layer."""
    import torch

    torch.manual_seed(0)
    model = model_class(config).eval()
    caught = {}

    def catch(module, name, of_input):
        def hook(_, inputs, output):
            x = inputs[0] if of_input else output
            caught[name] = x.reshape(1, LENGTH, -1, 8).tolist()

        module.register_forward_hook(hook)

    for kind, layer in (("rope", 2), ("nope", 3)):
        of = model.layers[layer].self_attn
        for name in ("query", "key", "value"):
            catch(getattr(of, f"{name[0]}_proj"), (kind, name), of_input=False)
        catch(of.o_proj, (kind, "out"), of_input=True)
    model(torch.randint(0, SHAPE["vocab_size"], (1, LENGTH)), use_cache=False)
    names = ("query", "key", "value", "out")
    return {kind: {name: caught[kind, name] for name in names} for kind in ("rope", "nope")}
