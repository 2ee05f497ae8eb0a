"""eval.py tasks: what counts as right, which questions are asked, and what a tiny trained model answers."""

import csv
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig, trained
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import TASKS, Task, scratchpad
from nope_jax.data.tasks import task as task_module
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.tasks import answers as answers_module
from nope_jax.evaluation.tasks.answers import ask, measure
from nope_jax.evaluation.tasks.ranks import mean_reciprocal_ranks
from nope_jax.training import train
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

LETTERS = [chr(97 + i) for i in range(26)]


class Say(Task):
    """Say the only letter; longer texts say it more often."""

    name = "say"
    train_lengths = range(1, 4)
    test_lengths = range(4, 6)
    lengths = range(1, 100)
    vocabulary = f"Say {' '.join(LETTERS)} ? It is."

    def draw(self, rng, length):
        return rng.choice(LETTERS), length

    def write(self, instance):
        letter, length = instance
        return f"Say {' '.join([letter] * length)} ?", f" It is {letter}"

    def split(self, source, length):
        return "test" if (ord(source[4]) + length) % 3 == 0 else "train"


def oracle(task, tokenizer, change=lambda target: target, format="none"):
    """A model, and what stands for `generate`: it knows every answer, changed by a function of the target."""
    known = {}

    def generate(model, prompts, new, *, stop_tokens, prompt_lengths):
        texts = np.zeros((len(prompts), prompts.shape[1] + new), int)
        for text, prompt, length in zip(texts, prompts, prompt_lengths, strict=True):
            assert model.max_length is None or prompt_lengths.max() + new - 1 <= model.max_length
            answer = tokenizer.encode(change(known[tokenizer.decode(prompt[:length])]))[:new]
            text[:length] = prompt[:length]
            text[length : length + len(answer)] = answer
            text[length + len(answer) : length + new] = stop_tokens[0]
        return texts

    def learn(questions):
        for question in questions:
            example = question.example
            source = tokenizer.decode(question.prompt)
            whole = example.source + scratchpad.write(example.scratchpad, format) + example.target
            known[source] = whole.removeprefix(source)
        return questions

    return generate, learn


def graded(monkeypatch, name, length, change=lambda target: target, format="none", max_length=None):
    task, tokenizer = TASKS[name], load_tokenizer("bytes")
    generate, learn = oracle(task, tokenizer, change, format)
    monkeypatch.setattr(answers_module, "generate", generate)
    questions = learn(ask(task, tokenizer, "bytes", length, format=format, bos=None, seed=0, count=20))
    model = SimpleNamespace(max_length=max_length and max(question.positions for question in questions))
    return measure(model, tokenizer, questions, format=format, batch_size=8)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["copy", "addition", "scan", "pcfg", "sort"])
def test_one_who_knows_the_answers_is_right_and_one_who_adds_to_them_is_wrong(monkeypatch, name):
    length = TASKS[name].test_lengths[1]
    assert graded(monkeypatch, name, length).right.all()
    # A table of positions that just holds the longest question needs batches of questions that fit together.
    assert graded(monkeypatch, name, length, max_length=True).right.all()
    longer = graded(monkeypatch, name, length, lambda target: target + " x")
    assert not longer.right.any() and longer.right.size > 10
    assert not graded(monkeypatch, name, length, lambda target: target[:-1]).right.any()


@pytest.mark.usefixtures("stand_ins")
def test_the_answer_after_a_scratchpad_counts_and_a_malformed_one_is_wrong(monkeypatch):
    right = graded(monkeypatch, "addition", 9, format="full")
    assert right.right.all() and right.scratchpad.all()
    wrong_step = graded(monkeypatch, "addition", 9, lambda t: t.replace("carry: ", "carry; ", 1), "full")
    assert wrong_step.right.all() and not wrong_step.scratchpad.any()
    for malformed in (lambda t: t.replace(" . Thus", ""), lambda t: t[40:], lambda t: "\xff" * 9, lambda t: ""):
        answers = graded(monkeypatch, "addition", 9, malformed, "full")
        assert not answers.right.any() and not answers.scratchpad.any()


@pytest.mark.usefixtures("stand_ins")
def test_text_that_does_not_end_or_is_no_text_is_wrong(monkeypatch):
    tokenizer = load_tokenizer("task:copy")
    questions = ask(TASKS["copy"], tokenizer, "task:copy", 5, format="none", bos=None, seed=0, count=9)

    def endless(model, prompts, new, **_):
        return np.pad(prompts, [(0, 0), (0, new)], constant_values=tokenizer.vocab_size - 1)

    def no_word(model, prompts, new, **_):
        return np.pad(prompts, [(0, 0), (0, new)], constant_values=((0, 0), (0, tokenizer.vocab_size + 3)))

    for generate in (endless, no_word):
        monkeypatch.setattr(answers_module, "generate", generate)
        assert not measure(SimpleNamespace(max_length=None), tokenizer, questions).right.any()


def test_questions_are_different_held_out_and_those_of_their_seed():
    task, tokenizer = TASKS["parity"], load_tokenizer("bytes")

    def asked(seed, length=8):
        return ask(task, tokenizer, "bytes", length, format="none", bos=None, seed=seed, count=60)

    sources = [question.example.source for question in asked(0)]
    assert len(set(sources)) == len(sources) < 60  # a tenth of 2^8 sequences
    assert all(task.split(source, 8) == "test" for source in sources)
    assert sources == [question.example.source for question in asked(0)]
    assert [q.example.source for q in asked(1, 16)] != [q.example.source for q in asked(0, 16)]


def test_reciprocal_ranks_are_those_of_the_papers_code():
    # As pandas' rank(method="first", ascending=False), then the mean of 1/rank: equal scores go by order.
    scores = {"a": {1: 0.5, 2: 0.2, 3: 1.0}, "b": {1: 0.5, 2: 0.9}, "c": {1: 0.7, 2: 0.2, 3: 0.0}}
    ranks, cells = mean_reciprocal_ranks(scores)
    assert cells == 2  # b has no third
    assert ranks == pytest.approx({"a": (1 / 2 + 1 / 2) / 2, "b": (1 / 3 + 1) / 2, "c": (1 + 1 / 3) / 2})
    assert mean_reciprocal_ranks({"a": {1: 0.5}, "b": {}}) == ({}, 0)


def one_who_says_it(config):
    """A decoder that says the letter, by weights made by hand, all of them 0 but for these.

    Its residual stream has a dimension for each token. Attention is even, and adds a share of each letter that was
    seen. The last token decides what kind of token is next, and the shares decide which letter.
    """
    tokenizer = load_tokenizer("task:say")
    _, *letters, question, it, verb, _ = tokenizer.encode(Say.vocabulary)
    tokens = np.eye(config.vocab_size, dtype=np.float32)
    seen, following = np.zeros_like(tokens), np.zeros_like(tokens)
    seen[letters, letters] = following[letters, letters] = following[question, it] = following[it, verb] = 1
    following[verb, letters], following[letters, tokenizer.separator] = 1, 2
    model = drawn_model(config)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    made = [(model.embedding, tokens), (attention.value, seen), (attention.out, 0.1 * tokens), (model.head, following)]
    for parameter, values in [*made, (attention.query, np.float32(0)), (mlp.down, np.float32(0))]:
        parameter[...] = jnp.asarray(np.resize(values, parameter.shape))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that knows how to say the letter, one that does not, the config of a short one, and one trained on text."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "say", Say())
        config = Config(
            ModelConfig(vocab_size=64, num_layers=1, num_heads=1, model_dim=64, mlp_dim=16),
            DataConfig(source="task:say", tokenizer="task:say", context_length=8),
        )
        for name, model in {"nope": one_who_says_it(config.model), "untrained": drawn_model(config.model)}.items():
            (folder / name).mkdir()
            configs.save(config, folder / name)
            with Checkpointer(folder / name) as checkpointer:
                checkpointer.save(0, {"params": nnx.state(model)})
        write_documents(folder, 4)
        write_run(folder, "on_text")
        copy_run(folder / "nope", folder / "short", {"model.encoding": "learned", "model.train_length": 9})
    return folder


def silent(model, prompts, new, **_):
    return np.pad(prompts, [(0, 0), (0, new)])


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_trained_model_is_right_at_every_length(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "say", Say())
    monkeypatch.setitem(task_module.EXAMPLES, "train", 400)
    monkeypatch.setitem(task_module.EXAMPLES, "test", 40)
    config = Config(
        ModelConfig(vocab_size=64, num_layers=2, num_heads=2, model_dim=32, mlp_dim=32),
        DataConfig(source="task:say", tokenizer="task:say", context_length=8, batch_size=16),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        TrainConfig(steps=150, checkpoint_every=150, eval_every=150, eval_batches=1),
    )
    train(config, tmp_path / "nope")
    assert call_eval(monkeypatch, f"tasks --workdirs {tmp_path}/nope --out {tmp_path}/out --tasks.examples 30") == 0
    rows = table(tmp_path / "out" / "tasks.csv")
    assert len(rows) == 5 and all(row["correct"] == row["examples"] for row in rows)


def test_who_knows_the_answers_is_right_at_every_length_and_interrupted_keeps_its_results(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(TASKS, "say", Say())
    words = f"tasks --workdirs {runs}/nope {runs}/untrained --out {tmp_path} --tasks.examples 30"
    measured = []

    def stopped(*arguments, **options):
        measured.append(arguments)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr("nope_jax.evaluation.tasks.measure", stopped)
    assert call_eval(monkeypatch, words) == 130
    assert [row["length"] for row in table(tmp_path / "tasks.csv")] == ["1", "2", "3"]
    assert "Not measured at all lengths yet: nope" in " ".join(capsys.readouterr().out.split())
    assert call_eval(monkeypatch, words, pictures=True) == 0
    assert len(measured) == 4 + 2 + 5  # three lengths of the first run were kept
    rows = table(tmp_path / "tasks.csv")
    knowing, other = ([row for row in rows if row["run"] == name] for name in ("nope", "untrained"))
    assert [(row["length"], row["distribution"]) for row in knowing] == [
        ("1", "in"), ("2", "in"), ("3", "in"), ("4", "out"), ("5", "out"),
    ]  # fmt: skip
    for row in knowing:
        count = int(row["examples"])
        assert row["correct"] == row["examples"] and 8 <= count <= 9
        low, high = wilson_interval(count, count)
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == pytest.approx((low, high), rel=1e-5)
    assert [row["correct"] for row in other] == ["0"] * 5
    page = (tmp_path / "report.html").read_text()
    assert "tasks.png" not in page and "data:image/png" in page
    # Another number of examples is other questions: nothing kept is used for them.
    assert call_eval(monkeypatch, words.replace("30", "1")) == 0
    assert len(measured) == 11 + 10


@pytest.mark.usefixtures("stand_ins")
def test_encodings_are_ranked_and_not_asked_what_has_more_tokens_than_they_have_positions(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(TASKS, "say", Say())
    *_, it, verb, _ = load_tokenizer("task:say").encode(Say.vocabulary)

    def generate(model, prompts, new, *, stop_tokens, prompt_lengths):
        texts = silent(model, prompts, new)
        for text, length in zip(texts, prompt_lengths, strict=True) if model.max_length is None else ():
            text[length : length + 4] = it, verb, text[1], stop_tokens[0]
        return texts

    monkeypatch.setattr(answers_module, "generate", generate)
    positions = {"nope": None, "short": 9}
    monkeypatch.setattr(
        trained, "load_model", lambda workdir, mesh, **_: (None, SimpleNamespace(max_length=positions[workdir.name]), 0)
    )
    words = f"tasks --workdirs {runs}/nope {runs}/short --out {tmp_path} --tasks.examples 30"
    assert call_eval(monkeypatch, words) == 0
    rows = table(tmp_path / "tasks.csv")[5:]
    assert [row["correct"] for row in rows] == ["0"] * 4 + [""] and int(rows[4]["examples"]) >= 8
    said = " ".join(capsys.readouterr().out.split())
    assert "short cannot be asked say of lengths 5: its learned encoding has 9 positions" in said
    assert "Mean reciprocal ranks" in said and "1 of 1 cells" in said
    assert "nope</td><td>1.000</td><td>0.687" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "tasks --workdirs on_text",
            "error: --tasks.task must name a task, because on_text was trained on data.source text:",
        ),
        ("tasks --workdirs nope --tasks.task sya", "error: --tasks.task: unknown task 'sya': did you mean 'say'?"),
        ("tasks --workdirs nope --tasks.task passkey", "eval.py passkey measures it"),
        ("tasks --workdirs nope --lengths 100", "error: --lengths: task:say has lengths 1 to 99, not 100"),
        ("tasks --workdirs short --lengths 9", "short can be asked none of them: its learned encoding has 9"),
        ("tasks --workdirs nope --tasks.task copy", "error: data.tokenizer task:say has no word"),
        (
            "tasks --workdirs on_text --tasks.task scan --lengths 41",
            "--lengths: task:scan has no instance of length 41",
        ),
        ("tasks --workdirs nope --tasks.examples 0", "error: --tasks.examples must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_asked_is_one_line(runs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setitem(TASKS, "say", Say())
    for name in ("nope", "on_text", "short"):
        words = words.replace(f"--workdirs {name}", f"--workdirs {runs}/{name}")
    assert call_eval(monkeypatch, f"{words} --out {tmp_path}") == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_run_on_text_is_asked_a_task(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "generate", silent)
    words = f"tasks --workdirs {runs}/on_text --tasks.task addition --lengths 2 9 --tasks.examples 3 --out {tmp_path}"
    assert call_eval(monkeypatch, words) == 0
    assert [(row["task"], row["distribution"]) for row in table(tmp_path / "tasks.csv")] == [
        ("addition", "in"), ("addition", "out"),
    ]  # fmt: skip


def test_a_run_says_its_lengths_and_its_scratchpad(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "say", Say())
    copy_run(runs / "nope", tmp_path / "run", {"data.lengths": (1, 2)})
    assert call_eval(monkeypatch, f"tasks --workdirs {tmp_path}/run --lengths 2 3 --out {tmp_path}/out") == 0
    assert [row["distribution"] for row in table(tmp_path / "out" / "tasks.csv")] == ["in", "out"]
    copy_run(runs / "nope", tmp_path / "steps", {"data.scratchpad": "full"})
    capsys.readouterr()
    assert call_eval(monkeypatch, f"tasks --workdirs {tmp_path}/steps --out {tmp_path}/out") == 2
    assert capsys.readouterr().err == "error: data.scratchpad full: task:say has no scratchpad\n"
