"""Attention sharded over a device mesh: data and tensor parallelism, and ring attention over the sequence axis.

With a mesh in context (`jax.set_mesh`), every device computes the attention of its own batch rows and heads without
communication. If a sequence is sharded, its keys travel around a ring of devices (`nope_jax.attention.ring`).

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends import Backend, Results
from nope_jax.attention.blocks import CachedLayer, whole
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import BATCH, HEADS, LENGTH, axis_sizes
from nope_jax.attention.ring import ring_attention
from nope_jax.encodings import BlockValue, DistanceLogit, ScanLogit
from nope_jax.encodings.encoding import Logit


def spread_attention(
    backend: Backend,
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike,
    with_entropy: bool,
    softcap: float | None,
) -> Results:
    """Run a backend on the other arguments, sharded over the devices of the mesh in context.

    An axis whose size is not divisible by its number of devices is replicated, and so are heads if a term does not
    declare the head axes of its arrays. The sequence is replicated for queries against a longer cache, with an explicit
    mask, and for backends or terms that cannot process it in parts.
    """
    sizes, in_parts = axis_sizes(), backend.in_parts
    (batch, query_length), (key_length, kv_heads) = query.shape[:2], key.shape[1:3]
    rows = tuple(axis for axis in BATCH if axis in sizes)
    rows = rows if batch % math.prod(sizes[axis] for axis in rows) == 0 else ()
    heads = HEADS if HEADS in sizes and kv_heads % sizes[HEADS] == 0 and _says_heads(logit, value_term) else None
    if isinstance(logit, ScanLogit):
        in_parts = in_parts and mask_spec.is_causal and mask_spec.contiguous
    ring = in_parts and LENGTH in sizes and query_length == key_length and mask_spec.mask is None
    ring = ring and query_length % sizes[LENGTH] == 0
    split = _Split(rows or None, LENGTH if ring else None, heads)
    if not any(split) and not (backend.is_kernel and sizes):
        return backend.attend(query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap)

    key, value = whole(key), whole(value)
    attend = functools.partial(ring_attention, backend.attend) if ring else backend.attend
    if not mask_spec.contiguous:
        query_positions, key_positions = mask_spec.positions(query_length, key_length)
        mask_spec = dataclasses.replace(mask_spec, query_positions=query_positions, key_positions=key_positions)

    def local(query, factor, key, value, logit, *rest):
        if heads is not None and isinstance(logit, DistanceLogit):
            logit = DistanceLogit(_OwnHeads(logit.function), logit.parameters)
        return attend(query, factor, key, value, logit, *rest, precision, with_entropy, softcap)

    per_token = split.specs("batch", "length", "heads")
    operands = query, factor, key, value, logit, value_term, mask_spec
    specs = (
        per_token(query),
        split.specs("batch", "heads", "length")(factor),
        per_token(key),
        per_token(value),
        split.of_term(logit),
        split.of_term(value_term),
        dataclasses.replace(
            jax.tree.map(split.specs("batch", "length"), mask_spec),
            mask=jax.tree.map(split.specs("batch", "heads"), mask_spec.mask),
        ),
    )
    of_rows = PartitionSpec(split.batch, split.heads, split.length)
    results = PartitionSpec(split.batch, split.length, split.heads), of_rows, of_rows
    return jax.shard_map(local, in_specs=specs, out_specs=results, check_vma=False)(*operands)


def _says_heads(*terms: Any) -> bool:
    return all(term is None or isinstance(term, DistanceLogit) or term.heads is not None for term in terms)


class _Split(NamedTuple):
    """The mesh axes over which the batch rows, positions and heads of a call are sharded."""

    batch: tuple[str, ...] | None
    length: str | None
    heads: str | None

    def specs(self, *names: str | None) -> Callable[[Array], PartitionSpec]:
        """Return a function from an array with these axis names to its PartitionSpec; axes of size 1 are replicated."""
        axes = [None if name is None else getattr(self, name) for name in names]
        return lambda x: PartitionSpec(*(axis if size > 1 else None for size, axis in zip(x.shape, axes, strict=False)))

    def of_term(self, term: Any) -> Any:
        """The PartitionSpecs of a term's arrays: features are sharded like tokens, head axes as the term declares."""
        leaves, structure = jax.tree.flatten(term)
        features = len(jax.tree.leaves([getattr(term, name, None) for name in ("query_features", "key_features")]))
        heads = getattr(term, "heads", None) if self.heads else None
        specs = []
        for index, leaf in enumerate(leaves):
            names: list[str | None] = [None] * leaf.ndim
            if index >= len(leaves) - features:
                names[:2] = "batch", "length"
            axis = None if heads is None else heads[index]
            if axis is not None:
                names[axis] = "heads"
            specs.append(self.specs(*names)(leaf))
        return jax.tree.unflatten(structure, specs)


@dataclasses.dataclass(frozen=True)
class _OwnHeads:
    """A function of distance, restricted to the heads of the local device."""

    function: Callable

    def __call__(self, parameters, distance):
        values = DistanceLogit(self.function, parameters).values(distance)
        if len(values) == 1:  # shared by all heads
            return values
        own = len(values) // lax.axis_size(HEADS)
        return lax.dynamic_slice_in_dim(values, lax.axis_index(HEADS) * own, own)
