"""Time of decoding on this machine: attention of one query against a KV cache, and tokens of a whole model.

    python -m benchmarks.decoding [--lengths 1024 8192 32768 131072] [--tokens 64] [--rounds 7] [--out FOLDER]

Attention, float32 and batch 1, is compared with `jax.nn` and, where it is installed, torch SDPA, all given keys [B,
length, heads, dim]; ratios are to `jax.nn`. "A tenth" is a cache filled to a tenth. A model of the shape of
SmolLM2-135M with random weights continues 512 tokens; it is compared with transformers where that is installed
(`pip install torch transformers`), as a whole and for the prompt with one token alone: the difference is that of
tokens - 1 steps. `benchmarks/measure.py` says how time is taken.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measure import Contestant, compiled, group, parser, save, torch, torch_device, torch_wait
from nope_jax import Decoder, ModelConfig, generate
from nope_jax.attention import alibi_attention, nope_attention
from nope_jax.encodings import RoPE

HEADS = [(32, 8, 128), (9, 3, 64), (8, 8, 64), (16, 1, 128)]
"""Query heads, key heads, head dim."""
PROMPT = 512


def attention(heads: tuple[int, int, int], length: int) -> Iterator[Contestant]:
    num_heads, kv_heads, dim = heads
    rng = np.random.default_rng(0)
    shapes = (1, 1, num_heads, dim), (1, length, kv_heads, dim), (1, length, kv_heads, dim)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    functions: dict[str, Callable] = {
        "jax.nn": jax.nn.dot_product_attention,
        "nope": nope_attention,
        "nope + entropy": partial(nope_attention, return_stats=True),
        "alibi": alibi_attention,
        "a tenth": partial(nope_attention, query_positions=jnp.array([length // 10])),
    }
    for name, function in functions.items():
        yield compiled(name, function, *(jnp.asarray(x) for x in arrays))
    if torch() is None:
        return
    query, key, value = (torch().tensor(x, device=torch_device()).transpose(1, 2) for x in arrays)

    def sdpa() -> Any:
        with torch().no_grad():
            grouped = num_heads != kv_heads
            return torch().nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    yield Contestant("torch SDPA", sdpa, torch_wait)


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


def transformers_call() -> Callable[[Any, int], Any] | None:
    """Continues a prompt by so many tokens with transformers, or None where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
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
    llama = LlamaForCausalLM(config).eval().to(torch_device())

    def continued(prompt: Any, count: int) -> Any:
        given = torch().tensor(prompt, device=torch_device())
        with torch().no_grad():
            return llama.generate(given, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    return continued


def generation(tokens: int) -> Iterator[Contestant]:
    """Continues a prompt, with all new tokens and with one."""
    prompt = np.random.default_rng(0).integers(0, 49_152, (1, PROMPT))
    calls: dict[str, tuple[Callable, Callable]] = {}
    for dtype in "float32", "bfloat16":
        model = smollm2(dtype)
        calls[f"nope_jax {dtype}"] = (
            lambda prompt, count, model=model: generate(model, prompt, count),
            jax.block_until_ready,
        )
    if torch() is not None and (continued := transformers_call()) is not None:
        calls["transformers float32"] = continued, torch_wait
    for count in 1, tokens:
        for name, (call, wait) in calls.items():
            what = "prompt and one token" if count == 1 else f"and {count} tokens"
            yield Contestant(name, partial(call, prompt, count), wait, what=what)


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--lengths", type=int, nargs="*", default=[1024, 8192, 32768, 131072])
    options.add_argument("--tokens", type=int, default=64, help="new tokens of the whole model; 0 leaves it out")
    arguments = options.parse_args()

    def measured() -> Iterator[dict[str, Any]]:
        for heads in HEADS:
            for length in arguments.lengths:
                title = "{} query heads, {} key heads of {}".format(*heads) + f", S = {length:,}"
                yield group(title, attention(heads, length), "jax.nn", arguments.rounds, "float32")
        if arguments.tokens:
            title = f"SmolLM2-135M's shape, {PROMPT} tokens continued"
            yield group(title, generation(arguments.tokens), "nope_jax float32", arguments.rounds, "float32")

    save("decoding", measured(), arguments.out)


if __name__ == "__main__":
    main()
