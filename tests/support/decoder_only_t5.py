"""McGill-NLP's decoder-only T5 a second time, in torch, from reading its code (length-generalization,
src/models/custom_t5_decoder_only.py)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional


def slopes(heads: int) -> list[float]:
    if not math.log2(heads).is_integer():
        below = 2 ** math.floor(math.log2(heads))
        return slopes(below) + slopes(2 * below)[::2][: heads - below]
    return [2 ** (-8 / heads * (i + 1)) for i in range(heads)]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


class DecoderOnlyT5(nn.Module):
    """The parameters by the names of theirs, and a forward pass without dropout or cache."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = settings
        d, f, v = settings["d_model"], settings["d_ff"], settings["vocab_size"]
        inner = settings["num_heads"] * settings["d_kv"]
        forward = settings.get("feed_forward_proj", "relu")
        self.gated, self.act = forward.startswith("gated"), forward.rpartition("-")[2]
        ups = ("wi_0", "wi_1") if self.gated else ("wi",)
        shapes = {"shared.weight": (v, d), "decoder.final_layer_norm.weight": (d,)}
        for i in range(settings["num_layers"]):
            start = f"decoder.block.{i}.layer"
            for part in ("q", "k", "v"):
                shapes[f"{start}.0.SelfAttention.{part}.weight"] = inner, d
            shapes[f"{start}.0.SelfAttention.o.weight"] = d, inner
            shapes |= {f"{start}.{part}.layer_norm.weight": (d,) for part in (0, 2)}
            shapes |= {f"{start}.2.DenseReluDense.{up}.weight": (f, d) for up in ups}
            shapes[f"{start}.2.DenseReluDense.wo.weight"] = d, f
        if settings["position_encoding_type"] == "t5_relative_bias":
            buckets = settings["relative_attention_num_buckets"], settings["num_heads"]
            shapes["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = buckets
        if not settings["tie_word_embeddings"]:
            shapes["lm_head.weight"] = v, d
        self.own = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return self.own.items()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.settings.get("layer_norm_epsilon", 1e-6)
        return self.own[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, ids: torch.Tensor, use_cache: bool = False, attention_mask: Any = None, position_ids: Any = None):
        own, settings = self.own, self.settings
        rows, length = ids.shape
        seen = torch.ones(rows, length) if attention_mask is None else attention_mask.float()
        positions = torch.arange(length).expand(rows, -1) if position_ids is None else position_ids
        x = own["shared.weight"][ids]
        mask = torch.full((length, length), -1e9).triu(1) + (1 - seen)[:, None, None, :] * -1e9
        for i in range(settings["num_layers"]):
            start = f"decoder.block.{i}.layer"
            x = x + self.attention(self.norm(x, f"{start}.0.layer_norm"), f"{start}.0.SelfAttention", mask, positions)
            x = x + self.dense(self.norm(x, f"{start}.2.layer_norm"), f"{start}.2.DenseReluDense")
        x = self.norm(x, "decoder.final_layer_norm")
        if settings["tie_word_embeddings"]:
            return SimpleNamespace(logits=x * settings["d_model"] ** -0.5 @ own["shared.weight"].T)
        return SimpleNamespace(logits=x @ own["lm_head.weight"].T)

    def attention(self, x: torch.Tensor, name: str, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            (x @ self.own[f"{name}.{part}.weight"].T).view(rows, length, self.settings["num_heads"], -1)
            for part in ("q", "k", "v")
        )
        kind = self.settings["position_encoding_type"]
        if kind == "rotary":
            q, k = self.turned(q, positions), self.turned(k, positions)
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) + mask  # neither divided by the square root of the head's size
        if kind == "alibi":
            scores = scores + torch.tensor(slopes(q.shape[2]))[:, None, None] * positions[:, None, None, :]
        if kind == "t5_relative_bias":
            scores = scores + self.bias(positions[:, :, None] - positions[:, None, :])
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).reshape(rows, length, -1)
        return out @ self.own[f"{name}.o.weight"].T

    def bias(self, distances: torch.Tensor) -> torch.Tensor:
        count, longest = (self.settings[f"relative_attention_{name}"] for name in ("num_buckets", "max_distance"))
        exact, distances = count // 2, distances.clamp(min=0)
        far = torch.log(distances.clamp(min=1) / exact) / math.log(longest / exact) * (count - exact)
        buckets = torch.where(distances < exact, distances, (exact + far.long()).clamp(max=count - 1))
        table = self.own["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[buckets].permute(0, 3, 1, 2)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = int(0.25 * x.shape[-1])
        angles = positions[..., None, None] * 10_000 ** (-torch.arange(0, size, 2) / size)
        even, odd = x[..., :size:2], x[..., 1:size:2]
        both = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
        return torch.cat([torch.stack(both, -1).flatten(-2), x[..., size:]], -1)

    def dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
        def linear(x: torch.Tensor, part: str) -> torch.Tensor:
            return x @ self.own[f"{name}.{part}.weight"].T

        act = {"relu": functional.relu, "silu": functional.silu, "gelu_new": _gelu}[self.act]
        hidden = act(linear(x, "wi_0")) * linear(x, "wi_1") if self.gated else act(linear(x, "wi"))
        return linear(hidden, "wo")

    def save_pretrained(self, folder: Path) -> None:
        """As theirs is saved: with cross-attention and T5's buckets, which nothing reads."""
        d = self.settings["d_model"]
        unused = {
            "decoder.embed_tokens.weight": self.own["shared.weight"].detach().clone(),
            "decoder.block.0.layer.1.EncDecAttention.q.weight": torch.ones(d, d),
            "decoder.block.0.layer.1.layer_norm.weight": torch.ones(d),
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(8, 4),
        }
        save_file(
            {**{name: value.detach() for name, value in self.own.items()}, **unused}, folder / "model.safetensors"
        )
        settings = {**self.settings, "architectures": ["CustomDecoderOnlyT5"], "auto_map": {"AutoConfig": "own.py"}}
        (folder / "config.json").write_text(json.dumps(settings))

    @classmethod
    def from_pretrained(cls, folder: Path) -> tuple["DecoderOnlyT5", dict[str, set[str]]]:
        model = cls(json.loads((folder / "config.json").read_text()))
        found = load_file(folder / "model.safetensors")
        missing, unexpected = model.own.keys() - found.keys(), found.keys() - model.own.keys()
        for name in model.own.keys() & found.keys():
            model.own[name].data.copy_(found[name])
        return model, {"missing_keys": missing, "unexpected_keys": unexpected}
