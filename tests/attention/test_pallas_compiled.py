"""The kernels for TPUs and GPUs, compiled for chips that need not exist."""

import functools
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nope_jax.attention import alibi_attention, encoded_attention, nope_attention
from nope_jax.attention.softmax_state import RESULTS
from nope_jax.compile.estimate import estimate_run, find_machine
from nope_jax.config import MeshConfig, load_file, override
from nope_jax.encodings import ENCODINGS, ModelDims
from nope_jax.sharding import make_mesh
from tests.support.attention_cases import mapped


def compiled_for(machine, function, shapes, dtype="bfloat16"):
    """A function of arrays, these shapes on each chip, compiled for a machine."""
    mesh = make_mesh(MeshConfig(), find_machine(machine).devices())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    operands = [jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=rows) for shape in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*operands).compile()


def gradient_of(attend):
    def loss(*operands):
        out, stats = attend(*operands, return_stats=True)
        return (out.astype(jnp.float32) ** 2).sum() + (stats.entropy**2).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def kernels(program):
    """Names of the kernels that a program calls."""
    text = program.as_text()
    by_tpu = re.findall(r"%?(attention_\w+?)[.\d]* = .* custom-call\(.*tpu_custom_call", text)
    return sorted(
        by_tpu + re.findall(r" custom-call\(.*gpu\.triton\".*op_name=\"[^\"]*/(attention_\w+)/pallas_call\"", text)
    )


GRADIENT = ["attention_forward", "attention_key_gradients", "attention_query_gradient"]
LONG = 8192


@pytest.mark.tpu
@pytest.mark.parametrize("slice_name", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_it_compiles_for_a_chip_in_memory_that_grows_with_length(slice_name):
    """By default, with a bias: no array has two axes of the length, and temporaries are those of ten arrays."""
    sizes = [(LONG, heads, 128) for heads in (8, 2, 2)]
    program = compiled_for(slice_name, gradient_of(functools.partial(alibi_attention, window=LONG // 2)), sizes)
    assert kernels(program) == GRADIENT
    assert not re.search(rf"\[[\d,]*{LONG},(?:\d+,)*{LONG}[\],]", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 10 * 2 * 8 * LONG * 128


@pytest.mark.parametrize(
    "machine", [pytest.param("v5e:1x1", marks=pytest.mark.tpu), pytest.param("h100:1", marks=pytest.mark.cuda)]
)
def test_it_compiles_where_jax_has_64_bits(machine):
    with jax.enable_x64(True):
        program = compiled_for(machine, gradient_of(alibi_attention), [(1024, heads, 64) for heads in (4, 2, 2)])
    assert set(GRADIENT) <= set(kernels(program))


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_it_compiles_for_head_dims(head_dim, slice_name):
    sizes = [(1024, heads, head_dim) for heads in (4, 2, 2)]
    attend = functools.partial(alibi_attention, softcap=30.0, chunk_size=700)
    assert kernels(compiled_for(slice_name, gradient_of(attend), sizes)) == GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fire", "forgetting"])
@pytest.mark.parametrize(
    ("machine", "head_dim", "rule"),
    [
        pytest.param(name, *case, marks=pytest.mark.tpu)
        for name in ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
        for case in ((128, {}), (256, {"query_positions": jnp.arange(LONG)}))
    ]
    + [
        pytest.param(name, *case, marks=pytest.mark.cuda)
        for name, case in (
            ("h100:1", (128, {})),
            ("h100:1", (64, {"query_positions": jnp.arange(LONG)})),
            ("a100:1", (64, {})),
            ("b200:1", (256, {})),
        )
    ],
)
def test_a_logit_of_pairs_compiles_for_chips(machine, head_dim, rule, name):
    """With the gradient of its parameters, or of its features: no array has two axes of the length."""
    encoding, heads = ENCODINGS[name](), ModelDims(num_heads=8, head_dim=head_dim, model_dim=8 * head_dim)
    params = encoding.init_layer(jax.random.key(0), heads)

    def loss(query, key, value, scale):
        scaled = {name: x * scale[0, 0] for name, x in params.items()}
        features = encoding.features(scaled, query.reshape(*query.shape[:2], -1), None)
        known = {"query_features": features, "key_features": features, "return_stats": True}
        out, stats = encoded_attention(encoding, scaled, query, key, value, **known, **rule)
        return (out.astype(jnp.float32) ** 2).sum() + (stats.entropy**2).sum()

    sizes = [*((LONG, heads, head_dim) for heads in (8, 2, 2)), (1,)]
    program = compiled_for(machine, jax.grad(loss, argnums=(0, 1, 2, 3)), sizes)
    on_gpu = [*with_care(*GRADIENT), *["attention_parameter_gradient"] * (name == "fire")]
    assert kernels(program) == (GRADIENT if machine[0] == "v" else sorted(on_gpu))
    assert not re.search(rf"\[[\d,]*{LONG},(?:\d+,)*{LONG}[\],]", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 10 * 2 * 8 * LONG * head_dim


def with_vectors(machine, name, head_dim, length=LONG, dtype="bfloat16"):
    """The gradient of attention with an encoding of vectors per distance, compiled for a machine."""
    encoding, dims = ENCODINGS[name](), ModelDims(num_heads=8, head_dim=head_dim, model_dim=8 * head_dim)
    params = encoding.init_shared(jax.random.key(0), dims) | encoding.init_layer(jax.random.key(1), dims)

    def loss(query, key, value, scale):
        scaled = {name: x * scale[0, 0] for name, x in params.items()}
        out, stats = encoded_attention(encoding, scaled, query, key, value, return_stats=True)
        return (out.astype(jnp.float32) ** 2).sum() + (stats.entropy**2).sum()

    sizes = [*((length, heads, head_dim) for heads in (8, 2, 2)), (1,)]
    program = compiled_for(machine, jax.grad(loss, argnums=(0, 1, 2, 3)), sizes, dtype)
    assert not re.search(rf"\[[\d,]*{length},(?:\d+,)*{length}[\],]", program.as_text())
    return program


TEMPORARIES_OF_VECTORS = (10 + 2 * 4 * 8) * 2 * 8
"""Bytes per token and head dim: two tables of 2·T distances in float32, their gradients, and what they are made of."""


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize(
    ("name", "head_dim"), [("shaw", 128), ("nezha", 80), ("transformer_xl", 64), ("deberta", 128), ("deberta", 256)]
)
def test_terms_of_vectors_per_distance_compile_for_chips(machine, name, head_dim):
    program = with_vectors(machine, name, head_dim)
    assert kernels(program) == [*GRADIENT, *["attention_vector_gradients"] * (name != "nezha")]
    assert program.memory_analysis().temp_size_in_bytes < TEMPORARIES_OF_VECTORS * LONG * max(head_dim, 128)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["a100:1", "h100:1", "b200:1"])
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("shaw", 128, "bfloat16"),
        ("nezha", 80, "float16"),
        ("transformer_xl", 64, "bfloat16"),
        ("deberta", 256, "bfloat16"),
        ("deberta", 64, "float32"),
    ],
)
def test_terms_of_vectors_per_distance_compile_for_gpus(machine, name, head_dim, dtype):
    """The gradient of each table by a kernel of its own: Shaw's of keys and values, DeBERTa's of both directions,
    Transformer-XL's of keys and the constant."""
    program = with_vectors(machine, name, head_dim, dtype=dtype)
    assert kernels(program) == sorted([*with_care(*GRADIENT), *["attention_vector_gradient"] * 2 * (name != "nezha")])
    assert program.memory_analysis().temp_size_in_bytes < TEMPORARIES_OF_VECTORS * LONG * max(head_dim, 128)


@pytest.mark.cuda
@pytest.mark.slow
def test_the_memory_of_programs_with_vectors_does_not_grow_with_length():
    """For a table that all heads share: temporaries are those of four arrays at most, and 64 MiB."""
    program = with_vectors("h100:1", "shaw", 128, length=131072)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 2 * 8 * 131072 * 128 + 2**26


@pytest.mark.tpu
def test_a_training_step_on_data_tensor_and_sequence_axes_compiles():
    config = override(
        load_file(Path(__file__).parents[2] / "configs/tiny.py"),
        {"mesh.data": 2, "mesh.tensor": 2, "mesh.sequence": 2, "data.context_length": 1024}
        | {"model.attention": "pallas_tpu", "model.remat": "full", "model.num_layers": 2},
    )
    estimate = estimate_run(config, "v5e:2x4")
    assert estimate.computing.kernels > 0 and "collective-permute" in estimate.sent  # the ring


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine", [pytest.param("v5e:1x1", marks=pytest.mark.tpu), pytest.param("h100:1", marks=pytest.mark.cuda)]
)
def test_it_compiles_mapped_and_recomputed(machine):
    sizes = [(1, 256, heads, 64) for heads in (4, 2, 2)]
    program = compiled_for(machine, functools.partial(mapped, alibi_attention), sizes)
    assert set(GRADIENT) <= set(kernels(program))


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("policy", "forward"), [(None, 2), (jax.checkpoint_policies.save_only_these_names(RESULTS), 1)]
)
def test_where_a_policy_keeps_the_results_the_forward_kernel_is_not_run_again(policy, forward):
    def loss(query, key, value):
        layer = jax.checkpoint(lambda x, _: (x + alibi_attention(x, key, value), None), policy=policy)
        return (jax.lax.scan(layer, query, None, length=3)[0].astype(jnp.float32) ** 2).sum()

    program = compiled_for("v5e:1x1", jax.grad(loss, argnums=(0, 1, 2)), [(256, heads, 64) for heads in (4, 2, 2)])
    assert kernels(program) == sorted([*["attention_forward"] * forward, *GRADIENT[1:]])


def with_care(*names):
    return sorted([*names, *(f"{name}_with_care" for name in names)])


def attend_at_length(*operands, **keywords):
    return alibi_attention(*operands, window=LONG // 2, **keywords)


@pytest.mark.cuda
@pytest.mark.parametrize("machine", ["a100:1", "h100:1", "b200:1"])
def test_it_compiles_for_a_gpu_in_memory_that_grows_with_length(machine):
    """As for a TPU; what is constant in the bias has no gradient, and the kernel for it is not called."""
    sizes = [(LONG, heads, 128) for heads in (8, 2, 2)]
    program = compiled_for(machine, gradient_of(attend_at_length), sizes)
    assert kernels(program) == with_care(*GRADIENT)
    assert not re.search(rf"\[[\d,]*{LONG},(?:\d+,)*{LONG}[\],]", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 10 * 2 * 8 * LONG * 128
    assert " transpose(" not in program.as_text()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        (1100, {"is_causal": False}),
        (500, {"window": 9, "query_positions": jnp.arange(300), "key_positions": jnp.arange(500)[None]}),
    ],
)
def test_it_compiles_for_a_gpu_where_little_is_known_of_the_blocks_that_meet(keys, rule):
    sizes = [(300, 4, 64), (keys, 2, 64), (keys, 2, 64)]
    program = compiled_for("h100:1", gradient_of(functools.partial(nope_attention, **rule)), sizes)
    assert set(GRADIENT) <= set(kernels(program))


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["a100:1", "h100:1", "b200:1"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (80, "bfloat16"), (96, "float16"), (256, "bfloat16")])
def test_it_compiles_for_a_gpu_with_head_dims_and_the_gradient_of_a_bias(head_dim, dtype, machine):
    def loss(query, key, value, slopes):
        bias = {"slopes": slopes[0].astype(jnp.float32), "softcap": 30.0, "chunk_size": 700}
        out, stats = alibi_attention(query, key, value, **bias, return_stats=True)
        return (out.astype(jnp.float32) ** 2).sum() + (stats.entropy**2).sum()

    sizes = [*((1000, heads, head_dim) for heads in (4, 2, 2)), (4,)]
    program = compiled_for(machine, jax.grad(loss, argnums=(0, 1, 2, 3)), sizes, dtype)
    assert kernels(program) == sorted([*with_care(*GRADIENT), "attention_table_gradient"])


@pytest.mark.cuda
@pytest.mark.slow
def test_a_training_step_on_gpus_uses_the_kernels(caplog):
    config = override(
        load_file(Path(__file__).parents[2] / "configs/tiny.py"),
        {"mesh.data": 2, "mesh.tensor": 2, "mesh.sequence": 2, "data.context_length": 1024}
        | {"model.remat": True, "model.num_layers": 1},
    )
    with caplog.at_level(logging.DEBUG, "nope_jax.attention"):
        estimate = estimate_run(config, "h100:8")
    assert caplog.messages and all(message.startswith('"pallas_gpu" for queries') for message in caplog.messages)
    assert estimate.computing.kernels > 0 and "collective-permute" in estimate.sent  # the ring
