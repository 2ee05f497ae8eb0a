"""`python -m nope_jax.plot`: what it draws, skips and refuses."""

import json

import numpy as np
import pytest
from matplotlib import image

from nope_jax import plot
from nope_jax.cli import parse_plot
from nope_jax.evaluation.common import plots


@pytest.fixture
def runs(tmp_path):
    """Two runs, of 8 and of 16 tokens per step, and a folder that is none."""
    folders = []
    for name, rows in (("a", 2), ("b", 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"data": {"batch_size": rows, "context_length": 4}}))
        lines = [{"step": step, "loss": 4 - step / 1000} for step in range(1, 401)]
        lines += [{"step": 200, "validation_loss": 3.9}, {"step": 400, "validation_loss": 3.7}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40')
        folders.append(folder)
    (tmp_path / "report").mkdir()
    return [*folders, tmp_path / "report"]


@pytest.mark.parametrize(("x", "ends"), [("step", (400, 400)), ("tokens", (3200, 6400))])
def test_all_logged_losses_are_drawn(runs, tmp_path, monkeypatch, capsys, x, ends):
    figures = []
    monkeypatch.setattr(plots, "save", lambda path, figure: figures.append(figure))
    plot.draw_losses(runs, tmp_path / "losses.png", x)
    (axes,) = figures[0].axes
    for i, end in enumerate(ends):
        every, mean, validation = (np.array(line.get_data()) for line in axes.lines[3 * i : 3 * i + 3])
        assert every.shape == (2, 400) and every[0, -1] == end
        np.testing.assert_allclose(mean, every.reshape(2, 100, 4).mean(axis=-1))
        np.testing.assert_allclose(validation, [[end / 2, end], [3.9, 3.7]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(run) for run in runs[:2]]
    assert capsys.readouterr().err == f"skipped, because no loss is logged there: {runs[2]}\n"


def test_the_command(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "losses.png"
    monkeypatch.setattr("sys.argv", ["plot", *map(str, runs[:2]), "--out", str(out)])
    plot.main()
    assert image.imread(out).std() > 0 and capsys.readouterr().out == f"{out}\n"


def test_bad_input(runs):
    with pytest.raises(ValueError, match="--workdirs must be workdirs of runs: no loss is logged in .*report"):
        plot.draw_losses(runs[2:], runs[2] / "losses.png")
    with pytest.raises(ValueError, match=r"--out must end in .png, not .*losses.pdf"):
        plot.draw_losses(runs, runs[2] / "losses.pdf")
    with pytest.raises(ValueError, match="--x must be"):
        parse_plot(["runs/a", "--x", "hours"])
