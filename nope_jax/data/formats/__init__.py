"""The formats of corpora. To add one, write a `Format` in a file beside these, and list it in FORMATS.

format.py       what a format is
files.py        files of a path or glob, decompressed
scan.py         from the files to the documents of each split
text.py, jsonl.py, parquet.py, huggingface.py    one format each
tfds.py         datasets of TensorFlow Datasets, which are indexed and split already
"""

from nope_jax.data.formats.format import Format
from nope_jax.data.formats.huggingface import HuggingFace
from nope_jax.data.formats.jsonl import JsonLines
from nope_jax.data.formats.parquet import Parquet
from nope_jax.data.formats.text import Text

FORMATS: dict[str, type[Format]] = {"text": Text, "jsonl": JsonLines, "parquet": Parquet, "hf": HuggingFace}
"""The formats by the word before the colon in `data.source`."""

__all__ = ["FORMATS", "Format"]
