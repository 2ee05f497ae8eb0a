"""The tasks: every answer is found again by a solver that reads the source alone."""

import dataclasses
import json
import random
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax.compile.estimate import _abstract_batch
from nope_jax.config import Config, DataConfig, MeshConfig, override
from nope_jax.data import load_corpus, load_tokenizer, train_batches, validation_batches
from nope_jax.data.tasks import FORMATS, TASKS, Step, Task, encode, find_task, grade, passkey, register, scratchpad
from nope_jax.data.tasks import task as task_module
from nope_jax.data.tasks.addition import Addition
from nope_jax.data.tasks.lego import Chain, Lego
from nope_jax.data.tasks.parity import Parity
from nope_jax.data.tasks.pcfg import Pcfg
from nope_jax.data.tasks.polynomial import Polynomial
from nope_jax.data.tasks.scan import Scan, commands
from nope_jax.data.tasks.sort import Sort, SortIntegers
from nope_jax.data.tasks.summation import Summation
from nope_jax.data.tokenizers import WordTokenizer, tokenizer_digest
from nope_jax.sharding import make_mesh, place_batch
from nope_jax.training.step import num_targets, total_nll
from tests.support.drawn_model import drawn_model
from tests.support.task_solvers import SOLVERS, listed, solve_copy, solve_pcfg

NAMES = (
    "copy copy_2x copy_replaced copy_multi copy_multi_2x reverse reverse_2x reverse_mcrv addition summation parity "
    "polynomial sort sort_integers lego scan pcfg passkey"
)
LENGTHS = {"scan": (1, 5, 12, 25, 26, 48), "passkey": (300, 384, 999), "lego": (2, 3, 8, 16, 26)}
"""Lengths to make; others where nothing is said here."""
WITH_STEPS = ["addition", "summation", "parity", "polynomial", "sort", "sort_integers", "lego"]


def lengths_of(name: str) -> tuple[int, ...]:
    return LENGTHS.get(name, (2, 4, 8, 16, 21, 33))


MEASURES = {
    "addition": lambda source, _: max(len(n) for n in re.sub("[^0-9+]", "", source).split("+")),
    "summation": lambda source, _: len(re.findall("[0-9]", source)),
    "polynomial": lambda source, _: source.count("x **"),
    "lego": lambda source, _: source.count(" = "),
    "scan": lambda _, target: len(target.split()),
    "pcfg": lambda source, _: len(re.findall(r"\b[a-z_]{4,}\b", source)),
    "passkey": lambda source, target: len(source + target),
    **dict.fromkeys(["parity", "sort", "sort_integers"], lambda source, _: len(listed(source))),
    "copy_replaced": lambda _, target: len(target.split()),
}
"""What the length of a task counts."""


def test_the_tasks_are_those_promised():
    assert " ".join(TASKS) == NAMES
    assert set(SOLVERS) == set(TASKS)
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_a_solver_that_reads_the_source_finds_the_target(name):
    measure = MEASURES.get(name, lambda source, _: len(solve_copy(source)))
    for length in lengths_of(name):
        for index in range(10 if name != "passkey" else 2):
            for split in (None, "train", "test"):
                if split == "train" and name == "scan" and length > 25:
                    continue
                try:
                    source, target, _ = TASKS[name].example(seed=1, index=index, length=length, split=split)
                except ValueError as error:
                    assert (name, length) in [("parity", 2), ("scan", 1)] and f"in its {split} split" in str(error)
                    continue
                assert target == SOLVERS[name](source)
                assert measure(source, target) == length


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_a_function_of_its_arguments(name):
    task, length = TASKS[name], lengths_of(name)[2]
    texts = {task.example(seed, index, length)[:2] for seed in (0, 1, 2) for index in range(10)}
    assert len(texts) > 20  # other seeds, other examples
    random.seed(5)
    np.random.seed(5)
    assert task.example(1, 3, length) == task.example(1, 3, length)
    assert task.example(1, 3, length, scratchpad=False) == task.example(1, 3, length)._replace(scratchpad=())
    listed = list(task.examples(7, 30))
    assert listed == list(task.examples(7, 40))[:30] or name == "passkey"
    assert listed[0] != next(task.examples(8, 1))


def test_examples_are_the_same_on_every_machine():
    # What they are was drawn once; what they stay keeps the numbers of a study comparable.
    addition = "Compute 3 + 4 2 7 5 6 2 2 5 ? ", "The answer is 4 2 7 5 6 2 2 8."
    lego = "If o = - v, v = +1, f = - o. Then, what is the value of f? ", "The answer is +1."
    assert TASKS["addition"].example(seed=0, index=5, length=8)[:2] == addition
    assert TASKS["lego"].example(seed=3, index=0, length=3)[:2] == lego


@pytest.mark.parametrize("name", TASKS)
def test_no_instance_is_in_both_splits(name):
    task = TASKS[name]
    short = task.train_lengths[:4]
    train = {e.source for e in task.examples(0, 300, short, scratchpad=False)}
    test = {e.source for seed in (0, 1) for e in task.examples(seed, 100, short, split="test", scratchpad=False)}
    assert train and test and not train & test
    if name in ("copy_multi", "reverse", "sort_integers", "polynomial"):  # many instances: a tenth is held out
        drawn = random.Random(0)
        sources = (task.write(task.draw(drawn, 8))[0] for _ in range(2000))
        assert Counter(task.split(source, 8) for source in sources)["test"] == pytest.approx(200, abs=50)
        sources = (task.write(task.draw(drawn, 30))[0] for _ in range(200))  # and half of what nobody trains on
        assert Counter(task.split(source, 41) for source in sources)["test"] == pytest.approx(100, abs=40)


def test_lengths_are_those_of_the_paper_and_as_frequent():
    for name, task in TASKS.items():
        if name.startswith(("copy", "reverse")):
            assert (task.train_lengths, task.test_lengths) == (range(2, 21), range(21, 41))
        elif name not in ("scan", "passkey"):
            assert (task.train_lengths[-1], task.test_lengths) == (8, range(9, 17))
    sums = Counter(MEASURES["summation"](*e[:2]) for e in TASKS["summation"].examples(0, 4000, scratchpad=False))
    assert sums.keys() == set(range(1, 9)) and all(count == pytest.approx(500, abs=100) for count in sums.values())
    # Of additions, every pair of numbers of digits is as frequent.
    texts = [e.source.removeprefix("Compute ") for e in TASKS["addition"].examples(0, 6400, scratchpad=False)]
    pairs = Counter(tuple(len(re.findall("[0-9]", part)) for part in text.split("+")) for text in texts)
    assert len(pairs) == 64 and min(pairs.values()) > 50 and max(pairs.values()) < 160


@pytest.mark.parametrize(
    ("task", "instance", "text"),
    [
        (TASKS["copy_multi"], ["a", "b"], "Copy: a b [SEP] a b"),
        (TASKS["copy_2x"], ["a", "a"], "Copy: a a [SEP] a a a a"),
        (TASKS["copy_multi_2x"], ["a", "b"], "Copy: a b [SEP] a b [NEXT] a b"),
        (TASKS["copy_replaced"], [">", "6", "6", "6"], "Replace 6 with > in 6 6 6 [SEP] > > >"),
        (TASKS["reverse"], ["a", "b"], "Reverse: a b [SEP] b a"),
        (TASKS["reverse_2x"], ["a", "b"], "Reverse: a b [SEP] b a [NEXT] b a"),
        (TASKS["reverse_mcrv"], ["a", "b"], "Reverse: a b [SEP] b a [NEXT] a b"),
        (Addition(), (5372, 19), "Compute 5 3 7 2 + 1 9 ? The answer is 5 3 9 1."),
        (Summation(), [3, 8, 6], "Compute: 3 + 8 + 6 .[SEP] The answer is 7 ."),
        (Parity(), [0, 1, 1], "Is the number of 1's even in the sequence [ 0, 1, 1 ] ? The answer is Yes."),
        (
            Polynomial(),
            (-2, [(-2, 2), (3, 0)]),
            "Evaluate at x = - 2 in - 2 * x ** 2 + 3 * x ** 0 ? The answer is 5.",
        ),
        (Sort(), [48, 40, 41], "Sort the following list [ M, E, F ]. The sorted list is [ E, F, M ]."),
        (
            SortIntegers(),
            [2468, 881],
            "Sort the following list [ 2 4 6 8, 8 8 1 ]. The sorted list is [ 8 8 1, 2 4 6 8 ].",
        ),
        (
            Lego(),
            Chain(["q", "t"], [False, True], [0, 1], 1),
            "If q = -1, t = - q. Then, what is the value of t? The answer is +1.",
        ),
        (Scan(), ("walk after turn right", "Right Walk"), "Solve: walk after turn right[SEP] Right Walk"),
        (Pcfg(), ("copy Q10 E4", "Q10 E4"), "Solve: copy Q10 E4[SEP] Q10 E4"),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_texts_are_those_of_the_paper(task, instance, text):
    assert "".join(task.write(instance)) == text


# SCAN and PCFG


def test_scan_has_the_published_commands_and_split_sizes():
    lengths = Counter(map(len, commands().values()))
    assert sum(lengths.values()) == 20_910
    assert sum(count for length, count in lengths.items() if length <= 22) == 16_990
    assert sum(count for length, count in lengths.items() if length > 22) == 3_920
    assert max(lengths) == 48
    task = TASKS["scan"]
    assert {task.split(f"Solve: {c}[SEP] ", len(a)) for c, a in commands().items() if len(a) > 25} == {"test"}
    with pytest.raises(ValueError, match="task:scan has no instance of length 30 in its train split"):
        task.example(0, 0, 30, split="train")
    with pytest.raises(ValueError, match="task:scan has no instance of length 29 in its test split"):
        task.example(0, 0, 29)
    drawn = Counter(len(e.target.split()) for e in task.examples(0, 5000))  # as frequent as in the list of commands
    assert drawn[16] / 5000 == pytest.approx(lengths[16] / sum(lengths[n] for n in range(1, 26)), abs=0.02)


def test_the_example_of_the_published_pcfg():
    source = "echo append copy Q10 E4 S15 P7 , shift remove_second K15 D8 M9 W5 , H12 Q5 G10 J6 J10"
    assert solve_pcfg(f"Solve: {source}[SEP] ") == "Q10 E4 S15 P7 D8 M9 W5 K15 K15"
    assert TASKS["pcfg"].measure(source, "") == 5


def test_a_prepared_dataset_is_read(tmp_path):
    folders = {kind: tmp_path / kind for kind in ("jsonl", "tsv", "txt")}
    train = {f"{verb} twice and {other} left": f"I_{verb.upper()}" for verb in ("walk", "run") for other in ("a", "b")}
    test = {"look left": "I_TURN_LEFT I_LOOK", "walk twice and a left": "I_WALK"}
    for kind, folder in folders.items():
        folder.mkdir()
        for name, pairs in ("tasks_train_length", train), ("tasks_test_length", test):
            form = {
                "jsonl": lambda c, o: json.dumps({"source": c, "target": o, "category": 3}),
                "tsv": lambda c, o: f"{c}\t{o}",
                "txt": lambda c, o: f"IN: {c} OUT: {o}",
            }[kind]
            (folder / f"{name}.{kind}").write_text("".join(form(*pair) + "\n" for pair in pairs.items()))
        (folder / "README.txt").write_text("not data\n")
        scan = find_task(f"scan:{folder}")
        assert {e[:2] for e in scan.examples(0, 50)} <= {
            (f"Solve: {c}[SEP] ", o.removeprefix("I_").title()) for c, o in train.items() if c not in test
        }
        held_out = {e[:2] for e in scan.examples(0, 50, range(1, 3), split="test")}
        assert ("Solve: look left[SEP] ", "Left Look") in held_out
        assert ("Solve: walk twice and a left[SEP] ", "Walk") in held_out
    pcfg = tmp_path / "pcfg"
    pcfg.mkdir()
    (pcfg / "train.src").write_text("copy A1 B2\nreverse copy A1 B2\n")
    (pcfg / "train.tgt").write_text("A1 B2\nB2 A1\n")
    assert find_task(f"pcfg:{pcfg}").example(0, 0, 2)[:2] == ("Solve: reverse copy A1 B2[SEP] ", "B2 A1")
    (pcfg / "train.tgt").write_text("A1 B2\n")
    for path, message in [
        (pcfg, "train.src has 2 lines, but .*train.tgt has 1"),
        (tmp_path / "nowhere", "task:pcfg:.*nowhere must be a file or a folder of files train"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_task(f"pcfg:{path}")
    (tmp_path / "train.jsonl").write_text('{"source": "copy A1"}\n')
    with pytest.raises(ValueError, match="train.jsonl:1: it must be a JSON object with source and target"):
        find_task(f"pcfg:{tmp_path / 'train.jsonl'}")
    with pytest.raises(ValueError, match="task:copy is generated and reads no dataset"):
        find_task(f"copy:{tmp_path}")


# Scratchpads


@pytest.mark.parametrize(
    ("task", "instance", "format", "text"),
    [
        (
            Addition(),
            (57, 16),
            "full",
            "Thinking step by step:  in 7, 6 comp 7 + 6 + carry = 13 + 0 = 13 out 3 [ carry: 1 ] re 5 + 1  # "
            "in 5, 1 comp 5 + 1 + carry = 6 + 1 = 7 out 7 [ carry: 0 ] re  +   . Thus,  ",
        ),
        (
            Addition(),
            (9, 3),
            "no_computation",
            "Thinking step by step:  in 9, 3 out 2 [ carry: 1 ] re  +   # in 0, 0 out 1 [ carry: 0 ] re  +   . Thus,  ",
        ),
        (
            Summation(),
            [3, 8],
            "full",
            "Thinking step by step:  in 3 comp 3 + sum = 3 + 0 = out 3 [ sum: 3 = 3 ] re 8  # "
            "in 8 comp 8 + sum = 8 + 3 = out 1 1 [ sum: 1 1 = 1 ] re   . Thus,  ",
        ),
        (
            Parity(),
            [1, 0],
            "full",
            "Thinking step by step:  in 1 comp 1 ** par = 1 ** 0 out 1 [ par: 1 ] re [ 0 ]  # "
            "in 0 comp 0 ** par = 0 ** 1 out 1 [ par: 1 ] re [  ]  . Thus,  ",
        ),
        (
            Polynomial(),
            (-2, [(3, 3)]),
            "no_remaining",
            "Thinking step by step:  in 3 * x ** 3 comp 3 * - 2 ** 3 = 3 * - 8 out - 2 4 [ sum: 0 + - 2 4 = 6 ]  . "
            "Thus,  ",
        ),
        (
            Sort(),
            [48, 40],
            "full",
            "Thinking step by step:  in M comp The minimum of the unsorted portion out E re [ M ]  # "
            "in M comp The minimum of the unsorted portion out M re [  ]  . Thus,  ",
        ),
        (
            Lego(),
            Chain(["q", "t"], [False, True], [1, 0], 1),
            "full",
            "Thinking step by step:  in q comp  out -1 re t = - q  # in t comp - q = - -1 out +1 re   . Thus,  ",
        ),
        (Parity(), [1], "minimal", "Thinking step by step:  comp 1 ** par = 1 ** 0 out 1  . Thus,  "),
        (Parity(), [1], "none", ""),
    ],
)
def test_scratchpads_are_written_as_in_the_paper(task, instance, format, text):
    assert scratchpad.write(task.steps(instance), format) == text


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", WITH_STEPS)
def test_scratchpads_are_read_back(name, format):
    for index, length in enumerate((2, 5, 8, 16)):
        _, target, steps = TASKS[name].example(0, index, length)
        text = scratchpad.write(steps, format) + target
        kept = scratchpad.keep(steps, format)
        assert scratchpad.parse(text) == ((kept, target) if kept else None)
        assert grade(text, target, steps, format) == (True, True)
        assert grade(text + " ", target, steps, format) == (True, True)
        assert not grade(text + "1", target, steps, format).answer


MALFORMED = {
    "": "",
    "no beginning": "in 1 comp 1 out 1 . Thus,  The answer is 1.",
    "no end": "Thinking step by step:  in 1 comp 1 out 1 The answer is 1.",
    "no step": "Thinking step by step:   . Thus,  The answer is 1.",
    "empty step": "Thinking step by step:  in 1 out 1  #  # in 1 out 1  . Thus,  The answer is 1.",
    "another order": "Thinking step by step:  out 1 in 1  . Thus,  The answer is 1.",
    "a bracket": "Thinking step by step:  in 1 [ par: 1 re 2  . Thus,  The answer is 1.",
    "noise": "# # ] [ Thus, out in re comp \ud800 \0",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_scratchpad_is_wrong(text):
    steps = TASKS["parity"].steps([1, 0])
    for format in FORMATS:
        assert grade(text, "The answer is 1.", steps, format) == (False, False)


def test_a_wrong_step_before_the_right_answer_is_told_from_a_right_one():
    _, target, steps = TASKS["parity"].example(0, 0, 4)
    wrong = [steps[0]._replace(output="7"), *steps[1:]]
    assert grade(scratchpad.write(wrong, "full") + target, target, steps, "full") == (True, False)
    assert grade(scratchpad.write(wrong, "full") + target, target, steps, "no_output") == (False, False)
    with pytest.raises(ValueError, match="format must be one of none, full, .*, not 'half'"):
        scratchpad.write(steps, "half")
    assert scratchpad.keep([Step("1", "2", "3", "4", "5")], "minimal") == (Step(None, "2", "3"),)


# Tokens


@pytest.mark.parametrize("name", [name for name in TASKS if name != "passkey"])
def test_the_words_of_a_task_write_all_its_texts(name):
    tokenizer = load_tokenizer(f"task:{name}")
    assert isinstance(tokenizer, WordTokenizer)
    task = TASKS[name]
    for length in lengths_of(name):
        for index in range(5):
            example = task.example(2, index, length, split="test" if name == "scan" and length > 25 else None)
            for format in FORMATS if example.scratchpad else ["none"]:
                target = scratchpad.write(example.scratchpad, format) + example.target
                tokens, start = encode(tokenizer, example.source, target)
                assert tokens.max() < tokenizer.vocab_size
                assert tokenizer.decode(tokens) == example.source + target
                assert tokenizer.decode(tokens[:start]) == example.source.rstrip(" ")
        if name.startswith(("copy", "reverse")):
            assert all(f" {symbol}" in tokenizer.words for symbol in task.symbols)
    assert tokenizer_digest(f"task:{name}") == tokenizer_digest(f"task:{name}")
    assert tokenizer_digest("task:copy") != tokenizer_digest("task:addition")


def test_bytes_tell_the_source_from_the_target():
    tokens, start = encode(load_tokenizer("bytes"), "Copy: a [SEP] ", "a")
    assert bytes(tokens[:start].tolist()) == b"Copy: a [SEP] "


# Training


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(task_module, "EXAMPLES", {"train": 300, "test": 40})
    monkeypatch.setattr(passkey, "DOCUMENTS", {"train": 40, "validation": 40})


def data(name: str = "addition", **changes) -> DataConfig:
    fields = {"source": f"task:{name}", "tokenizer": f"task:{name}", "context_length": 64, "batch_size": 4} | changes
    return DataConfig(**fields)


@pytest.mark.parametrize(
    ("packed", "bos"),
    [
        (True, True),
        (False, False),
        *(pytest.param(packed, not packed, marks=pytest.mark.slow) for packed in (True, False)),
    ],
)
def test_rows_hold_whole_examples_of_which_only_the_target_counts(packed, bos):
    config = data(document_mask=packed, bos=bos)
    tokenizer = load_tokenizer(config.tokenizer)
    expected = {e.source.rstrip(" "): " " + e.target for e in TASKS["addition"].examples(0, 300, scratchpad=False)}
    seen, shared = set(), 0
    batches = train_batches(config)
    for _ in range(40):
        batch = next(batches)
        for row in range(4):
            tokens, targets, positions, segments, mask = (None if x is None else x[row] for x in batch)
            assert (positions is None) == (not packed)
            for segment in set(segments.tolist()) - {0} if packed else [1]:
                inside = segments == segment if packed else np.arange(64) < np.flatnonzero(targets == 0)[0] + 1
                text = tokens[inside][1:] if bos else tokens[inside]
                assert (tokens[inside][0] == tokenizer.bos) == bos
                source = tokenizer.decode(text[: len(text) + 1 - mask[inside].sum()])
                answer = tokenizer.decode(targets[inside & mask])
                assert expected[source] + "</s>" == answer
                np.testing.assert_array_equal(tokens[inside][1:], targets[inside][:-1])
                if packed:
                    np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                seen.add(source)
            if packed:
                assert not mask[segments == 0].any()
                shared += segments.max() > 1
    assert len(seen) > 150 and shared >= 100 * packed
    shares = [next(train_batches(config, start_step=39, process_index=host, process_count=2)) for host in (0, 1)]
    for *parts, whole in zip(*shares, batch, strict=True):
        if whole is None:
            assert parts == [None, None]
        else:
            np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["addition", "passkey"])
def test_a_program_is_compiled_ahead_for_the_batches_of_a_task(name):
    config = data(name, tokenizer="bytes", context_length=400, document_mask=True)
    mesh = make_mesh(MeshConfig())
    expected = _abstract_batch(Config(data=config), mesh)
    with jax.set_mesh(mesh):
        batch = place_batch(next(train_batches(config)), mesh)
    assert jax.tree.map(lambda array: (array.shape, array.dtype, array.sharding), batch) == jax.tree.map(
        lambda array: (array.shape, array.dtype, array.sharding), expected
    )
    assert (batch.loss_mask is None) == (name == "passkey")


def test_validation_is_held_out_and_the_same_for_every_seed():
    tokenizer = load_tokenizer("task:addition")
    corpora = [load_corpus(data(seed=seed), split) for seed in (0, 1) for split in ("train", "validation")]
    train, validation, other, same = ({tokenizer.decode(c[i]) for i in range(len(c))} for c in corpora)
    assert validation == same and train != other and not (train | other) & validation
    assert corpora[0].digest() != corpora[2].digest() and corpora[1].digest() == corpora[3].digest()
    moved = dataclasses.replace(corpora[0], answers=corpora[0].answers + 1)
    assert moved.digest() != corpora[0].digest()
    (batch,) = validation_batches(data(document_mask=True), 1)
    assert batch.loss_mask.any(axis=1).all()


def test_the_loss_is_that_of_the_answers_alone_packed_or_not():
    config = data(document_mask=True, context_length=96)
    model = ModelConfig(vocab_size=48, num_layers=1, num_heads=2, model_dim=16, encoding="nope", train_length=96)
    graphdef, params = nnx.split(drawn_model(model))
    (packed,) = validation_batches(config, 1)
    (alone,) = validation_batches(dataclasses.replace(config, document_mask=False, batch_size=40), 1)
    loss = jax.jit(lambda batch: total_nll(graphdef, params, batch))

    def per_example(batch, row, inside):
        mask = np.zeros_like(batch.loss_mask)
        mask[row, inside] = batch.loss_mask[row, inside]
        return float(loss(batch._replace(loss_mask=mask)))

    # The first example of the first packed row is some row by itself, with the same loss.
    inside = packed.segment_ids[0] == 2
    (same,) = [row for row in range(40) if np.array_equal(alone.tokens[row, : inside.sum()], packed.tokens[0, inside])][
        :1
    ]
    np.testing.assert_allclose(per_example(packed, 0, inside), per_example(alone, same, slice(None)), rtol=1e-5)
    assert float(loss(packed)) == pytest.approx(
        sum(per_example(packed, row, slice(None)) for row in range(4)), rel=1e-5
    )
    assert int(num_targets(packed)) == packed.loss_mask.sum() and num_targets(packed._replace(loss_mask=None)) == 4 * 96
    # What is not counted has no effect on the loss.
    changed = packed._replace(targets=np.where(packed.loss_mask, packed.targets, 7))
    assert float(loss(changed)) == float(loss(packed))
    assert jnp.isfinite(loss(packed))


def test_scratchpads_and_lengths_are_settings_of_a_run():
    tokenizer = load_tokenizer("task:parity")
    corpus = load_corpus(data("parity", context_length=999, scratchpad="minimal", lengths=(4, 5)), "train")
    texts = [tokenizer.decode(corpus[i]) for i in range(20)]
    assert all(" Thinking step by step:  comp " in text and ". Thus,  The answer is" in text for text in texts)
    assert {text.split("]")[0].count(",") for text in texts} == {3, 4}
    start = int(corpus.answers[0])
    assert tokenizer.decode(corpus[0][start:]).startswith(" Thinking")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "task:adition"}, "data.source: unknown task 'adition': did you mean 'addition'"),
        ({"source": "task:zzz"}, "data.source: unknown task 'zzz': it must be one of copy, copy_2x, .*, passkey"),
        ({"tokenizer": "task:adition"}, "data.tokenizer: unknown task 'adition': did you mean 'addition'"),
        ({"tokenizer": "task:passkey"}, "data.tokenizer task:passkey: this task has no words of its own; bytes can"),
        ({"tokenizer": "task:copy"}, "data.tokenizer task:copy has no word 'Compute'"),
        (
            {"context_length": 20},
            "data.context_length 20 is too short for data.source task:addition: its longest .* takes 32",
        ),
        ({"source": "task:lego", "lengths": (1, 4)}, "task:lego has lengths 2 to 26, not 1"),
        ({"source": "task:lego", "lengths": (4, 40)}, "task:lego has lengths 2 to 26, not 27"),
        ({"source": "task:copy", "scratchpad": "full"}, "data.scratchpad full: task:copy has no scratchpad"),
        ({"source": "task:passkey", "scratchpad": "full"}, "data.scratchpad and data.lengths are not for task:passkey"),
        ({"source": "task:scan", "lengths": (26, 30)}, "task:scan has no instance of lengths 26 to 30 in its train"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        next(train_batches(data(**changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.lengths": (3, 2)}, "data.lengths must be the shortest and the longest length of a task, .* not 3 2"),
        ({"data.lengths": (3,)}, "data.lengths must be the shortest and the longest"),
        ({"data.lengths": (0, 3)}, "data.lengths must be the shortest and the longest"),
        ({"data.scratchpad": "half"}, "data.scratchpad must be one of none, full"),
        ({"data.source": "python_stdlib", "data.lengths": (1, 2)}, r"data.lengths .* is for sources task:, not for"),
        ({"data.source": "text:a", "data.scratchpad": "full"}, "data.scratchpad 'full' is for sources task:, not for"),
    ],
)
def test_what_a_config_cannot_say_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        override(Config(data=data()), changes)


def test_the_formats_of_a_config_are_all_formats():
    for format in FORMATS:
        assert override(Config(data=data()), {"data.scratchpad": format}).data.scratchpad == format


def test_a_task_of_ones_own_is_one_class(monkeypatch):
    import nope_jax.data.tasks as package

    monkeypatch.setattr(package, "TASKS", dict(TASKS))
    lines = package.__doc__.splitlines()
    code = "\n".join(line[4:] for line in lines[lines.index("    class Maximum(Task):") :] if line.startswith("    "))
    assert len(code.splitlines()) <= 20
    scope = {"Task": Task, "register": register, "random": random}
    exec(code, scope)
    example = package.TASKS["maximum"].example(seed=0, index=0, length=5)
    digits = [int(word) for word in example.source.split() if word.isdigit()]
    assert len(digits) == 5 and example.target == f"It is {max(digits)}."
    (batch,) = validation_batches(data("maximum", document_mask=True), 1)
    assert batch.loss_mask.sum() == 5 * batch.segment_ids.max(axis=1).sum()  # It, is, the digit, ".", </s>


def test_a_length_that_cannot_be_made_is_refused():
    for name, length, message in [
        ("lego", 27, "task:lego has lengths 2 to 26, not 27"),
        ("copy", 0, "task:copy has lengths 1 or more, not 0"),
        ("passkey", 9, "task:passkey has lengths .* to .*, not 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            TASKS[name].example(0, 0, length)
    with pytest.raises(ValueError, match="index must be at least 0, not -1"):
        TASKS["copy"].example(0, -1, 3)
    assert passkey.PasskeyTask.lengths[0] == len(
        "".join(TASKS["passkey"].example(0, 0, passkey.PasskeyTask.lengths[0])[:2])
    )
