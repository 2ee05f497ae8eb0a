"""The processes of one run, usually one per host: how they find each other, and that none waits for one that is gone.

Before JAX connects them, process 0 calls the roll on the coordinator's port; the others answer with their number. What
does not come is named. The connections of the roll stay open, and the kernel closes that of a process which dies
however it dies, so that the others learn of it at once, say so and end, where they would wait in a collective.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nope_jax.errors import is_refusal
from nope_jax.paths import Location

PEER_LOST = 3
"""The exit status of a process that ends because another one is gone."""

DIVERGED = 4
"""The exit status of a run whose loss or gradient is not finite."""

OWN_END = 10.0
"""Seconds that a process has to end by itself when another has: mostly they end for the same reason."""


class ProcessSpec(NamedTuple):
    """Which process of how many this one is, as the command line says; None: as the environment says."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 is reached."""
    num_processes: int | None = None
    process_id: int | None = None
    """From 0."""
    join_timeout: int = 300
    """Seconds to wait for all processes to come."""
    peer_timeout: int = 60
    """Seconds after which a process that does not answer counts as dead."""

    def named(self) -> "_Found | None":
        """The process that the options name; None where they leave it to the environment.

        Raises:
            ValueError: they do not go together.
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
    """Which process of how many this one is, and the devices that the environment leaves to it (None: all)."""

    coordinator: str | None
    num_processes: int
    process_id: int
    local_devices: Sequence[int] | None


@contextlib.contextmanager
def joined(place: ProcessSpec, workdir: Location) -> Iterator[None]:
    """Connects this process with the others of its run for as long as the context lasts; alone, it does nothing.

    The environments that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes jobs) are asked where `place` says nothing.
    While the context lasts, the death of any process ends this one with status PEER_LOST and a line that says which;
    its end by an error that would come again (bad input, divergence, a mistake in the program), with its status.

    Args:
        place: what was given on the command line.
        workdir: of the run; its newest checkpoint is what the line names.

    Raises:
        TimeoutError: not all came; it names those missing.
        ValueError: the environment or another process says what cannot be.
    """
    found = _find(place)
    if found.num_processes == 1:
        yield
        return
    connections = (_call_roll if found.process_id == 0 else _answer_roll)(found, place)
    watch = _Watch(found, connections, workdir)
    import jax

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
            watch.wait_for_verdict()  # a collective that fails is how one learns of a death first
        watch.leave(f"{type(error).__name__}: {error}", _status(error))
        atexit.register(_exit, _status(error))  # before JAX's own, which waits for the others
        raise
    watch.leave(None)


def _status(error: BaseException) -> int:
    """The exit status of all where one ends by an error: that of the error itself, if it would come again."""
    if _is_of_the_system(error):
        return PEER_LOST
    if isinstance(error, FloatingPointError):
        return DIVERGED
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 2 if is_refusal(error) or isinstance(error, OSError) else 1


def _is_of_the_system(error: BaseException) -> bool:
    """Whether it is of a device, or of what connects them."""
    import jax

    # Some collectives of CPUs raise ValueError, with the same text.
    raised_by_jax = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    )
    return raised_by_jax and "RESOURCE_EXHAUSTED" not in str(error)


def leave(status: int) -> NoReturn:
    """Ends the process. One that failed does not wait for the others, as JAX would have it."""
    if status:
        _exit(status)
    sys.exit(0)


def _exit(status: int) -> NoReturn:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError):  # a terminal that is closed, a pipe that nobody reads
            stream.flush()
    os._exit(status)


def agreed_stop(received: list[int], step: int) -> int | None:
    """The signal with which all processes stop after this step, if any of them has received one.

    To be called by all processes after every step. The step is the first that none of them has begun when the signal
    comes; JAX finds it.

    Args:
        received: the signals that this process has caught. With several processes JAX catches SIGTERM, not we.
        step: that was dispatched last.
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
"""Bytes of what a process may say to the others, in UTF-8; what is longer is cut."""


def said_by_all(text: str) -> list[str]:
    """What each process says, in the order of their numbers. To be called by all of them."""
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


def _find(place: ProcessSpec) -> _Found:
    named = place.named()
    if named is not None:
        return named
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

    try:
        coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, place.join_timeout
        )
    except Exception as error:  # each environment has its own
        raise ValueError(
            f"this looks like a cluster, but which process this is cannot be found out ({error}); give --coordinator, "
            "--num_processes and --process_id, or --num_processes 1 for one process alone"
        ) from error
    return _Found(coordinator, processes or 1, process or 0, devices)


def _call_roll(found: _Found, place: ProcessSpec) -> dict[int, "_Connection"]:
    """The connection to each other process, once all have come."""
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
            if not isinstance(number, int):  # whatever else knocks at the port
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


def _answer_roll(found: _Found, place: ProcessSpec) -> dict[int, "_Connection"]:
    """The connection to process 0, once all have come."""
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
            answer = connection.receive(timeout=place.join_timeout + 10)  # process 0 may have begun to wait after us
            if "go" in answer:
                connection.host = host
                return {0: connection}
            connection.close()
            if "refusal" in answer:
                raise TimeoutError(answer["refusal"])
            reason = " (another program has the port)"  # or what is left of an earlier run, for a moment
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
    """Lines of JSON to and from another process."""

    host = ""

    def __init__(self, connection: socket.socket, peer_timeout: int):
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a host without power closes nothing: the kernel asks after it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, peer_timeout // 2))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, peer_timeout // 8))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._lines = connection.makefile("rb")

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a peer that is gone is noticed by whoever reads
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def refuse(self, reason: str) -> None:
        self.send(refusal=reason)
        self.close()

    def receive(self, timeout: float | None = None) -> Mapping[str, Any]:
        """The next message; empty if the other is gone, is silent for so long, or does not speak our language."""
        self._socket.settimeout(timeout)
        try:
            message = json.loads(self._lines.readline())
        except (OSError, ValueError):
            return {}
        finally:
            self._socket.settimeout(None)
        return message if isinstance(message, dict) else {}

    def is_closed(self) -> bool:
        """Whether the other end is gone, as far as the kernel knows."""
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
    """A thread that ends this process when another is gone: told by process 0, which hears from all."""

    def __init__(self, found: _Found, connections: dict[int, _Connection], workdir: Location):
        self._found = found
        self._connections = connections
        self._workdir = workdir
        self._leaving = threading.Event()
        self._alone = threading.Event()
        """All others have closed their connections."""
        self._report_abort()
        threading.Thread(target=self._run, daemon=True).start()

    def leave(self, reason: str | None, status: int = PEER_LOST) -> None:
        """Tells the others that this process ends: None, because it is done; else they end too, with this status.

        Process 0 lets the others go first.
        """
        self._leaving.set()
        for connection in self._connections.values():
            connection.send(left=reason, status=status)
        if reason is not None and self._found.process_id == 0:
            self._alone.wait(OWN_END + 5)  # JAX's coordination service ends with this process, and aborts who is left

    def wait_for_verdict(self) -> None:
        """Gives the thread the time to end the process, if another one is gone."""
        time.sleep(OWN_END + 5)  # longer than the thread gives it

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
        if status != PEER_LOST:  # it would come again
            os.write(sys.stderr.fileno(), f"error: {what}\n".encode())
            os._exit(status)
        goes_on = ["it goes on from its last checkpoint"]

        def look(workdir: Path) -> None:
            saved = [int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()]
            goes_on.append(f"it goes on from step {max(saved)}" if saved else "nothing is saved yet, it starts anew")

        if isinstance(self._workdir, Path):  # a bucket might keep us waiting
            looking = threading.Thread(target=look, args=(self._workdir,), daemon=True)
            looking.start()
            looking.join(5)  # so might a disk that the host had that is gone
        advice = f"start the same command again on all {self._found.num_processes}: {goes_on[-1]}"
        os.write(sys.stderr.fileno(), f"error: {what}; {advice}\n".encode())
        os._exit(PEER_LOST)

    def _report_abort(self) -> None:
        """Has the line said also where JAX is faster: it aborts the process when the coordinator's connection breaks.

        A handler of Python's own would never run: the aborting thread does not return to the interpreter.
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
