"""What a run survives: being killed at any moment, going on with other devices and processes."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nope_jax import config as configs
from nope_jax.config import Config
from nope_jax.retention import best_steps, saved_steps, validation_losses
from tests.support.hosts import ROOT, Started, checkpoints, logged, smoke_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_apart")]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return smoke_config(tmp_path_factory.mktemp("smoke"))


def command(config: Config, folder: Path) -> list[str]:
    """The command line of a run, but for its workdir."""
    file = folder / "smoke.py"
    file.write_text(f"from nope_jax.config import *\n\n\ndef get_config():\n    return {config!r}\n")
    return ["train.py", "--config", str(file), "--workdir"]


# Killed at any moment

FORKING = """
import os, sys
from nope_jax import config, training

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a run prints is no answer
        training.train(config.load(line.strip()), line.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Runs of the workdirs that it reads, one after another: forked, so that each need not import everything again."""


class Runs:
    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKING],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, workdir: Path) -> int:
        """The id of the process of a new run."""
        self._server.stdin.write(f"{workdir}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def end(self) -> int:
        """How the run ended, as `os.waitpid` says."""
        return int(self._server.stdout.readline())

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def last_step(workdir: Path) -> int:
    return max(logged(workdir, "loss"), default=0)


def newest(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()), default=0)


def is_kept_to_the_rule(workdir: Path, interval: int) -> bool:
    """Whether there are the newest, those kept for ever, the best, and at most one that is about to be removed."""
    saved, measured = saved_steps(workdir), validation_losses(workdir)
    best = best_steps(range(interval, saved[-1], interval), measured)[0]
    kept = {*range(60, saved[-1] + 1, 60), best, saved[-1]}
    return kept <= set(saved) and len(saved) <= len(kept) + 1


def test_a_run_killed_at_fifty_moments_loses_little_and_needs_no_hand(config, tmp_path):
    interval, draw = 3, random.Random(0)
    often = dataclasses.replace(
        config.train,
        steps=1_000_000,
        checkpoint_every=interval,
        eval_every=interval,
        keep=1,
        keep_every=60,
        keep_best=1,
    )
    config = dataclasses.replace(config, train=often)
    workdir, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in workdir, undisturbed:
        folder.mkdir()
        configs.save(config, folder)

    with Runs() as runs:
        started_in_vain = 0
        for kill in range(50):
            saved = newest(workdir)
            process = runs.start(workdir)
            if kill % 10 == 9:  # anywhere in its start, the reading of the checkpoint included
                time.sleep(draw.uniform(0, 2))
                started_in_vain += 1
            else:  # a few steps and saves later: most of the time one is being written
                deadline = time.monotonic() + 120
                while newest(workdir) <= saved:
                    assert time.monotonic() < deadline, "the run does not go on"
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 0.2))
            subprocess.run(["kill", "-9", str(process)], check=True)
            assert runs.end() == signal.SIGKILL
            assert newest(workdir) >= saved
            # Logged since the last save that is whole: at most one interval, and the one being saved meanwhile.
            assert last_step(workdir) - newest(workdir) <= 2 * interval
        assert newest(workdir) >= (50 - started_in_vain) * interval

        # A run killed between a save and the removals that follow leaves them to the next: one let be is tidy.
        process, deadline = runs.start(workdir), time.monotonic() + 120
        while not is_kept_to_the_rule(workdir, interval):
            assert time.monotonic() < deadline, saved_steps(workdir)
            time.sleep(0.005)
        subprocess.run(["kill", "-9", str(process)], check=True)
        runs.end()

        process = runs.start(undisturbed)
        while last_step(undisturbed) < last_step(workdir):
            time.sleep(0.05)
        subprocess.run(["kill", "-9", str(process)], check=True)
        runs.end()
    losses, expected = logged(workdir, "loss"), logged(undisturbed, "loss")
    assert list(losses) == list(range(1, len(losses) + 1))
    assert losses == {step: expected[step] for step in losses}
    assert all(entry.isdigit() or "tmp" in entry for entry in checkpoints(workdir))  # none was found unreadable


# Other devices, other processes

AT_A_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from nope_jax import cli, distributed
from nope_jax.training import loop

config, workdir, _, place = cli.parse_train(sys.argv[2:])
batches, step = loop.train_batches, int(sys.argv[1])

def acting(data, *, start_step, **hosts):
    for index, batch in enumerate(batches(data, start_step=start_step, **hosts), start_step):
        if index == step:  # the batch of the next step, fetched while this one runs
            ACTION
        yield batch

def run():
    with distributed.joined(place, workdir):
        loop.train(config, workdir)

loop.train_batches = acting
distributed.leave(cli.run(run))
"""
"""train.py, but that something happens to it while the step runs that comes first on its command line."""

STOPPING = AT_A_STEP.replace("ACTION", "os.kill(os.getpid(), signal.SIGTERM)")


def test_a_run_goes_on_with_fewer_devices_and_more_processes(config, tmp_path):
    kept = {"keep": 1, "keep_every": 8, "keep_best": 1, "eval_every": 4, "ema": 0.9}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=16, **kept))
    train = command(config, tmp_path)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    [ended] = Started([*train, str(whole), *mesh], processes=1, devices=8).wait()
    assert ended.status == 0, ended.output

    for stop, devices, options in [
        (4, 8, mesh),
        (7, 4, ["--mesh.data=1", "--mesh.fsdp=4"]),
        (10, 1, []),
    ]:
        arguments = ["-c", STOPPING, str(stop), *train[1:], str(moved), *options]
        [ended] = Started(arguments, processes=1, devices=devices).wait()
        assert ended.status == 128 + signal.SIGTERM, ended.output
        assert f"stopped at step {stop} and saved" in ended.output
    arguments = [*train, str(moved), "--mesh.data=1", "--mesh.fsdp=2", "--mesh.tensor=2"]
    several = Started(arguments, processes=2, devices=2).wait()
    assert [end.status for end in several] == [0, 0], several
    # And what two processes have saved, one reads.
    [ended] = Started([*train, str(moved), "--train.steps", "17"], processes=1, devices=1).wait()
    assert ended.status == 0, ended.output

    for name, until in (("loss", 16), ("validation_loss", 16)):
        losses = {step: loss for step, loss in logged(moved, name).items() if step <= until}
        expected = logged(whole, name)
        assert list(losses) == list(expected)
        # The same rows in the same order, summed in another: float32.
        np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    assert 17 in logged(moved, "loss")
    best = min((8, 12, 16), key=logged(moved, "validation_loss").get)
    assert {"8", "16", "17", str(best)} >= set(checkpoints(moved)) >= {"8", "16", "17"}


# A disk that refuses

REFUSING = """
import errno, os, resource, sys
from nope_jax import cli, distributed
from nope_jax.training import loop

number, error, *arguments = sys.argv[1:]
config, workdir, _, place = cli.parse_train(arguments)
save = loop.Checkpointer.save

def saving(self, step, trees):
    if step == 8 and place.process_id == int(number):
        if error == "EFBIG":
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        else:
            self._manager._checkpointer.save = refuse
    save(self, step, trees)

def refuse(*_, **__):
    raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

def run():
    with distributed.joined(place, workdir):
        loop.train(config, workdir)

loop.Checkpointer.save = saving
distributed.leave(cli.run(run))
"""
"""train.py, but that the save of step 8 fails in one process, with an error: both come first on its command line.

It fails while it writes (EFBIG) or before it begins (any other)."""


@pytest.mark.parametrize(("number", "error"), [(0, "EFBIG"), (1, "EFBIG"), (0, "EIO"), (1, "EIO")])
def test_a_disk_that_refuses_one_process_ends_all_with_the_checkpoint_before(config, tmp_path, number, error):
    train, workdir = command(config, tmp_path), tmp_path / "run"
    arguments = [*train, str(workdir), "--mesh.data=1", "--mesh.fsdp=2", "--train.steps=10000"]
    ended = Started(["-c", REFUSING, str(number), error, *arguments[1:]], processes=2, devices=1).wait(timeout=120)
    assert [end.status for end in ended] == [2, 2], ended
    said = f"cannot save the checkpoint of step 8 ({os.strerror(getattr(errno, error))}); that of step 4 is kept"
    assert f"{workdir}/checkpoints: {said}" in ended[number].output.splitlines()[-1]
    assert f"error: process {number} of 2" in ended[1 - number].output.splitlines()[-1]
    assert said in ended[1 - number].output.splitlines()[-1]
    assert all("Traceback" not in end.output for end in ended)
    assert newest(workdir) == 4
    assert last_step(workdir) < 1000, "the run should end at once, not at the next save"

    ended = Started([*arguments[:-1], "--train.steps=12"], processes=2, devices=1).wait()
    assert [end.status for end in ended] == [0, 0], ended
    assert checkpoints(workdir) == ["12", "8"]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1k none "$2" && cp -r "$3" "$2/run" || exit 77
shift 3
"$@"
status=$?
cp -r "$DISK/run" "$DISK.after"
exit $status
"""
"""Mounts a disk of so many kB at a folder, copies a run there, runs a command, and copies what it left out again."""

FILLING = AT_A_STEP.replace(
    "ACTION", "Path(workdir, 'filler').write_bytes(bytes(shutil.disk_usage(workdir).free - int(os.environ['LEFT'])))"
)


def test_a_disk_that_fills_keeps_the_last_checkpoint_and_room_lets_the_run_go_on(config, tmp_path):
    train = command(config, tmp_path)
    whole, begun, disk, left = (tmp_path / name for name in ("whole", "begun", "disk", "disk.after"))
    [ended] = Started([*train, str(whole)], processes=1, devices=1).wait()
    assert ended.status == 0, ended.output
    [ended] = Started(["-c", STOPPING, "4", *train[1:], str(begun)], processes=1, devices=1).wait()
    assert checkpoints(begun) == ["4"], ended.output

    def kilobytes(folder: Path) -> int:
        return sum(4 * -(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file())

    disk.mkdir()
    checkpoint = kilobytes(begun / "checkpoints")
    size = kilobytes(begun) + 8 * checkpoint
    script = ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(disk), str(begun)]
    result = subprocess.run(
        [*script, sys.executable, "-c", FILLING, "5", *train[1:], str(disk / "run")],
        cwd=ROOT,
        env=os.environ | {"DISK": str(disk), "LEFT": str(checkpoint * 1024 // 2)},  # half of what the next one needs
        text=True,
        capture_output=True,
    )
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"no small disk can be mounted here: {result.stderr}")
    assert result.returncode == 2, result.stderr
    assert "No space left on device" in result.stderr
    assert newest(left) == 4
    (left / "filler").unlink()

    [ended] = Started([*train, str(left)], processes=1, devices=1).wait()
    assert ended.status == 0, ended.output
    assert logged(left, "loss") == logged(whole, "loss")
    assert checkpoints(left) == checkpoints(whole)
