"""Compiled programs are kept in a folder of the user, so that a command that ran before starts faster.

The folder is $JAX_COMPILATION_CACHE_DIR, or nope_jax/ in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache). If
the variable is empty, nothing is kept. Each type of CPU has a folder of its own, because hosts of several types may
share a home directory.
"""

import hashlib
import os
import platform
import re
from pathlib import Path

import jax

_BROKEN = re.compile(r"Error reading persistent compilation cache entry for '([\w.-]+)'")


def keep_compiled() -> None:
    """Let JAX keep compiled programs, if nothing else was said and the folder can be written."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nope_jax" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home directory: everything works, but is compiled again
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def drop_broken(warning: str) -> bool:
    """Whether a warning says that a kept program cannot be read, which is then removed.

    A process that was killed while it wrote the program leaves half a file; JAX compiles instead of reading it, but
    would not write it again.
    """
    folder, broken = jax.config.jax_compilation_cache_dir, _BROKEN.match(warning)  # type: ignore[attr-defined]
    if not folder or broken is None:
        return False
    for path in Path(folder).glob(f"{broken[1]}-*"):
        path.unlink(missing_ok=True)
    return True


def _cpu() -> str:
    """A name for the type of CPU of this host."""
    kind = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        kind += next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(kind.encode()).hexdigest()[:8]
