"""Six tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654), those that need no downloads, in its strings.

    from nope_jax.data.ruler import RULER

    for prompt, answers in RULER["vt"].examples(tokenizer, length=4096, count=500, seed=42): ...

The examples are those of its code (github.com/NVIDIA/RULER, Apache-2.0, commit c3f5e3b) for the same seed, length and
tokenizer, in the form for base models: the prompt ends with the beginning of the answer. RULER draws them one after the
other from one generator, so that an example depends on those before it, but not on how many follow.

RULER's other seven tasks need Paul Graham's essays, SQuAD or HotpotQA, and are not here.
"""

from nope_jax.data.ruler.common_words import CommonWords
from nope_jax.data.ruler.frequent_words import FrequentWords
from nope_jax.data.ruler.needles import Needles
from nope_jax.data.ruler.task import Example, RulerTask, score
from nope_jax.data.ruler.variables import Variables

RULER: dict[str, RulerTask] = {
    task.name: task
    for task in (
        Needles("niah_single_1", haystack="filler", keys="words", values="numbers"),
        Needles("niah_multikey_2", haystack="needles", keys="words", values="numbers"),
        Needles("niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
        Variables("vt"),
        CommonWords("cwe"),
        FrequentWords("fwe"),
    )
}
"""The tasks by RULER's names for them."""

__all__ = ["RULER", "Example", "RulerTask", "score"]
