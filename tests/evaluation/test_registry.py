"""One more evaluation is a module of 40 lines and an entry: command line, driver and report know the rest."""

import contextlib
import csv
import dataclasses
import os
import re
import sys

import pytest

from nope_jax import trained
from nope_jax.evaluation.common import console
from nope_jax.evaluation.registry import EVALUATIONS, Entry
from tests.support.tiny_runs import call_eval, write_run

OWN = '''"""How large the embeddings of each run are."""

import dataclasses

from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, find_runs


def plan(options):
    return Embeddings(find_runs(options), options.settings.power)


@dataclasses.dataclass
class Embeddings(Evaluation):
    runs: list[Run[float]]
    power: float

    def measure(self, out, bar):
        bar.total(len(self.runs))
        for run in self.runs:
            run.results[0] = float((abs(run.load().embedding[...]) ** self.power).mean())
            bar.advance()
            yield

    def numbers(self):
        return {"probes.csv": Csv("run mean", [(run.name, *run.results.values()) for run in self.runs])}

    def figures(self):
        figure = plots.new_figure(3, 2)
        figure.add_subplot().plot([run.longest for run in self.runs if run.results], "o")
        yield "probes.png", figure

    def sections(self):
        rows = [(run.name, f"{run.longest:.4f}") for run in self.runs if run.results]
        table, files = Table("Embeddings", ("run", "mean"), rows, names=1), {"probes.csv": "A row for each run."}
        return [Section("Embeddings", "Are large.", table, ["Powers."], figures={"probes.png": "Dots"}, files=files)]
'''


@dataclasses.dataclass(frozen=True)
class Settings:
    power: float = 1.0
    """Of the absolute values."""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two runs, and an evaluation of that module, whose name begins with that of another."""
    assert len(OWN.splitlines()) <= 40
    (tmp_path / "own_evaluation.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EVALUATIONS, "probes", Entry("Measures embeddings.", "own_evaluation", Settings(), None))
    (tmp_path / "text").mkdir()
    for name in "ab":
        write_run(tmp_path, name, seed=ord(name))
    yield f"probes --workdirs {tmp_path}/a {tmp_path}/b --out {tmp_path}/out"
    sys.modules.pop("own_evaluation", None)


def test_an_evaluation_of_40_lines_has_all_that_the_others_have(own, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call_eval(monkeypatch, "probes --help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "Measures embeddings." in said and "--probes.power" in said
    assert "absolute values" in said and "--lengths" not in said
    for words, message in {
        "--probes.powers 2": "unknown field --probes.powers: did you mean --probes.power?",
        "--probes.power 0": "--probes.power must be greater than 0, not 0.0",
        "--eval.seed 1": "--eval.seed changes nothing about probes, which goes by --probes.*, --data.*",
    }.items():
        assert call_eval(monkeypatch, f"{own} {words}") == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert "own_evaluation" not in sys.modules and not (tmp_path / "out").exists()

    assert call_eval(monkeypatch, f"{own} --probes.power 2") == 0
    printed = capsys.readouterr().out
    assert "Embeddings" in printed and "Powers." in printed and "see report.html there" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("probes.csv", "probes.png", "report.html", "sections")
    }
    with (tmp_path / "out" / "probes.csv").open() as file:
        (_, a), (_, b) = [tuple(row.values()) for row in csv.DictReader(file)]
    assert f"{float(a):.4f}" in printed and f"{float(b):.4f}" in printed and a != b
    page = (tmp_path / "out" / "report.html").read_text()
    assert [page.count(text) for text in ("<h2>Embeddings</h2>", "image/png", 'download="probes.csv"')] == [1, 1, 1]
    assert "eval.py probes --workdirs" in page and "Are large." in page


def test_what_it_has_measured_is_kept_when_it_is_stopped(own, tmp_path, monkeypatch):
    load = trained.load_model

    def stopped(workdir, mesh, **_):
        if workdir.name == "b":
            raise KeyboardInterrupt
        return load(workdir, mesh)

    monkeypatch.setattr(trained, "load_model", stopped)
    assert call_eval(monkeypatch, own) == 130
    assert (tmp_path / "out" / "probes.csv").read_text().splitlines()[1].startswith("a,")
    assert "<h2>Embeddings</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_without_a_terminal_progress_is_lines_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "SAY_EVERY", 0.0)
    with console.progress_bar() as bar:
        bar.total(100)
        bar.describe("nope at 128")
        for _ in range(3):
            bar.advance(20)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nope at 128: ")]
    assert [line.partition(",")[0] for line in said] == [f"nope at 128: {n} %" for n in (0, 20, 40, 60)]
    assert re.search(r", 0:00:\d\d left$", said[-1])


def test_without_a_terminal_each_step_is_said_when_it_begins(capsys):
    with console.progress_bar() as bar:
        bar.total(100)
        for step, detail in [("nope: loading", ""), ("nope at 128", ""), ("nope at 128", "9 tokens/s"), ("end", "1")]:
            bar.describe(step, detail)
            bar.advance(10)
        said = capsys.readouterr().err
    assert [line.partition(":")[0] for line in said.splitlines()] == ["nope", "nope at 128", "end, 1"]


@pytest.fixture
def without_reader():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), open(writer, "w", encoding="utf-8") as stream:  # what is left cannot be written
        yield stream


def test_tables_without_a_reader_are_a_broken_pipe(without_reader, monkeypatch):
    monkeypatch.setattr(sys, "stdout", without_reader)
    with pytest.raises(BrokenPipeError):  # which a command reports as 141, as for any other line
        console.print_sections([], "a remark")


def test_progress_without_a_reader_stops_nothing(without_reader, monkeypatch):
    monkeypatch.setattr(sys, "stderr", without_reader)
    with console.progress_bar() as bar:
        bar.describe("nope at 128")
        bar.advance()


def test_nothing_is_said_before_there_is_a_step_to_name(capsys):
    with console.progress_bar() as bar:
        bar.total(100)
        bar.advance(74)  # what an earlier process has measured
        bar.describe("rope at 128")
        said = capsys.readouterr().err
    assert said.startswith("rope at 128: 74 %")
