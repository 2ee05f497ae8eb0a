"""The command lines: what they take, what they refuse, and their exit status."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest

from nope_jax import cli
from nope_jax import config as configs
from nope_jax.cli import parse_eval, parse_generate, parse_train
from nope_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
)
from nope_jax.encodings import (
    apply_rope,
)
from tests.support.config_file import CONFIG_FILE

ROOT = Path(__file__).parents[1]


def run(command) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # run sets its own
        return cli.run(command)


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(lambda: print("x" * 10**6)) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("lambda: print('x' * 10**6)", 141, ""),
        ("lambda: open('/nowhere/else')", 2, "error: /nowhere/else: No such file or directory\n"),
    ],
)
def test_a_process_whose_reader_has_seen_enough_ends_in_peace(command, status, said):
    script = f"import sys; from nope_jax.cli import run; sys.exit(run({command}))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (said, status)


def test_a_file_that_is_not_there_is_named(capsys):
    assert run(lambda: Path("/nowhere/else").read_text()) == 2
    assert capsys.readouterr().err == "error: /nowhere/else: No such file or directory\n"


def test_any_other_broken_pipe_is_an_error(capsys):
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert run(command) == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_parse_train(config_file):
    config, workdir, *_ = parse_train(
        f"--config {config_file} --workdir runs/a --train.steps=7 --data.batch-size 8 --mesh.data -1 "
        "--model.num_kv_heads None --optimizer.learning_rate 1e-4 --model.remat dots "
        "--model.encoding rope rope rope nope".split()
    )
    assert str(workdir) == "runs/a"
    expected = Config(
        model=ModelConfig(encoding=("rope", "rope", "rope", "nope"), remat="dots"),
        data=DataConfig(context_length=64, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        train=TrainConfig(steps=7),
    )
    assert config == expected


def test_parse_train_keeps_what_is_not_given(config_file):
    arguments = ["--config", str(config_file), "--workdir", "x"]
    config = parse_train(arguments).config
    assert type(config.model.encoding).__name__ == "FromFile"
    assert config.model.train_length == 64
    assert parse_train([*arguments, "--model.encoding", "alibi"]).config.model.encoding == "alibi"


@pytest.mark.parametrize(("former", "policy"), [("True", "full"), ("False", "none")])
def test_remat_takes_its_former_values(former, policy, config_file):
    arguments = ["--config", str(config_file), "--workdir", "x", "--model.remat", former]
    assert parse_train(arguments).config.model.remat == policy


def test_train_length_follows_an_overridden_context_length(config_file):
    arguments = ["--config", str(config_file), "--workdir", "x", "--data.context_length", "256"]
    assert parse_train(arguments).config.model.train_length == 256
    assert parse_train([*arguments, "--model.train_length", "64"]).config.model.train_length == 64
    config_file.write_text(
        CONFIG_FILE.replace("FromFile(0.1)", "FromFile(0.1), train_length=512")  # chosen apart from context_length
    )
    assert parse_train(arguments).config.model.train_length == 512


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--model.encodng nope", "unknown field --model.encodng: did you mean --model.encoding?"),
        ("--steps 5", "unknown field --steps: did you mean --train.steps"),
        ("--nope", r"unknown field --nope: did you mean --model.encoding nope\?"),
        ("--smollm3", r"unknown field --smollm3: did you mean --model.encoding smollm3\?"),
        ("--zzz 5", "unknown field --zzz$"),
        ("--train.steps many", "--train.steps must be an integer, not 'many'"),
        ("--train.steps=", "--train.steps must be an integer, not ''"),
        ("--train.steps", "--train.steps must be an integer, not ''"),
        ("--train.steps 1 2", "--train.steps must be an integer, not '1 2'"),
        ("--train.steps 1.5", "--train.steps must be an integer, not '1.5'"),
        ("--optimizer.learning_rate fast", "--optimizer.learning_rate must be a number, not 'fast'"),
        ("--model.remat yes", "--model.remat must be one of none, full, dots, offload or True or False, not 'yes'"),
        ("--model.num_kv_heads few", "--model.num_kv_heads must be an integer or None, not 'few'"),
        ("--model.dtype int8", "--model.dtype must be one of float32, bfloat16, not 'int8'"),
        ("--model.encoding", "--model.encoding must be a name, an Encoding, or a tuple of them, not ''"),
        ("--model.encoding rop", "model.encoding: unknown encoding 'rop': did you mean 'rope'?"),
        ("--train.steps 0", "train.steps must be at least 1, not 0"),
    ],
)
def test_parse_train_refuses(arguments, complaint, config_file):
    with pytest.raises(ValueError, match=complaint) as error:
        parse_train(["--config", str(config_file), "--workdir", "x", *arguments.split()])
    assert "\n" not in str(error.value)


def test_parse_train_wants_its_options(config_file):
    with pytest.raises(ValueError, match="--config is missing: it must be a path"):
        parse_train(["--workdir", "x"])
    with pytest.raises(ValueError, match="--workdir is missing: it must be a path"):
        parse_train(["--config", str(config_file)])
    with pytest.raises(ValueError, match="stray"):
        parse_train(["stray", "--config", str(config_file), "--workdir", "x"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "--config must be a Python file; there is no .*absent.py"),
        ("", "absent.py has no get_config()"),
        ("def get_config(): return 3", r"get_config\(\) must return a Config, not int"),
    ],
)
def test_config_files_that_are_none(text, complaint, tmp_path):
    path = tmp_path / "absent.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        parse_train(["--config", str(path), "--workdir", "x"])


@pytest.mark.parametrize(
    ("line", "error"), [("def", SyntaxError), ("nothing", NameError), ("raise ValueError('mine')", ValueError)]
)
def test_an_error_of_a_config_file_keeps_its_traceback(line, error, config_file):
    for text in (line, f"def get_config():\n    {line}"):
        config_file.write_text(text)
        with pytest.raises(error):
            run(lambda: parse_train(["--config", str(config_file), "--workdir", "x"]))


def test_what_is_refused_is_what_our_checks_raise(config_file, capsys):
    assert run(lambda: override(Config(), {"model.num_layers": 0})) == 2
    config_file.write_text(
        "from nope_jax.config import ModelConfig, Config\ndef get_config(): return Config(ModelConfig(num_layers=0))"
    )
    assert run(lambda: configs.load_file(config_file)) == 2
    assert capsys.readouterr().err == "error: model.num_layers must be at least 1, not 0\n" * 2
    assert run(lambda: Path("/nowhere/at/all").read_text()) == 2
    # JAX takes its frames out of a traceback, so that it seems to end in our code.
    mistakes = lambda: int("x"), lambda: apply_rope(jnp.ones((1, 3, 1, 4)), jnp.ones((2, 5)))
    for mistake in mistakes:
        with pytest.raises((ValueError, TypeError)):
            run(mistake)


def test_help_lists_every_field(config_file, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_train(["--config", str(config_file), "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in ["config", "workdir", *configs.HINTS]:
        assert f"--{name} " in text
    assert "Devices per mesh axis" in text  # what its group is about


@pytest.mark.parametrize(
    ("name", "field"),
    [("passkey", "eval.seed"), ("similarity", "eval.documents"), ("probe", "eval.stride"), ("tune", "eval.batch_size")],
)
def test_a_field_that_changes_nothing_about_an_evaluation_is_refused(name, field):
    arguments = ["--workdirs", "runs/a", "--out", "runs/out", f"--{field}", "3"]
    arguments += [] if name == "similarity" else ["--lengths", "8"]
    arguments += ["--method", "head"] if name == "tune" else []
    with pytest.raises(ValueError, match=f"--{field} changes nothing about {name}, which goes by --{name}"):
        parse_eval(arguments, name)


def test_parse_eval_takes_a_mesh_and_a_place_among_processes():
    words = ["--workdirs", "a", "--lengths", "8", "--out", "r"]
    alone = parse_eval(words)
    assert alone.mesh is None and alone.process.named() is None
    mesh, process = ["--mesh.tensor", "2"], ["--coordinator", "h:1", "--num_processes", "2", "--process_id", "1"]
    some = parse_eval([*words, *mesh, *process])
    assert some.mesh == MeshConfig(tensor=2) and some.process.named() == ("h:1", 2, 1, None)
    assert not some.overrides
    for extra, complaint in {
        "--mesh.fsdp 0": "mesh.fsdp must be at least 1, or -1",
        "--mesh.rules zero1": "--mesh.rules is for training; to replicate parameters, use --mesh.data",
        "--num_processes 2": "--num_processes alone",
        "--eval.dtype float16": "--eval.dtype must be one of float32, bfloat16 or None, not 'float16'",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            parse_eval([*words, *extra.split()])


def test_parse_eval_tells_what_was_given():
    arguments = "--workdirs runs/a runs/b --lengths 128 256 --out report --data.source=text:*.md --eval.stride None"
    options = parse_eval(arguments.split())
    assert [str(path) for path in options.workdirs] == ["runs/a", "runs/b"]
    assert options.lengths == (128, 256)
    assert str(options.out) == "report"
    assert options.overrides == {"data.source": "text:*.md", "eval.stride": None}
    trained = Config(data=DataConfig(context_length=32), eval=EvalConfig(documents=3, stride=5))
    evaluated = override(trained, options.overrides)
    assert evaluated == Config(
        data=DataConfig(source="text:*.md", context_length=32), eval=EvalConfig(documents=3, stride=None)
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--workdirs a --lengths 128", "--out is missing: it must be a path"),
        ("--workdirs a --out r --lengths", "--lengths must be an integer or several, not ''"),
        ("--workdirs a --out r --lengths 128 long", "--lengths must be an integer or several, not '128 long'"),
        ("--workdirs a --out r --lengths 128 0", "--lengths must be at least 1, not 0"),
        ("--workdirs a --out r --lengths 128 --model.encoding nope", "unknown field --model.encoding"),
        ("--workdirs a --out r --lengths 128 --eval.documents 0", "eval.documents must be at least 1, not 0"),
    ],
)
def test_parse_eval_refuses(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_eval(arguments.split())


def test_debug_shows_the_traceback_before_the_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--workdir", "x", "--debug"])

    def command():
        assert sys.argv == ["train.py", "--workdir", "x"]
        parse_eval(["--workdirs", "x", "--lengths", "0", "--out", "y"])

    assert run(command) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert before[0] == "Traceback (most recent call last):" and any("in parse_eval" in line for line in before)
    assert last == "error: --lengths must be at least 1, not 0"
    assert run(command) == 2  # without the option, which is gone from sys.argv: the line alone
    assert capsys.readouterr().err == f"{last}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "--prompt must not be empty"),
        (["--prompt", "a", "--top_p", "0.9"], "--top_p changes nothing without --temperature"),
    ],
)
def test_generate_refuses_before_it_loads_a_model(words, message):
    with pytest.raises(ValueError, match=message):
        parse_generate(["--workdir", "runs/none", *words])


def test_a_published_model_without_its_prefix_is_told_the_prefix(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"but a Hugging Face model: name it hf:{tmp_path}"):
        configs.load(tmp_path)
