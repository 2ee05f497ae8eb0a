"""Compiling for GPUs that are not there, and for several hosts or slices: the arithmetic, and a real one."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from nope_jax.compile.collectives import Collective
from nope_jax.compile.estimate import find_machine
from nope_jax.compile.gpu import GPUS, target_config
from nope_jax.compile.machine import KERNEL_EFFICIENCY
from nope_jax.compile.memory import DoesNotFitError, Memory, compiled
from nope_jax.sharding import _between_slices
from nope_jax.training.flops import CHIPS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", GPUS)
def test_what_xla_is_told_of_a_gpu_agrees_with_its_data_sheet(name):
    gpu, chip = GPUS[name], CHIPS[name]
    assert gpu.memory == pytest.approx(chip.memory, rel=0.02)
    assert gpu.memory_bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
    assert chip.network_bandwidth < chip.interconnect_bandwidth < chip.memory_bandwidth
    text = target_config(name)
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"^ *(\w+): (\S+)$", text, re.M))
    assert int(fields["device_memory_size"]) == gpu.memory
    assert int(fields["core_count"]) == gpu.num_cores
    assert f'"{chip.device_kinds[0]}"' in text


# Two layers, of which each turn reads one, and updates its rows of an array in place.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] parameter(0)
}

%gemm (weights: bf16[2,64,32], i: s32[], rows: bf16[128,64]) -> bf16[128,32] {
  %weights = bf16[2,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %rows = bf16[128,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %one = bf16[1,64,32]{2,1,0} dynamic-slice(%weights, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %layer = bf16[64,32]{1,0} bitcast(%one)
  ROOT %dot = bf16[128,32]{1,0} dot(%rows, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%update (kept: bf16[2,128,32], i: s32[], new: bf16[128,32]) -> bf16[2,128,32] {
  %kept = bf16[2,128,32]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %new = bf16[128,32]{1,0} parameter(2)
  %flat = bf16[1,128,32]{2,1,0} bitcast(%new)
  %zero.1 = s32[] constant(0)
  ROOT %updated = bf16[2,128,32]{2,1,0} dynamic-update-slice(%kept, %flat, %i.1, %zero.1, %zero.1)
}

%body (state: (s32[])) -> (s32[]) {
  %state = (s32[], bf16[2,64,32], bf16[2,128,32], bf16[128,64]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %w = bf16[2,64,32]{2,1,0} get-tuple-element(%state), index=1
  %k = bf16[2,128,32]{2,1,0} get-tuple-element(%state), index=2
  %r = bf16[128,64]{1,0} get-tuple-element(%state), index=3
  %product = bf16[128,32]{1,0} fusion(%w, %n, %r), kind=kCustom, calls=%gemm
  ROOT %start = ((bf16[2,128,32], s32[], bf16[128,32]), u32[]) fusion-start(%k, %n, %product), calls=%update
}

%condition (state: (s32[])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[2048,2048]) -> f32[2048,2048] {
  %x = f32[2048,2048]{1,0} parameter(0)
  %all = f32[2048,2048]{1,0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  %square = (f32[2048,2048]{1,0}, s8[64]{0}) custom-call(%x, %all), backend_config={"lhs_contracting_dimensions":["1"]}
  %kernel = f32[64]{0} custom-call(%x), backend_config={STATED}
  ROOT %loop = (s32[]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
}
"""
STATED = r'serialized_metadata = "{\22flops\22: \224000000\22, \22bytes\22: \2256\22}"'


def test_an_operation_takes_the_longer_of_its_products_and_its_memory():
    machine = find_machine("h100:8")
    peak, bandwidth = machine.chip.flops, machine.chip.memory_bandwidth
    in_layer = 2 * (64 * 32 + 128 * 64 + 128 * 32) + 4  # one layer of the weights, rows, result; and the index
    in_update = 2 * 2 * 128 * 32 + 4
    square = 2 * 2 * 2048**3 / peak  # TF32 has half the peak
    assert 2 * 128 * 64 * 32 / peak < in_layer / bandwidth
    assert 3 * 4 * 2048**2 / bandwidth < square
    kernel = 2 * 4_000_000 / peak / KERNEL_EFFICIENCY  # which reads less of its operands than all
    in_loop = 2 * in_layer / bandwidth, 2 * in_update / bandwidth
    found = machine.computing(PROGRAM.replace("STATED", STATED), 1024)
    assert found == pytest.approx((square + in_loop[0], kernel, in_loop[1]), rel=1e-6)


def test_the_products_of_attention_by_cudnn_are_counted():
    line = (
        '%out = (bf16[1,8,1024,64], f32[1,8,1024]) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", '
        'backend_config={"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "8", "1024", "1024"]'
        '}, "mask_type": "CAUSAL", "bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions": ["3"]}, '
        '"sliding_window_length": 0}'
    )

    def flops(line):
        program = f"ENTRY %main (q: bf16[8]) -> bf16[8] {{\n  %q = bf16[1,1024,8,64] parameter(0)\n  {line}\n}}\n"
        machine = find_machine("h100:1")
        return (
            machine.computing(f"HloModule jit_step\n{program}", 1024).kernels * machine.chip.flops * KERNEL_EFFICIENCY
        )

    forward = 2 * 2 * 8 * 1024 * 512 * 64
    assert flops(line) == pytest.approx(forward)
    assert flops(line.replace("CAUSAL", "NO_MASK")) == pytest.approx(2 * forward)
    assert flops(line.replace("fmhaSoftmax", "fmhaSoftmaxBackward")) == pytest.approx(2.5 * forward)
    assert flops(line.replace('length": 0', 'length": 400')) == pytest.approx(forward * 400 / 512)


@pytest.mark.usefixtures("stand_ins")
def test_what_crosses_between_hosts_goes_over_their_adapters():
    """16 GPUs on 2 hosts: of a group of all, the 8 of a host share what crosses."""
    machine = find_machine("h100:2x8")
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(slice_index=i // 8) for i in range(16)]).reshape(2, 8),
        shape={"data": 2, "fsdp": 8},
    )
    everyone, hosts, pairs = [range(16)], [range(8), range(8, 16)], [(i, i + 8) for i in range(8)]
    found = [
        Collective(kind, ("f32[]",), 2**30, tuple(map(tuple, groups)), times, 0, "")
        for kind, groups, times in (
            ("all-gather", hosts, 3),
            ("all-gather", hosts, None),
            ("all-reduce", pairs, 1),
            ("all-reduce", everyone, 1),
        )
    ]
    chip = machine.chip
    within, data, both = machine.traffic(found, mesh)
    assert within[:4] == ("all-gather", ("fsdp",), False, 4)
    assert within.seconds == pytest.approx(4 * 2**30 * 7 / 8 / chip.interconnect_bandwidth, rel=1e-6)
    assert data[:5] == ("all-reduce", ("data",), True, 1, 2**30)
    assert data.seconds == pytest.approx(2**30 / chip.network_bandwidth)
    assert both[1:3] == (("data", "fsdp"), True)
    assert both.seconds == pytest.approx(2 * 2**30 * 15 / 16 / (8 * chip.network_bandwidth))


@pytest.mark.parametrize(
    ("shape", "slices", "expected"),
    [((4, 8, 1, 1), 2, [2, 1, 1, 1]), ((1, 16, 1, 1), 2, [1, 2, 1, 1]), ((2, 8, 1, 1), 8, [2, 4, 1, 1])],
)
def test_the_first_axes_of_a_mesh_go_over_the_network(shape, slices, expected):
    assert _between_slices(shape, slices) == expected


def test_a_mesh_that_does_not_divide_over_slices_is_refused():
    with pytest.raises(ValueError, match=r"^mesh data 4 x fsdp 4 .* does not divide over 3 slices$"):
        _between_slices((4, 4, 1, 1), 3)


@pytest.mark.usefixtures("stand_ins")
def test_a_program_fits_what_jax_takes_of_a_gpu(monkeypatch):
    """Three quarters of its memory, unless told otherwise; XLA compiles what does not fit all the same."""
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    machine = find_machine("h100:8")
    stats = types.SimpleNamespace(
        argument_size_in_bytes=10, peak_memory_in_bytes=70 * 10**9, generated_code_size_in_bytes=0
    )
    lowered = types.SimpleNamespace(compile=lambda: types.SimpleNamespace(memory_analysis=lambda: stats))
    with pytest.raises(DoesNotFitError, match=r"it needs 65.19 GiB of the 59.33 GiB there are") as caught:
        compiled("the step", lowered, Memory(4, 4, 0, 0), machine)
    assert (caught.value.needed, caught.value.kept) == (70 * 10**9, 8)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert compiled("the step", lowered, Memory(4, 4, 0, 0), machine)[1].total == 70 * 10**9


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["a100:1", "h100:2x4", "h200:2", "b200:8"])
def test_a_run_is_compiled_for_gpus(name):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    small = ["--optimizer.name", "adamw", "--model.num_layers", "2", "--mesh.fsdp", "-1"]
    mesh = ["--mesh.data", "2"] if "2x" in name else []
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--compile_for", name, *small, *mesh]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    chips = find_machine(name).num_chips
    assert f"{name}: {chips} chips" in done.stdout
    sent = re.search(r"sent +(.*)", done.stdout)[1]
    assert ("nothing" in sent) == (chips == 1)
    assert ("over the network" in done.stdout) == ("2x" in name)
    best, worst = map(float, re.search(r"time +(\S+) s if .*, (\S+) s if none", done.stdout).groups())
    assert 1e-6 < best <= worst < 1e-2
