"""What acts at the input place, held to GPT-2, to PyTorch, to SciPy's solver and to float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from nope_jax.encodings import (
    FLOATER,
    ComplexOrder,
    Convolution,
    Hierarchical,
    Learned,
    ModelDims,
    Multiplicative,
    Recursive,
    TokenInputs,
)
from tests.goldens import regenerate
from tests.support import oracles
from tests.support.attention_cases import assert_close, random
from tests.support.drawn_model import small_model

GOLDEN = regenerate.load("absolute")
B, T, D, V = 2, 9, 6, 7
SIZES = ModelDims(num_heads=1, head_dim=D, model_dim=D, train_length=4, vocab_size=V)
POSITIONS = np.array([[0, 3, 1, 2, 2, 7, 5, 11, 6], [4, 0, 9, 12, 15, 1, 8, 10, 3]])

EVERY = [
    Learned(16),
    Hierarchical(),
    Multiplicative(16),
    Multiplicative(sinusoidal=True),
    ComplexOrder(),
    ComplexOrder(per_token=False),
    Recursive(),
    FLOATER(),
    Convolution(),
]
VARIANTS = Multiplicative(sinusoidal=True), ComplexOrder(per_token=False)  # each has a test of its values
every = pytest.mark.parametrize(
    "encoding", [pytest.param(x, marks=pytest.mark.slow) if x in VARIANTS else x for x in EVERY], ids=str
)


def tokens(positions=POSITIONS, ids=None, segments=None, length=None):
    """What the input place is told; the length is beyond all positions unless given."""
    length = int(np.max(positions)) + 1 if length is None else length  # given where they are traced
    positions = positions if isinstance(positions, jax.Array) else np.atleast_2d(positions)
    positions = positions[None] if positions.ndim == 1 else positions
    ids = np.zeros((B, positions.shape[1]), int) if ids is None else ids
    # Not by jnp.asarray, which compiles a program for every shape.
    ids, positions, segments = jax.device_put((np.asarray(ids), positions, segments))
    return TokenInputs(ids, positions, segments, length)


@functools.cache
def started(encoding, dims=SIZES):
    """Initial parameters."""
    return jax.tree.map(np.asarray, jax.jit(lambda key: encoding.init_shared(key, dims))(jax.random.key(0)))


def parameters(encoding, dims=SIZES):
    """Initial parameters, each moved a little, so that none is where it has no effect."""
    return {name: x + 0.1 * random(*x.shape, seed=i) for i, (name, x) in enumerate(started(encoding, dims).items(), 1)}


def run(encoding, params, x, told):
    """The input place by one program: outside jit each operation is compiled by itself."""
    return np.asarray(jax.jit(lambda params, x: encoding.input(params, x, told))(params, x))


def arrays(golden, *names):
    return [np.array(golden[name], np.int32 if name == "ids" else np.float32) for name in names]


# --- What holds for all of them


@every
def test_it_keeps_dtype_and_shape_and_takes_positions_that_are_traced_or_one_row(encoding):
    row = np.arange(T)

    @jax.jit
    def outputs(params, x, at):
        half = encoding.input(params, x.astype(jnp.bfloat16), tokens())
        rows = [encoding.input(params, x, tokens(at)) for at in (row, np.tile(row, (B, 1)))]
        return encoding.input(params, x, tokens()), encoding.input(params, x, tokens(at, length=16)), half, rows

    out, traced, half, rows = outputs(parameters(encoding), random(B, T, D), POSITIONS)
    np.testing.assert_allclose(traced, out, rtol=1e-6, atol=1e-6)
    assert out.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), out, rtol=2**-6, atol=2**-6 * np.abs(out).max())
    np.testing.assert_array_equal(*rows)


@every
def test_its_gradient_is_that_of_differences(encoding):
    params, x = parameters(encoding), random(B, T, D)
    direction = {name: random(*p.shape, seed=20 + i) for i, (name, p) in enumerate(params.items())}
    weights = random(B, T, D, seed=9)

    def loss(params):
        ids = np.arange(B * T).reshape(B, T) % V
        return (weights * jnp.tanh(encoding.input(params, x, tokens(ids=ids)))).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    along = sum(float((np.asarray(gradient[name]) * direction[name]).sum()) for name in params)
    with jax.enable_x64(True):
        exact = jax.jit(loss)
        moved = [
            float(exact({name: p.astype(np.float64) + step * direction[name] for name, p in params.items()}))
            for step in (2**-10, -(2**-10))
        ]
    np.testing.assert_allclose(along, (moved[0] - moved[1]) * 2**9, rtol=1e-3, atol=1e-4)


# --- Learned tables


def test_learned_positions_are_those_of_gpt2():
    table, x = arrays(GOLDEN["gpt2"], "table", "embeddings")
    for positions, name in ((np.arange(7), "out"), (GOLDEN["gpt2"]["positions"], "scattered")):
        out = run(Learned(len(table)), {"positions": table}, x, tokens(positions))
        np.testing.assert_allclose(out, GOLDEN["gpt2"][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.4, 0.1, 0.8])
def test_hierarchical_positions_are_those_of_its_author(alpha):
    table, zeros = random(4, D), np.zeros((B, 16, D), np.float32)
    out = run(Hierarchical(alpha=alpha), {"positions": table}, zeros, tokens(np.arange(16)))
    assert_close(out[0], [oracles.hierarchical(table, k, alpha) for k in range(16)])
    assert len(np.unique(out[0], axis=0)) == 16


def test_hierarchical_positions_are_the_table_to_the_bit_up_to_its_length():
    params, x, within = {"positions": random(4, D)}, random(B, 4, D, seed=1), tokens(np.arange(4))

    def output_and_gradient(encoding):
        def output(params):
            out = encoding.input(params, x, within)
            return (out**2).sum(), out

        return jax.jit(jax.grad(output, has_aux=True))(params)

    assert started(Hierarchical())["positions"].shape == (4, D)
    both = [jax.tree.leaves(output_and_gradient(encoding)) for encoding in (Hierarchical(), Learned())]
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_hierarchical_table_reaches_its_square_and_no_further():
    encoding = Hierarchical()
    assert encoding.max_length(SIZES) == 16 and Hierarchical(5).max_length(SIZES) == 25
    out = run(encoding, started(encoding), np.zeros((1, 4, D), np.float32), tokens([15, 16, -1, 3]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, True, True, False]])
    model = small_model(encoding="hierarchical", train_length=3)
    model.check_tokens(np.zeros((1, 9), int))
    with pytest.raises(ValueError, match=r"\A.*\b9\b.*\Z"):
        model(np.zeros((1, 10), int))


def test_multiplicative_positions_are_factors():
    params, x = parameters(Multiplicative(16)), random(B, T, D)
    out = run(Multiplicative(16), params, x, tokens())
    assert_close(out, x.astype(np.float64) * params["positions"][POSITIONS])
    out = run(Multiplicative(sinusoidal=True), {}, x, tokens())
    assert_close(out, x * oracles.sinusoidal(POSITIONS, D))


def test_multiplicative_tables_start_near_ones_and_end_at_their_length():
    encoding = Multiplicative()
    params = started(encoding)
    np.testing.assert_allclose(params["positions"], np.ones((4, D)), atol=0.1)
    assert encoding.max_length(SIZES) == 4
    assert Multiplicative(sinusoidal=True).max_length(SIZES) is None
    assert Multiplicative(sinusoidal=True).init_shared(jax.random.key(0), SIZES) == {}
    out = run(encoding, params, np.ones((1, 3, D), np.float32), tokens([[3, 4, -1]]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, True, True]])


# --- Complex order


def test_complex_order_is_a_product_of_complex_numbers():
    golden = GOLDEN["phase"]
    frequencies, x, ids = arrays(golden, "frequencies", "x", "ids")
    out = run(ComplexOrder(), {"frequencies": frequencies}, x, tokens(golden["positions"], ids=ids))
    assert_close(out, golden["out"])


@pytest.mark.parametrize("per_token", [True, False])
def test_complex_order_has_amplitude_frequency_and_phase(per_token):
    encoding = ComplexOrder(per_token=per_token)
    ids = np.random.default_rng(0).integers(0, V, (B, T))
    params, x = parameters(encoding), random(B, T, D)
    assert params["frequencies"].shape == (V if per_token else 1, D // 2)
    out = run(encoding, params, x, tokens(ids=ids))
    for b, t in np.ndindex(B, T):
        frequencies = params["frequencies"][ids[b, t] if per_token else 0]
        assert_close(out[b, t], oracles.complex_order(x[b, t], frequencies, POSITIONS[b, t]))


def test_complex_order_starts_from_the_frequencies_of_the_sinusoids():
    dims = ModelDims(num_heads=1, head_dim=8, model_dim=8, vocab_size=3)
    params = started(ComplexOrder(base=100.0), dims)
    np.testing.assert_allclose(params["frequencies"], [oracles.rope_frequencies(8, 100.0)] * 3, rtol=1e-6)
    assert started(ComplexOrder(per_token=False), dims)["frequencies"].shape == (1, 4)


# --- Recurrences


def table_of(encoding, params, length):
    """The positions that are added: the rows 0 .. length - 1."""
    zeros = np.zeros((1, length, params["start"].shape[0]), np.float32)
    return run(encoding, params, zeros, tokens(np.arange(length)))[0]


def test_recursive_positions_are_the_states_of_pytorchs_network():
    params = dict(
        zip(("start", "kernel", "bias"), arrays(GOLDEN["recurrence"], "start", "kernel", "bias"), strict=True)
    )
    states = GOLDEN["recurrence"]["states"]
    assert_close(table_of(Recursive(), params, len(states)), states)


def test_recursive_positions_agree_with_float64_past_training():
    params = parameters(Recursive())
    assert_close(table_of(Recursive(), params, 60), oracles.recursive(**params, length=60), floor=0)


@pytest.mark.parametrize(
    "encoding",
    [
        pytest.param(FLOATER(), marks=pytest.mark.slow),  # as the test below
        FLOATER(step_size=0.3, width=10),
        FLOATER(step_size=0.5, substeps=3),
    ],
    ids=str,
)
def test_floater_is_runge_kutta_of_fourth_order(encoding):
    params = parameters(encoding)
    times = np.arange(24 * encoding.substeps + 1) * encoding.step_size / encoding.substeps
    states = oracles.runge_kutta(functools.partial(oracles.flow, params), params["start"], times)
    assert_close(table_of(encoding, params, 25), states[:: encoding.substeps])


def test_floater_solves_its_equation():
    # Times and scale are such that Euler's method or a wrong time misses by 1e-3 and more.
    encoding = FLOATER(step_size=0.05)
    params = parameters(encoding, ModelDims(num_heads=1, head_dim=D, model_dim=D, train_length=40))
    times = np.arange(40) * encoding.step_size
    derivative = functools.partial(oracles.flow, params)
    solved = solve_ivp(derivative, (0, times[-1]), params["start"], t_eval=times, rtol=1e-10, atol=1e-12)
    assert_close(table_of(encoding, params, 40), solved.y.T)


@pytest.mark.parametrize("encoding", [Recursive(), FLOATER()], ids=str)
def test_recurrences_have_no_answer_for_positions_that_they_were_not_told_of(encoding):
    params = parameters(encoding)
    out = run(encoding, params, np.zeros((1, 4, D), np.float32), tokens([[0, 4, 5, -1]], length=5))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, False, True, True]])


@pytest.mark.parametrize("encoding", [Recursive(), FLOATER()], ids=str)
def test_recurrences_start_with_positions_that_differ_and_stay_finite_far_past_training(encoding):
    dims = ModelDims(num_heads=1, head_dim=32, model_dim=32, train_length=64)
    table = table_of(encoding, started(encoding, dims), 1000)
    assert np.isfinite(table).all() and np.abs(table).max() < 100
    neighbours = np.linalg.norm(np.diff(table[:64], axis=0), axis=-1)
    assert (neighbours > 1e-3 * np.linalg.norm(table[:64], axis=-1).mean()).all()


# --- Convolution


def test_convolution_is_pytorchs_with_zeros_on_the_left():
    x, kernel = arrays(GOLDEN["convolution"], "x", "kernel")
    out = run(Convolution(), {"kernel": kernel}, x, tokens(np.arange(x.shape[1])))
    assert_close(out, GOLDEN["convolution"]["out"])


@pytest.mark.parametrize(("kernel_size", "segmented"), [(2, True), (4, False), (12, True)])
def test_convolution_agrees_with_float64_and_keeps_to_its_segment(kernel_size, segmented):
    encoding = Convolution(kernel_size)
    params, x = parameters(encoding), random(B, T, D)
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 0, 0, 0, 0, 0, 5, 5, 5]]) if segmented else None
    out = run(encoding, params, x, tokens(segments=segments))
    assert_close(out, oracles.convolved(x, params["kernel"], segments))
    if segmented:
        alone = run(encoding, params, x[:1, 5:], tokens(np.arange(4)))
        np.testing.assert_allclose(out[:1, 5:], alone, rtol=1e-6, atol=1e-6)


def test_convolution_of_the_tokens_before_is_that_of_the_whole():
    encoding = Convolution(3)
    params, x = parameters(encoding), random(B, T, D)
    back = encoding.input_context()
    assert back == 2
    whole = run(encoding, params, x, tokens(np.arange(T)))
    window = np.concatenate([np.zeros((B, back, D), np.float32), x], axis=1)
    part = jax.jit(lambda window, at: encoding.input(params, window, tokens(at, length=T)))
    for t in range(T):
        out = part(window[:, t : t + back + 1], np.array([[t - 2, t - 1, t]]))
        np.testing.assert_allclose(np.asarray(out)[:, back:], whole[:, t : t + 1], rtol=1e-6, atol=1e-6)


# --- Bad input


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Learned(0), "length"),
        (lambda: Hierarchical(0), "length"),
        (lambda: Hierarchical(alpha=0.5), "alpha"),
        (lambda: Hierarchical(alpha=0.0), "alpha"),
        (lambda: Hierarchical(alpha=1.0), "alpha"),
        (lambda: Hierarchical(alpha=float("nan")), "alpha"),
        (lambda: Multiplicative(-1), "length"),
        (lambda: ComplexOrder(base=0.0), "base"),
        (lambda: FLOATER(step_size=0.0), "step_size"),
        (lambda: FLOATER(substeps=0), "substeps"),
        (lambda: FLOATER(width=0), "width"),
        (lambda: Convolution(1), "kernel_size"),
        (lambda: ComplexOrder().init_shared(jax.random.key(0), ModelDims(1, 8, 8)), "vocab_size"),
        (lambda: ComplexOrder().init_shared(jax.random.key(0), ModelDims(1, 7, 7, vocab_size=4)), "model_dim"),
        (lambda: ComplexOrder().input({}, jnp.zeros((2, 3, 7)), tokens([0, 1, 2])), "model_dim"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, field):
    with pytest.raises(ValueError, match=rf"\A{field} .*\Z"):
        make()
