"""The processes of one run, usually one per host: how they find each other, and how a failure of one ends the others.

Before JAX connects them, the other processes report their number to process 0 on the coordinator's port. Process 0
names those that are missing. These connections stay open. The kernel closes the connection of a process that dies for
any reason, so the others learn of it at once, report it and exit, instead of waiting in a collective.
"""

import atexit
import contextlib
import ctypes
import json
import os
import pickle
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from nope_jax.errors import is_refusal
from nope_jax.paths import Location

PEER_LOST = 3
"""Exit status of a process that ends because another one died."""

DIVERGED = 4
"""Exit status of a run whose loss or gradient is not finite."""

OWN_END = 10.0
"""Seconds that a process has to end by itself after another has ended, since they usually end for the same reason."""


class ProcessSpec(NamedTuple):
    """The process number and count given on the command line; None: taken from the environment."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    """Number of this process, from 0."""
    join_timeout: int = 300
    """Seconds to wait for all processes to join."""
    peer_timeout: int = 60
    """Seconds without an answer after which a process counts as dead."""

    def named(self) -> "_Found | None":
        """Return the process that the options give, or None if they leave it to the environment.

        Raises:
            ValueError: the options are inconsistent.
        """
        for name in ("join_timeout", "peer_timeout"):
            if getattr(self, name) < 5:
                raise ValueError(f"--{name} must be at least 5 seconds, not {getattr(self, name)}")
        coordinator, processes, process = self[:3]
        if processes is not None and processes < 1:
            raise ValueError(f"--num_processes must be at least 1, not {processes}")
        if coordinator is None and process is None and processes in (None, 1):
            return None if processes is None else _Found(None, 1, 0, None)
        if coordinator is None or processes is None or process is None:
            given = [f"--{name}" for name in self._fields[:3] if getattr(self, name) is not None]
            raise ValueError(
                f"{' and '.join(given)} alone: --coordinator, --num_processes and --process_id go together"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator must be HOST:PORT, not {coordinator!r}")
        if not 0 <= process < processes:
            raise ValueError(f"--process_id must be from 0 to {processes - 1} (--num_processes - 1), not {process}")
        return _Found(coordinator, processes, process, None)


class _Found(NamedTuple):
    """The resolved process number and count, and the devices the environment assigns to it (None: all)."""

    coordinator: str | None
    num_processes: int
    process_id: int
    local_devices: Sequence[int] | None


@contextlib.contextmanager
def joined(place: ProcessSpec, workdir: Location | None) -> Iterator[None]:
    """Connect this process with the others of its run for the duration of the context; with one process, do nothing.

    If `place` gives no number and count, the environments that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes jobs)
    determine them. During the context, the death of any process ends this one with status PEER_LOST and a message that
    names it. If another process ends with an error that would recur (bad input, divergence, a program error), this one
    ends with its status.

    Args:
        place: Values given on the command line.
        workdir: Workdir of the run; the message names its newest checkpoint. None for work that does not stop at a
            signal by `agreed_stop`: SIGTERM then ends a process, and with it the others.

    Raises:
        TimeoutError: not all processes joined; the message names those missing.
        ValueError: the environment or another process gives inconsistent values.
    """
    found = _find(place)
    if found.num_processes == 1:
        yield
        return
    connections = (_host_rendezvous if found.process_id == 0 else _join_rendezvous)(found, place)
    watch = _Watch(found, connections, workdir)
    import jax

    if workdir is None:
        jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    jax.distributed.initialize(
        found.coordinator,
        found.num_processes,
        found.process_id,
        local_device_ids=found.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=place.join_timeout,
        heartbeat_timeout_seconds=place.peer_timeout,
    )
    try:
        yield
    except BaseException as error:
        if _is_of_the_system(error):
            watch.wait_for_verdict()  # the first sign of a death is often a failed collective
        watch.leave(f"{type(error).__name__}: {error}", _status(error))
        atexit.register(_exit, _status(error))  # runs before JAX's own handler, which waits for the others
        raise
    watch.leave(None)


def _status(error: BaseException) -> int:
    """Exit status of all processes after one failed: that of its error if the error would recur."""
    if _is_of_the_system(error):
        return PEER_LOST
    if isinstance(error, FloatingPointError):
        return DIVERGED
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 2 if is_refusal(error) or isinstance(error, OSError) else 1


def _is_of_the_system(error: BaseException) -> bool:
    """Whether the error comes from a device or from the connection between devices."""
    import jax

    # Some CPU collectives raise ValueError with the same text.
    raised_by_jax = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    )
    return raised_by_jax and "RESOURCE_EXHAUSTED" not in str(error)


def leave(status: int) -> NoReturn:
    """End the process. A failed one does not wait for the others, as JAX's exit handler would."""
    if status:
        _exit(status)
    sys.exit(0)


def _exit(status: int) -> NoReturn:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError):  # a closed terminal, or a pipe without a reader
            stream.flush()
    os._exit(status)


def agreed_stop(received: list[int], step: int) -> int | None:
    """Return the signal with which all processes stop after this step, if any of them has received one.

    All processes must call this after every step. JAX determines the step: the first that no process has started when
    the signal arrives.

    Args:
        received: Signals that this process has caught. With several processes JAX catches SIGTERM instead.
        step: The last dispatched step.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return received[0] if received else None
    if received:
        os.kill(os.getpid(), signal.SIGTERM)
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    return int(multihost_utils.process_allgather(received[0] if received else 0).max()) or signal.SIGTERM


SAID = 1024
"""Maximum size of a message, in bytes of UTF-8; longer ones are truncated."""


def said_by_all(text: str) -> list[str]:
    """Gather a text from each process, in order of process number. All processes must call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode()[:SAID].ljust(SAID, b"\0"), np.uint8)
    return [
        row.tobytes().rstrip(b"\0").decode(errors="ignore")
        for row in np.asarray(multihost_utils.process_allgather(said))
    ]


_Value = TypeVar("_Value")


def from_process_0(function: Callable[[], _Value]) -> _Value:
    """Return what a function returns on process 0, where alone it is called. All processes must call this."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if jax.process_count() == 1:
        return function()
    own = np.frombuffer(pickle.dumps(function()) if jax.process_index() == 0 else b"", np.uint8)
    size = int(broadcast_one_to_all(np.int32(own.size)))
    return pickle.loads(np.asarray(broadcast_one_to_all(np.resize(own, size))).tobytes())


def make_shared(folder: Location, name: str = "the workdir") -> None:
    """Create a folder on process 0, and check that all processes see it.

    Raises:
        ValueError: one does not.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        return
    probe = folder / f".probe-{multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31))}"
    if jax.process_index() == 0:
        probe.write_text("")
    multihost_utils.sync_global_devices("probe written")
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(probe.exists())))
    if jax.process_index() == 0:
        probe.unlink()
    if blind.size:
        raise ValueError(
            f"process {blind[0]} does not see what process 0 writes to {folder}: {name} must be on a file system "
            "shared by all hosts"
        )


def _find(place: ProcessSpec) -> _Found:
    named = place.named()
    if named is not None:
        return named
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize uses

    try:
        coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, place.join_timeout
        )
    except Exception as error:  # each environment raises its own
        raise ValueError(
            f"this looks like a cluster, but the number of this process cannot be determined ({error}); give "
            "--coordinator, --num_processes and --process_id, or --num_processes 1 for one process alone"
        ) from error
    return _Found(coordinator, processes or 1, process or 0, devices)


def _host_rendezvous(found: _Found, place: ProcessSpec) -> dict[int, "_Connection"]:
    """Wait for all other processes and return the connection to each."""
    _, port = _address(found)
    deadline = time.monotonic() + place.join_timeout
    came: dict[int, _Connection] = {}
    try:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
    except OSError as error:
        raise ValueError(f"process 0 cannot listen at --coordinator {found.coordinator}: {error.strerror}") from error
    with server:
        while len(came) < found.num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = _Connection(server.accept()[0], place.peer_timeout)
            except TimeoutError:
                break
            hello = connection.receive(timeout=5)
            number, of = hello.get("process"), hello.get("of")
            if not isinstance(number, int):  # some other program connected to the port
                connection.close()
            elif of != found.num_processes or not 0 < number < of:
                message = f"process {number} was started as one of {of}, process 0 as one of {found.num_processes}"
                for other in (connection, *came.values()):
                    other.refuse(message)
                raise ValueError(message)
            else:
                if number in came:
                    came[number].refuse(f"another process came as process {number}")
                connection.host = hello["host"]
                came[number] = connection
    missing = [str(number) for number in range(1, found.num_processes) if number not in came]
    if missing:
        message = (
            f"{len(came) + 1} of {found.num_processes} processes came within {place.join_timeout} s; missing: "
            f"{', '.join(missing)}. {_HOW_TO_START}"
        )
        for connection in came.values():
            connection.refuse(message)
        raise TimeoutError(message)
    for connection in came.values():
        connection.send(go=True)
    return came


def _join_rendezvous(found: _Found, place: ProcessSpec) -> dict[int, "_Connection"]:
    """Join process 0 and return the connection to it, once all processes have joined."""
    host, port = _address(found)
    deadline = time.monotonic() + place.join_timeout
    reason = ""
    while time.monotonic() < deadline:
        try:
            connection = _Connection(socket.create_connection((host, port), 5), place.peer_timeout)
        except OSError as error:
            reason = f" ({error.strerror or error})"
        else:
            connection.send(process=found.process_id, of=found.num_processes, host=socket.gethostname())
            answer = connection.receive(timeout=place.join_timeout + 10)  # process 0 may have started to wait later
            if "go" in answer:
                connection.host = host
                return {0: connection}
            connection.close()
            if "refusal" in answer:
                raise TimeoutError(answer["refusal"])
            reason = " (another program has the port)"  # or, briefly, the remains of an earlier run
        time.sleep(0.5)
    raise TimeoutError(
        f"process 0 did not answer process {found.process_id} at {found.coordinator} within {place.join_timeout} s"
        f"{reason}. {_HOW_TO_START}"
    )


def _address(found: _Found) -> tuple[str, int]:
    host, _, port = str(found.coordinator).rpartition(":")
    return host.strip("[]"), int(port)


_HOW_TO_START = (
    "Start the same command on all hosts at about the same time: on a Cloud TPU slice with gcloud compute tpus tpu-vm "
    "ssh NAME --worker=all --command=..., under SLURM with srun"
)


class _Connection:
    """A connection to another process that exchanges lines of JSON."""

    host = ""

    def __init__(self, connection: socket.socket, peer_timeout: int):
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a host that loses power closes nothing: let the kernel probe it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, peer_timeout // 2))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, peer_timeout // 8))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._lines = connection.makefile("rb")

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the reading side notices that a peer is gone
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def refuse(self, reason: str) -> None:
        self.send(refusal=reason)
        self.close()

    def receive(self, timeout: float | None = None) -> Mapping[str, Any]:
        """The next message; empty if the peer is gone, silent until the timeout, or sends something else."""
        self._socket.settimeout(timeout)
        try:
            message = json.loads(self._lines.readline())
        except (OSError, ValueError):
            return {}
        finally:
            self._socket.settimeout(None)
        return message if isinstance(message, dict) else {}

    def is_closed(self) -> bool:
        """Whether the peer has closed the connection, as far as the kernel knows."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class _Watch:
    """A thread that ends this process when another one is gone. Process 0 hears from all and tells the others."""

    def __init__(self, found: _Found, connections: dict[int, _Connection], workdir: Location | None):
        self._found = found
        self._connections = connections
        self._workdir = workdir
        self._leaving = threading.Event()
        self._alone = threading.Event()
        """Set when all others have closed their connections."""
        self._report_abort()
        threading.Thread(target=self._run, daemon=True).start()

    def leave(self, reason: str | None, status: int = PEER_LOST) -> None:
        """Tell the others that this process ends: None if it is done, else a reason, and they end with this status too.

        Process 0 lets the others end first.
        """
        self._leaving.set()
        for connection in self._connections.values():
            connection.send(left=reason, status=status)
        if reason is not None and self._found.process_id == 0:
            self._alone.wait(OWN_END + 5)  # JAX's coordination service ends with this process and aborts the others

    def wait_for_verdict(self) -> None:
        """Give the thread time to end this process, if another one is gone."""
        time.sleep(OWN_END + 5)  # longer than the thread's own grace period

    def _run(self) -> None:
        left = set()
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    number, connection = key.data, self._connections[key.data]
                    message = connection.receive()
                    if "lost" in message:
                        self._end(message["lost"], message["status"])
                    elif message.get("left", "") is None:
                        left.add(number)
                    elif "left" in message:
                        left.add(number)
                        self._end(f"{self._name(number)} ended: {message['left']}", message["status"], grace=OWN_END)
                    else:
                        selector.unregister(connection)
                        if number not in left:
                            self._end(f"{self._name(number)} died")
        self._alone.set()

    def _name(self, number: int) -> str:
        host = self._connections[number].host
        return f"process {number} of {self._found.num_processes}" + (f" ({host})" if host else "")

    def _end(self, what: str, status: int = PEER_LOST, grace: float = 0.0) -> None:
        if self._leaving.wait(grace):
            return
        if self._found.process_id == 0:
            for connection in self._connections.values():
                connection.send(lost=what, status=status)
        self._say_and_exit(what, status)

    def _say_and_exit(self, what: str, status: int = PEER_LOST) -> NoReturn:
        what = " ".join(what.split())[:400]
        if status != PEER_LOST:  # the error would recur
            os.write(sys.stderr.fileno(), f"error: {what}\n".encode())
            os._exit(status)
        goes_on = ["it goes on from what it has stored"]

        def look(workdir: Path) -> None:
            saved = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
            goes_on.append(
                f"it goes on from step {max(saved)}" if saved else "nothing is saved yet, it starts from the beginning"
            )

        if isinstance(self._workdir, Path):  # a bucket might not answer
            looking = threading.Thread(target=look, args=(self._workdir,), daemon=True)
            looking.start()
            looking.join(5)  # nor might a disk on the host that is gone
        advice = f"start the same command again on all {self._found.num_processes}: {goes_on[-1]}"
        os.write(sys.stderr.fileno(), f"error: {what}; {advice}\n".encode())
        os._exit(PEER_LOST)

    def _report_abort(self) -> None:
        """Report a death also when JAX aborts the process first, because the coordinator's connection broke.

        A Python signal handler would never run, because the aborting thread does not return to the interpreter.
        """

        def handle(_: int) -> None:
            if self._leaving.is_set():
                os._exit(PEER_LOST)
            if self._found.process_id and self._connections[0].is_closed():
                self._say_and_exit(f"{self._name(0)} died")
            self._say_and_exit(
                f"process {self._found.process_id} was aborted (a process that does not answer?), see above"
            )

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # kept alive here
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
