"""Paths on a disk and in a bucket. The bucket here is a dict behind fsspec, which gcsfs stands behind elsewhere."""

import errno
import importlib.util
import json
import os
from pathlib import Path

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from nope_jax import cli, config, locks, text_generation, trained
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.config import Config, DataConfig, TrainConfig
from nope_jax.data import load_corpus
from nope_jax.paths import location, write_whole
from nope_jax.retention import saved_steps
from nope_jax.training import train
from nope_jax.training.metrics import BucketMetricsLog, MetricsLog
from tests.support.tiny_runs import call_eval, write_documents, write_run

WITHOUT_PACKAGE = "{} gs://b/run needs a package that is not installed: pip install gcsfs"
NO_BUCKET = "{} must be a path on a disk or gs://BUCKET/FOLDER, not {}"
NOT_ON_DISK = "{} must be on a disk, not {}; only the folder of a run may be in a bucket"


@pytest.fixture(autouse=True)
def no_folder_named_after_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(":")]


@pytest.fixture
def gcsfs_is(monkeypatch):
    """A function that says whether gcsfs is installed."""
    find_spec = importlib.util.find_spec

    def gcsfs_is(installed):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: installed if name == "gcsfs" else find_spec(name, *rest)
        )

    gcsfs_is(None)
    return gcsfs_is


@pytest.fixture
def bucket(gcsfs_is, monkeypatch):
    """What gs:// leads to: files in a dict."""

    class Bucket(MemoryFileSystem):
        cachable = False
        store = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("gs://").strip("/")

    gcsfs_is("installed")
    files = Bucket()
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: files)
    return files.store


def test_what_is_a_folder_of_a_run(bucket):
    assert location("runs/nope") == Path("runs/nope") and isinstance(location("runs/nope"), Path)
    assert location(Path("/runs:/nope")) == Path("/runs:/nope")
    assert os.fspath(location("gs://b/run") / "config.json") == "gs://b/run/config.json"
    assert os.fspath(location(location("gs://b/run"))) == "gs://b/run"


@pytest.mark.parametrize(
    "path", ["s3://b/run", "az://b/run", "file:///run", "gs:/b/run", "gs:///run", Path("gs://b/run")]
)
def test_what_is_none_is_refused(bucket, path):
    for use in location, config.load, load_model, Checkpointer, lambda path: train(Config(), path):
        with pytest.raises(ValueError, match=NO_BUCKET.format("workdir", os.fspath(path))):
            use(path)
    with pytest.raises(ValueError, match=NO_BUCKET.format("workdir", os.fspath(path))):
        config.save(Config(), path)


CONFIG = f"--config {Path(__file__).parents[1]}/configs/tiny.py"
TRAIN = f"{CONFIG} --workdir run"
EVAL = "--lengths 128"


@pytest.mark.parametrize(
    ("parse", "arguments", "complaint"),
    [
        (cli.parse_train, f"{CONFIG} --workdir gs://b/run", WITHOUT_PACKAGE.format("--workdir")),
        (cli.parse_train, f"{CONFIG} --workdir=s3://b/run", NO_BUCKET.format("--workdir", "s3://b/run")),
        (cli.parse_train, f"{CONFIG} --workdir gs:/b/run", NO_BUCKET.format("--workdir", "gs:/b/run")),
        (cli.parse_train, "--config gs://b/c.py --workdir run", "--config must be a Python file"),
        (cli.parse_train, f"{TRAIN} --data.dir gs://b/d", NOT_ON_DISK.format("data.dir", "gs://b/d")),
        (cli.parse_train, f"{TRAIN} --data.source text:gs://b/*.txt", NOT_ON_DISK.format("data.source", r"gs://b/\*")),
        (cli.parse_train, f"{TRAIN} --data.tokenizer gs://b/t.json", NOT_ON_DISK.format("data.tokenizer", "gs://b/t")),
        (cli.parse_train, f"{TRAIN} --train.init_from s3://b/run", NO_BUCKET.format("train.init_from", "s3://b/run")),
        (cli.parse_eval, f"{EVAL} --out out --workdirs run gs://b/run", WITHOUT_PACKAGE.format("--workdirs")),
        (cli.parse_eval, f"{EVAL} --out out --workdirs run s3://b/r", NO_BUCKET.format("--workdirs", "s3://b/r")),
        (cli.parse_generate, "--prompt a --workdir gs://b/run", WITHOUT_PACKAGE.format("--workdir")),
        (cli.parse_export, "--out out --workdir=gs:/b/run", NO_BUCKET.format("--workdir", "gs:/b/run")),
        (cli.parse_export, "--out gs://b/out --workdir run", NOT_ON_DISK.format("--out", "gs://b/out")),
        (cli.parse_eval, f"{EVAL} --workdirs run --out gs://b/out", NOT_ON_DISK.format("--out", "gs://b/out")),
        (cli.parse_eval, f"{EVAL} --workdirs run --out o --data.dir gs://b", NOT_ON_DISK.format("data.dir", "gs://b")),
        (cli.parse_prepare, f"{CONFIG} --data.dir gs://b/d", NOT_ON_DISK.format("data.dir", "gs://b/d")),
    ],
)
def test_the_command_lines_refuse_in_one_line(gcsfs_is, parse, arguments, complaint):
    with pytest.raises(ValueError, match=complaint.partition(";")[0]) as error:
        parse(arguments.split())
    assert "\n" not in str(error.value)


def test_a_workdir_in_a_bucket_stays_one(bucket):
    for arguments in f"{CONFIG} --workdir gs://b/run", f"{CONFIG} --workdir=gs://b/run --train.init_from gs://b/other":
        arguments = cli.parse_train(arguments.split())
        assert os.fspath(arguments.workdir) == "gs://b/run"
    assert arguments.config.train.init_from == "gs://b/other"
    workdirs = [
        *cli.parse_eval(f"{EVAL} --out o --workdirs gs://b/run hf:x run".split()).workdirs,
        cli.parse_generate(["--prompt", "a", "--workdir", "gs://b/run"])["workdir"],
        cli.parse_export(["--out", "o", "--workdir", "gs://b/run"])[0],
    ]
    assert [*map(os.fspath, workdirs)] == ["gs://b/run", "hf:x", "run", "gs://b/run", "gs://b/run"]
    with pytest.raises(ValueError, match="gs://b/other is not the workdir of a run"):
        load_model(arguments.config.train.init_from)


def test_other_ways_to_name_the_data(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://b/datasets")
    with pytest.raises(ValueError, match="data.dir must be on a disk, not gs://b/datasets"):
        load_corpus(DataConfig(source="tfds:c4/en"), "train")
    with pytest.raises(ValueError, match="data.dir must be on a disk"):
        Config(data=DataConfig(dir="gs://b/datasets"))


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    write_whole(path, b"old")

    def fill_the_disk(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(path, b"new")
    assert error.value.filename == str(path) and path.read_bytes() == b"old"


def test_config_in_a_bucket(bucket):
    wanted = Config(train=TrainConfig(steps=7, init_from="gs://b/other"))
    config.save(wanted, "gs://b/run")
    config.save(wanted, "gs://b/run")
    assert list(bucket) == ["/b/run/config.json"]
    assert config.load("gs://b/run") == wanted
    with pytest.raises(ValueError, match="gs://b/none is not the workdir of a run: it has no config.json"):
        config.load("gs://b/none")


def test_metrics_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
    places = (MetricsLog, tmp_path / "metrics.jsonl"), (BucketMetricsLog, location("gs://b/run/metrics.jsonl"))
    for kind, path in places:
        log = kind(path, start=0)
        for step in range(1, 5):
            log.write(step, {"loss": 1 / step})
        log.flush()
        log.write(5, {"loss": 0.0})  # a process that is killed here has lost this one, or not
        if kind is MetricsLog:
            log.close()
        before = path.read_text()
        log = kind(path, start=3)
        log.write(4, {"loss": 9.0})
        log.close()
        assert [json.loads(line)["step"] for line in before.splitlines()][:4] == [1, 2, 3, 4]
    texts = [path.read_text() for _, path in places]
    assert texts[0] == texts[1] and texts[0].splitlines()[3] == '{"step": 4, "loss": 9.0}'


def test_a_folder_in_a_bucket_has_one_writer(bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    with locks.held(location("gs://b/run")):
        assert list(bucket) == ["/b/run/lock"]
        refused = pytest.raises(ValueError, match=f"gs://b/run is being written by process {os.getpid()}")
        with refused, locks.held(location("gs://b/run")):
            pass
    assert not bucket


def test_which_checkpoints_are_whole(bucket, tmp_path):
    for name in "8", "10", "4.unreadable", "12.orbax-checkpoint-tmp":
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [8, 10]
    folder = location("gs://b/run")
    assert saved_steps(folder) == []
    for name in "8/params/a", "8/commit_success.txt", "10/commit_success.txt", "12/params/a", "metadata":
        (folder / "checkpoints" / name).write_text("")
    assert saved_steps(folder) == [8, 10]


def test_what_a_bucket_cannot_take_is_refused_before_anything_is_computed(bucket):
    for train_config in TrainConfig(tensorboard=True), TrainConfig(profile_steps=2):
        with pytest.raises(ValueError, match=r"train\.\w+ needs a workdir on a disk, not gs://b/run"):
            train(Config(train=train_config), "gs://b/run")


def test_a_bucket_that_does_not_answer_is_one_line(bucket, monkeypatch):
    def unreachable(*_):
        raise RuntimeError("no route.\nmore")

    monkeypatch.setattr(epath.backend.fsspec_backend, "exists", unreachable)
    with pytest.raises(ValueError, match="workdir gs://b/run cannot be reached: RuntimeError: no route .without cred"):
        train(Config(), "gs://b/run")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_and_continues_a_text(bucket, tmp_path, monkeypatch, capsys):
    write_documents(tmp_path)
    write_run(tmp_path, "run")
    config.save(config.load(tmp_path / "run"), "gs://b/runs/nope")
    checkpoint = location("gs://b/runs/nope") / "checkpoints" / "0"
    (checkpoint / "commit_success.txt").write_text("")
    (checkpoint / "_CHECKPOINT_METADATA").write_text("saved then")
    loaded = []

    def load(workdir, mesh, **_):  # tensorstore would ask Google for the arrays
        loaded.append(os.fspath(workdir))
        return load_model(tmp_path / "run", mesh)

    monkeypatch.setattr(trained, "load_model", load)
    words = f"--workdirs gs://b/runs/nope --lengths 16 --eval.documents 2 --out {tmp_path}/out"
    for saved, times in {"saved then": 1, "saved again": 2}.items():  # what has been measured of a checkpoint is kept
        (checkpoint / "_CHECKPOINT_METADATA").write_text(saved)
        for _ in range(2):
            assert call_eval(monkeypatch, words) == 0, capsys.readouterr().err
        assert loaded == ["gs://b/runs/nope"] * times
    assert "nope" in (tmp_path / "out" / "curves.csv").read_text()
    assert (
        len(
            "".join(
                text_generation.continuation(
                    text_generation.load("gs://b/runs/nope"),
                    "abc",
                    text_generation.GenerateOptions(Path(), "", max_new_tokens=4),
                )
            )
        )
        > 0
    )
    assert call_eval(monkeypatch, words.replace("runs/nope", "runs/none")) == 2
    assert "error: gs://b/runs/none is not the workdir of a run" in capsys.readouterr().err
