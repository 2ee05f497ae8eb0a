"""Passkeys: the prompt, the corpus made of them, and how many of them a model finds."""

import csv
import itertools
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from nope_jax import ModelConfig, trained
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.config import Config, DataConfig
from nope_jax.data import load_corpus, load_tokenizer, train_batches
from nope_jax.data.tasks.passkey import DOCUMENTS, FILLER, KEYS, NEEDLE, QUESTION, TASK, Passkey
from nope_jax.data.tokenizers import ByteTokenizer
from nope_jax.evaluation.common import evaluation
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.passkey import COLUMNS, draw, draw_keys, measure, notes, rows
from nope_jax.evaluation.registry import Options, PasskeyConfig
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval

ROOT = Path(__file__).parents[2]
BYTES = Passkey(ByteTokenizer())
SHORTEST = len(TASK) + len(NEEDLE.format(key=12345)) + len(QUESTION) + len(" 12345")


def text(tokens):
    return bytes(np.asarray(tokens, np.uint8)).decode()


# The prompt


@pytest.mark.parametrize("length", [SHORTEST, SHORTEST + 1, 400, 1023])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_all_of_its_length_and_its_key_three_times(length, depth):
    tokens, answer = BYTES.build(length, depth, 90817)
    prompt = text(tokens)
    assert len(tokens) == length and tokens.dtype == np.int32
    assert prompt[-answer:] == " 90817" and prompt[:-answer].count("90817") == 2
    assert prompt.startswith(TASK) and prompt.endswith(f"{QUESTION} 90817")


def test_a_bos_begins_the_prompt_and_counts(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    plain, begun = Passkey(tokenizer), Passkey(tokenizer, bos=True)
    assert begun.shortest(12345) == plain.shortest(12345) + 1
    (tokens, answer), (expected, same) = begun.build(400, 0.3, 12345), plain.build(399, 0.3, 12345)
    assert tokens.tolist() == [tokenizer.bos, *expected.tolist()] and answer == same


@pytest.mark.parametrize(("depth", "before"), [(0, 0), (0.25, 100), (0.5, 200), (1, 400)])
def test_the_needle_lies_at_its_depth_in_the_filler(depth, before):
    prompt = text(BYTES.build(SHORTEST + 400, depth, 12345)[0])
    start, needle = prompt.index("\nThe pass key is 12345"), NEEDLE.format(key=12345)
    assert start == len(TASK) + before
    end = len(prompt) - len(f"{QUESTION} 12345")
    assert prompt[len(TASK) : start] == (FILLER * 5)[:before]
    assert prompt[start : start + len(needle)] == needle
    assert prompt[start + len(needle) : end] == (FILLER * 5)[: 400 - before]


def test_the_wording_is_that_of_the_paper():
    assert text(BYTES.build(SHORTEST + len(FILLER), 1, 54321)[0]) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n"
        " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "The pass key is 54321. Remember it. 54321 is the pass key.\n\n"
        "What is the pass key? The pass key is 54321"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SHORTEST - 1, 0, 12345), f"length {SHORTEST - 1} is too short .* takes {SHORTEST} tokens"),
        ((SHORTEST, 1.1, 12345), "depth must be from 0 to 1, not 1.1"),
        ((SHORTEST, 0, 9999), "key must be from 10000 to 99999, not 9999"),
        ((SHORTEST, 0, 100000), "key must be from 10000 to 99999, not 100000"),
    ],
)
def test_prompts_that_cannot_be_are_refused(arguments, message):
    assert BYTES.shortest(12345) == SHORTEST
    with pytest.raises(ValueError, match=message):
        BYTES.build(*arguments)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A tokenizer to which some keys are fewer tokens than others."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TASK, FILLER, QUESTION, " 12345 11111"] * 10, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_answers_of_other_tokenizers_are_what_follows_the_question(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    task, answers = Passkey(tokenizer), set()
    for key in (12345, 11111, 98765):
        tokens, answer = task.build(200, 0.5, key)
        assert len(tokens) == 200 and len(task.build(task.shortest(key), 0.5, key)[0]) == task.shortest(key)
        assert tokenizer.decode(tokens[-answer:]) == f" {key}"
        assert tokenizer.decode(tokens[:-answer]).endswith(QUESTION)
        answers.add(answer)
    assert len(answers) > 1


@pytest.mark.usefixtures("stand_ins")
def test_an_answer_that_shares_a_token_with_the_question_begins_at_that_token():
    class Pairs:
        """Two letters are a token, so that the space before the key belongs to the question or the key by chance."""

        vocab_size, separator = 2**16, 0

        def encode(self, text):
            text = text + "\0" * (len(text) % 2)
            return np.frombuffer(text.encode(), np.uint16)

    tokens, answer = Passkey(Pairs()).build(200, 0, 12345)
    end = tokens[-answer:].astype(np.uint16).tobytes().decode().strip("\0")
    assert f"{QUESTION} 12345".endswith(end) and end.endswith(" 12345") and len(end) <= 7


# The corpus


def config(**changes):
    return DataConfig(source="task:passkey", context_length=SHORTEST + 60, batch_size=4, **changes)


def test_documents_of_the_task_are_prompts_that_end_with_their_only_answer():
    length = SHORTEST + 250
    corpus = load_corpus(DataConfig(source="task:passkey", context_length=length + 1), "validation")
    assert (corpus.lengths == length).all() and len(corpus) == DOCUMENTS["validation"]
    needles, before, after = [], [], []
    for i in range(len(corpus)):
        document = text(corpus[i])
        key = document[-5:]
        assert int(key) in KEYS and document.startswith(TASK) and document.endswith(f"{QUESTION} {key}")
        middle = document.removeprefix(TASK).removesuffix(f"{QUESTION} {key}")
        gaps = middle.split(NEEDLE.format(key=key))
        # No other answer or key, and nothing that is cut but filler.
        assert all(gap == (FILLER * 3)[: len(gap)] for gap in gaps)
        needles.append(len(gaps) - 1)
        if needles[-1] == 1:
            before.append(len(gaps[0]))
            after.append(len(gaps[1]))
    most = 250 // len(NEEDLE.format(key=12345))
    counts = np.bincount(needles)
    assert counts[0] == 0 and (counts[1:] > 20).all() and len(counts) == 1 + 1 + most
    assert np.mean(needles) > (1 + 1 + most) / 2  # much of the corpus is worth copying from
    assert min(before) < 10 and min(after) < 10 and max(before) > 190 and max(after) > 190


def test_only_the_answer_can_tell_a_model_that_the_document_ends(monkeypatch):
    monkeypatch.setitem(DOCUMENTS, "train", 50)
    for batch, _ in zip(train_batches(config()), range(3), strict=False):
        assert [text(row).startswith(TASK) for row in batch.tokens] == [True] * 4
        for row in batch.tokens:
            (ends,) = np.nonzero(row == 0)
            answer = text(row[: ends[0]]).rindex(QUESTION)
            assert len(ends) == 1 and ends[0] == len(row) - 1 == answer + len(f"{QUESTION} 12345")
            assert text(row[: ends[0]]).index(QUESTION) == answer


def test_the_corpus_is_a_function_of_its_seed(monkeypatch):
    for split, count in {"train": 100, "validation": 50}.items():
        monkeypatch.setitem(DOCUMENTS, split, count)

    def documents(split, seed=0):
        return load_corpus(config(seed=seed), split).tokens.tobytes()

    assert documents("train") == documents("train") != documents("train", seed=1)
    # Validation is the same whatever the seed, so that runs of several seeds are comparable.
    assert documents("validation") == documents("validation", seed=1)
    train, validation = (set(map(bytes, load_corpus(config(), split))) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (100, 50) and not train & validation


def test_the_corpus_comes_in_the_tokens_of_any_tokenizer(tokenizer_json, monkeypatch):
    monkeypatch.setitem(DOCUMENTS, "validation", 20)
    corpus = load_corpus(config(tokenizer=str(tokenizer_json)), "validation")
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert (corpus.lengths == SHORTEST + 59).all() and corpus.tokens.dtype == np.uint16
    assert corpus.tokens[SHORTEST + 59] == tokenizer.separator
    assert tokenizer.decode(corpus[0]).startswith(TASK)


def test_the_config_has_room_for_prompts():
    config = configs.load_file(ROOT / "configs" / "passkey.py")
    assert len(load_corpus(config.data, "validation")) and config.data.context_length > SHORTEST + 100


@pytest.mark.parametrize(
    ("source", "length", "message"),
    [
        ("task:paskey", 999, "data.source: unknown task 'paskey': did you mean 'passkey'"),
        ("task:", 999, "data.source: unknown task ''"),
        ("passkey", 999, "data.source must be .* or task:NAME, not 'passkey'; did you mean task:passkey"),
        ("python_stdlb", 999, "not 'python_stdlb'; did you mean python_stdlib"),
        ("task:passkey", SHORTEST, f"data.context_length {SHORTEST} is too short .* needs at least {SHORTEST + 1}"),
    ],
)
def test_tasks_that_cannot_be_are_refused_in_one_line(source, length, message):
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(DataConfig(source=source, context_length=length), "train")
    assert "\n" not in str(error.value)


# What is measured


class Oracle(nnx.Module):
    """Knows the next token, except where that is the one it is blind to."""

    def __init__(self, blind=-1):
        self.blind = nnx.Param(np.int32(blind))

    def hidden(self, tokens):
        following = jnp.roll(tokens, -1, axis=1)
        return jax.nn.one_hot(jnp.where(following == self.blind[...], 0, following), 256), None

    def logits(self, hidden):
        return hidden


class Counter(nnx.Module):
    """Believes that a digit is followed by the next one, and a space by a one."""

    def __init__(self):
        table = np.zeros((256, 256), np.float32)
        table[np.arange(255), np.arange(1, 256)] = 1
        table[ord(" "), :], table[ord("s"), :] = np.eye(256)[ord("1")], np.eye(256)[ord(" ")]
        self.table = nnx.Param(jnp.asarray(table))

    def hidden(self, tokens):
        return tokens, None

    def logits(self, hidden):
        return self.table[...][hidden]


# By 4, the last batch is not full.
@pytest.mark.parametrize("batch_size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 100))])
def test_accuracy_counts_the_answers_of_which_every_digit_is_right(batch_size):
    depths, keys = np.linspace(0, 1, 3), draw_keys(PasskeyConfig(depths=3, keys=7), 300)

    def right(model):
        return measure(model, BYTES, 300, depths, keys, batch_size=batch_size).tolist()

    assert right(Oracle()) == [7, 7, 7]
    assert right(Oracle(blind=ord(" "))) == [0, 0, 0]
    without = [sum("7" not in str(key) for key in row) for row in keys]
    assert right(Oracle(blind=ord("7"))) == without and 0 < sum(without) < 21


def test_accuracy_is_that_of_greedy_decoding():
    model, keys = Counter(), np.array([[12345, 12346, 23456], [12344, 12345, 12345]])

    def decode(tokens, count):
        table = np.asarray(model.table[...])
        for _ in range(count):
            tokens = [*tokens, int(table[tokens[-1]].argmax())]
        return tokens[-count:]

    by_hand = []
    for depth, row in zip((0, 1), keys, strict=True):
        prompts = [BYTES.build(270, depth, key) for key in row]
        by_hand.append(sum(decode(p[:-a].tolist(), a) == p[-a:].tolist() for p, a in prompts))
    assert measure(model, BYTES, 270, np.array([0, 1]), keys, batch_size=2).tolist() == by_hand == [1, 2]


def test_answers_of_different_lengths_are_judged_each_by_its_own(tokenizer_json):
    task = Passkey(load_tokenizer(str(tokenizer_json)))

    class Short(Oracle):
        """Is blind to all but the last two tokens of the prompt."""

        def hidden(self, tokens):
            following = jnp.where(jnp.arange(tokens.shape[1]) < tokens.shape[1] - 3, -1, jnp.roll(tokens, -1, axis=1))
            return jax.nn.one_hot(following, 400), None

    keys = np.array([[12345, 98765, 11111]])
    lengths = [task.build(200, 0, key)[1] for key in keys[0]]
    right = measure(Short(), task, 200, np.zeros(1), keys).tolist()
    assert right == [sum(length <= 2 for length in lengths)] and 0 < right[0] < 3


def test_keys_depend_on_the_seed_and_the_length_alone():
    settings = PasskeyConfig(depths=4, keys=5)
    keys = draw_keys(settings, 512)
    assert keys.shape == (4, 5) and keys.min() >= 10_000 and keys.max() <= 99_999
    np.testing.assert_array_equal(keys, draw_keys(settings, 512))
    assert (keys != draw_keys(settings, 1024)).any()
    assert (keys != draw_keys(PasskeyConfig(depths=4, keys=5, seed=1), 512)).any()


def test_progress_counts_every_token():
    seen = []
    measure(Oracle(), BYTES, 260, np.zeros(1), draw_keys(PasskeyConfig(1, 3), 260), batch_size=2, advance=seen.append)
    assert seen == [520, 260]


# What is written


SETTINGS = PasskeyConfig(depths=3, keys=4)


def some_runs():
    of = {encoding: Config(ModelConfig(encoding=encoding, train_length=300)) for encoding in ("nope", "learned")}
    nope = Run(Path("nope"), "nope", of["nope"], None, (300, 600))
    table = Run(Path("table"), "table", of["learned"], 300, (300, 600))
    nope.results.update({300: np.array([4, 4, 2]), 600: np.array([0, 1, 2])})
    table.results[300] = np.array([4, 4, 4])
    return [nope, table]


def test_table_gives_mean_and_worst_depth():
    assert rows(some_runs(), SETTINGS) == [
        ("nope", "nope", "300", "83 [55, 95] (50)", "25 [9, 53] (0)"),
        ("table", "learned", "300", "100 [76, 100] (100)", "cannot"),
    ]
    assert notes(some_runs(), SETTINGS)[0] == "table cannot read 600 tokens: its learned encoding has 300 positions."
    unfinished = some_runs()
    del unfinished[0].results[600]
    assert rows(unfinished, SETTINGS)[0][-1] == "-"


def test_picture_shows_depth_down_length_across_and_the_training_length(tmp_path):
    figure = draw(some_runs(), SETTINGS)
    save(tmp_path / "passkey.png", figure)
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    nope, table = figure.axes[:2]
    np.testing.assert_allclose(nope.images[0].get_array(), np.array([[4, 0], [4, 1], [2, 2]]) / 4)
    assert [tick.get_text() for tick in nope.get_yticklabels()] == ["0%", "50%", "100%"]
    assert [tick.get_text() for tick in nope.get_xticklabels()] == ["300", "600"]
    assert nope.lines[0].get_xdata() == [0.5, 0.5]
    assert "cannot" in {text.get_text() for text in table.texts}
    assert np.ma.getmaskarray(table.images[0].get_array())[:, 1].all()
    shares = figure.axes[-1]
    (line, _, (bars,)), (_, _, (one_bar,)) = shares.containers
    np.testing.assert_allclose(line.get_ydata(), [10 / 12, 3 / 12])
    intervals = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(intervals, [wilson_interval(10, 12), wilson_interval(3, 12)])
    assert len(one_bar.get_segments()) == 1 and "95 % interval" in shares.get_ylabel()


# The command line


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two untrained runs, as train.py leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    for encoding, seed in (("alibi", 0), ("learned", 1)):
        config = Config(
            ModelConfig(num_layers=1, num_heads=2, model_dim=8, encoding=encoding),
            DataConfig(source="task:passkey", context_length=260),
        )
        (folder / encoding).mkdir()
        configs.save(config, folder / encoding)
        with Checkpointer(folder / encoding) as checkpointer:
            checkpointer.save(0, {"params": nnx.state(drawn_model(config.model, seed))})
    return folder


@pytest.fixture
def evaluate(monkeypatch):
    """Runs eval.py with some words; returns its exit status."""
    return lambda *words: call_eval(monkeypatch, shlex.join(map(str, words)))


SMALL = ("--passkey.depths", 2, "--passkey.keys", 3, "--passkey.batch_size", 4)


@pytest.mark.usefixtures("stand_ins")
def test_command_line_measures_what_each_run_can_read(workdirs, tmp_path, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load_model", lambda workdir, mesh, **_: (None, Oracle(blind=ord("7")), 0))
    out = tmp_path / "a" / "b"
    folders = workdirs / "alibi", workdirs / "learned"
    assert evaluate("passkey", "--workdirs", *folders, "--lengths", 300, 260, 260, "--out", out, *SMALL) == 0
    assert {path.name for path in out.iterdir()} == {"passkey.csv", "passkey.png", "report.html", "sections"}
    with (out / "passkey.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == COLUMNS.split()
    measured = [("alibi", "260"), ("alibi", "300"), ("learned", "260")]
    assert [tuple(np.array(row)[[0, 3, 4]]) for row in table[1:]] == [
        (*run, depth) for run, depth in itertools.product(measured, "01")
    ]
    assert all(row[6] == "3" and float(row[7]) == pytest.approx(int(row[5]) / 3, abs=1e-5) for row in table[1:])
    for row in table[1:]:
        np.testing.assert_allclose([float(end) for end in row[8:]], wilson_interval(int(row[5]), 3), atol=1e-5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "learned cannot read 300 tokens: its learned encoding has 260 positions." in printed
    page = (out / "report.html").read_text()
    assert "Passkeys found" in page and "eval.py passkey --workdirs" in page and 'download="passkey.csv"' in page


@pytest.mark.usefixtures("stand_ins")
def test_a_model_that_knows_is_found_to_know(workdirs, tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr(trained, "load_model", lambda workdir, mesh, **_: (None, Oracle(), 0))
    words = ("--workdirs", workdirs / "alibi", "--lengths", 260, "--out", tmp_path, *SMALL)
    assert evaluate("passkey", *words) == 0
    lines = (tmp_path / "passkey.csv").read_text().splitlines()[1:]
    assert lines == ["alibi,alibi,260,260,0,3,3,1,0.438503,1", "alibi,alibi,260,260,1,3,3,1,0.438503,1"]


@pytest.mark.parametrize("stop", [pytest.param(KeyboardInterrupt, marks=pytest.mark.slow), ValueError])
def test_what_was_measured_before_it_stopped_is_kept(workdirs, tmp_path, monkeypatch, stop):
    def load(workdir, mesh, **_):
        if workdir.name == "learned":
            raise stop
        return load_model(workdir, mesh)

    monkeypatch.setattr(trained, "load_model", load)
    folders = workdirs / "alibi", workdirs / "learned"
    with pytest.raises(stop):
        evaluation.evaluate(
            "passkey", Options(folders, (260,), tmp_path / "out", {}, PasskeyConfig(2, 3, batch_size=4))
        )
    assert "alibi,alibi,260,260,0,0,3,0" in (tmp_path / "out" / "passkey.csv").read_text()
    assert "alibi" in (tmp_path / "out" / "report.html").read_text()


REFUSED = {
    "nowhere is not the workdir of a run": (["nowhere"], (260,), ()),
    "empty: no checkpoint yet": (["alibi", "empty"], (260,), ()),
    f"--lengths: 99 is too short for a passkey prompt and its answer, which take {SHORTEST} tokens": (
        ["alibi"],
        (260, 99),
        (),
    ),
    "learned reads none of them, its learned encoding has 260": (["alibi", "learned"], (300,), ()),
    "'bytes' has 256 tokens, but": (["small"], (260,), ()),
    "names": (["alibi", "alibi"], (260,), ()),
    "no file": (["alibi"], (260,), ("--data.tokenizer", "nowhere.json")),
    "--passkey.keys must be at least 1, not 0": (["alibi"], (260,), ("--passkey.keys", 0)),
    "did you mean --passkey.depths?": (["alibi"], (260,), ("--passkey.depth", 3)),
    "--lengths must be at least 1, not 0": (["alibi"], (0,), ()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(workdirs, tmp_path, evaluate, capsys, message):
    names, lengths, more = REFUSED[message]
    shutil.copytree(workdirs / "alibi", tmp_path / "small")
    configs.save(configs.override(configs.load(tmp_path / "small"), {"model.vocab_size": 99}), tmp_path / "small")
    (tmp_path / "empty").mkdir()
    shutil.copy(workdirs / "alibi" / "config.json", tmp_path / "empty")
    folders = [workdirs / run if (workdirs / run).exists() else tmp_path / run for run in names]
    words = ("--workdirs", *folders, "--lengths", *lengths, "--out", tmp_path / "out", *more)
    assert evaluate("passkey", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
