"""Corpora too large to be tokenised at the start of a run: prepared once, read as they are needed."""

import csv
import dataclasses
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from flax import nnx

from nope_jax import ModelConfig
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.cli import parse_prepare
from nope_jax.config import Config, DataConfig
from nope_jax.data import corpora, load_corpus, load_tokenizer, prepare, train_batches
from nope_jax.data import tokenizers as tokenizers_module
from nope_jax.data.formats import files
from nope_jax.data.tokenizers import JsonTokenizer
from nope_jax.data.windows import Windows
from tests.support.drawn_model import drawn_model
from tests.support.evaluation_cases import compare

ROOT = Path(__file__).parents[2]
BOOKS = {
    "train": [f"Book {i} says {'so ' * (i % 7)}" for i in range(50)],
    "validation": ["The one says so", "the other says so", "and one", "more"],
}


class Books(tfds.core.GeneratorBasedBuilder):
    """What PG-19 is as TFDS has it: its text is in another feature than that of C4 or Wiki40B."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"id": text, "book_text": text}))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in (*BOOKS, "test")}

    def _generate_examples(self, split):
        for i, book in enumerate(BOOKS.get(split, ["not read"] * 3)):
            yield f"{i:05}", {"id": f"{split} {i}", "book_text": book}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A dataset of several shards."""
    folder = tmp_path_factory.mktemp("data")
    Books(data_dir=folder).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    assert len(list(folder.glob("books/1.0.0/books-train.array_record*"))) == 3
    return folder


@pytest.fixture
def config(data_dir, tmp_path):
    """The dataset, its tokens somewhere else, and a tokenizer of words."""
    words = ["[UNK]", "<|endoftext|>", "Book", "says", "so", "The", "one", "the", "other", *map(str, range(50))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: 300 + i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "books").symlink_to(data_dir / "books")
    return DataConfig(
        source="tfds:books",
        dir=str(tmp_path / "data"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        context_length=16,
        batch_size=8,
    )


def elsewhere(config, folder):
    """The same dataset in another folder, where nothing is prepared."""
    folder.mkdir()
    (folder / "books").symlink_to(Path(config.dir, "books").resolve())
    return dataclasses.replace(config, dir=str(folder))


def tokens(config):
    return Path(config.dir, "tokens")


def same(one, other):
    return one.tokens.dtype == other.tokens.dtype and (
        np.array_equal(one.tokens, other.tokens) and np.array_equal(one.offsets, other.offsets)
    )


@pytest.fixture
def small_parts(monkeypatch):
    """As if a few documents were a part, and every split too large to be tokenised at the start of a run."""
    monkeypatch.setattr(prepare, "PART", 500)
    monkeypatch.setattr(corpora, "LARGE", 0)


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_what_is_prepared_is_what_is_tokenised_at_the_start(config, tokenizer, tmp_path, request):
    if tokenizer == "bytes":
        config = dataclasses.replace(config, tokenizer="bytes")
    at_start = elsewhere(config, tmp_path / "at_start")
    expected = {split: load_corpus(at_start, split) for split in BOOKS}
    batch = next(train_batches(at_start))
    assert len(expected["train"]) == 50 and len(expected["validation"]) == 4

    request.getfixturevalue("small_parts")
    with pytest.raises(ValueError, match=r"tfds:books has [0-9.]+ kB of text in its train.*not prepared.*prepare.py"):
        load_corpus(config, "train")
    prepare.prepare(config, workers=1)
    for split, corpus in expected.items():
        prepared = load_corpus(config, split)
        assert isinstance(prepared.tokens, np.memmap)
        assert same(prepared, corpus)
        assert prepared.digest() == dataclasses.replace(corpus, digest_file=None).digest()
        # Kept, so that a large file is not read whole at each start.
        assert prepared.digest_file is not None
        prepared.digest_file.write_text("kept\n")
        assert load_corpus(config, split).digest() == "kept"
    np.testing.assert_array_equal(next(train_batches(config)).tokens, batch.tokens)
    assert sorted(path.suffix for path in tokens(config).iterdir()) == sorted(
        2 * [".tokens", ".npy", ".sha256", ".lock"]
    )


def test_the_text_of_books_is_found_whatever_its_feature_is_called(config):
    config = dataclasses.replace(config, tokenizer="bytes")
    for split, books in BOOKS.items():
        corpus = load_corpus(config, split)
        assert sorted(bytes(corpus[i].tolist()).decode() for i in range(len(corpus))) == sorted(books)


def test_a_prepared_dataset_can_be_divided_otherwise(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="bytes")

    def both(**settings):
        divided = dataclasses.replace(config, **settings)
        splits = [load_corpus(divided, split) for split in ("train", "validation")]
        return [[bytes(corpus[i].tolist()).decode() for i in range(len(corpus))] for corpus in splits]

    assert [*map(sorted, both(split="test"))] == [sorted(BOOKS["train"]), ["not read"] * 3]
    train, validation = both(split=0.3)
    assert sorted(train + validation) == sorted(BOOKS["train"]) and len(validation) == 15
    (tmp_path / "held").write_text("held out")
    assert both(validation_source=f"text:{tmp_path}/held")[1] == ["held out"]
    with pytest.raises(
        ValueError, match="data.split 'dev' is no split of data.source tfds:books, which has train, val"
    ):
        both(split="dev")
    with pytest.raises(ValueError, match="data.source tfds:books has no feature body, only "):
        both(text_field="body")
    assert both(text_field=("body", "text")) == both()
    (tmp_path / "held").write_text(BOOKS["train"][7])
    complaint = (
        r"data.validation_source text:.*/held overlaps data.source tfds:books: 1 of its.*/held the first, which is "
    )
    with pytest.raises(ValueError, match=complaint + r"document \d+ of the split train of books/1.0.0$"):
        both(validation_source=f"text:{tmp_path}/held")


def copied(config, folder):
    """What docs/data.md copies to another machine: the tokens and the dataset's small files, not the text."""
    ignored = shutil.ignore_patterns("*.array_record*")
    shutil.copytree(Path(config.dir, "books/1.0.0"), folder / "books/1.0.0", ignore=ignored)
    shutil.copytree(tokens(config), folder / "tokens")
    return dataclasses.replace(config, dir=str(folder))


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_tokens_are_found_without_the_text_in_another_folder(config, tokenizer, small_parts, tmp_path):
    if tokenizer == "bytes":
        config = dataclasses.replace(config, tokenizer="bytes")
    prepare.prepare(config, workers=1)
    expected, corpus = (load_corpus(c, "validation") for c in (config, copied(config, tmp_path / "copy")))
    assert same(corpus, expected)
    if tokenizer == "bytes":  # which need no text to be counted
        assert [corpus.byte_lengths(i).tolist() for i in range(4)] == [[1] * n for n in corpus.lengths]
    else:
        assert expected.byte_lengths(0).sum() == len("and one")
        with pytest.raises(OSError, match=r"the text of books/1.0.0 cannot be read in data.dir"):
            corpus.byte_lengths(0)


def test_a_run_is_evaluated_on_tokens_whose_text_is_not_there(config, small_parts, tmp_path, capsys):
    prepare.prepare(config, workers=1)
    copy = copied(config, tmp_path / "copy")
    model = ModelConfig(vocab_size=512, num_layers=1, num_heads=2, model_dim=8)
    (tmp_path / "run").mkdir()
    configs.save(Config(model, config), tmp_path / "run")
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(0, {"params": nnx.state(drawn_model(model))})
    shutil.copytree(tmp_path / "run", tmp_path / "of_bytes")
    configs.save(Config(model, dataclasses.replace(copy, tokenizer="bytes")), tmp_path / "of_bytes")
    found = {}
    for folder in (copy, config):  # the text that comes later is not passed over for what was measured without it
        compare([tmp_path / "run"], [2], tmp_path / "out", {"data.dir": folder.dir})
        with (tmp_path / "out" / "curves.csv").open() as file:
            found[folder.dir] = list(csv.DictReader(file))[-1]
        said = "Bits per byte are unknown" in " ".join(capsys.readouterr().out.split())
        assert said == (folder is copy)
    without, whole = found[copy.dir], found[config.dir]
    assert without["text_bytes"] == without["bits_per_byte"] == without["bits_per_byte_stderr"] == ""
    assert without["nll"] == whole["nll"] and float(whole["bits_per_byte"]) > 0
    prepare.prepare(dataclasses.replace(config, tokenizer="bytes"), workers=1)
    shutil.copytree(tokens(config), Path(copy.dir, "tokens"), dirs_exist_ok=True)
    with pytest.raises(ValueError, match="data.source tfds:books has no text in data.dir, only tokens, which the runs"):
        compare([tmp_path / "run", tmp_path / "of_bytes"], [2], tmp_path / "b", {"data.dir": copy.dir})


@pytest.mark.parametrize("stopped_in", ["a part", "the join", "the offsets"])
def test_an_interrupted_preparation_is_not_read_and_goes_on(config, small_parts, stopped_in, tmp_path, monkeypatch):
    expected = elsewhere(config, tmp_path / "expected")
    prepare.prepare(expected, workers=1)
    calls = []

    def fail_at(call, function):
        def wrapped(*args):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*args)

        return wrapped

    with monkeypatch.context() as patch:
        if stopped_in == "a part":
            patch.setattr(prepare, "tokenize", fail_at(3, prepare.tokenize))
        elif stopped_in == "the join":  # between what was appended and its part
            patch.setattr(prepare.os, "fsync", fail_at(3, prepare.os.fsync))
        else:
            patch.setattr(prepare, "_join", lambda *args, join=prepare._join: (join(*args), fail_at(1, int)(0)))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(config, workers=1)
    with pytest.raises(ValueError, match="not prepared"):
        load_corpus(config, "train")
    assert not list(tokens(config).glob("*.unfinished*"))

    tokenized = []
    with monkeypatch.context() as patch:
        patch.setattr(
            prepare, "_tokenize_part", lambda *args, f=prepare._tokenize_part: tokenized.append(args) or f(*args)
        )
        prepare.prepare(config, workers=1)
    trained = [args for args in tokenized if args[0].split == "train"]
    assert len(trained) == (5 if stopped_in == "a part" else 0), "what was whole should not be tokenised again"
    assert same(load_corpus(config, "train"), load_corpus(expected, "train"))


def test_what_lacks_parts_is_refused(config, small_parts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(config, workers=1)
    next(iter(sorted(tokens(config).glob("*00000-of-*.tokens")))).unlink()
    with pytest.raises(OSError, match="lacks what parts held that are gone: remove"):
        prepare.prepare(config, workers=1)


def test_what_a_run_has_tokenised_meanwhile_stays_as_the_run_reads_it(config, small_parts, monkeypatch):
    read = []

    def join(parts, tokens_file, itemsize, join=prepare._join):
        tokens_file.write_bytes(b"the same tokens")
        read.append(tokens_file.open("rb"))
        return join(parts, tokens_file, itemsize)

    monkeypatch.setattr(prepare, "_join", join)
    prepare.prepare(config, workers=1)
    for file in read:
        with file:
            assert file.read() == b"the same tokens"


def test_of_two_processes_the_second_waits(config, small_parts, capsys):
    prepare.prepare(config, workers=1)
    expected = load_corpus(config, "train")
    for file in [*tokens(config).glob("*.npy"), *tokens(config).glob("*.tokens")]:
        file.unlink()
    capsys.readouterr()
    locks = [path.open("w") for path in tokens(config).glob("*.lock")]
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=prepare.prepare, args=(config, 1))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not list(tokens(config).glob("*.tokens"))
    for lock in locks:
        lock.close()
    thread.join()
    assert "another process prepares this; waiting" in capsys.readouterr().err
    assert same(load_corpus(config, "train"), expected)
    prepare.prepare(config, workers=1)
    assert capsys.readouterr().err.count("prepared in") == 2


def test_memory_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(64):
        (tmp_path / "texts" / str(i)).write_bytes(bytes([64 + i]) * 2**18)
    config = DataConfig(source=f"text:{tmp_path}/texts", dir=str(tmp_path / "data"), context_length=1024)
    monkeypatch.setattr(prepare, "PART", 2**20)
    monkeypatch.setattr(corpora, "LARGE", 2**18)
    tracemalloc.start()
    try:
        prepare.prepare(config, workers=1)
        corpus = load_corpus(config, "train")
        Windows(corpus, config.context_length, seed=0)[3]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(corpus.tokens) / 4


def test_a_large_document_is_tokenised_in_blocks(config, tmp_path, monkeypatch):
    (tmp_path / "large.txt").write_text("".join(f"The one says so {i} the other, naïve\n" for i in range(2000)))
    monkeypatch.setattr(files, "PIECE", 2**11)
    monkeypatch.setattr(tokenizers_module, "BLOCK", 2**12)
    pieces, texts = [], []
    encode_pieces, encode = JsonTokenizer.encode_pieces, JsonTokenizer._encode

    def in_pieces(self, given):
        return encode_pieces(self, (pieces.append(len(piece)) or piece for piece in given))

    monkeypatch.setattr(JsonTokenizer, "encode_pieces", in_pieces)
    monkeypatch.setattr(JsonTokenizer, "_encode", lambda self, text: texts.append(len(text)) or encode(self, text))
    config = dataclasses.replace(config, source=f"text:{tmp_path}/large.txt")
    assert load_corpus(config, "train").lengths.sum() > 15_000
    assert max(pieces) <= 2**11 and max(texts) <= 2 * 2**12 and sum(pieces) > 2**16


@pytest.mark.slow
def test_a_large_document_is_never_whole_in_memory(config, tmp_path):
    (tmp_path / "large.txt").write_text("".join(f"The one says so {i} the other, naïve\n" for i in range(80_000)))
    code = (
        "import resource; from nope_jax.config import DataConfig; from nope_jax.data import load_corpus\n"
        f"config = DataConfig(source='text:{tmp_path}/large.txt', dir={config.dir!r}, tokenizer={config.tokenizer!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert load_corpus(config, 'train').lengths.sum() > 500_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000, "kB; 3 MB of text at once take five times as much"
    (line, *lines) = done.stderr.splitlines()
    assert len(lines) == 1 and "train: 1 documents" in line, "no progress bar in a pipe"


@pytest.mark.slow
def test_several_workers_write_the_same_and_stop_at_once(config, tmp_path, small_parts):
    expected = elsewhere(config, tmp_path / "expected")
    prepare.prepare(expected, workers=1)
    prepare.prepare(config, workers=2)
    for split in BOOKS:
        assert same(load_corpus(config, split), load_corpus(expected, split))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_at_once(config, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / str(i)).write_text(f"{i}" + " the other one says so" * 40_000)
    code = (
        "import sys; from nope_jax.cli import run; from nope_jax.config import DataConfig\n"
        "from nope_jax.data import prepare\n"
        "prepare.PART = 2**23\n"
        f"config = DataConfig(source='text:{tmp_path}/texts', dir={config.dir!r}, tokenizer={config.tokenizer!r})\n"
        "sys.exit(run(lambda: prepare.prepare(config, workers=2)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(tokens(config).glob("*-of-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and complaint.splitlines()[-1] == "interrupted" and "Traceback" not in complaint
    assert all("-of-" in path.name for path in tokens(config).glob("*.npy")), "it should not be whole yet"
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # a worker that is left
            time.sleep(0.1)


# The command line


def config_file(config, folder):
    path = folder / "books.py"
    path.write_text(
        "from nope_jax.config import Config, DataConfig\n\n\n"
        f"def get_config():\n    return Config(data=DataConfig(source='tfds:books', tokenizer={config.tokenizer!r}))\n"
    )
    return path


def test_the_command_reads_the_config_of_a_run(config, tmp_path):
    file = config_file(config, tmp_path)
    assert parse_prepare(["--config", str(file), "--data.dir", "d"]) == DataConfig(
        source="tfds:books", tokenizer=config.tokenizer, dir="d"
    )
    for arguments, complaint in [
        ([], "--config is missing: it must be a path"),
        (["--config", "no.py"], "--config must be a Python file; there is no"),
        (["--config", str(file), "--data.dri", "d"], "unknown field --data.dri: did you mean --data.dir?"),
        (["--config", str(file), "--train.steps", "3"], "unknown field --train.steps"),
        (["--config", str(file), "--workers", "3"], "unknown field --workers"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            parse_prepare(arguments)


def test_a_task_is_nothing_to_prepare():
    with pytest.raises(ValueError, match="data.source task:passkey is made at the start of a run"):
        prepare.prepare(DataConfig(source="task:passkey"), workers=1)


@pytest.mark.slow
def test_the_command(config, tmp_path):
    command = [sys.executable, "prepare.py", "--config", str(config_file(config, tmp_path)), "--data.dir"]
    done = subprocess.run([*command, config.dir], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "" and "tfds:books, train: 50 documents, " in done.stderr
    assert " kB; parts to tokenize: 1, processes: " in done.stderr
    corpus = load_corpus(config, "train")
    assert isinstance(corpus.tokens, np.memmap) and len(corpus) == 50
    absent = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert absent.returncode == 2 and absent.stderr.startswith("error: data.source tfds:books does not lie in data.dir")


@pytest.mark.slow
def test_the_tokenizer_of_the_page_can_be_used(data_dir, tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("tfds:wiki40b/en", "tfds:books").replace("~/data", str(data_dir)), {})
    tokenizer = load_tokenizer("tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("the other one, naïve")) == "the other one, naïve"
