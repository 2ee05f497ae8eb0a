"""A config on disk: what is written comes back, and what cannot be read is refused."""

import dataclasses
import json
import operator
from pathlib import Path

import pytest

from nope_jax import config as configs
from nope_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from nope_jax.encodings import (
    ENCODINGS,
    SCHEDULES,
    ALiBi,
    Encoding,
    HeadScale,
    LinearScaling,
    Llama4Scale,
    LongRoPEScaling,
    NoPE,
    RoPE,
    Windowed,
)


@dataclasses.dataclass(frozen=True)
class Mine(Encoding):
    """An encoding that the registry does not know."""

    slopes: tuple[float, ...] = (0.5, 0.25)
    inner: Encoding | None = None


def every_field_changed() -> Config:
    sizes = 300, 6, 6, 2, 24, 96, 100
    shape = "relu", "layer", 1e-5, "post", "parallel", "all", ("qkv", "head")
    scales = 0.1, 50.0, 2.0, True, 0.5, 0.25, 30.0
    return Config(
        ModelConfig(*sizes, "plain", True, "rope", 77, "reference", "bfloat16", True, *shape, *scales),
        DataConfig("text:a", "dir", "tokenizer.json", "<|endoftext|>", 64, 12, True, True, 1),
        OptimizerConfig("muon", 0.1 + 0.2, 1, 0.5, 0.6, 0.0, 0.3, 4, "wsd", 0.0, 0.5, 0.9, None, 1e-6, "all", 1e-4),
        TrainConfig(1, 2, 3, 4, 5, 6, "runs/other", "skip", 3.0, 4, True, True, 1, 3, 6, 0, 0.99, "best"),
        MeshConfig(2, -1, 3, 4, "zero1"),
        EvalConfig(1, 2, 3, 4, "bits", "bfloat16"),
    )


def fields_of_a_task() -> Config:
    """Fields that do not go with those of the other, such as those of tasks with a text."""
    mixture = {"weights": (0.25, 0.75), "validation_source": "hf:b", "split": "test", "text_field": "body"}
    return Config(
        data=DataConfig(
            ("task:parity", "jsonl:a"), lengths=(2, 5), scratchpad="minimal", separator_token=".", **mixture
        ),
        optimizer=OptimizerConfig("adafactor", decay_rate=0.7),
        train=TrainConfig(keep_best=2),
    )


@pytest.mark.parametrize(
    "config",
    [Config(), every_field_changed(), fields_of_a_task()]
    + [
        Config(model=ModelConfig(encoding=encoding))
        for encoding in [
            ("rope", "rope", "rope", "nope"),
            ALiBi(),
            RoPE(base=1e6, scaling=LinearScaling(4.0)),
            (RoPE(base=1 / 3), "nope", Mine()),
            Mine(slopes=(1e-300,), inner=Mine(inner=RoPE(scaling=LinearScaling(2.0)))),
        ]
    ],
    ids=lambda config: str(config.model.encoding)[:40],
)
def test_json_round_trip_is_exact(config, tmp_path):
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config
    assert {path.name for path in tmp_path.iterdir()} - {"code"} == {"config.json"}
    assert (tmp_path / "code").exists() == ("Mine" in str(config.model.encoding))


def test_every_field_changed_is_what_it_says():
    before, *after = Config(), every_field_changed(), fields_of_a_task()
    for name in configs.HINTS:
        value = operator.attrgetter(name)
        assert any(value(before) != value(config) for config in after), name


def test_encodings_are_written_by_name(tmp_path):
    encoding = (RoPE(base=5.0, scaling=LinearScaling(4.0)), Mine())
    configs.save(Config(model=ModelConfig(encoding=encoding)), tmp_path)
    rope, mine = json.loads((tmp_path / "config.json").read_text())["model"]["encoding"]
    assert rope["class"] == "rope" and rope["base"] == 5.0
    assert rope["scaling"] == {"class": "nope_jax.encodings:LinearScaling", "factor": 4.0}
    assert mine == {"class": "code/test_files.py:Mine", "slopes": [0.5, 0.25], "inner": None}
    assert (tmp_path / "code" / "test_files.py").read_bytes() == Path(__file__).read_bytes()


WRAPPED = HeadScale(Windowed(RoPE(scaling=LongRoPEScaling((1.0, 2.0), (3.0, 4.0), 64, factor=4.0)), window=32))


@pytest.mark.parametrize("encoding", [*(cls() for cls in ENCODINGS.values()), *SCHEDULES.values(), WRAPPED], ids=str)
def test_every_encoding_comes_back_as_it_was(encoding, tmp_path):
    config = Config(model=ModelConfig(encoding=encoding))
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config


def test_what_was_written_with_former_names_is_read(tmp_path):
    wrapped = {"class": "llama4_temperature", "encoding": {"class": "nope"}}
    groups = {
        "model": {"num_layers": 3, "encoding": ["swan_temperature:rope", wrapped], "remat": True},
        "train": {"start_from": "llama"},
    }
    (tmp_path / "config.json").write_text(json.dumps(groups))
    config = configs.load(tmp_path)
    assert config.model.encoding == ("swan_scale:rope", Llama4Scale(NoPE())) and config.train.init_from == "llama"
    assert config.model.remat == "full" and configs.override(config, {"model.remat": False}).model.remat == "none"


def test_save_refuses_what_it_could_not_read_again(tmp_path):
    with pytest.raises(ValueError, match="model.encoding: a set cannot be saved"):
        configs.save(Config(model=ModelConfig(encoding=Mine(slopes={1.0}))), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"model": {"encodng": "nope"}}', "config.json: unknown field model.encodng: did you mean model.encoding?"),
        ('{"modle": {"dtype": "float32"}}', "unknown field modle.dtype: did you mean model.dtype?"),
        ('{"train": {"steps": "5"}}', "train.steps must be an integer, not '5'"),
        ('{"train": 5}', "must be an object of objects"),
        ('{"train": ', "config.json is not JSON: Expecting value"),
        ('{"model": {"encoding": {"class": "code/no.py:Nothing"}}}', "cannot make the class 'code/no.py:Nothing'"),
        (
            '{"model": {"encoding": {"class": "nope_jax.encodings:No"}}}',
            "cannot make the class 'nope_jax.encodings:No'",
        ),
        ('{"model": {"encoding": {"class": "nope_jax.cli:run"}}}', "'nope_jax.cli:run': it is not a dataclass"),
        ('{"model": {"encoding": {"class": "rope", "bass": 1}}}', "cannot make the class 'rope'.*bass"),
        ('{"model": {"encoding": {"base": 1}}}', "cannot make the class None"),
    ],
)
def test_load_refuses(text, complaint, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        configs.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_of_no_workdir(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not the workdir of a run: it has no config.json"):
        configs.load(tmp_path / "nowhere")
