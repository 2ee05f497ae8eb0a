"""Time of a training step on this machine, beside the same decoder in torch.

    python -m benchmarks.train_step [--size small|gpt2] [--peers torch torch.compile] [--rounds 7] [--out FOLDER]

The decoder has RMSNorm, gated MLPs and no positional encoding; a step is loss, gradient, clipping by the global norm
and AdamW, in float32 and with bfloat16 products on float32 parameters (in torch under autocast). torch runs as it is
and compiled (`torch.compile`), with its fused AdamW; ours by policy of rematerialization. Ratios are to torch as it is,
or to ours without torch.
FLOPs are those of the model, `nope_jax.training.flops`. `benchmarks/measure.py` says how time is taken.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Contestant, group, parser, save, torch, torch_device, torch_wait
from nope_jax.config import Config, DataConfig, ModelConfig, override
from nope_jax.data import Batch
from nope_jax.sharding import make_mesh
from nope_jax.training.flops import model_flops_per_token
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import abstract_state, init_state
from nope_jax.training.step import jit_train_step, step_settings

SIZES = {
    "small": Config(
        model=ModelConfig(vocab_size=1024, num_layers=4, num_heads=4, model_dim=256),
        data=DataConfig(context_length=512, batch_size=2),
    ),
    "gpt2": Config(
        model=ModelConfig(vocab_size=50_304, num_layers=12, num_heads=12, model_dim=768),
        data=DataConfig(context_length=1024, batch_size=16),
    ),
}
DTYPES = "float32", "bfloat16"


def batch_of(config: Config) -> Batch:
    shape = config.data.batch_size, config.data.context_length + 1
    tokens = np.random.default_rng(0).integers(0, config.model.num_tokens, shape, np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def ours(name: str, config: Config, what: str = "") -> Contestant:
    """A compiled training step, which goes on from its own state."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(config, optimizer, mesh)
        batch = jax.device_put(batch_of(config))
        jitted = jit_train_step(graphdef, optimizer, abstract, **step_settings(config))
        step = jitted.lower(abstract, batch, 0).compile()
        kept = [init_state(config, optimizer, abstract)]

    def call() -> Any:
        kept[0], metrics = step(kept[0], batch, 0)
        return metrics

    flops = model_flops_per_token(config) * config.data.batch_size * config.data.context_length
    memory = step.memory_analysis()
    return Contestant(name, call, what=what, flops=flops, temporaries=memory and memory.temp_size_in_bytes)


def torch_decoder(model: ModelConfig) -> Any:
    """The same decoder as a torch module."""
    nn, functional = torch().nn, torch().nn.functional
    width, heads = model.model_dim, model.num_heads

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6) for _ in range(2)])
            self.query_key_value = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.gate_up = nn.Linear(width, 2 * model.mlp_size, bias=False)
            self.down = nn.Linear(model.mlp_size, width, bias=False)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            projected = self.query_key_value(self.norms[0](x)).view(batch, length, 3, heads, -1)
            query, key, value = projected.permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
            gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * up)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(model.num_tokens, width)
            self.layers = nn.ModuleList([Layer() for _ in range(model.num_layers)])
            self.norm = nn.RMSNorm(width, eps=1e-6)
            self.head = nn.Linear(width, model.num_tokens, bias=False)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = layer(x)
            logits = self.head(self.norm(x))
            return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Decoder()


PEERS: dict[str, Callable] = {
    "torch": lambda decoder: decoder,
    "torch.compile": lambda decoder: torch().compile(decoder),
}
"""What runs in torch, by name."""


def torch_peers(config: Config, names: list[str]) -> Iterator[Contestant]:
    if torch() is None:
        return
    device, flops = torch_device(), model_flops_per_token(config) * batch_of(config).tokens.size
    tokens, targets = (torch().tensor(x, dtype=torch().long, device=device) for x in batch_of(config)[:2])
    autocast = config.model.dtype == "bfloat16"
    for name in names:

        def step(prepare: Callable = PEERS[name]) -> Callable[[], Any]:
            decoder = torch_decoder(config.model).to(device)
            loss_of = prepare(decoder)
            rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
            optimizer = torch().optim.AdamW(
                decoder.parameters(), rate, betas=(0.9, 0.95), weight_decay=decay, fused=True
            )

            def call() -> Any:
                with torch().autocast(device, torch().bfloat16, enabled=autocast):
                    loss = loss_of(tokens, targets)
                loss.backward()
                torch().nn.utils.clip_grad_norm_(decoder.parameters(), config.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            return call

        yield Contestant(name, step(), torch_wait, flops=flops)


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--size", choices=SIZES, default="small" if jax.default_backend() == "cpu" else "gpt2")
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    arguments = options.parse_args()
    config = SIZES[arguments.size]
    model, data = config.model, config.data

    def measured() -> Iterator[dict[str, Any]]:
        for dtype in DTYPES:
            of_dtype = override(config, {"model.dtype": dtype})
            contestants = [*torch_peers(of_dtype, arguments.peers), ours("nope_jax", of_dtype)]
            contestants += [
                ours(f"nope_jax, remat {p}", override(of_dtype, {"model.remat": p})) for p in ("dots", "full")
            ]
            shape = f"{model.num_layers} layers of {model.model_dim}, V = {model.vocab_size:,}"
            title = f"{dtype}, {shape}, {data.batch_size} rows of {data.context_length:,}"
            yield group(title, contestants, contestants[0].name, arguments.rounds, dtype)

    save("train_step", measured(), arguments.out)


if __name__ == "__main__":
    main()
