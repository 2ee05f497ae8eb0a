"""User code that a run needs, such as the class of an encoding: copied into the workdir, and run only if trusted.

A class is recorded as "WHERE:NAME". If it is defined in a file (a config file, a script, or a module next to them),
WHERE is `code/FILE.py`, a copy in the workdir. If it is defined in a package, WHERE is the module's name; the package
is not copied and must be installed wherever the run is used.

Code is trusted if train.py has recorded it on this machine for this user, in $XDG_STATE_HOME/nope_jax/trusted_code: a
file by its digest, a module by its name. Your own runs can therefore be moved and copied, while code in a workdir from
elsewhere runs only if explicitly allowed.
"""

import ast
import functools
import hashlib
import importlib
import json
import os
import sys
import types
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from nope_jax.paths import Location, write_whole

FOLDER = "code"
ORIGINS = "origins.json"
"""File in FOLDER that records where each file was copied from."""

_executed: dict[str, bytes] = {}
"""The source of each module executed here, by module name, which is its path."""
_trusted: set[str] = set()
"""Digests that this process trusts in addition to those listed."""


def execute(path: Location, text: bytes) -> types.ModuleType:
    """Execute a file as a module named by its path."""
    name = str(path)
    module = types.ModuleType(name)
    module.__file__ = name
    before = sys.modules.pop(name, None)
    sys.modules[name] = module  # moved to the end, see `find`
    try:
        exec(compile(text, name, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    _executed[name] = text
    return module


def where(cls: type) -> str:
    """Return the WHERE of a class."""
    file = _file(cls.__module__)
    return cls.__module__ if file is None else f"{FOLDER}/{file.name}"


def keep(workdir: Location, classes: Iterable[type]) -> None:
    """Copy the files that define classes into a workdir.

    Raises:
        ValueError: two of the files have the same name.
        OSError: they cannot be written.
    """
    files: dict[str, Path] = {}
    for name in {cls.__module__: None for cls in classes}:
        file = _file(name)
        if file is None:
            continue
        if files.setdefault(file.name, file) != file:
            raise ValueError(f"model.encoding: {files[file.name]} and {file} have the same name; rename one of them")
        folder = workdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        origin = _origin(file)
        write_whole(folder / file.name, _text(name))
        origins = _origins(folder) | {file.name: str(origin)}
        write_whole(folder / ORIGINS, (json.dumps(origins, indent=2) + "\n").encode())


def find(workdir: Location, place: str, trust_code: bool) -> types.ModuleType:
    """Import the module at a WHERE of a workdir, running only trusted code.

    If this process already has a module of that file name that differs at most in comments and layout, return it, or
    the most recent of several.

    Args:
        workdir: Workdir of the run.
        place: The WHERE, or an absolute path, as written by earlier versions.
        trust_code: Trust the code in any case.

    Raises:
        ValueError: it is not trusted.
        ImportError, OSError: there is no such module or file.
    """
    if not place.endswith(".py"):
        if place.split(".")[0] not in ("nope_jax", "__main__"):
            _check(_name_digest(place), f"the module {place}", trust_code)
        return importlib.import_module(place)
    if not PurePath(place).is_absolute() and PurePath(place).parent != PurePath(FOLDER):
        raise ValueError(f"a class must be in {FOLDER}/FILE.py or in a module, not in {place}")
    path = workdir / place
    text = path.read_bytes()
    called = [name for name, module in reversed(sys.modules.items()) if _is_called(module, path.name)]
    alike = [name for name in called if _file(name) is not None and same_code(_text(name), text)]
    if not alike:
        _check(_text_digest(text), str(path), trust_code)
    _warn_of_changes(workdir, path, text)
    return sys.modules[alike[0]] if alike else execute(path, text)


def changed(workdir: Location, classes: Iterable[type]) -> tuple[Path, Location] | None:
    """Return a file of these classes that differs from its copy in the workdir, and the copy; None if there is none."""
    for cls in classes:
        if (file := _file(cls.__module__)) is not None:
            kept = workdir / FOLDER / file.name
            if kept.exists() and not same_code(_text(cls.__module__), kept.read_bytes()):
                return file, kept
    return None


def same_code(a: bytes, b: bytes) -> bool:
    """Whether two sources differ at most in comments and layout."""
    try:
        return a == b or ast.dump(ast.parse(a)) == ast.dump(ast.parse(b))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def trust(classes: Iterable[type], *, always: bool) -> None:
    """Trust the code of classes in this process or, with `always`, in every process of this user on this machine."""
    digests = set()
    for name in {cls.__module__ for cls in classes}:
        digests.add(_name_digest(name) if _file(name) is None else _text_digest(_text(name)))
    _trusted.update(digests)
    new = sorted(digests - _listed()) if always else []
    if new:
        path = _list()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{digest}\n" for digest in new))
        except OSError as error:
            warnings.warn(
                f"{path}: {error.strerror}; other processes will need trust_code for the encoding of this run",
                stacklevel=2,
            )


def digest(classes: Iterable[type]) -> str:
    """Digest of the code that a result depends on: that of classes and their imports, and this package.

    For code without a source, as in a notebook, every digest is different.
    """
    total = hashlib.sha256(_our_digest())
    # Without module names, because that of a copy is its path.
    for text in sorted(_text_digest(text) for _, text in _reached({cls.__module__ for cls in classes})):
        total.update(text.encode())
    return total.hexdigest()


@functools.cache
def _our_digest() -> bytes:
    """Digest of this package except training and compile, which evaluation does not use."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("compile", "training"):
            total.update(path.read_bytes() + b"|")
    return total.digest()


def _reached(names: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield modules and the user modules that they import, with their sources."""
    seen, waiting = set(names), sorted(names)
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name.split(".")[0] == "nope_jax":
            continue
        if module is None or not str(getattr(module, "__file__", None)).endswith(".py"):
            yield name, uuid.uuid4().bytes
            continue
        text = _text(name)
        yield name, text
        for imported in _imported(text, module.__package__ or ""):
            file = getattr(sys.modules.get(imported), "__file__", None)
            if imported not in seen and file and str(file).endswith(".py") and not _is_installed(file):
                seen.add(imported)
                waiting.append(imported)


def _imported(text: bytes, package: str) -> Iterator[str]:
    """The names under which a source may import modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*parts, *([node.module] if node.module else [])])
            yield name
            for alias in node.names:
                yield f"{name}.{alias.name}"


def _file(name: str) -> Path | None:
    """The file to copy for a module; None for a module of a package, an installed one, or one without a file."""
    module = sys.modules.get(name)
    file = None if module is None else vars(module).get("__file__")
    if module is None or file is None or module.__package__ or not file.endswith(".py") or _is_installed(file):
        return None
    return Path(file)


def _text(name: str) -> bytes:
    return _executed[name] if name in _executed else Path(str(sys.modules[name].__file__)).read_bytes()


def _is_called(module: Any, name: str) -> bool:
    return isinstance(module, types.ModuleType) and PurePath(vars(module).get("__file__") or "").name == name


def _is_installed(file: str) -> bool:
    library = Path(os.__file__).parent
    return bool({"site-packages", "dist-packages"} & set(PurePath(file).parts)) or Path(file).is_relative_to(library)


def _origin(file: Path) -> Path:
    """The original location of a file, which may itself be a copy."""
    origin = _origins(file.parent).get(file.name) if file.parent.name == FOLDER else None
    return file.absolute() if origin is None else Path(origin)


def _origins(folder: Location) -> dict[str, str]:
    try:
        return json.loads((folder / ORIGINS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _warn_of_changes(workdir: Location, path: Location, text: bytes) -> None:
    origin = _origins(path.parent).get(path.name)
    try:
        now = None if origin is None else Path(origin).read_bytes()
    except OSError:  # the run or the file has moved
        return
    if now is not None and not same_code(now, text):
        _warn_once(f"{workdir} is run with the code that it was trained with, {path}; {origin} has changed since")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _check(digest: str, what: str, trust_code: bool) -> None:
    if trust_code:
        _trusted.add(digest)
    elif digest not in _trusted | _listed():
        raise ValueError(
            f"its encoding runs {what}, code that no train.py of yours on this machine has put there; if you trust it, "
            "give --trust_code True (in Python trust_code=True)"
        )


def _text_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _name_digest(module: str) -> str:
    return hashlib.sha256(f"module {module}".encode()).hexdigest()


def _list() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nope_jax" / "trusted_code"


def _listed() -> set[str]:
    try:
        return set(_list().read_text(encoding="utf-8").split())
    except OSError:
        return set()
