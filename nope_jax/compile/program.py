"""Parsing of compiled programs: computations, calls between them, and trip counts of loops.

The text is the result of `as_text()` of a compiled function, for CPU, GPU or TPU.
"""

import math
import re
from collections.abc import Iterator

Computations = dict[str, dict[str, str]]
"""The line of each instruction, by computation and instruction name. The header of a computation is its entry ""."""


def parse_program(text: str) -> tuple[Computations, str]:
    """Return the computations of a compiled program, and the name of its entry computation.

    Raises:
        ValueError: the text is not a compiled program.
    """
    computations: Computations = {}
    entry: str | None = None
    lines: dict[str, str] = {}
    for line in text.split("\n"):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if header and not line.startswith("HloModule"):
            lines = computations[header[2]] = {"": line}
            entry = header[2] if header[1] else entry
        elif instruction:
            lines[instruction[1]] = line
    if entry is None:
        raise ValueError("text must be that of a compiled program: what as_text() of a compiled function returns")
    return computations, entry


def executed(computations: Computations, entry: str, blocks: int) -> Iterator[tuple[str, str, float]]:
    """Yield the instructions that a compiled program executes, those within fusions excepted.

    Args:
        computations: Those of the program, with the name of the first, from `parse_program`.
        entry: The name.
        blocks: Number of key blocks in a sequence. The loop over the blocks of a diagonal, inside the loop over
            diagonals, is the only one whose trip count is not in the text; that of the average diagonal is used.

    Yields:
        The name of its computation, the instruction's line, and the number of executions.
    """

    def within(name: str, around: float, times: float) -> Iterator[tuple[str, str, float]]:
        for line in computations[name].values():
            yield name, line, times
            if re.search(r" fusion(-start|-done)?\(", line):
                continue  # one operation
            turns = loop_turns(line, computations, name)
            if turns is not None and math.isnan(turns):
                turns = _blocks_of_a_diagonal(around, blocks)
            for callee in called_computations(line):
                yield from within(callee, turns or around, times * (turns or 1))

    yield from within(entry, 1, 1)


def _blocks_of_a_diagonal(diagonals: float, blocks: int) -> float:
    """The average number of computed blocks per diagonal."""
    if diagonals >= blocks:  # all diagonals are visited, including fully masked ones, whose blocks are skipped
        return blocks * (blocks + 1) / 2 / diagonals
    return blocks - (diagonals + 1) / 2  # below the main diagonal, each has one block less than the one before


def arrays(text: str) -> list[tuple[str, str]]:
    """Return the dtype and the sizes of every array type in a text, such as ("bf16", "8,32")."""
    return re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)


def array_bytes(dtype: str, sizes: str) -> int:
    """Size of an array in bytes."""
    bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])  # a token has none
    return -(-bits * math.prod(int(size.strip("<=")) for size in sizes.split(",") if size) // 8)


def called_computations(line: str) -> Iterator[str]:
    """Yield the names of the computations that an instruction calls."""
    if re.search(r" async-(?:update|done)\(", line):
        return  # async-start already calls their computation
    attribute = r"\b(?:calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
    for names in re.findall(attribute, line):
        yield from re.findall(r"[\w.\-]+", names)


def multiplies(line: str, computations: Computations) -> bool:
    """Whether an instruction is a matrix product, or a fusion with one inside."""
    if re.search(r" (?:convolution|dot)\(", line):
        return True
    if not re.search(r" fusion(?:-start)?\(", line):
        return False
    return any(
        multiplies(within, computations) for name in called_computations(line) for within in computations[name].values()
    )


def loop_turns(line: str, computations: Computations, name: str) -> float | None:
    """Trip count of a loop: NaN if the text does not determine it, None if the instruction is not a loop."""
    loop = re.search(r" while\(%?([\w.\-]+)\), condition=%?([\w.\-]+)", line)
    if loop is None:
        return None
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    # A loop that counts up by one from a constant to a constant, as JAX emits for loops of known length.
    condition = _unfused(computations[loop[2]], computations)
    if not (test := re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", "\n".join(condition.values()))):
        return math.nan
    end = re.search(r" constant\((\d+)\)", condition.get(test[2], ""))
    counter = re.search(r" get-tuple-element\(.*\), index=(\d+)", condition.get(test[1], ""))
    values = re.search(r" tuple\((.*?)\)", computations[name].get(loop[1], ""))
    if not (end and counter and values):
        return math.nan
    first = computations[name].get(re.findall(r"%([\w.\-]+)", values[1])[int(counter[1])], "")
    while copied := re.search(r" (?:copy|bitcast)\(%?([\w.\-]+)\)", first):
        first = computations[name].get(copied[1], "")
    start = re.search(r" constant\((\d+)\)", first)
    return int(end[1]) - int(start[1]) if start else math.nan


def _unfused(condition: dict[str, str], computations: Computations) -> dict[str, str]:
    """The lines of a loop's condition with those inside its fusions, which the GPU compiler makes of comparisons."""
    lines = dict(condition)
    for line in condition.values():
        if not (fused := re.search(r" fusion\(([^)]*)\).*calls=%?([\w.\-]+)", line)):
            continue
        operands = re.findall(r"%([\w.\-]+)", fused[1])
        for name, within in computations[fused[2]].items():
            number = re.search(r" parameter\((\d+)\)", within)
            lines[name] = condition[operands[int(number[1])]] if number else within
    return lines
