"""The length study: its runs fit their rows, it goes on where it was killed, and its page says what there is."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.length_study import cost, page, study
from nope_jax.config import load_file
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


def answer(folder, run, rows):
    """Write the answers of a run: rows (length, distribution, examples, correct)."""
    workdir = folder / "runs" / run
    workdir.mkdir(parents=True)
    config = study.WITHOUT_SCRATCHPAD[0].cases(["nope"])[0].config(load_file(study.SIZES["small"].config))
    study.configs.save(config, workdir)
    with (workdir / page.ANSWERS).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS.split(), restval="")
        writer.writeheader()
        names = ("length", "distribution", "examples", "correct")
        writer.writerows(dict(zip(names, row, strict=True)) for row in rows)


def asked(folder, task, encoding, seed, correct, format="none", within=4):
    answer(folder, f"{task}-{format}-{encoding}-{seed}", [(2, "in", 4, within), (21, "out", 4, correct)])


def test_the_page_has_the_numbers_the_ranks_and_what_is_missing(tmp_path):
    for seed in range(3):
        for encoding, correct in (("nope", 3), ("t5", 2), ("alibi", 1), ("rope", 0), ("sinusoidal", 0)):
            asked(tmp_path, "copy", encoding, seed, correct)
    asked(tmp_path, "copy", "learned", 0, "")
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


def test_what_has_answered_by_the_same_config_is_done(tmp_path):
    cases = study.WITHOUT_SCRATCHPAD[0].cases(["nope"])[:3]
    small = study.Study(tmp_path, study.SIZES["small"])
    assert not small.done(cases)
    for config, workdir in small.runs(cases):
        workdir.mkdir(parents=True)
        optimizer = dataclasses.replace(config.optimizer, b1=0.9)  # the default, written out
        study.configs.save(dataclasses.replace(config, optimizer=optimizer), workdir)
        assert not small.done(cases)
        (workdir / page.ANSWERS).write_text("")
    assert small.done(cases)
    assert not study.Study(tmp_path, study.SIZES["small"], steps=7).done(cases)


def test_the_page_of_a_study_without_answers_says_so(tmp_path):
    page.write(tmp_path / "page.md", tmp_path, "make it", [("copy", "none")], ["nope", "alibi"])
    text = (tmp_path / "page.md").read_text()
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
    hours = study.hours(study.Study(tmp_path, size, 100), groups, 7)
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
        command = [sys.executable, "-c", SMALL, config, *options, "--out", folder, "--page", tmp_path / f"{name}.md"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return folder, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill_when(pattern):
        folder, process = start("killed")
        while not any(folder.glob(pattern)):
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    folder, process = start("whole")
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said[-3000:]
    assert "12 models in 2 groups, of which 0 are done" in said
    kill_when("runs/*nope*/checkpoints/1?")
    kill_when("reports/*nope*/measured/*")
    kill_when("runs/*rope*/checkpoints/2?")
    other, process = start("killed")
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said[-3000:]
    assert "12 models in 2 groups, of which 1 are done" in said
    answers = sorted(path.relative_to(folder) for path in folder.glob(f"runs/*/{page.ANSWERS}"))
    assert len(answers) == 12
    for path in answers:
        assert (other / path).read_text() == (folder / path).read_text()
    assert (tmp_path / "killed.md").read_text() == (tmp_path / "whole.md").read_text()
