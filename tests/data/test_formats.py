"""The formats of corpora: whatever holds them, the same documents are the same corpus, and bad files are one line."""

import gzip
import json
import re
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from nope_jax.config import Config, DataConfig, override
from nope_jax.data import formats, load_corpus, prepare
from nope_jax.data.formats import files, scan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = [f"text {i}, naïve € 😀\n{'again ' * (i % 9)}" for i in range(60)]
ROWS = [*TEXTS, "", " \n", None, TEXTS[3]]
"""With what is left out: blank rows, and a text that was there before."""


def lines(rows, field="text"):
    return "".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)).encode()


def table(rows, field="text"):
    return pa.table({"id": range(len(rows)), field: pa.array(rows, pa.string())})


def write(kind, folder):
    """Write ROWS in a format; return the source."""
    folder.mkdir()
    if kind == "text":
        (folder / "all").write_text("<|>".join(row or "" for row in ROWS), encoding="utf-8")
    elif kind.startswith("jsonl"):
        compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}[kind.removeprefix("jsonl")]
        (folder / f"1.{kind}").write_bytes(compress(lines(ROWS[:20])))
        (folder / f"2.{kind}").write_bytes(compress(lines(ROWS[20:]).rstrip()))
        (folder / "README.md").write_text("not a row")
    elif kind == "parquet":
        parquet.write_table(table(ROWS[:20]), folder / "1.parquet", row_group_size=7)
        dictionary = table(ROWS[20:]).column("text").dictionary_encode()
        parquet.write_table(pa.table({"text": dictionary}), folder / "2.parquet", row_group_size=17)
    elif kind == "hf":
        datasets.Dataset(table(ROWS)).save_to_disk(folder / "saved")
        return f"hf:{folder}/saved"
    return f"{kind.partition('.')[0]}:{folder}"


KINDS = ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hf"]


def config_of(source, tmp_path, **settings):
    if source.startswith("text:"):
        settings = {"document_separator": "<|>"} | settings
    return DataConfig(source=source, dir=str(tmp_path / "data"), context_length=16, batch_size=4, **settings)


def contents(corpus):
    return [bytes(corpus[i].tolist()).decode() for i in range(len(corpus))]


def both(config):
    return [contents(load_corpus(config, split)) for split in ("train", "validation")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    config = config_of(write("jsonl", folder / "rows"), folder)
    return both(config), [load_corpus(config, split).digest() for split in ("train", "validation")]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_are_the_same_corpus_in_any_format(kind, large, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan, "KEPT", 0 if large else scan.KEPT)
    config = config_of(write(kind, tmp_path / "rows"), tmp_path)
    splits, digests = expected
    assert sorted(splits[0] + splits[1]) == sorted(TEXTS) and 2 <= len(splits[1]) <= 12
    assert both(config) == splits
    assert [load_corpus(config, split).digest() for split in ("train", "validation")] == digests
    said = capsys.readouterr().err
    assert said.count("1 documents with the text of another left out") == 1
    again, before = {"text": ("at byte ", "at byte "), "hf": ("row 64 ", "row 4 ")}.get(kind, ("row 44 ", "row 4 "))
    assert re.search(rf"the text of another left out, .*{again}.*the first, which repeats .*{before}", said)
    blank = {"hf": "row 61 "}.get(kind, "row 41 ")
    assert kind == "text" or said.count(f"3 rows without text (blank or null) left out, {blank}") == 1
    if large:  # found once, and kept
        for format in formats.FORMATS.values():
            monkeypatch.setattr(format, "find", lambda *_: pytest.fail("read again"))
        assert both(config) == splits
        left = {path.suffix for path in (tmp_path / "data/tokens").iterdir()}
        assert left == {".npy", ".json", ".lock"} and not list(tmp_path.glob("data/tokens/*-of-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_found_again_and_can_be_named(kind, tmp_path):
    config = config_of(write(kind, tmp_path / "rows"), tmp_path, validation_source=f"text:{__file__}")
    documents = prepare.find_documents(config, "train")
    for index in (59, 0, 33, 34, 2):  # in no order
        texts = documents.read([index])
        assert b"".join(next(texts)).decode() == TEXTS[index]
    named = documents.name(33)
    assert f"{tmp_path}/rows" in named
    assert {"text": "all at byte", "hf": "row 34 of the split train"}.get(kind, "row 14 of") in named


def test_a_killed_scan_goes_on_with_the_files_that_are_missing(tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jsonl").write_bytes(lines(TEXTS[i * 10 : i * 10 + 10]))
    config = config_of(f"jsonl:{folder}", tmp_path)
    expected = both(config)
    monkeypatch.setattr(scan, "KEPT", (folder / "0.jsonl").stat().st_size * 2)
    read = []

    def find(format, unit, advance, find=formats.FORMATS["jsonl"].find, stop=True):
        read.append(unit.name)
        if stop and len(read) == 4:
            raise KeyboardInterrupt
        return find(format, unit, advance)

    monkeypatch.setattr(formats.FORMATS["jsonl"], "find", find)
    with pytest.raises(KeyboardInterrupt):
        both(config)
    monkeypatch.setattr(formats.FORMATS["jsonl"], "find", lambda *args: find(*args, stop=False))
    assert both(config) == expected
    assert read[3] in read[4:] and not {*read[:2]} & {*read[4:]}, "a group of files that was read is not read again"


@pytest.mark.slow
def test_several_processes_find_and_write_the_same(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "KEPT", 0)
    monkeypatch.setattr(prepare, "PART", 500)
    config = config_of(write("parquet", tmp_path / "rows"), tmp_path)
    prepare.prepare(config, workers=2)
    assert both(config) == expected[0]


def test_a_field_of_another_name(expected, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, "body"))
    parquet.write_table(table(TEXTS, "body"), tmp_path / "a.parquet")
    for source in (f"jsonl:{tmp_path}/a.jsonl", f"parquet:{tmp_path}/*.parquet"):
        assert both(config_of(source, tmp_path, text_field="body")) == expected[0]
    with pytest.raises(ValueError, match="data.text_field 'body' is for sources jsonl:, parquet:, hf:, tfds:"):
        override(Config(), {"data.source": "text:a", "data.text_field": "body"})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_of_several_names_the_first_that_there_is(kind, tmp_path):
    """Sources that call their text differently can be mixed."""
    both_names = pa.table({"text": ["not this"] * 60, "verse": TEXTS})
    for name, rows in ("a", table(TEXTS, "body")), ("b", both_names):
        (tmp_path / name).mkdir()
        if kind == "jsonl":
            (tmp_path / name / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
        elif kind == "parquet":
            parquet.write_table(rows, tmp_path / name / "1.parquet")
        else:
            datasets.Dataset(rows).save_to_disk(tmp_path / name)
        found = both(config_of(f"{kind}:{tmp_path}/{name}", tmp_path, text_field=("body", "verse", "text")))
        assert sorted(found[0] + found[1]) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"no (field|column) 'poem' or 'line' \(data.text_field\), only"):
        both(config_of(f"{kind}:{tmp_path}/a", tmp_path, text_field=("poem", "line")))
    with pytest.raises(ValueError, match="data.text_field must name a field, or several"):
        override(Config(), {"data.source": f"{kind}:a", "data.text_field": ()})


BAD = {
    "row 2 of .*a.jsonl is not JSON: ": lines(TEXTS[:1]) + b'{"text": "cut',
    "row 1 of .*a.jsonl is not JSON: ": b"\xff\xfe\x00",
    "row 1 of .*a.jsonl must be an object with the field 'text', not a list": b"[1]\n",
    "row 3 of .*a.jsonl has no field 'text' .data.text_field., only id, body": lines(["a", "b"]) + lines(["c"], "body"),
    "row 1 of .*a.jsonl: its field 'text' must be a string, not a int": b'{"text": 3}',
    "row 1 of .*a.jsonl is blank": b'{"text": " "}\n',
    "a.jsonl is empty": b"\n\n",
    "a.jsonl.gz cannot be decompressed, it is truncated": gzip.compress(lines(TEXTS))[:-40],
    "a.jsonl.zst cannot be decompressed, it is truncated": zstd.compress(lines(TEXTS))[:-10],
    "a.parquet is no Parquet file, or truncated or broken": b"PAR1" + bytes(100),
    "a.parquet has no column 'text' .data.text_field., only id, body": table(["a"], "body"),
    "a.parquet: its column 'text' .data.text_field. must hold strings, not int64": pa.table({"text": [3]}),
    "row 1 of .*a.parquet is blank": table([None]),
}


@pytest.mark.parametrize("complaint", BAD)
def test_what_cannot_be_read_is_named(complaint, tmp_path):
    content = BAD[complaint]
    kind = "parquet" if "parquet" in complaint else "jsonl"
    path = tmp_path / f"a.{kind}{'.gz' * ('.gz ' in complaint)}{'.zst' * ('.zst ' in complaint)}"
    if isinstance(content, pa.Table):
        parquet.write_table(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data.source {kind}:{path}.*{complaint}"):
        load_corpus(config_of(f"{kind}:{path}", tmp_path), "train")


def test_a_parquet_file_cut_in_its_pages(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(TEXTS), path, compression="zstd")
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:60] + bytes(300) + whole[360:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.parquet is no Parquet file, or truncated or broken"):
            load_corpus(config_of(f"parquet:{path}", tmp_path), "train")


def test_zstandard_needs_a_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(lines(TEXTS)))
    monkeypatch.setattr(files, "zstd", None)
    with pytest.raises(ValueError, match=r"a.jsonl.zst is compressed with Zstandard, which needs pip install"):
        load_corpus(config_of(f"jsonl:{tmp_path}/a.jsonl.zst", tmp_path), "train")


# What is validation


def test_a_share_or_a_source_of_its_own(expected, tmp_path):
    source = write("jsonl", tmp_path / "rows")
    train, validation = both(config_of(source, tmp_path, split=0.5))
    assert sorted(train + validation) == sorted(TEXTS) and 20 < len(validation) < 40
    assert {*expected[0][1]} < {*validation}, "a larger share has the documents of a smaller"

    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jsonl").write_bytes(lines(["held", "out", "held"]))
    config = config_of(source, tmp_path, validation_source=f"jsonl:{other}")
    assert both(config) == [TEXTS, ["held", "out"]]
    (other / "b.jsonl").write_bytes(lines(["new", "", TEXTS[7]]))
    complaint = rf"^data.validation_source jsonl:{other} overlaps data.source {source}: 1 of its validation documents "
    where = rf"which is row 8 of {tmp_path}/rows/1.jsonl$"
    with pytest.raises(
        ValueError, match=complaint + rf"are also trained on, row 3 of {other}/b.jsonl the first, {where}"
    ):
        load_corpus(config, "train")
    with pytest.raises(ValueError, match=complaint):
        prepare.prepare(config, workers=1)
    for settings, complaint in [
        ({"split": 0.0}, "data.split must be a share between 0 and 1 or the name of a split, not 0.0"),
        ({"split": 1.5}, "data.split must be a share between 0 and 1"),
        ({"split": 0.1, "validation_source": "text:a"}, "leave out one of the two"),
        ({"validation_source": "jsonl:gs://b/a"}, "data.validation_source must be on a disk, not gs://b/a"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            Config(data=config_of(source, tmp_path, **settings))
    with pytest.raises(ValueError, match=r"data.split 'test' is the name of a split, but data.source jsonl.* has no"):
        both(config_of(source, tmp_path, split="test"))
    (other / "a.jsonl").write_bytes(lines(["one"]))
    with pytest.raises(ValueError, match="has a single document, of which nothing can be held out: name an"):
        both(config_of(f"jsonl:{other}/a.jsonl", tmp_path))


def test_the_named_splits_of_a_dataset(tmp_path):
    saved = {"train": [*TEXTS, "held", "out"], "validation": ["held", "in"], "test": ["out", "side"]}
    datasets.DatasetDict({name: datasets.Dataset(table(rows)) for name, rows in saved.items()}).save_to_disk(
        str(tmp_path / "saved")
    )
    source = f"hf:{tmp_path}/saved"
    # A text of the validation split is not trained on.
    assert both(config_of(source, tmp_path)) == [[*TEXTS, "out"], ["held", "in"]]
    assert both(config_of(source, tmp_path, split="test")) == [[*TEXTS, "held"], ["out", "side"]]
    train, validation = both(config_of(source, tmp_path, split=0.2))
    assert sorted(train + validation) == sorted(saved["train"])
    (tmp_path / "a.jsonl").write_bytes(lines(["of", "itself"]))
    rows = f"jsonl:{tmp_path}/a.jsonl"
    assert both(config_of(source, tmp_path, validation_source=rows)) == [saved["train"], ["of", "itself"]]
    assert both(config_of(rows, tmp_path, validation_source=source)) == [["of", "itself"], ["held", "in"]]
    assert both(config_of(rows, tmp_path, validation_source=source, split="test"))[1] == ["out", "side"]
    for split, complaint in [
        ("dev", r"data.split 'dev' is no split of data.source hf:.*, which has train, validation, test"),
        ("train", r"data.split 'train' is the split of data.source hf:.* that is trained on"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            both(config_of(source, tmp_path, split=split))
    with pytest.raises(ValueError, match=r"data.source hf:.*, split validation, has no column 'body'"):
        both(config_of(source, tmp_path, text_field="body"))


def test_a_dataset_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    with pytest.raises(ValueError, match="^data.source hf:nobody/nothing:en cannot be loaded: ConnectionError: no "):
        load_corpus(config_of("hf:nobody/nothing:en", tmp_path), "train")
