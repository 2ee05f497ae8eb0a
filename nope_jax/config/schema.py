"""The config schema: frozen dataclasses that define each field once, with its type, default and meaning."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from nope_jax.config.choices import CHOICES
from nope_jax.config.validation import check, unknown
from nope_jax.encodings import Encoding

Step = int | Literal["newest", "best"]
"""A checkpoint of a run: its step, the newest, or the one with the lowest validation loss."""
Implementation = Literal["reference", "streaming", "pallas_tpu", "splash", "cudnn", "pallas_gpu"]

EncodingSpec = str | Encoding | tuple[str | Encoding, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder: every setting that determines its parameter shapes or its computation."""

    vocab_size: int | None = None
    """Number of tokens of the embedding. None: 256, or as many as data.tokenizer has if they are more."""
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Number of key/value heads; must divide num_heads. None: num_heads."""
    head_dim: int | None = None
    """Dimension of each head. None: model_dim / num_heads."""
    model_dim: int = 128
    mlp_dim: int | None = None
    """Hidden dimension of the MLP. None: 4 model_dim if plain.

    If gated: 8/3 model_dim, rounded up to a multiple of 64, for about as many parameters."""
    mlp: Literal["gated", "plain"] = "gated"
    """gated: down(activation(gate(x)) · up(x)), such as SwiGLU (Shazeer 2020); plain: down(activation(up(x)))."""
    tie_embeddings: bool = False
    encoding: EncodingSpec = "nope"
    """A name in ENCODINGS, an Encoding, or a tuple of these, cycled over the layers."""
    train_length: int | None = None
    """Training length: the rows of a learned position table, and the reference length of evaluation.

    None: data.context_length."""
    attention: Implementation | tuple[Implementation, ...] | None = None
    """Attention implementation, or several, of which the first that can serve a call does (docs/performance.md).

    None: chosen by platform and sequence length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype. Parameters, softmax, entropies and losses are always float32."""
    remat: Literal["none", "full", "dots", "offload"] | bool = "none"
    """What the backward pass recomputes of each layer. none: nothing; full: all of it, from its input.

    dots: all but the products with weights and the results of attention, which are kept (`jax.checkpoint`).
    offload: as dots, but what is kept, and the layer's input, moves to the host's memory. True is full, False none."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | None = None
    """Activation of the MLP; gelu is exact, gelu_tanh its approximation, relu2 the square of ReLU.

    None: silu if gated, gelu_tanh if plain."""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """Type of all norms. rms: RMSNorm; rms_plus_one: RMSNorm that multiplies by 1 + scale (Gemma); layer: LayerNorm."""
    norm_eps: float = 1e-6
    """Added to the variance or mean square in every norm."""
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    """Norm of a layer's two parts. pre: x + part(norm(x)); post: x + norm(part(x)) (OLMo 2).

    sandwich: x + norm(part(norm(x))) (Gemma 2)."""
    block: Literal["sequential", "parallel", "parallel_shared_norm"] = "sequential"
    """sequential: the MLP reads what attention has added; parallel: both read the layer's input (GPT-NeoX).

    parallel_shared_norm: both read it through one norm (GPT-J, PaLM)."""
    qk_norm: Literal["head", "all"] | None = None
    """Norm of queries and keys, before the encoding. head: of each head, one scale for all heads (Qwen 3).

    all: of all heads together (OLMo 2)."""
    biases: tuple[Literal["qkv", "out", "mlp", "norm", "head"], ...] = ()
    """What has a bias: projections to queries, keys and values, attention's output, MLP, norms, logits."""
    attention_scale: float | None = None
    """Factor of q·k. None: 1/√head_dim."""
    attention_softcap: float | None = None
    """Cap of the scaled content logits, cap · tanh(logit / cap) (Gemma 2). None: no cap."""
    embedding_scale: float | None = None
    """Factor of the token embeddings. None: √model_dim."""
    embedding_norm: bool = False
    """Norm of the token embeddings (BLOOM)."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the residual stream (Granite)."""
    logits_scale: float = 1.0
    """Factor of the logits of the head (Granite, Cohere)."""
    logits_softcap: float | None = None
    """Cap of the logits of the head, after logits_scale, as attention_softcap (Gemma 2). None: no cap."""

    def __post_init__(self):
        if isinstance(self.remat, bool):  # until November 2026
            object.__setattr__(self, "remat", "full" if self.remat else "none")

    @property
    def num_tokens(self) -> int:
        """`vocab_size`, or its default for a model without data if it is None."""
        return self.vocab_size or 256

    @property
    def mlp_size(self) -> int:
        """`mlp_dim`, or its default if it is None."""
        gated = self.mlp == "gated"
        return self.mlp_dim or (-(-8 * self.model_dim // (3 * 64)) * 64 if gated else 4 * self.model_dim)

    def with_defaults(self) -> "ModelConfig":
        """The same decoder, with the defaults of its shape and computation written out, and biases in order."""
        head_dim = self.head_dim or self.model_dim // self.num_heads
        return dataclasses.replace(
            self,
            vocab_size=self.num_tokens,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=head_dim,
            mlp_dim=self.mlp_size,
            activation=self.activation or ("silu" if self.mlp == "gated" else "gelu_tanh"),
            attention_scale=head_dim**-0.5 if self.attention_scale is None else self.attention_scale,
            embedding_scale=self.model_dim**0.5 if self.embedding_scale is None else self.embedding_scale,
            biases=tuple(sorted(self.biases)),
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset of a run, and how it is split into rows."""

    source: str | tuple[str, ...] = "python_stdlib"
    """Corpus, or several. Each is python_stdlib, text:PATH_OR_GLOB, jsonl:PATH_OR_GLOB, parquet:PATH_OR_GLOB,
    hf:NAME_OR_FOLDER, tfds:NAME, or task:NAME."""
    dir: str | None = None
    """Directory of prepared datasets, on a local disk. None: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    tokenizer: str = "bytes"
    """bytes, task:NAME (the words of a task), or a path: a tokenizer.json, SentencePiece model, GGUF file, or the
    folder of a Hugging Face model."""
    document_separator: str | None = None
    """String between the documents of a text: file, literally, such as <|endoftext|>. None: one document per file.

    The token that follows each document is another matter: data.separator_token."""
    context_length: int = 128
    """Tokens per row: the training length."""
    batch_size: int = 32
    """Rows per optimizer step, over all devices and hosts."""
    document_mask: bool = False
    """Mask attention between different documents in a row; positions then restart at each document.

    Examples of a task are then packed into rows; without it, each has its own row."""
    bos: bool = False
    """Start every row with the tokenizer's beginning-of-sequence token, or its document separator if it has none.

    The token counts towards context_length and is never a prediction target."""
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    """Shortest and longest training example of a task: source. None: the lengths of the paper."""
    scratchpad: Literal[
        "none", "full", "no_input", "no_computation", "no_output", "no_variables", "no_remaining", "minimal"
    ] = "none"
    """Parts of a scratchpad that a task: source writes before its answer; minimal: computation and output."""
    weights: tuple[float, ...] | None = None
    """Share of each of several sources in the rows; they sum to 1. None: the shares of their sizes."""
    validation_source: str | None = None
    """Corpus for validation, a source as above, read whole; data.source is then trained on as a whole.

    None: a part of data.source."""
    split: float | str | None = None
    """What is validation: a share of the documents, such as 0.05, or the name of a split of the dataset, such as test.

    None: the dataset's split `validation` or, without one, a tenth of the documents."""
    text_field: str | tuple[str, ...] = "text"
    """Field of a row that holds its text: of JSON lines, Parquet, Hugging Face datasets, or TFDS.

    Of several names, the first that there is, for sources that call it differently."""
    separator_token: str | None = None
    """Token that a row has after each document, such as <|im_end|>. None: the tokenizer's own."""

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def text_fields(self) -> tuple[str, ...]:
        """`text_field` as a tuple."""
        return (self.text_field,) if isinstance(self.text_field, str) else self.text_field


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Settings that are None have the default of the chosen optimizer or schedule. One that it does not have is refused.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, Adam for the rest; weight decay is decoupled in all of them."""
    learning_rate: float = 1e-3
    """At the peak, which follows the warm-up."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly."""
    b1: float | None = None
    """Decay rate of the first moment, in muon of the rest. None: 0.9; in adafactor 0, which keeps none."""
    b2: float | None = None
    """Decay rate of the second moment, in lion of the momentum (adamw, lion, muon). None: 0.95; in lion 0.99."""
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Maximum global gradient norm; larger gradients are clipped."""
    accumulation: int = 1
    """Microbatches per step (gradient accumulation); must divide the batch of each device."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. wsd: constant, then linear over the last steps (warm-up, stable, decay)."""
    floor: float | None = None
    """Learning rate at the end, as a fraction of its peak (cosine, linear, wsd). None: 0.1."""
    decay_share: float | None = None
    """Fraction of the steps over which wsd decays. None: 0.2."""
    momentum: float | None = None
    """Decay rate of the matrices' momentum (muon). None: 0.95."""
    decay_rate: float | None = None
    """The second moment decays by 1 - t^-decay_rate in step t (adafactor). None: 0.8."""
    eps: float | None = None
    """Added to the root of the second moment (adamw, muon), or to squared gradients (adafactor).

    None: 1e-8; in adafactor 1e-30."""
    decay: Literal["matrices", "no_embedding", "all"] = "matrices"
    """What decays. matrices: weight matrices, token embedding and head; no_embedding: without the token embedding.

    all: norms, biases and parameters of the encoding too."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normalizer, added to the loss (Chowdhery et al. 2022); 0: none.

    Logged losses are without it."""

    def settings(self, choice: str) -> dict[str, float]:
        """The settings of what a field chooses, with its defaults for those that are None."""
        defaults = CHOICES[choice][getattr(self, choice)]
        given = {name: getattr(self, name) for name in defaults}
        return {name: default if given[name] is None else given[name] for name, default in defaults.items()}

    def with_defaults(self) -> "OptimizerConfig":
        """The same optimizer, with the defaults of its settings written out."""
        settings: dict[str, Any] = {}
        for choice in CHOICES:
            settings |= self.settings(choice)
        return dataclasses.replace(self, **settings)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop: its length, logging, checkpoints and error handling."""

    steps: int = 500
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    eval_every: int = 250
    """Steps between measurements of the validation loss."""
    eval_batches: int = 4
    """Number of batches over which the validation loss is averaged."""
    seed: int = 0
    init_from: str | None = None
    """Workdir of a run, or hf:NAME_OR_FOLDER or gguf:FILE, whose weights initialize training.

    Its encoding may be a different one.
    Learned encoding parameters are kept in layers that keep their encoding, and reinitialized in all others."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """If loss or gradient norm is not finite: stop the run, or skip the update and go on with the next batch."""
    spike_factor: float | None = None
    """With on_bad_step skip: a gradient norm above this factor times its running average is also bad."""
    max_skipped: int = 10
    """With on_bad_step skip: the maximum number of consecutive bad steps; one more stops the run."""
    tensorboard: bool = False
    """Also write the metrics to WORKDIR/tensorboard (pip install tensorboardX)."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases (pip install wandb), to the project in $WANDB_PROJECT."""
    profile_steps: int = 0
    """Profile this many steps, soon after the start, and write the trace to WORKDIR/profile."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep the checkpoints of steps that are multiples of this, a multiple of checkpoint_every."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest validation losses."""
    ema: float | None = None
    """Decay rate of an exponential moving average of the weights, which validation, evaluation and export then use."""
    init_step: Step = "newest"
    """The checkpoint of the run in init_from: its step, newest, or best (lowest validation loss)."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; the product must be the number of devices. One axis may be -1: the remaining devices."""

    data: int = -1
    """Shard the rows of a batch and replicate the parameters. If another axis is also -1, this one is 1."""
    fsdp: int = 1
    """Shard the rows; shard parameters, gradients and optimizer state along model_dim."""
    tensor: int = 1
    """Shard heads, feed-forward dimension and vocabulary."""
    sequence: int = 1
    """Shard the positions of every row; parameters, gradients and optimizer state as for fsdp."""
    rules: Literal["fsdp", "zero1"] = "fsdp"
    """Sharding of the parameters between steps. fsdp: sharded, and gathered layer by layer, twice per microbatch.

    zero1: replicated along fsdp and sequence, and gathered once per step, if they fit in memory; only gradients and
    optimizer state are sharded (Rajbhandari et al. 2020, arXiv 1910.02054)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings of eval.py curves. Other evaluations use some of these and their own settings."""

    documents: int = 64
    """Maximum number of validation documents per length."""
    batch_size: int = 8
    stride: int | None = None
    """None: evaluate each document from its start.

    A number: slide a window of the evaluated length by this many tokens, and count only the new tokens."""
    seed: int = 0
    entropy_unit: Literal["nats", "bits"] = "nats"
    """Unit of attention entropy in the output of eval.py curves; the data files are always in nats."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of parameters and computation; losses, softmax and entropies are always float32.

    None: float32 parameters, and the computation in model.dtype for a run, in float32 for a published model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The complete config of a run: the contents of config.json."""

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
        if self.model.vocab_size is None and self.data.tokenizer == "bytes":  # for others it takes their file
            object.__setattr__(self, "model", dataclasses.replace(self.model, vocab_size=self.model.num_tokens))


GROUPS: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(Config)}
HINTS = {
    f"{group}.{field}": hint for group, cls in GROUPS.items() for field, hint in typing.get_type_hints(cls).items()
}
"""The type of every field by its dotted name."""


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of the config with new values for some fields, given by their dotted names.

    Raises:
        ValueError: a field does not exist, or its value is invalid.
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
