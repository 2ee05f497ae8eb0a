"""Scratchpads: the steps of a computation, written before its answer (Kazemnejad et al. 2023, section 6).

A step has up to five parts: I input, C computation, O output, V variables, R remaining input. A format says which of
them are written. A target with a scratchpad reads

    Thinking step by step:  in 7, 6 comp 7 + 6 + carry = 13 + 0 = 13 out 3 [ carry: 1 ] re 5 + 1  # in ...  . Thus,  The

with the markers and the double spaces of the paper's code.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

BEGIN, BETWEEN, END = "Thinking step by step:  ", " # ", " . Thus,  "


class Step(NamedTuple):
    """A step of a computation; None for parts that it does not have or that were not written."""

    input: str | None = None
    computation: str | None = None
    output: str | None = None
    variables: str | None = None
    remaining: str | None = None


MARKERS = {
    "input": ("in ", " "),
    "computation": ("comp ", " "),
    "output": ("out ", " "),
    "variables": ("[ ", " ] "),
    "remaining": ("re ", " "),
}
"""What is written before and after each part, in this order."""

FORMATS: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": Step._fields,
    **{f"no_{part}": tuple(other for other in Step._fields if other != part) for part in Step._fields},
    "minimal": ("computation", "output"),
}
"""The parts that each format writes; `none` is no scratchpad at all."""


class Grade(NamedTuple):
    """Whether a prediction is right."""

    answer: bool
    """It ends with the answer, after a scratchpad with the parts of the format if it has one."""
    scratchpad: bool
    """All its steps are right."""


def keep(steps: Iterable[Step], format: str) -> tuple[Step, ...]:
    """The steps with only the parts that a format writes.

    Raises:
        ValueError: the format is not one of FORMATS.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if not FORMATS[format]:
        return ()
    return tuple(Step(**{part: getattr(step, part) for part in FORMATS[format]}) for step in steps)


def write(steps: Iterable[Step], format: str) -> str:
    """Write the text that precedes the answer: "" if the format or the task has no steps.

    Raises:
        ValueError: the format is not one of FORMATS.
    """
    kept = keep(steps, format)
    if not kept:
        return ""
    lines = [
        "".join(
            f"{before}{part}{after}"
            for part, (before, after) in zip(step, MARKERS.values(), strict=True)
            if part is not None
        )
        for step in kept
    ]
    return BEGIN + BETWEEN.join(lines) + END


def parse(text: str) -> tuple[tuple[Step, ...], str] | None:
    """Read the steps and the answer of a target with a scratchpad; None if it is malformed.

    Each step needs at least one part; parts may be missing, but not be in another order.
    """
    begin, steps, answer = text.startswith(BEGIN), *text.removeprefix(BEGIN).partition(END)[::2]
    if not begin or END not in text:
        return None
    matches = [_STEP.fullmatch(line) for line in steps.split(BETWEEN)]
    parsed = [Step(**match.groupdict()) for match in matches if match is not None]
    if len(parsed) < len(matches) or Step() in parsed:
        return None
    return tuple(parsed), answer


def grade(prediction: str, target: str, steps: Iterable[Step] = (), format: str = "none") -> Grade:
    """Compare a generated text with the target and the steps of an example; whitespace at both ends is ignored.

    A malformed scratchpad is wrong, and so is the answer after it. Without steps to write, there is no scratchpad, and
    its grade is that of the answer.
    """
    kept, prediction, target = keep(steps, format), prediction.strip(), target.strip()
    if not kept:
        return Grade(prediction == target, prediction == target)
    parsed = parse(prediction)
    if parsed is None or any(_parts(step) != _parts(kept[0]) for step in parsed[0]):
        return Grade(answer=False, scratchpad=False)
    return Grade(parsed[1].strip() == target, parsed[0] == kept)


def _parts(step: Step) -> list[bool]:
    return [part is not None for part in step]


_STEP = re.compile(
    "".join(f"(?:{re.escape(before)}(?P<{part}>.*?){re.escape(after)})?" for part, (before, after) in MARKERS.items()),
    re.DOTALL,
)
