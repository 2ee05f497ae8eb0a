"""Copy a sequence of symbols: one symbol repeated, or any symbols; once, twice, or as another symbol.

Copy: a b [SEP] a b
Replace x with y in x x [SEP] y y
"""

import itertools
import random
from collections.abc import Sequence
from string import ascii_letters, ascii_lowercase, digits

from nope_jax.data.tasks.task import Task


def symbols(count: int) -> list[str]:
    """The first symbols of an endless alphabet: ASCII characters in the paper's order, then aa, ab, ..., aaa, ...

    (The paper drops those that are not one token of T5's tokenizer, and goes on with words of its vocabulary.)
    """
    words = (itertools.product(ascii_lowercase, repeat=size) for size in itertools.count(2))
    everything = itertools.chain(digits + ascii_letters + "!$%&()*+,-./:;<=>", itertools.chain.from_iterable(words))
    return ["".join(symbol) for symbol in itertools.islice(everything, count)]


class SymbolTask(Task):
    """A task on sequences of symbols; lengths count symbols."""

    train_lengths = range(2, 21)
    test_lengths = range(21, 41)
    prompt = "Copy:"
    num_symbols = 100
    """As in the paper, except for one repeated symbol, of which the paper has about 115,000 / 19 = 6,052.

    That makes as many instances as examples, but a small model would see each symbol too rarely to learn it. A subclass
    that is registered in place of `copy` can have as many."""

    def __init__(self):
        self.symbols = symbols(self.num_symbols)
        self.vocabulary = f"{self.prompt} with in {' '.join(self.symbols)} [SEP] [NEXT]"

    def draw(self, rng: random.Random, length: int) -> Sequence[str]:
        return rng.choices(self.symbols, k=length)

    def write(self, instance: Sequence[str]) -> tuple[str, str]:
        return f"{self.prompt} {' '.join(instance)} [SEP] ", self.answer(instance)

    def answer(self, instance: Sequence[str]) -> str:
        return " ".join(instance)


class Copy(SymbolTask):
    name = "copy"

    def draw(self, rng: random.Random, length: int) -> Sequence[str]:
        return [rng.choice(self.symbols)] * length


class Copy2x(Copy):
    name = "copy_2x"

    def answer(self, instance: Sequence[str]) -> str:
        return " ".join([*instance, *instance])


class CopyReplaced(SymbolTask):
    name = "copy_replaced"
    prompt = "Replace"
    num_symbols = 78  # which makes 6,006 pairs

    def draw(self, rng: random.Random, length: int) -> Sequence[str]:
        old, new = rng.sample(self.symbols, 2)
        return [new, *[old] * length]

    def write(self, instance: Sequence[str]) -> tuple[str, str]:
        new, *old = instance
        return f"Replace {old[0]} with {new} in {' '.join(old)} [SEP] ", " ".join([new] * len(old))


class CopyMulti(SymbolTask):
    name = "copy_multi"


class CopyMulti2x(SymbolTask):
    name = "copy_multi_2x"

    def answer(self, instance: Sequence[str]) -> str:
        return f"{' '.join(instance)} [NEXT] {' '.join(instance)}"
