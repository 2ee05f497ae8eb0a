"""The kernels for decoding: a few queries against many keys, in interpret mode and compiled for TPUs and GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention.backends import BACKENDS, default_order
from nope_jax.attention.backends.pallas.gpu import decoding
from nope_jax.attention.blocks import CachedLayer, to_storage
from nope_jax.attention.encoded import Encoded, attend_encoded
from nope_jax.attention.mask_spec import make_mask_spec
from nope_jax.compile.estimate import find_machine
from nope_jax.config import MeshConfig
from nope_jax.encodings import ENCODINGS, FIRE, T5, AttentionSink, Forgetting, ModelDims, NoPE
from nope_jax.sharding import make_mesh
from tests.support.attention_cases import assert_close, random

B, S, N, K, H, H2 = 2, 70, 6, 2, 8, 12
DIMS = ModelDims(num_heads=N, head_dim=H, model_dim=16, train_length=S, num_kv_heads=K)


@pytest.fixture(scope="module")
def few_programs(small_blocks):
    """Blocks of 8 keys and, on a GPU, so few programs that a part has several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "PROGRAMS", 12)
        yield


def arrays(queries, keys=S):
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, H2)
    return tuple(random(*shape, seed=i) for i, shape in enumerate(shapes))


def cached(x, layer):
    """Keys or values as layer 1 of a KV cache."""
    stack = to_storage(jnp.moveaxis(x, 2, 1)[None])
    return CachedLayer(jnp.concatenate([jnp.zeros_like(stack), stack]), layer, x.dtype)


KERNELS = ("pallas_tpu", "pallas_gpu")


SEGMENTS = np.random.default_rng(1).integers(0, 8, (B, S)) // 7
CACHE = {  # rows filled to different lengths, slots in no order
    "query_positions": np.array([[33, 34], [60, 61]]),
    "key_positions": np.random.default_rng(0).permutation(S),
    "segment_ids": (np.zeros((B, 2), int), SEGMENTS),
}


def attend(operands, params, implementation, encoding, **keywords):
    """Output, entropy and logsumexp."""
    keywords = {"key_positions": jnp.arange(S)} | keywords if "query_positions" in keywords else keywords
    features = encoding.features(params, jnp.asarray(random(B, operands[1].shape[1], DIMS.model_dim)), None)
    of_queries = jax.tree.map(lambda x: x[:, -operands[0].shape[1] :], features)
    encoded = Encoded(encoding, params, of_queries, features, transformed=isinstance(operands[1], CachedLayer))
    out, stats = attend_encoded(encoded, *operands, implementation=implementation, return_stats=True, **keywords)
    return out, *stats


def parameters(encoding):
    params = jax.jit(lambda key: encoding.init_shared(key, DIMS) | encoding.init_layer(key, DIMS))(jax.random.key(0))
    return {name: np.asarray(x) + 0.3 * random(*x.shape, seed=i) for i, (name, x) in enumerate(params.items())}


of_each_chip = pytest.mark.parametrize("implementation", KERNELS)

# First what needs blocks as they are: those of `few_programs` stay until the end of the module.


def on(platform):
    """As if there were such a device."""
    device = jax.sharding.AbstractDevice("of some kind", num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_it_is_what_decoding_gets(platform):
    kernel = f"pallas_{platform}"
    with on(platform):
        assert default_order(1, 8192, cached=True) == default_order(8, 128, cached=True) == (kernel, "streaming")
        assert default_order(9, 8192, cached=True) == default_order(1, 100, cached=True) == ("streaming",)
        assert default_order(1, 8192) == (("streaming",) if platform == "tpu" else (kernel, "streaming"))
    supports = functools.partial(BACKENDS[kernel].supports, factor=None, logit=None, value_term=None, precision=None)

    def call(queries, dim, slots):
        query, stack = np.zeros((B, queries, N, dim), np.float32), np.zeros((2, B, K, slots, dim), np.float32)
        cache = CachedLayer(stack, np.int32(1), stack.dtype)
        return functools.partial(supports, query, key=cache, value=cache, mask_spec=make_mask_spec(query, cache))

    assert call(8, 64, 72)() is None
    assert call(9, 64, 72)() == "keys of a KV cache are read by another backend for more than 8 queries"
    whole, narrow, odd = call(1, 128, 72), call(1, 64, 72), call(1, 128, 70)
    why = "a KV cache must have a multiple of 8 slots and head dims that are multiples of 128, not {} and {}: "
    why += "it would be copied"
    with on(platform):
        assert whole() is None
        assert narrow() == (why.format(72, 64) if platform == "tpu" else None)
        assert odd() == (why.format(70, 128) if platform == "tpu" else None)


@pytest.mark.parametrize(
    ("machine", "name", "queries", "keys", "head_dim", "dtype"),
    [
        *(
            pytest.param(machine, *case, marks=[mark, *[pytest.mark.slow] * slow])
            for machines, mark, head_dim in (
                (("h100:1", "a100:1", "b200:1"), pytest.mark.cuda, 64),
                (("v5e:1x1", "v5p:2x2x1", "v6e:1x1"), pytest.mark.tpu, 128),
            )
            for machine in machines
            for slow, *case in (
                (machine != machines[0], "nope", 1, 131_072, 128, "bfloat16"),
                (machine != machines[0], "alibi", 4, 131_072, 128, "bfloat16"),
                (machine != machines[0], "fire", 1, 8192, 128, "bfloat16"),
                (True, "t5", 1, 8192, head_dim, "bfloat16"),
                (True, "alibi", 1, 8104, head_dim, "float32"),
                (True, "nope", 8, 8192, 256, "bfloat16"),
                (True, "nope", 1, 8192, 256, "float32"),
            )
        ),
        *(
            pytest.param(machine, "nope", 8, 8192, *case, marks=[pytest.mark.cuda, pytest.mark.slow])
            for machine in ("a100:1", "h100:1", "b200:1")
            for case in ((80, "float16"), (96, "bfloat16"))
        ),
    ],
)
def test_it_compiles_for_a_chip_and_reads_the_cache_where_it_lies(machine, name, queries, keys, head_dim, dtype):
    """Temporaries are the results of the parts on a GPU, and a bias, on a TPU twice: with G·T rows, G·T/H of a layer's
    keys and values."""
    heads, kv_heads, rows, encoding = 32, 8, 2, ENCODINGS[name]()
    dims = ModelDims(num_heads=heads, head_dim=head_dim, model_dim=64, train_length=keys, num_kv_heads=kv_heads)
    params = encoding.init_shared(jax.random.key(0), dims) | encoding.init_layer(jax.random.key(1), dims)
    mesh = make_mesh(MeshConfig(), find_machine(machine).devices()[:1])
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    stored = to_storage(jnp.zeros(1, dtype)).dtype

    def decode(query, key, value, layer, position):
        caches = (CachedLayer(x, layer, jnp.dtype(dtype)) for x in (key, value))
        where = {"query_positions": position, "key_positions": jnp.arange(keys)}
        return attend((query, *caches), params, None, encoding, **where)

    shapes = [((rows, queries, heads, head_dim), dtype), *[((3, rows, kv_heads, keys, head_dim), stored)] * 2]
    shapes += [((), "int32"), ((rows, queries), "int32")]
    with jax.set_mesh(mesh):
        program = jax.jit(decode).lower(*(jax.ShapeDtypeStruct(*x, sharding=shard) for x in shapes)).compile()
    assert len(re.findall(r" custom-call\(.*attention_decoding", program.as_text())) == 1
    bias = rows * heads * queries * keys * 4 * (name != "nope") * (2 if machine[0] == "v" else 1)
    assert program.memory_analysis().temp_size_in_bytes < 24 * 2**20 + bias


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("queries", "encoding", "keywords", "kernels"),
    [  # What the kernels are given of a logit is the same for both.
        (2, T5(max_distance=40), CACHE | {"window": 50, "softcap": 2.0}, KERNELS),
        (
            1,
            FIRE(width=3, threshold=9.0),
            {"chunk_size": 40, "segment_ids": (np.zeros((B, 1), int), CACHE["segment_ids"][1])},
            KERNELS[:1],
        ),
        (2, Forgetting(), CACHE | {"window": 50}, KERNELS[1:]),
        *(
            pytest.param(*case, KERNELS, marks=pytest.mark.slow)
            for case in (
                (3, FIRE(width=3), {"query_positions": np.arange(60, 63), "key_positions": CACHE["key_positions"]}),
                (8, T5(max_distance=40), {"is_causal": False, "qk_scale": 0.6}),
                (1, AttentionSink(T5(max_distance=40)), {"query_positions": np.array([[5], [-1]])}),
                (7, NoPE(), {"window": 9}),
            )
        ),
    ],
)
def test_values_and_statistics_are_the_reference_s(queries, encoding, keywords, kernels):
    scale = np.linspace(0.5, 1.5, B * N * queries).reshape(B, N, queries)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, operands, params):
        return attend(operands, params, implementation, encoding, logit_scale=scale, **keywords)

    params = parameters(encoding)
    wanted = run("reference", arrays(queries), params)
    for kernel in kernels:
        jax.tree.map(assert_close, run(kernel, arrays(queries), params), wanted)


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def gradient(operands, implementation):
    out, entropy, logsumexp = attend(operands, {}, implementation, NoPE())
    return (out**2).sum() + (entropy**2).sum() + logsumexp.sum()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(  # which is the same for both
    "implementation", ["pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.slow)]
)
def test_the_gradient_is_that_of_streaming(implementation):
    found, wanted = (gradient(arrays(2, 24), name) for name in (implementation, "reference"))
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), found, wanted)


@pytest.mark.usefixtures("few_programs")
@of_each_chip
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_hidden_keys_of_a_cache_may_be_anything_and_rows_may_see_none(implementation, queries, dtype):
    """What one of two queries sees reaches that one alone."""
    query, key, value = (x.astype(dtype) for x in arrays(queries))
    where = {"query_positions": np.array([[40], [-2]]) + np.arange(queries)}
    wanted = jax.jit(lambda *operands: attend(operands, {}, "reference", NoPE(), **where))(query, key, value)
    last = 39 + queries
    key[:, last + 1 :], value[:, last + 1 :] = np.nan, np.nan

    @jax.jit
    def run(query, key, value, layer):
        caches = cached(key, layer), cached(value, layer)
        return attend((query, *caches), {}, implementation, NoPE(), **where)

    found = jax.tree.map(np.asarray, run(query, key, value, 1))
    for x, clean in zip(found, wanted, strict=True):
        assert_close(x, clean, 1e-5 if dtype == "float32" else 0.01)
    assert (found[0][1, 0] == 0).all() and (found[2][1, :, 0] == -np.inf).all()
    value[0, last, :, 3] = np.inf
    touched, _, _ = run(query, key, value, 1)
    changed = np.asarray(touched) != found[0]
    assert changed[0, -1, :, 3].all() and changed.sum() == N
