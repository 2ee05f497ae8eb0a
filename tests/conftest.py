"""Settings of every test, made before JAX is imported."""

import os

# Tests compile a lot and compute little: LLVM's optimisations cost more than they save here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import functools
from collections.abc import Iterator

import jax
import pytest

from nope_jax.attention import dot_product
from nope_jax.attention.scanning import scanning_attention
from nope_jax.attention.streaming import streaming_attention


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 8, so that short sequences have interior, diagonal, padded and skipped ones."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (scanning_attention, streaming_attention):
            patch.setattr(dot_product, function.__name__, functools.partial(function, block_size=8))
        jax.clear_caches()
        yield
    jax.clear_caches()
