"""The pictures of docs/encodings.md, drawn by `python -m benchmarks.pictures [NAME ...]`; without a name, all of them.

Unless a picture says otherwise, all tokens are identical, so that only positions distinguish them. Random values are
seeded.

    picture.py   the registry, and how one is drawn
    axes.py      axes, and what is drawn on them
    effects.py   what encodings do to logits and embeddings
    absolute.py  rotary.py  bias.py  relative.py  contextual.py  logit_scale.py  reach.py
                 the pictures: a function each
"""

from benchmarks.pictures import absolute, bias, contextual, logit_scale, reach, relative, rotary
from benchmarks.pictures.picture import PICTURES, draw

__all__ = ["PICTURES", "absolute", "bias", "contextual", "draw", "logit_scale", "reach", "relative", "rotary"]
