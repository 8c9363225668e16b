"""The machine code of every Triton kernel for an RTX 3090 (sm_86), compiled without a GPU: nothing spills, blocks fit,
and the INT8 product leaves nearly all of its time to the tensor cores."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from lowbit.tests.kernels import machine_code

LARGEST_BLOCK = 99 * 1024  # bytes of shared memory


@pytest.fixture(scope="module")
def sm86():
    """What machine_code.py prints, from two processes, because compiling takes a core each."""
    parts = [f"{part}/2" for part in (1, 2)]
    program = [sys.executable, str(pathlib.Path(machine_code.__file__)), "--capability", "86", "--part"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    children = [
        subprocess.Popen([*program, part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for part in parts
    ]
    outputs = [child.communicate() for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors[-4000:]
    return [result for printed, _ in outputs for result in json.loads(printed)]


def told(results, *names):
    return [f"{result['kernel']} {result['case']}: {[result[name] for name in names]}" for result in results]


def test_no_kernel_spills(sm86):
    spilling = [result for result in sm86 if result["stack_bytes"] or result["spills"]]
    assert told(spilling, "registers", "stack_bytes", "spills") == []


def test_every_block_fits_the_shared_memory(sm86):
    assert told([result for result in sm86 if result["shared_bytes"] > LARGEST_BLOCK], "shared_bytes") == []


def test_codes_are_stored_as_they_are(sm86):
    """Where a byte of a float's bits is stored alone, the assembler has been seen to convert the float, saturating."""
    assert told([result for result in sm86 if result["saturating_conversions"]], "saturating_conversions") == []


def product_loops(results):
    """Name, largest number of tokens and main loop of each way of compiling the INT8 product."""
    products = [result for result in results if result["kernel"] == "_int8_linear_kernel"]
    assert len(products) > 20
    return [(result["case"], result["largest_M"], result["loop"]) for result in products]


def test_the_product_runs_on_int8_tensor_cores(sm86):
    for case, _, loop in product_loops(sm86):
        block_m, block_n, block_k, warps = map(int, re.match(r"(\d+)x(\d+)x(\d+) w(\d+)", case).groups())
        step = block_m * block_n * block_k // (16 * 8 * 32) // warps  # a warp's share of one step along K
        assert loop is not None and loop["tensor_instructions"] and loop["tensor_instructions"] % step == 0, case
        assert all(opcode.startswith("IMMA.16832.S8.S8") for opcode in loop["opcodes"]), case


def test_the_products_loop_issues_few_instructions_beside_those_of_the_tensor_cores(sm86):
    """At most 0.15 others in a tensor slot (`machine_code` defines it). Up to 64 tokens read weights for longer than
    they multiply: their configurations are exempt. Those of thousands of tokens keep to it with the IMMAs counted."""
    for case, tokens, loop in product_loops(sm86):
        if tokens > 64:
            assert loop["other_per_slot"] <= 0.15, case
        if tokens == max(tokens for _, tokens, _ in product_loops(sm86)):
            assert loop["issued_per_slot"] <= 0.15, case


def test_rotations_run_on_tensor_cores(sm86):
    rotated = [
        result
        for result in sm86
        if "rotated" in result["case"] and result["op"] != "unpack_to_int8"  # which adds and subtracts float32 values
    ]
    assert rotated and told([result for result in rotated if not result["tensor_instructions"]], "op") == []


# The reading itself

PTX = """
.version 8.7
.target sm_86
.visible .entry _a_kernel(
	.param .u64 .ptr .global .align 1 _a_kernel_param_0,
	.param .u32 _a_kernel_param_1,
	.param .f32 _a_kernel_param_2,
	.param .b64 _a_kernel_param_3,
	.param .u64 .ptr .global .align 1 _a_kernel_param_4
)
.reqntid 128
{
	.reg .pred %p<12>;
	ld.param.b64 %rd10, [_a_kernel_param_0];
}
"""

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                              /* 0x00000a0000017a02 */
                                                                                       /* 0x000fe40000000f00 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;                            /* 0x000000000204783b */
        /*0020*/               @P0 BRA 0x50 ;                                          /* 0x0000000000007947 */
        /*0030*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;       /* 0x0000000604087237 */
        /*0040*/                   IMMA.16832.S8.S8.SAT R12, R4.ROW, R6.COL, R12 ;     /* 0x000000060c0c7237 */
        /*0050*/                   IADD3 R2, R2, 0x10, RZ ;                            /* 0x0000001002027810 */
        /*0060*/              @!P1 BRA 0x10 ;                                          /* 0x0000000000007947 */
        /*0070*/                   STL.64 [R1], R14 ;                                  /* 0x0000000e01007387 */
        /*0080*/              @!P2 BRA 0x0 ;                                           /* 0x0000000000007947 */
        /*0090*/                   EXIT ;                                              /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                           /* 0xfffffff000007947 */
"""


def test_parameters_of_an_entry():
    assert machine_code.entry(PTX) == ("_a_kernel", [64, 32, 32, 64, 64])
    assert machine_code.entry(".visible .entry _none()\n{") == ("_none", [])
    with pytest.raises(ValueError, match=r"no \.entry"):
        machine_code.entry(".func _helper(.param .u32 a) {}")


def test_instructions_and_the_hottest_loop():
    code = machine_code.instructions(SASS)
    assert [instruction.opcode.partition(".")[0] for instruction in code] == [
        *("MOV", "LDSM", "BRA", "IMMA", "IMMA", "IADD3", "BRA", "STL", "BRA", "EXIT", "BRA")
    ]
    loop = machine_code.hottest_loop(code)
    assert [hex(instruction.address) for instruction in loop] == ["0x10", "0x20", "0x30", "0x40", "0x50", "0x60"]
    assert machine_code.hottest_loop(code[-2:]) == []
    assert machine_code._read_loop(loop, 86) == {
        "instructions": 6,
        "tensor_instructions": 2,
        "opcodes": ["IMMA.16832.S8.S8.SAT"],
        "tensor_slots": 32.0,
        "other_per_slot": 0.125,
        "issued_per_slot": 0.1875,
    }
