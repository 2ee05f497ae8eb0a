"""Checkpoints: whole or not at all, and never silently wrong."""

import errno
import gc
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.retention import Retention

pytestmark = pytest.mark.usefixtures("few_objects")


def trees(step: int) -> dict:
    # Random bits, so that no byte of the file is redundant to its compression.
    values = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    numbers = {"params": {"kernel": values}, "opt_state": {"mu": {"kernel": values**2}, "count": np.int32(step)}}
    return jax.tree.map(jnp.asarray, numbers)


ABSTRACT = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), trees(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir) as checkpointer:
        for step in 10, 20, 30:
            checkpointer.save(step, trees(step))
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def data_file(workdir: Path, step: int) -> Path:
    """The file that holds most of the parameters of a checkpoint."""
    files = (workdir / "checkpoints" / str(step) / "params").rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


def assert_restores(workdir: Path, step: int) -> None:
    with Checkpointer(workdir) as checkpointer:
        found, restored = checkpointer.restore(ABSTRACT)
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, restored, trees(step))


def test_the_newest_two_are_kept_and_restore_in_bits(workdir):
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["20", "30"]
    assert_restores(workdir, 30)


def test_a_save_outlives_what_happens_to_its_arrays(tmp_path):
    state = trees(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state)
    assert_restores(tmp_path, 1)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, pytest.param(Path.unlink, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_warned_about_and_the_one_before_it_restored(workdir, damage, capfd):
    damage(data_file(workdir, 30))
    with pytest.warns(UserWarning, match="step 30 .*going back to that of step 20"):
        assert_restores(workdir, 20)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpointer(workdir) as checkpointer:
        assert checkpointer.latest_step == 20
        checkpointer.save(30, trees(30))
    assert_restores(workdir, 30)


def test_reading_only_leaves_a_damaged_checkpoint_where_it_is(workdir):
    truncate(data_file(workdir, 30))
    with Checkpointer(workdir, read_only=True) as checkpointer, pytest.warns(UserWarning, match="step 20"):
        checkpointer.restore(ABSTRACT)
    assert (workdir / "checkpoints" / "30").is_dir()


def test_a_checkpoint_that_is_removed_while_it_is_read_is_followed_by_the_newest(workdir, monkeypatch):
    read, steps = Checkpointer._read, iter((40, 50, 60))

    def slow(self, step, abstract):
        if (newer := next(steps, None)) is not None:  # meanwhile the run that saves goes on
            with Checkpointer(workdir, keep=Retention(1)) as training:
                training.save(newer, trees(newer))
        return read(self, step, abstract)

    monkeypatch.setattr(Checkpointer, "_read", slow)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step, restored = checkpointer.restore(ABSTRACT)
    assert step == 60
    jax.tree.map(np.testing.assert_array_equal, restored, trees(60))

    steps = iter(range(70, 1000))
    monkeypatch.setattr(Checkpointer, "_read", slow)
    with Checkpointer(workdir, read_only=True) as checkpointer, pytest.raises(ValueError, match="that can be read"):
        checkpointer.restore(ABSTRACT)
    assert next(steps) < 100


def test_when_none_can_be_read_all_stay_and_each_is_named(workdir):
    for step in 20, 30:
        truncate(data_file(workdir, step))
    with Checkpointer(workdir) as checkpointer, pytest.raises(ValueError, match="step 30: .*step 20: "):
        checkpointer.restore(ABSTRACT)
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["20", "30"]


# The writes that orbax abandons complain of their closed event loop when they are collected, whenever that is.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_os_error_and_the_last_good_checkpoint_stays(workdir):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="step 40 .*that of step 30 is kept"), Checkpointer(workdir) as checkpointer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            checkpointer.save(40, trees(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_restores(workdir, 30)
    gc.collect()


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(workdir, monkeypatch):
    def busy(*_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with Checkpointer(workdir) as checkpointer:
        monkeypatch.setattr(checkpointer._manager._checkpoint_deleter, "delete_steps", busy)
        checkpointer.save(40, trees(40))
        with pytest.warns(UserWarning, match="cannot remove an old checkpoint .*Directory not empty"):
            checkpointer.wait()
        checkpointer.check()
        monkeypatch.undo()
        checkpointer.save(50, trees(50))
    assert_restores(workdir, 50)


def test_no_checkpoint_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step is None
        with pytest.raises(ValueError, match="there is none"):
            checkpointer.restore(ABSTRACT)


def test_a_workdir_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "missing")):
        load_model(tmp_path / "missing")
