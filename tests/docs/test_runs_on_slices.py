"""Every run that a command of the pages, configs and launch files puts on a slice, or compiles for one, fits it."""

import ast
import functools
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from nope_jax.cli import parse_train
from nope_jax.compile.estimate import Estimate, estimate_run
from nope_jax.compile.gpu import find_gpus
from nope_jax.compile.tpu import SLICES
from nope_jax.config import Config

ROOT = Path(__file__).parents[2]
SLICES_OF_HOSTS = {f"v5litepod-{math.prod(map(int, shape.split('x')))}": f"v5e:{shape}" for shape in SLICES["v5e"]}


def commands_of(path: Path) -> list[list[str]]:
    """The commands that a file shows: the blocks of a page, the comment of a script, the docstring of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    elif path.suffix == ".py":
        text = "\n".join(re.findall(r"^    (.*)", ast.get_docstring(ast.parse(text)) or "", re.M))
    elif path.suffix == ".yaml":
        job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        of_node, container = job["nodeSelector"], job["containers"][0]
        kind, topology = (of_node[f"cloud.google.com/gke-tpu-{name}"] for name in ("accelerator", "topology"))
        generation = {"tpu-v5-lite-podslice": "v5e", "tpu-v6e-slice": "v6e", "tpu-v5p-slice": "v5p"}[kind]
        return [[*container["command"], *container["args"], f"--compile_for={generation}:{topology}"]]
    else:
        text = "\n".join(re.findall(r"^#   +(.*)", text, re.M))
    return [
        shlex.split(line, comments=True)
        for line in text.replace("\\\n", " ").splitlines()
        if "train.py" in line or ".sh" in line
    ]


def runs_on_slices() -> dict[tuple[str, str], Config]:
    """By file and machine: every run that a command of the files puts on a slice of TPUs, or compiles for a machine."""
    found = {}
    shown = ["README.md", "train.py", "docs/*.md", "configs/**/*.py", "launch/*.sh", "launch/*.yaml"]
    for path in sorted(path for pattern in shown for path in ROOT.glob(pattern)):
        for words in commands_of(path):
            named = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
            if "command" in named:  # of xpk
                words = shlex.split(named["command"])
            programs = [i for i, word in enumerate(words) if re.search(r"train\.py$|tpu\.sh$", word)]
            if not programs:
                continue
            kind = named.get("TYPE", named.get("tpu-type", ""))
            if not kind and not any(word.startswith("--compile_for") for word in words):
                continue
            arguments = parse_train(words[programs[-1] + 1 :])
            slice_name = arguments.compile_for or SLICES_OF_HOSTS[kind]
            found[str(path.relative_to(ROOT)), slice_name] = arguments.config
    return found


@pytest.fixture
def runs(monkeypatch) -> dict[tuple[str, str], Config]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("nope_jax.paths.importlib.util.find_spec", lambda name: "installed")
    return runs_on_slices()


SHOWN = [
    ("README.md", "v5e:16x16"),
    ("configs/gpt2.py", "v5e:2x2"),
    ("configs/nope_1b.py", "v5e:4x4"),
    ("configs/smollm3_3b.py", "v6e:8x8"),
    ("configs/t5_base_decoder.py", "v5e:1x1"),
    ("configs/t5_base_tasks.py", "v5e:1x1"),
    ("docs/pods.md", "2xv5e:16x16"),
    ("docs/pods.md", "h100:8"),
    ("docs/pods.md", "v5e:16x16"),
    ("docs/pods.md", "v5e:2x4"),
    ("docs/pods.md", "v5e:4x4"),
    ("launch/jobset.yaml", "v5e:4x4"),
    ("launch/tpu.sh", "v5e:4x4"),
    ("train.py", "h100:8"),
    ("train.py", "v5e:16x16"),
]


def test_the_runs_on_slices_that_the_files_show_are_known(runs):
    assert sorted(runs) == SHOWN


@pytest.mark.parametrize(
    ("file", "slice_name"),
    [pytest.param(*shown, marks=pytest.mark.cuda if find_gpus(shown[1]) else pytest.mark.tpu) for shown in SHOWN],
)
def test_every_run_that_the_files_put_on_a_slice_fits_it(runs, file, slice_name):
    estimate = compiled_once(runs[file, slice_name], slice_name)
    said = (ROOT / file).read_text(encoding="utf-8")
    most = max(estimate.training.total, estimate.validation.total) / 2**30
    if file.startswith("configs/"):  # which say how much; compilers differ a little
        assert float(re.search(r"(\d+\.\d) of its \d+ GiB", said)[1]) == pytest.approx(most, rel=0.1)


@functools.cache
def compiled_once(config: Config, slice_name: str) -> Estimate:
    return estimate_run(config, slice_name)
