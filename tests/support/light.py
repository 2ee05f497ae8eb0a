"""Every attention function where no package is installed but jax, numpy and jaxtyping, which `test_layout.py` runs.

Each is traced twice, and what it calls is compiled for the first call alone. One is run. Then, with all packages, what
a command line imports before it knows what to do.
"""

# ruff: noqa: E402

import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

DECLARED = {"jax", "numpy", "jaxtyping"}
THEIRS = {"jaxlib", "ml_dtypes", "opt_einsum", "scipy", "wadler_lindig"}
REFUSED = packages_distributions().keys() - DECLARED - THEIRS - {"nope_jax"}


class Others(PathFinder):
    """Finds what is installed but for the packages refused."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in REFUSED else super().find_spec(name, path, target)


assert "flax" in REFUSED
sys.meta_path[sys.meta_path.index(PathFinder) :] = [Others]

import jax
import jax.numpy as jnp
import numpy as np

import nope_jax
import nope_jax.attention
import nope_jax.encodings

T, N, H, D = 8, 2, 4, 6


def ones(*shape):
    return jnp.asarray(np.ones(shape, np.float32))


PARAMETERS = {
    "alibi": {},
    "cope": {"embeddings": ones(5, H)},
    "deberta": {
        "relative": ones(4, D),
        "key_kernel": ones(D, N, H),
        "query_kernel": ones(D, N, H),
    },
    "fire": {"hidden_weights": ones(3), "hidden_bias": ones(3), "weights": ones(3, N)},
    "forgetting": {"log_forget": -ones(1, T, N)},
    "kerple": {"r1": ones(N), "r2": ones(N)},
    "nezha": {},
    "nope": {},
    "rope": {},
    "shaw": {"key_table": ones(5, H), "value_table": ones(5, H)},
    "t5": {"table": ones(8, N)},
    "transformer_xl": {
        "content_bias": ones(N, H),
        "position_bias": ones(N, H),
        "position_kernel": ones(D, N, H),
    },
    "tupe": {
        "positions": ones(T, D),
        "query_kernel": ones(D, N, H),
        "key_kernel": ones(D, N, H),
    },
    "xpos": {},
}
names = {name.removesuffix("_attention") for name in nope_jax.attention.__all__ if name.endswith("_attention")}
assert names - {"dot_product", "encoded"} == PARAMETERS.keys(), names ^ PARAMETERS.keys()

query, key, value = map(jnp.asarray, np.random.default_rng(0).normal(size=(3, 1, T, N, H)).astype(np.float32))


def programs(attend, parameters):
    """What it calls that is compiled, and the shape of its result."""
    jaxpr, out = jax.make_jaxpr(lambda *arrays: attend(*arrays, **parameters), return_shape=True)(query, key, value)
    return [eqn.params["jaxpr"] for eqn in jaxpr.eqns if "jaxpr" in eqn.params], out.shape


for name, parameters in PARAMETERS.items():
    attend = getattr(nope_jax.attention, f"{name}_attention")
    (first, shape), (second, _) = programs(attend, parameters), programs(attend, parameters)
    assert shape == query.shape, name
    assert first and all(one is other for one, other in zip(first, second, strict=True)), name
assert np.isfinite(nope_jax.attention.alibi_attention(query, key, value)).all()

for name in nope_jax.__all__:
    try:
        getattr(nope_jax, name)
    except ImportError as error:
        assert "pip install 'nope_jax[train]'" in str(error), error
    else:
        raise AssertionError(f"{name} did without the packages of nope_jax[train]")

sys.meta_path[sys.meta_path.index(Others) :] = [PathFinder]
import nope_jax.cli

assert not {"flax", "matplotlib", "orbax"} & sys.modules.keys()
