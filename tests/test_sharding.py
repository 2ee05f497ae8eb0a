"""The table from logical axes to the mesh, and that a mesh changes where numbers lie, not what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from nope_jax import sharding
from nope_jax.attention import mesh as attention_mesh
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
from tests.support.drawn_model import drawn_model
from tests.support.eight_devices import config


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
