"""What lets a trained run hold past its training length: factors of its attention logits, or a scaling of its RoPE."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from matplotlib.figure import Figure

from nope_jax import config as configs
from nope_jax.data import load_corpus
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.documents import choose_documents
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.placement import over_devices
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run, find_runs, refuse_length
from nope_jax.evaluation.registry import Options
from nope_jax.evaluation.tune import report
from nope_jax.evaluation.tune.methods import new_encoding, refuse_method
from nope_jax.evaluation.tune.search import Job, Tuner
from nope_jax.evaluation.tune.state import read_updates


def plan(options: Options) -> "Tune":
    """A run made to hold further, by one of these methods:

        uniform: one factor of all attention logits. For each length the one with the least loss, from a grid and then
            golden-section search to 0.01; the run gets that of the longest. It is for NoPE: RoPE it does not help.
        head: one factor per layer and head, learned by Adam, starting at the best uniform one for the longest length.
            Each update reads windows of one length; the lengths take turns, and the last update has the longest.
            With `settings.focus` every factor is kept at 1 or above ("focus constraint").
        log-n: max(1, log_L n) for a query that sees n keys, L the training length. Nothing is learned.
        ssmax: s·ln n with s per layer and head, learned as in `head` from a multiple of 1/ln L on. The focus constraint
            does not apply to it, whose factors are below 1 for the first queries in any case.
        linear, ntk, yarn: a scaling of RoPE by the longest length over L, in every layer that has RoPE, be it within a
            wrapper. Nothing is learned.
        dynamic: NTK-aware scaling by n/L at each length n, which is dynamic NTK with s = 1: with a larger s its
            s·n/L - (s-1) is more than n/L asks for, at the longest length s² - s + 1 in place of s.

    `options.out` becomes a workdir: config.json with the new encoding, a checkpoint of the parameters alone at the step
    of the source; tune.json with all that was found, and tune.jsonl with a line per update of a learned method; and to
    look at, tune.csv, tune.png and report.html. Whatever stops it, what was found until then is in these but for the
    first two, and the same command goes on from there: with the same result, to the bit, as if never stopped.

    Raises:
        ValueError: several workdirs, `out` holds a run, the run or its documents do not reach a length, or the encoding
            cannot be tuned by this method.
    """
    method, out, lengths = options.method or "uniform", options.out, options.lengths
    if len(options.workdirs) != 1:
        raise ValueError(f"--workdirs: tune takes one run, not {len(options.workdirs)}")
    (run,) = find_runs(options)
    unfinished = (out / "tune.json").exists() and not (out / "config.json").exists()
    if not unfinished and any((out / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(f"--out {out} holds a run already; choose another")
    refuse_length([run], lengths[-1])
    refuse_method(dataclasses.replace(run.config.model, encoding=new_encoding(run.config, method, lengths)), method)

    corpus, settings = load_corpus(run.config.data, "train"), options.settings
    documents = choose_documents(corpus.lengths, lengths, settings.documents, settings.seed, split="training")
    return Tune([run], Job(run, out, method, settings, corpus, documents), options.command)


@dataclasses.dataclass
class Tune(Evaluation):
    """A tuning as far as it has come."""

    writes_run: ClassVar[bool] = True
    runs: list[Run]
    job: Job
    command: str

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        """See `plan`.

        Raises:
            ValueError: `out` holds what another tuning has left.
            FloatingPointError: the loss is not finite at any factor, or does not stay finite while factors are learned.
        """
        (run,) = self.runs
        bar.describe(f"{run.name}: loading")
        mesh, rows = over_devices(self.job.settings.batch_size)
        model = run.load(mesh)
        self.tuning = self.job.begin(self.command).or_continued(out)
        tuner = Tuner(self.job, self.tuning, mesh, rows, bar)
        self.remark = f"Not finished: the same command goes on from what is in {out}."
        try:
            yield from tuner.find(model)
            self.remark = f"Written to {out}: a workdir for eval.py, or for train.init_from; see report.html there."
        except FloatingPointError:
            self.remark = f"Diverged: what was found until then is in {out}; other settings take another --out."
            raise
        finally:
            if self.tuning.lengths[0].loss_before is not None:
                self.tuning.keep(out)
        # The config is its own, whatever the command line has overridden.
        self.tuned = dataclasses.replace(configs.load(run.workdir), model=tuner.config)

    def numbers(self) -> Mapping[str, Csv]:
        return {"tune.csv": Csv(report.COLUMNS, report.csv_rows(self.tuning))}

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "tune.png", report.draw(self.tuning, read_updates(self.job.out))

    def sections(self) -> list[Section]:
        return [report.section(self.job.out, self.tuning)]

    def finish(self, out: Path) -> None:
        # What makes a workdir of it comes last, so that there is never one that lacks something.
        configs.save(self.tuned, out)
