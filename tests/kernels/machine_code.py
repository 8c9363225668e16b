"""What the pack's Triton kernels become on a GPU that need not be there: each is compiled for an architecture as its
op launches it, and the machine code is read.

    machine_code.py [--capability 86] [--part 1/1]

Prints a JSON list with an object for each kernel and way of launching it; `--part 2/3` does every third, from the
second on. Fails if a kernel is left out.

No argument list is written down here. An op's implementation is run on tensors of the meta device while `launches`
stands in for Triton's launcher, so what is compiled is what the op launches, with its own constants.

For a loop on int8 tensor cores, `tensor_slots` are the cycles in which a warp's quarter of a multiprocessor is busy
with the loop's IMMAs. An IMMA.16832 multiplies and adds 16 x 8 x 32 values; sm_86 does 256 a cycle and quarter (its 284
TOP/s are 1024 a cycle for each of 82 multiprocessors at 1.695 GHz), so that one takes 16 slots. `other_per_slot` is the
number of all other instructions that a warp issues in the loop divided by the slots, `issued_per_slot` counts the IMMAs
too, 1/16 more. A quarter issues one instruction a cycle: well below 1, the tensor cores are what the loop waits for.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TESTS = pathlib.Path(__file__).resolve().parents[1]
POINTED_TO = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Multiplications of int8 values in a cycle by a quarter of a multiprocessor, and in an instruction.
INT8_PRODUCTS_A_CYCLE = {80: 512, 86: 256, 89: 256, 120: 256}
INT8_PRODUCTS = {"IMMA.16832": 16 * 8 * 32, "IMMA.16816": 16 * 8 * 16, "IMMA.8816": 8 * 8 * 16}


# Launches, and what they compile to


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as an op launches it; arguments by their names, constants included, options such as num_warps."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def passed(self) -> dict[str, Any]:
        """The arguments that the compiled kernel takes, by their names; the others are constants in it."""
        return {
            parameter.name: value
            for parameter in self.kernel.params
            if not _is_constant(parameter, value := self.arguments[parameter.name])
        }


def _is_constant(parameter, value: Any) -> bool:
    specialized = type(value) is int and value == 1 and not parameter.do_not_specialize
    return parameter.is_constexpr or value is None or specialized


@contextlib.contextmanager
def launches(take: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the `with` block kernels are not launched by Triton but handed to `take`."""

    def run(kernel, *arguments, grid, warmup, **keywords):
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        named |= {name: value for name, value in keywords.items() if name in kernel.arg_names}
        options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
        take(Launch(kernel, tuple(grid), named, options))

    with mock.patch.object(JITFunction, "run", run):
        yield


def compiled(launch: Launch, capability: int):
    """The launch's kernel as Triton compiles it for an architecture: `.asm` with its PTX and cubin, and `.metadata`."""
    source = ASTSource(launch.kernel, *specialization(launch))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def specialization(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """What a kernel is compiled for: the types of its arguments, the constants, and which others divide by 16."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.name not in launch.passed:
            types[parameter.name] = "constexpr"
            constants[index,] = value
            continue
        types[parameter.name] = _type_name(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if not parameter.do_not_specialize and isinstance(number, int) and number % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + POINTED_TO[value.dtype]
    if _is_descriptor(value):
        return f"tensordesc<{POINTED_TO[value.base.dtype]}{list(value.block_shape)}>"
    if type(value) is float:
        return "fp32"
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"a kernel argument that is a {type(value).__name__} has no type here yet")


def _is_descriptor(value: Any) -> bool:
    """Of a tensor for the bulk copy engine, which newer architectures than sm_86 have."""
    return type(value).__name__ == "TensorDescriptor"


def entry(ptx: str) -> tuple[str, list[int]]:
    """The kernel's name in its PTX and the widths of its parameters in bits, in order."""
    found = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx)
    if found is None:
        raise ValueError("no .entry in this PTX")
    parameters = [parameter for parameter in found[2].split(",") if parameter.strip()]
    return found[1], [int(re.search(r"\.param\s+\.[a-z]+(\d+)\b", parameter)[1]) for parameter in parameters]


def passed_to_entry(launch: Launch, ptx: str) -> list[tuple[str, Any]]:
    """("pointer", "i64", "i32" or "fp32", value) for each parameter of the entry, in order: the launch's own arguments,
    then null pointers for the scratch memory that Triton may add. Raises ValueError if they do not fit the PTX."""
    widths = {"pointer": 64, "i64": 64, "i32": 32, "fp32": 32}
    passed = []
    for value in launch.passed.values():
        if _is_descriptor(value):
            raise ValueError("a tensor descriptor is several parameters, which are not taken apart here")
        type_name = _type_name(value)
        passed.append(("pointer" if type_name.startswith("*") else type_name, value))
    name, found = entry(ptx)
    own, scratch = found[: len(passed)], found[len(passed) :]
    if own != [widths[kind] for kind, _ in passed] or scratch not in ([], [64], [64, 64]):
        raise ValueError(f"{name} takes parameters of {found} bits, the launch passes {passed}")
    return passed + [("pointer", 0)] * len(scratch)


# Reading machine code


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel as cuobjdump prints them."""
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    return [Instruction(int(at, 16), name, rest) for at, name, rest in re.findall(line, sass, re.MULTILINE)]


def on_tensor_cores(instruction: Instruction) -> bool:
    return "MMA" in instruction.opcode.partition(".")[0]


def hottest_loop(code: list[Instruction]) -> list[Instruction]:
    """From the target of a branch back to that branch: the loop with most tensor instructions, the innermost of
    several with as many; empty if nothing branches back."""
    loops = []
    for branch in code:
        target = re.search(r"0x([0-9a-f]+)", branch.operands) if branch.opcode.startswith("BRA") else None
        if target and int(target[1], 16) < branch.address:
            loops.append([one for one in code if int(target[1], 16) <= one.address <= branch.address])
    return max(loops, key=lambda loop: (sum(map(on_tensor_cores, loop)), -len(loop)), default=[])


def read(kernel, capability: int) -> dict[str, Any]:
    """Registers, stack, spills, shared memory and instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        program = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [program, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    code = instructions(text)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "spills": sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in code),
        "saturating_conversions": sum(instruction.opcode.startswith("F2IP") for instruction in code),
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(code),
        "tensor_instructions": sum(map(on_tensor_cores, code)),
        "loop": _read_loop(hottest_loop(code), capability),
    }


def _read_loop(loop: list[Instruction], capability: int) -> dict[str, Any] | None:
    if not loop:
        return None
    tensor = [instruction.opcode for instruction in loop if on_tensor_cores(instruction)]
    found = {"instructions": len(loop), "tensor_instructions": len(tensor), "opcodes": sorted(set(tensor))}
    products = [INT8_PRODUCTS.get(".".join(opcode.split(".")[:2])) for opcode in tensor]
    if tensor and all(products) and capability in INT8_PRODUCTS_A_CYCLE:
        slots = sum(products) / INT8_PRODUCTS_A_CYCLE[capability]
        found |= {
            "tensor_slots": slots,
            "other_per_slot": round((len(loop) - len(tensor)) / slots, 4),
            "issued_per_slot": round(len(loop) / slots, 4),
        }
    return found


# How the ops launch their kernels for the model


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def options_of_the_quantizer(K: int) -> Iterator[tuple[str, torch.dtype, torch.Tensor | None, int]]:
    """(label, dtype of the activations, smooth, rotation group): all that a quantizer of K features is compiled for."""
    for dtype, smoothed, group in itertools.product((torch.bfloat16, torch.float16), (False, True), (0, 256)):
        label = f"K={K} {POINTED_TO[dtype]}{' smooth' if smoothed else ''}{' rotated' if group else ''}"
        yield label, dtype, meta(K, dtype=torch.float32) if smoothed else None, group


def calls_of_quantize_per_token(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for K in (4608, 12288, 53248):
        for label, dtype, smooth, group in options_of_the_quantizer(K):
            yield label, op.QuantizePerTokenCall(meta(4352, K, dtype=dtype), smooth, group)


def calls_of_rms_norm_scale_quantize(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for label, dtype, smooth, group in options_of_the_quantizer(4608):
        x, scale = meta(4352, 4608, dtype=dtype), meta(2, 4608, dtype=dtype)
        for kept in (False, True):
            call = op.RmsNormScaleQuantizeCall(x, x[0], scale, 1e-5, smooth, group, kept)
            yield f"{label}{' kept' * kept}", call
    yield "K=4608 bf16 unscaled", op.RmsNormScaleQuantizeCall(meta(4352, 4608), meta(4608), None, 1e-5, None, 0)
    for K in (1, 255):  # one byte at a time
        yield f"K={K} bf16", op.RmsNormScaleQuantizeCall(meta(17, K), meta(K), meta(1, K), 1e-5, None, 0)


def calls_of_swiglu_quantize(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for label, dtype, smooth, group in options_of_the_quantizer(12288):
        gate = meta(4352, 12288, dtype=dtype)
        for kept in (False, True):
            yield f"{label}{' kept' * kept}", op.SwigluQuantizeCall(gate, gate, smooth, group, kept)


def calls_of_gated_residual(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for dtype in (torch.bfloat16, torch.float16):
        x, gate = meta(4352, 4608, dtype=dtype), meta(2, 4608, dtype=dtype)
        yield f"K=4608 {POINTED_TO[dtype]}", op.GatedResidualCall(x, x, x[0], gate, 1e-5)


def calls_of_gated_residual_norm_quantize(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for label, dtype, smooth, group in options_of_the_quantizer(4608):
        x, row = meta(4352, 4608, dtype=dtype), meta(2, 4608, dtype=dtype)
        for kept in (False, True):
            call = op.GatedResidualNormQuantizeCall(x, x, x[0], row, x[0], row, 1e-5, smooth, group, kept)
            yield f"{label}{' kept' * kept}", call


def calls_of_record_channels(op: ModuleType) -> Iterator[tuple[str, Any]]:
    drawn = meta(64, dtype=torch.int64)
    for K, dtype in ((4608, torch.bfloat16), (4608, torch.float16), (4608, torch.float32), (255, torch.bfloat16)):
        channels, sample = meta(K, dtype=torch.float32), meta(64, K)
        call = op.RecordChannelsCall(meta(4352, K, dtype=dtype), channels, channels, sample, drawn, drawn)
        yield f"K={K} {POINTED_TO[dtype]}", call
    channels, drawn = meta(4608, dtype=torch.float32), meta(128, dtype=torch.int64)
    call = op.RecordChannelsCall(meta(4352, 4608), channels, channels, meta(128, 4608), drawn, drawn)
    yield "K=4608 bf16 largest sample", call


def calls_of_weight_only_int8_linear(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for M, K, dtype in itertools.product((1, 2, 16), (512, 4608), (torch.bfloat16, torch.float16)):
        x, wq = meta(M, K, dtype=dtype), meta(18432, K, dtype=torch.int8)
        label = f"M={M} K={K} {POINTED_TO[dtype]}"
        yield label, op.WeightOnlyInt8LinearCall(x, wq, meta(18432, 1, dtype=torch.float32), meta(18432, dtype=dtype))


def calls_of_ggml_linear(op: ModuleType) -> Iterator[tuple[str, Any]]:
    from lowbit.kernels.unpack.triton_impl import DECODERS

    for ggml_type, M in itertools.product(DECODERS, (1, 16)):
        blocks, bias = _blocks(4608, ggml_type), meta(4608)
        yield f"{ggml_type} M={M}", op.GgmlLinearCall(meta(M, 4608), blocks, ggml_type, bias)


def calls_of_unpack(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for ggml_type in _decoded_types(op):
        yield f"{ggml_type} bf16", op.UnpackCall(_blocks(4608, ggml_type), ggml_type, torch.bfloat16)


def calls_of_unpack_to_int8(op: ModuleType) -> Iterator[tuple[str, Any]]:
    for ggml_type, group in itertools.product(_decoded_types(op), (0, 256)):
        blocks = _blocks(4608, ggml_type)
        for row_scale in (None, meta(4608, 1, dtype=torch.float32)):
            label = f"{ggml_type}{' rotated' if group else ''}{' row scale' if row_scale is None else ''}"
            yield label, op.UnpackToInt8Call(blocks, ggml_type, row_scale, group)


def calls_of_unpack_int8(op: ModuleType) -> Iterator[tuple[str, Any]]:
    from lowbit.formats import Int8Weight

    for per_channel, smoothed, group in itertools.product((True, False), (False, True), (0, 256)):
        scale = meta(4608, 1, dtype=torch.float32) if per_channel else meta(dtype=torch.float32)
        smooth = meta(4608, dtype=torch.float32) if smoothed else None
        label = f"{'per-channel' if per_channel else 'per-tensor'}{' smooth' * smoothed}{' rotated' if group else ''}"
        weight = Int8Weight(meta(4608, 4608, dtype=torch.int8), (4608, 4608), scale, smooth, group)
        yield label, op.UnpackInt8Call(weight, torch.bfloat16)


def _decoded_types(op: ModuleType) -> list[str]:
    return list(importlib.import_module(f"{op.__name__}.triton_impl").DECODERS)


def _blocks(K: int, ggml_type: str) -> torch.Tensor:
    from lowbit.formats import ggml

    stored = ggml.TYPES[ggml_type]
    return meta(4608, K // stored.block_size * stored.type_size, dtype=torch.uint8)


def cases_of_int8_linear(capability: int) -> Iterator[dict[str, Any]]:
    """Every configuration in the table of the architecture, each whole, split along K, and with K not a multiple."""
    from lowbit.kernels.int8_linear import Int8LinearCall, configs

    buckets: dict[tuple, int] = {}  # the largest that a configuration serves
    for M, configurations in configs.TABLE[divmod(capability, 10)]:
        buckets |= dict.fromkeys((tuple(configuration.items()) for configuration in configurations), M)
    variants = (
        *(("bf16", 4608, 1), ("bf16 in parts", 4608, 4), ("fp16 per-tensor ragged", 4624, 1)),
        *(("bf16 rank 32", 4608, 1), ("bf16 rank 128", 4608, 1)),
    )
    for (items, M), (label, K, parts) in itertools.product(buckets.items(), variants):
        configuration = dict(items)
        N = 13824
        dtype = torch.float16 if "fp16" in label else torch.bfloat16
        scales = [meta(rows, 1, dtype=torch.float32) for rows in (M, 1 if "per-tensor" in label else N)]
        operands = [meta(rows, K, dtype=torch.int8) for rows in (M, N)]
        call = Int8LinearCall(operands[0], scales[0], operands[1], scales[1], meta(N, dtype=dtype), dtype)
        if "rank" in label:
            rank = int(label.split()[-1])
            call = dataclasses.replace(call, hidden=meta(M, rank, dtype=dtype), up=meta(N, rank, dtype=dtype))
        with (
            mock.patch.object(configs, "candidates", lambda *_, one=configuration: (one,)),
            mock.patch.object(configs, "parts_along_k", lambda *_, parts=parts: parts),
        ):
            made = launched("int8_linear", call)
        tile = "x".join(str(configuration[f"BLOCK_{dimension}"]) for dimension in "MNK")
        engine = " by copy engine" if configuration["TMA"] else ""
        name = f"{tile} w{configuration['num_warps']} s{configuration['num_stages']}{engine} {label}"
        yield from ({"op": "int8_linear", "case": name, "largest_M": M, "K": K, "launch": launch} for launch in made)


CALLS = {
    "quantize_per_token": calls_of_quantize_per_token,
    "rms_norm_scale_quantize": calls_of_rms_norm_scale_quantize,
    "swiglu_quantize": calls_of_swiglu_quantize,
    "gated_residual": calls_of_gated_residual,
    "gated_residual_norm_quantize": calls_of_gated_residual_norm_quantize,
    "record_channels": calls_of_record_channels,
    "weight_only_int8_linear": calls_of_weight_only_int8_linear,
    "ggml_linear": calls_of_ggml_linear,
    "unpack": calls_of_unpack,
    "unpack_to_int8": calls_of_unpack_to_int8,
    "unpack_int8": calls_of_unpack_int8,
}


def launched(op: str, call: Any) -> list[Launch]:
    """What an op's Triton implementation launches for a call, whose tensors may be of the meta device."""
    made: list[Launch] = []
    with launches(made.append):
        implementation = importlib.import_module(f"lowbit.kernels.{op}.triton_impl")
        asks_for_scale = op == "unpack_to_int8" and call.row_scale is None
        (implementation.find_row_scale if asks_for_scale else implementation.run)(call)
    return made


def cases(capability: int) -> Iterator[dict[str, Any]]:
    """{"op", "case", "launch"} of everything to compile, and of the INT8 product "largest_M" and "K"."""
    yield from cases_of_int8_linear(capability)
    for op, calls in CALLS.items():
        for name, call in calls(importlib.import_module(f"lowbit.kernels.{op}")):
            yield from ({"op": op, "case": name, "launch": launch} for launch in launched(op, call))


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the pack by its op's and its own name, `int8_linear._add_parts_kernel`: what `triton.jit`
    decorates in a `triton_impl.py` under a name that ends in `_kernel`."""
    found = {}
    for path in sorted((TESTS.parent / "kernels").glob("*/triton_impl.py")):
        module = importlib.import_module(f"lowbit.kernels.{path.parent.name}.triton_impl")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[f"{path.parent.name}.{name}"] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel of the pack and read its machine code.")
    parser.add_argument("--capability", type=int, default=86, help="86 for 8.6")
    parser.add_argument("--part", default="1/1", help="2/3: every third case, from the second on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    os.environ["TRITON_INTERPRET"] = "0"  # kernels that the interpreter runs cannot be compiled
    spec = importlib.util.spec_from_file_location("tests_conftest", TESTS / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # registers `lowbit`

    every = list(cases(options.capability))
    left_out = kernels().keys() - {f"{case['op']}.{case['launch'].kernel.fn.__name__}" for case in every}
    if left_out:
        sys.exit(f"nothing launches {', '.join(sorted(left_out))}: add a call to tests/kernels/machine_code.py")
    different = {}
    for case in every:
        launch = case["launch"]
        different.setdefault(f"{launch.kernel} {specialization(launch)} {launch.options}", case)
    results = []
    for case in list(different.values())[part - 1 :: parts]:
        launch = case.pop("launch")
        kernel = compiled(launch, options.capability)
        if not any(map(_is_descriptor, launch.arguments.values())):  # which is several parameters in the PTX
            passed_to_entry(launch, kernel.asm["ptx"])
        results.append({"kernel": launch.kernel.fn.__name__, **case, **read(kernel, options.capability)})
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
