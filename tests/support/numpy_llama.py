"""A Llama forward pass a second time, in NumPy, straight from a GGUF file's tensors by the package `gguf`.

Nothing here imports nope_jax or JAX. Queries and keys stay as llama.cpp stores them, and are rotated by pairs of
neighbours (interleaved), where the package permutes them and rotates halves.

    python -m tests.support.numpy_llama FILE.gguf TOKENS.npy      # mean loss, nats per token
"""

import sys

import numpy as np


def nll(path: str, tokens: np.ndarray) -> np.ndarray:
    """The negative log-likelihood of each token but the first, given all before it; nats, float32 throughout."""
    import gguf

    reader = gguf.GGUFReader(path)

    def setting(name):
        return reader.fields[f"llama.{name}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name):
        tensor = tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).astype(np.float32)

    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    eps, base = setting("attention.layer_norm_rms_epsilon"), setting("rope.freq_base")
    length = len(tokens)
    embedding = weight("token_embd.weight")
    dim = embedding.shape[1] // heads

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * scale

    angles = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))

    def turn(x):
        first, second = x[..., 0::2], x[..., 1::2]
        return np.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)

    x = embedding[tokens]
    hidden = np.tril(np.ones((length, length), bool))
    for layer in range(setting("block_count")):
        start = f"blk.{layer}."
        read = norm(x, weight(f"{start}attn_norm.weight"))
        query, key, value = ((read @ weight(f"{start}attn_{name}.weight").T).reshape(length, -1, dim) for name in "qkv")
        query, key = turn(query), turn(key)
        out = np.empty_like(query)
        for head in range(heads):
            of_keys = head * kv_heads // heads
            logits = np.where(hidden, query[:, head] @ key[:, of_keys].T / np.float32(dim**0.5), -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[:, head] = weights @ value[:, of_keys] / weights.sum(-1, keepdims=True)
        x = x + out.reshape(length, -1) @ weight(f"{start}attn_output.weight").T
        read = norm(x, weight(f"{start}ffn_norm.weight"))
        gate = read @ weight(f"{start}ffn_gate.weight").T
        gated = gate / (1 + np.exp(-gate)) * (read @ weight(f"{start}ffn_up.weight").T)
        x = x + gated @ weight(f"{start}ffn_down.weight").T
    x = norm(x, weight("output_norm.weight"))
    head = weight("output.weight") if "output.weight" in tensors else embedding
    losses = []
    for rows, targets in zip(np.array_split(x[:-1], 8), np.array_split(tokens[1:], 8), strict=True):
        logits = rows @ head.T
        largest = logits.max(-1, keepdims=True)
        logsumexp = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
        losses.append(logsumexp - logits[np.arange(len(targets)), targets])
    return np.concatenate(losses)


if __name__ == "__main__":
    print(nll(sys.argv[1], np.load(sys.argv[2])).mean())
