"""Passkey retrieval: how often a model finds a number that is hidden in filler (Wang et al. 2024, arXiv 2404.12224).

A model answers right when greedy decoding gives every token of the answer. That is so exactly when each of them is the
likeliest given the prompt and the tokens of the answer before it, so one pass over prompt and answer decides.

B rows, T length, A tokens of the longest answer, V vocabulary.
"""

import csv
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.cli import EvalArguments
from nope_jax.config import MeshConfig, PasskeyConfig
from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import KEYS, Passkey
from nope_jax.evaluation import report
from nope_jax.evaluation.comparison import find_run
from nope_jax.evaluation.console import print_table, progress_bar
from nope_jax.evaluation.figures import COLOURS, DASHES, INK, MARKERS, QUIET
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.run import Run, run_names
from nope_jax.evaluation.uncertainty import wilson_interval
from nope_jax.sharding import make_mesh, place_batch

COLUMNS = (
    "run",
    "encoding",
    "train_length",
    "length",
    "depth",
    "correct",
    "keys",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
)
"""Of passkey.csv: one row per run, measured length and depth; `correct` of `keys` answers were right.

`accuracy_low` and `accuracy_high` are the 95 % interval of Wilson (`nope_jax.evaluation.uncertainty`)."""
CELL_LABELS = 12
"""Up to so many lengths, each cell of the picture carries its number."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What one run is asked, and how many of its answers were right."""

    workdir: Path
    run: Run
    task: Passkey
    settings: PasskeyConfig
    correct: dict[int, Int[np.ndarray, "depths"]] = dataclasses.field(default_factory=dict)
    """For each length measured so far, the right answers at each depth, of `settings.keys`."""

    def accuracy(self, length: int) -> np.ndarray | None:
        """The share of right answers at each depth; None where that was not measured."""
        return self.correct[length] / self.settings.keys if length in self.correct else None

    def interval(self, length: int) -> tuple[float, float]:
        """The 95 % interval of the share of right answers over all depths."""
        return wilson_interval(int(self.correct[length].sum()), self.settings.depths * self.settings.keys)


def passkey(options: EvalArguments, *, command: str) -> None:
    """Asks every run for passkeys, and writes passkey.csv, passkey.png and a section of the report to `options.out`.

    For each length, `settings.depths` depths from 0 to 1 and at each `settings.keys` keys: the same for every run, and
    at a length whatever the others are. What has been measured is written even if the rest fails or is interrupted.

    Args:
        options: the runs, the lengths (of prompt and answer together, in tokens of each run's own tokenizer), where the
            results go, and a PasskeyConfig.
        command: what the user typed, for the report.

    Raises:
        ValueError: a run, a length or a tokenizer that cannot be had.
        OSError: `options.out` cannot be written.
    """
    grids = _plan(options)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    try:
        _measure_all(grids, out)
    finally:
        if measured := [grid for grid in grids if grid.correct]:
            plot(out / "passkey.png", measured)
            report.add_section(out, "passkey", _section(out, measured, command), options.workdirs)
            remarks = (*notes(measured), f"Written to {out}: see report.html there.")
            print_table("Passkeys found, by length", _header(measured), rows(measured), *remarks)


def depths(settings: PasskeyConfig) -> np.ndarray:
    """The depths of the grid."""
    return np.linspace(0, 1, settings.depths)


def draw_keys(settings: PasskeyConfig, length: int) -> Int[np.ndarray, "depths keys"]:
    """The keys hidden in prompts of a length."""
    rng = np.random.default_rng((settings.seed, length))
    return rng.integers(KEYS.start, KEYS.stop, (settings.depths, settings.keys))


def _plan(options: EvalArguments) -> list[Grid]:
    """Finds out all that can be wrong before anything large is loaded or computed."""
    lengths = sorted(set(options.lengths))
    grids = []
    for workdir, name in zip(options.workdirs, run_names(options.workdirs), strict=True):
        config = configs.override(configs.load(workdir), options.overrides)
        run = find_run(workdir, name, config, lengths)
        task = Passkey(load_tokenizer(config.data.tokenizer), bos=config.data.bos)
        for length in lengths:
            shortest = max(task.shortest(key) for key in draw_keys(options.settings, length).flat)
            if length < shortest:
                raise ValueError(
                    f"--lengths: {length} is too short for a passkey prompt and its answer, which take {shortest} "
                    f"tokens of the tokenizer of {name} ({config.data.tokenizer}) before any filler"
                )
        grids.append(Grid(workdir, run, task, options.settings))
    return grids


def _measure_all(grids: Sequence[Grid], out: Path) -> None:
    """Fills in the grid of every run, and keeps passkey.csv up to date with them."""
    mesh = make_mesh(MeshConfig())
    num_shards = mesh.shape["data"]
    with progress_bar() as progress:
        per_length = grids[0].settings.depths * grids[0].settings.keys
        bar = progress.add_task("", total=per_length * sum(sum(grid.run.possible) for grid in grids))
        for grid in grids:
            progress.update(bar, description=f"{grid.run.name}: loading")
            _, model, _ = load_model(grid.workdir, mesh)
            for length in grid.run.possible:
                progress.update(bar, description=f"{grid.run.name} at {length:,}")
                grid.correct[length] = measure(
                    model,
                    grid.task,
                    length,
                    depths(grid.settings),
                    draw_keys(grid.settings, length),
                    batch_size=-(-grid.settings.batch_size // num_shards) * num_shards,
                    place=functools.partial(place_batch, mesh=mesh),
                    advance=functools.partial(progress.advance, bar),
                )
                write_grids(out / "passkey.csv", grids)
        progress.update(bar, description="measured")


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
    """Counts the right answers at each depth.

    Args:
        model: has `hidden(tokens [B, T])`, which returns what `logits` reads (a pair, of which that is the first), and
            `logits`, which returns [B, A, V].
        task: makes the prompts.
        length: tokens of prompt and answer together.
        depths: shares of the filler that come before the needle.
        keys: what is hidden at each of them.
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
        padded = np.resize(rows, batch_size)  # the rest of the last batch repeats its rows
        inputs = place((tokens[padded], counts[padded]))
        right[rows] = np.asarray(_right(graphdef, state, *inputs))[: len(rows)]
        advance(len(rows) * length)
    return right.reshape(keys.shape).sum(1)


@functools.partial(jax.jit, static_argnums=0)
def _right(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], counts: Bool[Array, "B A"]
) -> Bool[Array, "B"]:
    """Whether each of the last tokens of a row that count is the one most likely after those before it."""
    model = nnx.merge(graphdef, state)
    hidden, _ = model.hidden(tokens)
    last = counts.shape[1]
    likeliest = model.logits(hidden[:, -last - 1 : -1]).argmax(-1)
    return ((likeliest == tokens[:, -last:]) | ~counts).all(-1)


def write_grids(path: Path, grids: Sequence[Grid]) -> None:
    """Writes one CSV row per run, measured length and depth."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for grid in grids:
            run, keys = grid.run, grid.settings.keys
            for length, correct in sorted(grid.correct.items()):
                for depth, count in zip(depths(grid.settings), correct, strict=True):
                    what = (run.name, run.encoding, run.train_length, length, f"{depth:.6g}")
                    shares = (count / keys, *wilson_interval(int(count), keys))
                    writer.writerow((*what, count, keys, *(f"{share:.6g}" for share in shares)))


def plot(path: Path, grids: Sequence[Grid]) -> None:
    """Draws accuracy: a heat map per run (depth down, length across, a line where its training length ends), and below
    them the share over all depths by length, with its interval."""
    lengths, where = grids[0].run.lengths, depths(grids[0].settings)
    across = min(len(grids), 3)
    down = -(-len(grids) // across)
    width, height = max(2.6, 0.55 * len(lengths) + 0.8), max(2.2, 0.24 * len(where) + 1.2)
    size = (across * width + 1.2, down * height + 0.5)
    drawing = Figure(figsize=(size[0], size[1] + 2.6), dpi=160, layout="constrained")
    FigureCanvasAgg(drawing)
    figure, below = drawing.subfigures(2, 1, height_ratios=(size[1], 2.6), squeeze=False)[:, 0]
    all_axes = figure.subplots(down, across, squeeze=False)
    for axes in all_axes.flat[len(grids) :]:
        axes.set_visible(False)
    for grid, axes in zip(grids, all_axes.flat, strict=False):
        values = np.full((len(where), len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            if (accuracy := grid.accuracy(length)) is not None:
                values[:, column] = accuracy
                for row, value in enumerate(accuracy) if len(lengths) <= CELL_LABELS else ():
                    ink = "white" if value < 0.6 else INK
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7)
            else:
                reason = "cannot" if length in grid.run.refused else "not measured"
                middle = (len(where) - 1) / 2
                axes.text(column, middle, reason, ha="center", va="center", color=QUIET, fontsize=8, rotation=90)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        inside = sum(length <= grid.run.train_length for length in lengths)
        axes.axvline(inside - 0.5, color="#D55E00", linewidth=2.5, clip_on=False)
        axes.set_title(f"{grid.run.name} (trained at {grid.run.train_length:,}, orange)", fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(where)), [f"{depth:.0%}" for depth in where], fontsize=8)
        axes.tick_params(length=0, colors=QUIET)
        axes.spines[:].set_visible(False)
    figure.supxlabel("Length of prompt and answer (tokens)", fontsize=9)
    figure.supylabel("Depth of the key in the filler", fontsize=9)
    figure.colorbar(image, ax=all_axes, label="Share of right answers", shrink=0.8)
    _draw_shares(below.subplots(), grids)
    with replace_file(path) as temporary:
        drawing.savefig(temporary, format="png", facecolor="white")


def _draw_shares(axes: Axes, grids: Sequence[Grid]) -> None:
    """The share of right answers over all depths by length, a line per run, with 95 % intervals."""
    lengths = grids[0].run.lengths
    for i, grid in enumerate(grids):
        measured = [length for length in lengths if length in grid.correct]
        x = np.array([lengths.index(length) for length in measured]) + 0.3 * ((i + 0.5) / len(grids) - 0.5)
        shares = np.array([grid.correct[length].mean() / grid.settings.keys for length in measured])
        ends = np.array([grid.interval(length) for length in measured]).T
        axes.errorbar(
            x,
            shares,
            np.abs(ends - shares),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.4,
            markersize=4,
            capsize=3,
            label=grid.run.name,
        )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("Length of prompt and answer (tokens)", fontsize=9)
    axes.set_ylabel("Share over all depths\n(bars: 95 % interval)", fontsize=9)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def rows(grids: Sequence[Grid]) -> list[tuple[str, ...]]:
    """One row of cells per run, under run, encoding, trained at, and the lengths."""

    def cell(grid: Grid, length: int) -> str:
        accuracy = grid.accuracy(length)
        if accuracy is None:
            return "cannot" if length in grid.run.refused else "-"
        low, high = grid.interval(length)
        return f"{100 * accuracy.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}] ({100 * accuracy.min():.0f})"

    return [
        (grid.run.name, grid.run.encoding, f"{grid.run.train_length:,}", *(cell(grid, n) for n in grid.run.lengths))
        for grid in grids
    ]


def notes(grids: Sequence[Grid]) -> list[str]:
    """What a reader of the table must know: its definition, and which lengths a run could not take."""
    settings = grids[0].settings
    refusals = [
        f"{grid.run.name} cannot read {', '.join(f'{n:,}' for n in grid.run.refused)} tokens: its {grid.run.encoding} "
        f"encoding has {grid.run.max_length:,} positions."
        for grid in grids
        if grid.run.refused
    ]
    definition = (
        f"Right answers in percent, greedy decoding, all five digits: the share over {settings.depths} depths of "
        f"{settings.keys} keys each, [its 95 % interval by Wilson's formula] and (the share at the worst depth). A "
        "length is that of prompt and answer together. All runs are asked for the same keys."
    )
    return [*refusals, definition]


def _header(grids: Sequence[Grid]) -> list[str]:
    return ["run", "encoding", "trained at", *(f"{length:,}" for length in grids[0].run.lengths)]


def _section(out: Path, grids: Sequence[Grid], command: str) -> str:
    asked = "A number of five digits is hidden in repeated filler text, and asked for at the end (Wang et al. 2024)."
    return f"""<h2>Passkeys found</h2>
{report.paragraph(asked)}
{report.table_of(_header(grids), rows(grids))}
{"".join(report.paragraph(note, quiet=True) for note in notes(grids))}
{report.figure(out / "passkey.png", "Share of right answers of every run, by depth and length")}
{report.download(out / "passkey.csv", "one row per run, length and depth, with 95 % intervals.")}
{report.command_line(command)}
"""
