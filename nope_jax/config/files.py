"""Configs on disk: the Python file that defines a config, and the `config.json` that a run saves."""

import dataclasses
import inspect
import json
import operator
import os
from pathlib import Path
from typing import Any

from nope_jax import encodings
from nope_jax.config import own_code
from nope_jax.config.format import check_format, stamp
from nope_jax.config.schema import GROUPS, HINTS, Config, override
from nope_jax.encodings import ENCODINGS, former_names
from nope_jax.errors import is_refusal
from nope_jax.paths import Location, location, write_whole


def load_file(path: str | os.PathLike[str]) -> Config:
    """Return the config from the `get_config()` of a Python file. Exceptions raised by the file itself propagate.

    Raises:
        ValueError: the file or the function does not exist, or the function does not return a Config.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"--config must be a Python file; there is no {path}")
    # The module's name is its path, so a class it defines can be traced to the file.
    get_config = getattr(own_code.execute(path, path.read_bytes()), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"--config {path} has no get_config()")
    config = get_config()
    if not isinstance(config, Config):
        raise ValueError(f"--config {path}: get_config() must return a Config, not {type(config).__name__}")
    return config


def save(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Write `config.json` into a workdir, and the code of a user's own encoding into its folder `code`.

    An Encoding is saved as an object of its fields and its "class": a name in ENCODINGS, or the location that
    `own_code.where` returns with the class name. The saved code is trusted on this machine from then on.

    Raises:
        ValueError: a field of an Encoding does not consist of numbers, strings, tuples and dataclasses.
        OSError: the files cannot be written; an existing config.json is unchanged.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name in HINTS:
        group, field = name.split(".")
        groups[group][field] = _to_json(operator.attrgetter(name)(config), name)
    folder, own = location(workdir), _own_classes(config.model.encoding)
    own_code.keep(folder, own)
    write_whole(folder / "config.json", (json.dumps(stamp() | groups, indent=2) + "\n").encode())
    own_code.trust(own, always=True)


def load(workdir: str | os.PathLike[str], *, trust_code: bool = False) -> Config:
    """Read the `config.json` of a workdir.

    Args:
        workdir: Workdir of the run.
        trust_code: Run the code of a user's own encoding even if it has never been trusted on this machine.

    Raises:
        ValueError: the file does not exist, is not the config of a run, was written by a later version, or needs code
            that is not trusted.
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
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(groups, dict) and "model_type" in groups:
        raise ValueError(f"{workdir} is not the workdir of a run, but a Hugging Face model: name it hf:{workdir}")
    try:
        written = {name: groups.pop(name) for name in stamp() if name in groups} if isinstance(groups, dict) else {}
        check_format(written, "it")
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
        if not is_refusal(error):  # raised by the encoding's own code
            raise
        raise ValueError(f"{path}: {error}") from error


def refuse_changed_code(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Refuse to resume a run if the code of its user-defined encoding has changed beyond comments and layout.

    Raises:
        ValueError: the code has changed; the message names the file.
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
    """Return a digest of the code that determines a model's results: this package and a user's own encoding."""
    return own_code.digest(_own_classes(config.model.encoding))


def _own_classes(value: Any) -> list[type]:
    """The classes of an encoding and of its fields that are defined outside this package."""
    if isinstance(value, tuple):
        return [cls for part in value for cls in _own_classes(part)]
    if not dataclasses.is_dataclass(value):
        return []
    own = [] if type(value).__module__.split(".")[0] == "nope_jax" else [type(value)]
    parts = tuple(getattr(value, field.name) for field in dataclasses.fields(value) if field.init)
    return own + _own_classes(parts)


def _by_todays_names(encoding: Any) -> Any:
    """Translate former names in the encoding of a config.json to current ones."""
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
