"""Scores of LongBench's own code, run from a checkout named by the environment variable LONGBENCH.

    git clone https://github.com/THUDM/LongBench
    LONGBENCH=$PWD/LongBench python tests/goldens/regenerate.py longbench

Made with its commit 2e00731, rouge 1.0.1 and fuzzywuzzy 0.18.0 without python-Levenshtein, as its requirements install
them. A stand-in takes the place of jieba, which only its Chinese metrics use.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SUMMARY = "The committee met on Monday. It agreed to build a bridge over the river. Nobody objected."
CLASSES = ["Number", "Other number", "Date", "Person", "Group of persons"]
CASES = {
    "hotpotqa": [
        ("the Eiffel Tower, in Paris", ["Eiffel Tower"]),
        (" A river.\nQuestion: and then?", ["the river", "a lake"]),
        ("yes", ["no"]),
        ("", ["nothing"]),
        ("the", ["a"]),
        ("It's the 3rd (and last) of the U.S. ships", ["the third U.S. ship", "its 3rd US ships"]),
        ("to be or not to be to be", ["to be to be not"]),
    ],
    "triviaqa": [("\n\nGeorge Eliot\nPassage: more", ["Eliot", "Mary Ann Evans"]), ("Passage:\nEliot", ["Eliot"])],
    "gov_report": [
        (SUMMARY, [SUMMARY]),
        ("On Monday the committee met. It will build a bridge. The bridge is long.", [SUMMARY]),
        ("A bridge a bridge a bridge over over the river", [SUMMARY, "No bridge. Over the river."]),
        ("...", [SUMMARY]),
        ("", [SUMMARY]),
        ("nothing\nin common", ["Some other words."]),
    ],
    "samsum": [
        ("\nAmanda baked cookies.\nDialogue: x", ["Amanda baked cookies and will bring some."]),
        ("Amanda left. Jerry stayed.", ["Jerry stayed. Amanda left."]),
    ],
    "trec": [
        ("Date\nQuestion: x", ["Date"]),
        ("Other number", ["Other number"]),
        ("Number or Date or Person", ["Number"]),
        ("Person", ["Date"]),
        ("a Group of persons, a Person", ["Group of persons"]),
        ("\nDate", ["Date"]),
    ],
    "passage_count": [("17", ["17"]), ("There are 17, or 18; 17.", ["17"]), ("seventeen", ["17"]), ("170", ["17"])],
    "passage_retrieval_en": [
        ("Paragraph 12", ["Paragraph 12"]),
        ("12 or 21", ["Paragraph 21"]),
        ("12", ["Paragraph 1"]),
    ],
    "lcc": [
        ("return x + 1\n\ndef f():", ["return x + 1"]),
        ("\n\n# a comment\n    return y", ["    return x + 1"]),
        ("// c\n`code`\n\nint a = 0;", ["int b = 0;"]),
        ("# only comments", ["x = 1"]),
        ("self.assertEqual(first, second)", ["self.assertAlmostEqual(second, first)"]),
    ],
}
"""Continuations with the right answers, by dataset."""

SCRIPT = """
import json, sys
from eval import scorer
cases, classes = json.load(sys.stdin)
scores = {name: [scorer(name, [text], [answers], classes) for text, answers in cases[name]] for name in cases}
print(json.dumps(scores))
"""


def make():
    """The scores of all cases, in percent to two decimals."""
    with tempfile.TemporaryDirectory() as stand_ins:
        Path(stand_ins, "jieba.py").touch()
        path = os.pathsep.join([str(Path(os.environ["LONGBENCH"], "LongBench")), stand_ins, *sys.path])
        return json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", SCRIPT],
                input=json.dumps([CASES, CLASSES]),
                env={**os.environ, "PYTHONPATH": path},
                cwd=stand_ins,  # where no other eval.py lies
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
