"""Attention and encodings written a second time, in float64 NumPy, straight from the papers' formulas.

Nothing here imports nope_jax or JAX: what the tests compare with must not share its mistakes. Rows are loops and
buckets are found by integer arithmetic, because slow and obvious is the point.

Shape letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import math
from typing import NamedTuple

import numpy as np


class Attention(NamedTuple):
    output: np.ndarray
    """[B, T, N, H]"""
    entropy: np.ndarray
    """[B, N, T], nats"""
    logsumexp: np.ndarray
    """[B, N, T], nats"""
    weights: np.ndarray
    """[B, N, T, S]"""


def attention(
    query,
    key,
    value,
    *,
    bias=0.0,
    query_positions=None,
    key_positions=None,
    mask=True,
    is_causal=True,
    window=None,
    segment_ids=None,
    temperature=1.0,
) -> Attention:
    """softmax(temperature · q·k/√H + bias) · v over the keys a query may attend to; bias broadcasts to [B, N, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    query_positions, key_positions = positions(B, T, S, query_positions, key_positions)
    mask = np.broadcast_to(np.asarray(mask), (B, N, T, S))
    bias = np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    temperature = np.asarray(temperature, np.float64)
    if temperature.ndim == 1:
        temperature = temperature[None, :, None]
    temperature = np.broadcast_to(temperature, (B, N, T))
    if segment_ids is None:
        segment_ids = np.zeros((B, T), int), np.zeros((B, S), int)
    elif not isinstance(segment_ids, tuple):
        segment_ids = segment_ids, segment_ids

    output = np.zeros((B, T, N, H))
    entropy = np.zeros((B, N, T))
    logsumexp = np.full((B, N, T), -np.inf)
    weights = np.zeros((B, N, T, S))
    for b, n, t in np.ndindex(B, N, T):
        head = n // (N // K)
        distance = query_positions[b, t] - key_positions[b]
        may = mask[b, n, t] & (segment_ids[0][b, t] == segment_ids[1][b])
        if is_causal:
            may = may & (distance >= 0)
        if window is not None:
            may = may & (distance < window if is_causal else np.abs(distance) < window)
        if not may.any():
            continue
        content = key[b, may, head] @ query[b, t, n] / math.sqrt(H)
        logits = temperature[b, n, t] * content + bias[b, n, t, may]
        largest = logits.max()
        logsumexp[b, n, t] = largest + math.log(np.exp(logits - largest).sum())
        p = np.exp(logits - logsumexp[b, n, t])
        weights[b, n, t, may] = p
        entropy[b, n, t] = -sum(x * math.log(x) for x in p if x > 0)
        output[b, t, n] = p @ value[b, may, head]
    return Attention(output, entropy, logsumexp, weights)


def positions(B, T, S, query_positions=None, key_positions=None):
    """Both as [B, T] and [B, S]; by default keys count from 0 and the last query stands at the last key."""
    if query_positions is None:
        query_positions = np.arange(S - T, S)
    if key_positions is None:
        key_positions = np.arange(S)
    return np.broadcast_to(query_positions, (B, T)), np.broadcast_to(key_positions, (B, S))


def rope_frequencies(dim, base=10_000.0):
    """θ_m = base^(-2m/d) for m = 0 .. d/2 - 1 (Su et al. 2021, equation 15)."""
    return np.array([base ** (-2 * m / dim) for m in range(dim // 2)])


def rope(x, positions, *, base=10_000.0, rotary_dim=None, interleaved=False):
    """Turn each pair of features of `x` [B, T, N, H], read as a complex number, by position · θ_m (equation 12).

    Pair m is features (2m, 2m+1) when interleaved and (m, m + rotary_dim/2) otherwise; features past rotary_dim stay.
    """
    x = np.asarray(x, np.float64)
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    positions = np.broadcast_to(positions, x.shape[:2])
    out = x.copy()
    for m, frequency in enumerate(rope_frequencies(rotary_dim, base)):
        first, second = (2 * m, 2 * m + 1) if interleaved else (m, m + rotary_dim // 2)
        turn = np.exp(1j * positions * frequency)[:, :, None]
        turned = (x[..., first] + 1j * x[..., second]) * turn
        out[..., first], out[..., second] = turned.real, turned.imag
    return out


def alibi_slopes(num_heads):
    """2^(-8h/n), h = 1 .. n, for n a power of two; else those of the power below, then every other of the power above.

    Press et al. 2022, section 3, and their released code for head counts that are not powers of two.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return np.array(slopes + between[: num_heads - power])


def alibi_bias(slopes, query_positions, key_positions):
    """-m_h |i - j|, as [B, N, T, S] from positions [B, T] and [B, S]; the paper, being causal, has only i >= j."""
    distance = np.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :])
    return -np.asarray(slopes, np.float64)[None, :, None, None] * distance


def t5_bucket(relative_position, *, bidirectional, num_buckets=32, max_distance=128):
    """Raffel et al. 2020: half of the buckets exact, the other half logarithmic up to max_distance.

    relative_position = key - query; when bidirectional the future has half of all buckets to itself. Bucket exact + k
    begins at the distance exact · (max_distance / exact)^(k / logs), decided in integers, so that no distance on an
    edge falls to rounding.
    """
    distinct, where = np.unique(relative_position, return_inverse=True)
    buckets = [_t5_bucket(int(relative), bidirectional, num_buckets, max_distance) for relative in distinct]
    return np.array(buckets, int)[where].reshape(np.shape(relative_position))


def _t5_bucket(relative, bidirectional, num_buckets, max_distance):
    future = 0
    if bidirectional:
        num_buckets //= 2
        future = num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = num_buckets // 2
    logs = num_buckets - exact
    if distance < exact:
        return future + distance
    k = 0
    # (distance / exact)^logs >= (max_distance / exact)^(k + 1), multiplied out.
    while k < logs - 1 and distance**logs * exact ** (k + 1) >= max_distance ** (k + 1) * exact**logs:
        k += 1
    return future + exact + k


def t5_bias(table, query_positions, key_positions, *, max_distance=128, bidirectional=False):
    """table[bucket(j - i), h], as [B, N, T, S] from positions [B, T] and [B, S]."""
    table = np.asarray(table, np.float64)
    relative = key_positions[:, None, :] - query_positions[:, :, None]
    buckets = t5_bucket(relative, bidirectional=bidirectional, num_buckets=len(table), max_distance=max_distance)
    return table[buckets].transpose(0, 3, 1, 2)


def sinusoidal(positions, features, *, halves=False):
    """Vaswani et al. 2017, section 3.5: sin and cos of position / 10000^(2i/d), alternating or sines before cosines."""
    out = np.zeros((*np.shape(positions), features))
    for index, position in np.ndenumerate(np.asarray(positions)):
        for i in range(features // 2):
            angle = float(position) / 10_000 ** (2 * i / features)
            sin_at, cos_at = (i, features // 2 + i) if halves else (2 * i, 2 * i + 1)
            out[(*index, sin_at)], out[(*index, cos_at)] = math.sin(angle), math.cos(angle)
    return out
