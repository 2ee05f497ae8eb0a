"""Perplexity and attention entropy by position, of runs compared past their training length: `eval.py` and no more."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from nope_jax.config import MeshConfig
from nope_jax.evaluation.common.console import Bar, plural
from nope_jax.evaluation.common.documents import Documents, plan_windows, read_documents
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv, store, stored
from nope_jax.evaluation.common.placement import evaluation_mesh, on_mesh
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run, find_runs, newest_step, result_identity
from nope_jax.evaluation.perplexity import dispersion, table
from nope_jax.evaluation.perplexity.figures import draw, entropy, scores
from nope_jax.evaluation.perplexity.measure import Curve, Sums, measure
from nope_jax.evaluation.perplexity.units import Units
from nope_jax.evaluation.registry import Options
from nope_jax.sharding import make_mesh, place_batch

SHARED = ("data.source", "eval.documents", "eval.stride", "eval.seed", "eval.entropy_unit")
"""Fields that must agree between runs."""


def plan(options: Options) -> "Perplexity":
    """Each run at every length that its encoding can take, on the same documents.

    Raises:
        ValueError: a run, a length, a corpus or a tokenizer that cannot be had, or runs that cannot be compared.
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
    """The curve of every run at each length: `Run.results`."""

    runs: Sequence[Run[Curve]]
    documents: Sequence[Documents]
    """What each run reads."""
    units: Units

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(sum(map(num_tokens, self.runs, self.documents)))
        for run, documents in zip(self.runs, self.documents, strict=True):
            newest = run.step = newest_step(run)
            identities = _take_kept(run, documents, out)
            if run.results:
                yield
            if len(run.results) < len(run.possible):
                bar.describe(f"{run.name}: loading")
                model = run.load(make_mesh(MeshConfig()))
                if run.step != newest:  # a run in training has gone on, or its newest cannot be read
                    identities = _take_kept(run, documents, out)
            missing = [length for length in run.possible if length not in run.results]
            bar.advance(num_tokens(run, documents, set(run.results)))
            settings = run.config.eval
            for length in missing:
                bar.describe(f"{run.name} at {length:,}")
                unfinished = _path(out, run, length, "unfinished-")
                batch_size = min(settings.batch_size, num_tokens(run, documents, [length]) // length)
                mesh = evaluation_mesh(run.config.model, batch_size, length)
                with jax.set_mesh(mesh):
                    run.results[length] = measure(
                        on_mesh(model, mesh),
                        [document.tokens for document in documents[length]],
                        length,
                        byte_lengths=[document.byte_lengths for document in documents[length]],
                        stride=settings.stride,
                        bos=run.config.data.bos,
                        batch_size=batch_size,
                        place=functools.partial(place_batch, mesh=mesh),
                        advance=bar.advance,
                        done=stored(unfinished, Sums, identities[length]),
                        keep=functools.partial(store, unfinished, identity=identities[length]),
                    )
                store(_path(out, run, length), run.results[length], identities[length])
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
        return [*sections, dispersion.entropy_section(runs, units), dispersion.section(runs, units), table.memory(runs)]

    def describe_corpus(self) -> str:
        """What was read, by which checkpoints, and what the losses are per."""
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
                score += " Bits per byte are not known, since there is no text, only tokens."
        else:
            score = (
                f"The runs differ in tokenizer ({', '.join(tokenizers)}), so that losses are in bits per byte: summed "
                "over the scored tokens, and divided by the bytes of UTF-8 text from the end of the token before each "
                "to its own. They read the same documents, each in its own tokens: at one position they have read "
                "different amounts of text."
            )
        steps = ", ".join(f"{run.name} at {run.step:,}" for run in self.measured)
        source = self.runs[0].config.data.source
        return f"Read: {read} of the validation split of {source}. Checkpoints, by step: {steps}. {score}"


def num_tokens(run: Run[Curve], documents: Documents, lengths: Collection[int] | None = None) -> int:
    """Tokens that the model reads at some lengths (None: all), those that do not count included."""
    return sum(
        length * len(plan_windows([len(d.tokens) for d in documents[length]], length, run.config.eval.stride))
        for length in (run.possible if lengths is None else lengths)
    )


def _take_kept(run: Run[Curve], documents: Documents, out: Path) -> dict[int, str]:
    """Fills in those curves of `run.step` that are kept in `out`; returns what each length's follows from."""
    run.results.clear()
    identities = {}
    for length in run.possible:
        digest, data, stride = hashlib.sha256(), run.config.data, run.config.eval.stride
        for document in documents[length]:
            # Read from its start, a document may be longer because others are read further.
            end = None if stride else length + 1
            digest.update(document.tokens[:end].tobytes() + b"|" + document.byte_lengths[:end].tobytes() + b"|")
        identities[length] = result_identity(run, data.tokenizer, data.bos, stride, length, digest.hexdigest())
        if (curve := stored(_path(out, run, length), Curve, identities[length])) is not None:
            run.results[length] = curve
    return identities


def _path(out: Path, run: Run[Curve], length: int, kind: str = "") -> Path:
    return out / "measured" / f"{kind}{run.name.replace('/', '-')}-{length}.npz"
