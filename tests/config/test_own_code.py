"""Code of a user's own: kept with the run, and run only where it is trusted."""

import json
import sys

import pytest

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.cli import parse_eval
from nope_jax.config import (
    Config,
    ModelConfig,
    own_code,
)
from tests.support.config_file import CONFIG_FILE


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
