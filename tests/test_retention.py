"""Which checkpoints are kept and found, and the disk that they take."""

import json
import math
import shutil
from collections import namedtuple

import pytest

from nope_jax.retention import Retention, disk_budget, find_step, saved_steps, validation_losses

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: math.inf}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {50, 60}),
        (Retention(1), {60}),
        (Retention(1, every=30), {30, 60}),
        (Retention(1, best=1), {20, 60}),  # of equal losses, the earlier
        (Retention(1, best=3), {20, 30, 40, 60}),
        (Retention(1, best=9), {10, 20, 30, 40, 60}),  # 50 has no finite loss, 60 none yet
        (Retention(2, every=40, best=1), {20, 40, 50, 60}),
    ],
)
def test_what_is_kept(retention, kept):
    assert retention.kept([10, 20, 30, 40, 50, 60], LOSSES) == kept
    assert retention.most(60, 10) >= min(6, len(kept))


@pytest.fixture
def workdir(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    lines = [{"step": 4, "loss": 0.1}, {"step": 4, "validation_loss": 2.5}, {"step": 6, "validation_loss": 0.5}]
    lines += [{"step": 8, "validation_loss": 2.0}, {"step": 12}]  # the last was not finite
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "val')
    return tmp_path


def test_checkpoints_are_found_by_name(workdir):
    assert validation_losses(workdir) == {4: 2.5, 6: 0.5, 8: 2.0, 12: math.inf}
    assert validation_losses(workdir, until=6) == {4: 2.5, 6: 0.5}
    assert [find_step(workdir, step) for step in ("newest", "best", 4)] == [12, 8, 4]  # 6 was not saved
    with pytest.raises(ValueError, match="no checkpoint of step 6; it has those of step 4, 8, 12$"):
        find_step(workdir, 6)
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="no checkpoint has a validation loss .*; it has those of step 4, 8, 12$"):
        find_step(workdir, "best")
    shutil.rmtree(workdir / "checkpoints")
    assert saved_steps(workdir) == []
    with pytest.raises(ValueError, match="no checkpoint yet"):
        find_step(workdir, "best")


def test_the_disk_is_reckoned_before_the_run(workdir, monkeypatch):
    def free(size):
        usage = namedtuple("Usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, size))

    size, retention = 2 * 10**9, Retention(2, every=100, best=1)
    free(100 * 10**9)
    said = disk_budget(workdir / "new" / "run", size, retention, 1000, 10)
    assert said == "checkpoints: 2 GB each, at most 14 at a time, 28 GB; 100 GB free"
    assert disk_budget(workdir / "new", size, Retention(), 25, 10).startswith("checkpoints: 2 GB each, at most 3 at")
    assert disk_budget(workdir / "new", size, Retention(), 5, 10).startswith("checkpoints: 2 GB each, at most 1 at")
    free(10 * 10**9)
    assert disk_budget(workdir / "new", size, retention, 1000, 10).endswith("10 GB free, which is not enough for all")
    free(5 * 10**9)
    with pytest.raises(
        ValueError, match=r"train.keep 2 and the checkpoint being written take 6 GB \(2 GB each\), but .* has 5 GB free"
    ):
        disk_budget(workdir / "new", size, retention, 1000, 10)
    # What is there already need not fit again.
    assert disk_budget(workdir, size, Retention(), 1000, 10).endswith("5 GB free")
