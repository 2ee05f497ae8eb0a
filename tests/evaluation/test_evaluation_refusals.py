"""What every evaluation refuses: in one line, with exit status 2, and keeping what was computed before."""

import csv
import gc
import itertools
import json
import os
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.cli import parse_eval
from nope_jax.data import load_corpus
from nope_jax.encodings import HeadScale, NoPE
from nope_jax.evaluation.common.runs import find_runs
from nope_jax.models import abstract_decoder
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

# One good call of each evaluation, whatever the run.
EVALUATIONS = {
    "curves": "--workdirs {run} --lengths 16",
    "passkey": "passkey --workdirs {run} --lengths 400",
    "ruler": "ruler --workdirs {run} --lengths 1000 --ruler.tasks fwe",
    "longppl": "longppl --workdirs {run} --lengths 16 --longppl.short 8 --longppl.step 4",
    "similarity": "similarity --workdirs {run} {other}",
    "probe": "probe --workdirs {run} --lengths 16",
    "tune": "tune --workdirs {run} --method uniform --lengths 32",
}


def truncate(workdir: Path, step: int) -> None:
    """Leaves half of the largest file of a checkpoint, as a full disk or a crash may."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small runs, most of them with something wrong."""
    folder = tmp_path_factory.mktemp("refusals")
    write_documents(folder)
    write_run(folder, "nope")
    write_run(folder, "scaled", encoding=HeadScale(NoPE()))
    copy_run(folder / "nope", folder / "other")
    copy_run(folder / "nope", folder / "learned", {"model.encoding": "learned"})
    copy_run(folder / "nope", folder / "larger", {"model.vocab_size": 300})
    copy_run(folder / "scaled", folder / "more_heads", {"model.num_heads": 4, "model.head_dim": 8})
    copy_run(folder / "scaled", folder / "more_layers", {"model.num_layers": 3})
    copy_run(folder / "scaled", folder / "without", {"model.encoding": "nope"})
    copy_run(folder / "nope", folder / "empty")
    shutil.rmtree(folder / "empty" / "checkpoints" / "0")
    copy_run(folder / "nope", folder / "half")
    truncate(folder / "half", 0)
    return folder


def refusal(monkeypatch, capsys, words: str, out: Path) -> str:
    """The one line that a refused command leaves."""
    capsys.readouterr()
    assert call_eval(monkeypatch, f"{words} --out {out}") == 2
    printed = capsys.readouterr()
    # A bar may have been drawn, which a later line follows.
    line = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1 and printed.err.endswith(f"{line[0]}\n") and "Traceback" not in printed.err
    return line[0].removeprefix("error: ")


# Of any evaluation: what the message says, and whether it can be found before the run is loaded.
RUNS = {
    "nowhere": ("nowhere is not the workdir of a run: it has no config.json", True),
    "empty": ("empty: no checkpoint yet", True),
    "half": ("half/checkpoints: no checkpoint that can be read (step 0: ", False),
    "more_heads": (
        "more_heads: config.json does not fit the checkpoint of step 0: blocks.0.attention.position.head_scale is of "
        "shape [2, 4] by config.json, of shape [2, 2] in the checkpoint",
        False,
    ),
    "more_layers": ("head_scale is of shape [3, 2] by config.json, of shape [2, 2] in the checkpoint", False),
    "without": ("head_scale is missing by config.json, of shape [2, 2] in the checkpoint", False),
}


# The reads that orbax abandons complain when they are collected, whenever that is.
late_complaints = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@late_complaints
@pytest.mark.parametrize(
    ("run", "evaluation"),
    # Every evaluation once before and once after it has loaded a run, and every run once; the rest is one function.
    [
        (run, evaluation)
        if run in ("nowhere", "more_heads") or evaluation == next(iter(EVALUATIONS))
        else pytest.param(run, evaluation, marks=pytest.mark.slow)
        for run, evaluation in itertools.product(RUNS, EVALUATIONS)
    ],
)
def test_a_run_that_cannot_be_read(folder, tmp_path, monkeypatch, capsys, few_objects, evaluation, run):
    message, at_once = RUNS[run]
    words = EVALUATIONS[evaluation].format(run=folder / run, other=folder / "nope")
    assert message in refusal(monkeypatch, capsys, words, tmp_path / "out")
    written = list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else []
    assert [path.name for path in written if path.is_file()] == []
    assert not (at_once and (tmp_path / "out").exists())
    if run == "half":
        gc.collect()


WORDS = {
    "curves of a length that no document has": (
        "--workdirs {0}/nope --lengths 16 9999",
        "--lengths: no validation document reaches length 9999, which takes 10000 tokens; documents that reach "
        "16: {validation}, 9999: 0; the longest has ",
    ),
    "tune at a length that no document has": (
        "tune --workdirs {0}/nope --method uniform --lengths 16 9999",
        "--lengths: no training document reaches length 9999, which takes 10000 tokens; documents that reach "
        "16: {train}, 9999: 0; the longest has ",
    ),
    "probe at a length that no document has": (
        "probe --workdirs {0}/nope --lengths 9999",
        "--lengths: a probe needs two validation documents that reach length 9999, which takes 10000 tokens; documents "
        "that reach 16: {validation}, 9999: 0; the longest has ",
    ),
    "similarity at a length that no document has": (
        "similarity --workdirs {0}/nope {0}/other --similarity.length 9999",
        "--similarity.length: no validation document reaches length 9999, which takes 10000 tokens; documents that "
        "reach 9999: 0; the longest has ",
    ),
    "curves past all positions": (
        "--workdirs {0}/nope {0}/learned --lengths 17 32",
        "--lengths: learned reads none of them, its learned encoding has 16 positions",
    ),
    "passkey past all positions": (
        "passkey --workdirs {0}/learned --lengths 400",
        "--lengths: learned reads none of them, its learned encoding has 16 positions",
    ),
    "ruler past all positions": (
        "ruler --workdirs {0}/learned --lengths 4096",
        "--lengths: learned reads none of them, its learned encoding has 16 positions",
    ),
    "ruler at a length that is too short": (
        "ruler --workdirs {0}/nope --lengths 1000 4000 --ruler.tasks vt",
        "--lengths of nope (bytes): length 1000 is too short for RULER's vt, whose smallest text and its answer take ",
    ),
    "a task of RULER twice": (
        "ruler --workdirs {0}/nope --lengths 4000 --ruler.tasks vt fwe vt",
        "--ruler.tasks names vt twice",
    ),
    "ruler in a tokenizer without its words": (
        "ruler --workdirs {0}/nope --lengths 4000 --data.tokenizer task:copy --ruler.tasks fwe",
        "data.tokenizer task:copy has no word ",
    ),
    "probe past all positions": (
        "probe --workdirs {0}/learned --lengths 17",
        "--lengths: learned reads none of them, its learned encoding has 16 positions",
    ),
    "tune past all positions": (
        "tune --workdirs {0}/learned --method uniform --lengths 16 17",
        "learned cannot read 17 tokens, its learned encoding has 16 positions",
    ),
    "similarity past all positions": (
        "similarity --workdirs {0}/nope {0}/learned --similarity.length 17",
        "--similarity.length: learned cannot read 17 tokens, its learned encoding has 16 positions",
    ),
    "similarity of two vocabularies": (
        "similarity --workdirs {0}/nope {0}/larger",
        "model.vocab_size differs between the runs (nope: 256, larger: 300): only runs that read the same tokens can "
        "be compared",
    ),
    "a scaling of RoPE without RoPE": (
        "tune --workdirs {0}/nope --method yarn --lengths 32",
        "--method yarn scales RoPE, but no layer of the run has it: its encoding is nope",
    ),
    "dynamic scaling without RoPE": (
        "tune --workdirs {0}/nope --method dynamic --lengths 32",
        "--method dynamic scales RoPE, but no layer of the run has it: its encoding is nope",
    ),
    "two runs to tune": (
        "tune --workdirs {0}/nope {0}/other --method uniform --lengths 32",
        "--workdirs: tune takes one run, not 2",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_what_cannot_be_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, capsys, case):
    words, message = WORDS[case]
    data = configs.load(folder / "nope").data
    reaching = {split: int((load_corpus(data, split).lengths > 16).sum()) for split in ("train", "validation")}
    said = refusal(monkeypatch, capsys, words.format(folder), tmp_path / "out")
    assert message.format(**reaching) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2), (2, 2, 2, 2), (1, 3, 3), (4, 2, 3)])
def test_factors_of_a_shape_that_the_decoder_does_not_have(shape):
    config = ModelConfig(num_layers=2, num_heads=2, model_dim=16, mlp_dim=16)
    model = abstract_decoder(config)
    with pytest.raises(ValueError, match="^logit_scale .*" + ("rows, not 3" if shape == (3, 2) else r"not \[")):
        nnx.eval_shape(lambda model: model(jnp.zeros((1, 3), int), logit_scale=np.ones(shape)), model)


@late_complaints
@pytest.mark.slow
def test_what_was_measured_is_kept_when_a_later_run_cannot_be_read(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = f"--workdirs {folder}/nope {folder}/half --lengths 16"
    assert "half/checkpoints: no checkpoint that can be read" in refusal(monkeypatch, capsys, words, out)
    with (out / "curves.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"nope"}
    assert "nope" in (out / "report.html").read_text()

    # A run that has an older checkpoint is measured by that, with a warning that names both.
    copy_run(folder / "nope", folder / "two")
    with Checkpointer(folder / "two") as checkpointer:
        checkpointer.save(5, {"params": nnx.state(load_model(folder / "nope")[1])})
    truncate(folder / "two", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert call_eval(monkeypatch, f"--workdirs {folder}/two --lengths 16 --out {out}") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "cannot read the checkpoint of step 5" in said[0]
    assert said[0].endswith("going back to that of step 0")
    with (out / "curves.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"two"}
    assert (folder / "two" / "checkpoints" / "5").exists()  # an evaluation changes nothing of a run
    gc.collect()


def test_a_tokenizer_that_is_not_the_one_of_the_run_is_refused(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    copy_run(folder / "nope", run)
    (run / "data.json").write_text(json.dumps({"tokenizer": "of another file"}))
    said = refusal(monkeypatch, capsys, f"--workdirs {run} --lengths 16", tmp_path / "out")
    assert "data.tokenizer 'bytes' is not the tokenizer that" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "other", "kept"),
    [
        ({"data.source": "jsonl:a", "data.text_field": "body"}, "python_stdlib", {}),
        ({"data.source": "jsonl:a", "data.text_field": "body"}, "parquet:b", {"text_field": "body"}),
        ({"data.source": "text:a", "data.document_separator": "--"}, "jsonl:b", {}),
        ({"data.source": "task:copy", "data.lengths": (2, 3), "data.scratchpad": "none"}, "text:b", {}),
    ],
)
def test_another_source_is_read_without_the_settings_that_it_does_not_have(folder, tmp_path, settings, other, kept):
    copy_run(folder / "nope", tmp_path / "run", settings)
    words = ["--workdirs", f"{tmp_path}/run", "--lengths", "16", "--out", f"{tmp_path}/out", "--data.source", other]
    [run] = find_runs(parse_eval(words))
    own = configs.DataConfig(source=other, **kept)
    for name in ("source", "text_field", "document_separator", "lengths", "scratchpad"):
        assert getattr(run.config.data, name) == getattr(own, name)
    with pytest.raises(ValueError, match=r"data.lengths \(1, 2\) is for sources task:, not for data.source"):
        find_runs(parse_eval([*words, "--data.lengths", "1", "2"]))
