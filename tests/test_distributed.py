"""Several processes of one run: that they find each other, compute what one would, and end together."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nope_jax import distributed
from nope_jax.cli import parse_train
from nope_jax.config import Config
from nope_jax.data import batches
from nope_jax.distributed import PEER_LOST, ProcessSpec
from nope_jax.locks import held
from nope_jax.paths import check_location
from nope_jax.sharding import AXES, process_share
from tests.support.hosts import ROOT, Started, checkpoints, logged, smoke_config

pytestmark = pytest.mark.usefixtures("compiled_apart")

# The command line


def parse(tmp_path: Path, arguments: str) -> ProcessSpec:
    config = tmp_path / "config.py"
    config.write_text("from nope_jax.config import Config\n\n\ndef get_config():\n    return Config()\n")
    return parse_train(["--config", str(config), "--workdir", "x", *arguments.split()]).place


def test_the_options_name_a_process_and_need_not(tmp_path):
    given = parse(tmp_path, "--coordinator host:123 --num_processes 4 --process_id 3 --peer_timeout 20")
    assert given == ProcessSpec("host:123", 4, 3, peer_timeout=20)
    assert given.named() == ("host:123", 4, 3, None)
    assert parse(tmp_path, "").named() is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--coordinator a:1", "--coordinator alone: --coordinator, --num_processes and --process_id go together"),
        ("--num_processes 2 --process_id 0", "--num_processes and --process_id alone"),
        ("--num_processes 2", "--num_processes alone"),
        ("--coordinator a --num_processes 2 --process_id 0", "--coordinator must be HOST:PORT, not 'a'"),
        ("--coordinator a:b --num_processes 2 --process_id 0", "--coordinator must be HOST:PORT, not 'a:b'"),
        ("--coordinator a:1 --num_processes 2 --process_id 2", "--process_id must be from 0 to 1 .*, not 2"),
        ("--coordinator a:1 --num_processes 0 --process_id 0", "--num_processes must be at least 1, not 0"),
        ("--peer_timeout 1", "--peer_timeout must be at least 5 seconds, not 1"),
        ("--join_timeout soon", "--join_timeout must be an integer or None, not 'soon'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, arguments, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse(tmp_path, arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [ProcessSpec(), ProcessSpec(num_processes=1)])
def test_alone_nothing_happens(place, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("initialised"))
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    threads = threading.active_count()
    with distributed.joined(place, tmp_path):
        assert threading.active_count() == threads


def test_slurm_says_which_process_this_is(monkeypatch):
    environment = {"JOB_ID": "4097", "STEP_NODELIST": "node[07-09]", "NTASKS": "3", "PROCID": "2", "LOCALID": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed._find(ProcessSpec()) == (f"node07:{65536 - 4096 + 1}", 3, 2, [0])
    assert distributed._find(ProcessSpec("other:1", 2, 1)) == ("other:1", 2, 1, None)
    monkeypatch.setenv("SLURM_PROCID", "two")
    with pytest.raises(ValueError, match="looks like a cluster, but .*'two'.* --num_processes 1 for one process alone"):
        distributed._find(ProcessSpec())


# The roll


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def answer(address: str, processes: int, number: int, timeout: int = 5) -> tuple[list, threading.Thread]:
    """What a process other than 0 gets for its answer to the roll, once the thread returned with it has ended."""
    results: list = []

    def run() -> None:
        try:
            found = distributed._Found(address, processes, number, None)
            results.append(distributed._join_rendezvous(found, ProcessSpec(join_timeout=timeout)))
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return results, thread


def call(address: str, processes: int, timeout: int) -> dict:
    found = distributed._Found(address, processes, 0, None)
    return distributed._host_rendezvous(found, ProcessSpec(join_timeout=timeout))


def test_all_come_whoever_else_knocks(address):
    others = [answer(address, 3, number) for number in (1, 2)]
    stranger = threading.Thread(target=knock, args=(address,))
    stranger.start()
    came = call(address, 3, timeout=5)
    for results, thread in others:
        thread.join()
        assert list(results[0]) == [0]
        results[0][0].close()
    stranger.join()
    assert sorted(came) == [1, 2]
    assert came[1].host == socket.gethostname()
    for connection in came.values():
        connection.close()


def knock(address: str) -> None:
    host, port = address.split(":")
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return
        time.sleep(0.05)


def test_who_does_not_come_is_named_on_all_that_came(address):
    results, thread = answer(address, 4, 2)
    with pytest.raises(TimeoutError, match="2 of 4 processes came within 1 s; missing: 1, 3. Start .*--worker=all"):
        call(address, 4, timeout=1)
    thread.join()
    assert "2 of 4 processes came within 1 s; missing: 1, 3." in str(results[0])


def test_without_process_0_the_others_say_so(address):
    results, thread = answer(address, 2, 1, timeout=1)
    thread.join()
    assert f"process 0 did not answer process 1 at {address} within 1 s (Connection refused)" in str(results[0])


def test_processes_of_different_runs_are_told(address):
    results, thread = answer(address, 3, 1)
    with pytest.raises(ValueError, match="process 1 was started as one of 3, process 0 as one of 2"):
        call(address, 2, timeout=5)
    thread.join()
    assert "process 1 was started as one of 3, process 0 as one of 2" in str(results[0])


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot listen at --coordinator {address}: Address already in use"):
            call(address, 2, timeout=1)


# The watch

WATCHED = """
import sys, time
from pathlib import Path
from nope_jax import distributed
distributed.OWN_END = 0.5
address, number, workdir = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
place = distributed.ProcessSpec(address, 3, number, join_timeout=20)
roll = distributed._host_rendezvous if number == 0 else distributed._join_rendezvous
watch = distributed._Watch(place.named(), roll(place.named(), place), workdir)
print("here", flush=True)
order = sys.stdin.readline().strip()
if order:
    watch.leave(None if order == "done" else order, 2)
    distributed.leave(0 if order == "done" else 2)
time.sleep(20)
"""


@pytest.fixture
def watched(address, tmp_path) -> Iterator[list[subprocess.Popen]]:
    """Three processes that watch each other, and end as their standard input says."""
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, address, str(number), str(tmp_path)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "here\n"
    yield list(processes)
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def errors(processes: list[subprocess.Popen]) -> list[str]:
    for process in processes:
        process.wait(15)
    return [process.stderr.read() for process in processes]


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_others_who_say_which_it_was(watched, number):
    victim = watched.pop(number)
    victim.kill()
    for error in errors(watched):
        assert f"error: process {number} of 3" in error
        assert "died; start the same command again on all 3: it goes on from step 40\n" in error
    assert [process.returncode for process in watched] == [PEER_LOST, PEER_LOST]


@pytest.mark.parametrize("number", [0, 2])
def test_a_process_that_ends_by_an_error_of_its_own_tells_the_others(watched, number):
    last = watched.pop(number)
    last.stdin.write("OSError: no space left\n")
    last.stdin.flush()
    for error in errors(watched):
        assert f"process {number} of 3" in error
        assert "ended: OSError: no space left\n" in error
    assert [process.returncode for process in watched] == [2, 2]
    last.wait(15)
    assert last.returncode == 2


with pytest.raises(ValueError) as REFUSAL:
    check_location("http://elsewhere", "--workdir")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FloatingPointError(), distributed.DIVERGED),
        (REFUSAL.value, 2),
        (ValueError(), 1),
        (OSError(), 2),
        (TypeError(), 1),
        (KeyboardInterrupt("SIGINT: stopped at step 3 and saved"), 130),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: a link is down"), PEER_LOST),
        (ValueError("UNKNOWN: Gloo AllGather failed"), PEER_LOST),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1),
    ],
)
def test_only_an_error_that_would_come_again_keeps_its_status_on_the_others(error, status):
    assert distributed._status(error) == status


def test_processes_that_are_done_end_in_peace(watched):
    for process in watched:
        process.stdin.write("done\n")
        process.stdin.flush()
    assert errors(watched) == ["", "", ""]
    assert [process.returncode for process in watched] == [0, 0, 0]


# The rows


class Device:
    """As much of a device as a mesh looks at."""

    platform = device_kind = "cpu"

    def __init__(self, number: int, process: int):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("shape", "processes", "expected"),
    [
        ((4, 1, 1, 1), [0, 0, 1, 1], (0, 2)),
        ((2, 2, 1, 1), [3, 2, 1, 0], (3, 4)),
        ((4, 1, 1, 1), [0, 1, 0, 1], (0, 2)),
        ((1, 1, 4, 1), [0, 0, 1, 1], (0, 1)),  # all hold all rows
        ((2, 1, 1, 2), [1, 2, 3, 0], (1, 2)),
    ],
)
def test_processes_share_the_rows_that_their_devices_hold(shape, processes, expected):
    devices = np.array([Device(number, process) for number, process in enumerate(processes)])
    assert process_share(Mesh(devices.reshape(shape), AXES)) == expected


def test_rows_that_processes_hold_in_part_are_refused():
    devices = np.array([Device(number, number // 2) for number in range(6)])
    with pytest.raises(ValueError, match="mesh.data 2 x mesh.fsdp 1 does not divide over the devices of 3 processes"):
        process_share(Mesh(devices.reshape(2, 1, 3, 1), AXES))


def test_a_process_reads_no_rows_but_its_own(config, monkeypatch):
    read: list[int] = []

    class Recorded(batches.Windows):
        def __getitem__(self, index):
            read.append(int(index))
            return super().__getitem__(index)

    monkeypatch.setattr(batches, "Windows", Recorded)
    shares = []
    for host in range(3):
        read.clear()
        batches.validation_batches(config.data, 2, process_index=host, process_count=4)
        shares.append(list(read))
    read.clear()
    batches.validation_batches(config.data, 2)
    assert [len(share) for share in shares] == [4, 4, 4]
    for host, share in enumerate(shares):  # two batches of 8 rows
        assert share == read[2 * host : 2 * host + 2] + read[8 + 2 * host : 8 + 2 * host + 2]


# Checkpoints of two processes

SAVING = """
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nope_jax import cli, distributed
from nope_jax.checkpoint import Checkpointer

workdir, _, address, _, processes, _, process = sys.argv[1:]

def run():
    with distributed.joined(distributed.ProcessSpec(address, int(processes), int(process)), Path(workdir)):
        mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("x"))

        def trees(step):
            # Random bits, so that no byte of the file is redundant to its compression.
            values = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
            return {"params": {"kernel": jax.make_array_from_callback((64, 64), sharding, values.__getitem__)}}

        with jax.set_mesh(mesh), Checkpointer(workdir) as checkpointer:
            for step in 10, 20, 30:
                checkpointer.save(step, trees(step))
            checkpointer.wait()
            if process == "1":  # its part of one checkpoint cannot be read, which process 0 cannot see
                restore = checkpointer._reader.restore

                def broken(folder, **arguments):
                    if folder.name == "30":
                        raise ValueError("truncated")
                    return restore(folder, **arguments)

                checkpointer._reader.restore = broken
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), trees(0))
            step, restored = checkpointer.restore(abstract)
            print("restored", step, checkpointer.latest_step)
            for ours, theirs in zip(*(tree["params"]["kernel"].addressable_shards for tree in (restored, trees(20)))):
                np.testing.assert_array_equal(ours.data, theirs.data)
            checkpointer.save(30, trees(30))
            checkpointer.wait()

distributed.leave(cli.run(run))
"""


@pytest.mark.slow
def test_all_go_back_from_a_checkpoint_that_one_cannot_read(tmp_path):
    first, second = Started(["-c", SAVING, str(tmp_path)], processes=2, devices=2).wait()
    assert (first.status, second.status) == (0, 0), (first, second)
    assert "restored 20 20" in first.output and "restored 20 20" in second.output
    gone_back = "cannot read the checkpoint of step 30 (process 1 cannot read its part); going back to that of step 20"
    assert gone_back in first.output
    assert "going back" not in second.output  # it is said once
    assert checkpoints(tmp_path) == ["20", "30", "30.unreadable"]


# Whole runs


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return smoke_config(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="module")
def command(config, tmp_path_factory) -> list[str]:
    """The command line of the smoke run, but for its workdir."""
    file = tmp_path_factory.mktemp("command") / "smoke.py"
    file.write_text(f"from nope_jax.config import *\n\n\ndef get_config():\n    return {config!r}\n")
    return ["train.py", "--config", str(file), "--workdir"]


@pytest.fixture(scope="module")
def one_process(command, tmp_path_factory) -> Path:
    """The workdir of that run, by one process of eight devices."""
    workdir = tmp_path_factory.mktemp("one")
    [ended] = Started([*command, str(workdir), *MESH], processes=1, devices=8).wait()
    assert ended.status == 0, ended.output
    return workdir


MESH = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]


def assert_same_losses(workdir: Path, expected: Path) -> None:
    for name in ("loss", "validation_loss"):
        losses, others = logged(workdir, name), logged(expected, name)
        assert list(losses) == list(others)
        # Sums over processes are made in another order: float32.
        np.testing.assert_allclose(list(losses.values()), list(others.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, MESH), (4, MESH), (2, ["--mesh.data=1", "--mesh.tensor=2", "--mesh.sequence=4"])],
    ids=["2", "4", "2 of the same rows"],
)
def test_processes_train_as_one_and_write_once(command, one_process, tmp_path, processes, mesh):
    ended = Started([*command, str(tmp_path), *mesh], processes=processes, devices=8 // processes).wait()
    assert [end.status for end in ended] == [0] * processes, ended
    assert_same_losses(tmp_path, one_process)
    assert checkpoints(tmp_path) == ["12", "8"]
    written = {entry.name for entry in tmp_path.iterdir()}
    assert written == {"checkpoints", "config.json", "data.json", "metrics.jsonl"}
    assert ["validation loss" in end.output for end in ended] == [True] + [False] * (processes - 1)


@pytest.mark.slow
def test_a_second_run_of_processes_and_one_that_reads_other_data_end_together(config, command, tmp_path):
    with held(tmp_path):
        ended = Started([*command, str(tmp_path)], processes=2, devices=1).wait(timeout=120)
    refusal = f"error: {tmp_path} is being written by process {os.getpid()} on {socket.gethostname()}"
    for end in ended:
        assert (end.status, end.output.splitlines()[-1].startswith(refusal)) == (2, True), ended
    assert not list(tmp_path.iterdir())

    corpus = Path(config.data.source.removeprefix("text:")).parent
    home = Path(shutil.copytree(corpus, tmp_path / "home" / "corpus")).parent
    (home / "corpus" / "more.txt").write_text("of this host alone " * 100)
    here = {0: lambda: os.chdir(home), 1: lambda: os.chdir(corpus.parent)}
    arguments = [str(ROOT / command[0]), *command[1:], str(tmp_path / "run"), "--data.source", "text:corpus/*.txt"]
    ended = Started(arguments, processes=2, devices=1, prepare=here).wait(timeout=120)
    says = "error: process 1 does not read the data that process 0 reads: the train documents of data.source text:"
    for end in ended:
        assert (end.status, end.output.splitlines()[-1].startswith(says)) == (2, True), ended


@pytest.mark.slow
def test_a_part_of_the_processes_alone_says_what_is_missing(command, tmp_path):
    [ended] = Started([*command, str(tmp_path), "--join_timeout", "5"], processes=4, devices=1, run=[0]).wait()
    assert ended.status == 2
    assert ended.output.startswith("error: 1 of 4 processes came within 5 s; missing: 1, 2, 3.")
    assert not list(tmp_path.iterdir())


def wait_for_step(workdir: Path, step: int, run: Started) -> None:
    while max(logged(workdir, "loss"), default=0) < step:
        assert all(process.poll() is None for process in run.processes), run.wait()
        time.sleep(0.05)


LONG = ["--train.steps=100000", "--train.checkpoint_every=20", "--train.eval_every=100000"]


@pytest.fixture(scope="module")
def never_stopped(command, tmp_path_factory) -> Path:
    """The long run for as many steps as the others here take."""
    workdir = tmp_path_factory.mktemp("never")
    run = Started([*command, str(workdir), *LONG], processes=2, devices=1)
    wait_for_step(workdir, 300, run)
    for process in run.processes:
        process.kill()
    run.wait()
    return workdir


def assert_goes_on(command: list[str], workdir: Path, expected: Path) -> None:
    """Starts a long run again, for 40 steps more; its losses are those of the one never stopped, to the bit."""
    before = max(logged(workdir, "loss"))
    run = Started([*command, str(workdir), *LONG], processes=2, devices=1)
    wait_for_step(workdir, before + 40, run)
    for process in run.processes:
        process.kill()
    run.wait()
    losses, others = logged(workdir, "loss"), logged(expected, "loss")
    common = losses.keys() & others.keys()
    assert len(common) > 60
    assert {step: losses[step] for step in common} == {step: others[step] for step in common}


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "number"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGHUP, 1)])
def test_a_signal_to_one_stops_all_at_one_step(command, never_stopped, tmp_path, signum, number):
    heed = functools.partial(signal.signal, signum, signal.SIG_DFL)  # also where the tests themselves run under nohup
    run = Started([*command, str(tmp_path), *LONG], processes=2, devices=1, prepare={number: heed})
    wait_for_step(tmp_path, 30, run)
    run.processes[number].send_signal(signum)
    ended = run.wait()
    step = max(logged(tmp_path, "loss"))
    assert str(step) in checkpoints(tmp_path)
    for end in ended:
        assert end.status == 128 + signum
        assert f"{signum.name}: stopped at step {step} and saved; the same command goes on from there" in end.output
    assert_goes_on(command, tmp_path, never_stopped)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "number"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_a_process_that_dies_ends_the_others_in_time(command, never_stopped, tmp_path, signum, number):
    run = Started([*command, str(tmp_path), *LONG, "--peer_timeout=10"], processes=2, devices=1)
    wait_for_step(tmp_path, 30, run)
    other = run.processes[1 - number]
    run.processes[number].send_signal(signum)
    died = time.monotonic()
    other.wait(60)
    assert time.monotonic() - died < (10 + 15 if signum == signal.SIGSTOP else 10)
    run.processes[number].kill()
    ended = run.wait()[1 - number]
    assert ended.status == PEER_LOST
    last = ended.output.splitlines()[-1]
    assert last.startswith("error: process")
    assert f"process {number} of 2" in last or signum == signal.SIGSTOP
    assert "start the same command again on all 2: it goes on from step" in last
    assert int(last.split()[-1]) >= 20
    if signum == signal.SIGKILL:
        assert_goes_on(command, tmp_path, never_stopped)
