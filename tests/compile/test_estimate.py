"""Compiling for a slice that is not there: its names and refusals, the arithmetic of the estimate, and one real one."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import pods
from nope_jax.cli import parse_train, run
from nope_jax.compile import program, tpu
from nope_jax.compile import report as reports
from nope_jax.compile.collectives import Collective
from nope_jax.compile.estimate import Estimate, find_machine
from nope_jax.compile.machine import Computing, Traffic
from nope_jax.compile.memory import DoesNotFitError, Memory, compiled, memory_of
from nope_jax.compile.report import describe
from nope_jax.compile.tpu import SLICES, cycles
from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_file, override
from nope_jax.data import Batch
from nope_jax.models import abstract_decoder
from nope_jax.sharding import AXES, check_fits, make_mesh
from nope_jax.training.flops import CHIPS, model_flops_per_token
from nope_jax.training.step import total_nll

ROOT = Path(__file__).parents[2]


# The configs that fit real work


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The published sizes: TinyLlama's, SmolLM3's, and T5's decoder without cross-attention or biases of distance.
        ("nope_1b", 1_100_048_384),
        ("smollm3_3b", 3_075_098_624),
        ("t5_base_decoder", 32_128 * 768 + 12 * (4 * 768 * 768 + 2 * 768 * 3072 + 2 * 768) + 768),
        # GPT-2's 124,439,808 without its positions (1024 rows) and biases, with 47 rows of padding.
        ("gpt2", 124_439_808 - 1024 * 768 - 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) - 768 + 47 * 768),
        # The same size in the shapes of others: per layer attention, MLP, biases, norms.
        ("bloom_style", 50_304 * 768 + 12 * (4 * 768**2 + 8 * 768**2 + (4 + 4 + 1) * 768 + 4 * 768) + 4 * 768),
        ("mpt_style", 50_304 * 768 + 12 * (4 * 768**2 + 8 * 768**2 + 2 * 768) + 768),
        ("llama_style", 2 * 50_304 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768),
        ("palm_style", 50_304 * 768 + 12 * (2 * 768**2 + 2 * 768 * 64 + 3 * 768 * 3072 + 768) + 768),
    ],
)
def test_configs_have_the_parameters_of_their_papers(name, expected):
    config = load_file(ROOT / f"configs/{name}.py")
    model = abstract_decoder(config.model)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model))) == expected
    assert (config.data.batch_size * config.data.context_length) % 2**15 == 0  # many meshes divide it


def test_every_cell_of_the_tables_has_runs_that_divide_over_its_machine():
    for cell in [*pods.cells(), *pods.recipes()]:
        chips = find_machine(cell[1]).num_chips
        searches = [list(search) for search in pods.searches(cell)]
        for config in itertools.chain(*searches):
            shape = [getattr(config.mesh, axis) for axis in AXES]
            if shape.count(-1) == 2:
                shape[0] = 1
            sizes = {axis: chips // -math.prod(shape) if n == -1 else n for axis, n in zip(AXES, shape, strict=True)}
            assert math.prod(sizes.values()) == chips
            check_fits(config, jax.sharding.AbstractMesh(tuple(sizes.values()), AXES))
        for tried in searches:
            rows = [config.data.batch_size // config.optimizer.accumulation for config in tried]
            assert rows == sorted(rows, reverse=True)
            assert rows[-1] == chips or cell in pods.recipes()  # one at a time of each chip


def test_the_table_has_the_shortest_step_of_each_cell():
    def line(rows: int, seconds: float, fits: bool = True) -> dict:
        return {
            "cell": ["1 B", "v5e:4x4"],
            "rows": rows,
            "remat": "dots" if rows == 4 else "full",
            "computing": {"products": 6.0, "kernels": 1.0, "other": 1.0},
            "fits": fits,
            "memory": {"parameters": 2**30, "temporaries": 2**33},
            "seconds": [seconds / 2, seconds],
            "mfu": [0.2, 0.4],
            "shape": {"data": 1, "fsdp": 8, "tensor": 2, "sequence": 1},
            "date": "2026-11-20",
            "versions": "jax 1, libtpu 2",
        }

    text = pods.table([line(32, 1.0, fits=False), line(8, 6.0), line(4, 5.0)])
    assert (
        "| 1 B | v5e:4x4 | 16 | fsdp 8 x tensor 2 | dots | 4 | 9.0 of 16 | 2.50 to 5.00 | 75 + 12 + 12 | 20% to 40% |"
        in text
    )
    assert text.count("| 1 B |") == 1
    assert "1 B on v5e:16x16" in text
    recipe = line(4, 3.6) | {"cell": ["1b, L = 512, t5", "h100:8"]}
    text = pods.recipes_table([recipe, line(8, 6.0)])
    assert "| 1b, L = 512, t5 | h100:8 | 4 | 9.0 of 59 | 1.80 to 3.60 | 10,500 | 5.2 to 10 | 84 to 170 |" in text


def test_rows_are_halved_until_they_fit_and_further_while_that_shortens_the_step(tmp_path, monkeypatch):
    seconds = {"dots": {16: None, 8: 3.0, 4: 2.0, 2: 2.5}, "full": {16: 3.5, 8: 3.0, 4: 4.0}}
    tried = []

    def compiled(config, cell):
        rows = config.data.batch_size // (4 * config.optimizer.accumulation)
        step = seconds[config.model.remat][rows]
        tried.append((config.model.remat, rows))
        return {"fits": step is not None, "seconds": [0, step]}

    def configs(cell, policy):
        config = override(load_file(ROOT / "configs/gpt2.py"), {"model.remat": policy})
        for rows in (16, 8, 4, 2, 1):
            yield override(config, {"optimizer.accumulation": config.data.batch_size // (4 * rows)})

    monkeypatch.setattr(pods, "cells", lambda: [("125 M", "v5e:2x2")])
    monkeypatch.setattr(pods, "recipes", list)
    monkeypatch.setattr(pods, "configs", configs)
    monkeypatch.setattr(pods, "compiled", compiled)
    monkeypatch.setattr(pods, "write_table", lambda path: None)
    pods.compile_all(tmp_path / "pods.jsonl", 60)
    first = [("dots", 16), ("dots", 8), ("full", 16)]
    assert tried == [*first, ("dots", 4), ("dots", 2), ("full", 8), ("full", 4)]
    before = list(tried)
    pods.compile_all(tmp_path / "pods.jsonl", 60)  # goes on where it stopped
    assert tried == before


# Slices


def test_the_published_peaks_give_plausible_clocks():
    clocks = {kind: CHIPS[kind].flops / flops / 1e9 for kind, flops in tpu.FLOPS_PER_CYCLE.items()}
    assert clocks.keys() == SLICES.keys()
    assert {kind: round(clock, 2) for kind, clock in clocks.items()} == {
        "v4": 1.05,
        "v5e": 1.5,
        "v5p": 1.75,
        "v6e": 1.75,
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [
        *[("v5e:16x61", "v5e:16x16"), ("v5p:2x2", "v5p:2x2x1"), ("v5:16x16", "v5e:16x16"), ("v6e", "v6e:"), ("", "v")],
        *[("0xv5e:2x2", "v5e:2x2"), ("2xv4:2x2x1", "v4:2x2x1")],  # nobody says what v4's network between slices can do
        *[("h100:3", "h100:8"), ("h100:0x8", "h100:2x8"), ("H100:8", "h100:8"), ("2xh100:8", "h100:2x8")],
    ],
)
def test_a_machine_that_does_not_exist_is_refused_with_those_that_are_near(name, near):
    with pytest.raises(ValueError, match=re.escape(near)) as error:
        find_machine(name)
    assert f"--compile_for must be a slice of TPUs or GPUs of a host, not {name!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "install"),
    [("v5e:2x2", "'.[tpu]'"), ("h100:8", f"--no-deps --target cuda jax-cuda13-plugin=={jax.__version__} ")],
)
def test_without_the_compiler_it_says_what_to_install(name, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=re.escape(f"not installed: pip install {install}")):
        find_machine(name)._devices()


@pytest.mark.parametrize(
    ("name", "slices", "shape"),
    [("v5e:16x16", 1, (16, 16)), ("2xv5p:2x2x4", 2, (2, 2, 4)), ("h100:8", 1, (8,)), ("a100-40gb:4x8", 4, (8,))],
)
def test_what_a_name_says(name, slices, shape):
    machine = find_machine(name)
    assert (machine.num_slices, machine.slice_shape) == (slices, shape)
    assert machine.num_chips == slices * math.prod(shape)


def test_which_dimensions_are_rings():
    assert find_machine("v5e:8x16").wraps == (False, True)
    assert find_machine("v5p:2x2x4").wraps == (False,) * 3
    assert find_machine("2xv5p:4x4x8").wraps == (True,) * 3


# The command line


def test_compile_for_needs_no_workdir():
    arguments = parse_train(["--config", str(ROOT / "configs/tiny.py"), "--compile_for", "v5e:2x2"])
    assert arguments.compile_for == "v5e:2x2"
    assert parse_train(["--config", str(ROOT / "configs/tiny.py"), "--workdir", "x"]).compile_for is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("v5e:3x3", "--compile_for must be a slice of TPUs or GPUs of a host, not 'v5e:3x3'"),
        ("", "--compile_for must be a string or None, not ''"),
        ("v5e:2x2 v5e:4x4", "--compile_for must be a string or None, not 'v5e:2x2 v5e:4x4'"),
    ],
)
def test_bad_slices_end_the_command(given, complaint, monkeypatch, capsys):
    import train

    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", str(ROOT / "configs/tiny.py"), "--compile_for", *given.split()]
    )
    assert run(train.main) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


# The arithmetic


PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %neg = f32[8] negate(%p), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%inner_body (i: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %i = (s32[], s32[], f32[8]) parameter(0)
  ROOT %f3 = f32[8] fusion(%i), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%inner_condition (i: (s32[], s32[], f32[8])) -> pred[] {
  %i.1 = (s32[], s32[], f32[8]) parameter(0)
  %now = s32[] get-tuple-element(%i.1), index=0
  %stop = s32[] get-tuple-element(%i.1), index=1
  ROOT %lt.1 = pred[] compare(%now, %stop), direction=LT
}

%outer_body (o: (s32[], f32[8])) -> (s32[], f32[8]) {
  %o = (s32[], f32[8]) parameter(0)
  %f2 = f32[8] fusion(%o), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %w2 = (s32[], s32[], f32[8]) while(%f2), condition=%inner_condition, body=%inner_body
}

%outer_condition (o: (s32[], f32[8])) -> pred[] {
  %o.1 = (s32[], f32[8]) parameter(0)
  %end = s32[] constant(7)
  %count = s32[] get-tuple-element(%o.1), index=0
  ROOT %lt = pred[] compare(%count, %end), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %f1 = f32[8] fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"3"}}
  ROOT %w1 = (s32[], f32[8]) while(%start), condition=%outer_condition, body=%outer_body
}
"""


def test_cycles_count_loops_as_often_as_they_turn():
    # Eight blocks of keys have seven diagonals below the main one, of 7, 6, ... 1 blocks: the inner loop's turns.
    assert sum(cycles(PROGRAM, 8, "v5e")) == 3 + 7 * 100 + sum(range(1, 8)) * 7


def test_operations_without_an_estimate_count_as_none():
    for unknown in -1 % 2**64, 2**63 - 1:
        assert sum(cycles(PROGRAM.replace('"100"', f'"{unknown}"'), 8, "v5e")) == 3 + sum(range(1, 8)) * 7


def test_a_kernel_takes_the_longer_of_its_products_and_of_its_bytes():
    """In loops as often as they turn. In a cycle of its clock, a v5e does 2^17 FLOPs; in a second it moves 819 GB."""

    def program(flops: int, moved: int) -> str:
        cost = f'"cost_estimate":{{"flops":"{flops}","transcendentals":"1","bytes_accessed":"{moved}"}}'
        return PROGRAM.replace('"window_config":{"estimated_cycles":"100"}', cost)

    others, clock = 3 + sum(range(1, 8)) * 7, 197e12 / 2**17
    assert cycles(program(2**20, 10), 8, "v5e") == (0, 7 * 2**20 / 2**17 / tpu.KERNEL_EFFICIENCY, others)
    assert cycles(program(2**20, 10**6), 8, "v5e").kernels == pytest.approx(7 * 1e6 / (819e9 / clock))


def test_what_is_fused_with_a_product_counts_as_the_product():
    loop, product = "kind=kLoop, calls=%fused, ", "kind=kOutput, calls=%around, "
    cost = 'backend_config={"window_config":{"estimated_cycles":"100"}}'
    called = """
%within (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8] convolution(%p, %p), dim_labels=bf_io->bf
}

%around (p: f32[8]) -> f32[8] {
  ROOT %f = f32[8] fusion(%p), kind=kOutput, calls=%within
}
"""
    assert cycles(PROGRAM.replace(loop + cost, product + cost) + called, 8, "v5e") == (700, 0, 3 + sum(range(1, 8)) * 7)


@pytest.mark.parametrize(("blocks", "diagonals"), [(8, 7), (8, 3), (5, 9)])
def test_turns_of_the_loop_over_a_diagonal(blocks, diagonals):
    """Below the main diagonal, or (9 of 5 blocks) over all diagonals, where blocks above the main one are skipped."""
    causal = np.tril(np.ones((blocks, blocks)))
    offsets = range(-diagonals, 0) if diagonals < blocks else range(1 - blocks, blocks)
    visited = [np.trace(causal, offset) for offset in offsets]
    assert program._blocks_of_a_diagonal(diagonals, blocks) == pytest.approx(np.mean(visited))


@pytest.mark.usefixtures("stand_ins")
def test_links_that_a_collective_can_use():
    """Of a chip's four links: 4 x 4 chips are no torus, 16 x 16 are one. The mesh is 2 x 8, and 2 x 128, chips."""

    def shares(name: str, *found: tuple[str, list[list[int]]]) -> list[float]:
        size = int(name.split("x")[-1])
        chips = [types.SimpleNamespace(coords=(x, y, 0)) for x in range(size) for y in range(size)]
        mesh = types.SimpleNamespace(
            devices=np.array(chips).reshape(2, -1), shape={"data": 2, "fsdp": size * size // 2}
        )
        each = [Collective(kind, (), 0, tuple(map(tuple, groups)), 1, 0, "") for kind, groups in found]
        return find_machine(name).link_shares(each, mesh)

    column, everything = [list(range(4))], [list(range(16))]
    assert shares("v5e:4x4", ("all-gather", everything), ("all-gather", column)) == [2 / 4, 1 / 4]
    row, square = [list(range(16))], [list(range(256))]
    assert shares("v5e:16x16", ("all-gather", square), ("all-reduce", row)) == [4 / 4, 2 / 4]
    on, back = [[0, 1], [1, 2], [2, 0]], [[1, 0], [2, 1], [0, 2]]
    across = [[0, 8], [8, 0]]  # along "data"
    assert shares("v5e:4x4", ("collective-permute", on), ("collective-permute", across)) == [1 / 4, 1 / 4]
    assert shares("v5e:4x4", ("collective-permute", on), ("collective-permute", back)) == [2 / 4, 2 / 4]


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (40.25G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.25G of 15.75G hbm. Exceeded hbm capacity "
        "by 24.5G.",
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_what_the_compiler_lacks_is_said_in_numbers(message):
    def refuse():
        raise jax.errors.JaxRuntimeError(message)

    kept = Memory(parameters=2**30, optimizer=2**31, temporaries=0, other=0)
    with pytest.raises(DoesNotFitError) as caught:
        compiled("the step", types.SimpleNamespace(compile=refuse), kept, find_machine("v5e:2x2"))
    error = caught.value
    said = "the step does not fit a chip of v5e:2x2: it needs 40.25 GiB of the 15.75 GiB there are (parameters 1.00 GiB"
    assert str(error).startswith(f"{said}, optimizer 2.00 GiB")
    assert (error.needed, error.available, error.kept) == (40.25 * 2**30, 15.75 * 2**30, 3 * 2**30)


@pytest.mark.parametrize(
    ("state", "row", "settings", "says", "compiled"),
    [
        # By the rows: of 15 GiB 8 are kept, and 7 are a ninth of what 16 rows take; or 14 are a fifth.
        (8, 4, {}, "it fits with --optimizer.accumulation 16", 2),
        (8, 4, {"mesh.fsdp": 8}, "it fits with --optimizer.accumulation 8", 2),
        # It takes more than 16 microbatches can do, and what comes next in cost.
        (16, 4, {}, "it fits with --mesh.data 1 --mesh.fsdp 8 --optimizer.accumulation 8", 2),
        (8, 20, {"mesh.fsdp": 8}, "it fits with --model.remat full --optimizer.accumulation 16", 3),
        (
            8,
            40,
            {"mesh.fsdp": 8, "model.remat": "full"},
            "it fits with --mesh.data 1 --mesh.fsdp 2 --mesh.tensor 4 --optimizer.accumulation 32",
            3,
        ),
        (
            8,
            400,
            {"mesh.fsdp": 8, "model.remat": "full", "model.num_kv_heads": 1},
            "nor does it fit with --optimizer.accumulation 16",
            2,
        ),
        (8, 400, {"mesh.fsdp": 8, "model.remat": "full", "model.num_kv_heads": 1, "data.batch_size": 8}, "nothing", 1),
    ],
)
def test_what_would_fit_is_compiled_before_it_is_named(state, row, settings, says, compiled, monkeypatch):
    """A compiler of the test's own, for eight chips: what the state takes of them, and a row of a microbatch, GiB."""
    config = override(Config(), {"data.batch_size": 128} | settings)
    tried: list[Config] = []

    def mesh_of(mesh: MeshConfig, _) -> jax.sharding.AbstractMesh:
        sizes = mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence
        return jax.sharding.AbstractMesh((8 // math.prod(sizes[1:]), *sizes[1:]), AXES)

    def estimate_run(config: Config, _) -> None:
        tried.append(config)
        sizes = mesh_of(config.mesh, None).shape
        rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"] * config.optimizer.accumulation)
        kept = state / (sizes["fsdp"] * sizes["tensor"])
        needed = kept + rows * row / sizes["tensor"] / (1 if config.model.remat == "none" else 2)
        if needed > 15:
            raise DoesNotFitError("too much", needed, 15, kept)

    monkeypatch.setattr(reports, "estimate_run", estimate_run)
    monkeypatch.setattr(reports, "make_mesh", mesh_of)
    monkeypatch.setattr(reports, "find_machine", lambda _: types.SimpleNamespace(devices=lambda: None, num_slices=1))
    with pytest.raises(DoesNotFitError, match=f"^too much; .*{says}"):
        reports.report(config, "v5e:2x4")
    assert len(tried) == compiled
    named = {name: int(value) if value.isdigit() else value for name, value in re.findall(r"--(\S+) (\w+)", says)}
    assert override(config, named) == tried[-1]
    for one in tried:
        check_fits(one, mesh_of(one.mesh, None))


@pytest.mark.usefixtures("stand_ins")
def test_memory_is_the_peak_and_the_program_itself():
    # 12 bytes of temporaries, 5 of which in the place of what was given.
    stats = types.SimpleNamespace(
        argument_size_in_bytes=10,
        temp_size_in_bytes=12,
        output_size_in_bytes=8,
        alias_size_in_bytes=7,
        peak_memory_in_bytes=17,
        generated_code_size_in_bytes=1,
    )
    program = types.SimpleNamespace(memory_analysis=lambda: stats)
    memory = memory_of(program, Memory(parameters=3, optimizer=5, temporaries=0, other=0))
    assert memory == Memory(parameters=3, optimizer=5, temporaries=7, other=3)


def test_an_estimate_in_words():
    config = override(Config(), {"data.batch_size": 32, "data.context_length": 1000})
    memory = Memory(parameters=2**30, optimizer=2**31, temporaries=2**32, other=2**20)
    estimate = Estimate(
        chips=16,
        mesh={"data": 1, "fsdp": 16},
        training=memory,
        validation=memory._replace(optimizer=0),
        flops=1e15,
        peak=16 * 197e12,
        computing=Computing(products=0.25, kernels=0.25, other=0.1),
        traffic=(Traffic("all-gather", ("fsdp",), False, 44, 12_000_000_000, 0.2),),
    )
    assert estimate.seconds == (0.6, pytest.approx(0.8))
    assert estimate.mfu == pytest.approx((1e15 / (0.8 * 16 * 197e12), 1e15 / (0.6 * 16 * 197e12)))
    said = describe(config, "v5e:4x4", estimate)
    assert "16 chips, mesh data 1 x fsdp 16; it fits" in said
    assert "7.00 of 16 GiB: parameters 1.00, optimizer 2.00, temporaries 4.00" in said
    assert "all-gather 12 GB (44 along fsdp), by each chip" in said
    assert "expects: matrix products 0.25, attention's kernels 0.25, other 0.1" in said
    assert "0.6 s if all communication hides behind computation, 0.8 s if none does" in said
    assert "40% to 53%" in said
    assert "40,000 to 53,333 tokens per second" in said


def test_model_flops_are_the_matrix_products_that_xla_counts():
    """Of a model of one layer: XLA counts the body of a loop once, however often it turns."""
    model = ModelConfig(
        vocab_size=1024, num_layers=1, num_heads=4, num_kv_heads=2, model_dim=256, mlp_dim=512, attention="reference"
    )
    config = Config(model=model, data=DataConfig(context_length=32, batch_size=2))
    graphdef, params = nnx.split(abstract_decoder(model))
    rows = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    gradient = jax.grad(lambda params, rows: total_nll(graphdef, params, rows))
    counted = jax.jit(gradient).lower(params, Batch(rows, rows)).cost_analysis()["flops"] / (2 * 32)
    above_the_mask = 12 * 256 * (32 - 33 / 2)  # the reference computes all T keys of a query, (T + 1) / 2 count
    assert model_flops_per_token(config) + above_the_mask == pytest.approx(counted, rel=0.03)


# A real one


def compile_for(slice_name: str, *options: str) -> subprocess.CompletedProcess[str]:
    ours = "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS"
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--compile_for", slice_name, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.tpu
def test_gradients_sharded_by_fsdp_are_not_cut_into_thin_products():
    """As the compiler does by itself, on a slice of two dimensions: see nope_jax/compiler_flags.py."""
    shape = "--model.model_dim 1024 --model.num_layers 2 --model.dtype bfloat16 --data.context_length 1024"
    done = compile_for("v5e:4x4", "--mesh.fsdp", "-1", "--data.batch_size", "64", *shape.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "all-gather" in done.stdout and "collective-permute" not in done.stdout


@pytest.mark.tpu
def test_the_compiler_knows_every_slice():
    for generation, shapes in SLICES.items():
        for shape in shapes:
            chips = find_machine(f"{generation}:{shape}").devices()
            assert len(chips) == math.prod(map(int, shape.split("x")))
            assert {chip.device_kind for chip in chips} <= set(CHIPS[generation].device_kinds)


@pytest.mark.tpu
@pytest.mark.parametrize("slice_name", ["v6e:8x8", "v5e:16x16", "v5p:4x8x8"])
@pytest.mark.parametrize("axes", [{"fsdp": -1, "tensor": 4}, {"data": 2, "fsdp": -1, "tensor": 2, "sequence": 2}])
def test_an_axis_may_take_a_part_of_one_dimension_of_a_slice(slice_name, axes):
    chips = find_machine(slice_name).devices()
    mesh = make_mesh(MeshConfig(**axes), chips)
    assert set(mesh.devices.flat) == set(chips)
    assert all(mesh.shape[axis] == size for axis, size in axes.items() if size != -1)


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "chips"), [("v5e:2x2", "4 chips"), ("2xv5e:2x2", "8 chips in 2 slices")])
def test_a_run_is_compiled_for_a_slice_or_two(name, chips):
    done = compile_for(name, "--mesh.data", "2", "--mesh.fsdp", "-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{name}: {chips}, mesh data 2 x fsdp {int(chips[0]) // 2}" in done.stdout
    assert bool(re.search(r"across slices all-reduce .* along data\): \S+ s over the data-center", done.stdout)) == (
        "slices" in chips
    )
    sent = re.search(r"sent +(.*)", done.stdout)
    assert sent and "all-gather" in sent[1]
    best, worst = map(float, re.search(r"time +(\S+) s if .*, (\S+) s if none", done.stdout).groups())
    assert 1e-5 < best <= worst < 1e-2


@pytest.mark.tpu
def test_a_run_that_does_not_fit_says_what_would_help():
    done = compile_for("v5e:1x1", "--data.batch_size", "65536")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert re.search(
        r"the training step does not fit a chip of v5e:1x1: it needs \S+ GiB of the 15.75 GiB", done.stderr
    )
    assert re.search(r"; it fits with --optimizer.accumulation \d+\n$", done.stderr)
