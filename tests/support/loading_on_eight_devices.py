"""Loading gives each device its part: run by test_eight_devices.py."""

import jax
import numpy as np
import pytest

from nope_jax.config import MeshConfig
from nope_jax.interop import load_pretrained
from nope_jax.sharding import make_mesh
from tests.interop.test_families import arrays, folder_of
from tests.support.published import CONFIGS


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 2), pytest.param("smollm3", 6, marks=pytest.mark.slow)],  # a period of four, and half of another
)
def test_a_mesh_gets_its_parts(tmp_path, family, layers):
    folder = str(folder_of(tmp_path / "model", CONFIGS[family] | {"num_hidden_layers": layers}))
    expected = arrays(load_pretrained(folder)[0])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        model, _ = load_pretrained(folder, mesh=mesh)
    found = arrays(model)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values)
    split = model.blocks[0].attention.query[...], model.embedding[...]
    assert [array.addressable_shards[0].data.shape for array in split] == [(2, 8, 2, 8), (24, 8)]
