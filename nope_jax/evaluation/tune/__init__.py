"""Extends the context of a trained run, by factors of its attention logits or by a scaling of its RoPE."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from matplotlib.figure import Figure

from nope_jax import config as configs
from nope_jax.distributed import from_process_0
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.documents import choose_documents, load_same_corpus
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run, find_runs, refuse_length
from nope_jax.evaluation.registry import Options
from nope_jax.evaluation.tune import report
from nope_jax.evaluation.tune.methods import LEARNED, new_encoding, refuse_method
from nope_jax.evaluation.tune.search import Job, Tuner
from nope_jax.evaluation.tune.state import read_updates


def plan(options: Options) -> "Tune":
    """Plans a context extension of one run, by one of these methods:

        uniform: one factor for all attention logits. For each length, the factor with the lowest loss, from a grid and
            then golden-section search to 0.01; the run gets the factor of the longest length. This is for NoPE; it does
            not help RoPE.
        head: one factor per layer and head, learned with Adam from the best uniform factor for the longest length. Each
            update reads windows of one length; the lengths alternate, and the last update reads the longest. With
            `settings.focus` every factor is kept at 1 or above ("focus constraint").
        log-n: max(1, log_L n) for a query that sees n keys, with L the training length. Nothing is learned.
        ssmax: s·ln n with s per layer and head, learned as in `head`, starting at a multiple of 1/ln L. The focus
            constraint does not apply, since these factors are below 1 for the first queries in any case.
        linear, ntk, yarn: scaling of RoPE by the longest length divided by L, in every layer with RoPE, also within a
            wrapper. Nothing is learned.
        dynamic: NTK-aware scaling by n/L at each length n, which is dynamic NTK with s = 1. With a larger s, dynamic
            NTK scales by s·n/L - (s-1), more than n/L: at the longest length by s² - s + 1 instead of s.

    `options.out` becomes a workdir. It gets config.json with the new encoding, and a checkpoint with only the
    parameters, at the step of the source; tune.json with all results, and tune.jsonl with one line per update of a
    learned method; and tune.csv, tune.png and report.html. If tuning is interrupted, all but the first two are written,
    and the same command resumes from them, with bitwise the same result as an uninterrupted one.

    Raises:
        ValueError: several workdirs are given, `out` holds a run, the run or its documents do not reach a length, or
            the method cannot tune the encoding.
    """
    method, out, lengths = options.method or "uniform", options.out, options.lengths
    if len(options.workdirs) != 1:
        raise ValueError(f"--workdirs: tune takes one run, not {len(options.workdirs)}")
    # The tuned run gets the parameters that are read here, so they are read as they are.
    (run,) = find_runs(options._replace(overrides=options.overrides | {"eval.dtype": None}))
    unfinished = (out / "tune.json").exists() and not (out / "config.json").exists()
    if not unfinished and any((out / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(f"--out {out} holds a run already; choose another")
    refuse_length([run], lengths[-1])
    refuse_method(dataclasses.replace(run.config.model, encoding=new_encoding(run.config, method, lengths)), method)

    corpus, settings = load_same_corpus(run.config.data, "train"), options.settings
    documents = choose_documents(corpus.lengths, lengths, settings.documents, settings.seed, split="training")
    return Tune([run], Job(run, out, method, settings, corpus, documents), options.command)


@dataclasses.dataclass
class Tune(Evaluation):
    """The tuning of one run."""

    writes_run: ClassVar[bool] = True
    runs: list[Run]
    job: Job
    command: str

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        """See `plan`.

        Raises:
            ValueError: `out` holds an interrupted tuning with other settings.
            FloatingPointError: the loss is not finite at any factor, or becomes so while factors are learned.
        """
        (run,) = self.runs
        bar.describe(f"{run.name}: loading")
        rows = self.job.settings.batch_size
        if self.job.method not in LEARNED:
            rows = min(rows, *map(len, self.job.documents.values()))
        placement = run.place(rows, math.gcd(*run.lengths))
        model = run.load(placement.mesh)
        self.tuning = from_process_0(lambda: self.job.begin(self.command).or_continued(out))
        tuner = Tuner(self.job, self.tuning, placement, bar)
        self.remark = f"Not finished: the same command resumes from {out}."
        try:
            yield from tuner.find(model)
            self.remark = f"Written to {out}: a workdir for eval.py, or for train.init_from; see report.html there."
        except FloatingPointError:
            self.remark = f"Diverged: the results so far are in {out}; to try other settings, choose another --out."
            raise
        finally:
            if self.tuning.lengths[0].loss_before is not None:
                self.tuning.keep(out)
        # The config of the run itself, without the overrides of the command line, except where its tokenizer lies.
        config = run.trained.config
        data = dataclasses.replace(config.data, tokenizer=run.config.data.tokenizer)
        self.tuned = dataclasses.replace(config, model=tuner.config, data=data)

    def numbers(self) -> Mapping[str, Csv]:
        return {"tune.csv": Csv(report.COLUMNS, report.csv_rows(self.tuning))}

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "tune.png", report.draw(self.tuning, read_updates(self.job.out))

    def sections(self) -> list[Section]:
        return [report.section(self.job.out, self.tuning)]

    def finish(self, out: Path) -> None:
        # config.json makes `out` a workdir, so it is written last: a workdir is always complete.
        configs.save(self.tuned, out)
