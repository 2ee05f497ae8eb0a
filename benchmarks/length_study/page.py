"""Writes docs/length_generalization.md from the answers of the length study, complete or not."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.length_study.answers import SEEDS, Answers, Case
from benchmarks.pages import table
from nope_jax.config import Config
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.files import replace_file
from nope_jax.evaluation.tasks import PAPER_RANKS

PAGE = Path(__file__).parents[2] / "docs/length_generalization.md"
PICTURE = Path("images/length_generalization.png")
BEGIN, END = (
    "<!-- made by benchmarks/length_study/cost.py: begin -->",
    "<!-- made by benchmarks/length_study/cost.py: end -->",
)

PAPER = {
    "copy": (0.986, 0.771, 0.289, 0.000, 0.0),
    "copy_replaced": (0.967, 0.939, 0.170, 0.016, 0.0),
    "copy_multi": (0.305, 0.420, 0.331, 0.011, 0.028),
    "reverse": (0.230, 0.242, 0.171, 0.077, 0.023),
    "scan": (0.797, 0.799, 0.438, 0.283, 0.057),
    "pcfg": (0.433, 0.439, 0.428, 0.439, 0.367),
    "addition": (0.085, 0.072, 0.078, 0.000, 0.004),
}
"""Exact match out of distribution in the paper, by the encodings of PAPER_RANKS in their order."""
LEARNED = 0.9
"""Share of right answers in distribution from which a task counts as learned."""


def write(page: Path, folder: Path, command: str, cases: Sequence[Case], encodings: Sequence[str]) -> None:
    """Write the page of a study, and its picture beside it.

    Args:
        page: The file to write. What `benchmarks.length_study.cost` has written into it is kept.
        folder: The folder of its answers.
        command: What made them.
        cases: All cases of the study, in the order of the page.
        encodings: Its encodings.
    """
    answers = Answers(folder)
    plain = [case for case in cases if case[1] == "none"]
    drawn = [case for case in plain if answers.whole(case, encodings)]
    parts = [
        _introduction(answers, command, cases, encodings),
        _agreement(answers, plain),
        _ranks(answers, plain, encodings),
        _by_task(answers, plain, encodings),
    ]
    if drawn:
        (page.parent / PICTURE).parent.mkdir(exist_ok=True)
        _draw(page.parent / PICTURE, answers, drawn, encodings)
        parts.append(
            f"![Right answers by length, a panel for each task]({PICTURE})\n\n"
            "Mean over seeds. Shaded: lengths of training.\n"
        )
    parts += [
        _scratchpads(answers, cases, encodings),
        _by_length(answers, cases, encodings),
        f"## The size of the paper\n\n{BEGIN}\n{_inserted(page)}\n{END}\n",
    ]
    with replace_file(page) as temporary:
        temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def insert(page: Path, cost: str) -> None:
    """Write what the study takes at the size of the paper into the page, which has a place for it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    with replace_file(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{cost}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _inserted(page: Path) -> str:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return text.partition(BEGIN)[2].partition(END)[0].strip() or "Not compiled yet."


def _introduction(answers: Answers, command: str, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    count = sum(len(answers.seeds(case, encoding)) for case in cases for encoding in encodings)
    total = len(cases) * len(encodings) * SEEDS
    state = "All of its runs are here."
    if count < total:
        state = f"**Incomplete**: {count} of its {total} runs are here.\n{_missing(answers, cases, encodings)}"
    return f"""# Length generalization

Decoders that differ only in their encoding are trained on short examples of a task and asked longer ones, as in
Kazemnejad et al. 2023 ([arXiv 2305.19466](https://arxiv.org/abs/2305.19466)); [data.md](data.md#tasks) describes the
tasks. An answer is right if the whole of it is, decoded greedily.

`{command}`{_made(answers)}.
{state}
{_recipe(answers)}"""


def _made(answers: Answers) -> str:
    """When the models have answered, and on what."""
    if not answers.rows:
        return ""
    dates = [row.date for row in answers.rows]
    days = " to ".join(dict.fromkeys((min(dates), max(dates))))
    return f", {days}, {'; '.join(sorted({row.hardware for row in answers.rows}))}"


def _recipe(answers: Answers) -> str:
    if not answers.configs:
        return ""
    configs = sorted(answers.configs, key=lambda config: (config.train.steps, _tokens(config)))

    def each(words: Callable[[Config], str]) -> str:
        return " or ".join(dict.fromkeys(map(words, configs)))

    shape = each(lambda c: f"{c.model.num_layers} layers of {c.model.num_heads} heads and width {c.model.model_dim}")
    rate = each(lambda c: f"{c.optimizer.learning_rate:g}")
    warmup = each(lambda c: f"{c.optimizer.warmup_steps / c.train.steps:.0%}")
    decay = each(lambda c: f"{c.optimizer.weight_decay:g}")
    steps = each(lambda c: f"{c.train.steps:,}")
    packed = configs[0].data.document_mask
    size = each(lambda c: f"{_tokens(c):,}" if packed else str(c.data.batch_size))
    unit = "tokens of packed examples" if packed else "examples"
    questions = max(row.examples for row in answers.rows)
    return f"""
The decoder has {shape}, the paper's
12 layers of 12 heads and width 768. Recipe: AdamW, a learning rate of {rate} (the paper's:
3e-05), {warmup} of warm-up, {each(_schedule)} (as the paper's), weight decay
{decay}, {steps} steps (40,000) of {size} {unit} (64 examples), {SEEDS} seeds.
Lengths of training are the paper's, and so are those past them, of which some are asked: up to {questions}
questions of each, none of them trained on.
"""


def _tokens(config: Config) -> int:
    """Of a step."""
    return config.data.batch_size * config.data.context_length


def _schedule(config: Config) -> str:
    optimizer = config.optimizer
    return optimizer.schedule + (f" decay to {optimizer.floor:g}" if optimizer.floor is not None else "")


def _missing(answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    """Names the cases without any run, and what others lack."""
    none = [case for case in cases if not any(answers.seeds(case, encoding) for encoding in encodings)]
    some = []
    for case in cases:
        lacks = {name: SEEDS - len(answers.seeds(case, name)) for name in encodings}
        if case not in none and any(lacks.values()):
            listed = ", ".join(f"{name}: {count} of {SEEDS} seeds" for name, count in lacks.items() if count)
            some.append(f"{_name(case)} ({listed})")
    lines = []
    if some:
        lines.append(f"Missing in part: {'; '.join(some)}.")
    by_format: dict[str, list[str]] = {}
    for task, format in none:
        by_format.setdefault(task, []).append(format)
    without = [task for task, formats in by_format.items() if "none" in formats]
    pads = [f"{task} ({', '.join(pads)})" for task, f in by_format.items() if (pads := [x for x in f if x != "none"])]
    if without:
        lines.append(f"Missing without a scratchpad: {', '.join(without)}.")
    if pads:
        lines.append(f"Missing with scratchpads: {'; '.join(pads)}.")
    return "\n".join(lines)


def _name(case: Case) -> str:
    task, format = case
    return task if format == "none" else f"{task} with scratchpad {format}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _agreement(answers: Answers, cases: Sequence[Case]) -> str:
    """The paper's findings beside ours; only cases with all seeds of its five encodings count."""
    five = list(PAPER_RANKS)
    whole = [case for case in cases if answers.whole(case, five)]
    if not whole:
        return ""
    ranks, cells = answers.ranks(whole, five, share_ties=True)
    rows = []
    for better, worse in itertools.pairwise(five):
        rows.append(
            (
                f"{better} ranks above {worse}",
                f"{PAPER_RANKS[better]:.3f}, {PAPER_RANKS[worse]:.3f}",
                f"{ranks[better]:.3f}, {ranks[worse]:.3f}",
                ranks[better] > ranks[worse],
            )
        )
    for case in whole:
        if case[0] not in PAPER:
            continue
        theirs = dict(zip(five, PAPER[case[0]], strict=True))
        ours = {name: answers.mean(case, name, "beyond") or 0.0 for name in five}
        best, order = max(theirs, key=theirs.__getitem__), sorted(five, key=lambda name: -ours[name])
        shown = ", ".join(f"{name} {100 * ours[name]:.1f}" for name in order)
        rows.append(
            (
                f"{case[0]}: {best} is best past the lengths of training",
                ", ".join(f"{name} {100 * theirs[name]:.1f}" for name in sorted(five, key=lambda name: -theirs[name])),
                shown,
                ours[best] == max(ours.values()) > 0,
            )
        )
    unlearned = []
    for case in whole:
        within = {name: answers.mean(case, name, "within") or 0.0 for name in five}
        if min(within.values()) < LEARNED:
            unlearned.append(f"{_name(case)} ({', '.join(f'{name} {_percent(n)}' for name, n in within.items())})")
    body = [(finding, paper, here, "yes" if agrees else "**no**") for finding, paper, here, agrees in rows]
    wrong = sum(not row[-1] for row in rows)
    verdict = "All of it agrees." if not wrong else f"{wrong} of {len(rows)} do not agree."
    caveat = (
        f"Not learned by all five, with less than {LEARNED:.0%} right within the lengths of training: "
        f"{'; '.join(unlearned)}. There, what is past them says little.\n"
        if unlearned
        else ""
    )
    return f"""## Does it agree with the paper?

{verdict} (Of {len(whole)} tasks, {cells} cells of task and seed; in ranks, equal encodings share their places.)

{table(("finding", "in the paper", "here", "agrees"), body)}

{caveat}"""


def _ranks(answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    five = [name for name in encodings if name in PAPER_RANKS]
    (ranks, cells), (shared, _) = answers.ranks(cases, five), answers.ranks(cases, five, share_ties=True)
    every, every_cells = answers.ranks(cases, encodings, share_ties=True)

    def shown(found: Mapping[str, float], name: str) -> str:
        return f"{found[name]:.3f}" if name in found else "missing" if not found else ""

    body = [
        (name, shown(PAPER_RANKS, name), shown(ranks, name), shown(shared, name), shown(every, name))
        for name in encodings
    ]
    header = ("encoding", "paper", "here", "here, ties shared", "all encodings, ties shared")
    return f"""## Mean reciprocal ranks

By right answers past the lengths of training, without scratchpads: over {cells} cells (task and seed) among the paper's
five encodings (17 tasks in the paper), and {every_cells} among all. In the paper's code, of equal encodings the one
listed first ranks higher, which favours NoPE where all fail; with shared ties, equal encodings get the mean of their
reciprocal ranks.

{table(header, body)}
"""


def _by_task(answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    body = []
    for case in cases:
        paper = dict(zip(PAPER_RANKS, PAPER.get(case[0], ()), strict=False))
        body.append((case[0], *(_cell(answers, case, name, paper.get(name)) for name in encodings)))
    return f"""## By task

Percent right within / past the lengths of training, mean over seeds; in brackets the paper's past them.

{table(("task", *encodings), body)}
"""


def _cell(answers: Answers, case: Case, encoding: str, paper: float | None = None) -> str:
    within, beyond = (answers.mean(case, encoding, where) for where in ("within", "beyond"))
    cell = "missing" if within is None else f"{_percent(within)} / {_percent(beyond)}"
    return cell if paper is None else f"{cell} [{_percent(paper)}]"


def _scratchpads(answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    tasks = list(dict.fromkeys(task for task, format in cases if format != "none"))
    body = [
        (*case, *(_cell(answers, case, name) for name in encodings))
        for case in cases
        if case[0] in tasks and any(answers.seeds(case, name) for name in encodings)
    ]
    if all(format == "none" for _, format, *_ in body):
        return ""
    return f"""## Scratchpads

As above, by the parts of the scratchpad that the model writes before its answer ([data.md](data.md#tasks)). (The paper:
a scratchpad does not always help, and its format matters.)

{table(("task", "scratchpad", *encodings), body)}
"""


def _by_length(answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> str:
    sections = []
    for case in cases:
        scores = {name: found for name in encodings if (found := answers.seeds(case, name))}
        lengths = sorted({length for found in scores.values() for score in found for length in score.at})
        body = [
            (name, *(f"{100 * np.mean([score.at[length] for score in found]):.0f}" for length in lengths))
            for name, found in scores.items()
        ]
        if body:
            sections.append(f"### {_name(case)}\n\n{table(('encoding', *map(str, lengths)), body)}\n")
    return "\n".join(["## By length\n\nPercent right, mean over seeds.\n", *sections]) if sections else ""


def _draw(path: Path, answers: Answers, cases: Sequence[Case], encodings: Sequence[str]) -> None:
    across = min(len(cases), 3)
    figure = plots.new_figure(3.4 * across + 1.4, 2.3 * -(-len(cases) // across))
    figure.set_dpi(100)
    every_axes = plots.panels(figure, len(cases), across, sharey=True)
    for case, axes in zip(cases, every_axes, strict=True):
        shortest, longest = answers.seeds(case, encodings[0])[0].trained
        axes.axvspan(shortest - 0.5, longest + 0.5, color="#ededed", linewidth=0)
        for index, encoding in enumerate(encodings):
            found = answers.seeds(case, encoding)
            lengths = sorted(found[0].at)
            style = plots.line_style(index) | {"marker": None}
            shares = [np.mean([score.at[length] for score in found]) for length in lengths]
            axes.plot(lengths, shares, linewidth=1.4, label=encoding, **style)
        plots.finish(axes, "", "Right answers")
        axes.set_title(_name(case), fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(colors=plots.QUIET, labelsize=8)
    figure.legend(*every_axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    plots.save(path, figure)
