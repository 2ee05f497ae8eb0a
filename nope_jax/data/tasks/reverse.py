"""Reverse a sequence of symbols: once, twice, or followed by a copy.

Reverse: a b [SEP] b a
Reverse: a b [SEP] b a [NEXT] a b
"""

from collections.abc import Sequence

from nope_jax.data.tasks.copy import SymbolTask


class Reverse(SymbolTask):
    name = "reverse"
    prompt = "Reverse:"

    def answer(self, instance: Sequence[str]) -> str:
        return " ".join(reversed(instance))


class Reverse2x(Reverse):
    name = "reverse_2x"

    def answer(self, instance: Sequence[str]) -> str:
        return f"{super().answer(instance)} [NEXT] {super().answer(instance)}"


class ReverseAndCopy(Reverse):
    name = "reverse_mcrv"

    def answer(self, instance: Sequence[str]) -> str:
        return f"{super().answer(instance)} [NEXT] {' '.join(instance)}"
