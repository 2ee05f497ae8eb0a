"""generate.py: whole characters as they come, stop texts, pipes, and what is refused."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import generate, text_generation
from nope_jax.cli import parse_generate
from nope_jax.config import MeshConfig
from nope_jax.data import load_tokenizer
from nope_jax.data.tokenizers import ByteTokenizer
from nope_jax.sharding import make_mesh
from nope_jax.text_generation import GenerateOptions, characters, load, until_stop, write_text
from tests.support.tiny_runs import write_run

ROOT = Path(__file__).parents[1]
TEXT = "naïve — 語 🙂 and  two spaces\n\tdef f(x): return x"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "nope")
    return folder / "nope"


@pytest.mark.parametrize("tokenizer", ["bytes", str(ROOT / "configs/tiny_tokenizer.json")])
@pytest.mark.parametrize("split", [0, 1, 12, 25])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, split):
    tokenizer = load_tokenizer(tokenizer)
    prompt, new = tokenizer.encode(TEXT[:split]).tolist(), tokenizer.encode(TEXT[split:]).tolist()
    pieces = list(characters(tokenizer, prompt, iter([*new, tokenizer.separator, *new])))
    assert "".join(pieces) == TEXT[split:]
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 8


def test_bytes_that_are_no_character_come_out_all_the_same():
    pieces = list(characters(ByteTokenizer(), [], iter([65, 0xFF, 66, 0xE8, 0xAA])))
    assert "".join(pieces).startswith("A\ufffdB\ufffd")


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [((), "one two three"), (("two",), "one "), (("three", "tw"), "one "), (("no",), "one two three"), (("e",), "on")],
)
def test_output_ends_before_a_stop_text(stop, wanted):
    assert "".join(until_stop(iter("one two three"), stop)) == wanted
    assert "".join(until_stop(iter(["one t", "wo three"]), stop)) == wanted
    if wanted == "one two three" and not stop:
        assert list(until_stop(iter("ab"), stop)) == ["a", "b", ""]  # nothing is held back


def test_it_prints_what_generate_continues_with_and_flushes_each_piece(workdir):
    flushed = []

    class Out(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    out = Out()
    write_text(GenerateOptions(workdir, "abc", max_new_tokens=9), out)
    model, tokenizer, _ = load(workdir)
    prompt = np.array([tokenizer.encode("abc")], np.int32)
    new = np.asarray(generate(model, prompt, 9, stop_tokens=[0]))[0, 3:]
    assert out.getvalue() == tokenizer.decode(new[new != 0]) + "\n"
    assert flushed == sorted(flushed, key=len) and len(set(flushed)) > 2


def test_its_parameters_lie_on_the_mesh_asked_for(workdir, monkeypatch):
    mesh, found = make_mesh(MeshConfig(fsdp=-1)), []

    def meshes(loaded, *_):
        found.extend([jax.sharding.get_mesh(), *(x.sharding.mesh for x in jax.tree.leaves(nnx.state(loaded.model)))])
        return ["its text"]

    monkeypatch.setattr(text_generation, "continuation", meshes)
    write_text(GenerateOptions(workdir, "abc", mesh=MeshConfig(fsdp=-1)), out := io.StringIO())
    assert out.getvalue() == "its text\n" and len(found) > 5 and all(one == mesh for one in found)
    with pytest.raises(ValueError, match=r"mesh data -1 x fsdp 1 x tensor 3 .* does not fit 1 device"):
        write_text(GenerateOptions(workdir, "abc", mesh=MeshConfig(tensor=3)), io.StringIO())


@pytest.mark.slow
def test_a_model_spread_over_eight_devices_writes_what_one_device_writes(workdir):
    def run(*options, flags=""):
        words = [sys.executable, "generate.py", "--workdir", str(workdir), "--prompt", "abc", "--max_new_tokens", "20"]
        every = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
        return subprocess.run([*words, *options], cwd=ROOT, env=every, capture_output=True, text=True, check=False)

    eight = "--xla_force_host_platform_device_count=8"
    written = run().stdout
    assert len(written) > 2
    for mesh in ["--mesh.fsdp", "8"], ["--mesh.fsdp", "4", "--mesh.tensor", "2"], []:
        done = run(*mesh, flags=eight)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", written), mesh
    refused = run("--mesh.tensor", "8", flags=eight)
    assert (refused.returncode, refused.stderr) == (2, "error: mesh.tensor 8 must divide model.num_heads 2\n")


@pytest.mark.slow
def test_in_a_pipe(workdir):
    command = [sys.executable, "generate.py", "--workdir", str(workdir), "--prompt", "-", "--temperature", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*options, **keywords):
        every = {"cwd": ROOT, "env": environment, "capture_output": True, "input": "Küche 語".encode()}
        return subprocess.run([*command, *options], **(every | keywords), check=False)

    first = run("--max_new_tokens", "12", "--seed", "1")
    assert (first.returncode, first.stderr) == (0, b"")
    assert 1 < len(first.stdout.decode()) <= 13 and first.stdout.endswith(b"\n")
    ascii_only = run("--max_new_tokens", "12", "--seed", "1", env=environment | {"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0
    assert ascii_only.stdout.decode() == first.stdout.decode().encode("ascii", "replace").decode()
    bad = run("--top_k", "0")
    assert bad.returncode == 2
    assert bad.stderr == b"error: top_k must be between 1 and the vocabulary 256, not 0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt a", "--workdir is missing"),
        ("--workdir w", "--prompt is missing"),
        ("--workdir w --prompt a --max_new_tokens 0", "--max_new_tokens must be at least 1, not 0"),
        ("--workdir w --prompt a --max_new_tokens many", "--max_new_tokens must be an integer or None, not 'many'"),
        ("--workdir w --prompt a b", "--prompt must be a string, not 'a b'"),
        ("--workdir w --prompt a --temprature 1", "did you mean --temperature?"),
        (
            "--workdir w --prompt a --mesh.tensor 0",
            "mesh.tensor must be at least 1, or -1 for what the other axes leave",
        ),
        ("--workdir w --prompt a --mesh.rules zero1", "--mesh.rules is for training"),
    ],
)
def test_bad_arguments_are_one_line(words, message):
    with pytest.raises(ValueError) as error:
        parse_generate(words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_may_be_any_text():
    options = parse_generate(["--workdir", "w", "--prompt=--stop here", "--stop", "\n\n", "gs://x"])
    assert options == {"workdir": Path("w"), "prompt": "--stop here", "stop": ("\n\n", "gs://x")}
    assert parse_generate(["--workdir", "w", "--prompt", "see gs://bucket"])["prompt"] == "see gs://bucket"


def test_the_mesh_is_that_of_training():
    options = parse_generate(["--workdir", "w", "--prompt", "a", "--mesh.fsdp", "2", "--mesh.tensor", "4"])
    assert options["mesh"] == MeshConfig(fsdp=2, tensor=4)


def test_a_prompt_without_a_token_is_refused(workdir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(ValueError, match="--prompt must have at least one token"):
        write_text(GenerateOptions(workdir, "-"), io.StringIO())
