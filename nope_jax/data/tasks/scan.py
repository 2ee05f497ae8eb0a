"""SCAN: translate commands to actions (Lake and Baroni 2018, arXiv 1711.00350).

    Solve: walk after turn right[SEP] Right Walk

All 20,910 commands come from the published grammar. The published length split has 16,990 commands of up to 22 actions
and 3,920 of more; the paper's has those of up to 25 for training, and the 26 to 48 actions for the test.
"""

import itertools
from collections.abc import Mapping

from nope_jax.data.tasks.commands import CommandTask

VERBS = {"walk": "Walk", "look": "Look", "run": "Run", "jump": "Jump", "turn": None}
SIDES = {"left": "Left", "right": "Right"}
TIMES = {"": 1, " twice": 2, " thrice": 3}
PUBLISHED = {
    **{f"I_{action.upper()}": action for action in VERBS.values() if action},
    **{f"I_TURN_{turn.upper()}": turn for turn in SIDES.values()},
}
"""The actions of the published dataset, and what the paper writes for them."""


def commands() -> dict[str, tuple[str, ...]]:
    """All commands with their actions."""
    phrases = {}
    for verb, action in VERBS.items():
        does = (action,) if action else ()
        if does:
            phrases[verb] = does
        for side, turn in SIDES.items():
            phrases[f"{verb} {side}"] = (turn, *does)
            phrases[f"{verb} opposite {side}"] = (turn, turn, *does)
            phrases[f"{verb} around {side}"] = (turn, *does) * 4
    sentences = {phrase + word: does * times for phrase, does in phrases.items() for word, times in TIMES.items()}
    pairs = list(itertools.product(sentences.items(), repeat=2))
    joined = {f"{first} and {second}": does + then for (first, does), (second, then) in pairs}
    after = {f"{first} after {second}": then + does for (first, does), (second, then) in pairs}
    return sentences | joined | after


class Scan(CommandTask):
    """SCAN; the length is the number of actions. All commands of more than 25 actions are in the test split, and a
    tenth of the others."""

    name = "scan"
    train_lengths = range(1, 26)
    test_lengths = range(26, 49)
    lengths = range(1, 49)
    vocabulary = (
        f"Solve: {' '.join([*VERBS, *SIDES])} twice thrice opposite around and after "
        f"walk[SEP] {' '.join(PUBLISHED.values())}"
    )

    def generate(self) -> Mapping[str, str]:
        return {command: " ".join(actions) for command, actions in commands().items()}

    def measure(self, command: str, output: str) -> int:
        return len(output.split())

    @staticmethod
    def translate(output: str) -> str:
        return " ".join(PUBLISHED.get(action, action) for action in output.split())
