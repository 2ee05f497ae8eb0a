"""The evaluator: which tokens are read, what is measured, and what is written about it."""

import base64
import csv
import dataclasses
import itertools
import math
import re
import shutil
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from nope_jax import cli
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.data import load_corpus, load_tokenizer
from nope_jax.data.tasks import passkey
from nope_jax.encodings import NoPE, RoPE, UniformScale, Windowed, YaRNScaling
from nope_jax.evaluation.common.documents import Window, choose_documents, plan_windows
from nope_jax.evaluation.common.files import replace_file, store
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.common.runs import encoding_name, run_names, short_encoding_name
from nope_jax.evaluation.perplexity import figures, table
from nope_jax.evaluation.perplexity.measure import bucket_edges, measure
from nope_jax.evaluation.perplexity.units import Units
from nope_jax.retention import Retention
from tests.support.drawn_model import drawn_model
from tests.support.evaluation_cases import (
    HEADS,
    LAYERS,
    Bigram,
    compare,
    expected_nll,
    page,
    some_documents,
    synthetic_run,
    write,
)
from tests.support.tiny_runs import write_documents, write_run


def test_buckets_are_single_then_eight_per_octave():
    np.testing.assert_array_equal(bucket_edges(32), [*range(16), *range(16, 33, 2)])
    edges = bucket_edges(2048)
    assert edges[0] == 0 and edges[-1] == 2048 and (np.diff(edges) > 0).all()
    for octave in (8, 16, 128, 1024):
        np.testing.assert_array_equal(
            edges[(edges >= octave) & (edges <= 2 * octave)], np.linspace(octave, 2 * octave, 9, dtype=int)
        )


@pytest.mark.parametrize(
    ("length", "tail"), [(1, [0, 1]), (5, [3, 4, 5]), (129, [120, 128, 129]), (100, [88, 96, 100])]
)
def test_buckets_are_clipped_to_the_length(length, tail):
    assert bucket_edges(length)[-len(tail) :].tolist() == tail


def test_document_choice_is_nested_and_prefers_documents_that_reach_more():
    lengths = np.random.default_rng(1).integers(1, 300, 200)
    chosen = choose_documents(lengths, [16, 64, 256], 20, seed=3)
    for shorter, longer in itertools.pairwise([16, 64, 256]):
        assert set(chosen[longer]) <= set(chosen[shorter])
        assert (lengths[chosen[longer]] > longer).all()
    assert chosen[256].tolist() == chosen[16].tolist()
    # Where few documents reach the longest, the shorter ones are filled up, those that reach most first.
    chosen = choose_documents(np.array([5, 50, 500, 5000]), [4, 40, 400, 4000], 3, seed=0)
    assert [chosen[n].tolist() for n in (4000, 400, 40, 4)] == [[3], [3, 2], [3, 2, 1], [3, 2, 1]]


def test_document_choice_follows_the_seed():
    lengths = np.full(100, 50)
    first, again, other = (choose_documents(lengths, [10], 10, seed)[10].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_length_that_no_document_reaches_is_refused():
    with pytest.raises(ValueError, match=r"length 8, .*2: 3, 4: 1, 8: 0.* has 8 tokens") as error:
        choose_documents(np.array([3, 4, 8]), [2, 4, 8], 10, seed=0)
    assert "\n" not in str(error.value)


def test_windows_from_the_start():
    assert plan_windows([9, 100], 8, None) == [Window(0, 0, 0), Window(1, 0, 0)]


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(9, 8, 3), (100, 8, 3), (100, 8, 8), (98, 8, 1), (33, 16, 16)]
)
def test_sliding_windows_score_every_token_once(tokens, length, stride):
    windows = plan_windows([tokens], length, stride)
    scored = [w.start + p for w in windows for p in range(w.scored_from, length)]
    assert scored == list(range(tokens - 1))
    assert all(w.start + length < tokens for w in windows)
    assert all(w.start % stride == 0 and w.scored_from in (0, length - stride) for w in windows[:-1])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_curve_from_the_start_is_that_of_a_direct_computation(batch_size):
    documents, length = some_documents(40, 30, 25), 20
    curve = measure(Bigram(), documents, length, batch_size=batch_size)
    nll = np.stack([expected_nll(document)[:length] for document in documents])
    inputs = np.stack([document[:length] for document in documents]).astype(np.float64)
    heads = np.arange(1.0, 1 + LAYERS * HEADS).reshape(LAYERS, HEADS, 1) * (inputs + 0.5 * np.arange(length)).mean(0)

    assert (curve.length, curve.documents) == (length, 3)
    np.testing.assert_allclose(curve.heads, heads, rtol=1e-6)
    for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
        part = nll[:, start:end]
        assert curve.tokens.sum(0)[i] == part.size
        np.testing.assert_allclose(curve.nll.value[i], part.mean(), rtol=1e-6)
        np.testing.assert_allclose(curve.nll.stderr[i], part.mean(1).std(ddof=1) / math.sqrt(3), rtol=1e-5)
        np.testing.assert_allclose(curve.entropy.value[i], heads[..., start:end].mean(), rtol=1e-6)
    part = curve.between(8, 18, documents=2)
    np.testing.assert_allclose(part.nll.exp().value, [np.exp(nll[:2, 8:18].mean())], rtol=1e-6)


def test_curve_of_sliding_windows_is_that_of_a_direct_computation():
    documents, length, stride = some_documents(40, 27), 8, 3
    curve = measure(Bigram(), documents, length, stride=stride, batch_size=4)
    # A bigram model does not see the window, so that only the placing of tokens into positions is left to check.
    nll, entropy, tokens = np.zeros(length), np.zeros(length), np.zeros(length)
    for document in documents:
        for target, value in enumerate(expected_nll(document)):
            last_start = len(document) - 1 - length
            start = 0 if target < length else min(stride * math.ceil((target - length + 1) / stride), last_start)
            nll[target - start] += value
            entropy[target - start] += 3.5 * (document[target] + 0.5 * (target - start))
            tokens[target - start] += 1
    assert tokens.sum() == sum(len(document) - 1 for document in documents)
    np.testing.assert_array_equal(curve.tokens.sum(0), tokens)
    np.testing.assert_allclose(curve.nll.value, nll / tokens, rtol=1e-5)
    np.testing.assert_allclose(curve.entropy.value, entropy / tokens, rtol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_a_bos_begins_every_sliding_window(bos):
    documents, length, read = some_documents(40, 27), 8, []

    def place(arrays):
        read.extend(arrays[0].tolist())
        return jax.device_put(arrays)

    measure(Bigram(), documents, length, stride=3, batch_size=1, bos=bos, place=place)
    windows = plan_windows([40, 27], length, 3)
    for window, tokens in zip(windows, read[1:], strict=True):  # the first is read once more, to compile
        document = documents[window.document]
        assert tokens[0] == document[0 if bos else window.start]
        assert tokens[1:] == document[window.start + 1 : window.start + length].tolist()


def test_progress_counts_every_token():
    seen = []
    measure(Bigram(), some_documents(10, 11, 12), 8, batch_size=2, advance=seen.append)
    assert seen == [16, 8]


def test_run_names_are_as_short_as_they_can_be():
    paths = [Path(p) for p in ("/a/runs/nope", "/b/runs/nope", "/b/runs/rope", "/c/tests/nope/", "/d/xrope")]
    assert run_names(paths) == ["a/runs/nope", "b/runs/nope", "rope", "tests/nope", "xrope"]
    assert run_names([Path("/r/nope"), Path("/r/nope/2")]) == ["nope", "2"]
    with pytest.raises(ValueError, match="/b/x/../nope twice"):
        run_names([Path("/b/nope"), Path("/b/x/../nope")])


def test_encoding_names():
    assert encoding_name("rope") == encoding_name(RoPE()) == "rope"
    assert encoding_name(("rope", NoPE())) == "rope+nope"
    assert encoding_name(RoPE(base=500.0)) == "RoPE(base=500.0)"
    yarn = RoPE(scaling=YaRNScaling(factor=8.0, original_length=128))
    assert encoding_name(yarn) == "RoPE(scaling=YaRNScaling(factor=8.0, original_length=128))"
    assert encoding_name(UniformScale(Windowed(NoPE(), window=8), factor=1.5)) == "uniform_scale:windowed:nope"


def test_short_encoding_names_leave_out_settings_and_count_repetitions():
    yarn = RoPE(base=1e6, scaling=YaRNScaling(factor=8.0, original_length=128))
    assert short_encoding_name("smollm3") == "smollm3"
    assert short_encoding_name(yarn) == "rope (YaRN)"
    assert short_encoding_name((UniformScale(yarn, factor=1.5),)) == "uniform_scale:rope (YaRN)"
    assert short_encoding_name((RoPE(base=5e6),) * 3 + ("nope",)) == "3 rope + nope"
    assert short_encoding_name((RoPE(base=5e6),) * 3) == "rope"


def test_csv_has_the_promised_columns_and_one_row_per_bucket(tmp_path):
    runs = [synthetic_run(), synthetic_run("table", max_length=128), synthetic_run("one", lengths=(128,), documents=1)]
    write(tmp_path, runs, only="curves.csv")
    with (tmp_path / "curves.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    promised = "run encoding train_length length position_start position_end tokens nll nll_stderr perplexity entropy"
    assert reader.fieldnames == table.COLUMNS.split() and reader.fieldnames[:11] == promised.split()
    assert len(rows) == sum(len(curve.edges) - 1 for run in runs for curve in run.results.values())
    assert {row["length"] for row in rows if row["run"] == "table"} == {"128"}
    assert {row["nll_stderr"] for row in rows if row["run"] == "one"} == {""}
    assert {row["nll_stderr"] for row in rows if row["run"] == "nope"} == {"0"}
    last = [row for row in rows if row["run"] == "nope"][-1]
    names = ("length", "position_start", "position_end", "tokens", "nll", "perplexity", "protocol")
    assert [last[name] for name in names] == ["2048", "1920", "2048", "512", "2", "7.38906", "from start"]


def test_heads_of_the_longest_length(tmp_path):
    write(tmp_path, [synthetic_run(), synthetic_run("table", max_length=128)])
    with np.load(tmp_path / "heads.npz") as heads:
        assert {name: heads[name].shape for name in heads} == {
            "nope/entropy": (LAYERS, HEADS, 2048),
            "nope/positions": (2048,),
            "table/entropy": (LAYERS, HEADS, 128),
            "table/positions": (128,),
        }
        np.testing.assert_allclose(heads["nope/entropy"][1, 2], 0.5 * np.log1p(heads["nope/positions"]), rtol=1e-6)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "curves.csv").write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / "curves.csv") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["curves.csv"]
    assert (tmp_path / "curves.csv").read_text() == "old"


def test_report_is_one_self_contained_page(tmp_path):
    runs = [
        synthetic_run("<b>nope"),
        synthetic_run("rope", lambda p: 2.0 + 1e4 * (p >= 128)),
        synthetic_run("table", max_length=128),
    ]
    save(tmp_path / "curves.png", figures.draw(runs, Units(), figures.scores, figures.entropy))
    text = page(tmp_path, runs, command="python eval.py --out 'a <b'")

    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", text)
    assert len(loads) == 5 and all(load.startswith("data:") for load in loads)
    assert "<script" not in text and "//" not in re.sub(r"data:[^\"]*", "", text)
    names = ("curves.png", "curves.csv", "differences.csv", "dispersion.png", "heads.csv")
    embedded = [base64.b64decode(load.partition("base64,")[2]) for load in loads]
    assert embedded == [(tmp_path / name).read_bytes() for name in names]
    assert all(image.startswith(b"\x89PNG") for image in embedded[:1])
    assert "&lt;b&gt;nope" in text and "<b>" not in text and "a &lt;b" in text
    assert "prefers-color-scheme: dark" in text and "read from its start" in text
    assert text.count("<rect") == 3 * LAYERS * HEADS


def test_figures_name_what_leaves_their_axis():
    runs = [synthetic_run(), synthetic_run("rope", lambda p: 2.0 + 8 * (p >= 128)), synthetic_run("t", max_length=128)]
    (axes,) = figures.draw(runs, Units(), figures.scores).axes
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"nope", "rope ↑ 22,026", "t ends: 128 positions", "trained at 128"}
    assert axes.get_ylim()[1] < 300 and axes.get_xlim()[1] == 2048


def test_a_figure_of_one_run_has_its_name_as_title():
    figure = figures.draw([synthetic_run("a_published_model_with_a_long_name")], Units(), figures.scores)
    (axes,) = figure.axes
    assert figure.get_suptitle() == "a_published_model_with_a_long_name"
    assert {text.get_text() for text in axes.texts} == {"trained at 128"}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two runs as train.py leaves them, and documents to read, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    write_documents(folder)
    for encoding in ("alibi", "learned"):
        write_run(folder, encoding, encoding=encoding, train_length=8)
    return folder


@pytest.mark.parametrize("overrides", [{}, pytest.param({"data.bos": True}, marks=pytest.mark.slow)])
def test_compare_measures_what_each_run_can_read(workdirs, tmp_path, capsys, overrides):
    folders = [workdirs / "alibi", workdirs / "learned"]
    compare(folders, (16, 8, 8), tmp_path / "a" / "b", overrides, pictures=True)
    files = "curves.csv differences.csv heads.csv heads.npz"
    files += " curves.png dispersion.png perplexity.png entropy.png report.html"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {*files.split(), "sections", "measured"}
    with (tmp_path / "a" / "b" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [("alibi", "8"), ("alibi", "16"), ("learned", "8")]
    assert list(dict.fromkeys((row["run"], row["length"]) for row in rows)) == measured

    # The numbers are those of the saved model on its own documents.
    config, model, _ = load_model(folders[0])
    corpus = load_corpus(configs.override(config, overrides).data, "validation")
    documents = np.stack([corpus[i][:17] for i in range(len(corpus))])
    assert (documents[:, 0] == 0).all() == bool(overrides)
    logits, stats = model(documents[:, :16], return_stats=True)
    logits = np.asarray(logits, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, documents[:, 1:, None], -1)[..., 0]
    found = [float(row["nll"]) for row in rows if (row["run"], row["length"]) == ("alibi", "16")]
    np.testing.assert_allclose(found, nll.mean(0), rtol=1e-4)
    with np.load(tmp_path / "a" / "b" / "heads.npz") as heads:
        np.testing.assert_allclose(heads["alibi/entropy"], np.mean(stats.entropy, 1), rtol=1e-4, atol=1e-6)

    printed = " ".join(capsys.readouterr().out.split())
    assert "learned cannot read 16 tokens: its learned encoding has 8 positions." in printed
    assert "8 (all it has)" in printed
    assert f"Read: {len(corpus)} documents, the same at every length" in printed


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_compare_keeps_what_was_measured_before_it_stopped(workdirs, tmp_path, monkeypatch, stop):
    def load(workdir, mesh, **_):
        if workdir.name == "learned":
            raise stop
        return load_model(workdir, mesh)

    monkeypatch.setattr("nope_jax.trained.load_model", load)
    with pytest.raises(stop):
        compare([workdirs / "alibi", workdirs / "learned"], (8,), tmp_path / "out", {})
    assert "alibi,alibi,8,8," in (tmp_path / "out" / "curves.csv").read_text()
    assert (tmp_path / "out" / "report.html").exists()


REFUSED = {
    "nowhere is not the workdir of a run": (["nowhere"], (8,), {}),
    "empty: no checkpoint yet": (["alibi", "empty"], (8,), {}),
    "reaches length 999, .* 8: [2-9], 999: 0; the longest has": (["alibi"], (8, 999), {}),
    "learned reads none of them, its learned encoding has 8": (["alibi", "learned"], (16,), {}),
    "eval.stride must be at most 8, the shortest of": (["alibi"], (8, 16), {"eval.stride": 9}),
    "eval.documents differs .*alibi: 64, other: 7.; give": (["alibi", "other"], (8,), {}),
    "eval.entropy_unit differs .*alibi: nats, bits: bits.; give": (["alibi", "bits"], (8,), {}),
    "eval.entropy_unit must be one of nats, bits, not 'bytes'": (["alibi"], (8,), {"eval.entropy_unit": "bytes"}),
    "task:passkey is made of tokens, .*with --data.source": (
        ["alibi", "words"],
        (8,),
        {"data.source": "task:passkey", "data.context_length": 600},
    ),
    "nowhere.json": (["alibi"], (8,), {"data.tokenizer": "nowhere.json"}),
    "'bytes' has 256 tokens, but .*model.vocab_size 99": (["small"], (8,), {}),
    "text:/nowhere/. matches no file": (["alibi"], (8,), {"data.source": "text:/nowhere/*"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(workdirs, tmp_path, monkeypatch, message):
    monkeypatch.setitem(passkey.DOCUMENTS, "validation", 20)
    runs, lengths, overrides = REFUSED[message]
    changed = {
        "other": {"eval.documents": 7},
        "small": {"model.vocab_size": 99},
        "bits": {"eval.entropy_unit": "bits"},
        "words": {"data.tokenizer": str(tmp_path / "words.json")},
    }
    words = tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "words.json"))
    for name, changes in changed.items():
        shutil.copytree(workdirs / "alibi", tmp_path / name)
        configs.save(configs.override(configs.load(tmp_path / name), changes), tmp_path / name)
    (tmp_path / "empty").mkdir()
    shutil.copy(workdirs / "alibi" / "config.json", tmp_path / "empty")
    folders = [workdirs / run if (workdirs / run).exists() else tmp_path / run for run in runs]
    with pytest.raises(ValueError, match=message) as error:
        compare(folders, lengths, tmp_path / "out", overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_has_been_measured_is_not_measured_again(workdirs, tmp_path, monkeypatch):
    folders = [workdirs / "alibi", workdirs / "learned"]
    compare(folders, (8,), tmp_path, {})
    first = (tmp_path / "curves.csv").read_text()
    measured = []

    def spy(model, documents, length, **settings):
        measured.append(length)
        return measure(model, documents, length, **settings)

    monkeypatch.setattr("nope_jax.evaluation.perplexity.measure", spy)
    compare(folders, (8,), tmp_path, {})
    assert measured == [] and (tmp_path / "curves.csv").read_text() == first
    (tmp_path / "measured" / "alibi-8.npz").write_bytes(b"half of a file")
    compare(folders, (8,), tmp_path, {})
    assert measured == [8]
    compare(folders, (8,), tmp_path, {"eval.documents": 3})  # other documents: nothing fits any more
    assert measured == [8, 8, 8]
    assert (tmp_path / "curves.csv").read_text() != first


OWN = """
import dataclasses
from nope_jax import ModelConfig
from nope_jax.config import Config, DataConfig, EvalConfig
from nope_jax.encodings import DistanceLogit, Encoding

@dataclasses.dataclass(frozen=True)
class Own(Encoding):
    def fade(self, _, distance):
        return -1.0 * distance[None]
    def logit(self, params, query, key, query_features=None, key_features=None):
        return DistanceLogit(self.fade, None)

def get_config():
    return Config(
        ModelConfig(num_layers=2, num_heads=2, model_dim=16, mlp_dim=16, encoding=Own()),
        DataConfig(source=SOURCE, context_length=8),
        eval=EvalConfig(batch_size=2, documents=2),
    )
"""


def own_run(folder: Path, workdirs: Path, edits: tuple[str, str] = ("", "")) -> Path:
    """A run with an encoding of a config file, which has no parameters, as train.py leaves it."""
    (folder / "own.py").write_text(OWN.replace("SOURCE", repr(f"text:{workdirs}/text")).replace(*edits))
    shutil.copytree(workdirs / "alibi", folder / "own", dirs_exist_ok=True)
    configs.save(configs.load_file(folder / "own.py"), folder / "own")
    return folder / "own"


def test_curves_follow_from_the_code_of_the_encoding_and_from_ours(workdirs, tmp_path, monkeypatch):
    measured = []

    def spy(*arguments, **settings):
        measured.append(arguments[2])
        return measure(*arguments, **settings)

    def evaluate():
        compare([run], (8,), tmp_path / "out", {})
        return (tmp_path / "out" / "curves.csv").read_text()

    monkeypatch.setattr("nope_jax.evaluation.perplexity.measure", spy)
    run = own_run(tmp_path, workdirs)
    first = evaluate()
    (tmp_path / "own.py").write_text(OWN.replace("-1.0", "-0.1"))
    with pytest.warns(UserWarning, match="run with the code that it was trained with, .*own.py has changed since"):
        assert evaluate() == first
    assert measured == [8]
    own_run(tmp_path, workdirs, ("-1.0", "-0.1"))
    edited = evaluate()
    assert measured == [8, 8] and edited != first
    monkeypatch.setattr("nope_jax.config.own_code._our_digest", lambda: b"of another version")
    assert evaluate() == edited and measured == [8, 8, 8]


def test_a_mistake_in_an_own_encoding_is_no_bad_input(workdirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run sets its own
    run = own_run(tmp_path, workdirs, ("-1.0 * distance[None]", "distance.reshape(3, 4)"))
    with pytest.raises(TypeError, match="reshape") as error:
        cli.run(lambda: compare([run], (8,), tmp_path / "out", {}))
    assert any(entry.name == "fade" for entry in error.traceback)
    run = own_run(tmp_path, workdirs, ("-1.0 * distance[None]", "distance[None] + int('x')"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.run(lambda: compare([run], (8,), tmp_path / "out", {}))
    run = own_run(tmp_path, workdirs, ("-1.0 * distance[None]", "distance.reshape(3, 5)"))
    assert cli.run(lambda: compare([run], (8,), tmp_path / "out", {})) == 2
    assert "fade must have shape [3, 15], or 1 in place of an axis, not [3, 5]" in capsys.readouterr().err


def test_curves_are_of_the_checkpoint_that_was_read(workdirs, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(workdirs / "alibi", tmp_path / "alibi")
    config = configs.load(run)

    def load_late(workdir, mesh, **_):
        # Since it was looked which step is the newest, the run has gone on, and keeps that one no more.
        with Checkpointer(run, keep=Retention(1)) as training:
            training.save(5, {"params": nnx.state(drawn_model(config.model, 5))})
        return load_model(workdir, mesh)

    compare([run], (8,), tmp_path / "out", {})
    before = (tmp_path / "out" / "curves.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("nope_jax.trained.load_model", load_late)
        compare([run], (8, 16), tmp_path / "out", {})
    assert "Checkpoints, by step: alibi at 5." in " ".join(capsys.readouterr().out.split())
    after = (tmp_path / "out" / "curves.csv").read_text()
    assert before.splitlines()[1] not in after  # all lengths are of one step
    monkeypatch.setattr("nope_jax.trained.load_model", None)  # all of step 5 is kept
    compare([run], (8, 16), tmp_path / "out", {})
    assert (tmp_path / "out" / "curves.csv").read_text() == after


@pytest.mark.slow
def test_a_length_that_was_not_finished_goes_on(workdirs, tmp_path, monkeypatch):
    overrides = {"eval.batch_size": 1}
    compare([workdirs / "alibi"], (8,), tmp_path / "whole", overrides)
    monkeypatch.setattr(sys.modules[measure.__module__], "KEEP_EVERY", 0.0)
    seen = []

    def stop(path, sums, identity):
        store(path, sums, identity)
        raise KeyboardInterrupt

    def spy(*arguments, done, **settings):
        seen.append(done and done.windows)
        return measure(*arguments, done=done, **settings)

    monkeypatch.setattr("nope_jax.evaluation.perplexity.measure", spy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nope_jax.evaluation.perplexity.store", stop)
        compare([workdirs / "alibi"], (8,), tmp_path / "out", overrides)
    assert [path.name for path in (tmp_path / "out" / "measured").iterdir()] == ["unfinished-alibi-8.npz"]
    compare([workdirs / "alibi"], (8,), tmp_path / "out", overrides)
    assert seen == [None, 1]
    assert [path.name for path in (tmp_path / "out" / "measured").iterdir()] == ["alibi-8.npz"]
    assert (tmp_path / "out" / "curves.csv").read_text() == (tmp_path / "whole" / "curves.csv").read_text()


@pytest.fixture
def pairs(workdirs, tmp_path):
    """The run alibi with a tokenizer of letters and pairs of letters."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    texts = [path.read_text() for path in (workdirs / "text").iterdir()]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "pairs.json"))
    shutil.copytree(workdirs / "alibi", tmp_path / "pairs")
    changes = {"data.tokenizer": str(tmp_path / "pairs.json"), "data.dir": str(tmp_path / "data")}
    configs.save(configs.override(configs.load(tmp_path / "pairs"), changes), tmp_path / "pairs")
    return tmp_path / "pairs"


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(workdirs, pairs, tmp_path, capsys):
    compare([workdirs / "alibi", pairs], (8,), tmp_path / "out", {"eval.stride": 8})
    printed = " ".join(capsys.readouterr().out.split())
    assert "Bits per byte by position, protocol: stride 8" in printed and "bits/byte in-window" in printed
    with (tmp_path / "out" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert "tokens of each run&#x27;s own" not in (tmp_path / "out" / "report.html").read_text()
    _, model, _ = load_model(pairs)  # the same model as alibi
    for name, run in {"alibi": workdirs / "alibi", "pairs": pairs}.items():
        config = configs.load(run)
        corpus, tokenizer = load_corpus(config.data, "validation"), load_tokenizer(config.data.tokenizer)
        documents = [corpus[i] for i in range(len(corpus))]
        size = sum(len(tokenizer.decode(tokens[1:]).replace(" ", "")) for tokens in documents)
        windows = plan_windows([len(tokens) for tokens in documents], 8, 8)
        read = np.stack([documents[w.document][w.start : w.start + 9] for w in windows])
        scored = np.arange(8) >= np.array([[w.scored_from] for w in windows])
        logits = np.asarray(model(np.resize(read[:, :8], (200, 8))), np.float64)[: len(read)]  # of one shape
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, read[:, 1:, None], -1)[..., 0]
        bits = (nll * scored).sum() / math.log(2)
        of_run = [row for row in rows if row["run"] == name]
        assert sum(int(row["text_bytes"]) for row in of_run) == size
        found = sum(float(row["bits_per_byte"]) * int(row["text_bytes"]) for row in of_run) / size
        assert found == pytest.approx(bits / size, rel=1e-4)


@pytest.mark.slow
def test_a_document_must_be_long_enough_in_every_tokenizer(workdirs, pairs, tmp_path, capsys):
    config = configs.load(pairs)
    tokens, sizes = (
        load_corpus(dataclasses.replace(config.data, tokenizer=tokenizer), "validation").lengths
        for tokenizer in (config.data.tokenizer, "bytes")
    )
    length = int(np.sort(tokens)[len(tokens) // 2])
    assert (tokens > length).sum() < (sizes > length).sum()
    compare([pairs, workdirs / "alibi"], (length,), tmp_path / "out", {})
    assert f"Read: {(tokens > length).sum()} document" in capsys.readouterr().out
    with (tmp_path / "out" / "curves.csv").open() as file:
        assert {row["documents"] for row in csv.DictReader(file)} == {str((tokens > length).sum())}
