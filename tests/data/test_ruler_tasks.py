"""RULER's tasks: the strings and answers of its own code, as long as fits, and what cannot be made."""

import hashlib
import re

import numpy as np
import pytest

from nope_jax.data.ruler import RULER, read_tasks, score, words
from nope_jax.data.ruler.needles import Pairs
from nope_jax.data.tokenizers import ByteTokenizer
from tests.goldens import regenerate
from tests.support.ruler_files import write_files

GOLDENS = regenerate.load("ruler")


class Words:
    """Words and punctuation marks as tokens, counted only."""

    def encode(self, text):
        return np.zeros(len(re.findall(r"\w+|[^\w\s]", text)), np.int32)


TOKENIZERS = {"words": Words(), "bytes": ByteTokenizer()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    return read_tasks(files["text"], [files["HotpotQA"], files["SQuAD"]])


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", GOLDENS)
def test_prompts_and_answers_are_those_of_rulers_own_code(tasks, case):
    name, tokenizer, length, seed = case.split("-")
    task, tokens, golden = tasks[name], TOKENIZERS[tokenizer], GOLDENS[case]
    examples = list(task.examples(tokens, int(length), len(golden), int(seed)))
    for (prompt, answers), (digest, start, end, wanted, size) in zip(examples, golden.values(), strict=True):
        assert (prompt[:60], prompt[-60:], list(answers)) == (start, end, wanted)
        assert len(tokens.encode(prompt)) + task.room == size <= int(length)
        assert hashlib.sha256(prompt.encode()).hexdigest() == digest


def test_the_first_examples_do_not_depend_on_how_many_follow(tasks):
    for task in tasks.values():
        few, more = (list(task.examples(ByteTokenizer(), 8000, count)) for count in (1, 2))
        assert few == more[:1] and more[0].prompt != more[1].prompt, task.name


SOLVERS = {
    "niah": lambda prompt: [value for key in keys(prompt) for value in re.findall(rf"for {key} is: (\S+)\.", prompt)],
    "qa": lambda prompt: re.findall(r"says (?:\S+ ){3}(\S+)", paragraph(prompt)) or ["kettle"],
    "vt": lambda prompt: chain(prompt[prompt.rindex("Memorize and track") :]),
    "cwe": lambda prompt: most_common(re.findall(r"\d+\. (\S+)", asked(prompt)), 10),
    "fwe": lambda prompt: most_common(re.findall(r"\b[a-z]{6}\b", asked(prompt)), 3),
}


def keys(prompt):
    return re.split(r", and |, ", re.search(r"for (.+) mentioned in the provided text\?", prompt)[1])


def paragraph(prompt):
    """The document that a question of the made SQuAD is about."""
    number = re.search(r"Question: What is (\d+)\?", prompt)
    return re.search(rf"Paragraph {number[1]} says .*", prompt)[0] if number else ""


def asked(prompt):
    """The last list of a prompt, without the sentences around it."""
    text = prompt[: prompt.rindex("\nQuestion:")]
    return max(text.split("\n")[-1].split("coded words. "), key=len)


def most_common(found, count):
    return sorted(set(found), key=lambda word: -found.count(word))[:count]


def chain(prompt):
    value = re.search(r"assigned the value (\d+)", prompt)[1]
    names = [re.search(rf"VAR (\w+) = {value}", prompt)[1]]
    while following := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", prompt):
        names.append(following[1])
    return names


@pytest.mark.parametrize("name", [name for name in RULER if name != "qa_2"])
@pytest.mark.parametrize("length", [4000, 8000])
def test_answers_are_those_of_an_independent_solver(tasks, name, length):
    task = tasks[name]
    length = max(length, 5000) if task.file == "haystack" else length  # of at least 500 words
    for prompt, answers in task.examples(ByteTokenizer(), length, 3, seed=5):
        assert len(prompt) + task.room <= length
        solved = SOLVERS[name.split("_")[0]](prompt)
        wanted = answers[:1] if name == "qa_1" else answers  # one suffices
        assert sorted(solved) == sorted(wanted)
        assert task.score(" ".join(solved).upper(), answers) == 1 and task.score("nothing", answers) == 0
    assert score(f"It is {answers[0]}.", answers) == 1 / len(answers)


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [1, 200, 700])
def test_lengths_that_are_too_short_are_refused(tasks, name, length):
    if name == "fwe" and length == 700:
        return  # has room in bytes
    with pytest.raises(ValueError, match=f"length {length} is too short for RULER's {name}"):
        list(tasks[name].examples(ByteTokenizer(), length, 1))


def test_a_question_is_among_its_own_documents_and_its_article(tasks):
    for name, own in (("qa_1", 1), ("qa_2", 10)):
        task = tasks[name]
        for question, (prompt, answers) in zip(task.asked, task.examples(ByteTokenizer(), 8000, 3), strict=False):
            assert question.answers == answers and prompt.endswith(f"Question: {question.text} Answer:")
            assert len(question.documents) == own and all(task.documents[i] in prompt for i in question.documents)
    *_, last = (prompt for prompt, _ in task.examples(ByteTokenizer(), 50_000, 6))
    assert last.count("Document ") > len(task.documents)  # repeated


BAD_FILES = {
    "must be questions in the JSON format of SQuAD or of HotpotQA": ("questions", "what"),
    "must be questions in the JSON format of SQuAD, it lacks 'paragraphs'": ("questions", '{"data": [{}]}'),
    "must be questions in the JSON format of HotpotQA": ("questions", "[1, 2"),
    "has no question with an answer": ("questions", "[]"),
    "has no words": ("haystack", " \n"),
    "must be a text in UTF-8: byte 1 is not": ("haystack", b"a\xff"),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_files_in_another_format_are_refused(tmp_path, message):
    kind, content = BAD_FILES[message]
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{path} {message}"):
        read_tasks(path) if kind == "haystack" else read_tasks(None, [path])
    with pytest.raises(ValueError, match="are files of questions in one format; give one of each"):
        read_tasks(None, [write_files(tmp_path)["SQuAD"]] * 2)


@pytest.mark.usefixtures("stand_ins")
def test_a_list_longer_than_wonderwords_is_refused():
    with pytest.raises(ValueError, match=r"length 200000 is too long .* wonderwords has \d{4}"):
        list(RULER["cwe"].examples(Words(), 200_000, 1))


def test_without_wonderwords_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
    words.wonderwords.cache_clear()
    with pytest.raises(ValueError, match="RULER's words need pip install wonderwords"):
        list(RULER["cwe"].examples(ByteTokenizer(), 4096, 1))


def test_pairs_of_words_are_in_the_order_of_the_alphabet():
    adjectives = ["old", "odd", "old-fashioned", "old-f", "x-rated", "x", "olden"]
    nouns = ["fashion", "dune buggy", "fashioned-dune", "ex-wife", "a", "z"]
    pairs = Pairs(adjectives, nouns)
    assert list(pairs) == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
