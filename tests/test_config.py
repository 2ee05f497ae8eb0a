"""The config: what it refuses, its JSON, its command line."""

import dataclasses
import json
import operator
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest

from nope_jax import cli
from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.cli import parse_eval, parse_train
from nope_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
    own_code,
)
from nope_jax.encodings import (
    ENCODINGS,
    SCHEDULES,
    ALiBi,
    Encoding,
    HeadScale,
    LinearScaling,
    Llama4Scale,
    LongRoPEScaling,
    NoPE,
    RoPE,
    Windowed,
    apply_rope,
)

CONFIG_FILE = """
import dataclasses
from nope_jax.config import Config, DataConfig, ModelConfig
from nope_jax.encodings import Encoding

@dataclasses.dataclass(frozen=True)
class FromFile(Encoding):
    strength: float = 1.0

def get_config():
    return Config(model=ModelConfig(encoding=FromFile(0.1)), data=DataConfig(context_length=64))
"""


@dataclasses.dataclass(frozen=True)
class Mine(Encoding):
    """An encoding that the registry does not know."""

    slopes: tuple[float, ...] = (0.5, 0.25)
    inner: Encoding | None = None


def run(command) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # run sets its own
        return cli.run(command)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG_FILE)
    return path


def every_field_changed() -> Config:
    return Config(
        ModelConfig(300, 6, 6, 2, 24, 96, 100, "plain", True, "rope", 77, "reference", "bfloat16", True),
        DataConfig("text:a", "dir", "tokenizer.json", "<|endoftext|>", 64, 12, True, True, 1),
        OptimizerConfig("muon", 0.1 + 0.2, 1, 0.5, 0.6, 0.0, 0.3, 4),
        TrainConfig(1, 2, 3, 4, 5, 6, "runs/other", "skip", 3.0, 4, True, 1),
        MeshConfig(2, -1, 3, 4, "zero1"),
        EvalConfig(1, 2, 3, 4, "bits"),
    )


@pytest.mark.parametrize(
    "config",
    [Config(), every_field_changed()]
    + [
        Config(model=ModelConfig(encoding=encoding))
        for encoding in [
            ("rope", "rope", "rope", "nope"),
            ALiBi(),
            RoPE(base=1e6, scaling=LinearScaling(4.0)),
            (RoPE(base=1 / 3), "nope", Mine()),
            Mine(slopes=(1e-300,), inner=Mine(inner=RoPE(scaling=LinearScaling(2.0)))),
        ]
    ],
    ids=lambda config: str(config.model.encoding)[:40],
)
def test_json_round_trip_is_exact(config, tmp_path):
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config
    assert {path.name for path in tmp_path.iterdir()} - {"code"} == {"config.json"}
    assert (tmp_path / "code").exists() == ("Mine" in str(config.model.encoding))


def test_every_field_changed_is_what_it_says():
    before, after = Config(), every_field_changed()
    for name in configs.HINTS:
        assert operator.attrgetter(name)(before) != operator.attrgetter(name)(after), name


def test_encodings_are_written_by_name(tmp_path):
    encoding = (RoPE(base=5.0, scaling=LinearScaling(4.0)), Mine())
    configs.save(Config(model=ModelConfig(encoding=encoding)), tmp_path)
    rope, mine = json.loads((tmp_path / "config.json").read_text())["model"]["encoding"]
    assert rope["class"] == "rope" and rope["base"] == 5.0
    assert rope["scaling"] == {"class": "nope_jax.encodings:LinearScaling", "factor": 4.0}
    assert mine == {"class": "code/test_config.py:Mine", "slopes": [0.5, 0.25], "inner": None}
    assert (tmp_path / "code" / "test_config.py").read_bytes() == Path(__file__).read_bytes()


WRAPPED = HeadScale(Windowed(RoPE(scaling=LongRoPEScaling((1.0, 2.0), (3.0, 4.0), 64, factor=4.0)), window=32))


@pytest.mark.parametrize("encoding", [*(cls() for cls in ENCODINGS.values()), *SCHEDULES.values(), WRAPPED], ids=str)
def test_every_encoding_comes_back_as_it_was(encoding, tmp_path):
    config = Config(model=ModelConfig(encoding=encoding))
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config


def forget(path) -> None:
    """As in a process that has not read that file."""
    for name in [name for name in sys.modules if name.endswith(path.name)]:
        del sys.modules[name]


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user who has trained nothing, on a machine of theirs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(own_code, "_trusted", set())


@pytest.fixture
def own_run(config_file, tmp_path):
    """The workdir of a run with an encoding of a config file, as another process sees it."""
    config = configs.load_file(config_file)
    configs.save(config, tmp_path / "run")
    assert configs.load(tmp_path / "run") == config
    forget(config_file)
    return tmp_path / "run"


def test_a_run_with_an_own_encoding_may_move_without_its_config_file(own_run, config_file, tmp_path):
    config_file.unlink()
    encoding = configs.load(own_run.rename(tmp_path / "moved")).model.encoding
    assert type(encoding).__name__ == "FromFile" and encoding.strength == 0.1
    configs.save(configs.load(tmp_path / "moved"), tmp_path / "again")
    assert (tmp_path / "again/code/mine.py").read_text() == CONFIG_FILE
    assert json.loads((tmp_path / "again/code/origins.json").read_text()) == {"mine.py": str(config_file)}


def test_code_that_came_from_elsewhere_does_not_run(own_run, config_file, nobody, tmp_path):
    config_file.unlink()
    (own_run / "code" / "mine.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + CONFIG_FILE
    )
    refusal = "its encoding runs .*run/code/mine.py, code that no train.py of yours .*trust_code=True"
    for load in (configs.load, load_model):
        with pytest.raises(ValueError, match=refusal):
            load(own_run)
    with pytest.raises(ValueError, match=refusal):
        parse_eval(["--workdirs", str(own_run), "--lengths", "8", "--out", "x", "--trust_code", "False"])
        configs.load(own_run)
    assert not (tmp_path / "ran").exists()
    parse_eval(["--workdirs", str(own_run), "--lengths", "8", "--out", "x", "--trust_code", "True"])
    assert (tmp_path / "ran").exists()
    configs.load(own_run)  # in this process it is trusted now
    own_code._trusted.clear()
    forget(own_run / "code" / "mine.py")
    with pytest.raises(ValueError, match=refusal):
        configs.load(own_run)


@pytest.mark.parametrize("module", ["sibling", "own_package.sibling"])
def test_a_module_that_a_workdir_names_is_not_imported_either(module, nobody, tmp_path, monkeypatch):
    path = tmp_path / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + CONFIG_FILE)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"encoding": {"class": f"{module}:FromFile"}}}))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"its encoding runs the module {module}, code that no train.py"):
        configs.load(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert configs.load(tmp_path, trust_code=True).model.encoding.strength == 1.0


def test_the_path_that_earlier_versions_wrote_is_run_when_told_to(own_run, config_file, nobody):
    text = (own_run / "config.json").read_text().replace("code/mine.py", str(config_file))
    (own_run / "config.json").write_text(text)
    with pytest.raises(ValueError, match="its encoding runs /.*mine.py, code that no train.py"):
        configs.load(own_run)
    assert configs.load(own_run, trust_code=True).model.encoding.strength == 0.1
    (own_run / "config.json").write_text(text.replace(str(config_file), "code/../../mine.py"))
    with pytest.raises(ValueError, match="a class must be in code/FILE.py"):
        configs.load(own_run, trust_code=True)


def test_what_was_written_with_former_names_is_read(tmp_path):
    wrapped = {"class": "llama4_temperature", "encoding": {"class": "nope"}}
    groups = {
        "model": {"num_layers": 3, "encoding": ["swan_temperature:rope", wrapped]},
        "train": {"start_from": "llama"},
    }
    (tmp_path / "config.json").write_text(json.dumps(groups))
    config = configs.load(tmp_path)
    assert config.model.encoding == ("swan_scale:rope", Llama4Scale(NoPE())) and config.train.init_from == "llama"


def test_an_edited_encoding_is_the_one_that_was_trained(own_run, config_file):
    config_file.write_text(CONFIG_FILE.replace("strength: float = 1.0", "strength: float = 2.0"))
    with pytest.warns(UserWarning, match=f"run with the code that it was trained with, .*{config_file} has changed"):
        kept = configs.load(own_run)
    assert type(kept.model.encoding)().strength == 1.0
    edited = configs.load_file(config_file)
    with pytest.raises(ValueError, match=f"{config_file} has changed since the run in .*another workdir"):
        configs.refuse_changed_code(edited, own_run)
    assert configs.code_digest(edited) != configs.code_digest(kept)


def test_comments_change_no_encoding(own_run, config_file):
    config_file.write_text("# A comment.\n\n" + CONFIG_FILE.replace("strength: float = 1.0", "strength: float  =  1.0"))
    config = configs.load_file(config_file)
    configs.refuse_changed_code(config, own_run)
    assert configs.load(own_run) == config


def test_results_follow_from_what_own_code_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("STRENGTH = 1\n")
    (tmp_path / "mine.py").write_text("import helper_of_mine\n" + CONFIG_FILE)
    config = configs.load_file(tmp_path / "mine.py")
    digest = configs.code_digest(config)
    assert configs.code_digest(config) == digest != configs.code_digest(Config())
    (tmp_path / "helper_of_mine.py").write_text("STRENGTH = 2\n")
    assert configs.code_digest(config) != digest


def test_two_files_of_one_name_are_refused(tmp_path):
    encodings = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "mine.py").write_text(CONFIG_FILE + f"# {folder.name}")
        encodings.append(configs.load_file(folder / "mine.py").model.encoding)
    with pytest.raises(ValueError, match="a/mine.py and .*b/mine.py have the same name"):
        configs.save(Config(model=ModelConfig(encoding=tuple(encodings))), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_save_refuses_what_it_could_not_read_again(tmp_path):
    with pytest.raises(ValueError, match="model.encoding: a set cannot be saved"):
        configs.save(Config(model=ModelConfig(encoding=Mine(slopes={1.0}))), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"model": {"encodng": "nope"}}', "config.json: unknown field model.encodng: did you mean model.encoding?"),
        ('{"modle": {"dtype": "float32"}}', "unknown field modle.dtype: did you mean model.dtype?"),
        ('{"train": {"steps": "5"}}', "train.steps must be an integer, not '5'"),
        ('{"train": 5}', "must be an object of objects"),
        ('{"train": ', "config.json: Expecting value"),
        ('{"model": {"encoding": {"class": "code/no.py:Nothing"}}}', "cannot make the class 'code/no.py:Nothing'"),
        (
            '{"model": {"encoding": {"class": "nope_jax.encodings:No"}}}',
            "cannot make the class 'nope_jax.encodings:No'",
        ),
        ('{"model": {"encoding": {"class": "nope_jax.cli:run"}}}', "'nope_jax.cli:run': it is not a dataclass"),
        ('{"model": {"encoding": {"class": "rope", "bass": 1}}}', "cannot make the class 'rope'.*bass"),
        ('{"model": {"encoding": {"base": 1}}}', "cannot make the class None"),
    ],
)
def test_load_refuses(text, complaint, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        configs.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_of_no_workdir(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not the workdir of a run: it has no config.json"):
        configs.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"model.num_layers": 0}, "model.num_layers must be at least 1, not 0"),
        ({"model.num_heads": 4.0}, "model.num_heads must be an integer, not 4.0"),
        ({"model.num_heads": True}, "model.num_heads must be an integer, not True"),
        ({"model.num_kv_heads": 3}, "model.num_kv_heads 3 must divide model.num_heads 4"),
        ({"model.num_heads": 3}, "model.num_heads 3 must divide model.model_dim 128"),
        ({"model.dtype": "float16"}, "model.dtype must be one of float32, bfloat16, not 'float16'"),
        ({"model.attention": "fused"}, "model.attention must be one of reference, streaming or None, not 'fused'"),
        ({"model.encoding": "rop"}, "model.encoding: unknown encoding 'rop': did you mean 'rope'?"),
        ({"model.encoding": ("rope", "nop")}, "model.encoding: unknown encoding 'nop'"),
        ({"model.encoding": ()}, "model.encoding: .*non-empty"),
        ({"model.encoding": ["rope"]}, "model.encoding must be a name, an Encoding, or a tuple of them, not .'rope'."),
        ({"data.context_length": -1}, "data.context_length must be at least 1, not -1"),
        ({"data.seed": -1}, "data.seed must be at least 0, not -1"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate must be greater than 0, not 0.0"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate must be greater than 0, not nan"),
        ({"optimizer.b2": 1.0}, "optimizer.b2 must be at least 0 and less than 1, not 1.0"),
        ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay must be at least 0, not -0.1"),
        ({"optimizer.accumulation": 3}, "optimizer.accumulation 3 must divide data.batch_size 32"),
        ({"eval.stride": 0}, "eval.stride must be at least 1, not 0"),
        ({"mesh.fsdp": 0}, "mesh.fsdp must be at least 1, or -1 for what the other axes leave, not 0"),
        ({"mesh.fsdp": -1, "mesh.tensor": -1}, "mesh: at most one axis may be -1, not fsdp, tensor"),
        ({"model.widht": 3}, "unknown field model.widht: did you mean model."),
    ],
)
def test_config_refuses(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        override(Config(), overrides)


def test_train_length_is_the_context_length_unless_given():
    assert Config(data=DataConfig(context_length=99)).model.train_length == 99
    assert Config(model=ModelConfig(train_length=7), data=DataConfig(context_length=99)).model.train_length == 7


def test_parse_train(config_file):
    config, workdir, *_ = parse_train(
        f"--config {config_file} --workdir runs/a --train.steps=7 --data.batch-size 8 --mesh.data -1 "
        "--model.num_kv_heads None --optimizer.learning_rate 1e-4 --model.remat True "
        "--model.encoding rope rope rope nope".split()
    )
    assert str(workdir) == "runs/a"
    expected = Config(
        model=ModelConfig(encoding=("rope", "rope", "rope", "nope"), remat=True),
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
        ("--model.remat yes", "--model.remat must be True or False, not 'yes'"),
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
