'''Tasks: the ten of Kazemnejad et al. 2023 (arXiv 2305.19466) in their forms, and passkey retrieval.

    from nope_jax.data.tasks import TASKS

    source, target, steps = TASKS["addition"].example(seed=0, index=5, length=8)

`data.source` `task:NAME` trains on a task. An example is a function of seed, index, length and split. No instance is in
both splits: a hash of its source decides, so a tenth of the instances is held out, and half of those of other lengths
than the paper trains on (`Task.split`). Texts are those of the paper's code, including its `[SEP]`, which ends the
source; the constant first word plays the part of a BOS token.

To add a task, register an object of a class like this one, for example in a config file:

    class Maximum(Task):
        """The largest of several digits; the length is their number."""

        name = "maximum"
        train_lengths = range(1, 9)
        test_lengths = range(9, 17)
        vocabulary = "Largest of 0 1 2 3 4 5 6 7 8 9 ? It is 0."

        def draw(self, rng: random.Random, length: int) -> list[int]:
            return rng.choices(range(10), k=length)

        def write(self, digits: list[int]) -> tuple[str, str]:
            return f"Largest of {' '.join(map(str, digits))} ? ", f"It is {max(digits)}."

    register(Maximum())

`steps` adds a scratchpad. `draw` should take all randomness from `rng`.
'''

import difflib
from pathlib import Path

from nope_jax.data.tasks import addition, copy, lego, parity, passkey, pcfg, polynomial, reverse, scan, sort, summation
from nope_jax.data.tasks.commands import CommandTask
from nope_jax.data.tasks.scratchpad import FORMATS, Grade, Step, grade
from nope_jax.data.tasks.task import Example, Task, TaskDocuments, TaskSplit, encode

TASKS: dict[str, Task] = {}
"""All tasks by name."""


def register(task: Task) -> None:
    """Add a task under its name, in place of one with the same name."""
    TASKS[task.name] = task


for _task in (
    copy.Copy(),
    copy.Copy2x(),
    copy.CopyReplaced(),
    copy.CopyMulti(),
    copy.CopyMulti2x(),
    reverse.Reverse(),
    reverse.Reverse2x(),
    reverse.ReverseAndCopy(),
    addition.Addition(),
    summation.Summation(),
    parity.Parity(),
    polynomial.Polynomial(),
    sort.Sort(),
    sort.SortIntegers(),
    lego.Lego(),
    scan.Scan(),
    pcfg.Pcfg(),
    passkey.PasskeyTask(),
):
    register(_task)


def find_task(name: str, field: str = "data.source") -> Task:
    """Return a task by its name, or `NAME:PATH`, a task of commands read from a prepared dataset.

    Raises:
        ValueError: the task does not exist, or the dataset cannot be read; the message names the config field.
    """
    name, _, path = name.partition(":")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(TASKS)}"
        raise ValueError(f"{field}: unknown task {name!r}: {hint}")
    task = TASKS[name]
    if not path:
        return task
    if not isinstance(task, CommandTask):
        raise ValueError(f"{field}: task:{name} is generated and reads no dataset, so it cannot be task:{name}:{path}")
    return task.read(Path(path))


__all__ = [
    "FORMATS",
    "TASKS",
    "CommandTask",
    "Example",
    "Grade",
    "Step",
    "Task",
    "TaskDocuments",
    "TaskSplit",
    "encode",
    "find_task",
    "grade",
    "register",
]
