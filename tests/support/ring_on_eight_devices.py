"""Attention over a mesh is the attention of one device: run by test_eight_devices.py."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nope_jax import Decoder, ModelConfig, attention
from nope_jax.attention import dot_product_attention, encoded_attention
from nope_jax.config import MeshConfig
from nope_jax.encodings import ENCODINGS, AttentionSink, BlockLogit, LogN, ModelDims, Windowed
from nope_jax.evaluation.common.placement import Placement, evaluation_mesh, on_mesh
from nope_jax.evaluation.perplexity.measure import evaluation_step, measure
from nope_jax.sharding import make_mesh, place_batch
from tests.support.attention_cases import IN_ATTENTION, assert_close, expected

B, T, N, K, H, D = 4, 128, 4, 2, 8, 16
SIZES = ModelDims(num_heads=N, head_dim=H, model_dim=D, train_length=T, num_kv_heads=K, vocab_size=32)
RING, ALL = {"data": 1, "tensor": 2, "sequence": 4}, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
EXCHANGES = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")

pytestmark = pytest.mark.usefixtures("small_blocks")
slow = pytest.mark.slow


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parameters(encoding):
    """Initial parameters, each moved a little, so that none is where it has no effect."""
    params = encoding.init_shared(jax.random.key(0), SIZES) | encoding.init_layer(jax.random.key(1), SIZES)
    moved = {name: draw(*x.shape, seed=i) for i, (name, x) in enumerate(params.items())}
    return {name: np.asarray(x) + np.float32(0.3) * moved[name] for name, x in params.items()}


def operands(keys=T, queries=T):
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, H), (B, keys, D)
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


def place(mesh, arrays):
    """Queries, keys, values and inputs as a model has them: rows, positions and heads spread."""
    heads = PartitionSpec(("data", "fsdp"), "sequence", "tensor")
    specs = heads, heads, heads, PartitionSpec(("data", "fsdp"), "sequence")
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def function_of(encoding, **common):
    """Output, statistics and gradient of one layer's attention."""

    def loss(params, query, key, value, inputs, logit_scale):
        features = encoding.features(params, inputs, None)
        out, stats = encoded_attention(
            encoding,
            params,
            query,
            key,
            value,
            query_features=jax.tree.map(lambda x: x[:, -query.shape[1] :], features),
            key_features=features,
            logit_scale=logit_scale,
            return_stats=True,
            **common,
        )
        some = jnp.isfinite(stats.logsumexp)  # rows that see no key
        total = (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (stats.entropy**2).sum()
        return total + jnp.where(some, stats.logsumexp, 0.0).sum(), (out, *stats)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))


def assert_mesh_changes_nothing(encoding, axes, arrays=None, implementation=None, **common):
    """Attention over a mesh against that of one device that writes its weights out; returns the mesh's program."""
    arrays, params, logit_scale = arrays or operands(), parameters(encoding), np.linspace(0.5, 1.5, N, dtype=np.float32)
    reference = function_of(encoding, implementation="reference", **common)
    (_, wanted), wanted_gradient = reference(params, *arrays, logit_scale)
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        arguments = params, *place(mesh, arrays), logit_scale
        compiled = function_of(encoding, implementation=implementation, **common).lower(*arguments).compile()
        (_, values), gradient = compiled(*arguments)
    jax.tree.map(assert_close, values, wanted)
    # A gradient sums over rows and blocks in another order, with the cancellation that comes with it.
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), gradient, wanted_gradient)
    return compiled.as_text()


def exchanged(text):
    """The ways in which attention sends anything between devices."""
    return {match[1] for line in text.splitlines() if "shard_map" in line and (match := EXCHANGES.search(line))}


def assert_a_ring_is_one_device(encoding, **common):
    text = assert_mesh_changes_nothing(encoding.bind(SIZES), RING, **common)
    assert exchanged(text) == {"collective-permute", "all-reduce"}  # the latter of the parameters' gradients


@slow
@pytest.mark.parametrize("name", IN_ATTENTION)
def test_a_ring_is_one_device(name):
    assert_a_ring_is_one_device(ENCODINGS[name]())


# Forgetting attention has features of each token, with heads of their own.
@pytest.mark.parametrize("name", ["t5", "forgetting", *(pytest.param(name, marks=slow) for name in ("shaw", "cope"))])
def test_scale_soft_cap_and_sink_in_a_ring(name):
    # With a qk_scale of 0.6, one of CoPE's counts is an integer but for rounding, where its gradient jumps.
    assert_a_ring_is_one_device(AttentionSink(ENCODINGS[name]()), qk_scale=0.5, softcap=0.7)


@slow
@pytest.mark.parametrize("name", ["t5", "shaw", "cope"])
def test_dtypes_may_be_mixed_in_a_ring(name):
    """And a key that no query sees may be NaN."""
    encoding, last = ENCODINGS[name]().bind(SIZES), np.tile(np.arange(T) == T - 1, (B, 1))
    params, segments = parameters(encoding), (0 * last, 1 * last)
    query, key, value, inputs = operands()
    key[:, -1] = np.nan
    arrays = query, key.astype(jnp.bfloat16), value.astype(jnp.float16), inputs

    def run(arrays, **common):
        def loss(*arrays):
            out, stats = encoded_attention(encoding, params, *arrays, segment_ids=segments, return_stats=True, **common)
            total = (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (stats.entropy**2).sum()
            return total, (out.astype(jnp.float32), stats.entropy)

        (_, values), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays[:3])
        return values, gradient

    wanted, wanted_gradient = run(arrays, implementation="reference")
    mesh = make_mesh(MeshConfig(**RING))
    with jax.set_mesh(mesh):
        values, gradient = run(place(mesh, arrays))
    jax.tree.map(functools.partial(assert_close, tolerance=2e-3), values, wanted)
    jax.tree.map(functools.partial(assert_close, tolerance=0.02), gradient, wanted_gradient)


@slow
@pytest.mark.parametrize("name", IN_ATTENTION)
def test_all_axes_at_once_are_one_device(name):
    assert_mesh_changes_nothing(ENCODINGS[name]().bind(SIZES), ALL)


@slow
@pytest.mark.parametrize("name", ["t5", "transformer_xl", "forgetting", "cope"])
def test_without_a_ring_nothing_but_gradients_of_parameters_is_exchanged(name):
    text = assert_mesh_changes_nothing(ENCODINGS[name]().bind(SIZES), {"data": 2, "fsdp": 2, "tensor": 2})
    assert exchanged(text) <= {"all-reduce"}


SEGMENTS = np.arange(T) // 37 + np.zeros((B, 1), int)
SOME = np.random.default_rng(0).permutation(2 * T)[:T]
CASES = {
    "window": {"window": 9},
    "window of more than a half": {"window": 40},
    "chunks": {"chunk_size": 24},
    "both directions": {"is_causal": False},
    "both directions in a window": {"is_causal": False, "window": 20},
    "segments": {"segment_ids": SEGMENTS},
    "rows that see nothing": {"segment_ids": (SEGMENTS, np.minimum(SEGMENTS, 2))},
    "ascending positions": {"query_positions": np.sort(SOME), "key_positions": np.sort(SOME)},
    "any positions": {"query_positions": SOME, "key_positions": np.arange(T)},
    "a mask": {"mask": np.random.default_rng(1).random((B, 1, T, T)) < 0.7},
}


@slow
@pytest.mark.parametrize("name", ["t5", "fire", "shaw", "cope"])
@pytest.mark.parametrize("case", CASES)
def test_a_ring_sees_what_one_device_sees(case, name):
    assert_mesh_changes_nothing(ENCODINGS[name]().bind(SIZES), RING, **CASES[case])


@slow
@pytest.mark.parametrize(
    ("name", "axes", "case"),
    [
        ("t5", RING, {"softcap": 2.0}),
        ("nope", RING, CASES["rows that see nothing"] | {"window": 20}),
        ("nope", RING, CASES["any positions"]),
        ("fire", RING, CASES["window"]),
        ("fire", ALL, CASES["any positions"]),
        ("t5", ALL, CASES["both directions in a window"]),
        ("t5", {"data": 2, "fsdp": 2, "tensor": 2}, CASES["chunks"]),
        ("shaw", RING, CASES["window"]),
        ("deberta", ALL, {}),
    ],
)
@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_kernels(name, axes, case, kernel):
    assert_mesh_changes_nothing(ENCODINGS[name]().bind(SIZES), axes, implementation=kernel, **case)


@slow
@pytest.mark.parametrize("length", [36, 72])
@pytest.mark.parametrize("name", ["nope", "kerple", "cope"])
def test_shares_that_have_no_halves_and_halves_that_are_no_whole_blocks(name, length):
    assert_mesh_changes_nothing(ENCODINGS[name](), RING, operands(length, length))


def test_arrays_may_lie_on_a_mesh_with_explicit_axes_outside_of_jit():
    arrays, mesh = operands()[:3], jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"))
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor"))) for x in arrays]
    out = attention.alibi_attention(*placed)  # whose slopes are those of all heads
    assert_close(out, expected("alibi", *map(np.asarray, arrays)).output)
    assert out.sharding.spec == PartitionSpec("data", "sequence", "tensor", None)


@slow
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(["rope", "nope", "alibi"], ["streaming", "pallas_tpu", "pallas_gpu"]),
        ("cope", "streaming"),  # which no kernel serves
    ],
)
@pytest.mark.parametrize("in_context", [False, True])
def test_arrays_may_lie_on_a_mesh_with_explicit_axes(name, implementation, in_context):
    function = getattr(attention, f"{name}_attention")
    keywords = {"embeddings": 0.3 * draw(16, H)} if name == "cope" else {}

    def loss(query, key, value):
        out, stats = function(query, key, value, **keywords, implementation=implementation, return_stats=True)
        return (out**2).sum() + stats.entropy.sum(), (out, stats.entropy)

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    arrays = operands()[:3]
    (_, wanted), wanted_gradient = compute(*arrays)
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"))  # Explicit, unless told otherwise
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor"))) for x in arrays]
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        (_, values), gradient = compute(*placed)
        without_jit = function(*placed, **keywords)
    jax.tree.map(assert_close, (*values, without_jit), (*wanted, wanted[0]))
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), gradient, wanted_gradient)
    assert values[0].sharding.spec == PartitionSpec("data", "sequence", "tensor", None)
    assert values[1].sharding.spec == PartitionSpec("data", "tensor", "sequence")


@slow
@pytest.mark.parametrize("encoding", [LogN(Windowed(ENCODINGS["rope"](), 20)), LogN(ENCODINGS["randomized"](), 64)])
def test_wrappers(encoding):
    assert_mesh_changes_nothing(encoding.bind(SIZES), ALL)


@slow
@pytest.mark.parametrize(
    "encoding",
    # These queries see a hundred keys: a sum of as many gates, clipped late, is good to 1e-5 in any order.
    [ENCODINGS["alibi"](), ENCODINGS["forgetting"](), ENCODINGS["cope"](num_positions=16)],
)
def test_queries_behind_a_cache(encoding):
    assert_mesh_changes_nothing(encoding, {"data": 2, "tensor": 2, "sequence": 2}, operands(queries=4))


@slow
def test_a_term_that_says_nothing_of_heads_has_them_all():
    slopes, arrays = jnp.linspace(1.0, 0.1, N), operands()[:3]

    def bias(slopes, block):
        return -slopes[:, None, None] * jnp.abs(block.distance)[:, None]

    attend = functools.partial(dot_product_attention, logit=BlockLogit(bias, slopes), implementation="streaming")
    wanted = attend(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(**ALL))):
        assert_close(attend(*arrays), wanted)


@slow
def test_bfloat16_differs_by_its_rounding():
    arrays = [x.astype(jnp.bfloat16) for x in operands()[:3]]

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def gradient(*arrays):
        out = dot_product_attention(*arrays, implementation="streaming")
        return (out.astype(jnp.float32) ** 2).sum(), out

    (_, wanted), wanted_gradient = gradient(*(x.astype(jnp.float32) for x in arrays))
    with jax.set_mesh(make_mesh(MeshConfig(**RING))):
        (_, values), found = gradient(*arrays)
    assert values.dtype == jnp.bfloat16
    for x, y in zip((values, *found), (wanted, *wanted_gradient), strict=True):
        assert_close(x, y, tolerance=2**-6)


# --- Models


def model_of(encoding, length, **sizes):
    config = ModelConfig(vocab_size=32, num_layers=2, num_heads=1, model_dim=16, train_length=length, encoding=encoding)
    return Decoder(config, rngs=nnx.Rngs(0))


@slow
@pytest.mark.parametrize("encoding", ["alibi", "convolution", "recursive", "forgetting", ("rope", "nope")])
def test_one_long_document_on_all_devices_scores_as_on_one(encoding):
    model, length = model_of(encoding, 256), 256
    document = [np.random.default_rng(0).integers(0, 32, length + 1)]
    wanted = measure(model, document, length, batch_size=1)
    mesh = evaluation_mesh([model.config], 1, length)
    assert mesh.shape["sequence"] == 8
    with jax.set_mesh(mesh):
        found = measure(on_mesh(model, mesh), document, length, batch_size=1, place=Placement(mesh, 1).put)
    for name in ("nll_sum", "entropy_sum", "heads"):
        assert_close(getattr(found, name), getattr(wanted, name))


@slow
def test_a_model_is_shared_by_all_devices_and_scores_as_on_one():
    config = ModelConfig(vocab_size=32, num_layers=16, num_heads=8, model_dim=256, mlp_dim=512, train_length=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    documents = list(np.random.default_rng(0).integers(0, 32, (8, 17)))
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    curves = []
    for devices in (1, 8):
        mesh = evaluation_mesh([config], 8, 16, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            curves.append(measure(on_mesh(model, mesh), documents, 16, place=Placement(mesh, 8).put))
    wanted, found = curves
    for name in ("nll_sum", "entropy_sum", "heads"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    # By the compiler's account, a device holds an eighth of the parameters, and a few layers of 16 gathered or copied.
    assert wanted.step_bytes > parameters
    assert found.step_bytes < parameters * (1 / 8 + 4 / 16), (found.step_bytes, wanted.step_bytes, parameters)


@slow
def test_memory_of_a_device_shrinks_with_their_number():
    model, length = model_of("alibi", 64), 2**14
    tokens = np.zeros((1, length), np.int32)

    def temporaries(devices):
        mesh = evaluation_mesh([model.config], 1, length, jax.devices()[:devices])
        graphdef, state = nnx.split(on_mesh(model, mesh))
        with jax.set_mesh(mesh):
            batch = place_batch((tokens, tokens, tokens == 0), mesh)
            return evaluation_step.lower(graphdef, state, *batch).compile().memory_analysis().temp_size_in_bytes

    of = {devices: temporaries(devices) for devices in (1, 2, 4, 8)}
    assert all(of[n] < 0.65 * of[n // 2] for n in (2, 4, 8)), of


@pytest.mark.parametrize(
    ("windows", "length", "sizes", "expected"),
    [
        (8, 256, {}, {"fsdp": 8}),
        (16, 255, {}, {"fsdp": 8}),
        (2, 256, {}, {"fsdp": 2, "tensor": 2, "sequence": 2}),
        (1, 256, {}, {"tensor": 2, "sequence": 4}),
        (1, 256, {"vocab_size": 33}, {"sequence": 8}),
        (1, 255, {"vocab_size": 33}, {"fsdp": 8}),
        (3, 255, {}, {"fsdp": 4, "tensor": 2}),
        (8, 256, {"model_dim": 20}, {"fsdp": 4, "tensor": 2}),
        (8, 256, {"model_dim": 20, "vocab_size": 33}, {"data": 2, "fsdp": 4}),
    ],
)
def test_rows_then_heads_then_positions_over_all_devices(windows, length, sizes, expected):
    config = ModelConfig(
        **{"vocab_size": 32, "num_layers": 1, "num_heads": 2, "model_dim": 16, "train_length": 64} | sizes
    )
    mesh = evaluation_mesh([config], windows, length)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == expected
