"""Splash attention: what it computes, what it refuses, and, with a TPU's compiler, what it is compiled to."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import alibi_attention, backends, nope_attention
from nope_jax.attention.backends.splash.attention import Rule
from nope_jax.attention.softmax_state import RESULTS
from tests.attention.test_pallas import mesh_of
from tests.attention.test_pallas_compiled import compiled_for
from tests.support.attention_cases import output_and_gradients, random

B, N, K, H = 2, 4, 2, 8
splash = functools.partial(nope_attention, implementation="splash")


def arrays(query_length, key_length, value_dim=H):
    shapes = (B, query_length, N, H), (B, key_length, K, H), (B, key_length, K, value_dim)
    return [random(*shape, seed=i) for i, shape in enumerate(shapes)]


def segments(length, seed=0):
    return np.sort(np.random.default_rng(seed).integers(0, 3, (B, length)), axis=1)


def gradient_of(attend):
    return jax.grad(lambda *operands: (attend(*operands).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))


def kernels(program):
    """Names of the kernels that a program calls."""
    return sorted(re.findall(r"%?(splash_mha_[a-z]+)\w*[.\d]* = .* custom-call\(.*tpu_custom_call", program.as_text()))


GRADIENT = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
CASES = {
    "causal, all in float32": (
        (140, 200, 5),
        {"segment_ids": (segments(140), segments(200)), "softcap": 1.5, "window": 90}
        | {"logit_scale": np.linspace(0.5, 4.0, B * N * 140, dtype=np.float32).reshape(B, N, 140)},
        "float32",
        1e-5,
    ),
    "both sides, of which some queries see no key, in bfloat16": (
        (200, 130, H),
        {"is_causal": False, "window": 60, "chunk_size": 70},
        "bfloat16",
        2e-2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_reference_does(case):
    lengths, keywords, dtype, tolerance = CASES[case]

    def run(implementation, *operands):
        return output_and_gradients(
            functools.partial(nope_attention, implementation=implementation, **keywords), *operands
        )

    operands = [x.astype(dtype) for x in arrays(*lengths)]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = run("splash", *operands)
    exact = run("reference", *(x.astype(jnp.float32) for x in operands))
    unseen = np.all(exact[0] == 0, axis=(0, 2, 3))
    assert unseen.any() == ("no key" in case) and not unseen.all()
    for actual, wanted in zip(found, exact, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(jnp.float32), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_what_is_visible_in_a_block_is_known_without_computing_it(is_causal):
    """With chunks, a block may be visited in vain, but none that is needed is left out."""
    size = 8
    for (queries, keys), window, chunk_size in itertools.product(
        [(40, 40), (13, 40), (40, 13)], [None, *range(1, 20)], [None, 1, 5, 8, 24]
    ):
        filled = queries + -queries % size, keys + -keys % size
        rule = Rule(queries, keys, filled, is_causal, window, chunk_size)
        whole = rule.mask_function(*np.broadcast_arrays(rule.q_sequence[:, None], np.arange(filled[1])))
        for i, j in itertools.product(range(0, filled[0], size), range(0, filled[1], size)):
            block = slice(i, i + size), slice(j, j + size)
            assert rule[block].all() == whole[block].all()
            assert rule[block].any() == whole[block].any() or (rule[block].any() and chunk_size is not None)


REFUSED = {
    "statistics": ({"return_stats": True}, "neither entropy nor logsumexp"),
    "mask": ({"mask": np.ones((9, 9), bool)}, "there is a mask"),
    "positions": ({"query_positions": np.arange(9)}, "positions must be consecutive"),
    "precision": ({"precision": "highest"}, "the default precision of products alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_and_left_to_others(case):
    keywords, why = REFUSED[case]
    with pytest.raises(ValueError, match=f'"splash" cannot serve this call: .*{why}'):
        jax.eval_shape(functools.partial(splash, **keywords), *arrays(9, 9))
    jax.eval_shape(functools.partial(nope_attention, implementation=["splash", "streaming"], **keywords), *arrays(9, 9))


def test_it_serves_no_bias_no_other_dtypes_and_no_64_bits():
    query, key, value = arrays(9, 9)
    with pytest.raises(ValueError, match="the encoding has a logit or a value place"):
        jax.eval_shape(functools.partial(alibi_attention, implementation="splash"), query, key, value)
    for dtype in "float16", "bfloat16":
        with pytest.raises(ValueError, match=f"all be float32 or all bfloat16, not float32, {dtype} and {dtype}"):
            jax.eval_shape(splash, query, key.astype(dtype), value.astype(dtype))
    with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64 is on"):
        jax.eval_shape(splash, query, key, value)


def test_it_serves_one_device_or_rows_and_heads_of_several_and_no_gpu():
    operands = [jax.ShapeDtypeStruct((2, 128, 4, H), jnp.bfloat16)] * 3
    with mesh_of("tpu", "data", "tensor"):
        program = str(jax.make_jaxpr(splash)(*operands))
    assert "shard_map" in program and "bf16[1,2,128,8]" in program and "interpret=False" in program
    with mesh_of("tpu", "sequence"), pytest.raises(ValueError, match="it needs all keys, and the sequence is sharded"):
        jax.eval_shape(splash, *operands)
    with mesh_of("gpu", "data"), pytest.raises(ValueError, match="it needs a TPU .* not a GPU"):
        jax.eval_shape(splash, *operands)
    with mesh_of("tpu", "data"):
        assert backends.default_order(256, 256) == ("pallas_tpu", "reference")


@pytest.mark.tpu
@pytest.mark.parametrize("length", [4096, 131_072])
@pytest.mark.parametrize("machine", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_it_compiles_for_a_chip_in_memory_that_grows_with_length(machine, length):
    """No array has two axes of the length, and temporaries are those of six arrays."""
    program = compiled_for(machine, gradient_of(splash), [(length, heads, 128) for heads in (8, 2, 2)])
    assert kernels(program) == GRADIENT
    assert not re.search(rf"\[[\d,]*{length},(?:\d+,)*{length}[\],]", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 6 * 2 * 8 * length * 128


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (80, "bfloat16"), (96, "bfloat16"), (256, "float32")])
def test_it_compiles_for_head_dims_and_lengths(machine, head_dim, dtype):
    of_segments = tuple(np.zeros((1, length), int) for length in (100, 1000))
    rules = {"segment_ids": of_segments, "is_causal": False, "window": 600, "chunk_size": 700, "softcap": 30.0}
    sizes = [(100, 4, head_dim), (1000, 2, head_dim), (1000, 2, 64)]
    program = compiled_for(machine, gradient_of(functools.partial(splash, **rules)), sizes, dtype)
    assert kernels(program) == GRADIENT


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("policy", "forward"), [(None, 2), (jax.checkpoint_policies.save_only_these_names(RESULTS), 1)]
)
def test_where_a_policy_keeps_the_results_the_forward_kernel_is_not_run_again(policy, forward):
    def attend(query, key, value):
        layer = jax.checkpoint(lambda x, _: (x + splash(x, key, value), None), policy=policy)
        return jax.lax.scan(layer, query, None, length=3)[0]

    program = compiled_for("v5e:1x1", gradient_of(attend), [(256, heads, 64) for heads in (4, 2, 2)])
    assert kernels(program) == [*GRADIENT[:2], *GRADIENT[2:] * forward]
