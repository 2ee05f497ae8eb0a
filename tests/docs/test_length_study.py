"""The length study: its runs fit their rows, it goes on where it was killed, and its page says what there is."""

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.length_study import answers, cost, page, study
from benchmarks.length_study.answers import ANSWERS, Answers, Row, merge, read, read_of
from nope_jax.config import load, load_file
from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import TASKS, encode, scratchpad
from nope_jax.evaluation.tasks import COLUMNS
from nope_jax.training.together import check_alike

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", study.SIZES)
def test_the_study_has_every_model_once_in_groups_that_train_together(name):
    size = study.SIZES[name]
    base = load_file(size.config)
    groups = [cases for cases in size.groups(study.TASK_NAMES, study.FORMATS, study.ENCODINGS) if cases]
    cases = [case for group in groups for case in group]
    assert set(study.TASK_NAMES) == set(TASKS) - {"passkey"}
    assert len(cases) == len({case.name for case in cases})
    assert sum(case.format == "none" for case in cases) == 17 * 6 * 3
    assert {(case.task, case.format) for case in cases} >= {("addition", name) for name in study.FORMATS}
    assert max(map(len, groups)) <= size.together
    # All models of a part come before the next part.
    order = [case.part for case in cases]
    assert [part for part, before in zip(order, [None, *order], strict=False) if part is not before] == [*size.parts]
    for group in groups[:3]:
        check_alike([(case.config(base), case.name) for case in group])


def longest(case):
    """The tokens of the longest of some examples of a case's training."""
    task, tokenizer = TASKS[case.task], load_tokenizer(f"task:{case.task}")
    length, found = task.train_lengths[-1], 0
    for index in range(30):
        example = task.example(0, index, length, split="train", scratchpad=case.format != "none")
        text = scratchpad.write(example.scratchpad, case.format) + example.target
        found = max(found, len(encode(tokenizer, example.source, text)[0]))
    return found


def test_rows_hold_the_examples():
    parts = dict.fromkeys(part for size in study.SIZES.values() for part in size.parts)
    for part in parts:
        for case in part.cases(["nope"])[:: len(study.SEEDS)]:
            assert load_tokenizer(f"task:{case.task}").vocab_size <= part.vocab
            assert longest(case) <= part.context, case


def test_the_recipe_is_the_papers():
    for size in study.SIZES.values():
        base = load_file(size.config)
        config = size.parts[-1].cases(["rope"])[-1].config(base)
        optimizer, rope = config.optimizer, config.model.encoding
        assert (optimizer.name, optimizer.schedule, optimizer.floor, optimizer.weight_decay) == (
            "adamw",
            "linear",
            0.0,
            0.05,
        )
        assert optimizer.warmup_steps == study.WARMUP * config.train.steps
        assert rope.interleaved and 4 * rope.rotary_dim == config.model.model_dim // config.model.num_heads
        assert config.model.train_length == config.data.context_length
        fewer = size.parts[0].cases(["nope"])[0].config(base, 100)
        assert (fewer.train.steps, fewer.optimizer.warmup_steps) == (100, 6)
    paper = load_file(study.SIZES["paper"].config)
    assert (paper.optimizer.learning_rate, paper.data.batch_size, paper.train.steps) == (3e-5, 64, 40_000)
    assert not paper.data.document_mask


def config_of(task="copy", format="none", steps=None):
    """The config of a model without positional encoding of the small study."""
    part = study.WITHOUT_SCRATCHPAD[0]
    return study.Case(part, format, task, "nope", 0).config(load_file(study.SIZES["small"].config), steps)


def row(encoding="nope", seed=0, length=2, distribution="in", examples=4, correct=4, date="2026-11-22", hardware="a"):
    return Row(encoding, seed, length, distribution, examples, correct, date, hardware)


def asked(folder, task, encoding, seed, correct, format="none", within=4, **made):
    """Write the answers of a model at two lengths."""
    rows = [
        row(encoding, seed, length, distribution, correct=right, **made)
        for length, distribution, right in ((2, "in", within), (21, "out", correct))
    ]
    merge(folder / f"{task}-{format}", config_of(task, format), rows)


def test_the_page_has_the_numbers_the_ranks_and_what_is_missing(tmp_path):
    for seed in range(3):
        for encoding, correct in (("nope", 3), ("t5", 2), ("alibi", 1), ("rope", 0), ("sinusoidal", 0)):
            asked(tmp_path, "copy", encoding, seed, correct)
    asked(tmp_path, "copy", "learned", 0, None)
    asked(tmp_path, "addition", "nope", 1, 1, format="full", within=2)
    where = tmp_path / "page.md"
    where.write_text(f"the old page\n{page.BEGIN}\nso many hours\n{page.END}\n")
    cases = [("copy", "none"), ("scan", "none"), ("addition", "full"), ("addition", "minimal")]
    encodings = [*page.PAPER_RANKS, "learned"]
    page.write(where, tmp_path, "make it", cases, encodings)
    text = where.read_text()
    lines = text.splitlines()
    assert "**Incomplete**: 17 of its 72 runs are here." in lines
    assert (
        "Missing in part: copy (learned: 2 of 3 seeds); addition with scratchpad full (nope: 2 of 3 seeds, "
        "t5: 3 of 3 seeds, alibi: 3 of 3 seeds, rope: 3 of 3 seeds, sinusoidal: 3 of 3 seeds, learned: 3 of 3 seeds)."
    ) in lines
    assert "Missing without a scratchpad: scan." in lines and "Missing with scratchpads: addition (minimal)." in lines
    # RoPE and sinusoidal tie: the one listed first ranks higher, or both get the mean of 1/4 and 1/5, and of 1/6 too
    # where learned positions fail as well.
    assert "| rope | 0.330 | 0.250 | 0.225 | 0.206 |" in lines
    assert "| sinusoidal | 0.215 | 0.200 | 0.225 | 0.206 |" in lines
    assert "| nope | 0.687 | 1.000 | 1.000 | 1.000 |" in lines and "| learned |  |  |  | 0.206 |" in lines
    assert "| rope ranks above sinusoidal | 0.330, 0.215 | 0.225, 0.225 | **no** |" in lines
    assert "| nope ranks above t5 | 0.687, 0.549 | 1.000, 0.500 | yes |" in lines
    assert any(line.startswith("| copy: nope is best past the lengths of training |") for line in lines)
    row = next(line for line in lines if line.startswith("| copy | 100.0"))
    assert row.startswith("| copy | 100.0 / 75.0 [98.6] | 100.0 / 50.0 [77.1] |") and row.endswith("| 100.0 / 0.0 |")
    assert next(line for line in lines if line.startswith("| scan |")).startswith("| scan | missing [79.7] |")
    assert "| addition | full | 50.0 / 25.0 | missing | missing | missing | missing | missing |" in lines
    at = lines.index("### copy")
    assert lines[at + 2 : at + 5] == ["| encoding | 2 | 21 |", "| --- | --- | --- |", "| nope | 100 | 75 |"]
    # What the cost command has written stays, and can be replaced.
    assert "so many hours" in text and "the old page" not in text
    page.insert(where, "other hours")
    assert where.read_text() == text.replace("so many hours", "other hours")
    asked(tmp_path, "copy", "learned", 1, 0)
    asked(tmp_path, "copy", "learned", 2, 0)
    page.write(where, tmp_path, "make it", cases, encodings)
    assert "other hours" in where.read_text() and (tmp_path / page.PICTURE).stat().st_size > 1000


def lines_of(folder):
    return (folder / ANSWERS).read_text().splitlines()


def test_answers_are_kept_sorted_whatever_the_order_and_each_model_as_a_whole(tmp_path):
    config = config_of()
    rows = [
        row("alibi", 0, 10),
        row("learned", 1, 2, correct=3),
        row("learned", 1, 10, "out", correct=None),
        row("nope", 0, 2),
        row("nope", 0, 10),
    ]
    for name, order in (("a", [[rows[4], rows[3]], rows[:1], rows[1:3]]), ("b", [rows[1:3], [rows[0], *rows[3:]]])):
        for some in order:
            merge(tmp_path / name, config, some)
        assert lines_of(tmp_path / name) == [
            "encoding,seed,length,distribution,examples,correct,date,hardware",
            "alibi,0,10,in,4,4,2026-11-22,a",
            "learned,1,2,in,4,3,2026-11-22,a",
            "learned,1,10,out,4,,2026-11-22,a",
            "nope,0,2,in,4,4,2026-11-22,a",
            "nope,0,10,in,4,4,2026-11-22,a",
        ]
        assert read(tmp_path / name) == rows
        assert load(tmp_path / name) == config
    # Asked again, its rows give way to the new ones, of whatever lengths; those of others stay.
    merge(tmp_path / "a", config, [row("learned", 1, 3, date="2026-11-30", hardware="b, with a comma")])
    assert lines_of(tmp_path / "a")[2:4] == [
        'learned,1,3,in,4,4,2026-11-30,"b, with a comma"',
        "nope,0,2,in,4,4,2026-11-22,a",
    ]
    assert read(tmp_path / "a")[1].hardware == "b, with a comma"


def test_answers_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    merge(tmp_path, config_of(), [row("nope")])
    before = lines_of(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "replace", full)
        merge(tmp_path, config_of(), [row("rope"), row("rope", 1)])
    assert lines_of(tmp_path) == before


def test_answers_of_another_config_give_way_to_the_first_of_the_new_one(tmp_path, monkeypatch):
    old, new, folder = config_of(steps=7), config_of(), tmp_path / "copy-none"
    merge(folder, old, [row("nope"), row("rope")])
    assert read_of(folder, old) == [row("nope"), row("rope")] and read_of(folder, new) == []

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers, "write_whole", stopped)
        merge(folder, new, [row("rope", correct=1)])
    assert read_of(folder, new) == [] and not Answers(tmp_path).rows  # no old answer passes for one of the new config
    merge(folder, new, [row("rope", correct=1)])
    assert read(folder) == read_of(folder, new) == [row("rope", correct=1)] and read_of(folder, old) == []


def test_what_has_answered_everything_by_the_same_config_is_done(tmp_path):
    nope, rope = study.WITHOUT_SCRATCHPAD[0].cases(["nope"])[1], study.WITHOUT_SCRATCHPAD[0].cases(["rope"])[1]
    runs, results = tmp_path / "runs", tmp_path / "results"
    small = study.Study(runs, results, study.SIZES["small"])
    assert (nope.task, nope.format, nope.seed) == ("copy", "none", 1) and not small.done(nope)
    config, folder = config_of(), results / "copy-none"
    written_out = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b1=0.9))  # the default
    rows = [row("nope", 1, length) for length in study.lengths_asked(TASKS["copy"])]
    merge(folder, written_out, rows[1:])
    assert not small.done(nope)
    merge(folder, config, rows)
    assert small.done(nope) and not small.done(nope._replace(seed=2)) and not small.done(rope)
    merge(folder, config, [one._replace(encoding="rope") for one in rows])
    assert small.done(nope) and small.done(rope) and not small.done(rope._replace(task="copy_replaced"))
    assert not study.Study(runs, results, study.SIZES["small"], steps=7).done(nope)
    assert not runs.exists()


def test_a_machine_takes_what_no_other_has_answered(tmp_path, monkeypatch):
    trained = []

    def train(runs, load):
        trained.append([workdir.name for _, workdir in runs])

    def evaluate(name, options):
        options.out.mkdir(parents=True)
        with (options.out / "tasks.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS.split(), restval="")
            writer.writeheader()
            for workdir in options.workdirs:
                task, format, _, seed = workdir.name.split("-")
                cells = {"run": workdir.name, "encoding": "its name", "task": task, "scratchpad": format, "seed": seed}
                for length in options.lengths:
                    where = "in" if length in TASKS[task].train_lengths else "out"
                    correct = {} if length == options.lengths[-1] else {"correct": seed}
                    writer.writerow(cells | {"length": length, "distribution": where, "examples": 20} | correct)

    monkeypatch.setattr(study, "train_together", train)
    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "hours", lambda *_: 0.0)

    def start(machine, date, *options):
        trained.clear()
        monkeypatch.setattr(study, "date", lambda: date)
        monkeypatch.setattr(study, "hardware", lambda: machine)
        where = ["--out", tmp_path / machine, "--results", tmp_path / "results", "--page", tmp_path / "page.md"]
        monkeypatch.setattr(sys, "argv", ["study", *map(str, where), *options])
        study.main()

    start("first", "2026-11-22", "--encodings", "rope", "--tasks", "copy")
    assert trained == [["copy-none-rope-0", "copy-none-rope-1", "copy-none-rope-2"]]
    rows = read(tmp_path / "results/copy-none")
    lengths = study.lengths_asked(TASKS["copy"])
    assert [(*row.model, row.length) for row in rows] == [("rope", seed, n) for seed in range(3) for n in lengths]
    assert rows[-2:] == [
        row("rope", 2, lengths[-2], "out", 20, 2, "2026-11-22", "first"),
        row("rope", 2, lengths[-1], "out", 20, None, "2026-11-22", "first"),
    ]
    assert load(tmp_path / "results/copy-none") == config_of()
    kept = lines_of(tmp_path / "results/copy-none")
    start("second", "2026-11-23", "--encodings", "rope", "--tasks", "copy", "copy_replaced")
    assert trained == [["copy_replaced-none-rope-0", "copy_replaced-none-rope-1", "copy_replaced-none-rope-2"]]
    assert lines_of(tmp_path / "results/copy-none") == kept
    assert {row.hardware for row in read(tmp_path / "results/copy_replaced-none")} == {"second"}
    assert ", 2026-11-22 to 2026-11-23, first; second." in (tmp_path / "page.md").read_text()
    # Formats of a scratchpad train together, and each has a folder.
    start("third", "2026-11-24", "--encodings", "nope", "--tasks", "parity", "--scratchpads", "full", "minimal")
    assert [len(names) for names in trained] == [6]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "copy-none",
        "copy_replaced-none",
        "parity-full",
        "parity-minimal",
    }
    assert load(tmp_path / "results/parity-full").data.scratchpad == "full"
    page_then = (tmp_path / "page.md").read_text()
    start("third", "2026-11-25", "--encodings", "rope", "--tasks", "copy", "copy_replaced")
    assert trained == [] and (tmp_path / "page.md").read_text() == page_then


def test_where_answers_cannot_be_written_nothing_is_trained(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("")
    monkeypatch.setattr(study, "train_together", lambda *_: pytest.fail("trained"))
    where = ["--out", tmp_path / "out", "--results", tmp_path / "results", "--page", tmp_path / "page.md"]
    monkeypatch.setattr(sys, "argv", ["study", *map(str, where), "--tasks", "copy", "--encodings", "nope"])
    with pytest.raises(OSError, match="results"):
        study.main()


def test_the_page_says_when_and_on_what_all_have_answered(tmp_path):
    asked(tmp_path, "copy", "nope", 0, 3, date="2026-11-20", hardware="2 cores (A), jax 1")
    page.write(tmp_path / "page.md", tmp_path, "make it", [("copy", "none")], ["nope", "rope"])
    assert "`make it`, 2026-11-20, 2 cores (A), jax 1." in (tmp_path / "page.md").read_text().splitlines()
    asked(tmp_path, "copy", "rope", 0, 3, date="2026-12-01", hardware="1 x B, jax 2")
    asked(tmp_path, "copy_replaced", "nope", 0, 3, date="2026-11-29", hardware="2 cores (A), jax 1")
    page.write(tmp_path / "page.md", tmp_path, "make it", [("copy", "none")], ["nope", "rope"])
    line = "`make it`, 2026-11-20 to 2026-12-01, 1 x B, jax 2; 2 cores (A), jax 1."
    assert line in (tmp_path / "page.md").read_text().splitlines()


def test_the_page_has_the_recipes_of_all_cases(tmp_path):
    merge(tmp_path / "copy-none", config_of(), [row(), row(length=9, distribution="out")])
    config = config_of("copy_replaced", steps=800)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3))
    merge(tmp_path / "copy_replaced-none", config, [row(), row(length=9, distribution="out", examples=5)])
    page.write(tmp_path / "page.md", tmp_path, "make it", [("copy", "none"), ("copy_replaced", "none")], ["nope"])
    text = " ".join((tmp_path / "page.md").read_text().split())
    assert "The decoder has 4 layers of 4 heads and width 64, the" in text
    assert "a learning rate of 0.001 or 0.002 (the paper's: 3e-05), 6% of warm-up, linear decay to 0 (as" in text
    assert "800 or 2,400 steps (40,000) of 1,024 tokens of packed examples (64 examples), 3 seeds" in text
    assert "up to 5 questions" in text


def test_the_page_of_a_study_without_answers_says_so(tmp_path):
    page.write(tmp_path / "page.md", tmp_path, "make it", [("copy", "none")], ["nope", "alibi"])
    text = (tmp_path / "page.md").read_text()
    assert "`make it`." in text.splitlines()
    assert "0 of its 6 runs are here" in text and "| nope | 0.687 | missing | missing | missing |" in text


def test_the_time_is_estimated_by_a_few_steps_and_answers(tmp_path, monkeypatch):
    part = study.WITHOUT_SCRATCHPAD[0]
    size = dataclasses.replace(study.SIZES["small"], parts=(part,))
    groups = [*size.groups(part.tasks, study.FORMATS, ["nope", "alibi"])]
    called = []

    def fake(timed, load):
        called.append([config.train.steps for config, _ in timed])
        for _, workdir in timed:
            workdir.mkdir()
            (workdir / "metrics.jsonl").write_text('{"step": 12, "tokens_per_second": 500.0}\n')

    monkeypatch.setattr(study, "train_together", fake)
    monkeypatch.setattr(study, "seconds_asked", lambda workdir, case, examples: 20.0)
    hours = study.hours(study.Study(tmp_path / "runs", tmp_path / "results", size, 100), groups, 7)
    # Twelve models of 100 steps of 1,024 tokens, six at 500 tokens/s each, and twelve to ask.
    assert called == [[12] * 6]
    assert 3600 * hours == pytest.approx(12 * 100 * 1024 / 3000 + 12 * 20, rel=1e-3)


def test_hours_follow_from_the_compiled_step(monkeypatch):
    programs = SimpleNamespace(total=3 * 2**30), SimpleNamespace(total=2**30)
    estimate = SimpleNamespace(training=programs[0], validation=programs[1], seconds=(0.1, 0.18))
    asked = []
    monkeypatch.setattr(cost, "estimate_run", lambda config, machine: asked.append((config, machine)) or estimate)
    monkeypatch.setattr(cost.importlib.metadata, "version", lambda package: f"of {package}")
    text = cost.cost("h100:1", [128])
    # 40,000 steps of 0.18 s take two hours.
    models = [len(p.cases(study.ENCODINGS)) for p in study.SIZES["paper"].parts if p.context == 128]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 128")]
    assert sorted(int(row[2]) for row in rows) == sorted(models)
    assert all(row[3:5] == ["3.0", "180"] and int(row[5]) == 2 * int(row[2]) for row in rows)
    assert f"| all |  | {sum(models)} |  |  | {2 * sum(models):,} |" in text
    assert [(config.data.context_length, name) for config, name in asked] == [(128, "h100:1")] * len(rows)


SMALL = """
import dataclasses, sys
from pathlib import Path
from benchmarks.length_study import study
from nope_jax.cli import run
from nope_jax.data.tasks import task
task.EXAMPLES.update(train=300, test=50)
study.SIZES["small"] = dataclasses.replace(study.SIZES["small"], config=Path(sys.argv.pop(1)), examples=2)
study.hours = lambda *_: 0.0
sys.exit(run(study.main))
"""


@pytest.mark.slow
def test_killed_in_training_and_in_asking_it_comes_to_the_same(tmp_path):
    text = (ROOT / "benchmarks/length_study/decoder.py").read_text()
    for was, now in (("model_dim=64", "model_dim=32"), ("batch_size=16", "batch_size=2")):
        assert was in text
        text = text.replace(was, now)
    config = tmp_path / "decoder.py"
    config.write_text(text.replace("checkpoint_every=400", "checkpoint_every=10"))
    options = ["--steps", "40", "--tasks", "copy", "copy_replaced", "--encodings", "nope", "rope"]

    def start(name):
        folder = tmp_path / name
        where = ["--out", folder, "--results", tmp_path / f"{name}-results", "--page", tmp_path / f"{name}.md"]
        command = [sys.executable, "-c", SMALL, config, *options, *where]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return folder, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(name):
        _, process = start(name)
        said = process.communicate()[0].decode()
        assert process.returncode == 0, said[-3000:]
        return said

    def kill_when(pattern):
        folder, process = start("killed")
        while not any(folder.glob(pattern)):
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    assert "12 models in 2 groups, of which 0 are done" in finish("whole")
    kill_when("runs/*nope*/checkpoints/1?")
    kill_when("reports/*nope*/measured/*")
    kill_when("runs/*rope*/checkpoints/2?")
    assert "12 models in 2 groups, of which 1 are done" in finish("killed")

    def kept(name):
        files = (tmp_path / f"{name}-results").rglob("*")
        return {
            str(path.relative_to(tmp_path / f"{name}-results")): path.read_text() for path in files if path.is_file()
        }

    assert set(kept("whole")) == {f"{task}-none/{name}" for task in options[3:5] for name in ("config.json", ANSWERS)}
    assert kept("whole") == kept("killed")
    assert (tmp_path / "killed.md").read_text() == (tmp_path / "whole.md").read_text()
    # Of the workdirs it needs none.
    shutil.rmtree(tmp_path / "killed")
    assert "12 models in 2 groups, of which 2 are done" in finish("killed") and not (tmp_path / "killed").exists()
    assert kept("whole") == kept("killed")
