"""Tasks of commands with one output each, which can also be read from a prepared dataset."""

import abc
import functools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nope_jax.data.tasks.task import Example, Task, TaskSplit

HELD_OUT_FILES = ("test", "valid", "dev")
"""What the names of files say that are not for training."""
TRAINING_FILES = "train"


class CommandTask(Task):
    """A task of commands: a subclass says what an output is, and how long.

    Commands longer than those of training belong to the test split; others by their hash, as in any task.
    """

    def __init__(self, pairs: Mapping[str, str] | None = None, held_out: Iterable[str] = ()):
        """Take commands with their outputs, None for those of `generate`, and the commands not to be trained on."""
        self._given = pairs
        self._held_out = {self.write((command, ""))[0] for command in held_out}

    @abc.abstractmethod
    def measure(self, command: str, output: str) -> int:
        """The length of an instance."""

    def generate(self) -> Mapping[str, str]:
        """All commands with their outputs; none if they are drawn instead."""
        return {}

    @staticmethod
    def translate(output: str) -> str:
        """Write an output of the published dataset as the task writes it."""
        return output

    @functools.cached_property
    def _pairs(self) -> dict[int, list[tuple[str, str]]]:
        """The commands of each length."""
        by_length: dict[int, list[tuple[str, str]]] = {}
        for command, output in (self.generate() if self._given is None else self._given).items():
            by_length.setdefault(self.measure(command, output), []).append((command, output))
        return by_length

    def draw(self, rng: random.Random, length: int) -> Any:
        return rng.choice(self._pairs[length])

    def write(self, instance: tuple[str, str]) -> tuple[str, str]:
        command, output = instance
        return f"Solve: {command}[SEP] ", output

    def weight(self, length: int) -> float:
        return len(self._pairs.get(length, ())) if self._pairs else super().weight(length)

    def split(self, source: str, length: int) -> TaskSplit:
        too_long = bool(self._pairs) and length in self.test_lengths
        return "test" if too_long or source in self._held_out else super().split(source, length)

    def _find(self, seed: int, index: int, length: int, split: TaskSplit, scratchpad: bool) -> Example | None:
        if self._pairs and length not in self._pairs:
            return None
        return super()._find(seed, index, length, split, scratchpad)

    @classmethod
    def read(cls, path: str | Path) -> "CommandTask":
        """Read a prepared dataset: a file, or a folder with files called `train...`, `test...`, `valid...` or `dev...`.

        Files are JSON lines with `source` and `target` (.jsonl), two columns (.tsv), the lines of SCAN, `IN: ... OUT:
        ...` (.txt), or pairs of files with one line per example (.src and .tgt). Commands of files that are not for
        training are held out, even if a training file has them too.

        Raises:
            ValueError: there are no such files, or a line has not both parts.
        """
        path = Path(path).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in _READERS and (file == path or _role(file) is not None)]
        if not path.exists() or not files:
            raise ValueError(
                f"data.source task:{cls.name}:{path} must be a file or a folder of files "
                f"train*, test*, valid* or dev* that end in {', '.join(_READERS)}"
            )
        pairs: dict[str, str] = {}
        held_out = set()
        for file in files:
            for number, (command, output) in enumerate(_READERS[file.suffix](file), 1):
                if not command or not output:
                    raise ValueError(f"{file}:{number}: it needs a command and an output")
                pairs[command] = cls.translate(output)
                if _role(file) == "test":
                    held_out.add(command)
        return cls(pairs, held_out)


def _role(file: Path) -> TaskSplit | None:
    if any(word in file.stem for word in HELD_OUT_FILES):
        return "test"
    return "train" if TRAINING_FILES in file.stem else None


def _read_jsonl(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(file), 1):
        try:
            value = json.loads(line)
            yield str(value["source"]), str(value["target"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: it must be a JSON object with source and target") from None


def _read_tsv(file: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(file):
        command, _, output = line.partition("\t")
        yield command.strip(), output.strip()


def _read_scan(file: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(file):
        command, _, output = line.removeprefix("IN:").partition("OUT:")
        yield command.strip(), output.strip()


def _read_parallel(file: Path) -> Iterator[tuple[str, str]]:
    sources, targets = _lines(file), _lines(file.with_suffix(".tgt"))
    if len(sources) != len(targets):
        raise ValueError(f"{file} has {len(sources)} lines, but {file.with_suffix('.tgt')} has {len(targets)}")
    for command, output in zip(sources, targets, strict=True):
        yield command.strip(), output.strip()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


_READERS = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".txt": _read_scan, ".src": _read_parallel}
