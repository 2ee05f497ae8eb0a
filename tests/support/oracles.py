"""Attention and encodings written a second time, in float64 NumPy, straight from the papers' formulas.

Nothing here imports nope_jax or JAX: what the tests compare with must not share its mistakes. Rows are loops and
buckets are found by integer arithmetic, because slow and obvious is the point.

Shape letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import itertools
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
    chunk_size=None,
    segment_ids=None,
    logit_scale=1.0,
    qk_scale=None,
    softcap=None,
    sink=None,
) -> Attention:
    """softmax(cap(logit_scale · q·k/√H) + bias) · v over the keys a query may attend to; bias is [B, N, T, S] or less.

    `sink` [N] are logits of one more column."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    query_positions, key_positions = positions(B, T, S, query_positions, key_positions)
    mask = np.broadcast_to(np.asarray(mask), (B, N, T, S))
    bias = np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    logit_scale = np.asarray(logit_scale, np.float64)
    if logit_scale.ndim == 1:
        logit_scale = logit_scale[None, :, None]
    logit_scale = np.broadcast_to(logit_scale, (B, N, T))
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
        if chunk_size is not None:
            may = may & (query_positions[b, t] // chunk_size == key_positions[b] // chunk_size)
        if not may.any() and sink is None:
            continue
        content = logit_scale[b, n, t] * (key[b, may, head] @ query[b, t, n]) * (qk_scale or 1 / math.sqrt(H))
        if softcap is not None:
            content = softcap * np.tanh(content / softcap)
        logits = content + bias[b, n, t, may]
        if sink is not None:  # one more column, dropped after the softmax
            logits = np.append(logits, np.float64(sink[n]))
        largest = logits.max()
        logsumexp[b, n, t] = largest + math.log(np.exp(logits - largest).sum())
        p = np.exp(logits - logsumexp[b, n, t])
        entropy[b, n, t] = -sum(x * math.log(x) for x in p if x > 0)
        p = p[: may.sum()]
        weights[b, n, t, may] = p
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


def keys_seen(positions, window=None, chunk_size=None):
    """How many of the positions 0, 1, 2, ... a causal query at each position sees, counted one by one."""
    counts = np.zeros(np.shape(positions), int)
    for index, at in np.ndenumerate(np.asarray(positions)):
        for key in range(at + 1):
            in_window = window is None or at - key < window
            in_chunk = chunk_size is None or key // chunk_size == at // chunk_size
            counts[index] += in_window and in_chunk
    return counts


def log_n(seen, length):
    """kexue.fm 8823: log_L n, at least 1."""
    return np.array([max(1.0, math.log(n, length)) for n in np.ravel(seen)]).reshape(np.shape(seen))


def ssmax_weights(logits, scale):
    """Nakanishi 2025, equation 2: n^(s·z_i) / Σ_j n^(s·z_j) of the n logits of one row."""
    powers = [len(logits) ** (scale * z) for z in logits]
    return np.array(powers) / sum(powers)


def swan(positions, offset):
    """Puvvada et al. 2025: log_a(a + n)."""
    return np.log(offset + np.asarray(positions, np.float64)) / math.log(offset)


def hierarchical(table, position, alpha):
    """Su 2020: q_{(i-1)n+j} = α·u_i + (1-α)·u_j with u = (p - α·p_1) / (1-α); all indices, as there, from 1."""
    table = np.asarray(table, np.float64)
    n = len(table)
    i, j = position // n + 1, position % n + 1
    base = {index: (table[index - 1] - alpha * table[0]) / (1 - alpha) for index in (i, j)}
    return alpha * base[i] + (1 - alpha) * base[j]


def complex_order(embedding, frequencies, position):
    """Wang et al. 2020, equation 8, of one token: r·exp(i(ω·k + θ)), r·exp(iθ) being first half + i · second half."""
    embedding, frequencies = np.asarray(embedding, np.float64), np.asarray(frequencies, np.float64)
    word = np.array([complex(re, im) for re, im in embedding.reshape(2, -1).T])
    amplitude, phase = np.abs(word), np.angle(word)
    function = amplitude * np.exp(1j * (frequencies * position + phase))
    return np.concatenate([function.real, function.imag])


def recursive(start, kernel, bias, length):
    """p_{k+1} = tanh(W·p_k + b), with row vectors."""
    rows = [np.asarray(start, np.float64)]
    for _ in range(length - 1):
        rows.append(np.tanh(rows[-1] @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)))
    return np.array(rows)


def flow(params, time, state):
    """Liu et al. 2020: dp/dt = h(t, p), h of one hidden layer that reads [p, t]."""
    inner, inner_bias, outer, outer_bias = (
        np.asarray(params[name], np.float64) for name in ("inner", "inner_bias", "outer", "outer_bias")
    )
    return np.tanh(np.append(state, time) @ inner + inner_bias) @ outer + outer_bias


def runge_kutta(derivative, state, times):
    """The states at all times, by one classical step of fourth order from each to the next."""
    states = [np.asarray(state, np.float64)]
    for time, after in itertools.pairwise(times):
        step, state = after - time, states[-1]
        k1 = derivative(time, state)
        k2 = derivative(time + step / 2, state + step * k1 / 2)
        k3 = derivative(time + step / 2, state + step * k2 / 2)
        k4 = derivative(time + step, state + step * k3)
        states.append(state + step * (k1 + 2 * k2 + 2 * k3 + k4) / 6)
    return np.array(states)


def convolved(x, kernel, segments=None):
    """x_t + Σ_j kernel_j · x_{t-j} over the tokens x [B, T, D] of the same segment; those that are missing are 0."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    out = x.copy()
    for b, t in np.ndindex(x.shape[:2]):
        for j in range(min(len(kernel), t + 1)):
            if segments is None or segments[b, t] == segments[b, t - j]:
                out[b, t] += kernel[j] * x[b, t - j]
    return out


def kerple_bias(r1, r2, query_positions, key_positions, *, variant="log"):
    """-r1·log(1 + r2·|i - j|) or -r1·|i - j|^r2 (Chi et al. 2022, corollary 1), as [B, N, T, S]."""
    distance = np.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :]).astype(np.float64)
    r1, r2 = (np.asarray(x, np.float64)[None, :, None, None] for x in (r1, r2))
    return -r1 * np.log(1 + r2 * distance) if variant == "log" else -r1 * distance**r2


def fire_bias(
    query_positions, key_positions, *, hidden_weights, hidden_bias, weights, bias=0.0, c=0.1, threshold=512.0
):
    """MLP(ψ(i - j) / ψ(max(i, L))), ψ(x) = log(c·x + 1) (Li et al. 2024, equation 19), as [B, N, T, S]."""
    hidden_weights, hidden_bias, weights, bias, c, threshold = (
        np.asarray(x, np.float64) for x in (hidden_weights, hidden_bias, weights, bias, c, threshold)
    )
    out = np.zeros((len(query_positions), weights.shape[1], query_positions.shape[1], key_positions.shape[1]))
    for b, t, s in np.ndindex(out.shape[0], *out.shape[2:]):
        i, j = query_positions[b, t], key_positions[b, s]
        x = np.log(c * abs(i - j) + 1) / np.log(c * max(i, threshold) + 1)
        out[b, :, t, s] = np.maximum(x * hidden_weights + hidden_bias, 0) @ weights + bias
    return out


def visible(
    B, N, T, S, *, query_positions=None, key_positions=None, mask=True, is_causal=True, window=None, segment_ids=None
):
    """Which keys `attention` lets a query attend to, [B, N, T, S]."""
    at, to = positions(B, T, S, query_positions, key_positions)
    distance = at[:, None, :, None] - to[:, None, None, :]
    may = np.broadcast_to(np.asarray(mask), (B, N, T, S)).copy()
    if is_causal:
        may &= distance >= 0
    if window is not None:
        may &= np.abs(distance) < window
    if segment_ids is not None:
        of_query, of_key = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        may &= np.asarray(of_query)[:, None, :, None] == np.asarray(of_key)[:, None, None, :]
    return may


def cope_bias(query, key, embeddings, *, logit_scale=1.0, scaled=False, **rule):
    """q·e[p], p_ij = Σ_{l=j..i} σ(q_i·k_l/√H) over the keys that i sees (Golovneva et al. 2024, equations 3 to 5).

    A logit scale, [N] or a number, multiplies the query.
    """
    query, key, embeddings = (np.asarray(x, np.float64) for x in (query, key, embeddings))
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    query = query * np.asarray(logit_scale, np.float64).reshape(-1, 1)
    embeddings = np.broadcast_to(embeddings, (N, *embeddings.shape[-2:]))
    last = embeddings.shape[1] - 1
    may = visible(B, N, T, S, **rule)
    out = np.zeros((B, N, T, S))
    for b, n, t in np.ndindex(B, N, T):
        q, position = query[b, t, n], 0.0
        for s in reversed(range(S)):
            if not may[b, n, t, s]:
                continue
            position += 1 / (1 + math.exp(-q @ key[b, s, n // (N // K)] / math.sqrt(H)))
            p = min(position, last)
            below, above = math.floor(p), math.ceil(p)
            e = (1 - (p - below)) * embeddings[n, below] + (p - below) * embeddings[n, above]
            out[b, n, t, s] = q @ e / (math.sqrt(H) if scaled else 1.0)
    return out


def forgetting_bias(log_forget, queries, query_start=None):
    """Σ_{j<l≤i} log f_l (Lin et al. 2025, equation 3), as [B, N, T, S]; for a key after the query Σ_{i<l≤j}.

    log_forget is [B, S, N]; the queries are so many of its tokens from query_start on, or else the last.
    """
    log_forget = np.asarray(log_forget, np.float64)
    B, S, N = log_forget.shape
    start = S - queries if query_start is None else query_start
    out = np.zeros((B, N, queries, S))
    for t, j in np.ndindex(queries, S):
        i = start + t
        out[:, :, t, j] = log_forget[:, min(i, j) + 1 : max(i, j) + 1].sum(1)
    return out


def ntk_frequencies(dim, factor, base=10_000.0):
    """bloc97 2023: RoPE's frequencies at the base base · s^(d/(d-2))."""
    return rope_frequencies(dim, base * factor ** (dim / (dim - 2)))


def xpos(x, positions, *, is_key, base=10_000.0, scale_base=512.0, interleaved=True):
    """Sun et al. 2022: RoPE, pair m times ζ_m^(n/512) in queries and ζ_m^(-n/512) in keys, n the position.

    ζ_m = (2m/d + γ) / (1 + γ) with γ = 0.4, for m = 0 .. d/2 - 1.
    """
    x = np.asarray(x, np.float64)
    d, positions = x.shape[-1], np.broadcast_to(positions, x.shape[:2])
    turned = rope(x, positions, base=base, interleaved=interleaved)
    for m in range(d // 2):
        zeta = (2 * m / d + 0.4) / 1.4
        power = zeta ** ((-1 if is_key else 1) * positions / scale_base)
        for feature in (2 * m, 2 * m + 1) if interleaved else (m, m + d // 2):
            turned[..., feature] *= power[:, :, None]
    return turned


def clipped_row(query_position, key_position, clip):
    """Row of key - query, held within ±clip, in a table that begins at -clip (Shaw et al. 2018, section 3.2)."""
    return max(-clip, min(clip, int(key_position) - int(query_position))) + clip


def shaw_logit(query, table, query_positions, key_positions):
    """q_i · R[j - i] as [B, N, T, S], not divided by √H yet; clip is half of the table."""
    query, table = np.asarray(query, np.float64), np.asarray(table, np.float64)
    (B, T, N, _), S = query.shape, key_positions.shape[1]
    out = np.zeros((B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        row = clipped_row(query_positions[b, t], key_positions[b, s], len(table) // 2)
        out[b, n, t, s] = query[b, t, n] @ table[row]
    return out


def shaw_value(weights, table, query_positions, key_positions):
    """Σ_j weight_ij · R[j - i] as [B, T, N, H]."""
    table = np.asarray(table, np.float64)
    B, N, T, S = weights.shape
    out = np.zeros((B, T, N, table.shape[1]))
    for b, n, t, s in np.ndindex(B, N, T, S):
        row = clipped_row(query_positions[b, t], key_positions[b, s], len(table) // 2)
        out[b, t, n] += weights[b, n, t, s] * table[row]
    return out


def nezha_table(clip, features):
    """Wei et al. 2019, section 2.2: sinusoids of j - i in place of Shaw's learned rows."""
    return sinusoidal(np.arange(-clip, clip + 1), features)


def transformer_xl_logit(query, key, content_bias, position_bias, position_kernel, query_positions, key_positions):
    """u·k_j + (q_i + v)·W R[i - j] as [B, N, T, S], not divided by √H yet (Dai et al. 2019, section 3.3)."""
    query, key, u, v, kernel = (
        np.asarray(x, np.float64) for x in (query, key, content_bias, position_bias, position_kernel)
    )
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    out = np.zeros((B, N, T, S))
    for b, t, s in np.ndindex(B, T, S):
        r = sinusoidal(query_positions[b, t] - key_positions[b, s], len(kernel), halves=True)
        for n in range(N):
            out[b, n, t, s] = u[n] @ key[b, s, n // (N // K)] + (query[b, t, n] + v[n]) @ (r @ kernel[:, n])
    return out


def tupe_logit(positions, scale, shift, query_kernel, key_kernel, query_positions, key_positions):
    """(p_i U)·(p_j V) as [B, N, T, S], not divided by √(2H) yet (Ke et al. 2021, equation 7), p layer-normalised."""
    positions, U, V = (np.asarray(x, np.float64) for x in (positions, query_kernel, key_kernel))
    centred = positions - positions.mean(1, keepdims=True)
    p = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * np.asarray(scale) + np.asarray(shift)
    (B, T), S, N, K = query_positions.shape, key_positions.shape[1], U.shape[1], V.shape[1]
    out = np.zeros((B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        out[b, n, t, s] = (p[query_positions[b, t]] @ U[:, n]) @ (p[key_positions[b, s]] @ V[:, n // (N // K)])
    return out


def deberta_delta(distance, span):
    """δ of He et al. 2021, equation 3: 0 for distances from -span down, 2·span - 1 from span up, else in between."""
    return 0 if distance <= -span else 2 * span - 1 if distance >= span else int(distance) + span


def deberta_bucket(distance, num_buckets, max_distance):
    """The released code's logarithmic buckets: exact up to the half, the last one (num_buckets) from max_distance on.

    Bucket exact + k ends at the distance exact · ((max_distance - 1) / exact)^(k / (exact - 1)), decided in integers.
    """
    exact, far = num_buckets // 2, abs(int(distance))
    if far <= exact:
        bucket = far
    elif far >= max_distance:
        bucket = num_buckets
    else:
        k = 0
        while far ** (exact - 1) * exact**k > (max_distance - 1) ** k * exact ** (exact - 1):
            k += 1
        bucket = exact + k
    return bucket if distance > 0 else -bucket


def deberta_logit(
    query, key, relative, key_kernel, query_kernel, query_positions, key_positions, *, max_distance=None, released=False
):
    """q_i·K[δ(i,j)] + k_j·Q[δ(j,i)] as [B, N, T, S], not divided by √(3H) yet (He et al. 2021, equation 4).

    With max_distance the rows are buckets. The released code reads Q at δ(i,j) instead.
    """
    query, key, relative, key_kernel, query_kernel = (
        np.asarray(x, np.float64) for x in (query, key, relative, key_kernel, query_kernel)
    )
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    span = len(relative) // 2
    out = np.zeros((B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        distance, head = int(query_positions[b, t] - key_positions[b, s]), n // (N // K)
        if max_distance is not None:
            distance = deberta_bucket(distance, span, max_distance)
        to_key = relative[deberta_delta(distance, span)] @ key_kernel[:, head]
        to_query = relative[deberta_delta(distance if released else -distance, span)] @ query_kernel[:, n]
        out[b, n, t, s] = query[b, t, n] @ to_key + key[b, s, head] @ to_query
    return out
