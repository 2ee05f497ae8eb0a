"""Write the *.json beside this file: short arrays from code that shares nothing with this project.

Each family of encodings has a maker here, `<family>.py`, whose `make()` returns a tree of dicts, lists and numbers that
becomes `<family>.json`. Most take them from Hugging Face transformers; they need an environment with torch and
transformers (made with 2.13.0 and 5.23.0, CPU, float32). `make test` only reads the files. Regenerate one when a case
is added, never to make a test pass:

    python tests/goldens/regenerate.py [FAMILY ...]
"""

import importlib.util
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))


def make(family):
    """What the maker of a family computes, rounded as it is stored."""
    import torch

    spec = importlib.util.spec_from_file_location(f"goldens_{family}", HERE / f"{family}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        return rounded(module.make())


def load(family):
    """What is stored of a family."""
    return json.loads((HERE / f"{family}.json").read_text())


def rounded(tree):
    """To nine significant digits, which tell any two float32 apart."""
    if isinstance(tree, dict):
        return {name: rounded(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [rounded(x) for x in tree]
    return float(f"{tree:.9g}") if isinstance(tree, float) else tree


def dumps(tree, indent=""):
    """JSON with one array a line, so that a change shows as the arrays that changed."""
    if not isinstance(tree, dict):
        return json.dumps(tree, separators=(",", ":"))
    inner = indent + " "
    lines = ",\n".join(f"{inner}{json.dumps(name)}: {dumps(x, inner)}" for name, x in tree.items())
    return f"{{\n{lines}\n{indent}}}"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    for family in sys.argv[1:] or FAMILIES:
        (HERE / f"{family}.json").write_text(dumps(make(family)) + "\n")
