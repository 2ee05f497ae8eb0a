"""What eval.py curves says beyond the loss in tokens: bits per byte, which heads spread out, memory; and going on."""

import csv
import itertools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax.cli import parse_eval
from nope_jax.evaluation.common.console import print_sections
from nope_jax.evaluation.common.documents import plan_windows
from nope_jax.evaluation.common.files import store, stored
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.perplexity import figures, table
from nope_jax.evaluation.perplexity.dispersion import COLUMNS, RISE, dispersion, draw, remark
from nope_jax.evaluation.perplexity.measure import Curve, Sums, evaluation_step, measure, peak_memory, program_memory
from nope_jax.evaluation.perplexity.units import Units
from nope_jax.models import abstract_decoder, decoder
from tests.support.evaluation_cases import (
    HEADS,
    LAYERS,
    Bigram,
    expected_nll,
    page,
    show,
    some_documents,
    synthetic_run,
    without_errors,
    write,
)

# Bits per byte


@pytest.mark.parametrize("stride", [None, 3])
def test_bits_per_byte_are_those_of_a_direct_computation(stride):
    documents, length = some_documents(40, 30, 25), 20
    byte_lengths = [np.random.default_rng(len(d)).integers(0, 4, len(d)) for d in documents]
    curve = measure(Bigram(), documents, length, byte_lengths=byte_lengths, stride=stride, batch_size=2)
    bits, text = np.zeros((3, length)), np.zeros((3, length))
    for window in plan_windows([40, 30, 25], length, stride):
        nll = expected_nll(documents[window.document])
        for position in range(window.scored_from, length):
            bits[window.document, position] += nll[window.start + position] / math.log(2)
            text[window.document, position] += byte_lengths[window.document][window.start + position + 1]
    for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
        if total := text[:, start:end].sum():
            ratio = bits[:, start:end].sum() / total
            residuals = (bits[:, start:end] - ratio * text[:, start:end]).sum(1)
            np.testing.assert_allclose(curve.bits_per_byte.value[i], ratio, rtol=1e-5)
            np.testing.assert_allclose(
                curve.bits_per_byte.stderr[i], math.sqrt(3) * residuals.std(ddof=1) / total, rtol=1e-4
            )
    expected = bits[:2, 8:18].sum() / text[:2, 8:18].sum()
    np.testing.assert_allclose(curve.between(8, 18, documents=2).bits_per_byte.value, [expected], rtol=1e-5)
    if stride is not None:
        assert curve.text_bytes.sum() == sum(lengths[1:].sum() for lengths in byte_lengths)


def test_a_bucket_without_text_has_no_bits_per_byte(tmp_path):
    run = synthetic_run(lengths=(128,))
    run.results[128].text_bytes[:, 5] = 0
    assert np.flatnonzero(np.isnan(run.results[128].bits_per_byte.value)).tolist() == [5]
    assert np.flatnonzero(np.isnan(run.results[128].bits_per_byte.stderr)).tolist() == [5]
    write(tmp_path, [run])
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = ("text_bytes", "bits_per_byte", "bits_per_byte_stderr")
    assert [rows[5][name] for name in columns] == ["", "", ""]
    assert [rows[6][name] for name in columns] == ["8", "1.4427", "0"]  # 2 nats per token of 2 bytes, 4 documents
    figures.draw([run], Units(bits_per_byte=True), figures.scores, figures.entropy)  # warns of nothing


def test_table_and_figure_are_in_bits_per_byte_where_tokenizers_differ(capsys):
    run = synthetic_run("rope", lambda p: 2.0 + 8 * (p >= 512))
    units = Units(bits_per_byte=True)
    row = dict(zip(table.header(units), without_errors(table.rows([run], units)[0]), strict=True))
    inside, past = 2 / 2 / math.log(2), 10 / 2 / math.log(2)
    assert (row["bits/byte in-window"], row["2x"], row["16x"]) == (f"{inside:.3f}", f"{inside:.3f}", f"{past:.3f}")
    assert row["within 10 % up to"] == "512"
    print_sections([table.section([run], units, corpus="")])
    printed = capsys.readouterr().out
    assert (
        "Bits per byte by position, protocol: from start" in printed
        and "erplexity" not in printed.partition("Plain perplexity and passkeys")[0]
    )

    (axes,) = figures.draw([run], units, figures.scores).axes
    assert axes.get_ylabel() == "Bits per byte" and axes.get_yscale() == "linear"
    assert axes.get_xlabel() == "Position in the document (tokens of each run's own tokenizer), log scale"
    np.testing.assert_allclose(np.unique(axes.lines[0].get_ydata().round(9)), [inside, past])


# Units and protocol, in every output


@pytest.mark.parametrize(("stride", "protocol"), [(None, "from start"), (64, "stride 64")])
def test_every_output_names_its_protocol(stride, protocol, tmp_path, capsys):
    run, units = synthetic_run(lengths=(128, 256)), Units(stride)
    for panels in ([figures.scores], [figures.entropy], [figures.scores, figures.entropy]):
        assert f"Protocol: {protocol}." in figures.draw([run], units, *panels).get_supxlabel()
    write(tmp_path, [run], units)
    for name in ("curves.csv", "heads.csv"):
        with (tmp_path / name).open() as file:
            assert {row["protocol"] for row in csv.DictReader(file)} == {protocol}
    assert f"Protocol: {protocol}." in page(tmp_path, [run], units)
    show([run], units)
    assert f"protocol: {protocol}" in capsys.readouterr().out


def test_entropy_in_bits_is_shown_and_not_written(tmp_path):
    run = synthetic_run()
    panels = figures.scores, figures.entropy
    drawn = [figures.draw([run], Units(entropy_unit=unit), *panels) for unit in ("nats", "bits")]
    in_nats, in_bits = (figure.axes[1] for figure in drawn)
    for of_nats, of_bits in zip(in_nats.lines[:2], in_bits.lines[:2], strict=True):  # the ceiling and the run
        np.testing.assert_allclose(of_bits.get_ydata(), of_nats.get_ydata() / math.log(2))
    assert "(bits, " in in_bits.get_ylabel() and "(nats, " in in_nats.get_ylabel()
    assert "log2(position + 1)" in in_bits.texts[0].get_text() and "ln(position" in in_nats.texts[0].get_text()
    assert [axes.get_xlim() for axes in drawn[0].axes] == [(in_nats.lines[1].get_xdata()[0], 2048)] * 2

    pages = {unit: page(tmp_path, [run], Units(entropy_unit=unit)) for unit in ("nats", "bits")}
    entropy = {unit: float(re.search(rf"layer 0, head 0: ([\d.]+) {unit}", text)[1]) for unit, text in pages.items()}
    assert entropy["bits"] == pytest.approx(entropy["nats"] / math.log(2), abs=0.02)
    assert "bits at end" in pages["bits"] and "log2(position + 1)" in pages["bits"]


def test_an_entropy_unit_is_nats_or_bits():
    given = ["--workdirs", "a", "--lengths", "8", "--out", "b", "--eval.entropy_unit"]
    assert parse_eval([*given, "bits"]).overrides == {"eval.entropy_unit": "bits"}
    with pytest.raises(ValueError, match=r"--eval.entropy_unit must be one of nats, bits, not 'bytes'"):
        parse_eval([*given, "bytes"])


# Which heads spread out first


def hand_made_run(shares):
    """A run trained at 128 and read at 1,024: for each head its share of the ceiling at every position."""
    run = synthetic_run(lengths=(128, 1024))
    ceiling = np.log1p(np.arange(1024))
    long = run.results[1024]
    heads = np.stack([ceiling * share for share in shares]).reshape(1, len(shares), -1)
    run.results[1024] = Curve(long.edges, long.nll_sum, long.tokens, long.entropy_sum, heads, long.text_bytes)
    return run


def test_heads_are_ordered_by_where_they_spread_out(tmp_path, capsys):
    position = np.arange(1024)
    shares = [
        np.full(1024, 0.9),  # 0: as spread out as ever
        0.3 + 0.5 * (position >= 512),  # 1
        0.3 + 0.5 * (position >= 128),  # 2
        0.3 - 0.2 * (position >= 128),  # 3: narrows
        0.3 + 0.6 * (position >= 512),  # 4: as early as head 1, and further
        np.where((position >= 72) & (position < 80), 0.6, 0.3) + 0.33 * (position >= 256),  # 5: within its range in L
        0.3 + 0.9 * RISE * (position >= 128),  # 6: too little
        0.5 * (position < 64) + 0.3 + 0.08 * (position >= 200),  # 7: not asked before L/2; risen in half of 192 to 208
    ]
    run = hand_made_run(shares)
    heads = dispersion(run)
    assert [(head.head, head.position) for head in heads[:4]] == [(2, 128), (7, 208), (4, 512), (1, 512)]
    assert {head.head for head in heads[4:]} == {0, 3, 5, 6} and {head.position for head in heads[4:]} == {None}
    by_head = {head.head: head for head in heads}
    assert by_head[5].share_in_window == pytest.approx(0.6) and by_head[2].share_at_end == pytest.approx(0.8)
    assert by_head[2].entropy_in_window == pytest.approx(0.3 * np.log1p(np.arange(64, 128)).mean())
    assert by_head[1].entropy_at_end == pytest.approx(0.8 * np.log1p(np.arange(512, 1024)).mean())

    short = synthetic_run("short", lengths=(128,))
    figure = draw([run, short])
    (axes,) = [axes for axes in figure.axes if axes.images]  # nothing is to be drawn of the other run
    assert axes.get_title() == "nope, trained at 128"
    shown = axes.images[0].get_array().filled(np.nan)  # in doublings of the training length
    np.testing.assert_allclose(shown, np.log2([[np.nan, 512, 128, np.nan, 512, np.nan, np.nan, 208]]) - 7)
    assert {(text.get_text(), *text.get_position()) for text in axes.texts} == {
        *(("512", 1, 0), ("128", 2, 0), ("512", 4, 0), ("208", 7, 0))
    }
    assert axes.patch.get_hatch() and "Hatched: spreads out at no position" in figure.get_supxlabel()
    scale = next(axes for axes in figure.axes if not axes.images)
    assert [label.get_text() for label in scale.get_yticklabels()] == ["L", "2 L", "4 L", "8 L"]
    save(tmp_path / "dispersion.png", draw([synthetic_run(lengths=(256,))]))  # no head spreads out: warns of nothing

    write(tmp_path, [run, short])
    with (tmp_path / "heads.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS.split() and len(rows) == 8
    names = ("run", "train_length", "length", "rank", "layer", "head", "spreads_from", "share_in_window")
    assert [rows[0][name] for name in names] == ["nope", "128", "1024", "1", "0", "2", "128", "0.3"]
    assert [row["spreads_from"] for row in rows] == ["128", "208", "512", "512", *[""] * 4]

    show([run])
    printed = " ".join(capsys.readouterr().out.split())
    assert "nope: 4 of its 8 heads spread out, first layer 0 head 2 from 128 (30% of the ceiling in the" in printed
    assert "more than 0.05 above the highest share of any bucket in L/2 to L" in printed
    assert "head 7 from 208" in printed and "head 4 from 512" in printed and "head 1 from" not in printed


def test_no_head_spreads_out_where_nothing_longer_was_read(capsys):
    assert dispersion(synthetic_run(lengths=(64, 128))) == []
    show([synthetic_run(lengths=(128,))], Units())
    assert "spread" not in capsys.readouterr().out
    assert remark(synthetic_run()) == "nope: none of its 6 heads spreads out."


# Memory


def step_memory(implementation, length):
    """What the evaluation step of a small model takes, without running it."""
    config = ModelConfig(num_layers=1, num_heads=2, model_dim=16, vocab_size=1024, attention=implementation)
    graphdef, state = nnx.split(abstract_decoder(config))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, length), bool)
    return program_memory(evaluation_step.lower(graphdef, state, tokens, tokens, counts).compile())


def test_memory_of_the_evaluation_is_not_that_of_the_logits_or_of_the_weights(monkeypatch):
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", 2**18)
    assert step_memory("streaming", 4096) < 4 * 4096 * 1024 / 2  # half of the logits of all positions, 1/16 of weights


@pytest.mark.slow
def test_memory_of_the_evaluation_grows_linearly(monkeypatch):
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", 2**18)
    short, long = (step_memory("streaming", length) for length in (1024, 4096))
    assert long < 4.1 * short


@pytest.mark.slow
def test_memory_with_weights_written_out_grows_quadratically():
    short, long = (step_memory("reference", length) for length in (1024, 2048))
    assert long > 3.5 * short


def test_speed_and_memory_are_stated_for_each_length(tmp_path, capsys):
    before = peak_memory()
    short, long = (measure(Bigram(), some_documents(5000), length, batch_size=1) for length in (500, 4000))
    run = synthetic_run("table", lengths=(128, 256), max_length=128)
    run.results[256] = short
    assert short.step_bytes > 500 * LAYERS * HEADS * 4 and 4 * short.step_bytes < long.step_bytes
    assert 10e6 < before <= short.peak_bytes <= long.peak_bytes < 1e12
    assert short.tokens_read == 500 and short.seconds > 0
    (row,) = table.cost_rows([run])
    speed = f"{short.tokens_read / short.seconds:,.0f}"
    assert row[-1] == f"{speed}, {short.step_bytes / 1e6:,.0f} / {short.peak_bytes / 1e6:,.0f}"
    show([run])
    printed = " ".join(capsys.readouterr().out.split())
    assert row[-1] in printed and "the most memory that this process had used by the end of the length" in printed


def test_figures_pool_buckets_with_few_tokens_but_not_across_the_training_length():
    curve = synthetic_run(nll=lambda p: 1.0 + (p >= 128), lengths=(2048,), documents=2).results[2048]
    pooled = curve.coarser(100, 16, 128)
    assert pooled.edges[0] == 16 and 128 in pooled.edges and pooled.edges[-1] == 2048
    assert set(pooled.edges) < set(curve.edges) and pooled.tokens.sum(0).min() >= 100
    assert pooled.tokens.sum() == 2 * (2048 - 16) and pooled.nll_sum.sum() == 2 * (112 + 2 * 1920)
    np.testing.assert_allclose(pooled.nll.value, np.where(pooled.edges[:-1] < 128, 1.0, 2.0))
    few = curve.coarser(10**6, 16, 128)  # more than there are: one bucket on either side
    np.testing.assert_array_equal(few.edges, [16, 128, 2048])
    np.testing.assert_array_equal(curve.coarser(1, 16, 128).edges, curve.edges[curve.edges >= 16])


# Going on


def test_a_measurement_that_was_stopped_within_a_length_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[measure.__module__], "KEEP_EVERY", 0.0)
    documents = some_documents(40, 30, 25)
    settings = {
        "byte_lengths": [np.arange(len(document)) for document in documents],
        "stride": 3,
        "batch_size": 2,
    }
    whole = measure(Bigram(), documents, 8, **settings)
    windows = len(plan_windows([40, 30, 25], 8, 3))

    def stop_after_ten(sums):
        store(tmp_path / "measured" / "unfinished.npz", sums, "it")
        if sums.windows == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Bigram(), documents, 8, keep=stop_after_ten, **settings)
    path = tmp_path / "measured" / "unfinished.npz"
    assert stored(path, Sums, "another") is None
    done, read = stored(path, Sums, "it"), []
    again = measure(Bigram(), documents, 8, done=done, advance=read.append, **settings)
    assert read[0] == 10 * 8 and sum(read) == windows * 8 and len(read) == 1 + math.ceil((windows - 10) / 2)
    for name in ("nll_sum", "tokens", "entropy_sum", "heads", "text_bytes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
