"""Trained runs compared past their training length: what eval.py does without a further word."""

import dataclasses
import functools
import hashlib
import operator
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.cli import EvalArguments
from nope_jax.config import Config, MeshConfig
from nope_jax.data import Corpus, load_corpus
from nope_jax.evaluation import figures, table
from nope_jax.evaluation.console import plural, progress_bar
from nope_jax.evaluation.curves import Curve, Sums, measure
from nope_jax.evaluation.files import store, stored, write_curves, write_differences, write_heads, write_spreading
from nope_jax.evaluation.placement import evaluation_mesh, on_mesh
from nope_jax.evaluation.protocol import choose_documents, plan_windows
from nope_jax.evaluation.report import add_section, curves_section
from nope_jax.evaluation.run import Run, encoding_name, newest_step, result_identity, run_names
from nope_jax.evaluation.view import View
from nope_jax.models import Decoder
from nope_jax.sharding import make_mesh, place_batch

SHARED = ("data.source", "eval.documents", "eval.stride", "eval.seed", "eval.entropy_unit")
"""Fields that must agree between runs: only like is compared with like."""


class Document(NamedTuple):
    tokens: np.ndarray
    byte_lengths: np.ndarray
    """The bytes of text that belong to each token; zeros where it is not made from text, or that is not there."""


Documents = dict[int, list[Document]]
"""For each length, the documents that are read at it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to measure, and what it reads."""

    workdir: Path
    config: Config
    run: Run
    documents: Documents

    def num_tokens(self, lengths: Collection[int] | None = None) -> int:
        """Tokens that the model reads at some lengths (None: all), those that do not count included."""
        return sum(
            length * len(plan_windows([len(d.tokens) for d in self.documents[length]], length, self.config.eval.stride))
            for length in (self.run.possible if lengths is None else lengths)
        )

    def identities(self, step: int) -> dict[int, str]:
        """For each length, what the curve of a checkpoint follows from."""
        config = self.config
        identities = {}
        for length in self.run.possible:
            digest = hashlib.sha256()
            for document in self.documents[length]:
                # Read from its start, a document may be longer because others are read further.
                end = None if config.eval.stride else length + 1
                digest.update(document.tokens[:end].tobytes() + b"|" + document.byte_lengths[:end].tobytes() + b"|")
            how = (config.data.tokenizer, config.data.bos, config.eval.stride, length, digest.hexdigest())
            identities[length] = result_identity(self.workdir, config, step, *how)
        return identities


def compare(
    workdirs: Sequence[Path], lengths: Sequence[int], out: Path, overrides: Mapping[str, Any], *, command: str
) -> None:
    """Measures every run at every length; writes curves, heads, figures and report to `out`, and prints a table.

    What has been measured is written even if the rest fails or is interrupted.

    Args:
        workdirs: what `train.py` wrote.
        lengths: in tokens; a run is measured at those that its encoding can take, at least one.
        out: a directory, created if need be.
        overrides: data.* and eval.* fields by dotted name, over those of each run's own config.
        command: what the user typed, for the report.

    Raises:
        ValueError: a run, a length, a corpus or a tokenizer that cannot be had, or runs that cannot be compared.
        OSError: `out` cannot be written.
    """
    jobs = _plan(workdirs, sorted(set(lengths)), overrides)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    view = View(
        jobs[0].config.eval.stride,
        bits_per_byte=len({job.config.data.tokenizer for job in jobs}) > 1,
        entropy_unit=jobs[0].config.eval.entropy_unit,
    )
    try:
        _measure_all(jobs, out)
    finally:
        if runs := [job.run for job in jobs if job.run.curves]:
            write_curves(out / "curves.csv", runs, view.stride)
            write_differences(out / "differences.csv", runs, view)
            write_heads(out / "heads.npz", runs)
            write_spreading(out / "heads.csv", runs, view.stride)
            figures.plot_perplexity(out / "perplexity.png", runs, view)
            figures.plot_entropy(out / "entropy.png", runs, view)
            figures.plot_curves(out / "curves.png", runs, view)
            corpus = _describe_corpus(jobs)
            section = curves_section(out, runs, view, command=command, corpus=corpus)
            add_section(out, "curves", section, workdirs)
            table.print_table(runs, view, corpus, f"Written to {out}: see report.html there.")


def curves(options: EvalArguments, *, command: str) -> None:
    """`eval.py` without a further word: `compare`."""
    compare(options.workdirs, options.lengths, options.out, options.overrides, command=command)


def _plan(workdirs: Sequence[Path], lengths: Sequence[int], overrides: Mapping[str, Any]) -> list[Job]:
    """Finds out all that can be wrong before anything large is loaded or computed."""
    names = run_names(workdirs)
    loaded = [configs.override(configs.load(workdir), overrides) for workdir in workdirs]
    for field in SHARED:
        values = [operator.attrgetter(field)(config) for config in loaded]
        if len(set(values)) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
            raise ValueError(f"{field} differs between the runs ({listed}); give --{field} for all of them")
    stride = loaded[0].eval.stride
    if stride is not None and stride > lengths[0]:
        raise ValueError(f"eval.stride must be at most {lengths[0]}, the shortest of --lengths, not {stride}")

    found = [
        find_run(workdir, name, config, lengths) for workdir, name, config in zip(workdirs, names, loaded, strict=True)
    ]
    read = _read_documents(loaded, lengths)
    return [
        Job(workdir, config, run, documents)
        for workdir, config, run, documents in zip(workdirs, loaded, found, read, strict=True)
    ]


def find_run(workdir: Path, name: str, config: Config, lengths: Sequence[int]) -> Run:
    """A trained run, with nothing measured yet.

    Raises:
        ValueError: no checkpoint, a tokenizer with more tokens than the model, or no length that the model can read.
    """
    newest_step(workdir, config)
    train_length = config.model.train_length
    assert train_length is not None  # Config fills it in
    max_length = nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))).max_length
    run = Run(name, encoding_name(config.model.encoding), train_length, max_length, tuple(lengths))
    if not run.possible:
        raise ValueError(
            f"--lengths: {name} reads none of them, its {run.encoding} encoding has {max_length} positions"
        )
    return run


def _read_documents(loaded: Sequence[Config], lengths: Sequence[int]) -> list[Documents]:
    """For each run what it reads: the same documents, whatever the tokenizer, those that are long enough in every one.

    Raises:
        ValueError: a corpus that cannot be had, or corpora that are not of the same documents.
    """
    corpora: dict[tuple, Corpus] = {}
    for config in loaded:
        if (key := _corpus_key(config)) not in corpora:
            corpora[key] = load_corpus(config.data, "validation")
    first, *others = corpora.values()
    if any(len(first) != len(other) for other in others):
        sizes = ", ".join(f"{key[0] or 'the default'}: {len(corpus)}" for key, corpus in corpora.items())
        raise ValueError(f"data.dir: the runs find different numbers of validation documents there ({sizes})")
    has_text = all(map(_has_text, corpora.values()))
    if len({config.data.tokenizer for config in loaded}) > 1 and not has_text:
        why = "is made of tokens" if first.byte_lengths is None else "has no text in data.dir, only tokens"
        raise ValueError(
            f"data.source {loaded[0].data.source} {why}, which the runs do not share (data.tokenizer differs); compare "
            "them on text with --data.source"
        )
    token_counts = np.min([corpus.lengths for corpus in corpora.values()], axis=0)
    settings = loaded[0].eval
    chosen = choose_documents(token_counts, lengths, settings.documents, settings.seed)
    # Of a document that is read from its start, no more is kept than is read.
    end = max(lengths) + 1 if settings.stride is None else None
    read = {}
    for key, corpus in corpora.items():
        documents = {}
        for i in {int(i) for indices in chosen.values() for i in indices}:
            tokens = corpus[i][:end]
            byte_lengths = np.zeros(len(tokens), np.int64)
            if has_text and corpus.byte_lengths:
                byte_lengths = corpus.byte_lengths(i)[:end]
            documents[i] = Document(tokens, byte_lengths)
        read[key] = {length: [documents[int(i)] for i in indices] for length, indices in chosen.items()}
    return [read[_corpus_key(config)] for config in loaded]


def _has_text(corpus: Corpus) -> bool:
    """Whether the bytes of its tokens can be known; of a prepared corpus the tokens alone may have been copied here."""
    if corpus.byte_lengths is None:
        return False
    try:
        corpus.byte_lengths(0)
    except OSError:
        return False
    return True


def _corpus_key(config: Config) -> tuple[str | None, str, bool]:
    return config.data.dir, config.data.tokenizer, config.data.bos


def _measure_all(jobs: Sequence[Job], out: Path) -> None:
    """Fills in the curves of every run, and keeps curves.csv up to date with them."""
    with progress_bar() as progress:
        bar = progress.add_task("", total=sum(job.num_tokens() for job in jobs))
        for job in jobs:
            identities = _take_kept(job, newest_step(job.workdir, job.config), out)
            if len(job.run.curves) < len(job.run.possible):
                progress.update(bar, description=f"{job.run.name}: loading")
                _, model, step = load_model(job.workdir, make_mesh(MeshConfig()))
                if step != job.run.step:  # a run in training has gone on, or its newest cannot be read
                    identities = _take_kept(job, step, out)
            missing = [length for length in job.run.possible if length not in job.run.curves]
            progress.advance(bar, job.num_tokens(set(job.run.curves)))
            settings = job.config.eval
            for length in missing:
                progress.update(bar, description=f"{job.run.name} at {length:,}")
                documents, identity = job.documents[length], identities[length]
                unfinished = _path(out, job, length, "unfinished-")
                batch_size = min(settings.batch_size, job.num_tokens([length]) // length)
                mesh = evaluation_mesh(job.config.model, batch_size, length)
                with jax.set_mesh(mesh):
                    job.run.curves[length] = measure(
                        on_mesh(model, mesh),
                        [document.tokens for document in documents],
                        length,
                        byte_lengths=[document.byte_lengths for document in documents],
                        stride=settings.stride,
                        bos=job.config.data.bos,
                        batch_size=batch_size,
                        place=functools.partial(place_batch, mesh=mesh),
                        advance=functools.partial(progress.advance, bar),
                        done=stored(unfinished, Sums, identity),
                        keep=functools.partial(store, unfinished, identity=identity),
                    )
                store(_path(out, job, length), job.run.curves[length], identity)
                unfinished.unlink(missing_ok=True)
                write_curves(out / "curves.csv", [job.run for job in jobs], settings.stride)
        progress.update(bar, description="measured")


def _take_kept(job: Job, step: int, out: Path) -> dict[int, str]:
    """Fills in those curves of a checkpoint that are kept in `out`; returns what each length's follows from."""
    identities = job.identities(step)
    job.run.step = step
    job.run.curves.clear()
    for length, identity in identities.items():
        if (curve := stored(_path(out, job, length), Curve, identity)) is not None:
            job.run.curves[length] = curve
    return identities


def _path(out: Path, job: Job, length: int, kind: str = "") -> Path:
    return out / "measured" / f"{kind}{job.run.name.replace('/', '-')}-{length}.npz"


def _describe_corpus(jobs: Sequence[Job]) -> str:
    counts = {length: plural(len(documents), "document") for length, documents in jobs[0].documents.items()}
    if len(set(counts.values())) == 1:
        read = f"{counts[min(counts)]}, the same at every length,"
    else:
        read = ", ".join(f"{count} at {length:,}" for length, count in counts.items()) + ","
    tokenizers = list(dict.fromkeys(job.config.data.tokenizer for job in jobs))
    if len(tokenizers) == 1:
        score = f"Perplexity is per token ({tokenizers[0]})."
        if not any(document.byte_lengths.any() for read_at in jobs[0].documents.values() for document in read_at):
            score += " Bits per byte are not known, since there is no text, only tokens."
    else:
        score = (
            f"The runs differ in tokenizer ({', '.join(tokenizers)}), so that losses are in bits per byte: summed over "
            "the scored tokens, and divided by the bytes of UTF-8 text from the end of the token before each to its "
            "own. They read the same documents, each in its own tokens: at one position they have read different "
            "amounts of text."
        )
    steps = ", ".join(f"{job.run.name} at {job.run.step:,}" for job in jobs if job.run.step is not None)
    return (
        f"Read: {read} of the validation split of {jobs[0].config.data.source}. Checkpoints, by step: {steps}. {score}"
    )
