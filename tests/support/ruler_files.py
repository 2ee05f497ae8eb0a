"""Made files for the tasks of RULER that read one: a haystack, and questions in the formats of SQuAD and HotpotQA."""

import json
import random
from pathlib import Path

WORDS = ("river", "stone", "lamp", "garden", "paper", "winter", "music", "engine", "letter", "harbor", "cloud", "table")


def write_files(folder: Path) -> dict[str, Path]:
    """Write the files; return their paths by what they hold."""
    paths = {name: folder / f"{name}.json" for name in ("SQuAD", "HotpotQA")} | {"text": folder / "haystack.txt"}
    paths["text"].write_text(haystack())
    paths["SQuAD"].write_text(json.dumps(squad()))
    paths["HotpotQA"].write_text(json.dumps(hotpotqa()))
    return paths


def haystack() -> str:
    """About 1,400 words in sentences, with line ends, quotations and brackets."""
    rng = random.Random(1)
    ends = [".", ".", ".", "?", "!", '."', ".)"]
    opens = {'."': '"', ".)": "("}
    sentences = []
    for _ in range(140):
        end = rng.choice(ends)
        words = rng.choices(WORDS, k=rng.randint(5, 15))
        words[2] += ","
        sentences.append(f"{opens.get(end, '')}{words[0].capitalize()} {' '.join(words[1:])}{end}")
    return "\n\n".join(" ".join(sentences[i : i + 7]) for i in range(0, len(sentences), 7)) + "\n"


def squad() -> dict:
    """Three articles, of 30, 15 and 5 paragraphs, with questions that have several answers, or none."""
    rng = random.Random(2)

    def paragraph(number: int) -> dict:
        words = rng.choices(WORDS, k=30)
        questions = [
            {"question": f"What is {number}?", "answers": [{"text": words[3]}, {"text": f"{words[3]} of {number}"}]},
            {"question": f"What is not {number}?", "answers": [], "is_impossible": True},
        ]
        return {
            "context": f"Paragraph {number} says {' '.join(words)}.",
            "qas": [{"is_impossible": False} | q for q in questions],
        }

    sizes = (30, 15, 5)
    numbers = iter(range(sum(sizes)))
    return {"data": [{"paragraphs": [paragraph(next(numbers)) for _ in range(size)]} for size in sizes]}


def hotpotqa() -> list[dict]:
    """Six questions, each about ten documents of 50."""
    rng = random.Random(3)
    documents = [[f"Title {i}", [" ".join(rng.choices(WORDS, k=9)) + ".", " Then it ended."]] for i in range(50)]
    return [
        {
            "question": f"Which is {i}?",
            "answer": rng.choice(["yes", "no", "a kettle"]),
            "context": rng.sample(documents, 10),
        }
        for i in range(6)
    ]
