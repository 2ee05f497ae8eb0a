"""One process at a time writes to a folder; what a dead one has left there keeps nobody out.

On a disk the kernel holds the lock (flock), and lets go of it however its process ends. Network file systems pass it on
to other hosts. In a bucket, and on a file system without flock, the holder writes its file anew every BEAT seconds.
Whoever comes watches that file, by its own clock: one that changes has a living holder, one that does not for PATIENCE
seconds has not.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from nope_jax.paths import Location

BEAT = 10.0
PATIENCE = 45.0
SETTLE = 2.0
"""Seconds in which two that come to a bucket at once have both written; the later one has it."""


@contextlib.contextmanager
def held(folder: Location) -> Iterator[Callable[[], None]]:
    """Keeps a folder to this process while the context lasts, by the file `lock` in it, which names host and process.

    Yields a function that raises ValueError if another process has taken the folder meanwhile: where files have to be
    written anew, a process that stood still for longer than PATIENCE counts as dead.

    Raises:
        ValueError: another process has the folder.
        OSError: the file cannot be written.
    """
    path = folder / "lock"
    with contextlib.ExitStack() as stack:
        if isinstance(path, Path) and _is_locked(path, stack):
            stack.callback(path.unlink, missing_ok=True)
            yield lambda: None
        else:
            lease = _Lease(path)
            stack.callback(lease.end)
            yield lease.check


def _is_locked(path: Path, stack: contextlib.ExitStack) -> bool:
    """Whether the kernel has locked the file for us, until the stack unwinds; False where the file system has no locks.

    Raises:
        ValueError: another process has locked it.
    """
    while True:
        file = stack.enter_context(path.open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(path, _read(path)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            return False
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break  # and not one that its holder has removed since we opened it
    file.truncate(0)
    file.write(_holder())
    file.flush()
    return True


class _Lease:
    """A file that its holder writes anew every BEAT seconds, in a thread."""

    def __init__(self, path: Location):
        self._path = path
        self._name = uuid.uuid4().hex
        self._lost: ValueError | None = None
        self._ended = threading.Event()
        self._wait_for_the_dead()
        self._write(0)
        time.sleep(SETTLE)
        self._look()
        self.check()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a store that does not answer keeps nobody: the file ages
            self._look()
            if self._lost is None:
                self._path.unlink()

    def _wait_for_the_dead(self) -> None:
        found = _read(self._path)
        if not found:
            return
        waits = f"{self._path} names {_who(found)}: waiting {PATIENCE:.0f} s at most to see whether it still runs"
        print(waits, file=sys.stderr, flush=True)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(BEAT / 10)
            now = _read(self._path)
            if not now:
                return
            if now != found:
                raise _refusal(self._path, now)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            with contextlib.suppress(Exception):  # whatever a network may raise for a while
                self._look()
                if self._lost is not None:
                    return
                self._write(count)

    def _look(self) -> None:
        """Notes it if the file is another's."""
        found = _read(self._path)
        if found and self._name not in found:
            self._lost = _refusal(self._path, found)

    def _write(self, count: int) -> None:
        text = _holder(lease=self._name, beat=f"{count:010}")
        if isinstance(self._path, Path):
            unfinished = self._path.with_name(f"lock.{self._name}")
            unfinished.write_text(text)
            unfinished.replace(self._path)
        else:  # an object is whole or not there
            self._path.write_text(text)


def _holder(**more: str) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **more}) + "\n"


def _read(path: Location) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _who(holder: str) -> str:
    try:
        values = json.loads(holder)
        return f"process {values['pid']} on {values['host']}"
    except (ValueError, KeyError, TypeError):  # not written yet
        return "another process"


def _refusal(path: Location, holder: str) -> ValueError:
    return ValueError(f"{path.parent} is being written by {_who(holder)}: stop that one, or choose another folder")
