"""The table from logical axes to the mesh, and that a mesh changes where numbers lie, not what they are."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from nope_jax.config import MeshConfig
from nope_jax.sharding import AXES, RULES, make_mesh, partition_spec, state_shardings


def abstract_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def test_minus_one_takes_what_the_other_axes_leave():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(data=-1), devices).shape) == dict.fromkeys(AXES, 1)
    assert make_mesh(MeshConfig(), devices).axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2), "data 2 x fsdp 1 .* 1 device"),
        (MeshConfig(fsdp=2), "fsdp 2 .* 1 device"),
        (MeshConfig(fsdp=-1), "data -1 x fsdp -1 .* 1 device"),
        (MeshConfig(tensor=0), "tensor 0 .* 1 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, jax.devices()[:1])


def test_names_become_mesh_axes():
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), "sequence")
    assert partition_spec(("layers", "embed", "heads", "head")) == PartitionSpec(None, "fsdp", "tensor", None)
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


def test_a_variable_is_placed_by_its_names_and_anything_else_replicated():
    state = nnx.State(
        {"up": nnx.Param(jnp.zeros((3, 8, 4)), axes=("layers", "embed", "mlp")), "scale": nnx.Param(jnp.zeros(8))}
    )
    shardings = state_shardings({"params": state, "count": jnp.int32(0)}, abstract_mesh(fsdp=4, tensor=2))
    assert shardings["params"]["up"].get_value().spec == PartitionSpec(None, "fsdp", "tensor")
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
