"""The built-in corpus: the source files of the running Python's standard library, available on every machine."""

import contextlib
import io
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from nope_jax.data.splits import is_validation


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Every .py file of the standard library, including its tests, except empty and non-UTF-8 files."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=platform.python_version())]  # noqa: RUF012

    def __init__(self, *, root: Path | None = None, **kwargs):
        """Read the files under `root`; None: those of the running Python."""
        self.root = root or Path(sysconfig.get_path("stdlib"))
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"name": text, "text": text}))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict]]:
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
            for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
                name = path.relative_to(self.root).as_posix()
                text = path.read_bytes() if is_validation(name) == validation else b""
                with contextlib.suppress(UnicodeDecodeError):
                    if text.decode():
                        yield name, {"name": name, "text": text}


def prepare(data_dir: Path, root: Path | None = None) -> tfds.core.DatasetBuilder:
    """Return the dataset in `data_dir`, writing it on first use.

    TFDS writes into a temporary folder and renames it when complete: a killed process leaves nothing that would be
    read, and of two concurrent writers the second finds the work done.
    """
    builder = PythonStdlib(root=root, data_dir=data_dir)
    if builder.data_path.exists():
        return builder
    print(f"Preparing python_stdlib in {builder.data_dir}: once, some seconds", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():
            raise
    return PythonStdlib(root=root, data_dir=data_dir)
