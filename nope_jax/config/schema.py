"""The fields of a config: frozen dataclasses, each field written once, with its type, default and meaning."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from nope_jax.config.validation import check, unknown
from nope_jax.encodings import Encoding

EncodingSpec = str | Encoding | tuple[str | Encoding, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Everything that decides the shape of its parameters or what it computes."""

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads; must divide num_heads. None: as many as num_heads."""
    head_dim: int | None = None
    """None: model_dim / num_heads."""
    model_dim: int = 128
    mlp_dim: int | None = None
    """None: 4 model_dim when plain, 8/3 model_dim rounded up to a multiple of 64 when gated (as many parameters)."""
    mlp: Literal["gated", "plain"] = "gated"
    """gated: SwiGLU (Shazeer 2020); plain: GELU."""
    tie_embeddings: bool = False
    encoding: EncodingSpec = "nope"
    """A name in ENCODINGS, an Encoding, or a tuple of them that repeats over the layers."""
    train_length: int | None = None
    """The length the model is trained at: rows of a learned table, and the yardstick of evaluation.

    None: data.context_length."""
    attention: Literal["reference", "streaming"] | None = None
    """Which implementation of attention; None chooses by length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; parameters, softmax, entropies and losses are float32 always."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def mlp_size(self) -> int:
        """`mlp_dim`, or what None stands for."""
        gated = self.mlp == "gated"
        return self.mlp_dim or (-(-8 * self.model_dim // (3 * 64)) * 64 if gated else 4 * self.model_dim)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and how it is cut into rows."""

    source: str = "python_stdlib"
    """python_stdlib, text:PATH_OR_GLOB, tfds:NAME, or task:passkey."""
    dir: str | None = None
    """Where prepared datasets lie, on a disk. None: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or SentencePiece model."""
    document_separator: str | None = None
    """What lies between the documents of a file of text:, literally, as <|endoftext|>. None: each file is one."""
    context_length: int = 128
    """Tokens of a row: the training length."""
    batch_size: int = 32
    """Rows per optimizer step over all devices and hosts."""
    document_mask: bool = False
    """Keep tokens from attending to another document of their window; positions then restart with each document."""
    bos: bool = False
    """Begin every row with the tokenizer's beginning-of-sequence token, or its document separator if it has none.

    It is one of the row's tokens, and never predicted."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated, with linear warm-up and cosine decay to a tenth."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, Adam for the rest, weight decay as in adamw."""
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    accumulation: int = 1
    """Microbatches per step; must divide the batch of each device."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and what it does meanwhile."""

    steps: int = 500
    log_every: int = 10
    """In steps, as those that follow."""
    checkpoint_every: int = 250
    eval_every: int = 250
    """How often the validation loss is measured."""
    eval_batches: int = 4
    """Batches that the validation loss is the mean of."""
    seed: int = 0
    init_from: str | None = None
    """The workdir of a run whose weights training starts from, though its encoding may be another.

    What the encodings have learned comes along where a layer keeps its encoding, and starts anew elsewhere."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """When loss or gradient norm are not finite: stop the run, or leave parameters and optimizer as they were and go on
    with the next batch."""
    spike_factor: float | None = None
    """With on_bad_step skip: a gradient norm of more than so many times its running average is bad, too."""
    max_skipped: int = 10
    """With on_bad_step skip: more bad steps in a row than this stop the run."""
    tensorboard: bool = False
    """Write the metrics to WORKDIR/tensorboard as well (pip install tensorboardX)."""
    profile_steps: int = 0
    """Write a trace of so many steps, soon after the start, to WORKDIR/profile."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices. One may be -1, for what the others leave."""

    data: int = -1
    """Split the rows of a batch; each keeps all parameters. Where another axis is -1, too, this one is 1."""
    fsdp: int = 1
    """Split the rows, and parameters, gradients and optimizer state along model_dim."""
    tensor: int = 1
    """Split heads, feed-forward and vocabulary."""
    sequence: int = 1
    """Split the positions of every row; parameters and the rest as fsdp does."""
    rules: Literal["fsdp", "zero1"] = "fsdp"
    """How parameters lie between steps. fsdp: split, and gathered layer by layer, twice for every microbatch.

    zero1: whole along fsdp and sequence, and gathered once a step, where they fit; only gradients and optimizer state
    are split (Rajbhandari et al. 2020, arXiv 1910.02054)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What eval.py curves reads, and how. Other evaluations go by some of it and settings of their own."""

    documents: int = 64
    """At most so many validation documents per length."""
    batch_size: int = 8
    stride: int | None = None
    """None: each document from its start.

    A number: a window of the evaluated length slid by so many tokens, of which only the new ones count."""
    seed: int = 0
    entropy_unit: Literal["nats", "bits"] = "nats"
    """In which eval.py curves shows attention entropy; the files of numbers are in nats always."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All there is to say of a run: what config.json holds."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        check(self, HINTS)
        if self.model.train_length is None:
            model = dataclasses.replace(self.model, train_length=self.data.context_length)
            object.__setattr__(self, "model", model)


GROUPS: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(Config)}
HINTS = {
    f"{group}.{field}": hint for group, cls in GROUPS.items() for field, hint in typing.get_type_hints(cls).items()
}
"""The type of every field, by its dotted name."""


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values for some fields, given by their dotted names.

    Raises:
        ValueError: a field that does not exist, or a value that it cannot have.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in HINTS:
            raise unknown(name, HINTS)
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields) for group, fields in groups.items()}
    )
