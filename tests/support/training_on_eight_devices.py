"""Training over a mesh takes the steps of one device, and moves what its axes mean: run by test_eight_devices.py."""

import contextlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from nope_jax import Decoder
from nope_jax.checkpoint import Checkpointer
from nope_jax.compile.collectives import Collective, collectives
from nope_jax.config import MeshConfig
from nope_jax.data import Batch
from nope_jax.models import decoder, generate
from nope_jax.sharding import AXES, make_mesh
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import TrainState, abstract_state
from nope_jax.training.step import total_nll
from tests.support.eight_devices import config, train_steps


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """That two runs took the same steps, up to the order in which float32 numbers are added."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
    np.testing.assert_allclose(found["validation"], expected["validation"], rtol=1e-6)
    assert found["state"].keys() == expected["state"].keys()
    for name, array in expected["state"].items():
        tolerance = 2e-6 * max(1e-3, np.abs(array).max())
        if name.startswith(
            ".params"
        ):  # Adam moves them by the learning rate however small a gradient, and its rounding
            tolerance = max(tolerance, 1e-4 * 1e-2)
        np.testing.assert_allclose(found["state"][name], array, atol=tolerance, err_msg=name)


def kernels(run: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are split, by name."""
    return {
        name: shape
        for name, shape in run["shapes"].items()
        if name.startswith(".params") and "norm" not in name and "positions" not in name
    }


def assert_split(run: dict[str, Any], *, parameters: int, moments: int) -> None:
    """That so many devices share the kernels, and the moments of them; of anything else each has all."""
    for name, shape in run["shapes"].items():
        of_kernel = any(name.endswith(kernel.removeprefix(".params")) for kernel in kernels(run))
        num_shards = (parameters if name.startswith(".params") else moments) if of_kernel else 1
        assert math.prod(run["own_shapes"][name]) == math.prod(shape) / num_shards, name


def moved(found: list[Collective], kind: str, mesh: dict[str, int], *along: str, loops: int = 0) -> Counter[int]:
    """Of collectives of a kind and along these axes: how often arrays of so many numbers, but for vectors."""
    numbers: Counter[int] = Counter()
    for one in found:
        if one.kind == kind and one.mesh_axes(mesh) == along and one.loops == loops:
            shapes = [[int(size) for size in shape.split("[")[1][:-1].split(",") if size] for shape in one.shapes]
            numbers.update(math.prod(shape) for shape in shapes if len(shape) > 1)
    return numbers


MESH = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
GROUPED = {"num_kv_heads": 2, "num_layers": 2}


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """What XLA, which is not Python, writes meanwhile."""
    written: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            written.append(file.read())


@pytest.fixture(scope="module")
def eight_and_one() -> tuple[dict[str, Any], dict[str, Any], str]:
    """Two steps on eight devices, the same on one, and what XLA wrote."""
    with complaints() as written:
        (run,) = train_steps([(MESH, GROUPED, 1)], 2)
    (one,) = train_steps([({"data": 1}, GROUPED, 1)], 2)
    return run, one, *written


def test_eight_devices_take_the_steps_of_one(eight_and_one):
    run, one, _ = eight_and_one
    assert_same(run, one)


def test_one_device_reads_what_eight_save(tmp_path):
    """An array split over all and one that all have."""
    specs = PartitionSpec(("data", "fsdp"), "tensor"), PartitionSpec()
    mesh, arrays = make_mesh(MeshConfig(**MESH)), np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"params": spread})
    one = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=SingleDeviceSharding(jax.devices()[3]))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        step, trees = checkpointer.restore({"params": [one, one]})
    assert step == 2 and [array.sharding for array in trees["params"]] == [one.sharding] * 2
    np.testing.assert_array_equal(trees["params"], arrays)


@pytest.mark.slow
def test_one_device_goes_on_from_a_run_that_eight_save(tmp_path):
    (run,) = train_steps([(MESH, GROUPED, 1)], 2, str(tmp_path))
    settings = config({"data": 1}, GROUPED, 1)
    _, abstract = abstract_state(
        settings, make_optimizer(settings.optimizer, 2), make_mesh(settings.mesh, jax.devices()[:1])
    )
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        step, trees = checkpointer.restore(abstract.trees())
    restored = jax.tree_util.tree_leaves_with_path(TrainState(**trees))
    assert step == 2 and all(array.sharding.num_devices == 1 for _, array in restored)
    for path, array in restored:
        np.testing.assert_array_equal(array, run["state"][jax.tree_util.keystr(path)])


def test_a_step_moves_what_fsdp_and_tensor_parallelism_mean(eight_and_one):
    run, _, written = eight_and_one
    assert "Involuntary full rematerialization" not in written
    assert_split(run, parameters=4, moments=4)
    found = collectives(run["text"])
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert len(layers) == 7
    assert len(tables) == 2
    # Parameters: a layer's at a time, forward and backward, and never a stack of them; the two tables once.
    gathered = moved(found, "all-gather", MESH, "fsdp", loops=1)
    assert gathered == Counter(size // 2 for size in layers) + Counter(size // 2 for size in layers)
    assert moved(found, "all-gather", MESH, "fsdp") == Counter(size // 2 for size in tables)
    # Gradients: summed over the devices that have other rows, and from there on each keeps its part.
    assert moved(found, "all-reduce", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers)
    assert moved(found, "all-reduce", MESH, "data", loops=1) == Counter(size // 4 for size in layers)
    # Activations: the outputs of attention and MLP [B/4, T, D], and the gradients of their inputs.
    assert set(moved(found, "all-reduce", MESH, "tensor", loops=1)) == {16 // 4 * 32 * 16}
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}
    assert {one.times for one in found if one.loops} == {2}


@pytest.mark.slow
def test_a_loss_in_chunks_is_that_of_one_device_and_gathers_neither_rows_nor_vocabulary(monkeypatch):
    """Each device has the logits of 16 of its 128 or 64 tokens at a time."""
    sequence = {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2}
    cases = [({"data": 1}, GROUPED, 1), (MESH, GROUPED, 1), (sequence, GROUPED, 1)]
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", 16 * 32)
    with complaints() as written:
        one, run, spread = train_steps(cases, 2)
    assert "Involuntary full rematerialization" not in written[0]
    for other in run, spread:
        assert_same(other, one)
    found = collectives(run["text"])
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert {one.times for one in found if one.loops} == {2, 8}
    # The head is gathered once, and its gradient summed once: loops over layers or chunks move what the layers do,
    assert moved(found, "all-gather", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers * 2)
    assert moved(found, "all-gather", MESH, "fsdp") == Counter(size // 2 for size in tables)
    assert moved(found, "all-reduce", MESH, "fsdp", loops=1) == Counter(size // 2 for size in layers)
    assert moved(found, "all-reduce", MESH, "data", loops=1) == Counter(size // 4 for size in layers)
    # and, between the devices that share the vocabulary, gradients of a chunk's hidden states and a number per token.
    assert set(moved(found, "all-reduce", MESH, "tensor", loops=1)) == {16 // 4 * 32 * 16, 16 * 16, 16}
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}


@pytest.fixture(scope="module")
def on_other_meshes() -> tuple[dict[str, list[dict[str, Any]]], str]:
    """By kind of model: its run on one device, and those on other meshes."""
    learned, deep = {"encoding": "kerple", "num_layers": 2}, {**GROUPED, "num_layers": 3}
    runs = {
        "deep": [
            ({"data": 1}, deep, 1),
            (MESH, deep, 1),
            ({"data": 8}, deep, 1),
            ({"data": 1, "fsdp": 8}, deep, 1),
            ({"data": 1, "fsdp": 4, "tensor": 2, "rules": "zero1"}, deep, 1),
            ({"data": 2, "fsdp": 4}, deep, 2),
        ],
        "learned": [
            ({"data": 1}, learned, 1),
            ({"data": 2, "tensor": 4}, learned, 1),
            ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, learned, 1),
        ],
        "muon": [
            ({"data": 1}, deep, 1, "muon"),
            (MESH, deep, 1, "muon"),
        ],
        "adafactor": [
            ({"data": 1}, deep, 1, "adafactor"),
            (MESH, deep, 1, "adafactor"),
        ],
    }
    with complaints() as written:
        rest = iter(train_steps([case for cases in runs.values() for case in cases], 3))
    return {kind: [next(rest) for _ in cases] for kind, cases in runs.items()}, *written


@pytest.mark.slow
def test_other_meshes_take_the_steps_of_one_device(on_other_meshes):
    runs, written = on_other_meshes
    for one, *others in runs.values():
        for other in others:
            assert_same(other, one)
    assert "Involuntary full rematerialization" not in written


@pytest.mark.slow
def test_data_parallelism_only_sums_gradients(on_other_meshes):
    _, _, run, *_ = on_other_meshes[0]["deep"]
    found, mesh = collectives(run["text"]), {"data": 8}
    assert {one.kind for one in found} == {"all-reduce"}
    layers = [math.prod(shape[1:]) for name, shape in kernels(run).items() if "blocks" in name]
    assert moved(found, "all-reduce", mesh, "data", loops=1) == Counter(layers)
    tables = [math.prod(shape) for name, shape in kernels(run).items() if "blocks" not in name]
    assert moved(found, "all-reduce", mesh, "data") == Counter(tables)


@pytest.mark.slow
def test_zero1_gathers_its_parameters_once_a_step(on_other_meshes):
    *_, run, _ = on_other_meshes[0]["deep"]
    found, mesh = collectives(run["text"]), {"fsdp": 4, "tensor": 2}
    assert moved(found, "all-gather", mesh, "fsdp") == Counter(math.prod(shape) // 2 for shape in kernels(run).values())
    assert not moved(found, "all-gather", mesh, "fsdp", loops=1)
    assert_split(run, parameters=2, moments=8)


def in_context(axis_types: list[str | None], model: dict[str, Any]) -> list[dict[str, Any]]:
    """For each type of axes, None being one device: loss, its gradient, logits and what else a decoder gives."""
    graphdef, params = nnx.split(Decoder(config({}, model, 1).model, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    found = []
    for axis_type in axis_types:
        devices = 1 if axis_type is None else 8
        shape = (1, 1, 1, 1) if axis_type is None else (2, 2, 2, 1)
        types = (AxisType[axis_type or "Auto"],) * 4
        with jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[:devices])):
            loss, gradient = jax.jit(jax.value_and_grad(lambda p: total_nll(graphdef, p, batch)))(params)
            model_ = nnx.merge(graphdef, params)
            logits, stats = jax.jit(lambda m: m(batch.tokens, return_stats=True))(model_)
            nll = jax.jit(lambda m: m.nll(m.hidden(batch.tokens)[0], batch.targets))(model_)
            decoded, _ = jax.jit(lambda m: m.decode_step(batch.tokens, m.init_cache(*batch.tokens.shape)))(model_)
            arrays = {"loss": loss, "logits": logits, "stats": stats, "nll": nll, "decoded": decoded}
            arrays["generated"] = generate(model_, batch.tokens, 3)
            found.append(jax.tree.map(np.asarray, arrays | {"gradient": dict(enumerate(jax.tree.leaves(gradient)))}))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "logits_at_once"),
    [({"num_kv_heads": 2}, 64 * 64), ({"num_kv_heads": 2}, 64 * 4), ({"encoding": "kerple"}, 64 * 64)],
)
def test_auto_and_explicit_axes_give_the_numbers_of_one_device(monkeypatch, model, logits_at_once):
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", logits_at_once)
    one, *others = in_context([None, "Auto", "Explicit"], {**model, "num_layers": 2})
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max())), other, one)
