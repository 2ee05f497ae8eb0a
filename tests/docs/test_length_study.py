"""The length study: its runs fit their rows, and its page says what there is and what is missing."""

import csv
import dataclasses

import pytest

from benchmarks.length_study import page, study
from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import TASKS, encode
from nope_jax.evaluation.tasks import COLUMNS
from nope_jax.training.together import check_alike


@pytest.mark.parametrize("name", study.SIZES)
def test_the_study_has_every_task_encoding_and_seed_once_in_groups_that_train_together(name, tmp_path):
    size = study.SIZES[name]
    tasks = sum(study.CONTEXTS.values(), ())
    assert set(tasks) == set(TASKS) - {"passkey"}
    groups = list(study.groups(size, tmp_path, [*tasks], [*size.encodings]))
    runs = [run for group in groups for run in group]
    assert len(runs) == len({workdir for _, workdir in runs}) == 17 * 6 * 3
    assert max(map(len, groups)) <= size.together
    for group in groups:
        check_alike(group)
    assert study.flops(runs) == pytest.approx(sum(map(study.flops, groups)))
    for config, _ in runs[:: len(study.SEEDS)]:
        tokenizer, task = load_tokenizer(config.data.tokenizer), TASKS[config.data.source.removeprefix("task:")]
        assert tokenizer.vocab_size <= config.model.vocab_size
        example = task.example(0, 0, task.train_lengths[-1], split="train", scratchpad=False)
        assert len(encode(tokenizer, *example[:2])[0]) <= config.data.context_length


def report(folder, rows):
    """tasks.csv of rows (run, length, distribution, examples, correct)."""
    folder.mkdir(parents=True)
    with (folder / "tasks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS.split(), restval="")
        writer.writeheader()
        names = ("run", "length", "distribution", "examples", "correct")
        writer.writerows(dict(zip(names, row, strict=True)) for row in rows)


def test_the_page_has_the_numbers_the_ranks_and_what_is_missing(tmp_path):
    def rows(encoding, seed, correct):
        return [(f"copy-{encoding}-{seed}", 2, "in", 4, 4), (f"copy-{encoding}-{seed}", 21, "out", 4, correct)]

    report(tmp_path / "reports" / "1", [row for seed in range(3) for row in rows("nope", seed, 3)])
    report(tmp_path / "reports" / "2", rows("alibi", 0, 4) + rows("learned", 0, ""))
    page.write(tmp_path / "page.md", tmp_path, "make it", ["copy", "scan"], ["nope", "alibi", "learned"])
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "**Incomplete.** Seeds missing: copy (alibi: 2, learned: 2); scan (nope: 3, alibi: 3, learned: 3)." in lines
    # One seed has all encodings: ALiBi is first, NoPE second, and a length that cannot be read is wrong.
    assert "| nope | 0.687 | 0.500 | 0.500 |" in lines and "| alibi | 0.502 | 1.000 | 1.000 |" in lines
    assert "| learned |  |  | 0.333 |" in lines
    assert "| copy | 100.0 / 75.0 [98.6] | 100.0 / 100.0 [28.9] | 100.0 / 0.0 |" in lines
    assert "| scan | missing [79.7] | missing [43.8] | missing |" in lines
    assert lines[-5:-2] == ["| encoding | 2 | 21 |", "| --- | --- | --- |", "| nope | 100 | 75 |"]
    assert lines[-2:] == ["| alibi | 100 | 100 |", "| learned | 100 | 0 |"]


def test_ranks_wait_for_all_encodings(tmp_path):
    report(tmp_path / "reports" / "1", [("copy-nope-0", 21, "out", 4, 3)])
    page.write(tmp_path / "page.md", tmp_path, "make it", ["copy"], ["nope", "alibi"])
    assert "| nope | 0.687 | missing | missing |" in (tmp_path / "page.md").read_text()


def test_the_time_is_estimated_by_a_few_steps(tmp_path, monkeypatch):
    size = dataclasses.replace(study.SIZES["small"], model={"num_layers": 1, "num_heads": 2, "model_dim": 16})
    runs = next(study.groups(size, tmp_path, ["summation"], ["nope"]))
    called = []

    def fake(timed):
        called.append(len(timed))
        for _, workdir in timed:
            workdir.mkdir()
            (workdir / "metrics.jsonl").write_text('{"step": 12, "tokens_per_second": 500.0}\n')

    monkeypatch.setattr(study, "train_together", fake)
    per_flop = study.seconds_per_flop(runs)
    # Two runs at 500 tokens/s each: three runs of 1000 steps of 2048 tokens take 6144 s.
    assert called == [2] and study.flops(runs) * per_flop == pytest.approx(3 * 1000 * 2048 / 1000)
