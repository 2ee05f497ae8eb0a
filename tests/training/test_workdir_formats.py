"""Workdirs of earlier versions (tests/goldens/workdirs) are evaluated and go on; those of later ones are refused."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.config.format import FORMAT, VERSION
from nope_jax.retention import saved_steps
from nope_jax.training import train
from tests.support.tiny_runs import call_eval

GOLDENS = Path(__file__).parents[1] / "goldens" / "workdirs"
FORMATS = sorted(path.name for path in GOLDENS.iterdir() if (path / "config.json").exists())


@pytest.fixture(autouse=True)
def beside_the_documents(monkeypatch):
    monkeypatch.chdir(GOLDENS)


@pytest.fixture(params=["format-1", *(pytest.param(n, marks=pytest.mark.slow) for n in FORMATS if n != "format-1")])
def workdir(request, tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / request.param, tmp_path / request.param))


def stamp_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata")


def test_it_goes_on_as_its_own_version_would_have_and_is_of_todays_format_then(workdir):
    config = configs.override(configs.load(workdir), {"train.steps": 5})
    train(config, workdir)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {str(line["step"]): line["loss"] for line in logged if "loss" in line and line["step"] > 3}
    assert losses == pytest.approx(json.loads((workdir / "expected.json").read_text()), rel=1e-5)
    assert json.loads((workdir / "config.json").read_text())["format"] == FORMAT
    assert not stamp_of(workdir / "checkpoints" / "3")
    assert stamp_of(workdir / "checkpoints" / "5") == {"format": FORMAT, "nope_jax": VERSION}
    assert [load_model(workdir, step=step)[2] for step in ("best", "newest", 3)] == [5, 5, 3]


@pytest.mark.slow
def test_it_is_evaluated(workdir, tmp_path, monkeypatch):
    assert call_eval(monkeypatch, f"--workdirs {workdir} --lengths 8 --out {tmp_path}/out --step best") == 0
    lines = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    nll = [float(line.split(",")[lines[0].split(",").index("nll")]) for line in lines[1:]]
    assert 5 < sum(nll) / len(nll) < 5.7  # the validation loss of step 3 is 5.35


def test_what_a_later_version_wrote_is_refused_by_its_name_and_left_alone(tmp_path, few_objects):
    workdir = Path(shutil.copytree(GOLDENS / "format-1", tmp_path / "run"))
    config, metadata = configs.load(workdir), workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    message = rf"written by nope_jax 9.9 in format {FORMAT + 1}; this is nope_jax {VERSION}, which reads formats 1 to"
    later = {"format": FORMAT + 1, "nope_jax": "9.9"}

    written = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(written | {"custom_metadata": later}))
    for read in lambda: train(configs.override(config, {"train.steps": 5}), workdir), lambda: load_model(workdir):
        with pytest.raises(ValueError, match=f"checkpoints/3 was {message}"):
            read()
    assert saved_steps(workdir) == [3]

    groups = json.loads((workdir / "config.json").read_text())
    for stamp, complaint in (later, message), ({"format": "x"}, "not 'x'"):
        (workdir / "config.json").write_text(json.dumps(groups | stamp))
        with pytest.raises(ValueError, match=f"config.json.*{complaint}"):
            configs.load(workdir)


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION
