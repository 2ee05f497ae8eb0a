"""The table from logical axes to the mesh, and that a mesh changes where numbers lie, not what they are."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from nope_jax import sharding
from nope_jax.attention import mesh as attention_mesh
from nope_jax.checkpoint import Checkpointer
from nope_jax.compile.collectives import Collective, collectives
from nope_jax.config import HINTS, MeshConfig, wanted
from nope_jax.sharding import (
    AXES,
    PARAMETER_RULES,
    RULES,
    check_fits,
    make_mesh,
    partition_spec,
    state_shardings,
    with_logical_constraint,
)
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import TrainState, abstract_state
from tests.support.drawn_model import drawn_model
from tests.support.eight_devices import config, results, train_steps


def abstract_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def test_minus_one_takes_what_the_other_axes_leave():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(data=-1), devices).shape) == dict.fromkeys(AXES, 1)
    assert make_mesh(MeshConfig(), devices).axis_types == (AxisType.Auto,) * 4


def test_offloading_needs_memory_of_the_host(monkeypatch):
    offloads, mesh = config({}, {"remat": "offload"}, 1), make_mesh(MeshConfig(), jax.devices()[:1])
    check_fits(offloads, mesh)
    monkeypatch.setattr(sharding, "HOST_MEMORY", "of_no_host")
    with pytest.raises(ValueError, match="model.remat offload needs devices with memory of the kind of_no_host, "):
        check_fits(offloads, mesh)


def test_a_mesh_that_splits_a_dimension_of_a_slice_is_made_all_the_same(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("set allow_split_physical_axes to True")

    expected = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(jax, "make_mesh", refuse)
    assert make_mesh(MeshConfig(), jax.devices()[:1]) == expected


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"tensor": 2}, (4, 1, 2, 1)),
        ({"fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)),
        ({"fsdp": 2, "sequence": -1}, (1, 2, 1, 4)),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_one_axis_takes_what_the_others_leave_of_eight_devices(monkeypatch, axes, shape):
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **__: shape)
    assert make_mesh(MeshConfig(**axes), devices=range(8)) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2), "data 2 x fsdp 1 .* 1 device"),
        (MeshConfig(fsdp=2), "fsdp 2 .* 1 device"),
        (MeshConfig(fsdp=-1, tensor=-1), "fsdp -1 x tensor -1 .* 1 device"),
        (MeshConfig(tensor=0), "tensor 0 .* 1 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, jax.devices()[:1])


def test_names_become_mesh_axes():
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), "sequence")
    assert partition_spec(("layers", "embed", "heads", "head")) == PartitionSpec(
        None, ("fsdp", "sequence"), "tensor", None
    )
    assert partition_spec(("embed", "mlp"), PARAMETER_RULES["zero1"]) == PartitionSpec(None, "tensor")
    assert partition_spec((None, "mlp")) == PartitionSpec(None, "tensor")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'head_dim'.*did you mean 'head'"):
        partition_spec(("embed", "head_dim"))


def test_two_names_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'mlp' .* 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch' and 'embed' .* 'fsdp'"):
        partition_spec(("batch", "embed"))


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        RULES["embed"] = "data"  # pyright: ignore[reportIndexIssue]
    with pytest.raises(TypeError):
        PARAMETER_RULES["zero1"]["embed"] = "data"  # pyright: ignore[reportIndexIssue]


def test_attention_spreads_over_the_same_axes():
    assert (RULES["batch"], RULES["length"], RULES["heads"]) == (
        attention_mesh.BATCH,
        attention_mesh.LENGTH,
        attention_mesh.HEADS,
    )


def test_a_variable_is_placed_by_its_names_and_anything_else_replicated():
    state = nnx.State(
        {"up": nnx.Param(jnp.zeros((3, 8, 4)), axes=("layers", "embed", "mlp")), "scale": nnx.Param(jnp.zeros(8))}
    )
    shardings = state_shardings({"params": state, "count": jnp.int32(0)}, abstract_mesh(fsdp=4, tensor=2))
    assert shardings["params"]["up"].get_value().spec == PartitionSpec(None, ("fsdp", "sequence"), "tensor")
    assert shardings["params"]["scale"].get_value().spec == PartitionSpec()
    assert shardings["count"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("axes", "message"),
    [(("embed",), "2 axes but 1 name"), (("heads", "embed"), "params.w: its heads axis of 6 .* mesh.tensor 4")],
)
def test_names_that_do_not_fit_the_array_are_refused(axes, message):
    state = {"params": nnx.State({"w": nnx.Param(jnp.zeros((6, 4)), axes=axes)})}
    with pytest.raises(ValueError, match=message):
        state_shardings(state, abstract_mesh(tensor=4))


@pytest.mark.parametrize(
    ("mesh", "model", "accumulation", "message"),
    [
        ({"tensor": 3}, {}, 1, "mesh.tensor 3 must divide model.num_heads 4"),
        ({"tensor": 4}, {"num_kv_heads": 2}, 1, "mesh.tensor 4 must divide model.num_kv_heads 2"),
        ({"tensor": 2}, {"mlp_dim": 25}, 1, "mesh.tensor 2 must divide model.mlp_dim 25"),
        ({"tensor": 3}, {"num_heads": 6, "head_dim": 4, "mlp_dim": None}, 1, "mesh.tensor 3 must divide .*mlp_dim 64"),
        ({"tensor": 4}, {"vocab_size": 66}, 1, "mesh.tensor 4 must divide model.vocab_size 66"),
        ({"fsdp": 4, "sequence": 8}, {}, 1, "mesh.fsdp 4 x mesh.sequence 8 must divide model.model_dim 16"),
        ({"sequence": 3}, {"model_dim": 24}, 1, "mesh.sequence 3 must divide data.context_length 32"),
        ({"data": 3, "fsdp": 2}, {}, 1, "mesh.data 3 x mesh.fsdp 2 must divide data.batch_size 16"),
        ({"data": 2, "fsdp": 4}, {}, 4, "mesh.data 2 x mesh.fsdp 4 x optimizer.accumulation 4 must divide .* 16"),
    ],
)
def test_a_config_that_a_mesh_does_not_divide_is_refused_by_its_fields(mesh, model, accumulation, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_fits(config({}, model, accumulation), abstract_mesh(**mesh))
    check_fits(config({}, model, 1), abstract_mesh())


def test_the_config_knows_the_rules_there_are():
    assert wanted(HINTS["mesh.rules"]) == f"one of {', '.join(PARAMETER_RULES)}"
    with pytest.raises(ValueError, match="mesh.rules must be one of fsdp, zero1, not 'zero3'"):
        config({"rules": "zero3"}, {}, 1)


def test_what_is_constrained_keeps_its_numbers_and_needs_no_mesh():
    x = jnp.arange(12.0).reshape(3, 4)
    assert with_logical_constraint(x, ("batch", "mlp")) is x
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
        assert with_logical_constraint(x, ("batch", "mlp")) is x


def test_the_caller_may_have_explicit_axes():
    model, tokens = drawn_model(config({}, {"num_layers": 1}, 1).model), np.arange(8).reshape(2, 4)
    expected = jax.jit(lambda model: model(tokens))(model)
    mesh = jax.make_mesh((1, 1, 1, 1), AXES, devices=jax.devices()[:1])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model: model(tokens))(model)
    np.testing.assert_array_equal(logits, expected)
    assert logits.sharding.spec == PartitionSpec(("data", "fsdp"), "sequence", None)


# Eight devices. B rows, T positions, D model width; L layers.


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """That two runs took the same steps, up to the order in which float32 numbers are added."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
    np.testing.assert_allclose(found["validation"], expected["validation"], rtol=1e-6)
    assert found["state"].keys() == expected["state"].keys()
    for name, array in expected["state"].items():
        tolerance = 2e-6 * max(1e-3, np.abs(array).max())
        if name.startswith(
            ".params"
        ):  # Adam moves them by the learning rate however small a gradient, and its rounding
            tolerance = max(tolerance, 1e-4 * 1e-2)
        np.testing.assert_allclose(found["state"][name], array, atol=tolerance, err_msg=name)


def kernels(run: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are split, by name."""
    return {
        name: shape
        for name, shape in run["shapes"].items()
        if name.startswith(".params") and "norm" not in name and "positions" not in name
    }


def assert_split(run: dict[str, Any], *, parameters: int, moments: int) -> None:
    """That so many devices share the kernels, and the moments of them; of anything else each has all."""
    for name, shape in run["shapes"].items():
        of_kernel = any(name.endswith(kernel.removeprefix(".params")) for kernel in kernels(run))
        num_shards = (parameters if name.startswith(".params") else moments) if of_kernel else 1
        assert math.prod(run["own_shapes"][name]) == math.prod(shape) / num_shards, name


def moved(found: list[Collective], kind: str, mesh: dict[str, int], *along: str, loops: int = 0) -> Counter[int]:
    """Of collectives of a kind and along these axes: how often arrays of so many numbers, but for vectors."""
    numbers: Counter[int] = Counter()
    for one in found:
        if one.kind == kind and one.mesh_axes(mesh) == along and one.loops == loops:
            shapes = [[int(size) for size in shape.split("[")[1][:-1].split(",") if size] for shape in one.shapes]
            numbers.update(math.prod(shape) for shape in shapes if len(shape) > 1)
    return numbers


MESH = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
GROUPED = {"num_kv_heads": 2, "num_layers": 2}


@pytest.fixture(scope="module")
def eight_and_one(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any], Path, str]:
    """Two steps on eight devices, the same on one, the workdir in which eight have saved, and what XLA wrote."""
    workdir = tmp_path_factory.mktemp("eight")
    (run,), complaints = results("train_steps", [(MESH, GROUPED, 1)], 2, None, str(workdir))
    (one,) = train_steps([({"data": 1}, GROUPED, 1)], 2)
    return run, one, workdir, complaints


def test_eight_devices_take_the_steps_of_one_which_goes_on_from_what_they_save(eight_and_one):
    run, one, workdir, _ = eight_and_one
    assert_same(run, one)
    settings = config({"data": 1}, GROUPED, 1)
    _, abstract = abstract_state(settings, make_optimizer(settings.optimizer, 2), make_mesh(settings.mesh))
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step, trees = checkpointer.restore(abstract.trees())
    restored = jax.tree_util.tree_leaves_with_path(TrainState(**trees))
    assert step == 2 and all(array.sharding.num_devices == 1 for _, array in restored)
    for path, array in restored:
        np.testing.assert_array_equal(array, run["state"][jax.tree_util.keystr(path)])


def test_a_step_moves_what_fsdp_and_tensor_parallelism_mean(eight_and_one):
    run, _, _, complaints = eight_and_one
    assert "Involuntary full rematerialization" not in complaints
    assert_split(run, parameters=4, moments=4)
    found = collectives(run["text"])
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert len(layers) == 7
    assert len(tables) == 2
    # Parameters: a layer's at a time, forward and backward, and never a stack of them; the two tables once.
    gathered = moved(found, "all-gather", MESH, "fsdp", loops=1)
    assert gathered == Counter(size // 2 for size in layers) + Counter(size // 2 for size in layers)
    assert moved(found, "all-gather", MESH, "fsdp") == Counter(size // 2 for size in tables)
    # Gradients: summed over the devices that have other rows, and from there on each keeps its part.
    assert moved(found, "all-reduce", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers)
    assert moved(found, "all-reduce", MESH, "data", loops=1) == Counter(size // 4 for size in layers)
    # Activations: the outputs of attention and MLP [B/4, T, D], and the gradients of their inputs.
    assert set(moved(found, "all-reduce", MESH, "tensor", loops=1)) == {16 // 4 * 32 * 16}
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}
    assert {one.times for one in found if one.loops} == {2}


@pytest.mark.slow
def test_a_loss_in_chunks_is_that_of_one_device_and_gathers_neither_rows_nor_vocabulary():
    """Each device has the logits of 16 of its 128 or 64 tokens at a time."""
    sequence = {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2}
    cases = [({"data": 1}, GROUPED, 1), (MESH, GROUPED, 1), (sequence, GROUPED, 1)]
    (one, run, spread), complaints = results("train_steps", cases, 2, 16 * 32)
    assert "Involuntary full rematerialization" not in complaints
    for other in run, spread:
        assert_same(other, one)
    found = collectives(run["text"])
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert {one.times for one in found if one.loops} == {2, 8}
    # The head is gathered once, and its gradient summed once: loops over layers or chunks move what the layers do,
    assert moved(found, "all-gather", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers * 2)
    assert moved(found, "all-gather", MESH, "fsdp") == Counter(size // 2 for size in tables)
    assert moved(found, "all-reduce", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers)
    assert moved(found, "all-reduce", MESH, "data", loops=1) == Counter(size // 4 for size in layers)
    # and, between the devices that share the vocabulary, gradients of a chunk's hidden states and a number per token.
    assert set(moved(found, "all-reduce", MESH, "tensor", loops=1)) == {16 // 4 * 32 * 16, 16 * 16, 16}
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}


@pytest.fixture(scope="module")
def on_other_meshes() -> tuple[dict[str, list[dict[str, Any]]], str]:
    """By kind of model: its run on one device, and those on other meshes."""
    learned, deep = {"encoding": "kerple", "num_layers": 2}, {**GROUPED, "num_layers": 3}
    runs = {
        "deep": [
            ({"data": 1}, deep, 1),
            (MESH, deep, 1),
            ({"data": 8}, deep, 1),
            ({"data": 1, "fsdp": 8}, deep, 1),
            ({"data": 1, "fsdp": 4, "tensor": 2, "rules": "zero1"}, deep, 1),
            ({"data": 2, "fsdp": 4}, deep, 2),
        ],
        "learned": [
            ({"data": 1}, learned, 1),
            ({"data": 2, "tensor": 4}, learned, 1),
            ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, learned, 1),
        ],
        "muon": [
            ({"data": 1}, deep, 1, "muon"),
            (MESH, deep, 1, "muon"),
        ],
        "adafactor": [
            ({"data": 1}, deep, 1, "adafactor"),
            (MESH, deep, 1, "adafactor"),
        ],
    }
    found, complaints = results("train_steps", [case for cases in runs.values() for case in cases], 3)
    rest = iter(found)
    return {kind: [next(rest) for _ in cases] for kind, cases in runs.items()}, complaints


@pytest.mark.slow
def test_other_meshes_take_the_steps_of_one_device(on_other_meshes):
    runs, complaints = on_other_meshes
    for one, *others in runs.values():
        for other in others:
            assert_same(other, one)
    assert "Involuntary full rematerialization" not in complaints


@pytest.mark.slow
def test_data_parallelism_only_sums_gradients(on_other_meshes):
    _, _, run, *_ = on_other_meshes[0]["deep"]
    found, mesh = collectives(run["text"]), {"data": 8}
    assert {one.kind for one in found} == {"all-reduce"}
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    assert moved(found, "all-reduce", mesh, "data", loops=1) == Counter(layers)
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert moved(found, "all-reduce", mesh, "data") == Counter(tables)


@pytest.mark.slow
def test_zero1_gathers_its_parameters_once_a_step(on_other_meshes):
    *_, run, _ = on_other_meshes[0]["deep"]
    found, mesh = collectives(run["text"]), {"fsdp": 4, "tensor": 2}
    assert moved(found, "all-gather", mesh, "fsdp") == Counter(math.prod(shape) // 2 for shape in kernels(run).values())
    assert not moved(found, "all-gather", mesh, "fsdp", loops=1)
    assert_split(run, parameters=2, moments=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "logits_at_once"),
    [({"num_kv_heads": 2}, None), ({"num_kv_heads": 2}, 64 * 4), ({"encoding": "kerple"}, None)],
)
def test_auto_and_explicit_axes_give_the_numbers_of_one_device(model, logits_at_once):
    (one, *others), _ = results("in_context", [None, "Auto", "Explicit"], {**model, "num_layers": 2}, logits_at_once)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max())), other, one)
