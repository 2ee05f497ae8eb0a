"""cuDNN's attention: what it is asked, where it is asked, and, with a GPU's compiler, that it is compiled."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.attention import alibi_attention, backends, nope_attention
from nope_jax.attention.backends import cudnn
from tests.support.attention_cases import output_and_gradients, random

B, T, N, K, H = 2, 19, 4, 2, 8


def arrays(dtype=jnp.bfloat16, length=T, head_dim=H):
    shapes = (B, length, N, head_dim), (B, length, K, head_dim), (B, length, K, head_dim)
    return [random(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]


# Part of the key of all that JAX caches: what is traced here serves no other test, nor the reverse.
_stand_in = jax.make_user_context(default_value=False)


@pytest.fixture(scope="module")
def on_a_gpu():
    """What asks for cuDNN gets XLA's attention, of the same arguments."""
    asked = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    with pytest.MonkeyPatch.context() as patch, _stand_in(True):
        patch.setattr(cudnn, "_attend", asked)
        for module in cudnn, backends:
            patch.setattr(module, "platform", lambda: "gpu")
        yield


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"window": 5, "logit_scale": np.linspace(0.5, 2.0, B * N * T, dtype=np.float32).reshape(B, N, T)},
        {"is_causal": False, "logit_scale": 2.0},
    ],
    ids=["causal", "window", "both sides"],
)
def test_it_is_asked_for_what_the_reference_computes(on_a_gpu, keywords):
    def run(implementation, *operands):
        return output_and_gradients(
            functools.partial(nope_attention, implementation=implementation, **keywords), *operands
        )

    operands = arrays()
    exact = run("reference", *(x.astype(jnp.float32) for x in operands))
    for found, wanted in zip(run("cudnn", *operands), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        limit = 2e-2 * np.abs(wanted).max()  # of bfloat16's 8 bits, and of the rounding of a scaled query
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=limit, rtol=0)


REFUSED = {
    "head dims": ([*arrays()[:2], arrays(head_dim=2 * H)[2]], {}, "value shape should be"),
    "statistics": (arrays(), {"return_stats": True}, "neither entropy nor logsumexp"),
    "segments": (arrays(), {"segment_ids": np.zeros((B, T), int)}, "knows the window alone"),
    "positions": (arrays(), {"query_positions": np.arange(T)}, "positions must be consecutive"),
    "cross": ([arrays()[0][:, 1:], *arrays()[1:]], {}, f"as many queries as keys, not {T - 1} and {T}"),
    "softcap": (arrays(), {"softcap": 5.0}, "there is a softcap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_and_left_to_others(on_a_gpu, case):
    operands, keywords, why = REFUSED[case]
    with pytest.raises(ValueError, match=f'"cudnn" cannot serve this call: .*{why}'):
        jax.eval_shape(functools.partial(nope_attention, implementation="cudnn", **keywords), *operands)
    jax.eval_shape(functools.partial(nope_attention, implementation=["cudnn", "streaming"], **keywords), *operands)


def test_it_serves_no_bias_and_no_other_machine(on_a_gpu, monkeypatch):
    with pytest.raises(ValueError, match="the encoding has a logit or a value place"):
        jax.eval_shape(functools.partial(alibi_attention, implementation="cudnn"), *arrays())
    monkeypatch.setattr(cudnn, "platform", lambda: "cpu")
    with pytest.raises(ValueError, match="it needs a GPU, not a CPU"):
        jax.eval_shape(functools.partial(nope_attention, implementation="cudnn"), *arrays())


def test_only_those_who_name_it_get_it_and_what_it_cannot_do_goes_to_the_next_name(on_a_gpu, caplog):
    assert backends.default_order(256, 256) == ("pallas_gpu", "reference")
    config = ModelConfig(num_layers=1, model_dim=32, attention=("cudnn", "reference"), dtype="bfloat16")
    tokens = np.arange(16)[None]
    with caplog.at_level(logging.DEBUG, "nope_jax.attention"):
        for keywords in {}, {"return_stats": True}:
            nnx.eval_shape(lambda keywords=keywords: Decoder(config, rngs=nnx.Rngs(0))(tokens, **keywords))
    chosen = [re.match(r'"(\w+)" for', message)[1] for message in caplog.messages]
    assert chosen == ["cudnn", "reference"]
