"""A config on disk: the Python file that it comes from, and the `config.json` that a run keeps of it."""

import dataclasses
import inspect
import json
import operator
import os
from pathlib import Path
from typing import Any

from nope_jax import encodings
from nope_jax.config import own_code
from nope_jax.config.schema import GROUPS, HINTS, Config, override
from nope_jax.encodings import ENCODINGS, former_names
from nope_jax.errors import is_refusal
from nope_jax.paths import Location, location, write_whole


def load_file(path: str | os.PathLike[str]) -> Config:
    """What the `get_config()` of a Python file returns. Whatever that file raises is raised as it is.

    Raises:
        ValueError: there is no such file or function, or it returns something else than a Config.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"--config must be a Python file; there is no {path}")
    # The module is named by its path, so that a class of it can be traced to the file.
    get_config = getattr(own_code.execute(path, path.read_bytes()), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"--config {path} has no get_config()")
    config = get_config()
    if not isinstance(config, Config):
        raise ValueError(f"--config {path}: get_config() must return a Config, not {type(config).__name__}")
    return config


def save(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Writes `config.json` into a workdir, and the code of a user's own encoding into its folder `code`.

    An Encoding becomes an object of its fields and its "class": a name in ENCODINGS, or what `own_code.where` says of
    where the class is, and its name. From then on that code is trusted on this machine.

    Raises:
        ValueError: a field of an Encoding is not made of numbers, strings, tuples and dataclasses.
        OSError: the files cannot be written; the config.json before is as it was.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name in HINTS:
        group, field = name.split(".")
        groups[group][field] = _to_json(operator.attrgetter(name)(config), name)
    folder, own = location(workdir), _own_classes(config.model.encoding)
    own_code.keep(folder, own)
    write_whole(folder / "config.json", (json.dumps(groups, indent=2) + "\n").encode())
    own_code.trust(own, always=True)


def load(workdir: str | os.PathLike[str], *, trust_code: bool = False) -> Config:
    """Reads the `config.json` of a workdir.

    Args:
        workdir: of the run.
        trust_code: run the code that an encoding of its own needs, though nobody has run it on this machine.

    Raises:
        ValueError: there is none, it is not the config of a run, or it needs code that is not trusted.
    """
    folder = location(workdir)
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{workdir} is not the workdir of a run: it has no config.json") from None
    try:
        groups = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        if not isinstance(groups, dict) or not all(isinstance(fields, dict) for fields in groups.values()):
            raise ValueError("it must be an object of objects, one for each group of fields")
        values = {
            f"{group}.{former_names.from_config(field)}": _from_json(value, folder, trust_code)
            for group, fields in groups.items()
            for field, value in fields.items()
        }
        if "model.encoding" in values:
            values["model.encoding"] = _by_todays_names(values["model.encoding"])
        return override(Config(), values)
    except ValueError as error:
        if not is_refusal(error):  # of the encoding's own code
            raise
        raise ValueError(f"{path}: {error}") from error


def refuse_changed_code(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Refuses to go on with a run whose own encoding has been edited since, but for comments and layout.

    Raises:
        ValueError: it names the file.
    """
    own = _own_classes(config.model.encoding)
    own_code.trust(own, always=False)
    if (change := own_code.changed(location(workdir), own)) is not None:
        now, kept = change
        raise ValueError(
            f"model.encoding: {now} has changed since the run in {workdir} was started with it, see {kept}; undo the "
            "change, or choose another workdir"
        )


def code_digest(config: Config) -> str:
    """Of the code that results of a model follow from: that of its encoding if it is a user's own, and ours."""
    return own_code.digest(_own_classes(config.model.encoding))


def _own_classes(value: Any) -> list[type]:
    """The classes of an encoding, and within it, that are not of this package."""
    if isinstance(value, tuple):
        return [cls for part in value for cls in _own_classes(part)]
    if not dataclasses.is_dataclass(value):
        return []
    own = [] if type(value).__module__.split(".")[0] == "nope_jax" else [type(value)]
    parts = tuple(getattr(value, field.name) for field in dataclasses.fields(value) if field.init)
    return own + _own_classes(parts)


def _by_todays_names(encoding: Any) -> Any:
    """An encoding of a config.json, whose names may be former ones."""
    if isinstance(encoding, tuple):
        return tuple(_by_todays_names(part) for part in encoding)
    return former_names.from_config(encoding) if isinstance(encoding, str) else encoding


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return [_to_json(part, where) for part in value]
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {"class": _class_name(type(value))} | {key: _to_json(part, where) for key, part in fields.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where}: a {type(value).__name__} cannot be saved in config.json: {value!r}")


def _from_json(value: Any, folder: Location, trust_code: bool) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(part, folder, trust_code) for part in value)
    if not isinstance(value, dict):
        return value
    fields = {key: _from_json(part, folder, trust_code) for key, part in value.items()}
    name = fields.pop("class", None)
    cls = _find_class(name, folder, trust_code)
    try:
        inspect.signature(cls).bind(**fields)
    except TypeError as error:
        raise ValueError(f"cannot make the class {name!r}: {error}") from error
    return cls(**fields)


def _class_name(cls: type) -> str:
    for name, encoding in ENCODINGS.items():
        if encoding is cls:
            return name
    public = getattr(encodings, cls.__qualname__, None) is cls
    return f"{encodings.__name__ if public else own_code.where(cls)}:{cls.__qualname__}"


def _find_class(name: Any, folder: Location, trust_code: bool) -> type:
    name = former_names.from_config(name) if isinstance(name, str) else name
    if name in ENCODINGS:
        return ENCODINGS[name]
    where, _, qualname = str(name).rpartition(":")
    if not where:
        raise ValueError(f"cannot make the class {name!r}: there is no such encoding")
    try:
        cls = operator.attrgetter(qualname)(own_code.find(folder, where, trust_code))
    except (ModuleNotFoundError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"cannot make the class {name!r}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"cannot make the class {name!r}: it is not a dataclass")
    return cls
