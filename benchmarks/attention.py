"""Time and memory of one causal attention layer on this machine, beside other implementations.

    python -m benchmarks.attention [--lengths 1024 4096 16384] [--rounds 7] [--out benchmarks/results]

Ours: every encoding below with the implementation that is chosen by default, and NoPE with each of those that serve it
here. Peers, where they are installed: `jax.nn` by XLA (which materializes its weights, so up to 8,192 tokens) and, on a
GPU, by cuDNN; torch SDPA (`pip install torch`) and, on a GPU, compiled FlexAttention, plain and with ALiBi's bias;
tokamax. Ratios are to torch SDPA, or to `jax.nn` without torch. Batch 1; on a CPU float32 and 8 heads of 64, elsewhere
bfloat16 and 16 heads of 128. FLOPs are those of the visible pairs, 4 per pair, head and dimension forward, 14 forward
and backward. `benchmarks/measure.py` says how time is taken and what the file has.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contestant, compiled, group, parser, save, torch, torch_device, torch_wait
from nope_jax.attention import alibi_attention, nope_attention, rope_attention, t5_attention
from nope_jax.attention.backends import BACKENDS
from nope_jax.encodings import alibi_slopes

TORCH, JAX_NN = "torch SDPA", "jax.nn (XLA)"
MOST_WEIGHTS = 8192
"""The longest sequence for what materializes all weights."""
COMPILED_FOR = {"pallas_tpu": "tpu", "splash": "tpu", "pallas_gpu": "gpu"}
"""Of a kernel that a CPU would interpret, the platform."""
WHAT = "forward", "forward and backward"


def settings() -> tuple[int, int, str]:
    """Heads, head dim and dtype for this device."""
    return (8, 64, "float32") if jax.default_backend() == "cpu" else (16, 128, "bfloat16")


def inputs(length: int) -> list[np.ndarray]:
    heads, dim, _ = settings()
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, length, heads, dim)).astype(np.float32) for _ in range(3)]


def flops(length: int) -> tuple[float, float]:
    """Useful FLOPs forward, and forward and backward (which has the products of the forward pass, and five more)."""
    heads, dim, _ = settings()
    pairs = length * (length + 1) / 2 * heads
    return 4 * pairs * dim, 14 * pairs * dim


def pair(name: str, function: Callable, arrays: list[jax.Array], length: int | None) -> Iterator[Contestant]:
    """Forward pass, and gradient of all arrays; the length that FLOPs are counted of, None for not at all."""

    def total(*arrays: jax.Array) -> jax.Array:
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(*arrays)))

    gradient = jax.grad(total, argnums=tuple(range(len(arrays))))
    counts = (None, None) if length is None else flops(length)
    for what, f, count in zip(WHAT, (function, gradient), counts, strict=True):
        yield compiled(name, f, *arrays, what=what, flops=count)


def ours(length: int) -> Iterator[Contestant]:
    heads, _, dtype = settings()
    arrays = [jnp.asarray(x, dtype) for x in inputs(length)]
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(32, heads)), jnp.float32)
    functions: dict[str, tuple[Callable, list]] = {
        "nope": (nope_attention, arrays),
        "nope + entropy": (partial(nope_attention, return_stats=True), arrays),
        "rope": (rope_attention, arrays),
        "alibi": (alibi_attention, arrays),
        "alibi + entropy": (partial(alibi_attention, return_stats=True), arrays),
        "t5": (lambda q, k, v, t: t5_attention(q, k, v, table=t), [*arrays, table]),
    }
    for name, (function, own) in functions.items():
        yield from pair(name, function, own, length)
    for implementation in BACKENDS:
        interpreted = COMPILED_FOR.get(implementation, jax.default_backend()) != jax.default_backend()
        if interpreted or (implementation == "reference" and length > MOST_WEIGHTS):
            continue
        try:
            yield from pair(
                f"nope ({implementation})", partial(nope_attention, implementation=implementation), arrays, length
            )
        except ValueError as error:  # it says why it cannot serve this
            print(f"nope ({implementation}): {error}")


def jax_peers(length: int) -> Iterator[Contestant]:
    arrays = [jnp.asarray(x, settings()[2]) for x in inputs(length)]
    attention = partial(jax.nn.dot_product_attention, is_causal=True)
    if length <= MOST_WEIGHTS:
        yield from pair(JAX_NN, partial(attention, implementation="xla"), arrays, length)
    if jax.default_backend() == "gpu":
        yield from pair("jax.nn (cuDNN)", partial(attention, implementation="cudnn"), arrays, length)
    try:
        import tokamax
    except ImportError:
        return
    yield from pair("tokamax", partial(tokamax.dot_product_attention, is_causal=True), arrays, length)


def torch_peers(length: int) -> Iterator[Contestant]:
    if torch() is None:
        return
    heads, _, dtype = settings()
    arrays = [
        torch().tensor(x, dtype=getattr(torch(), dtype), device=torch_device()).transpose(1, 2).contiguous()
        for x in inputs(length)
    ]
    arrays = [x.requires_grad_() for x in arrays]
    functions: dict[str, Callable] = {
        TORCH: partial(torch().nn.functional.scaled_dot_product_attention, is_causal=True)
    }
    if torch_device() == "cuda":
        functions |= flex_attention(length, heads)
    for name, function in functions.items():

        def forward(function: Callable = function) -> Any:
            with torch().no_grad():
                return function(*arrays)

        def both(function: Callable = function) -> Any:
            out = function(*arrays)
            return torch().autograd.grad(out, arrays, torch().ones_like(out))

        for what, call, count in zip(WHAT, (forward, both), flops(length), strict=True):
            yield Contestant(name, call, torch_wait, what=what, flops=count)


def flex_attention(length: int, heads: int) -> dict[str, Callable]:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496), causal, without and with ALiBi's bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = torch().tensor(np.asarray(alibi_slopes(heads)), device="cuda")
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda")
    attention = torch().compile(flex_attention)

    def alibi(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score - slopes[h] * (q - k)

    return {
        "FlexAttention": partial(attention, block_mask=mask),
        "FlexAttention, alibi": partial(attention, score_mod=alibi, block_mask=mask),
    }


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    arguments = options.parse_args()
    heads, dim, dtype = settings()

    def measured() -> Iterator[dict[str, Any]]:
        for length in arguments.lengths:
            contestants = [*torch_peers(length), *jax_peers(length), *ours(length)]
            of = TORCH if torch() is not None else JAX_NN if length <= MOST_WEIGHTS else "nope"
            yield group(f"T = {length:,}, {heads} heads of {dim}, {dtype}", contestants, of, arguments.rounds, dtype)

    save("attention", measured(), arguments.out)


if __name__ == "__main__":
    main()
