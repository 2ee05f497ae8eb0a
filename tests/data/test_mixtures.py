"""Several sources: the share of each holds at every row, whatever reads them, and each goes through its own epochs."""

import dataclasses
import itertools

import numpy as np
import pytest

from nope_jax.cli import parse_prepare, parse_train
from nope_jax.config import Config, DataConfig, override
from nope_jax.data import corpora, load_corpus, prepare, train_batches, validation_batches
from nope_jax.data.batches import masks_loss
from nope_jax.data.mixing import mix
from nope_jax.data.tasks import task
from nope_jax.data.windows import Windows, epoch_windows


@pytest.mark.parametrize(
    ("weights", "bound"),
    [
        ((0.7, 0.3), 0.5),
        ((0.999, 0.001), 0.5),
        ((0.5, 0.3, 0.2), 1),
        ((0.8, 0.1, 0.1), 1),
        ((0.25,) * 4, 1),
        ((0.02, 0.5, 0.03, 0.25, 0.1, 0.1), 2),
        (tuple(1 / 2**i for i in (1, 2, 3, 4, 5, 6, 6)), 2),
    ],
)
def test_shares_hold_at_every_row(weights, bound):
    sources, indices = mix(np.arange(3000), weights)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, 3001)[:, None] * np.array(weights)
    assert np.abs(counts - ideal).max() <= bound + 1e-9
    np.testing.assert_array_equal(indices, counts[np.arange(3000), sources] - 1)
    # Any rows, in any order, from anywhere.
    rows = np.array([2999, 0, 17, 1234])
    np.testing.assert_array_equal(mix(rows, weights), (sources[rows], indices[rows]))
    (source,), (index,) = mix(np.array([10**12]), weights)
    assert abs(index - 10**12 * weights[source]) <= 2


def test_mix_golden():
    # A change of these changes the data of every run on a mixture.
    assert "".join(map(str, mix(np.arange(20), (0.5, 0.2, 0.3))[0])) == "02010201020201020102"


@pytest.fixture
def config(tmp_path):
    """Three sources, of documents of one letter each."""
    for letter, count in (("a", 40), ("b", 12), ("c", 24)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            (tmp_path / letter / str(i)).write_text(letter * (20 + i))
    return DataConfig(
        source=tuple(f"text:{tmp_path}/{letter}" for letter in "abc"),
        weights=(0.5, 0.2, 0.3),
        dir=str(tmp_path / "data"),
        context_length=16,
        batch_size=8,
    )


def rows_of(batches, count):
    return np.concatenate([batch.targets for batch in itertools.islice(batches, count)])


def letters(rows):
    """The source of each row: the letter it consists of, beside separators."""
    return np.array([max(row) - ord("a") for row in rows])


def test_the_rows_of_a_mixture_are_those_of_its_sources(config):
    rows = rows_of(train_batches(config), 40)
    sources, indices = mix(np.arange(320), config.weights)
    np.testing.assert_array_equal(letters(rows), sources)
    for number, name in enumerate(config.source):
        alone = dataclasses.replace(config, source=name, weights=None)
        windows = Windows(load_corpus(alone, "train"), 16, config.seed)
        assert number != 1 or indices[sources == 1].max() > 2 * len(windows), "more than two epochs of the smallest"
        expected = [windows[i][1:] for i in epoch_windows(indices[sources == number], len(windows), config.seed)]
        np.testing.assert_array_equal(rows[sources == number], expected)


@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_are_the_same_for_any_hosts_and_start(config, document_mask):
    config = dataclasses.replace(config, document_mask=document_mask)
    whole = rows_of(train_batches(config), 9)
    shares = [rows_of(train_batches(config, start_step=4, process_index=i, process_count=4), 5) for i in range(4)]
    together = np.concatenate([share.reshape(5, 2, 16) for share in shares], axis=1)
    np.testing.assert_array_equal(together.reshape(40, 16), whole[32:])


def test_without_weights_all_sources_end_together(config):
    config = dataclasses.replace(config, weights=None)
    sizes = [len(Windows(member, 16, 0)) for member in load_corpus(config, "train").members]
    sources = letters(rows_of(train_batches(config), sum(sizes) // 8))
    assert np.abs(np.bincount(sources) - sizes).max() <= 8


def test_validation_has_the_same_shares(config):
    config = dataclasses.replace(config, context_length=4)
    rows = np.concatenate([batch.targets for batch in validation_batches(config, 5)])
    assert np.bincount(letters(rows)).tolist() == [20, 8, 12]
    corpus = load_corpus(config, "validation")
    assert isinstance(corpus, corpora.Mixture) and len(corpus) == len(corpus.lengths) == sum(map(len, corpus.members))
    every = [corpus[i] for i in range(len(corpus))]
    assert [len(document) for document in every] == corpus.lengths.tolist()
    assert letters(every).tolist() == sorted(letters(every)) and corpus.read(2, 1, 4).tolist() == every[2][1:4].tolist()
    assert corpus.byte_lengths(2).sum() == corpus.lengths[2]
    with pytest.raises(IndexError):
        corpus[len(corpus)]
    reordered = dataclasses.replace(config, source=config.source[::-1])
    assert corpus.digest() != load_corpus(reordered, "validation").digest()


def test_a_task_in_a_mixture_counts_its_answers_and_all_of_a_text(config, monkeypatch):
    monkeypatch.setattr(task, "EXAMPLES", {"train": 100, "test": 10})
    config = dataclasses.replace(
        config, source=(config.source[0], "task:copy"), weights=(0.5, 0.5), context_length=256, lengths=(2, 4)
    )
    for document_mask in (False, True):
        config = dataclasses.replace(config, document_mask=document_mask)
        batch = next(train_batches(config))
        assert masks_loss(config) and (batch.positions is not None) == document_mask
        from_text = np.array([row.max() == ord("a") and row.min() in (0, ord("a")) for row in batch.targets])
        assert from_text.sum() == 4
        assert batch.loss_mask[from_text].all() and 0 < batch.loss_mask[~from_text].mean() < 1


def test_what_one_source_holds_out_no_other_trains_on(config, tmp_path):
    held_out = load_corpus(dataclasses.replace(config, source=config.source[0], weights=None), "validation")[0]
    (tmp_path / "c" / "same").write_bytes(bytes(held_out.tolist()))
    complaint = "data.source text:.*/a overlaps data.source text:.*/c: 1 of its validation documents are also trained"
    with pytest.raises(ValueError, match=complaint):
        load_corpus(config, "train")
    with pytest.raises(ValueError, match=complaint):
        prepare.prepare(config, workers=1)


def test_all_sources_of_a_mixture_are_prepared(config, monkeypatch, capsys):
    expected = rows_of(train_batches(config), 5)
    monkeypatch.setattr(corpora, "LARGE", 0)
    with pytest.raises(ValueError, match="data.source text:.*/a has [0-9.]+ kB of text in its train split, too much"):
        load_corpus(config, "train")
    prepare.prepare(config, workers=1)
    np.testing.assert_array_equal(rows_of(train_batches(config), 5), expected)
    prepare.prepare(dataclasses.replace(config, source=(*config.source[:2], "task:copy")), workers=1)
    assert capsys.readouterr().err.count("prepared in") == 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"weights": (0.7, 0.2)}, "data.weights must be one for each of several sources, of which data.source has 3"),
        ({"weights": (0.7, 0.2, 0.2)}, "data.weights must be positive and sum to 1, not to 1.1: 0.7 0.2 0.2"),
        ({"weights": (0.7, 0.5, -0.2)}, "data.weights must be positive and sum to 1, not to 1: 0.7 0.5 -0.2"),
        ({"weights": (float("nan"), 0.5, 0.5)}, "data.weights must be positive and sum to 1"),
        ({"source": "text:a"}, "data.weights must be one for each of several sources, of which data.source has 1"),
        ({"source": (), "weights": None}, "data.source must name one source, or several different ones"),
        ({"source": ("text:a", "text:a"), "weights": None}, "data.source must name one source, or several different"),
    ],
)
def test_weights_that_do_not_fit_are_refused(config, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Config(data=dataclasses.replace(config, **settings))


def test_a_mixture_on_the_command_line(config_file):
    given = ["--config", str(config_file), "--data.source", "text:a", "text:b", "--data.weights", "0.7", "0.3"]
    data = parse_train([*given, "--workdir", "w"]).config.data
    assert (data.source, data.weights) == (("text:a", "text:b"), (0.7, 0.3)) and parse_prepare(given) == data
    assert parse_prepare(["--config", str(config_file), "--data.source", "text:a"]).source == "text:a"
    assert parse_prepare(["--config", str(config_file), "--data.split", "0.2"]).split == 0.2
    assert parse_prepare(["--config", str(config_file), "--data.split", "test"]).split == "test"
    assert override(Config(), {"data.source": ("text:a", "text:b")}).data.sources == ("text:a", "text:b")
    with pytest.raises(ValueError, match="data.weights must be positive and sum to 1, not to 0.9: 0.7 0.2"):
        parse_train([*given[:-1], "0.2", "--workdir", "w"])
