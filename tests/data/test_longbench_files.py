"""LongBench's datasets and metrics: its own scores, values by hand, and files that are refused."""

import importlib.util
import json
import sys

import pytest

from nope_jax.data.longbench import CHINESE, KINDS, PROMPTS, read_datasets, settings_of
from nope_jax.data.longbench.metrics import METRICS
from tests.goldens import regenerate

GOLDENS = regenerate.load("longbench")
ROW = {"input": "Who?", "context": "Mary sings.", "answers": ["Mary"], "length": 2, "all_classes": ["Mary", "Bob"]}


def write(folder, name, rows, **settings):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, content in settings.items():
        (folder / "config").mkdir(exist_ok=True)
        (folder / "config" / f"{file}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", GOLDENS)
def test_scores_are_those_of_longbenchs_own_code(name, tmp_path):
    spec = importlib.util.spec_from_file_location("goldens_longbench", regenerate.HERE / "longbench.py")
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    rows = [ROW | {"answers": answers, "all_classes": cases.CLASSES} for _, answers in cases.CASES[name]]
    (dataset,) = read_datasets(write(tmp_path, name, rows))
    scores = [dataset.score(text, row) for (text, _), row in zip(cases.CASES[name], dataset.rows, strict=True)]
    assert [round(100 * score, 2) for score in scores] == GOLDENS[name] and len(set(scores)) > 1


@pytest.mark.parametrize(
    ("metric", "continuation", "answer", "score"),
    [
        ("F1", "the red Fox, a dog", "red fox", 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # two of three words, two of two
        ("ROUGE-L", "a b c d", "a c e", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),  # a c
        ("accuracy", "cat or dog", "cat", 1 / 2),
        ("accuracy", "black cat", "black cat", 1),  # cat is a part of it
        ("count", "3, 4 or 3", "3", 2 / 3),
        ("retrieval", "Paragraph 5 of 30", "Paragraph 5", 1 / 2),
        ("edit similarity", "# no\nabcd", "abed", 0.75),  # two blocks with three of four characters
    ],
)
def test_metrics_are_worth_what_they_are_by_hand(metric, continuation, answer, score):
    classes = ["cat", "dog", "black cat"]
    assert METRICS[metric](continuation, answer, classes) == pytest.approx(score, abs=1e-6)


def test_a_folder_is_read_with_its_own_prompts_and_without(tmp_path):
    rows = [ROW, ROW | {"input": "Why?", "length": 5000, "_id": "x"}]
    write(tmp_path, "hotpotqa_e", rows)
    write(tmp_path, "dureader", rows)
    write(tmp_path, "trec", rows)
    hotpotqa, trec = read_datasets(tmp_path)
    assert (hotpotqa.name, hotpotqa.room, trec.room) == ("hotpotqa_e", 32, 64)
    assert [row.prompt for row in trec.rows] == ["Mary sings.\nWho?", "Mary sings.\nWhy?"]
    assert [(row.id, row.length) for row in hotpotqa.rows] == [("1", 2), ("x", 5000)]
    prompts, rooms = {"hotpotqa": "<{context}|{input}|{length}>"}, {"hotpotqa": 5}
    write(tmp_path, "trec", rows, dataset2prompt=prompts, dataset2maxlen=rooms)
    (dataset,) = read_datasets(tmp_path, ["hotpotqa_e"], count=1)
    assert [row.prompt for row in dataset.rows] == ["<Mary sings.|Who?|2>"] and dataset.room == 5
    assert dataset.digest != hotpotqa.digest and settings_of(tmp_path, "nothing") == {}
    assert {kind.prompt for kind in KINDS.values()} == set(PROMPTS) and not set(CHINESE) & set(KINDS)


BAD = {
    "unknown dataset 'hotpot': did you mean 'hotpotqa'?": ("hotpot", [ROW]),
    "must be a folder with datasets of LongBench, NAME.jsonl; it has none, only Chinese ones (lsht)": ("lsht", [ROW]),
    "hotpotqa.jsonl has no examples": ("hotpotqa", []),
    "hotpotqa.jsonl:2: it must be a JSON object with input, context, answers, length; it lacks answers, length": (
        "hotpotqa",
        [ROW, {"input": "", "context": ""}],
    ),
    "it lacks all_classes": ("trec", [{name: x for name, x in ROW.items() if name != "all_classes"}]),
    "hotpotqa.jsonl:1: answers must be a list of texts, not [1]": ("hotpotqa", [ROW | {"answers": [1]}]),
    "hotpotqa.jsonl:1: answers must be a list of texts, not []": ("hotpotqa", [ROW | {"answers": []}]),
    "hotpotqa.jsonl:1: context must be a text, not None": ("hotpotqa", [ROW | {"context": None}]),
    "hotpotqa.jsonl:1: length must be a number of words, not 'long'": ("hotpotqa", [ROW | {"length": "long"}]),
    "must be like 'Paragraph 3', not 'Mary'": ("passage_retrieval_en", [ROW]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files_are_refused(tmp_path, message):
    with pytest.raises(ValueError) as caught:
        read_datasets(write(tmp_path, *BAD[message]))
    assert message in str(caught.value)


def test_what_is_no_dataset_is_refused(tmp_path, monkeypatch):
    def refusal(*arguments, **settings):
        with pytest.raises(ValueError) as caught:
            read_datasets(write(tmp_path, "gov_report", [ROW], **settings), *arguments)
        return str(caught.value)

    assert "multifieldqa_zh is Chinese" in refusal(["multifieldqa_zh"])
    assert "has no file qasper.jsonl" in refusal(["qasper"])
    assert "the prompt '{question}' must have only fields of" in refusal(dataset2prompt={"gov_report": "{question}"})
    assert "must have a number of tokens for gov_report, not 0" in refusal(
        dataset2prompt={}, dataset2maxlen={"gov_report": 0}
    )
    assert "dataset2maxlen.json must be a JSON object" in refusal(dataset2maxlen=[])
    (tmp_path / "config" / "dataset2maxlen.json").unlink()
    (tmp_path / "hotpotqa.jsonl").write_text("{no json")
    assert "hotpotqa.jsonl:1: it must be a JSON object (" in refusal()
    (tmp_path / "hotpotqa.jsonl").write_bytes(b"\xff")
    assert "must be a text in UTF-8: byte 0 is not" in refusal()
    monkeypatch.setitem(sys.modules, "rouge", None)
    assert "ROUGE-L needs pip install rouge==1.0.1" in refusal(["gov_report"])
    with pytest.raises(ValueError, match="must be a folder with datasets of LongBench"):
        read_datasets(tmp_path / "nowhere")
