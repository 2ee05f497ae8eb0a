"""Passkey retrieval: how often a model retrieves a number hidden in filler text (Wang et al. 2024, arXiv 2404.12224).

An answer is correct if greedy decoding produces all its tokens. This holds exactly if each token has the highest
probability given the prompt and the preceding answer tokens, so one forward pass over prompt and answer suffices.

Shapes: B rows, T length, A tokens of the longest answer, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nope_jax.data import load_tokenizer
from nope_jax.data.tasks.passkey import KEYS, Passkey
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.plots import QUIET
from nope_jax.evaluation.common.report import CAVEAT, Section, Table
from nope_jax.evaluation.common.runs import Run, cannot_read, find_runs
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.registry import Options, PasskeyConfig
from nope_jax.sharding import to_host

COLUMNS = "run encoding train_length length depth correct keys accuracy accuracy_low accuracy_high"
"""Columns of passkey.csv, one row per run, measured length and depth; `correct` of `keys` answers were correct.

`accuracy_low` and `accuracy_high` are the 95 % Wilson interval (`nope_jax.evaluation.common.uncertainty`)."""
CELL_LABELS = 12
"""Maximum number of lengths for which the figure labels each cell with its value."""


Correct = Int[np.ndarray, "depths"]
"""Number of correct answers, out of `keys`, of a run at one length and each depth."""


def plan(options: Options) -> "PasskeyRetrieval":
    """Plans passkey retrieval for every run at every length (prompt plus answer, in tokens of the run's tokenizer).

    Each length has `settings.depths` depths from 0 to 1 with `settings.keys` keys each. The keys are the same for every
    run and do not depend on the other lengths.

    Raises:
        ValueError: a run, a length or a tokenizer is invalid.
    """
    runs = find_runs(options)
    used = [run.config.data for run in runs]
    tasks = [Passkey(load_tokenizer(data.tokenizer, data.separator_token), bos=data.bos) for data in used]
    for run, task in zip(runs, tasks, strict=True):
        for length in options.lengths:
            shortest = max(task.shortest(key) for key in draw_keys(options.settings, length).flat)
            if length < shortest:
                raise ValueError(
                    f"--lengths: {length} is too short for a passkey prompt and its answer, which take {shortest} "
                    f"tokens of the tokenizer of {run.name} ({run.config.data.tokenizer}) before any filler"
                )
    return PasskeyRetrieval(runs, tasks, options.settings)


@dataclasses.dataclass
class PasskeyRetrieval(Evaluation):
    """Passkey retrieval; `Run.results` holds the correct answers of each run at each length."""

    runs: Sequence[Run[Correct]]
    tasks: Sequence[Passkey]
    """For each run, the task that builds its prompts."""
    settings: PasskeyConfig

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        settings = self.settings
        bar.total(settings.depths * settings.keys * sum(sum(run.possible) for run in self.runs))
        for run, task in zip(self.runs, self.tasks, strict=True):
            bar.describe(f"{run.name}: loading")
            placement = run.place(settings.batch_size, math.gcd(*run.possible))
            model = run.load(placement.mesh)
            for length in run.possible:
                bar.describe(f"{run.name} at {length:,}")
                with jax.set_mesh(placement.mesh):
                    run.results[length] = measure(
                        model,
                        task,
                        length,
                        depths(settings),
                        draw_keys(settings, length),
                        batch_size=placement.rows,
                        place=placement.put,
                        advance=bar.advance,
                    )
                yield

    def numbers(self) -> Mapping[str, Csv]:
        return {"passkey.csv": Csv(COLUMNS, self._csv_rows())}

    def _csv_rows(self) -> Iterator[tuple]:
        keys = self.settings.keys
        for run in self.runs:
            for length, correct in sorted(run.results.items()):
                for depth, count in zip(depths(self.settings), correct, strict=True):
                    what = (run.name, run.encoding, run.train_length, length, depth, count, keys)
                    yield (*what, count / keys, *wilson_interval(int(count), keys))

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "passkey.png", draw(self.measured, self.settings)

    def sections(self) -> list[Section]:
        header = ["run", "encoding", "trained at", *(f"{length:,}" for length in self.runs[0].lengths)]
        section = Section(
            "Passkeys found",
            "A five-digit number is hidden in repeated filler text, and asked for at the end (Wang et al. 2024).",
            Table("Passkeys found by length", header, rows(self.measured, self.settings)),
            notes(self.measured, self.settings),
            figures={"passkey.png": "Share of correct answers of every run, by depth and length"},
            files={"passkey.csv": "one row per run, length and depth, with 95 % intervals."},
        )
        return [section]


def interval(correct: Correct, settings: PasskeyConfig) -> tuple[float, float]:
    """The 95 % interval of the share of correct answers over all depths."""
    return wilson_interval(int(correct.sum()), settings.depths * settings.keys)


def depths(settings: PasskeyConfig) -> np.ndarray:
    """The depths of the grid, from 0 to 1."""
    return np.linspace(0, 1, settings.depths)


def draw_keys(settings: PasskeyConfig, length: int) -> Int[np.ndarray, "depths keys"]:
    """Draws the keys hidden in prompts of one length."""
    rng = np.random.default_rng((settings.seed, length))
    return rng.integers(KEYS.start, KEYS.stop, (settings.depths, settings.keys))


def measure(
    model: nnx.Module,
    task: Passkey,
    length: int,
    depths: np.ndarray,
    keys: Int[np.ndarray, "depths keys"],
    *,
    batch_size: int = 8,
    place: Callable[[tuple], tuple] = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Int[np.ndarray, "depths"]:
    """Counts the correct answers at each depth.

    Args:
        model: has `hidden(tokens [B, T])`, which returns a pair whose first element is the input of `logits`, and
            `logits`, which returns [B, A, V].
        task: builds the prompts.
        length: tokens of prompt and answer together.
        depths: fractions of the filler that precede the needle.
        keys: the keys hidden at each depth.
        batch_size: prompts per call of the model.
        place: puts a tuple of arrays [B, T] and [B, A] on the devices.
        advance: called with the number of tokens just read, to report progress.
    """
    prompts = [task.build(length, depth, key) for depth, row in zip(depths, keys, strict=True) for key in row]
    tokens = np.stack([prompt for prompt, _ in prompts])
    answers = np.array([answer for _, answer in prompts])
    last = int(answers.max())
    counts = np.arange(last) >= last - answers[:, None]
    graphdef, state = nnx.split(model)
    right = np.zeros(len(prompts), bool)
    for first in range(0, len(prompts), batch_size):
        rows = np.arange(first, min(first + batch_size, len(prompts)))
        padded = np.resize(rows, batch_size)  # the last batch is padded with its own rows
        inputs = place((tokens[padded], counts[padded]))
        right[rows] = to_host(_right(graphdef, state, *inputs))[: len(rows)]
        advance(len(rows) * length)
    return right.reshape(keys.shape).sum(1)


@functools.partial(jax.jit, static_argnums=0)
def _right(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], counts: Bool[Array, "B A"]
) -> Bool[Array, "B"]:
    """Whether every counted token at the end of a row is the most likely one given the tokens before it."""
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(tokens)
    last = counts.shape[1]
    likeliest = model.logits(hidden[:, -last - 1 : -1]).argmax(-1)
    return ((likeliest == tokens[:, -last:]) | ~counts).all(-1)


def draw(runs: Sequence[Run[Correct]], settings: PasskeyConfig) -> Figure:
    """Draws accuracy: a heat map per run (depth down, length across, a line after the training length), and below them
    the share over all depths by length, with its interval."""
    lengths, where = runs[0].lengths, depths(settings)
    across = min(len(runs), 3)
    down = -(-len(runs) // across)
    width, height = max(2.6, 0.55 * len(lengths) + 0.8), max(2.2, 0.24 * len(where) + 1.2)
    size = (across * width + 1.2, down * height + 0.5)
    drawing = plots.new_figure(size[0], size[1] + 2.6)
    figure, below = drawing.subfigures(2, 1, height_ratios=(size[1], 2.6), squeeze=False)[:, 0]
    axes_of_runs = plots.panels(figure, len(runs), across)
    for run, axes in zip(runs, axes_of_runs, strict=True):
        values = np.full((len(where), len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            if length in run.results:
                values[:, column] = run.results[length] / settings.keys
            else:
                reason = "cannot" if length in run.refused else "not measured"
                middle = (len(where) - 1) / 2
                axes.text(column, middle, reason, ha="center", va="center", color=QUIET, fontsize=8, rotation=90)
        shares = np.ndenumerate(values) if len(lengths) <= CELL_LABELS else ()
        labels = {cell: f"{100 * share:.0f}" for cell, share in shares if np.isfinite(share)}
        title = f"{run.name} (trained at {run.train_length:,}, orange)"
        image = plots.draw_map(axes, values, 0, 1, title, labels)
        inside = sum(length <= run.train_length for length in lengths)
        axes.axvline(inside - 0.5, color="#D55E00", linewidth=2.5, clip_on=False)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(where)), [f"{depth:.0%}" for depth in where])
    figure.supxlabel("Length of prompt and answer (tokens)", fontsize=9)
    figure.supylabel("Depth of the key in the filler", fontsize=9)
    figure.colorbar(image, ax=axes_of_runs, label="Share of correct answers", shrink=0.8)
    _draw_shares(below.subplots(), runs, settings)
    return drawing


def _draw_shares(axes: Axes, runs: Sequence[Run[Correct]], settings: PasskeyConfig) -> None:
    """Draws the share of correct answers over all depths by length, a line per run, with 95 % intervals."""
    lengths = runs[0].lengths
    for i, run in enumerate(runs):
        x = np.array([lengths.index(length) for length in run.results]) + 0.3 * ((i + 0.5) / len(runs) - 0.5)
        shares = np.array([correct.mean() / settings.keys for correct in run.results.values()])
        ends = np.array([interval(correct, settings) for correct in run.results.values()]).T
        error = np.abs(ends - shares)
        axes.errorbar(x, shares, error, linewidth=1.4, markersize=4, capsize=3, label=run.name, **plots.line_style(i))
    plots.finish(axes, y_label="Share over all depths\n(bars: 95 % interval)")
    axes.set_xlabel("Length of prompt and answer (tokens)", fontsize=9)
    axes.yaxis.label.set_fontsize(9)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(-0.03, 1.03)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def rows(runs: Sequence[Run[Correct]], settings: PasskeyConfig) -> list[tuple[str, ...]]:
    """Table cells, one row per run: run, encoding, training length, and one column per length."""

    def cell(run: Run[Correct], length: int) -> str:
        if length not in run.results:
            return "cannot" if length in run.refused else "-"
        correct = run.results[length]
        accuracy, (low, high) = correct / settings.keys, interval(correct, settings)
        return f"{100 * accuracy.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}] ({100 * accuracy.min():.0f})"

    return [
        (run.name, run.short_encoding, f"{run.train_length:,}", *(cell(run, length) for length in run.lengths))
        for run in runs
    ]


def notes(runs: Sequence[Run[Correct]], settings: PasskeyConfig) -> list[str]:
    """Notes below the table: the lengths that a run does not support, and the definition of the numbers."""
    definition = (
        "Correct answers in percent (greedy decoding, all five digits): the share over "
        f"{settings.depths} depths with {settings.keys} keys each, [its 95 % Wilson interval] and (the share at the "
        "worst depth). Lengths include prompt and answer. All runs are asked for the same keys."
    )
    return [*cannot_read(runs), definition, CAVEAT]
