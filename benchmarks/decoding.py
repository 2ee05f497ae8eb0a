"""Time of a step of decoding on this machine: attention of one query against a KV cache, and tokens of a whole model.

    python -m benchmarks.decoding [--lengths 1024 8192 32768 131072] [--rounds 7] [--tokens 64]

All implementations run in turn, round after round, in one process, so a slowdown of the machine affects all of them. A
ratio is the median over rounds of the time divided by that of the first row in the same round. float32, batch 1.
Attention is compared with `jax.nn` (and torch SDPA where torch is installed), all given keys [B, length, heads, dim].
"A tenth" is a cache filled to a tenth. A model of the shape of SmolLM2-135M with random weights
continues 512 tokens; it is compared with transformers, on two threads, where that is installed
(`pip install torch transformers`).
"""

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from nope_jax import Decoder, ModelConfig, generate
from nope_jax.attention import alibi_attention, nope_attention
from nope_jax.encodings import RoPE

HEADS = [(32, 8, 128), (9, 3, 64), (8, 8, 64), (16, 1, 128)]
"""Query heads, key heads, head dim."""
PROMPT = 512


def median_times(contestants: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and the ratio to the first, by name."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round in range(rounds + 1):  # the first warms up
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if round:
                times[name].append(time.perf_counter() - start)
    own = {name: np.array(taken) for name, taken in times.items()}
    base = next(iter(own.values()))
    return {name: (float(np.median(x)) * 1e3, float(np.median(x / base))) for name, x in own.items()}


def attention_calls(heads: tuple[int, int, int], length: int) -> dict[str, Callable]:
    num_heads, kv_heads, dim = heads
    rng = np.random.default_rng(0)
    shapes = (1, 1, num_heads, dim), (1, length, kv_heads, dim), (1, length, kv_heads, dim)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    inputs = [jnp.asarray(x) for x in arrays]
    functions = {
        "jax.nn": jax.nn.dot_product_attention,
        "nope": nope_attention,
        "nope + entropy": partial(nope_attention, return_stats=True),
        "alibi": alibi_attention,
        "a tenth": partial(nope_attention, query_positions=jnp.array([length // 10])),
    }
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    calls: dict[str, Callable] = {
        name: lambda f=function: jax.block_until_ready(f(*inputs)) for name, function in jitted.items()
    }
    try:
        import torch
    except ImportError:
        return calls
    query, key, value = (torch.tensor(x).transpose(1, 2) for x in arrays)

    def sdpa():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=num_heads != kv_heads)

    return calls | {"torch SDPA": sdpa}


def smollm2(dtype: str) -> Decoder:
    config = ModelConfig(
        vocab_size=49_152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        model_dim=576,
        mlp_dim=1_536,
        tie_embeddings=True,
        encoding=RoPE(base=1e5),
        dtype=dtype,
    )

    @nnx.jit
    def build():
        structure, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        return nnx.merge(structure, jax.tree.map(lambda x: x.astype(dtype), state))

    return build()


def generation_calls(tokens: int) -> dict[str, Callable]:
    """Calls that continue a prompt, with all `tokens` new tokens and, "prompt", with one."""
    prompt = np.random.default_rng(0).integers(0, 49_152, (1, PROMPT))
    calls: dict[str, Callable] = {}
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        pass
    else:
        torch.set_num_threads(2)
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1_536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=1e5,
            tie_word_embeddings=True,
            max_position_embeddings=8_192,
        )
        llama, given = LlamaForCausalLM(config).eval(), torch.tensor(prompt)

        def continued(count: int) -> Any:
            with torch.no_grad():
                return llama.generate(
                    given, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
                )

        calls = {"transformers, prompt": partial(continued, 1), "transformers": partial(continued, tokens)}
    for dtype in "float32", "bfloat16":
        model = smollm2(dtype)

        def ours(count: int, model: Decoder = model) -> Any:
            return jax.block_until_ready(generate(model, prompt, count))

        calls |= {f"nope_jax {dtype}, prompt": partial(ours, 1), f"nope_jax {dtype}": partial(ours, tokens)}
    return calls


def table(title: str, times: dict[str, tuple[float, float]]) -> Table:
    drawn = Table(title=title)
    for column in "", "ms", "ratio":
        drawn.add_column(column, justify="right" if column else "left")
    for name, (milliseconds, ratio) in times.items():
        drawn.add_row(name, f"{milliseconds:.2f}", f"{ratio:.2f}")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of the whole model; 0 leaves it out")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"jax {importlib.metadata.version('jax')} on {jax.devices()[0].device_kind}")
    for heads in HEADS:
        for length in arguments.lengths:
            title = "{} query heads, {} key heads of {}".format(*heads) + f", S = {length:,}"
            console.print(table(title, median_times(attention_calls(heads, length), arguments.rounds)))
    if not arguments.tokens:
        return
    calls, rates = generation_calls(arguments.tokens), {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(arguments.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round:
                times[name].append(time.perf_counter() - start)
    names = [name for name in calls if not name.endswith("prompt")]
    for name in names:
        rates[name] = (arguments.tokens - 1) / (np.array(times[name]) - np.array(times[f"{name}, prompt"]))
    drawn = Table(title=f"SmolLM2-135M's shape, {PROMPT} tokens continued by {arguments.tokens}")
    for column in "", "prompt ms", "tokens/s", "ratio":
        drawn.add_column(column, justify="right" if column else "left")
    for name in names:
        rate, ratio = np.median(rates[name]), np.median(rates[name] / rates[names[0]])
        drawn.add_row(name, f"{np.median(times[f'{name}, prompt']) * 1e3:.0f}", f"{rate:.1f}", f"{ratio:.2f}")
    console.print(drawn)


if __name__ == "__main__":
    main()
