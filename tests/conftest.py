"""Settings of every test, made before JAX is imported."""

import os
from importlib.metadata import version
from pathlib import Path

# Tests compile a lot and compute little: LLVM's optimisations cost more than they save here, and so do XLA's emitters
# for fusions, which 0.10 can do without: it then compiles in a third of the time.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    + ["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10.")
    + [os.environ.get("XLA_FLAGS", "")]
)
# What one process of a run has compiled, the others need not, nor does the next run: four times faster. (JAX compresses
# it with zstandard if that is installed, and otherwise with zlib, which takes seven times as long.)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# To compile for GPUs, neither one of them nor its libraries are needed.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# Which code this user trusts is not for tests to say.
os.environ["XDG_STATE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "state")

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator

import jax
import jaxtyping
import pytest

import tests.support.typechecks  # noqa: F401  which the import hook refers to, before it meets nope_jax
from nope_jax.attention import backends
from nope_jax.attention.backends.pallas.gpu import tiles
from nope_jax.attention.backends.pallas.gpu.sizes import Blocks, Sizes
from nope_jax.compiler_flags import set_flags
from tests.support.config_file import CONFIG_FILE

set_flags()  # as train.py does; those for TPUs are read when JAX starts
# Programs are traced into millions of objects that live long, all of which the collector would look at again and again.
gc.set_threshold(100_000, 50, 1000)

_raises = pytest.raises


def freeze() -> None:
    """What there is now, modules and programs above all, stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    freeze()


def pytest_sessionfinish() -> None:
    freeze()  # before pytest, and Python as it ends, collect several times


@contextlib.contextmanager
def unchecked():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def raises(*args, **kwargs):
    """`pytest.raises`, within which no types are checked: what is refused must be refused by the code itself."""
    with unchecked(), _raises(*args, **kwargs) as caught:
        yield caught


pytest.raises = raises


@pytest.fixture
def few_objects() -> None:
    """For tests that collect garbage, as does a read that fails: their own, not what hundreds before them have left."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG_FILE)
    return path


@pytest.fixture
def stand_ins() -> Iterator[None]:
    """For a test that gives functions what only does as if it were what their signatures ask for."""
    with unchecked():
        yield


@functools.cache
def _small_backends() -> dict[str, backends.Backend]:
    wide, high, square = Blocks(16, 8, 4, 1), Blocks(8, 16, 4, 1), Blocks(8, 8, 4, 1)
    sizes: dict[str, dict] = {name: {"block_size": 8} for name in ("streaming", "pallas_tpu")}
    sizes["pallas_gpu"] = {"sizes": Sizes(wide, high, wide, square, wide, square)}
    table = dict(backends.BACKENDS)
    for name, small in sizes.items():
        table[name] = dataclasses.replace(table[name], attend=functools.partial(table[name].attend, **small))
    return table


# Part of the key of all that JAX caches: what is compiled with small blocks serves no other test, nor the reverse.
_blocks = jax.make_user_context(default_value=None)


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 8 or 16, so that short sequences have interior, diagonal, padded and skipped ones."""
    with pytest.MonkeyPatch.context() as patch, _blocks("small"):
        patch.setattr(backends, "BACKENDS", _small_backends())
        patch.setattr(tiles, "PROGRAMS", 7)  # each of which has several blocks, where programs have memory of their own
        yield


@pytest.fixture(scope="module")
def compiled_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the processes of a module compile lies in a place of their own: some are killed while they write there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: _compilations.append(event))


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How many programs have been compiled, or read from the cache on disk, so far."""
    return lambda: _compilations.count("/jax/core/compile/backend_compile_duration")
