"""From documents to batches: the order of rows, the windows, the splits, the tokenizers."""

import bz2
import dataclasses
import gzip
import itertools
import lzma
import os
import shutil

import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax.config import DataConfig
from nope_jax.data import formats, load_corpus, load_tokenizer, python_stdlib, train_batches, validation_batches
from nope_jax.data.formats import scan
from nope_jax.data.splits import is_validation
from nope_jax.data.tokenizers import JsonTokenizer
from nope_jax.data.windows import Windows, epoch_windows, permute
from tests.support.drawn_model import drawn_model


def contents(corpus):
    return [bytes(corpus[i].tolist()) for i in range(len(corpus))]


def take(batches, count):
    return list(itertools.islice(batches, count))


# The order of rows


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(
    ("hosts", "start"), [(4, 7), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 0), (4, 0), (1, 7)])]
)
def test_rows_are_the_same_for_any_hosts_and_start(config, hosts, start, document_mask):
    config = dataclasses.replace(config, document_mask=document_mask)
    whole = take(train_batches(config), 20)[start:]
    shares = [
        take(train_batches(config, start_step=start, process_index=host, process_count=hosts), 20 - start)
        for host in range(hosts)
    ]
    for step, batch in enumerate(whole):
        for field, expected in zip(batch._fields, batch, strict=True):
            parts = [getattr(share[step], field) for share in shares]
            if expected is None:
                assert field == "loss_mask" or not document_mask
                assert parts == [None] * hosts
            else:
                assert expected.shape == (8, 16) and expected.dtype == np.int32
                np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_rows_depend_on_the_seed(config):
    first, second = (
        next(train_batches(dataclasses.replace(config, seed=seed))).tokens for seed in (config.seed, config.seed + 1)
    )
    assert (first != second).any()


@pytest.mark.parametrize("size", [*range(1, 18), 100, 1023, 1024, 1025])
def test_permute_is_a_permutation(size):
    for seed in range(5):
        assert sorted(permute(np.arange(size), size, (seed,))) == list(range(size))


def test_permute_is_random_access_and_reaches_every_permutation():
    images = permute(np.arange(1000), 1000, (3, 1))
    np.testing.assert_array_equal(permute(np.array([999, 0, 5]), 1000, (3, 1)), images[[999, 0, 5]])
    assert np.mean(images == permute(np.arange(1000), 1000, (3, 2))) < 0.01
    assert abs(np.corrcoef(np.arange(1000), images)[0, 1]) < 0.1
    counts = np.unique([permute(np.arange(4), 4, (0, epoch)) for epoch in range(2400)], axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 50 and counts.max() < 150


def test_permute_golden():
    # A change of these changes the data of every run: no resumed run would go on as it began.
    assert permute(np.arange(10), 10, (0,)).tolist() == [5, 7, 6, 3, 0, 4, 1, 9, 2, 8]
    assert permute(np.array([0, 10**12]), 10**12 + 1, (7, 3)).tolist() == [303936786304, 303202601760]


def test_every_epoch_visits_every_window_once_in_its_own_order():
    count, batch_size = 7, 4
    visited = np.concatenate([epoch_windows(step * batch_size + np.arange(batch_size), count, 5) for step in range(14)])
    epochs = visited.reshape(8, count)
    np.testing.assert_array_equal(np.sort(epochs), [range(count)] * 8)
    assert len({tuple(epoch) for epoch in epochs}) > 6


# Windows


def test_windows_hold_all_documents_each_once(config):
    corpus = load_corpus(config, "train")
    windows = Windows(corpus, config.context_length, seed=3)
    rows = [windows[i] for i in range(len(windows))]
    for row, following in itertools.pairwise(rows):
        assert row.shape == (17,) and row[-1] == following[0]
    stream = bytes(np.concatenate([rows[0][:1], *(row[1:] for row in rows)]).tolist())
    whole = stream.rsplit(b"\0", 1)[0].split(b"\0")
    left = sorted(contents(corpus))
    for document in whole:
        left.remove(document)
    assert sum(len(document) + 1 for document in left) - len(stream.rsplit(b"\0", 1)[1]) < config.context_length
    assert whole != contents(corpus)[: len(whole)], "the documents should be shuffled"


def test_targets_are_the_next_tokens(config):
    batch = next(train_batches(config))
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.positions is None and batch.segment_ids is None


def test_document_mask_restarts_at_each_separator(config):
    # Zero stands for the separator alone here: the documents are letters.
    for batch in take(train_batches(dataclasses.replace(config, document_mask=True)), 10):
        for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids, strict=True):
            position, segment = -1, 1
            for column, token in enumerate(tokens):
                opens = token == 0 and column > 0
                position, segment = (0, segment + 1) if opens else (position + 1, segment)
                assert (positions[column], segments[column]) == (position, segment)


def test_a_zero_byte_inside_a_document_is_no_separator(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\0cd" * 100)
    config = DataConfig(source=f"text:{tmp_path}/a", context_length=50, batch_size=4, document_mask=True)
    batch = next(train_batches(config))
    assert (batch.tokens == 0).any()
    assert (batch.segment_ids == 1).all()


def test_a_masked_row_has_the_logits_of_its_documents_alone(config):
    batch = next(train_batches(dataclasses.replace(config, document_mask=True, context_length=48)))
    row = int(np.argmax(batch.segment_ids[:, -1]))
    tokens, segments = batch.tokens[row], batch.segment_ids[row]
    assert segments[-1] > 2
    model = drawn_model(
        ModelConfig(num_layers=1, num_heads=2, model_dim=16, mlp_dim=16, encoding="rope", train_length=48)
    )
    run = nnx.jit(lambda model, tokens, **inputs: model(tokens, **inputs))
    packed = run(model, tokens[None], positions=batch.positions[row][None], segment_ids=segments[None])[0]
    # Padded at the end to one length, which changes nothing before it.
    pieces = [tokens[segments == segment] for segment in range(1, segments[-1] + 1)]
    alone = run(model, np.stack([np.pad(piece, (0, 48 - len(piece))) for piece in pieces]))
    expected = np.concatenate([logits[: len(piece)] for logits, piece in zip(alone, pieces, strict=True)])
    np.testing.assert_allclose(packed, expected, atol=1e-5)


@pytest.mark.parametrize("document_mask", [False, True])
def test_bos_begins_every_row_and_every_token_is_predicted_once(config, tokenizer_json, document_mask):
    config = dataclasses.replace(config, tokenizer=str(tokenizer_json), bos=True, document_mask=document_mask)
    corpus = load_corpus(config, "train")
    bos = corpus.bos
    assert bos == load_tokenizer(config.tokenizer).bos != load_tokenizer(config.tokenizer).separator
    windows = Windows(corpus, config.context_length, config.seed)
    assert len(windows) == len(corpus.tokens) // config.context_length
    per_epoch = len(windows) // config.batch_size
    for batch in take(train_batches(config), per_epoch):
        assert batch.tokens.shape == (8, 16) and (batch.tokens[:, 0] == bos).all()
        assert (batch.targets != bos).all()
        if not document_mask:
            np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            continue
        # A document is read as it would be alone: from the bos on, which takes the place of the separator before it.
        opens = batch.positions == 0
        assert (batch.tokens[opens] == bos).all() and (batch.tokens != 0).all()
        np.testing.assert_array_equal(opens[:, 1:], batch.targets[:, :-1] == 0)
        np.testing.assert_array_equal(batch.tokens[~opens], batch.targets[:, :-1][~opens[:, 1:]])
    predicted = np.concatenate([windows[i][1:] for i in range(len(windows))])
    order = permute(np.arange(len(corpus)), len(corpus), (config.seed,))
    ends = itertools.pairwise(corpus.offsets)
    stream = [corpus.tokens[slice(*pair)] for pair in ends]
    np.testing.assert_array_equal(predicted, np.concatenate([stream[i] for i in order])[: len(predicted)])


def test_a_corpus_with_bos_gives_documents_as_a_model_reads_them(config, tokenizer_json):
    for tokenizer, bos in (("bytes", 0), (str(tokenizer_json), 1)):
        config = dataclasses.replace(config, tokenizer=tokenizer)
        plain, corpus = (load_corpus(dataclasses.replace(config, bos=given), "validation") for given in (False, True))
        i = int(plain.lengths.argmax())
        assert corpus[i].tolist() == [bos, *plain[i].tolist()]
        assert corpus.read(i, 2, 5).tolist() == [bos, *plain[i][2:4].tolist()]
        assert plain.read(i, 2, 5).tolist() == plain[i][2:5].tolist()
        assert corpus.byte_lengths(i).tolist() == [0, *plain.byte_lengths(i).tolist()]
        np.testing.assert_array_equal(corpus.lengths, plain.lengths + 1)


def test_validation_batches_are_spread_evenly_and_ignore_the_seed(config):
    first, second = (
        validation_batches(dataclasses.replace(config, seed=seed, batch_size=2), num_batches=3) for seed in (0, 1)
    )
    windows = Windows(load_corpus(config, "validation"), config.context_length, seed=0)
    rows = np.concatenate([batch.tokens for batch in first])
    expected = [windows[i * len(windows) // 6][:-1] for i in range(6)]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(rows, np.concatenate([batch.tokens for batch in second]))
    small = dataclasses.replace(config, batch_size=2)
    shares = [validation_batches(small, 3, process_index=host, process_count=2)[1].tokens for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(shares), first[1].tokens)


def test_a_corpus_shorter_than_one_window_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)  # 90 for training, 10 for validation, and a separator after each
    source = f"text:{tmp_path}/a"
    assert next(train_batches(DataConfig(source=source, context_length=90))).tokens.shape == (32, 90)
    with pytest.raises(ValueError, match="data.context_length 91 needs 92 tokens, but the train split of .* has 91"):
        train_batches(DataConfig(source=source, context_length=91))
    with pytest.raises(ValueError, match="data.context_length 11 needs 12 tokens, but the validation split .* has 11"):
        validation_batches(DataConfig(source=source, context_length=11), 1)
    # A bos takes the place of the token before the first.
    assert next(train_batches(DataConfig(source=source, context_length=91, bos=True))).tokens.shape == (32, 91)
    with pytest.raises(ValueError, match="data.context_length 92 needs 92 tokens, but the train split of .* has 91"):
        train_batches(DataConfig(source=source, context_length=92, bos=True))


def test_rows_that_cannot_be_shared_are_refused(config):
    with pytest.raises(ValueError, match="data.batch_size 8 must be a multiple of the 3 processes"):
        train_batches(config, process_count=3)


# Sources and splits


def test_splits_share_no_document_and_leave_none_out(config, texts):
    train, validation = (contents(load_corpus(config, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(path.read_bytes() for path in texts.iterdir())
    assert len(validation) == sum(is_validation(path.name) for path in texts.iterdir()) > 0


def test_a_document_keeps_its_side_when_others_come_and_the_folder_moves(config, texts, tmp_path):
    before = set(contents(load_corpus(config, "validation"))) - {b""}
    for i in range(40, 80):
        (texts / f"{i}.txt").write_bytes(b"new %d" % i)
    moved = texts.rename(tmp_path / "moved")
    after = set(contents(load_corpus(dataclasses.replace(config, source=f"text:{moved}/*.txt"), "validation")))
    new = {b"new %d" % i for i in range(40, 80) if is_validation(f"{i}.txt")}
    assert before and new and after == before | new


@pytest.mark.parametrize("side", [True, False])
def test_two_documents_are_one_on_each_side(side, tmp_path):
    names = [name for name in map(str, range(100)) if is_validation(name) == side][:2]
    for name in names:
        (tmp_path / name).write_text(name)
    config = DataConfig(source=f"text:{tmp_path}/*")
    train, validation = (contents(load_corpus(config, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(name.encode() for name in names)
    assert len(train) == len(validation) == 1


def test_a_single_file_is_cut_between_characters(tmp_path):
    text = "äöü€" * 25
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source=f"text:{tmp_path}/a.txt")
    (train,), (validation,) = (contents(load_corpus(config, split)) for split in ("train", "validation"))
    assert train.decode() + validation.decode() == text
    assert 0.08 < len(validation) / len(text.encode()) < 0.12


def test_what_a_path_or_glob_matches(tmp_path):
    for name in "a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", ".hidden/e.txt", "odd [x].txt":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def matched(source):
        config = DataConfig(source=f"text:{tmp_path}/{source}")
        documents = contents(load_corpus(config, "train")) + contents(load_corpus(config, "validation"))
        return sorted(document.decode() for document in documents)

    assert matched("") == sorted(["a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", "odd [x].txt"])
    assert matched("**/*.txt") == sorted(["a.txt", "sub/c.txt", "sub/deep/d.txt", "odd [x].txt"])
    assert matched("*.[tm][xd]*") == sorted(["a.txt", "b.md", "odd [x].txt"])
    assert matched("odd [x].txt") == ["odd [x].tx", "t"]
    with pytest.raises(ValueError, match=r"data.source text:.*\*.rst matches no file"):
        matched("*.rst")


def both(config):
    return [contents(load_corpus(config, split)) for split in ("train", "validation")]


def test_a_file_is_one_document_however_many_links_lead_to_it(tmp_path):
    # As the cache of Hugging Face has it, with a link to its own folder and files that never end.
    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots/1").mkdir(parents=True)
    for i in range(60):
        (hub / f"blobs/{i}").write_text(f"text {i}")
        (hub / f"snapshots/1/{i}.txt").symlink_to(f"../../blobs/{i}")
    (hub / "loop").symlink_to(".")
    (hub / "snapshots/main").symlink_to("1")
    (hub / "snapshots/again").symlink_to("../../hub")
    (hub / "broken").symlink_to("nowhere")
    os.mkfifo(hub / "pipe")
    (tmp_path / "beside").symlink_to(hub)
    everything = sorted(f"text {i}".encode() for i in range(60))
    splits = both(DataConfig(source=f"text:{hub}"))
    assert sorted(itertools.chain(*splits)) == everything
    for source in (f"{tmp_path}/beside", f"{hub}/**/*", f"{tmp_path}/*/blobs/../blobs/*", f"{hub}/**/**/*.txt"):
        train, validation = both(DataConfig(source=f"text:{source}"))
        assert sorted(train + validation) == everything and train and validation
    assert both(DataConfig(source=f"text:{tmp_path}/beside")) == splits, "the links should not matter to the splits"
    validation = [f"text {i}".encode() for i in range(60) if is_validation(f"blobs/{i}")]
    assert validation and sorted(splits[1]) == sorted(validation)

    snapshot = both(DataConfig(source=f"text:{hub}/snapshots/main"))  # of links to files outside
    assert sorted(itertools.chain(*snapshot)) == everything
    for source, complaint in [(hub / "pipe", "is no regular file"), (hub / "broken", "is no regular file")]:
        with pytest.raises(ValueError, match=complaint):
            both(DataConfig(source=f"text:{source}"))


def test_no_text_is_on_both_sides(texts, config, capsys):
    names = [f"copy{i}.txt" for i in range(100)]
    for name in names:
        (texts / name).write_text("the same")
    assert len({is_validation(name) for name in names}) == 2
    train, validation = both(config)
    assert (train + validation).count(b"the same") == 1 and not set(train) & set(validation)
    assert len(train + validation) == 41
    line = f"data.source {config.source}: 99 documents with the text of another left out, "
    assert capsys.readouterr().err.count(line) == 1


def test_tokens_do_not_depend_on_paths_and_times(texts, config, tokenizer_json, tmp_path, monkeypatch):
    config = dataclasses.replace(config, tokenizer=str(tokenizer_json))
    expected = load_corpus(config, "train")
    copy = shutil.copytree(texts, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(JsonTokenizer, "encode_pieces", lambda *_: pytest.fail("tokenised again"))
    again = load_corpus(dataclasses.replace(config, source=f"text:{copy}"), "train")
    np.testing.assert_array_equal(again.tokens, expected.tokens)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("piece", [1, 3, 7, 2**20])
def test_documents_between_separators(compressed, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.files, "PIECE", piece)
    stories = [f"story {i}, naïve €" for i in range(60)]
    text = "<|end|>".join(["", *stories, " \n", "", *stories[:30], "<|en", ""]).encode()
    (tmp_path / "all.txt").write_bytes(gzip.compress(text) if compressed else text)
    config = DataConfig(source=f"text:{tmp_path}/all.txt", dir=str(tmp_path / "data"), document_separator="<|end|>")
    train, validation = both(config)
    assert sorted(train + validation) == sorted(story.encode() for story in [*stories, "<|en"])
    assert not set(train) & set(validation) and 1 <= len(validation) <= 15

    # A document keeps its side whatever files it is in.
    (tmp_path / "parts").mkdir()
    for i in range(6):
        (tmp_path / f"parts/{i}").write_text("<|end|>".join(stories[i::6]), encoding="utf-8")
    parts = both(dataclasses.replace(config, source=f"text:{tmp_path}/parts"))
    assert {b"<|en"}.union(*parts) == set(train + validation)
    assert set(parts[0]) <= set(train) and set(parts[1]) <= set(validation)


def test_a_separator_that_is_a_special_token_is_no_text(tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_json))
    (tmp_path / "all.txt").write_text("the cat<|endoftext|>sat<|endoftext|>on the mat")
    config = DataConfig(
        source=f"text:{tmp_path}/all.txt",
        dir=str(tmp_path / "data"),
        tokenizer=str(tokenizer_json),
        document_separator="<|endoftext|>",
    )
    found = []
    for split in ("train", "validation"):
        corpus = load_corpus(config, split)
        assert (corpus.tokens == tokenizer.separator).sum() == len(corpus)
        found += [tokenizer.decode(corpus[i]) for i in range(len(corpus))]
    assert sorted(found) == ["on the mat", "sat", "the cat"]


def test_compressed_files_are_read_as_the_text_they_hold(texts, config, tmp_path):
    expected = both(config)
    for i, path in enumerate(sorted(texts.iterdir())):
        compress = (gzip.compress, bz2.compress, lzma.compress, lambda text: text)[i % 4]
        path.write_bytes(compress(path.read_bytes()))
    assert both(config) == expected

    whole = gzip.compress(np.random.default_rng(0).bytes(1000))
    for name, content, complaint in [
        ("cut.gz", whole[:500], "cut.gz cannot be decompressed, it is truncated or broken"),
        ("cut.bz2", bz2.compress(b"text" * 99)[:-20], "cut.bz2 cannot be decompressed"),
        ("wrong.bz2", b"BZhello", "wrong.bz2 cannot be decompressed"),
        ("cut.xz", lzma.compress(b"text" * 99)[:-20], "cut.xz cannot be decompressed"),
        ("a.zst", b"\x28\xb5\x2f\xfd rest", "a.zst cannot be decompressed"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"data.source text:.*{complaint}"):
            both(DataConfig(source=f"text:{tmp_path / name}"))


def test_binary_files_are_left_out_unless_they_are_what_is_asked_for(texts, config, tokenizer_json, capsys):
    expected = both(config)
    (texts / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (texts / "all.tar.gz").write_bytes(gzip.compress(b"name" + bytes(600)))
    assert both(config) == expected
    assert both(dataclasses.replace(config, source=f"text:{texts}/*")) == expected
    assert f"2 binary files (a NUL byte near the start) left out, {texts}/all.tar.gz the" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no text: .*logo.png is binary"):
        both(dataclasses.replace(config, source=f"text:{texts}/*.png"))
    with pytest.raises(ValueError, match=r"has no text: .*logo.png is binary"):
        both(dataclasses.replace(config, source=f"text:{texts}/logo.png", tokenizer=str(tokenizer_json)))
    train, validation = both(dataclasses.replace(config, source=f"text:{texts}/logo.png"))
    assert train[0] + validation[0] == (texts / "logo.png").read_bytes()


def test_what_was_found_in_many_files_is_kept(texts, config, monkeypatch):
    monkeypatch.setattr(scan, "KEPT", 0)
    expected = both(config)
    monkeypatch.setattr(formats.text, "_cut", lambda *_: pytest.fail("read again"))
    assert both(config) == expected
    monkeypatch.undo()
    (texts / "new.txt").write_text("new")
    assert sorted(itertools.chain(*both(config))) == sorted([*itertools.chain(*expected), b"new"])


@pytest.mark.parametrize("source", ["stdlib", "text:", "tfds:", "texts:a", "python_stdlib:3"])
def test_unknown_sources_are_refused(source):
    message = (
        "data.source must be python_stdlib, text:PATH_OR_GLOB, jsonl:PATH_OR_GLOB, parquet:PATH_OR_GLOB, "
        "hf:NAME_OR_FOLDER, tfds:NAME or task:NAME, not"
    )
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(source=source), "train")


def test_python_stdlib_is_prepared_once_and_read_as_any_prepared_dataset(tmp_path, capsys, monkeypatch):
    root, data = tmp_path / "lib", tmp_path / "data"
    files = {f"package/module{i}.py": f"x = {i}\n".encode() for i in range(30)}
    skipped = {"empty.py": b"", "latin.py": b"# \xe9", "notes.txt": b"no", "site-packages/installed.py": b"no"}
    for name, text in (files | skipped).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)

    # Killed on the way: what is left is not read.
    with monkeypatch.context() as patch:

        def killed(*_):
            yield "a.py", {"name": "a.py", "text": "x = 1"}
            raise KeyboardInterrupt

        patch.setattr(python_stdlib.PythonStdlib, "_generate_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            python_stdlib.prepare(data, root)
    # Another process comes first: what it wrote is read.
    with monkeypatch.context() as patch:
        download_and_prepare = python_stdlib.PythonStdlib.download_and_prepare

        def too_late(builder):
            download_and_prepare(python_stdlib.PythonStdlib(root=root, data_dir=data))
            raise OSError("the folder is not empty")

        patch.setattr(python_stdlib.PythonStdlib, "download_and_prepare", too_late)
        python_stdlib.prepare(data, root)
    assert "Preparing python_stdlib in" in capsys.readouterr().err

    shutil.rmtree(root)
    config = DataConfig(source="python_stdlib", dir=str(data))
    train, validation = (contents(load_corpus(config, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(files.values())
    assert sorted(validation) == sorted(text for name, text in files.items() if is_validation(name))
    assert capsys.readouterr().err == ""

    config = dataclasses.replace(config, source="tfds:python_stdlib")
    assert contents(load_corpus(config, "validation")) == validation
    with pytest.raises(ValueError, match="data.source tfds:stdlib does not lie in data.dir"):
        load_corpus(dataclasses.replace(config, source="tfds:stdlib"), "train")
