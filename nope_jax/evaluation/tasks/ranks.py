"""Mean reciprocal ranks of encodings (Kazemnejad et al. 2023, section 4)."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

Cell = TypeVar("Cell", bound=Hashable)


def mean_reciprocal_ranks(
    scores: Mapping[str, Mapping[Cell, float]], *, share_ties: bool = False
) -> tuple[dict[str, float], int]:
    """Rank encodings in each cell (a task with one seed, say) by score, highest first, and average 1/rank over cells.

    As in the paper's code, a cell that lacks the score of an encoding is left out, and of equal scores the one listed
    first ranks higher.

    Args:
        scores: the score of each encoding in each cell.
        share_ties: instead, equal scores get the mean of 1/rank over the ranks that they take up.

    Returns:
        The mean of each encoding, and the number of cells; without cells, no means.
    """
    cells = [cell for cell in next(iter(scores.values()), {}) if all(cell in own for own in scores.values())]
    if not cells:
        return {}, 0
    sums = dict.fromkeys(scores, 0.0)
    for cell in cells:
        ranked = sorted(scores, key=lambda name: -scores[name][cell])  # sorting keeps the order of equals
        reciprocal = {name: 1 / rank for rank, name in enumerate(ranked, 1)}
        for name in ranked:
            equal = [other for other in ranked if share_ties and scores[other][cell] == scores[name][cell]] or [name]
            sums[name] += sum(reciprocal[other] for other in equal) / len(equal)
    return {name: total / len(cells) for name, total in sums.items()}, len(cells)
