"""Locks a folder for one writing process at a time; a dead process's lock does not block others.

On a disk the kernel holds the lock (flock), and releases it however the process ends. Network file systems extend it to
other hosts. In a bucket, and on a file system without flock, the holder rewrites a file every BEAT seconds. A newcomer
watches that file, by its own clock: if it changes, its holder is alive; if it does not change for PATIENCE seconds, its
holder is dead.
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
"""Seconds after which two processes that start at once in a bucket have both written; the later write wins."""


@contextlib.contextmanager
def held(folder: Location) -> Iterator[Callable[[], None]]:
    """Lock a folder for the duration of the context, with a file `lock` in it that names host and process.

    Yields a function that raises ValueError if another process has taken the folder meanwhile: when the lock is a
    rewritten file, a process that hangs for longer than PATIENCE counts as dead.

    Raises:
        ValueError: another process has locked the folder.
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
    """Lock the file with flock until the stack unwinds; return False if the file system does not support it.

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
            break  # otherwise the holder has removed the file since we opened it
    file.truncate(0)
    file.write(_holder())
    file.flush()
    return True


class _Lease:
    """A lock file that its holder rewrites every BEAT seconds, in a thread."""

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
        with contextlib.suppress(Exception):  # a store that does not answer is harmless: the file expires
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
            with contextlib.suppress(Exception):  # temporary network errors of any kind
                self._look()
                if self._lost is not None:
                    return
                self._write(count)

    def _look(self) -> None:
        """Record it if another process has written the file."""
        found = _read(self._path)
        if found and self._name not in found:
            self._lost = _refusal(self._path, found)

    def _write(self, count: int) -> None:
        text = _holder(lease=self._name, beat=f"{count:010}")
        if isinstance(self._path, Path):
            unfinished = self._path.with_name(f"lock.{self._name}")
            unfinished.write_text(text)
            unfinished.replace(self._path)
        else:  # writing an object is atomic
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
