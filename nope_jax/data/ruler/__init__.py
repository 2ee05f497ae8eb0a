"""The tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654), in its strings.

    from nope_jax.data.ruler import RULER

    for prompt, answers in RULER["vt"].examples(tokenizer, length=4096, count=500, seed=42): ...
    tasks = read_tasks(haystack=Path("essays.txt"), questions=[Path("dev-v2.0.json")])

The examples are those of its code (github.com/NVIDIA/RULER, Apache-2.0, commit c3f5e3b) for the same seed, length and
tokenizer, in the form for base models: the prompt ends with the beginning of the answer. RULER draws them one after the
other from one generator, so that an example depends on those before it, but not on how many follow.

Seven of the thirteen read a file of the user (`RulerTask.file`), for which RULER downloads Paul Graham's essays, SQuAD
and HotpotQA. With other texts they are tasks in RULER's style.
"""

from collections.abc import Sequence
from pathlib import Path

from nope_jax.data.ruler.common_words import CommonWords
from nope_jax.data.ruler.frequent_words import FrequentWords
from nope_jax.data.ruler.needles import Needles
from nope_jax.data.ruler.questions import Questions, format_of
from nope_jax.data.ruler.task import Example, RulerTask, score
from nope_jax.data.ruler.variables import Variables

RULER: dict[str, RulerTask] = {
    task.name: task
    for task in (
        Needles("niah_single_1", haystack="filler", keys="words", values="numbers"),
        Needles("niah_single_2", haystack="text", keys="words", values="numbers"),
        Needles("niah_single_3", haystack="text", keys="words", values="uuids"),
        Needles("niah_multikey_1", haystack="text", keys="words", values="numbers", num_keys=4),
        Needles("niah_multikey_2", haystack="needles", keys="words", values="numbers"),
        Needles("niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
        Needles("niah_multivalue", haystack="text", keys="words", values="numbers", num_values=4),
        Needles("niah_multiquery", haystack="text", keys="words", values="numbers", num_keys=4, num_queries=4),
        Variables("vt"),
        CommonWords("cwe"),
        FrequentWords("fwe"),
        Questions("qa_1", format="SQuAD"),
        Questions("qa_2", format="HotpotQA"),
    )
}
"""The tasks by RULER's names for them; those with a `file` have to read it."""


def read_tasks(haystack: Path | None = None, questions: Sequence[Path] = ()) -> dict[str, RulerTask]:
    """Return the tasks that need no file, and those over the user's own, in the order of RULER.

    Args:
        haystack: a text, or a JSON file with a field `text`, as RULER stores the essays.
        questions: at most one file in the format of SQuAD, and one in that of HotpotQA.

    Raises:
        ValueError: a file has another format, or two have the same.
        OSError: a file cannot be read.
    """
    by_format = {format_of(path): path for path in questions}
    if len(by_format) < len(questions):
        raise ValueError(f"{' and '.join(map(str, questions))} are files of questions in one format; give one of each")
    files: dict[str, Path | None] = {}
    for name, task in RULER.items():
        if isinstance(task, Questions):
            files[name] = by_format.get(task.format)
        elif task.file == "haystack":
            files[name] = haystack
    read = {name: task.read(path) for name, task in RULER.items() if (path := files.get(name)) is not None}
    return {name: read.get(name, task) for name, task in RULER.items() if task.file is None or name in read}


__all__ = ["RULER", "Example", "RulerTask", "read_tasks", "score"]
