"""Every field that shapes the decoder, against an independent decoder in NumPy, one loop and one formula at a time."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.config import Config
from nope_jax.evaluation.common.activations import walk
from nope_jax.models import decoder as decoder_module
from nope_jax.training.optimizer import layer_matrices, matrices
from tests.support.drawn_model import drawn_model
from tests.support.eight_devices import results

PLAIN = ModelConfig(
    vocab_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, model_dim=16, mlp_dim=24, train_length=12
)
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 12))
ALL_BIASES = "qkv", "out", "mlp", "norm", "head"
GEMMA = {
    "norm": "rms_plus_one",
    "norm_place": "sandwich",
    "activation": "gelu_tanh",
    "attention_scale": 0.3,
    "attention_softcap": 0.5,
    "logits_softcap": 2.0,
    "qk_norm": "head",
    "embedding_scale": 3.0,
    "residual_scale": 0.7,
    "logits_scale": 1.5,
    "biases": ALL_BIASES,
    "embedding_norm": True,
}
CASES = [
    {},
    {"activation": "gelu"},
    {"activation": "relu"},
    {"activation": "relu2", "mlp": "plain"},
    {"norm": "layer", "norm_eps": 1e-2},
    {"block": "parallel"},
    {"qk_norm": "all", "norm": "layer"},
    {"biases": ALL_BIASES, "mlp": "plain", "norm": "layer"},
    {"logits_softcap": 0.5, "logits_scale": 3.0, "tie_embeddings": True},
    GEMMA,
    {**GEMMA, "block": "parallel", "norm_place": "post", "norm": "layer", "qk_norm": "all", "mlp": "plain"},
    {**GEMMA, "block": "parallel_shared_norm"},
]
ALONE = [
    {"activation": "silu", "mlp": "plain"},
    {"norm": "rms_plus_one"},
    {"norm_place": "post"},
    {"norm_place": "sandwich"},
    {"block": "parallel_shared_norm"},
    {"qk_norm": "head"},
    *({"biases": (part,)} for part in ALL_BIASES),
    {"attention_scale": 0.1},
    {"attention_softcap": 0.2},
    {"embedding_scale": 2.0},
    {"embedding_norm": True},
    {"residual_scale": 0.3},
    {"logits_scale": 0.3},
]
"""Slow tests of what the last three have among other changes."""
everything = pytest.mark.parametrize(
    "changes",
    [CASES[-3], *(pytest.param(changes, marks=pytest.mark.slow) for changes in CASES[-2:])],
    ids=["sandwich", "post", "shared"],
)
names = pytest.mark.parametrize(
    "changes",
    [*CASES, *(pytest.param(changes, marks=pytest.mark.slow) for changes in ALONE)],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items())[:60],
)


def decoder(changes) -> Decoder:
    return drawn_model(dataclasses.replace(PLAIN, **changes))


def in_numpy(model: Decoder, tokens) -> np.ndarray:
    """The logits by the definitions, in float64, one row, layer and head at a time."""
    config = model.config
    flat = {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model))}
    p = {name: np.asarray(x, np.float64) for name, x in flat.items()}

    def norm(x, scale, bias=0.0):
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * (scale + (config.norm == "rms_plus_one")) + bias

    def cap(x, at):
        return x if at is None else at * np.tanh(x / at)

    def activation(x):
        match config.activation or {"gated": "silu", "plain": "gelu_tanh"}[config.mlp]:
            case "silu":
                return x / (1 + np.exp(-x))
            case "gelu":
                return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
            case "gelu_tanh":
                return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            case "relu":
                return np.maximum(x, 0)
            case "relu2":
                return np.maximum(x, 0) ** 2

    def attention(w, x):
        """x [T, D]"""
        heads = {}
        for name in ("query", "key", "value"):
            y = np.einsum("td,dnh->tnh", x, w[f"attention.{name}"]) + w.get(f"attention.{name}_bias", 0)
            if config.qk_norm and name != "value":
                scale = w[f"attention.{name}_norm"]
                y = norm(y, scale) if config.qk_norm == "head" else norm(y.reshape(len(y), -1), scale).reshape(y.shape)
            heads[name] = y
        q, k, v = heads.values()
        out = np.zeros(x.shape) + w.get("attention.out_bias", 0)
        for n in range(q.shape[1]):
            other = n // (q.shape[1] // k.shape[1])
            logits = q[:, n] @ k[:, other].T * (config.attention_scale or config.head_dim**-0.5)
            logits = np.where(np.tri(len(x), dtype=bool), cap(logits, config.attention_softcap), -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out += weights / weights.sum(-1, keepdims=True) @ v[:, other] @ w["attention.out"][n]
        return out

    def mlp(w, x):
        up = x @ w["mlp.up"] + w.get("mlp.up_bias", 0)
        gated = config.mlp == "gated"
        up = activation(x @ w["mlp.gate"] + w.get("mlp.gate_bias", 0)) * up if gated else activation(up)
        return up @ w["mlp.down"] + w.get("mlp.down_bias", 0)

    def row(tokens):
        x = p["embedding"][tokens] * (config.embedding_scale or config.model_dim**0.5)
        if config.embedding_norm:
            x = norm(x, p["embedding_norm"], p.get("embedding_norm_bias", 0))
        for layer in range(config.num_layers):
            w = {name.removeprefix("blocks.0."): y[layer] for name, y in p.items() if name.startswith("blocks.")}

            def normed(name, x, w=w):
                return norm(x, w[name], w.get(f"{name}_bias", 0))

            def before(name, x, normed=normed):
                return x if config.norm_place == "post" else normed(name, x)

            def after(name, x, normed=normed):
                return config.residual_scale * (x if config.norm_place == "pre" else normed(name, x))

            attended = after("attention_post_norm", attention(w, before("attention_norm", x)))
            if config.block == "sequential":
                x = x + attended
                x = x + after("mlp_post_norm", mlp(w, before("mlp_norm", x)))
            else:
                name = "mlp_norm" if config.block == "parallel" else "attention_norm"
                x = x + attended + after("mlp_post_norm", mlp(w, before(name, x)))
        x = norm(x, p["norm"], p.get("norm_bias", 0))
        products = x @ (p["embedding"].T if config.tie_embeddings else p["head"]) + p.get("head_bias", 0)
        return cap(products * config.logits_scale, config.logits_softcap)

    return np.stack([row(tokens) for tokens in np.asarray(tokens)])


@names
def test_logits_are_those_of_a_decoder_in_numpy(changes):
    model = decoder(changes)
    np.testing.assert_allclose(model(TOKENS), in_numpy(model, TOKENS), rtol=1e-4, atol=1e-4)


@everything
def test_with_everything_on_decoding_gives_the_logits_of_one_pass(changes):
    model = decoder(changes)
    cache, decoded = model.init_cache(2, 12), []
    for part in np.split(TOKENS, [6], axis=1):
        here, cache = model.decode_step(part, cache)
        decoded.append(np.asarray(here))
    np.testing.assert_allclose(np.concatenate(decoded, axis=1), model(TOKENS), rtol=1e-5, atol=1e-5)


@everything
def test_every_parameter_has_a_gradient_and_only_matrices_are_decayed_or_orthogonalized(changes):
    state = nnx.state(model := decoder(changes))
    graph = nnx.split(model)[0]
    gradient = jax.jit(jax.grad(lambda s: (nnx.merge(graph, s)(TOKENS) ** 2).mean()))(state)
    for path, x in nnx.to_flat_state(gradient):
        # The keys' bias adds the same to all logits of a query, unless something comes between it and the softmax.
        between = model.config.qk_norm or model.config.attention_softcap
        assert np.abs(x[...]).max() > 1e-7 or (path[-1] == "key_bias" and not between), path
    for path, decayed in nnx.to_flat_state(matrices(state)):
        assert decayed.get_value() == (not str(path[-1]).endswith(("norm", "bias"))), path
    for path, variable in nnx.to_flat_state(state):
        matrix = layer_matrices(nnx.from_flat_state([(path, variable)]))
        assert bool(jax.tree.leaves(matrix)) == ("blocks" in path and not str(path[-1]).endswith(("norm", "bias"))), (
            path
        )


@pytest.mark.slow  # by default without all the rest: test_models.py has remat and chunks, test_attention.py the softcap
@pytest.mark.parametrize("changes", CASES[-3:], ids=["sandwich", "post", "shared"])
def test_with_everything_on_implementations_remat_and_chunks_of_logits_agree(changes, monkeypatch, small_blocks):
    def run(chunked=False, **more):
        monkeypatch.setattr(decoder_module, "LOGITS_AT_ONCE", 32 * 8 if chunked else 2**26)
        graph, state = nnx.split(decoder({**changes, **more}))

        def loss(state):
            model = nnx.merge(graph, state)
            hidden, stats = model.hidden(TOKENS, return_stats=True)
            return model.nll(hidden, TOKENS).mean() + stats.entropy.mean(), stats

        (value, stats), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
        return value, stats, jax.tree.leaves(gradient)

    plain, other = run(attention="reference"), run(attention="streaming", remat="full", chunked=True)
    chex.assert_trees_all_close(other, plain, rtol=2e-4, atol=2e-5)


@everything
def test_with_everything_on_a_walk_ends_where_the_decoder_does(changes):
    model = decoder(changes)
    hidden, stats = model.hidden(TOKENS, return_stats=True)
    steps = list(walk(model, TOKENS, weights=True))
    last = decoder_module.apply_norm(model, "norm", model.config, steps[-1].stream)
    np.testing.assert_allclose(last, hidden, rtol=1e-4, atol=1e-4)
    weights = np.stack([step.weights for step in steps[1:]]).astype(np.float64)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    np.testing.assert_allclose(entropy, stats.entropy, rtol=1e-4, atol=1e-4)


@everything
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32_rounded(changes):
    logits, low = decoder(changes)(TOKENS), decoder({**changes, "dtype": "bfloat16"})
    hidden, stats = low.hidden(TOKENS, return_stats=True)
    rounded = low.logits(hidden)
    assert hidden.dtype == jnp.bfloat16 and rounded.dtype == stats.entropy.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(low)))
    scale = np.abs(logits).max()
    np.testing.assert_allclose(rounded, logits, atol=0.08 * scale)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    model = {"model_dim": 16, "mlp_dim": 24, "num_heads": 4, "num_kv_heads": 2, "encoding": "rope", **GEMMA}
    meshes = {"data": 1}, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
    (one, eight), _ = results("train_steps", [(mesh, model, 1) for mesh in meshes], 2)
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    chex.assert_trees_all_close(eight["state"], one["state"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"biases": ("qkv", "head", "qkv")}, "model.biases must name each kind of bias once, not qkv head qkv"),
        ({"biases": ("keys",)}, r"model.biases must be one of qkv, out, mlp, norm, head or several, not \('keys',\)"),
        ({"attention_softcap": 0.0}, "model.attention_softcap must be greater than 0, not 0"),
        ({"logits_softcap": -1.0}, "model.logits_softcap must be greater than 0, not -1"),
        ({"attention_scale": 0.0}, "model.attention_scale must be greater than 0"),
        ({"norm_eps": 0.0}, "model.norm_eps must be greater than 0"),
        ({"norm": "batch"}, "model.norm must be one of rms, rms_plus_one, layer, not 'batch'"),
        ({"block": "parallel_shared_norm", "norm_place": "post"}, "model.norm_place must be pre or sandwich with"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(model=dataclasses.replace(PLAIN, **changes))
