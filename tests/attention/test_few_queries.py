"""A few queries against many keys, as in decoding: exact, and no more work or memory than the visible keys ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import dot_product_attention, encoded_attention, nope_attention
from nope_jax.attention.backends import default_order
from nope_jax.encodings import ENCODINGS, BlockLogit, ModelDims, Wrapper
from tests.support import oracles
from tests.support.attention_cases import IN_ATTENTION, assert_close, others_slow

B, S, N, K, H, D = 2, 70, 4, 2, 8, 16
DIMS = ModelDims(num_heads=N, head_dim=H, model_dim=D, train_length=S, num_kv_heads=K, vocab_size=8)
KINDS = [name for name in IN_ATTENTION if not issubclass(ENCODINGS[name], Wrapper)]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_hidden_keys_may_be_anything_and_rows_may_see_none():
    query, key, value = draw(2, 1, N, H), draw(2, 2048, K, H, seed=1), draw(2, 2048, K, H, seed=2)
    wanted = oracles.attention(query[:1], key[:1, :1500], value[:1, :1500])
    key[:, 1500:], value[:, 1500:] = np.nan, np.nan
    where = {"query_positions": np.array([[1499], [-1]]), "key_positions": np.arange(2048)}
    found = nope_attention(query, key, value, **where, return_stats=True)
    out, (entropy, logsumexp) = jax.tree.map(np.asarray, found)
    jax.tree.map(assert_close, (out[:1], entropy[:1], logsumexp[:1]), wanted[:3])
    assert (out[1] == 0).all() and (entropy[1] == 0).all() and (logsumexp[1] == -np.inf).all()


def test_it_is_what_decoding_gets():
    assert default_order(1, 2) == default_order(1, 8192) == default_order(64, 100) == ("streaming",)
    assert default_order(24, 24) == default_order(1, 1) == default_order(128, 256) == ("reference",)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_cache_is_neither_copied_nor_repeated_nor_padded(dtype):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), dtype) for length, heads in ((1, 8), (65537, 2), (65537, 2))]
    program = jax.jit(lambda *x: nope_attention(*x, return_stats=True)).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < shapes[1].size * shapes[1].dtype.itemsize / 8


VISITED = []


def visit(_, block):
    jax.debug.callback(lambda first: VISITED.append(int(first)), block.key_positions[0, 0])
    return jnp.zeros((1, 1, 1, 1))


@pytest.fixture
def visited():
    """The first keys of the blocks that `visit` has seen in this test."""
    VISITED.clear()
    return VISITED


@pytest.mark.parametrize(
    ("position", "window", "blocks"),
    [(0, None, [0]), (1500, None, [0, 1024]), (8191, None, list(range(0, 8192, 1024))), (8191, 900, [7168])],
)
def test_only_blocks_with_visible_keys_are_read(position, window, blocks, visited):
    query, cache = draw(1, 1, N, H), draw(1, 8192, K, H)
    arguments = {"query_positions": np.array([position]), "key_positions": np.arange(8192), "window": window}
    jax.block_until_ready(dot_product_attention(query, cache, cache, logit=BlockLogit(visit), **arguments))
    jax.effects_barrier()
    assert visited == blocks


# The last test, because these blocks stay until the end of the module: of 8 queries and 32 keys, so that the last of
# three overlaps the one before it.
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", others_slow(KINDS, but={"nope", "rope", "t5", "fire", "shaw", "cope", "forgetting"}))
def test_it_is_the_definition_in_value_statistics_and_gradient(name):
    """A cache that rows fill to different lengths, keys in no order, and every way to hide a key."""
    encoding = ENCODINGS[name]().bind(DIMS)
    params = jax.jit(lambda key: encoding.init_shared(key, DIMS) | encoding.init_layer(key, DIMS))(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3 * draw(*x.shape, seed=2), params)
    arrays = draw(B, 2, N, H), draw(B, S, K, H, seed=1), draw(B, S, K, H, seed=2), draw(B, S, D, seed=3)
    draws = np.random.default_rng(4)
    common = {
        "query_positions": np.array([[33, 34], [60, 61]]),
        "key_positions": np.arange(S) if name == "cope" else draws.permutation(S),
        "segment_ids": (np.zeros((B, 2), int), draws.integers(0, 8, (B, S)) // 7),
        "mask": draws.random((1, N, 2, S)) < 0.9,
        "window": 50,
        "softcap": 2.0,
    }

    def run(implementation):
        def total(params, arrays):
            query, key, value, inputs = arrays
            features = encoding.features(params, inputs, None)
            out, stats = encoded_attention(
                encoding,
                params,
                query,
                key,
                value,
                query_features=jax.tree.map(lambda x: x[:, :2], features),
                key_features=features,
                logit_scale=np.linspace(0.5, 1.5, N, dtype=np.float32),
                implementation=implementation,
                return_stats=True,
                **common,
            )
            return (out**2).sum() + stats.entropy.sum() + stats.logsumexp.sum(), (out, *stats)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, arrays)

    (values, gradient), (wanted, wanted_gradient) = run("streaming"), run("reference")
    jax.tree.map(assert_close, values, wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=5e-5), gradient, wanted_gradient)
