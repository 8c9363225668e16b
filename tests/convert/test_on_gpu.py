"""What a GPU computes is what the CPU does."""

import pathlib

import pytest
import torch
from lowbit.tests.convert.making import BLOCK_LINEARS, floats_of, spiky_record, sqnr_db, to_gguf, to_int8

pytestmark = pytest.mark.gpu


def by_device(convert, source, folder, suffix, *arguments, **options) -> list[pathlib.Path]:
    """The files that the CPU and the GPU make."""
    devices = {"cpu": "cpu", "gpu": "cuda"}
    targets = [folder / f"{name}{suffix}" for name in devices]
    for target, device in zip(targets, devices.values(), strict=True):
        convert(source, target, *arguments, device=device, **options)
    return targets


def test_int8_is_the_same_bytes(tmp_path, fp8_files):
    cpu, gpu = by_device(to_int8, fp8_files["conditional"], tmp_path, ".safetensors")
    assert cpu.read_bytes() == gpu.read_bytes()


def test_smoothed_int8_has_the_same_factors(tmp_path, fp8_files):
    """Powers of two: they are in the norms, which are not quantized."""
    record = spiky_record(tmp_path / "record.safetensors")
    cpu, gpu = by_device(to_int8, fp8_files["conditional"], tmp_path, ".safetensors", records=(str(record),))
    expected, got = floats_of(cpu), floats_of(gpu)
    norms = [key for key in expected if "norm" in key]
    assert len(norms) >= 4 and all(torch.equal(expected[key], got[key]) for key in norms)


def test_q8_0_is_the_same_bytes(tmp_path, fp8_files):
    cpu, gpu = by_device(to_gguf, fp8_files["conditional"], tmp_path, ".gguf", "q8_0")
    assert cpu.read_bytes() == gpu.read_bytes()


@pytest.mark.parametrize("with_record", [False, True], ids=["plain", "record"])
def test_q4_k_is_as_near_to_the_source(tmp_path, fp8_files, with_record):
    """Sums in another order: where two scales are as good as each other, the other one may be taken."""
    records = (str(spiky_record(tmp_path / "record.safetensors")),) if with_record else ()
    cpu, gpu = by_device(to_gguf, fp8_files["conditional"], tmp_path, ".gguf", "q4_k", records=records)
    source, expected, got = floats_of(fp8_files["conditional"]), floats_of(cpu), floats_of(gpu)
    for key, value in source.items():
        if key.removesuffix(".weight") in BLOCK_LINEARS:
            assert abs(sqnr_db(value, got[key]) - sqnr_db(value, expected[key])) < 0.02, key
        else:
            assert torch.equal(got[key], expected[key]), key
