"""eval.py ruler: what models that know, and models that do not, are said to know; refusals; resuming."""

import csv
import re

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from nope_jax import ModelConfig, trained
from nope_jax.data import load_tokenizer
from nope_jax.data.ruler import RULER
from nope_jax.evaluation import ruler
from nope_jax.evaluation.common import continuations
from nope_jax.evaluation.common.continuations import encode, write
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.ruler import Scores, average, effective_length, rows
from tests.support.drawn_model import drawn_model
from tests.support.ruler_files import write_files
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

SMALL = "--ruler.examples 3 --ruler.batch_size 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler")
    write_documents(folder)
    write_run(folder, "nope")
    copy_run(folder / "nope", folder / "learned", {"model.encoding": "learned", "model.train_length": 1300})
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Knows:
    """In place of `generate`: writes the value of the key that a needle prompt asks for, and for others too much."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, prompts, room, *, stop_tokens, prompt_lengths):
        self.calls += 1
        out = np.zeros((len(prompts), prompts.shape[1] + room), np.int32)
        for row, prompt, length in zip(out, prompts, prompt_lengths, strict=True):
            text = bytes(prompt[:length].astype(np.uint8)).decode()
            key = re.search(r"for (\S+) mentioned", text)
            said = re.search(rf"for {key[1]} is: (\S+)\.[ \n]", text)[1] if key else "no idea"
            text = f"{text} {said}.".encode() + bytes(stop_tokens) + b"after the end"
            row[: len(text)] = np.frombuffer(text, np.uint8)[: len(row)]
        return jax.device_put(out)


def test_a_model_that_knows_needles_is_found_to_know_them_and_what_is_measured_is_kept(
    folder, tmp_path, monkeypatch, capsys
):
    knows = Knows()
    monkeypatch.setattr(continuations, "generate", knows)
    tasks = "--ruler.tasks niah_single_1 niah_multikey_3 fwe"
    words = f"ruler --workdirs {folder}/nope {folder}/learned --lengths 1200 2000 {tasks} {SMALL} --out {tmp_path}"
    # learned has no checkpoint of its own shape: it is read last, and fails.
    assert call_eval(monkeypatch, words) == 2
    scores = {(row["task"], row["length"]): row["score"] for row in table(tmp_path / "ruler.csv")}
    wanted = {"niah_single_1": "100", "niah_multikey_3": "100", "fwe": "0"}
    assert scores == {(task, n): wanted[task] for task in wanted for n in ("1200", "2000")}
    answers = table(tmp_path / "ruler_answers.csv")
    assert len(answers) == 3 * 2 * 3 and all(row["run"] == "nope" for row in answers)
    needles = [row for row in answers if row["task"].startswith("niah")]
    assert all(row["continuation"] == f" {row['answers']}." for row in needles)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>RULER</h2>" in page and "base models" in page and "85.6" in page

    calls, words = knows.calls, words.replace(f" {folder}/learned", "")
    assert call_eval(monkeypatch, words, pictures=True) == 0 and knows.calls == calls  # stored
    assert "66.7" in " ".join(capsys.readouterr().out.split())
    assert call_eval(monkeypatch, words.replace("examples 3", "examples 4")) == 0 and knows.calls > calls


def test_tasks_over_files_are_called_ruler_style_and_any_answer_to_a_question_will_do(
    folder, tmp_path, monkeypatch, capsys
):
    class Says(Knows):
        def __call__(self, model, prompts, room, *, stop_tokens, prompt_lengths):
            out = np.array(
                super().__call__(model, prompts, room, stop_tokens=stop_tokens, prompt_lengths=prompt_lengths)
            )
            for row, prompt, length in zip(out, prompts, prompt_lengths, strict=True):
                text = bytes(prompt[:length].astype(np.uint8)).decode()
                if number := re.search(r"Question: What is (\d+)\?", text):
                    said = re.search(rf"Paragraph {number[1]} says (?:\S+ ){{3}}(\S+)", text)[1]
                    row[length : length + room] = 0
                    row[length : length + len(said)] = np.frombuffer(said.encode(), np.uint8)
            return jax.device_put(out)

    monkeypatch.setattr(continuations, "generate", Says())
    files = write_files(tmp_path)
    words = f"ruler --workdirs {folder}/nope --lengths 5000 --ruler.examples 2 --out {tmp_path}/out"
    words += f" --ruler.haystack {files['text']} --ruler.questions {files['SQuAD']}"
    assert call_eval(monkeypatch, f"{words} --ruler.tasks niah_single_1 niah_single_2 qa_1") == 0
    scores = {row["task"]: row["score"] for row in table(tmp_path / "out" / "ruler.csv")}
    assert scores == {"niah_single_1": "100", "niah_single_2 (RULER-style)": "100", "qa_1 (RULER-style)": "100"}
    answers = table(tmp_path / "out" / "ruler_answers.csv")[-1]["answers"]
    assert re.fullmatch(r"(\w+) \| \1 of 1", answers)
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean of 3" in printed and "over the 3 asked here, niah_single_1, niah_single_2, qa_1, so" in printed

    # What is measured is of these files: with others it is measured anew.
    files["SQuAD"].write_text(files["SQuAD"].read_text().replace("What is 1?", "What is 2?"))
    monkeypatch.setattr(continuations, "generate", knows := Says())
    assert call_eval(monkeypatch, f"{words} --ruler.tasks niah_single_1 niah_single_2 qa_1") == 0
    assert knows.calls == 1

    capsys.readouterr()
    plain = f"ruler --workdirs {folder}/nope --lengths 5000 --out {tmp_path}/none"
    for more, message in {
        "--ruler.tasks niah_single_2": "names niah_single_2, which reads a file: niah_* need --ruler.haystack",
        f"--ruler.tasks qa_2 --ruler.questions {files['SQuAD']}": "qa_2 in that of HotpotQA",
        f"--ruler.tasks qa_1 --ruler.questions {files['SQuAD']}": "--ruler.examples is 100, but qa_1 has 50 questions",
        f"--ruler.haystack {tmp_path}/nowhere": f"{tmp_path}/nowhere: No such file or directory",
    }.items():
        assert call_eval(monkeypatch, f"{plain} {more}") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_an_untrained_run_answers_every_task(folder, tmp_path, monkeypatch):
    tasks = "--ruler.tasks niah_multikey_2 vt cwe fwe"
    words = f"ruler --workdirs {folder}/nope --lengths 2500 {tasks} --ruler.examples 1 --ruler.batch_size 1"
    assert call_eval(monkeypatch, f"{words} --out {tmp_path}") == 0
    lines = table(tmp_path / "ruler.csv")
    assert [row["task"] for row in lines] == ["niah_multikey_2", "vt", "cwe", "fwe"]
    assert all(float(row["score"]) == 0 and float(row["score_low"]) == 0 for row in lines)


@pytest.mark.parametrize("bos", [False, True])
def test_continuations_are_those_of_greedy_decoding_and_end_with_the_document(bos):
    config = ModelConfig(num_layers=1, num_heads=2, model_dim=8, mlp_dim=8, encoding="alibi", vocab_size=300)
    model = drawn_model(config, 3)
    tokenizer, task = load_tokenizer("bytes"), RULER["vt"]

    @nnx.jit
    def likeliest(model, tokens):
        return model(tokens).argmax(-1)

    def by_hand(prompt):
        tokens = [*[tokenizer.bos] * bos, *tokenizer.encode(prompt).tolist()]
        new = []
        while len(new) < task.room:
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens + new)] = tokens + new
            new.append(int(np.asarray(likeliest(model, padded))[0, len(tokens + new) - 1]))
            if new[-1] == tokenizer.separator:
                new.pop()
                break
        return tokenizer.decode(np.array([token for token in new if token < 256], np.int32))

    prompts = ["VAR A = 1", "What?"]
    tokens = [encode(tokenizer, prompt, bos=bos) for prompt in prompts]
    assert write(model, tokenizer, tokens, task.room, batch_size=3) == [by_hand(prompt) for prompt in prompts]


def test_a_tokenizer_that_loses_a_needle_is_refused(folder, tmp_path, monkeypatch, capsys):
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", "[UNK]", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = f"ruler --workdirs {folder}/nope --lengths 1000 --data.tokenizer {tmp_path}/tokenizer.json"
    assert call_eval(monkeypatch, f"{words} --ruler.tasks niah_single_1 --out {tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"cannot tell '\d{7}', an answer of RULER's niah_single_1", error)
    assert not (tmp_path / "out").exists()


def test_the_effective_length_is_the_longest_with_the_score_of_llama_2(folder):
    tasks = [RULER["niah_single_1"], RULER["vt"]]
    run = ruler.Run(
        folder / "nope", "nope", trained.find_trained(folder / "nope").config, 4000, (1000, 2000, 3000, 9000)
    )

    def give(length, *means):
        scores = (np.array([mean, mean]) for mean in means)
        run.results[length] = {
            task.name: Scores(score, np.array(["", ""]), np.array(["", ""]))
            for task, score in zip(tasks, scores, strict=False)
        }

    give(1000, 0.8, 0.91)
    assert average(run, 1000, tasks) == pytest.approx(85.5) and effective_length(run, tasks) == "-"
    give(2000, 0.9, 0.812)
    give(3000, 1.0)
    assert effective_length(run, tasks) == "2,000" and average(run, 3000, tasks) is None
    assert [row[3:] for row in rows([run], tasks)] == [
        ("80 [22, 98]", "90 [28, 100]", "100 [34, 100]", "cannot", ""),
        ("91 [28, 100]", "81 [23, 98]", "-", "cannot", ""),
        ("85.5", "85.6", "-", "cannot", "2,000"),
    ]
    give(2000, 0.5, 0.5)
    give(3000, 0.5, 0.5)
    assert effective_length(run, tasks) == "< 1,000"
    assert wilson_interval(1.8, 2) == pytest.approx((0.2787, 0.9953), abs=1e-4)  # by the formula, with p = 0.9
