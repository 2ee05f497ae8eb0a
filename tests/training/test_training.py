"""Training: the step, the record of a run, and that a run comes to the same bits however often it is stopped."""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax import nnx

from nope_jax import cli
from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from nope_jax.data import Batch
from nope_jax.models import decoder
from nope_jax.retention import validation_losses
from nope_jax.sharding import make_mesh
from nope_jax.training import Interrupted, loop, resume, train
from nope_jax.training.metrics import MetricsLog
from nope_jax.training.state import abstract_state, init_state
from nope_jax.training.step import jit_train_step, jit_validation, reason_to_stop, train_step
from tests.support.drawn_model import drawn_model
from tests.support.shared_programs import share_programs

ROOT = Path(__file__).parents[2]
RUN = "import sys; from nope_jax import config, training; training.train(config.load(sys.argv[1]), sys.argv[1])"
"""A run as a process of its own, from the config.json in its workdir."""


@pytest.fixture(scope="module", autouse=True)
def compile_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


def smoke_config(corpus: Path) -> Config:
    return Config(
        model=ModelConfig(num_layers=2, num_heads=2, model_dim=16, mlp_dim=32),
        data=DataConfig(source=f"text:{corpus}/*.txt", context_length=16, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(steps=12, log_every=1, checkpoint_every=4, eval_every=6, eval_batches=2),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A smoke run over text that is the same everywhere."""
    corpus = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for document in range(20):
        words = ["".join(draw.choices("aeiou", k=3)) for _ in range(100)]
        (corpus / f"{document:02}.txt").write_text(" ".join(words))
    return smoke_config(corpus)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of that run, never stopped."""
    workdir = tmp_path_factory.mktemp("finished")
    train(config, workdir)
    return workdir


def lines(workdir: Path) -> list[dict]:
    """What the run logged, without what depends on the machine."""
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "mfu", "goodput")
    return [{k: v for k, v in line.items() if k not in timed and not k.endswith("_seconds")} for line in logged]


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def checkpoints(workdir: Path) -> set[str]:
    return {entry.name for entry in (workdir / "checkpoints").iterdir()}


def assert_same_run(workdir: Path, expected: Path) -> None:
    assert lines(workdir) == lines(expected)
    (_, model, step), (_, expected_model, expected_step) = load_model(workdir), load_model(expected)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected_model))


def test_the_losses_are_the_golden_ones(finished):
    # Update these when the model, the data order or the optimizer are meant to change, and say so in the commit.
    golden = [6.033666, 6.055897, 5.789247, 5.38626, 5.255285, 4.901628]
    golden += [4.682096, 4.42623, 4.184381, 3.981174, 4.009922, 3.926944]
    np.testing.assert_allclose(losses(finished), golden, rtol=1e-4)


def test_every_step_is_logged_once_and_the_newest_checkpoints_kept(config, finished):
    logged = lines(finished)
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in logged if "validation_loss" in line] == [6, 12]
    assert checkpoints(finished) == {"8", "12"}
    assert configs.load(finished) == config
    assert load_model(finished)[0] == config


def changed(config: Config, values: dict) -> Config:
    return configs.override(config, values)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """Sends signals to this process while step `step` runs."""
    batches = loop.train_batches

    def signalling(data: DataConfig, *, start_step: int, **hosts: int):
        for index, batch in enumerate(batches(data, start_step=start_step, **hosts), start_step):
            if index == step:  # the batch of the next step, fetched while this one runs
                for signum in signals:
                    os.kill(os.getpid(), signum)
            yield batch

    monkeypatch.setattr(loop, "train_batches", signalling)


def test_a_run_goes_on_with_its_own_encoding_only_while_that_is_the_same(config, finished, tmp_path, capsys):
    def own(text: str) -> Config:
        (tmp_path / "own.py").write_text(
            f"import dataclasses\nfrom nope_jax.encodings import Encoding\nfrom nope_jax.config import Config\n"
            f"@dataclasses.dataclass(frozen=True)\nclass Own(Encoding):\n    {text}\ndef get_config(): return Config()"
        )
        configs.load_file(tmp_path / "own.py")
        encoding = sys.modules[str(tmp_path / "own.py")].Own()
        return dataclasses.replace(config, model=dataclasses.replace(config.model, encoding=encoding))

    workdir = shutil.copytree(finished, tmp_path / "run")
    configs.save(own("strength: float = 1.0"), workdir)
    with pytest.raises(ValueError, match="own.py has changed since the run in .* was started with it"):
        train(own("strength: float = 1.0; start: float = 2.0"), workdir)
    train(own("strength: float = 1.0  # A comment."), workdir)
    assert "already finished at step 12" in capsys.readouterr().out


@contextlib.contextmanager
def handled_by(signum, handler):
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(
    "signals",
    # A terminal that is closed hangs up, and so does its shell.
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT], marks=pytest.mark.slow),
        pytest.param([signal.SIGHUP, signal.SIGHUP], marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(config, finished, tmp_path, monkeypatch, capsys, signals):
    signum = signals[0]
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped at step 5 and saved") as stop:
        stop_at(5, patch, *signals)
        with handled_by(signum, signal.SIG_DFL):  # also where the tests themselves run under nohup
            train(config, tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # cli.run sets its own
    assert cli.run(lambda: (_ for _ in ()).throw(stop.value)) == 128 + signum
    assert "stopped at step 5 and saved" in capsys.readouterr().err
    assert checkpoints(tmp_path) == {"4", "5"}
    train(config, tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_hang_up_that_nohup_ignores_stays_ignored(config, tmp_path, monkeypatch):
    stop_at(2, monkeypatch, signal.SIGHUP)
    with handled_by(signal.SIGHUP, signal.SIG_IGN):
        train(config, tmp_path)
    assert checkpoints(tmp_path) == {"8", "12"}


@pytest.mark.slow  # test_checkpoint.py damages checkpoints as a kill would, and the tests around it stop runs
def test_a_killed_run_goes_on_to_the_same_bits(config, tmp_path, monkeypatch):
    # The first state too is made as by that process, where other tests compile what makes it more quickly.
    monkeypatch.setattr(loop, "init_state", init_state)
    finished, killed = tmp_path / "finished", tmp_path / "killed"
    train(config, finished)
    # Many checkpoints, so that the kill may hit one half written.
    often = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_every=1, eval_every=3))
    killed.mkdir()
    configs.save(often, killed)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(killed)], cwd=ROOT)
    log = killed / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.wait()
    train(dataclasses.replace(often, train=config.train), killed)
    assert losses(killed) == losses(finished)
    model, expected = load_model(killed)[1], load_model(finished)[1]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))


@pytest.mark.parametrize("eval_every", [6, pytest.param(100, marks=pytest.mark.slow)], ids=["on the way", "at the end"])
def test_a_run_killed_during_validation_keeps_its_step_and_measures_when_it_goes_on(
    config, finished, tmp_path, monkeypatch, capsys, eval_every
):
    never_killed = finished
    if eval_every != config.train.eval_every:
        never_killed = tmp_path / "never_killed"
        train(changed(config, {"train.eval_every": eval_every}), never_killed)
    step = min(eval_every, config.train.steps)
    config = changed(config, {"train.eval_every": eval_every, "train.checkpoint_every": step})

    def die(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(loop.MetricWriter, "validation", die)
        train(config, tmp_path / "run")
    assert load_model(tmp_path / "run")[2] == step
    assert step not in validation_losses(tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", never_killed)
    capsys.readouterr()
    train(config, tmp_path / "run")
    assert "already finished at step 12" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", never_killed)


def test_a_validation_that_does_not_compile_ends_the_run_before_its_first_step(config, tmp_path, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(loop, "jit_validation", lambda *_: types.SimpleNamespace(lower=too_large))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        train(config, tmp_path)
    assert lines(tmp_path) == []


def test_a_finished_run_says_so_and_a_shorter_one_is_refused(config, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    train(config, finished)
    assert "already finished at step 12" in capsys.readouterr().out
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=10))
    shorter = dataclasses.replace(shorter, model=config.model.with_defaults())  # the same, written out
    with pytest.raises(ValueError, match="train.steps is 10, but .* step 12"):
        train(shorter, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_config_that_disagrees_is_refused_with_both_values(config, finished):
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoding="alibi"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5),
    )
    with pytest.raises(ValueError, match="encoding was 'nope', not 'alibi'; .*rate was 0.01, not 0.5"):
        train(other, finished)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, model_dim=32))
    with pytest.raises(ValueError, match=r"different config: model.model_dim was \d+, not 32; choose"):
        train(wider, finished)
    assert configs.load(finished) == config


MAY_CHANGE = {
    "model": "attention remat",
    # Where it lies: what it is may not.
    "data": "source validation_source split text_field dir tokenizer document_separator separator_token",
    "optimizer": "accumulation",
    "train": "steps log_every checkpoint_every keep keep_every keep_best eval_every eval_batches on_bad_step "
    "spike_factor max_skipped tensorboard wandb profile_steps",
    "mesh": "data fsdp tensor sequence rules",
    "eval": "documents batch_size stride seed entropy_unit dtype",
}
MUST_STAY = {
    "model": "vocab_size num_layers num_heads num_kv_heads head_dim model_dim mlp_dim mlp tie_embeddings encoding "
    "train_length dtype activation norm norm_eps norm_place block qk_norm biases attention_scale attention_softcap "
    "embedding_scale embedding_norm residual_scale logits_scale logits_softcap",
    "data": "weights context_length bos batch_size document_mask lengths scratchpad seed",
    "optimizer": "name learning_rate warmup_steps schedule floor decay_share b1 b2 momentum decay_rate eps "
    "weight_decay decay z_loss clip_norm",
    "train": "ema seed init_from init_step",
}


def test_of_every_field_it_is_decided_whether_a_run_may_change_it():
    may, must = (
        {f"{group}.{field}" for group, fields in which.items() for field in fields.split()}
        for which in (MAY_CHANGE, MUST_STAY)
    )
    assert not may & must
    assert may | must == set(configs.HINTS), "decide it here and in nope_jax.training.resume"
    assert may == resume.MAY_CHANGE


@pytest.fixture
def begun(finished, tmp_path) -> Path:
    """The run as it was after step 8, to go on with."""
    workdir = Path(shutil.copytree(finished, tmp_path / "begun"))
    shutil.rmtree(workdir / "checkpoints" / "12")
    return workdir


def contents(folder: Path) -> dict[Path, bytes]:
    """All that a refusal must leave as it is: the lock alone says who came."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def corpus_of(config: Config) -> Path:
    return Path(config.data.source.removeprefix("text:")).parent


def test_where_data_lie_and_how_often_to_log_may_change(config, finished, begun, tmp_path):
    moved = shutil.copytree(corpus_of(config), tmp_path / "moved")  # new names, new times
    others = {"data.source": f"text:{moved}", "data.dir": str(tmp_path), "train.log_every": 2, "train.keep": 1}
    train(changed(config, others), begun)
    assert losses(begun) == losses(finished)[:8] + losses(finished)[9::2]
    assert checkpoints(begun) == {"12"}


@pytest.mark.slow  # other tests hold these to the same numbers, and to the list of what may change
def test_what_leaves_the_trained_function_alone_may_change(config, finished, begun):
    others = {"optimizer.accumulation": 2, "model.remat": "full", "model.attention": "streaming"}
    train(changed(config, others), begun)
    np.testing.assert_allclose(losses(begun), losses(finished), rtol=1e-5)
    assert losses(begun) != losses(finished)  # it has taken the last steps itself


def test_other_documents_are_refused_and_nothing_is_touched(config, begun, tmp_path):
    corpus = Path(shutil.copytree(corpus_of(config), tmp_path / "corpus"))
    (corpus / "one more.txt").write_text("of the training split " * 100)
    other = changed(config, {"data.source": f"text:{corpus}"})
    before = contents(begun)
    with pytest.raises(ValueError, match=f"begun holds a run on other data: the train documents .*{corpus} are others"):
        train(other, begun)
    assert contents(begun) == before


def test_another_tokenizer_at_the_same_path_is_refused(config, tmp_path):
    def write_tokenizer(first: str) -> None:
        words = {word: i for i, word in enumerate([first, "</s>", "[UNK]"])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))

    write_tokenizer("aei")
    config = changed(config, {"data.tokenizer": str(tmp_path / "tokenizer.json"), "data.dir": str(tmp_path)})
    train(config, tmp_path / "run")
    write_tokenizer("oua")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="data: data.tokenizer .*tokenizer.json is another tokenizer"):
        train(config, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_run_of_an_earlier_version_is_held_to_the_data_of_today(config, begun, tmp_path, capsys):
    digests = begun / "data.json"
    digests.unlink()
    moved = shutil.copytree(corpus_of(config), tmp_path / "moved")
    with pytest.raises(ValueError, match=r"data.source was 'text:.*\.txt', not 'text:.*moved'"):
        train(changed(config, {"data.source": f"text:{moved}"}), begun)
    assert not digests.exists()
    train(config, begun)
    assert "does not say what its data were" in capsys.readouterr().err
    assert set(json.loads(digests.read_text())) == {"tokenizer", "train", "validation"}


def test_a_second_run_in_a_workdir_is_refused_and_a_killed_one_keeps_nobody_out(config, finished, begun):
    before = contents(begun)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(begun)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        try:
            whose = f"{begun} is being written by process {other.pid} on {socket.gethostname()}"
            with pytest.raises(ValueError, match=whose):
                train(config, begun)
            assert contents(begun) == before
        finally:
            other.kill()
    train(config, begun)
    assert_same_run(begun, finished)


HOLD = """
import sys, time
from pathlib import Path
from nope_jax.locks import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config, tmp_path, monkeypatch):
    batches = loop.train_batches

    def with_a_token_that_does_not_exist(*args, **hosts):
        for number, batch in enumerate(batches(*args, **hosts), 1):
            yield batch._replace(tokens=np.full_like(batch.tokens, 256)) if number == 6 else batch

    monkeypatch.setattr(loop, "train_batches", with_a_token_that_does_not_exist)
    with pytest.raises(FloatingPointError, match="at step 6; the checkpoint of step 4 is kept"):
        train(config, tmp_path)
    assert checkpoints(tmp_path) == {"4"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(load_model(tmp_path)[1])))


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
def test_no_number_of_a_step_may_be_infinite(config, name):
    sound = {"loss": 1.0, "grad_norm": 2.0, "param_norm": 3.0}
    assert reason_to_stop(sound, config.train) is None
    assert reason_to_stop(sound | {name: math.inf}, config.train) == f"{name} is inf"


def test_a_run_starts_from_the_weights_of_another_under_its_own_encoding(config, finished, tmp_path):
    settings = {"steps": 2, "init_from": str(finished)}
    dropped = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoding="log_n"),
        train=dataclasses.replace(config.train, **settings),
    )
    train(dropped, tmp_path / "run")
    # It goes on about where the other ended, 2 nats below where it began.
    assert abs(losses(tmp_path / "run")[0] - losses(finished)[-1]) < 0.5
    assert losses(finished)[0] - losses(tmp_path / "run")[0] > 1.5
    # What a kill during the first save leaves behind is no checkpoint: the weights come along all the same.
    (tmp_path / "killed" / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir(parents=True)
    train(dropped, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "run")
    wider = dataclasses.replace(dropped, model=dataclasses.replace(dropped.model, mlp_dim=48))
    with pytest.raises(ValueError, match="train.init_from .*: its model.mlp_dim is 32, not 48"):
        train(wider, tmp_path / "wider")
    assert not (tmp_path / "wider").exists()


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("mesh", "fsdp", 2, "fsdp 2 .* does not fit 1 device"),
        ("data", "context_length", 10**6, "data.context_length 1000000 needs"),
        ("model", "vocab_size", 100, "model.vocab_size 100 is smaller than the 256 tokens"),
        ("train", "init_from", "nowhere", "nowhere is not the workdir of a run"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(config, tmp_path, group, field, value, message):
    changed = dataclasses.replace(getattr(config, group), **{field: value})
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **{group: changed}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # test_optimizers.py has the gradient of two microbatches, and a resumed run below its losses
def test_accumulated_microbatches_make_the_update_of_the_whole_batch(config):
    optimizer = optax.sgd(1.0)
    graphdef, abstract = abstract_state(config, optimizer, make_mesh(config.mesh, jax.devices()[:1]))
    state = init_state(config, optimizer, abstract)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    results = []
    for accumulation in 1, 4:
        step = jax.jit(partial(train_step, graphdef=graphdef, optimizer=optimizer, accumulation=accumulation))
        results.append(step(state, batch))
    (whole, metrics), (accumulated, accumulated_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, accumulated.params)
    np.testing.assert_allclose(accumulated_metrics["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(accumulated_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-5)


def test_neither_step_nor_validation_holds_the_logits_of_a_batch(config, monkeypatch):
    """Rows come in microbatches, and of a microbatch the logits of a few tokens at a time."""
    config = changed(config, {"model.num_layers": 1, "model.vocab_size": 8192, "model.attention": "reference"})
    optimizer, rows = optax.scale_by_schedule(lambda count: -1.0), jax.ShapeDtypeStruct((64, 64), jnp.int32)
    graphdef, abstract = abstract_state(config, optimizer, make_mesh(config.mesh, jax.devices()[:1]))
    batch = Batch(rows, rows)

    def temporaries(accumulation: int) -> list[int]:
        step = jit_train_step(graphdef, optimizer, abstract, accumulation=accumulation).lower(abstract, batch, 0)
        validation = jit_validation(graphdef, accumulation).lower(abstract.params, batch)
        return [program.compile().memory_analysis().temp_size_in_bytes for program in (step, validation)]

    logits = 4 * 64 * 64 * 8192
    assert max(temporaries(accumulation=16)) < logits / 4
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", 8192 * 256)
    assert max(temporaries(accumulation=1)) < logits / 2


def test_validation_in_microbatches_is_that_of_the_whole_batch(config):
    graphdef, params = nnx.split(drawn_model(config.model))
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17), np.int32)
    whole, parts = (jit_validation(graphdef, n)(params, Batch(tokens[:, :-1], tokens[:, 1:])) for n in (1, 4))
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


def test_a_resumed_log_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, start=2)
    log.write(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


@pytest.mark.slow  # training_on_eight_devices.py has steps, validation and checkpoints of eight devices
def test_eight_devices_train_as_one(config, finished, tmp_path):
    spread = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    configs.save(spread, tmp_path)
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)
    # What eight devices saved goes on one.
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=13))
    train(longer, tmp_path)
    assert checkpoints(tmp_path) == {"12", "13"}


@pytest.mark.slow  # a run stopped within this process comes first, with the status that the command has
def test_the_command_saves_on_sigterm_and_ends_with_its_status(config, tmp_path):
    (tmp_path / "smoke.py").write_text(f"from nope_jax.config import *\n\n\ndef get_config():\n    return {config!r}\n")
    workdir = tmp_path / "run"
    command = [sys.executable, "train.py", "--config", str(tmp_path / "smoke.py"), "--workdir", str(workdir)]
    process = subprocess.Popen([*command, "--train.steps", "1000000"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    assert "SIGTERM: stopped at step" in process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert load_model(workdir)[2] == lines(workdir)[-1]["step"]
