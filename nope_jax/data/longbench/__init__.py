"""LongBench (Bai et al. 2023, arXiv 2308.14508): real tasks over long texts, read from a folder in its own format.

    from nope_jax.data.longbench import read_datasets

    for dataset in read_datasets("LongBench/data"):
        for row in dataset.rows: ...  # row.prompt, row.answers; dataset.score(continuation, row)

A file NAME.jsonl holds one dataset, or NAME_e.jsonl one of LongBench-E: JSON objects with `input`, `context`,
`answers`, `length` (words) and, for classification, `all_classes`. Prompts and the tokens of answers are those of
LongBench's dataset2prompt.json and dataset2maxlen.json, if the folder or its folder `config` has them. Without the
first, prompts are plain ones (PROMPTS), which differ from LongBench's: scores cannot be compared with its table.

Its Chinese datasets are not here: their metrics need a segmentation into words.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nope_jax.data.longbench.metrics import METRICS

PROMPTS = {
    "question": "{context}\n\nQuestion: {input}\nAnswer:",
    "summary": "{context}\n\nSummary:",
    "examples": "{context}\n{input}",
    "count": "{context}\n\nNumber of different paragraphs:",
    "retrieval": "{context}\n\nAbstract: {input}\n\nThis is the abstract of Paragraph",
    "code": "{context}{input}",
}
"""The prompts without a dataset2prompt.json, by the kind of the dataset; `examples` are few-shot examples."""


class Kind(NamedTuple):
    """What is known of a dataset."""

    metric: Literal["F1", "ROUGE-L", "accuracy", "count", "retrieval", "edit similarity"]
    room: int
    """Tokens of an answer, without a dataset2maxlen.json; LongBench's."""
    prompt: str
    """One of PROMPTS."""
    first_line: bool = False
    """Whether only the first line of a continuation is scored."""


KINDS = {
    "narrativeqa": Kind("F1", 128, "question"),
    "qasper": Kind("F1", 128, "question"),
    "multifieldqa_en": Kind("F1", 64, "question"),
    "hotpotqa": Kind("F1", 32, "question"),
    "2wikimqa": Kind("F1", 32, "question"),
    "musique": Kind("F1", 32, "question"),
    "gov_report": Kind("ROUGE-L", 512, "summary"),
    "qmsum": Kind("ROUGE-L", 512, "question"),
    "multi_news": Kind("ROUGE-L", 512, "summary"),
    "trec": Kind("accuracy", 64, "examples", first_line=True),
    "triviaqa": Kind("F1", 32, "examples", first_line=True),
    "samsum": Kind("ROUGE-L", 128, "examples", first_line=True),
    "passage_count": Kind("count", 32, "count"),
    "passage_retrieval_en": Kind("retrieval", 32, "retrieval"),
    "lcc": Kind("edit similarity", 64, "code"),
    "repobench-p": Kind("edit similarity", 64, "code"),
}
"""The English datasets and those of code, by LongBench's names and in its order."""
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


class Row(NamedTuple):
    """An example of a dataset."""

    id: str
    prompt: str
    answers: Sequence[str]
    """Any of them is right."""
    length: int
    """Words of the context and the input, by LongBench's count."""
    classes: Sequence[str]
    """The names among which `accuracy` chooses."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One file of LongBench."""

    name: str
    """The name of the file: one of KINDS, with `_e` at the end if it is of LongBench-E."""
    kind: Kind
    room: int
    """The most tokens of an answer."""
    rows: Sequence[Row]

    def score(self, continuation: str, row: Row) -> float:
        """The score of a continuation, from 0 to 1: that against the answer that it is most like."""
        if self.kind.first_line:
            continuation = continuation.lstrip("\n").split("\n")[0]
        metric = METRICS[self.kind.metric]
        return max(metric(continuation, answer, row.classes) for answer in row.answers)

    @property
    def digest(self) -> str:
        """Identifies prompts, answers and metric."""
        return hashlib.sha256(repr((self.kind, self.room, self.rows)).encode()).hexdigest()


def read_datasets(folder: str | Path, names: Sequence[str] | None = None, count: int | None = None) -> list[Dataset]:
    """Read datasets, in LongBench's order.

    Args:
        folder: has a file NAME.jsonl for each.
        names: names of files without .jsonl. None: all that are there, except Chinese ones.
        count: the first so many rows of each. None: all.

    Raises:
        ValueError: there are none, a name is unknown or Chinese, a file lacks fields, or a metric needs a package.
        OSError: a file cannot be read.
    """
    folder = Path(folder).expanduser()
    found = sorted(path.stem for path in folder.glob("*.jsonl")) if folder.is_dir() else []
    chosen = [name for name in found if not _is_chinese(name)] if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if _is_chinese(name):
            raise ValueError(f"{name} is Chinese: only the English datasets of LongBench and those of code are scored")
        if _base(name) not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(KINDS)}"
            raise ValueError(f"{folder}/{name}.jsonl: unknown dataset {name!r}: {hint}")
        if name not in found:
            raise ValueError(f"{folder} has no file {name}.jsonl")
    if not chosen:
        chinese = f", only Chinese ones ({', '.join(found)})" if found else ""
        raise ValueError(f"{folder} must be a folder with datasets of LongBench, NAME.jsonl; it has none{chinese}")
    order = list(KINDS)
    prompts, rooms = (settings_of(folder, what) for what in ("dataset2prompt", "dataset2maxlen"))
    return [_read(folder, name, prompts, rooms, count) for name in sorted(chosen, key=lambda n: order.index(_base(n)))]


def skipped(folder: str | Path) -> list[str]:
    """The Chinese datasets in a folder."""
    return sorted(path.stem for path in Path(folder).expanduser().glob("*.jsonl") if _is_chinese(path.stem))


def settings_file(folder: str | Path, name: str) -> Path | None:
    """A file of LongBench's folder `config`, in `folder` or its own `config`; None if there is none."""
    places = (Path(folder).expanduser() / place / f"{name}.json" for place in (".", "config"))
    return next((path for path in places if path.exists()), None)


def settings_of(folder: str | Path, name: str) -> Mapping[str, Any]:
    """What such a file says of each dataset; nothing if there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    path = settings_file(folder, name)
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a JSON object with a value for each dataset")
    return settings


def _base(name: str) -> str:
    return name.removesuffix("_e")


def _is_chinese(name: str) -> bool:
    return _base(name) in CHINESE


def _read(folder: Path, name: str, prompts: Mapping[str, Any], rooms: Mapping[str, Any], count: int | None) -> Dataset:
    kind = KINDS[_base(name)]
    prompt, room = prompts.get(_base(name), PROMPTS[kind.prompt]), rooms.get(_base(name), kind.room)
    if not isinstance(prompt, str):
        raise ValueError(f"dataset2prompt.json must have a text for {_base(name)}, not {prompt!r}")
    if not isinstance(room, int) or room < 1:
        raise ValueError(f"dataset2maxlen.json must have a number of tokens for {_base(name)}, not {room!r}")
    path = folder / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: byte {error.start} is not") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (count is None or len(rows) < count):
            rows.append(_row(f"{path}:{number}", line, number, kind, prompt))
    if not rows:
        raise ValueError(f"{path} has no examples")
    dataset = Dataset(name, kind, room, rows)
    for row in rows:
        dataset.score("", row)  # so that what a metric refuses is refused before a model has answered
    return dataset


def _row(where: str, line: str, number: int, kind: Kind, prompt: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: it must be a JSON object ({error})") from None
    texts = ("input", "context")
    lists = ("answers",) + ("all_classes",) * (kind.metric == "accuracy")
    if not isinstance(fields, dict) or (missing := {*texts, *lists, "length"} - fields.keys()):
        lacks = ", ".join(sorted(missing)) if isinstance(fields, dict) else "all"
        raise ValueError(
            f"{where}: it must be a JSON object with {', '.join((*texts, *lists, 'length'))}; it lacks {lacks}"
        )
    for name in (*texts, *lists):
        wanted, values = ("a text", [fields[name]]) if name in texts else ("a list of texts", fields[name])
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {name} must be {wanted}, not {fields[name]!r:.60}")
    if not isinstance(fields["length"], int) or fields["length"] < 0:
        raise ValueError(f"{where}: length must be a number of words, not {fields['length']!r:.60}")
    try:
        text = prompt.format(**fields)
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"the prompt {prompt!r:.80} must have only fields of {where} in braces") from None
    classes = tuple(fields["all_classes"]) if "all_classes" in lists else ()
    return Row(str(fields.get("_id", number)), text, tuple(fields["answers"]), fields["length"], classes)
