"""Runs of a tiny decoder over eight devices of one CPU, in a process of their own: JAX counts its devices once.

`results(mesh, ...)` is called from tests; this file is also what it runs.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def results(function: str, *arguments: Any) -> Any:
    """What a function of this module returns in a process with eight devices, and what XLA wrote to its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results")
        path.write_bytes(pickle.dumps((function, arguments)))
        flags = f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-W", "error", __file__, str(path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return pickle.loads(path.read_bytes()), done.stderr


def config(mesh: dict[str, Any], model: dict[str, Any], accumulation: int, optimizer: str = "adamw"):
    from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig

    sizes = {"vocab_size": 64, "num_layers": 3, "num_heads": 4, "model_dim": 16, "mlp_dim": 24}
    return Config(
        model=ModelConfig(**(sizes | model)),
        data=DataConfig(context_length=32, batch_size=16),
        optimizer=OptimizerConfig(optimizer, learning_rate=1e-2, warmup_steps=1, accumulation=accumulation),
        mesh=MeshConfig(**mesh),
    )


def train_steps(cases: list[tuple], steps: int, workdir: str | None = None) -> list[dict[str, Any]]:
    """For each case, the arguments of `config`: the compiled step, and the state after so many of them.

    Batches are the same in all of them, and the last is validated. The last state is saved in `workdir`.
    """
    import jax
    import numpy as np

    from nope_jax.checkpoint import Checkpointer
    from nope_jax.data import Batch
    from nope_jax.sharding import make_mesh, place_batch
    from nope_jax.training.optimizer import make_optimizer
    from nope_jax.training.state import abstract_state, init_state
    from nope_jax.training.step import jit_train_step, jit_validation, step_settings

    def by_name(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    draw, found = np.random.default_rng(0), []
    tokens = draw.integers(0, 64, (steps, 16, 33), np.int32)
    for mesh_sizes, *others in cases:
        run = config(mesh_sizes, *others)
        sizes = [size for axis, size in mesh_sizes.items() if axis != "rules"]
        mesh = make_mesh(run.mesh, jax.devices()[: int(np.prod(sizes))])
        optimizer = make_optimizer(run.optimizer, steps)
        with jax.set_mesh(mesh):
            graphdef, abstract = abstract_state(run, optimizer, mesh)
            batches = [place_batch(Batch(rows[:, :-1], rows[:, 1:]), mesh) for rows in tokens]
            jitted = jit_train_step(graphdef, optimizer, abstract, **step_settings(run))
            step = jitted.lower(abstract, batches[0], 0).compile()
            state, losses = init_state(run, optimizer, abstract), []
            for batch in batches:
                state, metrics = step(state, batch, 0)
                losses.append(float(metrics["loss"]))
            own = {name: array.addressable_shards[0].data.shape for name, array in by_name(state).items()}
            case = {
                "text": step.as_text(),
                "shapes": {name: array.shape for name, array in by_name(abstract).items()},
                "own_shapes": {name: a.sharding.shard_shape(a.shape) for name, a in by_name(abstract).items()},
                "losses": losses,
                "validation": float(jit_validation(graphdef, run.optimizer.accumulation)(state.params, batches[-1])),
                "state": jax.tree.map(np.asarray, by_name(state)),
            }
            assert own == case["own_shapes"]
            found.append(case)
    if workdir is not None:
        with Checkpointer(workdir) as checkpointer:
            checkpointer.save(steps, state.trees())
    return found


def evaluated(lines: list[str]) -> list[int]:
    """The exit status of `python eval.py` with each of these lines of words."""
    import importlib.util
    import shlex

    from nope_jax.cli import run

    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "eval.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    statuses = []
    for line in lines:
        sys.argv = ["eval.py", *shlex.split(line)]
        statuses.append(run(script.main))
    return statuses


if __name__ == "__main__":
    path = Path(sys.argv[1])
    function, arguments = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(globals()[function](*arguments)))
