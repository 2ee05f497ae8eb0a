"""Perplexity and attention entropy by position, within and past the training length (`eval.py` without a name)."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from nope_jax.data import describe
from nope_jax.evaluation.common.console import Bar, plural
from nope_jax.evaluation.common.documents import VALIDATION, Documents, plan_windows, read_documents
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv, store, stored, writes
from nope_jax.evaluation.common.placement import Placement, on_mesh
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run, checkpoint_step, find_runs, result_identity
from nope_jax.evaluation.perplexity import dispersion, table
from nope_jax.evaluation.perplexity.figures import draw, entropy, scores
from nope_jax.evaluation.perplexity.measure import Curve, Sums, measure
from nope_jax.evaluation.perplexity.units import Units
from nope_jax.evaluation.registry import Options

SHARED = (*VALIDATION, "eval.documents", "eval.stride", "eval.seed", "eval.entropy_unit")
"""Config fields that must agree between runs."""


def plan(options: Options) -> "Perplexity":
    """Plans the evaluation of each run at every length its encoding supports, on the same documents.

    Raises:
        ValueError: a run, a length, a corpus or a tokenizer is invalid, or the runs cannot be compared.
    """
    runs: list[Run[Curve]] = find_runs(options, SHARED)
    settings, tokenizers = runs[0].config.eval, {run.config.data.tokenizer for run in runs}
    if settings.stride is not None and settings.stride > options.lengths[0]:
        raise ValueError(
            f"eval.stride must be at most {options.lengths[0]}, the shortest of --lengths, not {settings.stride}"
        )
    units = Units(settings.stride, bits_per_byte=len(tokenizers) > 1, entropy_unit=settings.entropy_unit)
    return Perplexity(runs, read_documents(runs), units)


@dataclasses.dataclass
class Perplexity(Evaluation):
    """Perplexity and entropy curves; `Run.results` holds the curve of each run at each length."""

    runs: Sequence[Run[Curve]]
    documents: Sequence[Documents]
    """The documents that each run reads."""
    units: Units

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(sum(map(_work, self.runs, self.documents)))
        for run, documents in zip(self.runs, self.documents, strict=True):
            newest = run.step = checkpoint_step(run)
            identities = _take_kept(run, documents, out)
            if run.results:
                yield
            if missing := _missing(run):
                bar.describe(f"{run.name}: loading")
                model = run.load(_place(run, documents, missing[0]).mesh)
                if run.step != newest:  # a run in training has moved on, or its newest checkpoint is unreadable
                    identities = _take_kept(run, documents, out)
            bar.advance(_work(run, documents, set(run.results)))
            for length in _missing(run):
                bar.describe(f"{run.name} at {length:,}")
                unfinished = _path(out, run, length, "unfinished-")
                placement = _place(run, documents, length)
                model = on_mesh(model, placement.mesh)
                with jax.set_mesh(placement.mesh):
                    run.results[length] = measure(
                        model,
                        [document.tokens for document in documents[length]],
                        length,
                        byte_lengths=[document.byte_lengths for document in documents[length]],
                        stride=run.config.eval.stride,
                        bos=run.config.data.bos,
                        batch_size=placement.rows,
                        place=placement.put,
                        advance=_progress(bar, run, length),
                        done=stored(unfinished, Sums, identities[length]),
                        keep=functools.partial(store, unfinished, identity=identities[length]),
                    )
                store(_path(out, run, length), run.results[length], identities[length])
                if writes():
                    unfinished.unlink(missing_ok=True)
                yield

    def numbers(self) -> Mapping[str, Csv | Mapping[str, Any]]:
        return {
            "curves.csv": Csv(table.COLUMNS, table.curve_rows(self.measured, self.units)),
            "differences.csv": Csv(table.DIFFERENCE_COLUMNS, table.pair_rows(self.measured, self.units)),
            "heads.npz": table.head_arrays(self.measured),
            "heads.csv": Csv(dispersion.COLUMNS, dispersion.head_rows(self.measured, self.units)),
        }

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "perplexity.png", draw(self.measured, self.units, scores)
        yield "entropy.png", draw(self.measured, self.units, entropy)
        yield "curves.png", draw(self.measured, self.units, scores, entropy)
        if dispersion.past_training(self.measured):
            yield "dispersion.png", dispersion.draw(self.measured)

    def sections(self) -> list[Section]:
        runs, units = self.measured, self.units
        sections = [table.section(runs, units, self.describe_corpus())]
        if len(runs) > 1:
            sections.append(table.difference_section(runs, units))
        return [*sections, dispersion.entropy_section(runs, units), dispersion.section(runs, units), table.cost(runs)]

    def describe_corpus(self) -> str:
        """Describes the documents, the checkpoints, and the unit of the losses."""
        documents = self.documents[0]
        counts = {length: plural(len(read), "document") for length, read in documents.items()}
        if len(set(counts.values())) == 1:
            read = f"{counts[min(counts)]}, the same at every length,"
        else:
            read = ", ".join(f"{count} at {length:,}" for length, count in counts.items()) + ","
        tokenizers = list(dict.fromkeys(run.config.data.tokenizer for run in self.runs))
        if len(tokenizers) == 1:
            score = f"Perplexity is per token ({tokenizers[0]})."
            if not any(document.byte_lengths.any() for read_at in documents.values() for document in read_at):
                score += " Bits per byte are unknown: the corpus, or a part of it, has tokens but no text."
        else:
            score = (
                f"The runs differ in tokenizer ({', '.join(tokenizers)}), so losses are in bits per byte: the sum over "
                "the scored tokens, divided by the bytes of UTF-8 text from the end of the preceding token to the end "
                "of each. All runs read the same documents, each in its own tokens: at the same position they have "
                "read different amounts of text."
            )
        steps = ", ".join(f"{run.name} at {run.step:,}" for run in self.measured)
        source = describe(self.runs[0].config.data, "validation")
        return f"Read: {read} of the validation split of {source}. Checkpoints, by step: {steps}. {score}"


def _missing(run: Run[Curve]) -> list[int]:
    """The lengths that are not measured yet."""
    return [length for length in run.possible if length not in run.results]


def _place(run: Run[Curve], documents: Documents, length: int) -> Placement:
    windows = num_tokens(run, documents, [length]) // length
    return run.place(min(run.config.eval.batch_size, windows), length)


def num_tokens(run: Run[Curve], documents: Documents, lengths: Collection[int] | None = None) -> int:
    """Number of tokens the model reads at some lengths (None: all), including those that are not scored."""
    return sum(
        length * len(plan_windows([len(d.tokens) for d in documents[length]], length, run.config.eval.stride))
        for length in (run.possible if lengths is None else lengths)
    )


def _work(run: Run[Curve], documents: Documents, lengths: Collection[int] | None = None) -> float:
    """The work of reading some lengths (None: all), in multiplications."""
    lengths = run.possible if lengths is None else lengths
    return sum(num_tokens(run, documents, [length]) * _work_per_token(run, length) for length in lengths)


def _work_per_token(run: Run[Curve], length: int) -> float:
    """Multiplications with every parameter and, over all layers, with half of the `length` keys and values."""
    model = run.config.model
    width = model.num_heads * (model.head_dim or model.model_dim // model.num_heads)
    return run.parameters + model.num_layers * width * length


def _progress(bar: Bar, run: Run[Curve], length: int) -> Callable[[int], None]:
    """A function that advances the bar by a number of tokens, and describes the speed."""
    started, read = time.monotonic(), 0

    def advance(tokens: int) -> None:
        nonlocal read
        read += tokens
        bar.describe(f"{run.name} at {length:,}", f"{read / (time.monotonic() - started):,.0f} tokens/s")
        bar.advance(tokens * _work_per_token(run, length))

    return advance


def _take_kept(run: Run[Curve], documents: Documents, out: Path) -> dict[int, str]:
    """Loads the curves of `run.step` stored in `out` into `run.results`; returns the identity of each length."""
    run.results.clear()
    identities = {}
    for length in run.possible:
        digest, data, stride = hashlib.sha256(), run.config.data, run.config.eval.stride
        for document in documents[length]:
            # Without a stride, a document may hold more tokens than this length reads, for the sake of longer lengths.
            end = None if stride else length + 1
            digest.update(document.tokens[:end].tobytes() + b"|" + document.byte_lengths[:end].tobytes() + b"|")
        identities[length] = result_identity(run, data.tokenizer, data.bos, stride, length, digest.hexdigest())
        if (curve := stored(_path(out, run, length), Curve, identities[length])) is not None:
            run.results[length] = curve
    return identities


def _path(out: Path, run: Run[Curve], length: int, kind: str = "") -> Path:
    return out / "measured" / f"{kind}{run.name.replace('/', '-')}-{length}.npz"
