"""The shape of the house: imports run one way, and the documents' code runs."""

import ast
import doctest
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from nope_jax.encodings import apply_rope
from tests.support.tiny_runs import write_run

ROOT = Path(__file__).parents[1]

# What each part may import of the project.
MAY_IMPORT = {
    "encodings": {"jax_settings"},
    "attention": {"encodings", "explicit_axes", "jax_settings"},
    "explicit_axes": set(),
    "jax_settings": set(),
    "errors": set(),
    "paths": set(),
    "locks": {"paths"},
    "config": {"encodings", "errors", "paths"},
    "distributed": {"errors", "paths"},
    "compiled": set(),
    "compiler_flags": set(),
    "cli": {"compiled", "config", "distributed", "errors", "evaluation", "paths"},
    "sharding": {"config", "explicit_axes"},
    "data": {"config", "paths"},
    "models": {"encodings", "attention", "config", "sharding"},
    "interop": {"config", "data", "encodings", "models", "sharding"},
    "export": {"cli", "data", "interop", "trained"},
    "plot": {"cli", "evaluation", "retention"},
    "trained": {"checkpoint", "config", "data", "interop", "models", "paths", "retention"},
    "retention": {"config", "paths"},
    "checkpoint": {"config", "models", "paths", "retention", "sharding"},
    "text_generation": {"config", "data", "interop", "models", "paths", "sharding", "trained"},
    "training": {
        "encodings",
        "config",
        "data",
        "models",
        "checkpoint",
        "sharding",
        "distributed",
        "errors",
        "locks",
        "paths",
        "retention",
        "trained",
    },
    "compile": {"attention", "compiler_flags", "config", "data", "sharding", "training"},
    "evaluation": {
        "attention",
        "encodings",
        "errors",
        "config",
        "data",
        "distributed",
        "locks",
        "models",
        "checkpoint",
        "paths",
        "sharding",
        "trained",
    },
}


@functools.cache
def imported(path: Path, at_once: bool = False) -> frozenset[str]:
    """Full names of the modules a file imports, at any depth or, at once, when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "nope_jax" else {f"nope_jax.{a.name}" for a in node.names}
    return frozenset(names)


def files_of(part: str) -> list[Path]:
    path = ROOT / "nope_jax" / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_every_part_is_listed():
    inside = (path for path in (ROOT / "nope_jax").iterdir() if path.is_dir() or path.suffix == ".py")
    parts = {path.stem for path in inside if not path.name.startswith("_")}
    assert parts == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    for path in files_of(part):
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("nope_jax.")} - {part}
        assert parts <= MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {parts - MAY_IMPORT[part]}"


@pytest.mark.parametrize("part", ["encodings", "attention"])
def test_the_mathematics_knows_neither_flax_nor_meshes(part):
    for path in files_of(part):
        names = imported(path)
        assert not [n for n in names if n.split(".")[0] in ("flax", "optax", "orbax") or n == "nope_jax.sharding"], path
        assert "jax.sharding" not in names or path.name in ("mesh.py", "sharded.py"), path


def test_the_attention_functions_need_jax_numpy_and_jaxtyping_alone_and_a_command_line_nothing_large():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "tests/support/light.py"], cwd=ROOT, env=environment, check=True)


def test_requirements_are_the_dependencies_and_those_of_training():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert [line for line in lines if line] == project["dependencies"] + project["optional-dependencies"]["train"]


@pytest.mark.parametrize(
    ("x", "positions"),
    [(jnp.ones((3, 2, 4)), jnp.arange(3)), (jnp.ones((1, 3, 2, 4)), jnp.arange(4)), (jnp.ones((1, 3, 2, 4)), 1.0)],
)
def test_shapes_and_dtypes_are_held_to_the_signatures(x, positions):
    try:
        apply_rope(x, positions)
    except jaxtyping.TypeCheckError as error:
        assert "nope_jax.encodings.rotary.apply_rope" in str(error)
    else:
        raise AssertionError("jaxtyping's import hook is not installed")


def test_orbax_is_known_in_one_place():
    users = [p.name for p in (ROOT / "nope_jax").rglob("*.py") if any(n.startswith("orbax") for n in imported(p))]
    assert users == ["checkpoint.py"]


def test_evaluation_knows_nothing_of_training():
    names = {name for path in [ROOT / "eval.py", *files_of("evaluation")] for name in imported(path)}
    assert not [name for name in names if name == "train" or name.startswith("nope_jax.training")]


def test_the_list_of_evaluations_is_all_that_a_command_line_imports_of_them():
    assert {name for name in imported(ROOT / "nope_jax/cli.py") if "evaluation" in name} == {
        "nope_jax.evaluation.registry"
    }


def test_what_few_sources_need_is_imported_where_it_is_used():
    users = {path.name: imported(path, at_once=True) for path in files_of("data")}
    assert not [name for name, modules in users.items() if modules & {"grain", "datasets"}]
    needing = {name for name, modules in users.items() if "tensorflow_datasets" in modules}
    assert needing == {"tfds.py", "python_stdlib.py"} and "nope_jax.data.formats.tfds" not in users["sources.py"]


@pytest.mark.slow
def test_neither_tensorflow_nor_what_few_sources_need_is_imported():
    code = "import nope_jax.training, nope_jax.evaluation.common.evaluation, sys; "
    code += "sys.exit(bool({'tensorflow', 'tensorflow_datasets', 'grain'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_what_the_pages_import_is_there(page):
    examples = doctest.DocTestParser().get_examples((ROOT / page).read_text(encoding="utf-8"))
    for example in examples:
        if example.source.startswith(("from ", "import ")):
            exec(example.source, {})


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs", "nope")
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted > 10
    assert results.failed == 0


PAGES = [p.name for p in (ROOT / "docs").glob("*.md") if ">>> " in p.read_text("utf-8")]
# By test_theorems.py, by test_families.py, and by test_every_encoding.py and test_pallas.py.
TESTED = ("theorems.md", "models.md", "your_own_encoding.md")


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in TESTED else p for p in PAGES])
def test_code_of_the_pages_runs(page):
    assert doctest.testfile(str(ROOT / "docs" / page), module_relative=False).failed == 0
