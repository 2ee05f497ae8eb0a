"""What the tests of the evaluator share: a model that can be worked out by hand, and runs that were never trained."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.figure import Figure

from nope_jax import ModelConfig
from nope_jax.config import Config
from nope_jax.encodings import ENCODINGS
from nope_jax.evaluation.common.console import print_sections
from nope_jax.evaluation.common.evaluation import evaluate
from nope_jax.evaluation.common.files import write_numbers
from nope_jax.evaluation.common.report import add_sections
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.perplexity import Perplexity
from nope_jax.evaluation.perplexity.measure import Curve, bucket_edges
from nope_jax.evaluation.perplexity.units import Units
from nope_jax.evaluation.registry import Options

VOCABULARY, LAYERS, HEADS = 11, 2, 3


class Bigram(nnx.Module):
    """A model whose every number can be worked out by hand."""

    def __init__(self):
        self.table = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)), jnp.float32))

    def hidden(self, tokens, return_stats):
        assert return_stats
        heads = 1.0 + jnp.arange(LAYERS * HEADS).reshape(LAYERS, 1, HEADS, 1)
        entropy = heads * (tokens[:, None] + 0.5 * jnp.arange(tokens.shape[1]))
        return self.table[...][tokens], SimpleNamespace(entropy=entropy)

    def nll(self, hidden, targets):
        return optax.softmax_cross_entropy_with_integer_labels(hidden, targets)


def expected_nll(document):
    logits = np.asarray(Bigram().table[...], np.float64)
    return np.log(np.exp(logits).sum(-1))[document[:-1]] - logits[document[:-1], document[1:]]


def some_documents(*lengths):
    return [np.random.default_rng(length).integers(0, VOCABULARY, length) for length in lengths]


def synthetic_run(name="nope", nll=lambda p: 2.0, *, lengths=(128, 256, 512, 1024, 2048), max_length=None, documents=4):
    """A run trained at 128 whose loss is a function of position, the same in every document, of two bytes per token."""
    encoding = "learned" if max_length else name if name in ENCODINGS else "nope"
    config = Config(ModelConfig(encoding=encoding, train_length=128))
    run = Run(Path(name), name, config, max_length, lengths)
    for length in run.possible:
        edges = bucket_edges(length)
        tokens = np.tile(np.diff(edges), (documents, 1))
        nll_sum = np.array([sum(nll(p) for p in range(*edge)) for edge in itertools.pairwise(edges)])
        heads = np.tile(0.5 * np.log1p(np.arange(length, dtype=np.float32)), (LAYERS, HEADS, 1))
        entropy = np.tile(np.add.reduceat(heads.mean((0, 1)), edges[:-1]), (documents, 1))
        run.results[length] = Curve(edges, np.tile(nll_sum, (documents, 1)), tokens, entropy, heads, 2 * tokens)
    return run


def without_errors(cells):
    """Cells of a table without the standard errors, which are 0 where all documents are the same."""
    return [cell.removesuffix(" ± 0.00").removesuffix(" ± 0.000") for cell in cells]


def compare(workdirs, lengths, out, overrides, pictures=False):
    """`eval.py` without a further word, but for what its pictures show, which have tests of their own."""
    names = ("perplexity.png", "entropy.png", "curves.png", "dispersion.png")
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(Perplexity, "figures", lambda self: [(name, Figure()) for name in names])
        evaluate("curves", Options(tuple(workdirs), lengths, out, overrides))


def write(out, runs, units=None, only=""):
    """Writes the files of numbers that there are of runs, or only one of them."""
    files = Perplexity(runs, [{}], units or Units()).numbers()
    write_numbers(out, {only: files[only]} if only else files)


def show(runs, units=None):
    """Prints what the terminal says of runs."""
    print_sections(Perplexity(runs, [{}], units or Units()).sections())


def page(out, runs, units=None, command=""):
    """What report.html says of runs, with pictures that are empty where there are none."""
    write(out, runs, units)
    for name in "curves.png", "dispersion.png":
        (out / name).touch()
    add_sections(out, "curves", Perplexity(runs, [{}], units or Units()).sections(), command, [])
    return (out / "report.html").read_text()
