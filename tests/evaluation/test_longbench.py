"""eval.py longbench: what models that know are said to know, by words; cutting, resuming and refusals."""

import csv
import json
import re

import jax
import numpy as np
import pytest

from nope_jax.evaluation.common import continuations
from nope_jax.evaluation.longbench import cut
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

WORDS = [100, 3999, 4000, 7999, 8000, 20_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longbench")
    write_documents(folder)
    write_run(folder, "nope")
    copy_run(folder / "nope", folder / "learned", {"model.encoding": "learned", "model.train_length": 150})
    data = folder / "data"
    data.mkdir()
    rows = [
        {"input": f"Who is {i}?", "context": f"{'x ' * (40 * i)}{i} is Bob{i}.", "answers": [f"Bob{i}"], "length": n}
        for i, n in enumerate(WORDS)
    ]
    (data / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [row | {"answers": ["blue", "red"], "all_classes": ["red", "green", "blue"]} for row in rows[:2]]
    (data / "trec_e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "vcsum.jsonl").write_text("")
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Knows:
    """In place of `generate`: says who the question is about, if the prompt still tells; otherwise a colour."""

    def __init__(self):
        self.prompts = []

    def __call__(self, model, prompts, room, *, stop_tokens, prompt_lengths):
        out = np.zeros((len(prompts), prompts.shape[1] + room), np.int32)
        for row, prompt, length in zip(out, prompts, prompt_lengths, strict=True):
            text = bytes(prompt[:length].astype(np.uint8)).decode()
            self.prompts.append(text)
            found = re.search(r"\d is (Bob\d)\.\n\n", text)
            text = f"{text} {found[1] if found else 'red'}".encode() + bytes(stop_tokens) + b"after the end"
            row[: len(text)] = np.frombuffer(text, np.uint8)[: len(row)]
        return jax.device_put(out)


def test_scores_are_by_dataset_and_words_and_what_is_measured_is_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continuations, "generate", knows := Knows())
    words = f"longbench --workdirs {folder}/nope {folder}/learned --lengths 160 150 --longbench.path {folder}/data"
    words += f" --longbench.batch_size 4 --out {tmp_path}"
    # learned has no checkpoint of its own shape: it is read last, and fails.
    assert call_eval(monkeypatch, words) == 2
    assert {len(prompt) for prompt in knows.prompts} >= {160 - 32, 150 - 32} and max(
        map(len, knows.prompts)
    ) == 160 - 32
    rows = {(row["dataset"], row["length"], row["words"]): row for row in table(tmp_path / "longbench.csv")}
    hotpotqa = {words: rows["hotpotqa", "160", words] for words in ("all", "0-4k", "4-8k", "8k+")}
    assert {words: (row["examples"], row["score"]) for words, row in hotpotqa.items()} == {
        "all": ("6", "100"),
        **dict.fromkeys(("0-4k", "4-8k", "8k+"), ("2", "100")),
    }
    assert rows["trec_e", "150", "0-4k"]["score"] == "100" and ("trec_e", "150", "8k+") not in rows
    answers = table(tmp_path / "longbench_answers.csv")
    assert [(row["id"], row["words"], row["answers"], row["continuation"]) for row in answers[:2]] == [
        ("1", "100", "Bob0", " Bob0"),
        ("2", "3999", "Bob1", " Bob1"),
    ]
    page = (tmp_path / "report.html").read_text()
    assert "<h2>LongBench</h2>" in page and "plain ones, not LongBench" in page and "left out: vcsum" in page

    asked, words = len(knows.prompts), words.replace(f" {folder}/learned", "")
    assert call_eval(monkeypatch, words, pictures=True) == 0 and len(knows.prompts) == asked  # stored
    assert "mean of 2" in capsys.readouterr().out
    assert call_eval(monkeypatch, f"{words} --longbench.datasets hotpotqa --longbench.examples 1") == 0
    assert len(knows.prompts) == asked + 2 * 4 and {
        row["score_stderr"] for row in table(tmp_path / "longbench.csv")
    } == {""}


def test_a_prompt_is_cut_in_its_middle():
    tokens = np.arange(10)
    assert cut(tokens, 10) is tokens
    assert cut(tokens, 6).tolist() == [0, 1, 2, 7, 8, 9] and cut(tokens, 5).tolist() == [0, 1, 8, 9]


@pytest.mark.slow
def test_an_untrained_run_answers(folder, tmp_path, monkeypatch):
    words = f"longbench --workdirs {folder}/nope --lengths 64 --longbench.path {folder}/data --out {tmp_path}"
    assert call_eval(monkeypatch, f"{words} --longbench.datasets hotpotqa --longbench.batch_size 6") == 0
    assert float(table(tmp_path / "longbench.csv")[0]["score"]) < 50


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lengths 100", "--longbench.path is missing: it must be a folder with datasets of LongBench, NAME.jsonl"),
        ("--lengths 60 --longbench.path {0}/data", "--lengths must be at least 66 for trec_e, of which 64 tokens are"),
        ("--lengths 100 --longbench.path {0}/data --longbench.datasets vcsum", "vcsum is Chinese"),
        ("--lengths 100 --longbench.path {0}/text", "text must be a folder with datasets of LongBench, NAME.jsonl"),
        ("--lengths 100 --longbench.path {0}/data --data.tokenizer task:copy", "task:copy"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, monkeypatch, capsys, more, message):
    assert call_eval(monkeypatch, f"longbench --workdirs {folder}/nope {more.format(folder)} --out {tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
