"""The registry of pictures, and how one is drawn."""

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).parents[2] / "docs/images/encodings"

PICTURES: dict[str, Callable[[Figure], None]] = {}
"""The function that draws each picture, by name."""


def picture(name: str):
    def register(function):
        PICTURES[name] = function
        return function

    return register


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draws one picture, byte for byte the same every time."""
    figure = Figure(figsize=(3.2, 1.8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    FigureCanvasAgg(figure)
    PICTURES[name](figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", metadata={"Software": None})
    path = folder / f"{name}.png"
    Image.open(drawn).convert("RGB").quantize(96).save(path, optimize=True)  # a quarter of the bytes
    return path
