"""GPUs as compilation targets without GPUs: what XLA must know of each, and time estimates of compiled programs.

The GPU compiler (packages jax-cuda13-plugin and -pjrt) needs no GPU, only a description of one. Nothing is executed, so
times are estimates:

- computing: of each operation, the longer of its matrix products at the chip's peak and of what it reads and writes at
  the bandwidth of its memory, times the trip counts of the loops around it. Pallas kernels state their FLOPs and bytes;
  the FLOPs are counted at `KERNEL_EFFICIENCY` of the peak.
- communicating: the bytes of each collective divided by the bandwidth of NVLink or, between hosts, of the network.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nope_jax.attention.blocks import BLOCK_SIZE
from nope_jax.compile.collectives import KINDS, Collective
from nope_jax.compile.machine import KERNEL_EFFICIENCY, Computing, Machine
from nope_jax.compile.program import Computations, array_bytes, arrays, executed, parse_program
from nope_jax.training.flops import CHIPS


class Gpu(NamedTuple):
    """What XLA must know of a GPU to compile for it; of the chips here, the rest is the same."""

    compute_capability: int
    num_cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    memory: int
    """Bytes that programs and the runtime share."""
    memory_bandwidth: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int


GPUS = {
    "A100-40GB": Gpu(8, 108, 64, 1.41, 42_331_013_120, 1_555_200_000_000, 41_943_040, 167_936, 166_912),
    "A100": Gpu(8, 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936, 166_912),
    "H100": Gpu(9, 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, 233_472, 232_448),
    "H200": Gpu(9, 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472, 232_448),
    "B200": Gpu(10, 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472, 232_448),
}
"""By the names of CHIPS. The numbers are those of github.com/openxla/xla, xla/backends/gpu/target_config/specs, in 2026
(a100_sxm_40, a100_sxm_80, h100_sxm, h200, b200.txtpb; Copyright The OpenXLA Authors, Apache License 2.0)."""

GPUS_PER_HOST = (1, 2, 4, 8)
MEMORY_FRACTION = 0.75
"""The part of a GPU's memory that JAX takes unless XLA_CLIENT_MEM_FRACTION is set."""


def target_config(name: str) -> str:
    """Describe a GPU to XLA: a GpuTargetConfigProto as text."""
    gpu, kind = GPUS[name], CHIPS[name].device_kinds[0]
    extension = "ACCELERATED_FEATURES" if gpu.compute_capability >= 9 else "NONE"
    return f"""
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {gpu.compute_capability} feature_extension: {extension} }}
  core_count: {gpu.num_cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
"""


@dataclasses.dataclass(frozen=True)
class Gpus(Machine):
    """One or more hosts with as many GPUs each."""

    kind: str

    slices = "hosts"
    network = "network"
    compiler = "jax-cuda13-plugin"
    computed_from = "the FLOPs and bytes of each operation at the published peak and bandwidth"

    @property
    def memory(self) -> float:
        fraction = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        return GPUS[self.kind].memory * float(fraction or MEMORY_FRACTION)

    def _devices(self) -> list[jax.Device]:
        if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
            raise ValueError(
                f"--compile_for {self.name} needs the GPU compiler, which is not installed: pip install --no-deps "
                f"--target cuda jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}, "
                "and PYTHONPATH=cuda"
            )
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # on a slow machine, the compiler calls itself slow
        topology = f"{self.num_slices}x1x{self.slice_shape[0]}"  # domains of NVLink, hosts of each, GPUs of each
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=topology, target_config=target_config(self.kind)
        )
        return described.devices

    def computing(self, text: str, length: int) -> Computing:
        computations, entry = parse_program(text)
        products = kernels = other = 0.0
        for name, line, times in executed(computations, entry, -(-length // BLOCK_SIZE)):
            flops, size = _work(line, computations[name], computations)
            seconds = times * max(flops / self.chip.flops, size / self.chip.memory_bandwidth)
            if _is_kernel(line):
                kernels += seconds
            elif flops:
                products += seconds
            else:
                other += seconds
        return Computing(products, kernels, other)

    def link_shares(self, found: Sequence[Collective], mesh: Mesh) -> list[float]:
        return [1.0] * len(found)  # NVLink switches


def find_gpus(name: str) -> Gpus | None:
    """Return the machine of a name: h100:8 is a host with 8 GPUs, h100:2x8 two of them. None: there is none."""
    parts = re.fullmatch(r"([a-z][\w-]*):(?:([1-9]\d*)x)?(\d+)", name)
    if parts is None or int(parts[3]) not in GPUS_PER_HOST:
        return None
    kind = next((kind for kind in GPUS if kind.lower() == parts[1]), None)
    if kind is None:
        return None
    return Gpus(name, CHIPS[kind], int(parts[2] or 1), (int(parts[3]),), kind)


def names() -> list[str]:
    """The names of the usual machines."""
    return [f"{kind.lower()}:{shape}" for kind in GPUS for shape in ("1", "4", "8", "2x8")]


# What an operation does


class _Instruction(NamedTuple):
    operation: str
    result: str
    """The type of its result."""
    operands: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(array_bytes(*array) for array in arrays(self.result))


_FREE = re.compile(
    "parameter|constant|iota|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|partition-id|replica-id|"
    rf"async-\w+|.*-done|(?:{'|'.join(KINDS)})(?:-start)?"
)
"""Operations that take no time by themselves, or whose time is that of communication."""


_STATED = re.compile(r'serialized_metadata = "\{\\22flops\\22: \\22(\d+)\\22, \\22bytes\\22: \\22(\d+)\\22\}"')
"""What a Pallas kernel states of itself."""

_CUDNN = re.compile(
    r'"__cudnn\$fmhaSoftmax(Backward)?".*"intermediate_tensor_shape": \{[^}]*?"dimensions": \[([\d", ]+)\]'
    r'.*"mask_type": "(\w+)".*"sliding_window_length": (\d+)'
)
"""Attention by cuDNN, with the shape [B, N, T, S] of its weights."""


def _work(line: str, around: dict[str, str], computations: Computations) -> tuple[float, int]:
    """Count what an instruction does: its FLOPs in matrix products, and the bytes that it reads and writes.

    Float32 products count twice: the peak of TF32 is half of that of bfloat16. Those of a Pallas kernel, which states
    them, count by its efficiency.
    """
    instruction = _parsed(line)
    if instruction is None or _FREE.fullmatch(instruction.operation):
        return 0, 0
    if called := re.search(r" fusion(?:-start)?\(.*calls=%?([\w.\-]+)", line):
        inside = computations[called[1]]
        return sum(_work(within, inside, computations)[0] for within in inside.values()), _moved(inside)
    operands = [parsed for name in instruction.operands if (parsed := _parsed(around.get(name, "")))]
    in_float32 = 2 if operands and operands[0].result.startswith("f32") else 1
    if stated := _STATED.search(line):
        return int(stated[1]) * in_float32 / KERNEL_EFFICIENCY, int(stated[2])
    flops = 0.0
    if cudnn := _CUDNN.search(line):
        head_dim = int(arrays(operands[0].result)[0][1].split(",")[-1])
        flops = _attention_flops(head_dim, *cudnn.groups())
    contracted = not flops and re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]+)', line)
    if contracted and operands:
        _, sizes = arrays(operands[0].result)[0]
        lengths = [int(size) for size in sizes.split(",")]
        products = math.prod(lengths[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
        result = math.prod(int(size) for size in arrays(instruction.result)[0][1].split(",") if size)
        flops = 2.0 * products * result * in_float32
    return flops, _read(instruction, operands) + _written(instruction, operands)


def _is_kernel(line: str) -> bool:
    return bool(_STATED.search(line) or _CUDNN.search(line))


def _attention_flops(head_dim: int, backward: str | None, weights: str, mask: str, window: str) -> float:
    """Products of the pairs of queries and keys that cuDNN's attention computes, by the efficiency of a kernel."""
    *heads, queries, keys = (int(size) for size in re.findall(r"\d+", weights))
    seen = keys / 2 if mask == "CAUSAL" else keys
    seen = min(seen, int(window) or seen)
    products = 5 if backward else 2  # [T, H] with [H, S], or [T, S] with [S, H]
    return 2 * products * math.prod(heads) * queries * seen * head_dim / KERNEL_EFFICIENCY


def _read(instruction: _Instruction, operands: list[_Instruction]) -> int:
    if instruction.operation in ("dynamic-slice", "gather"):
        return instruction.size
    if instruction.operation == "dynamic-update-slice":
        return operands[1].size
    return sum(operand.size for operand in operands)


def _written(instruction: _Instruction, operands: list[_Instruction]) -> int:
    return operands[1].size if instruction.operation == "dynamic-update-slice" else instruction.size


def _moved(inside: dict[str, str]) -> int:
    """Bytes that a fusion reads and writes: of an array that it slices or updates in place, only that part."""
    found = {name: parsed for name, line in inside.items() if (parsed := _parsed(line))}
    users: dict[str, list[str]] = {name: [] for name in found}
    for name, instruction in found.items():
        for operand in instruction.operands:
            if operand in users:
                users[operand].append(name)

    def read(name: str) -> int:
        parts = []
        for user in users[name]:
            instruction = found[user]
            if instruction.operation == "bitcast":
                parts.append(read(user))
            elif instruction.operation in ("dynamic-slice", "gather") and instruction.operands[0] == name:
                parts.append(instruction.size)
            elif instruction.operation != "dynamic-update-slice" or instruction.operands[0] != name:
                return found[name].size
        return min(sum(parts), found[name].size)

    def written(name: str) -> int:
        instruction = found[name]
        if instruction.operation == "bitcast" and found[instruction.operands[0]].operation == "dynamic-update-slice":
            return written(instruction.operands[0])
        if instruction.operation == "tuple":
            return sum(written(operand) for operand in instruction.operands)
        return _written(instruction, [found[operand] for operand in instruction.operands if operand in found])

    root = next(name for name, line in inside.items() if re.match(r"\s+ROOT ", line))
    return sum(read(name) for name in found if found[name].operation == "parameter") + written(root)


def _parsed(line: str) -> _Instruction | None:
    parts = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?[)\]}]) ([a-z][\w\-]*)\(([^)]*)\)", line)
    return _Instruction(parts[2], parts[1], tuple(re.findall(r"%([\w.\-]+)", parts[3]))) if parts else None
