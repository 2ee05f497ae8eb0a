"""One attention function per encoding, for use in any model: `<name>_attention(query, key, value, ...)`.

Each takes the encoding's own parameters and every keyword of `dot_product_attention`, returns the same results, and can
be passed as `attention_fn` to Flax's attention modules. To add one, write a function that returns its encoding and
parameters for validated queries, keys and values; `_attention_function` turns it into the public function.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from nope_jax.attention.dot_product import check_arrays, dot_product_attention
from nope_jax.attention.encoded import Encoded, attend_encoded
from nope_jax.attention.flax_layer import for_flax_layers
from nope_jax.attention.mask_spec import per_token
from nope_jax.attention.mesh import with_auto_axes
from nope_jax.encodings import (
    FIRE,
    KERPLE,
    NEZHA,
    T5,
    TUPE,
    ALiBi,
    CoPE,
    DeBERTa,
    Encoding,
    Forgetting,
    NoPE,
    Params,
    RoPE,
    RotaryScaling,
    RunningSum,
    Shaw,
    TransformerXL,
    XPos,
    forget_sums,
)
from nope_jax.encodings.checks import as_array, known_values
from nope_jax.encodings.encoding import Logit
from nope_jax.jax_settings import with_implicit_promotion


@dataclasses.dataclass(frozen=True)
class _Bias(Encoding):
    """An encoding's bias as a function of its actual parameters, where the encoding learns them in another form."""

    of: KERPLE | FIRE

    def logit(self, params: Params, query, key, query_features=None, key_features=None) -> Logit:
        return self.of.bias(**params)


_ARRAYS = """\
    query: Queries [B, T, N, H], as projected; the encoding is applied to them here.
    key: Keys [B, S, K, H], likewise.
    value: Values [B, S, K, H2].
"""
_COMMON = """\
    **common: Keywords of `dot_product_attention`, which documents the results and errors.
"""


def _attention_function(encoded: Callable[..., Encoded]) -> Callable[..., Any]:
    """Make `<name>_attention` from a function (query, key, value, *, parameters) that returns an `Encoded`.

    The result validates the arrays first, also takes the keywords of `dot_product_attention` (`encoded` may name some
    of them), and documents both.
    """
    signature, common = inspect.signature(encoded), inspect.signature(dot_product_attention).parameters
    own = [name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(encoded)
    def attention(query, key, value, **keywords):
        check_arrays(query, key, value)
        mine = {name: keywords[name] for name in own if name in keywords}
        rest = {name: x for name, x in keywords.items() if name not in mine or name in common}
        return attend_encoded(encoded(query, key, value, **mine), query, key, value, **rest)

    parameters = [*signature.parameters.values(), inspect.Parameter("common", inspect.Parameter.VAR_KEYWORD)]
    attention.__signature__ = signature.replace(parameters=parameters, return_annotation=Any)  # type: ignore[attr-defined]
    text, _, references = inspect.cleandoc(encoded.__doc__ or "").partition("References:")
    summary, _, own_args = text.partition("Args:\n")
    own_args = own_args.strip("\n") + "\n" if own_args else ""
    attention.__doc__ = f"{summary}Args:\n{_ARRAYS}{own_args}{_COMMON}\nReferences:{references}"
    return with_implicit_promotion(with_auto_axes(for_flax_layers(attention, common=dot_product_attention)))


@_attention_function
def nope_attention(query, key, value) -> Encoded:
    """Attention without positional encoding: softmax(q·k/√H) under the causal mask.

    References:
        Kazemnejad et al. 2023, arXiv 2305.19466.
    """
    return Encoded(NoPE(), {})


@_attention_function
def rope_attention(
    query,
    key,
    value,
    *,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: RotaryScaling | None = None,
) -> Encoded:
    """Attention with rotary position embedding: queries and keys are rotated by angles proportional to position.

    Args:
        base: Wavelengths grow from 2π to base·2π.
        rotary_dim: Number of leading dimensions to rotate, an even number up to H; None for all.
        interleaved: Pair neighbouring dimensions (GPT-J, the paper) instead of halves (Llama, GPT-NeoX).
        scaling: Rescales the frequencies for lengths past the training length.

    References:
        Su et al. 2021, arXiv 2104.09864.
    """
    return Encoded(RoPE(base=base, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling), {})


@_attention_function
def alibi_attention(query, key, value, *, slopes: Float[ArrayLike, "N"] | None = None) -> Encoded:
    """Attention with linear biases: softmax(q·k/√H - slope · distance); the bias is not divided by √H.

    Args:
        slopes: One per query head; None for `nope_jax.encodings.alibi_slopes(N)`.

    References:
        Press et al. 2022, arXiv 2108.12409.
    """
    if slopes is not None:
        slopes = as_array("slopes", slopes)
        if slopes.shape != (query.shape[2],):
            raise ValueError(f"slopes must have shape [{query.shape[2]}], one per query head, not {list(slopes.shape)}")
    return Encoded(ALiBi(), {} if slopes is None else {"slopes": slopes})


@_attention_function
def t5_attention(
    query,
    key,
    value,
    *,
    table: Float[ArrayLike, "num_buckets N"],
    max_distance: int = 128,
    bidirectional: bool = False,
    scaled: bool = True,
) -> Encoded:
    """Attention with T5's learned bias: softmax(q·k/√H + table[bucket(distance), head]).

    Args:
        table: The bias of each bucket and query head; its gradient is exact in all implementations.
        max_distance: The distance at and beyond which all keys share the last bucket.
        bidirectional: Use half of the buckets for keys after the query, as in an encoder.
        scaled: Whether to divide q·k by √H; T5's own weights were trained without this division.

    References:
        Raffel et al. 2020, arXiv 1910.10683.
    """
    table = as_array("table", table)
    if table.ndim != 2 or table.shape[1] != query.shape[2]:
        raise ValueError(f"table must have shape [num_buckets, {query.shape[2]}], not {list(table.shape)}")
    encoding = T5(table.shape[0], max_distance=max_distance, bidirectional=bidirectional, scaled=scaled)
    return Encoded(encoding, {"table": table})


@_attention_function
def xpos_attention(
    query,
    key,
    value,
    *,
    base: float = 10_000.0,
    scale_base: float = 512.0,
    interleaved: bool = True,
    query_positions=None,
    key_positions=None,
) -> Encoded:
    """Attention with xPos: RoPE with pairs of dimensions that decay with distance, fast pairs most.

    Positions that differ by `XPos.max_length()` or more raise a ValueError, or give NaN if they are traced under jit.

    Args:
        base: Wavelengths grow from 2π to base·2π.
        scale_base: The distance, in positions, over which the first pair decays to 0.4/1.4.
        interleaved: Pair neighbouring dimensions (as in the authors' code) instead of halves (as in Llama).

    References:
        Sun et al. 2022, arXiv 2212.10554.
    """
    encoding = XPos(base=base, scale_base=scale_base, interleaved=interleaved)
    span = _span(query, key, query_positions, key_positions)
    if span is not None and span >= encoding.max_length():
        raise ValueError(
            f"positions must differ by less than {encoding.max_length()}, the limit of xPos in float32 at "
            f"scale_base {scale_base}, not by {span}"
        )
    return Encoded(encoding, {})


def _span(query, key, query_positions, key_positions) -> int | None:
    """The largest difference of two positions in one row; None if there are no positions, or if their values are not
    available: under jit, or on other hosts.
    """
    (batch, length), total = query.shape[:2], key.shape[1]
    rows = []
    for name, positions, size, default in (
        ("query_positions", query_positions, length, np.arange(total - length, total)),
        ("key_positions", key_positions, total, np.arange(total)),
    ):
        if isinstance(positions, jax.core.Tracer) or not getattr(positions, "is_fully_addressable", True):
            return None
        per_token(name, positions, batch, size)  # checks the shape
        if not size:
            return None
        rows.append(np.atleast_2d(default if positions is None else np.asarray(positions)))
    least, most = (f(*(f.reduce(x, axis=-1) for x in rows)) for f in (np.minimum, np.maximum))
    return int((most - least).max())


@_attention_function
def kerple_attention(
    query, key, value, *, r1: Float[ArrayLike, "N"], r2: Float[ArrayLike, "N"], variant: Literal["log", "power"] = "log"
) -> Encoded:
    """Attention with KERPLE's biases: softmax(q·k/√H - r1·log(1 + r2·distance)), or - r1·distance^r2.

    Args:
        r1: One per query head, positive.
        r2: One per query head, positive; as a power, at most 2 in the paper.
        variant: "log" or "power".

    References:
        Chi et al. 2022, arXiv 2205.09921.
    """
    r1, r2 = (_shaped(name, x, (query.shape[2],)) for name, x in (("r1", r1), ("r2", r2)))
    known_values("positive", lambda x: x > 0, r1=r1, r2=r2)
    return Encoded(_Bias(KERPLE(variant)), {"r1": r1, "r2": r2})


@_attention_function
def fire_attention(
    query,
    key,
    value,
    *,
    hidden_weights: Float[ArrayLike, "W"],
    hidden_bias: Float[ArrayLike, "W"],
    weights: Float[ArrayLike, "W N"],
    bias: Float[ArrayLike, "N"] | None = None,
    c: Float[ArrayLike, ""] | float = 0.1,
    threshold: Float[ArrayLike, ""] | float = 512.0,
) -> Encoded:
    """Attention with FIRE's biases: softmax(q·k/√H + MLP(log(c·distance + 1) / log(c·max(i, L) + 1))).

    The MLP is ReLU(x·hidden_weights + hidden_bias) · weights + bias; i is the query's position.

    Args:
        hidden_weights: Weights from the distance to the W hidden units.
        hidden_bias: Bias of the hidden units.
        weights: Weights from the hidden units to the query heads.
        bias: Bias of the query heads, to which the softmax is invariant; None omits it.
        c: Curvature of the logarithm, positive.
        threshold: L, in positions, positive.

    References:
        Li et al. 2024, arXiv 2310.04418.
    """
    heads = query.shape[2]
    c, threshold = _shaped("c", c, ()), _shaped("threshold", threshold, ())
    known_values("positive", lambda x: x > 0, c=c, threshold=threshold)
    hidden_weights = as_array("hidden_weights", hidden_weights)
    width = hidden_weights.shape[0] if hidden_weights.ndim == 1 else "W"
    params = {
        "hidden_weights": _shaped("hidden_weights", hidden_weights, (width,)),
        "hidden_bias": _shaped("hidden_bias", hidden_bias, (width,)),
        "weights": _shaped("weights", weights, (width, heads)),
        "bias": jnp.zeros(heads) if bias is None else _shaped("bias", bias, (heads,)),
        "c": c,
        "threshold": threshold,
    }
    return Encoded(_Bias(FIRE()), params)


@_attention_function
def cope_attention(
    query, key, value, *, embeddings: Float[ArrayLike, "P H"] | Float[ArrayLike, "N P H"], scaled: bool = False
) -> Encoded:
    """Attention with contextual positions: softmax(q·k/√H + q·e[p]), p the sum of σ(q·k/√H) from the key on.

    Only visible keys count. A logit scale multiplies the queries wherever they occur.

    Args:
        embeddings: Embeddings of the positions 0 to P - 1, shared by all heads or per query head; p is clipped to
            P - 1.
        scaled: Whether to divide q·e by √H as well.

    References:
        Golovneva et al. 2024, arXiv 2405.18719.
    """
    embeddings = as_array("embeddings", embeddings)
    heads, head_dim = query.shape[2:]
    positions = embeddings.shape[-2] if embeddings.ndim > 1 else "P"
    wanted = (positions, head_dim) if embeddings.ndim < 3 else (heads, positions, head_dim)
    _shaped("embeddings", embeddings, wanted)
    return Encoded(CoPE(embeddings.shape[-2], scaled=scaled), {"embeddings": embeddings})


@_attention_function
def forgetting_attention(
    query, key, value, *, log_forget: Float[ArrayLike, "#B S N"], query_start: Int[ArrayLike, ""] | None = None
) -> Encoded:
    """Attention with forget gates: softmax(q·k/√H + the sum of log_forget over the tokens after the key).

    Args:
        log_forget: Logarithm of each gate, one per key and query head, at most 0: log σ(w·x + b) in the paper; -inf
            forgets all tokens before. The sum for a key excludes the gate of the key's own token and includes that of
            the query's.
        query_start: Index of the key at the first query's token; the queries are T consecutive tokens of the keys.
            Default: the last T keys. For a partially filled cache, pass it together with query_positions.

    References:
        Lin et al. 2025, arXiv 2503.02130.
    """
    length, total = query.shape[1], key.shape[1]
    if length > total:
        raise ValueError(f"query must have at most as many tokens as key, {total}, not {length}")
    log_forget = as_array("log_forget", log_forget)
    known_values("at most 0, logarithms of gates", lambda x: x <= 0, log_forget=log_forget)
    batch = key.shape[0] if log_forget.shape[:1] != (1,) else 1
    sums = forget_sums(_shaped("log_forget", log_forget, (batch, total, query.shape[2])))
    start = total - length if query_start is None else query_start
    last = RunningSum(*(jax.lax.dynamic_slice_in_dim(part, start, length, axis=1) for part in sums))
    return Encoded(Forgetting(), {}, last, sums)


def _shaped(name: str, x, shape: tuple[int | str, ...]) -> Array:
    """Convert to an array and check its shape, naming it in the error; a string stands for any size."""
    x = as_array(name, x)
    if x.ndim != len(shape) or any(isinstance(n, int) and n != size for n, size in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], not {list(x.shape)}")
    return x


@_attention_function
def shaw_attention(
    query, key, value, *, key_table: Float[ArrayLike, "rows H"], value_table: Float[ArrayLike, "rows H2"]
) -> Encoded:
    """Attention with learned relative vectors: softmax(q·(k + key_table[c])/√H) · (v + value_table[c]).

    A logit scale multiplies q·key_table as well.

    Args:
        key_table: Row clip + c is added to keys c positions after the query, with c clipped to -clip <= c <= clip.
        value_table: The same for values.

    References:
        Shaw et al. 2018, arXiv 1803.02155.
    """
    key_table = _shaped("key_table", key_table, ("2·clip + 1", query.shape[3]))
    rows = len(key_table)
    if rows < 3 or rows % 2 == 0:
        raise ValueError(f"key_table must have an odd number of rows, 3 or more (2·clip + 1), not {rows}")
    params = {"keys": key_table, "values": _shaped("value_table", value_table, (rows, value.shape[3]))}
    return Encoded(Shaw(clip=rows // 2), params)


@_attention_function
def nezha_attention(query, key, value, *, clip: int = 64) -> Encoded:
    """Attention with the sinusoids of j - i, clipped to ±clip, added to keys and values.

    Args:
        clip: The distance at and beyond which all keys share one vector.

    References:
        Wei et al. 2019, arXiv 1909.00204.
    """
    if query.shape[3] % 2 or value.shape[3] != query.shape[3]:
        raise ValueError(f"value must have the head dim of query, an even one: {value.shape[3]} and {query.shape[3]}")
    return Encoded(NEZHA(clip=clip), {})


@_attention_function
def transformer_xl_attention(
    query,
    key,
    value,
    *,
    content_bias: Float[ArrayLike, "N H"],
    position_bias: Float[ArrayLike, "N H"],
    position_kernel: Float[ArrayLike, "D N H"],
) -> Encoded:
    """Attention of Transformer-XL and XLNet: softmax(((q+u)·k + (q+v)·W r)/√H), r the sinusoids of the distance.

    Pass queries without u and v. A logit scale multiplies the whole logit.

    Args:
        content_bias: u.
        position_bias: v.
        position_kernel: W; D is even, and r has D/2 sines followed by D/2 cosines.

    References:
        Dai et al. 2019, arXiv 1901.02860; Yang et al. 2019, arXiv 1906.08237.
    """
    heads = query.shape[2:]
    params = {
        "content_bias": _shaped("content_bias", content_bias, heads),
        "position_bias": _shaped("position_bias", position_bias, heads),
        "position_kernel": _shaped("position_kernel", position_kernel, ("D", *heads)),
    }
    width = len(params["position_kernel"])
    if width < 2 or width % 2:
        raise ValueError(f"position_kernel must have a positive even number of rows (sines, cosines), not {width}")
    return Encoded(TransformerXL(), params)


@_attention_function
def tupe_attention(
    query,
    key,
    value,
    *,
    positions: Float[ArrayLike, "length D"],
    query_kernel: Float[ArrayLike, "D N H"],
    key_kernel: Float[ArrayLike, "D K H"],
    scale: Float[ArrayLike, "D"] | None = None,
    shift: Float[ArrayLike, "D"] | None = None,
    table: Float[ArrayLike, "num_buckets N"] | None = None,
    max_distance: int = 128,
    bidirectional: bool = False,
    query_positions=None,
    key_positions=None,
    is_causal: bool = True,
) -> Encoded:
    """Attention with untied positions: softmax(q·k/√(2H) + (p_i U)·(p_j V)/√(2H) + table[bucket(distance), head]).

    A logit scale multiplies both products, but not the table.

    Args:
        positions: One vector per position, normalized to p; positions past the last row give NaN.
        query_kernel: U.
        key_kernel: V.
        scale: Scale of the normalization; None for ones.
        shift: Shift of the normalization; None for zeros.
        table: T5's bias (TUPE-R); None for none (TUPE-A).
        max_distance: As `t5_attention`.
        bidirectional: As `t5_attention`.

    References:
        Ke et al. 2021, arXiv 2006.15595.
    """
    positions = _shaped("positions", positions, ("length", "D"))
    length, width = positions.shape
    total, first = key.shape[1], key.shape[1] - query.shape[1]
    if is_causal:
        first = max(first, 0)  # queries before the first key see no key and need no position
    where = {
        "query_positions": np.arange(first, total) if query_positions is None else query_positions,
        "key_positions": np.arange(total) if key_positions is None else key_positions,
    }
    known_values(f"below {length}, the rows of the table", lambda x: (x >= 0) & (x < length), **where)
    params = {
        "positions": positions,
        "query_kernel": _shaped("query_kernel", query_kernel, (width, *query.shape[2:])),
        "key_kernel": _shaped("key_kernel", key_kernel, (width, *key.shape[2:])),
        "scale": jnp.ones(width) if scale is None else _shaped("scale", scale, (width,)),
        "shift": jnp.zeros(width) if shift is None else _shaped("shift", shift, (width,)),
    }
    if table is None:
        encoding = TUPE(relative=False, length=length)
    else:
        params["bias"] = _shaped("table", table, ("num_buckets", query.shape[2]))
        encoding = TUPE(
            length=length, num_buckets=len(params["bias"]), max_distance=max_distance, bidirectional=bidirectional
        )
    return Encoded(encoding, params)


@_attention_function
def deberta_attention(
    query,
    key,
    value,
    *,
    relative: Float[ArrayLike, "span D"],
    key_kernel: Float[ArrayLike, "D K H"],
    query_kernel: Float[ArrayLike, "D N H"],
    max_distance: int | None = None,
    released: bool = False,
) -> Encoded:
    """Disentangled attention: softmax((q_i·k_j + q_i·K[δ(i,j)] + k_j·Q[δ(j,i)])/√(3H)), δ(i,j) = i - j + rows, clipped.

    In the enhanced mask decoder, queries include the absolute positions. A logit scale multiplies the whole logit.

    Args:
        relative: One vector for each of the relative positions -rows..rows-1, [2·rows, D].
        key_kernel: Projects the vectors to K.
        query_kernel: Projects the vectors to Q.
        max_distance: None: one row per distance. Otherwise rows are buckets, logarithmic at long distances; the last
            starts at this distance, as in the second version (`nope_jax.encodings.deberta_bucket`).
        released: Use Q[δ(i,j)] instead of Q[δ(j,i)], as in the released code; required for its checkpoints.

    References:
        He et al. 2021, arXiv 2006.03654.
    """
    relative = _shaped("relative", relative, ("2·rows", "D"))
    rows, width = relative.shape
    if rows < 2 or rows % 2:
        raise ValueError(f"relative must have a positive even number of rows, not {rows}")
    params = {
        "relative": relative,
        "key_kernel": _shaped("key_kernel", key_kernel, (width, *key.shape[2:])),
        "query_kernel": _shaped("query_kernel", query_kernel, (width, *query.shape[2:])),
    }
    if max_distance is None:
        encoding = DeBERTa(max_distance=rows // 2, released=released)
    else:
        if rows < 8 or rows % 4:
            raise ValueError(f"with max_distance, relative must have a multiple of 4 rows, at least 8, not {rows}")
        encoding = DeBERTa(max_distance=max_distance, buckets=rows // 2, released=released)
    return Encoded(encoding, params)
