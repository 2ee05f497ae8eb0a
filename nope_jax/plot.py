"""Draws the training and validation losses of runs, finished or not.

    python -m nope_jax.plot runs/* --out losses.png

Exit status: 0 drawn, 1 unexpected error, 2 bad input.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from nope_jax.cli import parse_plot, run

POINTS = 100
"""Number of points to which the line of a training loss is averaged; single steps are drawn behind it, faintly."""


def main() -> None:
    workdirs, out, x = parse_plot(sys.argv[1:])
    draw_losses(workdirs, out, x)
    print(out)


def draw_losses(workdirs: Sequence[Path], out: Path, x: Literal["step", "tokens"] = "step") -> None:
    """Draw the losses of runs, in nats per token, as one PNG with logarithmic axes.

    Args:
        workdirs: Workdirs of runs. Folders without metrics.jsonl are skipped, with a line on stderr.
        out: The file to write.
        x: What the horizontal axis shows: steps, or the tokens of the rows read so far.

    Raises:
        ValueError: none of the folders is that of a run with a logged loss, or the file is not a .png.
    """
    # Import late, because it takes seconds and bad arguments should fail at once.
    from nope_jax.evaluation.common.plots import finish, line_style, new_figure, save
    from nope_jax.retention import read_log

    if out.suffix != ".png":
        raise ValueError(f"--out must end in .png, not {str(out)!r}")
    runs = {workdir: read_log(workdir) for workdir in workdirs}
    unlogged = [str(workdir) for workdir, lines in runs.items() if not any("loss" in line for line in lines)]
    if len(unlogged) == len(runs):
        raise ValueError(f"--workdirs must be workdirs of runs: no loss is logged in {', '.join(unlogged)}")
    if unlogged:
        print(f"skipped, because no loss is logged there: {', '.join(unlogged)}", file=sys.stderr)
    runs = {workdir: lines for workdir, lines in runs.items() if str(workdir) not in unlogged}
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    for i, (workdir, lines) in enumerate(runs.items()):
        scale = 1
        if x == "tokens":
            data = json.loads((workdir / "config.json").read_text())["data"]
            scale = data["batch_size"] * data["context_length"]
        training, validation = (
            np.array([(scale * line["step"], line[name]) for line in lines if name in line]).reshape(-1, 2)
            for name in ("loss", "validation_loss")
        )
        mean = [part.mean(axis=0) for part in np.array_split(training, min(POINTS, len(training)))]
        style = line_style(i)
        marker = style.pop("marker")
        axes.plot(*training.T, color=style["color"], alpha=0.25, linewidth=0.8)
        axes.plot(*np.transpose(mean), label=str(workdir), **style)
        axes.plot(*validation.T, color=style["color"], linestyle="none", marker=marker)
    axes.set_xscale("log")
    axes.set_yscale("log")
    finish(axes, "Tokens" if x == "tokens" else "Step", "Loss (nats per token); markers: validation")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, figure)


if __name__ == "__main__":
    sys.exit(run(main))
