"""The benchmarks take turns, write files, and the page of docs is what the files say."""

import json
import sys

import pytest

from benchmarks import attention, long_context, measure, page, train_step


def test_contestants_take_turns_and_ratios_are_those_of_a_round(monkeypatch):
    called: list[str] = []
    pace = {"a": 2.0, "b": 1.0, measure.MATMUL: 0.5}

    def contestant(name: str, **about) -> measure.Contestant:
        return measure.Contestant(name, lambda: called.append(name), lambda _: None, **about)

    def timed(contestant: measure.Contestant, repeats: int) -> tuple[float, float]:
        contestant.call()
        slow = 10.0 if called.count("a") == 4 else 1.0  # all of one round
        return pace[contestant.name] * slow, pace[contestant.name]

    monkeypatch.setattr(measure, "matmul", lambda dtype: contestant(measure.MATMUL, flops=8.0))
    monkeypatch.setattr(measure, "_repeats", lambda contestant: 1)
    monkeypatch.setattr(measure, "_time", timed)
    found = measure.group("title", [contestant("a"), contestant("b", flops=4.0)], "a", 5, "float32")
    assert called == [measure.MATMUL, "a", "b"] * 5
    product, a, b = found["rows"]
    assert product["ratio"] is None and a["ratio"] == [1, 1, 1]
    assert b["ratio"] == b["cpu_ratio"] == [0.5, 0.5, 0.5]
    assert b["seconds"] == [1, 1, 1] and b["of_matmul"][1] == 4 / 1 / (8 / 0.5)


def test_the_page_is_what_the_files_say():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.sections(measure.RESULTS)) == text


def test_the_page_needs_its_markers():
    with pytest.raises(ValueError, match="the page must have the lines"):
        page.written("no markers", "")


@pytest.mark.slow
def test_a_benchmark_writes_a_file_that_the_page_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--lengths", "32", "--rounds", "1", "--out", str(tmp_path)])
    attention.main()
    long_context.main()
    tiny = measure.dataclasses.replace(train_step.SIZES["small"].model, num_layers=1, model_dim=16, vocab_size=32)
    config = measure.dataclasses.replace(train_step.SIZES["small"], model=tiny)
    monkeypatch.setitem(train_step.SIZES, "small", config)
    monkeypatch.setattr(sys, "argv", ["x", "--peers", "--rounds", "1", "--out", str(tmp_path)])
    train_step.main()
    files = {json.loads(path.read_text())["benchmark"] for path in tmp_path.iterdir()}
    assert files == {"attention", "long_context", "train_step"}
    made = page.sections(tmp_path)
    assert [made.count(f"### {title}:") for title in page.TITLES.values()] == [1, 1, 0, 1, 0]
