"""Evaluation over several devices and processes, in bfloat16, and of runs in a bucket."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from nope_jax.distributed import PEER_LOST
from nope_jax.evaluation import perplexity
from nope_jax.evaluation.common import placement
from nope_jax.evaluation.registry import EVALUATIONS
from nope_jax.sharding import make_mesh
from tests.support.eight_devices import results
from tests.support.hosts import ROOT, Started
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

SIZES = {"num_heads": 4, "model_dim": 32, "mlp_dim": 32, "vocab_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, two runs whose dimensions eight devices divide, and the config of an odd one."""
    folder = tmp_path_factory.mktemp("at_size")
    write_documents(folder)
    write_run(folder, "rope", encoding="rope", **SIZES)
    copy_run(folder / "rope", folder / "nope", {"model.encoding": "nope"})
    copy_run(folder / "rope", folder / "odd", {"model.model_dim": 20})
    row = {"input": "Who?", "context": "a is Bob.", "answers": ["Bob"], "length": 5}
    (folder / "hotpotqa.jsonl").write_text((json.dumps(row) + "\n") * 3)
    return folder


def commands(folder: Path, out: str, *meshes: str) -> dict[str, str]:
    """A command of each evaluation, by name."""
    both, one = f"--workdirs {folder}/nope {folder}/rope", f"--workdirs {folder}/rope"
    words = {
        "curves": f"{both} --lengths 16 32 --eval.documents 5",
        "tune": f"{one} --lengths 24 32 --method head --tune.documents 3 --tune.steps 3 --tune.start one",
        "passkey": f"{one} --lengths 264 --passkey.depths 2 --passkey.keys 3",
        "tasks": f"{both} --lengths 3 4 --tasks.task copy --tasks.examples 5 --tasks.batch_size 4",
        "ruler": f"{one} --lengths 928 --ruler.tasks niah_single_1 --ruler.examples 2 --ruler.batch_size 2",
        "longbench": f"{one} --lengths 100 --longbench.path {folder} --longbench.batch_size 2",
        "longppl": f"{both} --lengths 32 --longppl.short 8 --longppl.step 4 --longppl.gain 0.001 --longppl.loss 6",
        "similarity": f"{both} --similarity.documents 3",
        "probe": f"{one} --lengths 32 --probe.documents 6 --probe.ridge 1.0",
    }
    return {name: f"{name} {line} --out {folder}/{out}-{name}" for name, line in words.items()}


def numbers(out: Path) -> dict[str, np.ndarray]:
    """All numbers that an evaluation wrote, by file and column; words as they are."""
    found = {}
    for path in sorted(out.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        for column in rows[0]:
            cells = [row[column] for row in rows]
            try:
                found[f"{path.name} {column}"] = np.array([float(cell) if cell else np.nan for cell in cells])
            except ValueError:
                found[f"{path.name} {column}"] = np.array(cells)
    return found


def assert_same_numbers(out: Path, expected: Path) -> None:
    """To the rounding of float32: 1e-5 of a number, and 1e-6 where it is nearly 0."""
    ours, theirs = numbers(out), numbers(expected)
    assert ours.keys() == theirs.keys() and theirs
    for name, values in theirs.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
        elif "run" not in name.split():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "extra", "complaint"),
    [
        ("rope", "--mesh.fsdp 3", "mesh data -1 x fsdp 3 x tensor 1 x sequence 1 does not fit 8 device(s)"),
        ("rope", "--mesh.tensor 8", "mesh.tensor 8 must divide model.num_heads 4"),
        ("rope", "--mesh.sequence 8", "mesh.sequence 8 must divide --lengths 12"),
        ("odd", "--mesh.fsdp 8", "mesh.fsdp 8 must divide model.model_dim 20"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(folder, monkeypatch, capsys, name, extra, complaint):
    def of_eight(asked):
        return make_mesh(asked, [*jax.devices() * 8])

    monkeypatch.setattr(jax, "make_mesh", lambda shape, axes, **_: AbstractMesh(shape, axes))
    monkeypatch.setattr(placement, "make_mesh", of_eight)
    line = f"--workdirs {folder}/{name} --lengths 12 16 --out {folder}/refused {extra}"
    assert call_eval(monkeypatch, line) == 2
    assert (
        capsys.readouterr().err
        == f"error: {complaint}" + ": the product must be their number" * ("device" in complaint) + "\n"
    )
    assert not (folder / "refused").exists()


def test_bfloat16_is_asked_for_by_name_and_sums_are_not_in_it(tmp_path, monkeypatch):
    found = {}
    write_documents(tmp_path)
    write_run(tmp_path, "alibi", encoding="alibi", train_length=8)
    for dtype in ("float32", "bfloat16", None):
        line = f"--workdirs {tmp_path}/alibi --lengths 16 --eval.documents 2 --eval.dtype {dtype} --out {tmp_path}/out"
        assert call_eval(monkeypatch, line) == 0
        with np.load(tmp_path / "out" / "measured" / "alibi-16.npz") as arrays:  # replaced, being of another dtype
            found[dtype] = dict(arrays)
    for name in ("nll_sum", "entropy_sum", "heads"):
        np.testing.assert_array_equal(found["float32"][name], found[None][name])  # what this run computes in
        assert (found["float32"][name] != found["bfloat16"][name]).any()
        np.testing.assert_allclose(found["bfloat16"][name], found["float32"][name], rtol=0.01)
        # Were they bfloat16, numbers would have at most 8 bits.
        assert (np.asarray(jnp.bfloat16(found["bfloat16"][name])) != found["bfloat16"][name]).any()


# Eight devices


@pytest.mark.slow
def test_all_evaluations_find_on_eight_devices_what_they_find_on_one(folder, monkeypatch):
    lines = commands(folder, "eight")
    with monkeypatch.context() as patch:  # stopped on one device, after the first of two batches

        def stop(path, *rest, **more):
            store(path, *rest, **more)
            raise KeyboardInterrupt

        store = perplexity.store
        patch.setattr(perplexity, "store", stop)
        patch.setattr(sys.modules[perplexity.measure.__module__], "KEEP_EVERY", 0.0)
        assert call_eval(patch, lines["curves"]) == 130
    assert [path.name for path in (folder / "eight-curves" / "measured").iterdir()] == ["unfinished-nope-16.npz"]
    statuses, _ = results("evaluated", list(lines.values()))
    assert statuses == [0] * len(lines), dict(zip(lines, statuses, strict=True))
    with np.load(folder / "eight-curves" / "measured" / "nope-16.npz") as arrays:
        assert (arrays["tokens"].sum(), arrays["tokens_read"]) == (5 * 16, 16)
    for name, line in commands(folder, "one").items():
        assert call_eval(monkeypatch, line) == 0
        assert_same_numbers(folder / f"eight-{name}", folder / f"one-{name}")
    assert set(lines) == set(EVALUATIONS)


# Two processes

TOGETHER = """
import shlex, sys
from pathlib import Path

from nope_jax import cli, distributed
from nope_jax.cli import parse_eval

lines, _, address, _, processes, _, process = sys.argv[1:]

def run():
    with distributed.joined(distributed.ProcessSpec(address, int(processes), int(process)), None):
        from nope_jax.evaluation.common.evaluation import evaluate

        for line in Path(lines).read_text().splitlines():
            name, *words = shlex.split(line)
            evaluate(name, parse_eval(words, name))

distributed.leave(cli.run(run))
"""


@pytest.mark.slow
def test_all_evaluations_find_with_two_processes_what_they_find_with_one(folder, tmp_path, monkeypatch):
    lines = commands(folder, "two")
    (tmp_path / "lines").write_text("\n".join(lines.values()))
    first, second = Started(["-c", TOGETHER, str(tmp_path / "lines")], processes=2, devices=2).wait()
    assert (first.status, second.status) == (0, 0), (first, second)
    assert "see report.html there" in first.output
    assert all(line.startswith("[Gloo]") for line in second.output.splitlines()), second.output
    for name, line in commands(folder, "alone").items():
        assert call_eval(monkeypatch, line) == 0
        assert_same_numbers(folder / f"two-{name}", folder / f"alone-{name}")


@pytest.mark.slow
def test_sigterm_ends_a_process_and_with_it_the_others(folder):
    line = commands(folder, "ended")["tune"].replace("steps 3", "steps 100000")
    run = Started(["eval.py", *line.split()], processes=2, devices=1)
    first, second = run.processes
    assert any(line.startswith("updates") for line in first.stdout)
    second.terminate()
    ended = run.wait(120)
    assert [end.status for end in ended] == [PEER_LOST, -signal.SIGTERM], ended
    assert "died; start the same command again on all 2: it goes on from what it has stored" in ended[0].output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_processes_refuse_together(folder, tmp_path):
    line = commands(folder, "refused")["curves"].split()
    for words, complaint in {
        "--lengths 99999": "no validation document reaches length 99999",
        "--mesh.fsdp 4": "does not fit 2 device(s)",
    }.items():
        ended = Started(["eval.py", *line, *words.split()], processes=2, devices=1).wait()
        assert [end.status for end in ended] == [2, 2], ended
        for end in ended:
            assert complaint in end.output.splitlines()[-1] and "Traceback" not in end.output
    assert not (folder / "refused-curves").exists()

    here = {0: lambda: os.chdir(folder), 1: lambda: os.chdir(tmp_path)}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "other.txt").write_text("of this host alone " * 100)
    arguments = [str(ROOT / "eval.py"), *line, "--data.source", "text:text"]
    ended = Started(arguments, processes=2, devices=1, prepare=here).wait()
    says = "error: process 1 does not read the validation documents of data.source text:text that process 0 reads"
    assert [(end.status, end.output.splitlines()[-1]) for end in ended] == [(2, says)] * 2, ended
