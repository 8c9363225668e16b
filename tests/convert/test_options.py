"""Options that would have no effect, and places that cannot be written to, are refused before time is spent."""

import hashlib
import json
import os
import pathlib

import gguf
import pytest
import torch
from host_harness import small_models as small
from lowbit.convert import output_file
from lowbit.convert.progress import size_text
from lowbit.convert.record import (
    FragileLayer,
    read_activation_record,
    write_activation_record,
    write_fragility_report,
)
from lowbit.tests.convert.making import BLOCK_LINEARS, spiky_record, to_gguf, to_int8

BOTH = ((to_int8, "out.safetensors"), (to_gguf, "out.gguf"))


@pytest.fixture
def record(tmp_path):
    return str(spiky_record(tmp_path / "record.safetensors"))


@pytest.fixture
def fragility(tmp_path):
    write_fragility_report(tmp_path / "report.json", [FragileLayer(name, 1.0) for name in BLOCK_LINEARS])
    return str(tmp_path / "report.json")


def refused(convert, source, target, text, **options):
    def report(progress):
        raise AssertionError(f"{progress.stage} has begun")

    with pytest.raises(ValueError, match=text):
        convert(source, target, report=report, **options)
    assert not target.exists()


@pytest.mark.parametrize("convert, name", BOTH)
def test_options_that_need_another_one(tmp_path, fp8_files, fragility, convert, name):
    source, target = fp8_files["conditional"], tmp_path / name
    text = "number of layers to protect: found 4 without a fragility report.*Name a report, or leave the number out"
    refused(convert, source, target, text, protect_count=4)
    refused(convert, source, target, "found 0, with which a fragility report has no effect", protect_count=0,
            reports=(fragility,))  # fmt: skip
    text = "one file for both branches: found one branch in conditional.safetensors. Name the file of the unconditional"
    refused(convert, source, target, text, one_file=True)


def test_options_of_int8_without_effect(tmp_path, fp8_files):
    source, target = fp8_files["conditional"], tmp_path / "out.safetensors"
    text = "alpha of smoothing: found 0.6 without an activation record, which switches smoothing on"
    refused(to_int8, source, target, text, alpha=0.6)
    odd = {f"blocks.{i}.w.weight": torch.randn(264, 264) for i in range(2)}
    source = small.save(tmp_path / "odd.safetensors", odd)
    refused(to_int8, source, target, "rotation: found no layer whose rows are a multiple of 16 long", rotate=True)
    assert to_int8(source, target)


def test_a_record_that_no_type_uses(tmp_path, fp8_files, record):
    source, target = fp8_files["conditional"], tmp_path / "out.gguf"
    text = (
        r"record\.safetensors: found no layer in this activation record that becomes Q4_K or Q5_K or Q6_K, which alone"
    )
    refused(to_gguf, source, target, text, policy="q8_0", records=(record,))
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": "Q8_0", "layers": {"layers.0.*.w1": "Q4_K"}}))
    assert to_gguf(source, target, policy, records=(record,))


@pytest.mark.parametrize("convert, name", BOTH)
def test_what_one_branch_read_does_not_steer_the_other(tmp_path, fp8_files, record, fragility, convert, name):
    source, target = fp8_files["conditional"], tmp_path / name
    both, options = {"unconditional": str(fp8_files["unconditional"])}, {} if convert is to_int8 else {"policy": "q4_k"}
    for what, one in (("activation records", {"records": (record,)}), ("fragility reports", {"reports": (fragility,)})):
        text = f"{what}: found 1, expected 2: one for each branch to convert, the conditional one first"
        refused(convert, source, target, text, **both, **one, **options)
        twice = {name: paths * 2 for name, paths in one.items()}
        refused(convert, source, target, f"{what}: found 2, expected 1", **twice, **options)
    # Whoever means it says it twice.
    protect = {"reports": (fragility,) * 2, "protect_count": 2}
    written = convert(source, target, records=(record,) * 2, **protect, **both, **options)
    assert [w.protected for w in written] == [2, 2]


def test_records_and_reports_of_the_other_branch(tmp_path, fp8_files):
    branches, both = ("conditional", "unconditional"), {"unconditional": str(fp8_files["unconditional"])}
    source, target = fp8_files["conditional"], tmp_path / "out.safetensors"
    layers = [FragileLayer(name, 1.0) for name in BLOCK_LINEARS]
    records, reports = [], []
    for branch in branches:
        records.append(str(tmp_path / f"{branch}.safetensors"))
        write_activation_record(records[-1], read_activation_record(spiky_record(tmp_path / "r.safetensors")),
                                {"branch": branch})  # fmt: skip
        reports.append(str(tmp_path / f"{branch}.json"))
        write_fragility_report(reports[-1], layers, {"branch": branch})
    text = "made on the unconditional branch.*expected one of the conditional branch.*Name the other branch's"
    refused(to_int8, source, target, f"unconditional.safetensors.*{text}", records=tuple(records[::-1]), **both)
    refused(
        to_int8, source, target, f"unconditional.json.*{text}", reports=tuple(reports[::-1]), protect_count=1, **both
    )
    assert to_int8(source, target, records=tuple(records), reports=tuple(reports), protect_count=1, **both)
    alone = tmp_path / "alone.safetensors"  # a file that is one branch does not say which
    assert to_int8(both["unconditional"], alone, records=(records[1],))


def test_a_source_that_changes_meanwhile(tmp_path, fp8_files):
    source, target = tmp_path / "source.safetensors", tmp_path / "out.gguf"
    source.write_bytes(fp8_files["conditional"].read_bytes())
    written = []

    def report(progress):
        if progress.stage == "writing" and not written:
            written.append(source.stat())
            with source.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
            os.utime(source, ns=(written[0].st_atime_ns, written[0].st_mtime_ns + 1_000_000_000))

    with pytest.raises(RuntimeError, match=r"source\.safetensors changed while it was converted: nothing was written"):
        to_gguf(source, target, report=report)
    assert written and [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_files_of_other_kinds(tmp_path):
    kinds = {
        "a LoRA": {f"diffusion_model.layers.{i}.w.lora_A.weight": torch.zeros(512, 512) for i in range(2)},
        "a text encoder": {
            "model.embed_tokens.weight": torch.zeros(512, 512),
            **{f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(512, 512) for i in range(2)},
        },
    }
    for kind, tensors in kinds.items():
        source = small.save(tmp_path / "other.safetensors", tensors)
        refused(to_int8, source, tmp_path / "out.safetensors", f"found {kind}, expected a diffusion transformer")


def test_a_record_that_contradicts_the_name_of_the_only_branch(tmp_path, fp8_files):
    record = str(tmp_path / "record.safetensors")
    activations = read_activation_record(spiky_record(tmp_path / "r.safetensors"))
    write_activation_record(record, activations, {"branch": "conditional"})
    source = tmp_path / "model_uncond.safetensors"
    source.write_bytes(fp8_files["unconditional"].read_bytes())
    text = "made on the conditional branch, expected one of the unconditional branch"
    refused(to_int8, source, tmp_path / "out.safetensors", text, records=(record,))


@pytest.mark.parametrize("make_folder", [False, True])
def test_a_folder_that_takes_no_files_is_noticed_first(tmp_path, fp8_files, monkeypatch, make_folder):
    def refuse(path, mode):
        assert os.path.dirname(path) == str(tmp_path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output_file, "open", refuse, raising=False)
    folder = tmp_path / "new" if make_folder else tmp_path
    for convert, name in BOTH:
        stages = []
        with pytest.raises(RuntimeError, match=r"cannot be written \(Permission denied\)\. Pick a folder that you may"):
            convert(fp8_files["conditional"], folder / name, report=stages.append, make_folder=make_folder)
        assert not stages
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(tmp_path, fp8_files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(to_int8, fp8_files["conditional"], tmp_path / "out.safetensors", "found cuda:2, expected cuda:0 to cuda:1",
            device="cuda:2")  # fmt: skip


@pytest.mark.parametrize("device", ["xpu", "mps", "meta", "privateuseone:0", "gpu", "", "cuda:x"])
def test_devices_that_nothing_is_computed_on(tmp_path, device):
    """Before the source is looked at."""
    text = f"device: found {device!r}, expected cpu, cuda or a certain GPU such as cuda:1"
    for convert, name in BOTH:
        refused(convert, tmp_path / "gone.safetensors", tmp_path / name, text, device=device)


@pytest.mark.parametrize("convert, name", BOTH)
def test_parts_of_a_split_model(tmp_path, fp8_files, convert, name):
    """As with GGUF files whose metadata says it; here only the name does."""
    target, text = tmp_path / name, "found one part of a model split into 2 files, expected a whole model in one file"
    for part in ("m-00001-of-00002", "diffusion_pytorch_model-00002-of-00002.fp16"):
        source = tmp_path / f"{part}.safetensors"
        source.write_bytes(fp8_files["conditional"].read_bytes())
        refused(convert, source, target, text)
        refused(convert, fp8_files["conditional"], target, text, unconditional=str(source))
    for whole in ("m-00001-of-00001", "1-of-2-girls"):
        source = (tmp_path / "m-00001-of-00002.safetensors").rename(tmp_path / f"{whole}.safetensors")
        assert convert(source, target, overwrite=True)
        source.rename(tmp_path / "m-00001-of-00002.safetensors")
    merged = tmp_path / "m-00001-of-00002.gguf"  # GGUF knows it from its metadata
    to_gguf(fp8_files["conditional"], merged)
    assert convert(merged, target, overwrite=True)


def test_sizes_have_the_unit_that_fits():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.00 kB", 12_345: "12.3 kB", 999_499: "999 kB", 999_501: "1.00 MB"}
    sizes |= {187_000_000: "187 MB", 9_994_000_000: "9.99 GB", 9_996_000_000: "10.0 GB", 18_640_000_000: "18.6 GB"}
    assert {size: size_text(size) for size in sizes} == sizes


def test_the_recipe_names_the_branches_that_are_inside(tmp_path, fp8_files, record, fragility):
    def recipe(path) -> dict:
        return json.loads(gguf.GGUFReader(path).get_field("lowbit.recipe").contents())

    def sha256(path) -> str:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

    hashes = {branch: sha256(path) for branch, path in fp8_files.items()}
    other = str(spiky_record(tmp_path / "other.safetensors", seed=1))
    options = {"records": (record, other), "reports": (fragility,) * 2, "protect_count": 2, "policy": "q4_k"}
    source, options["unconditional"] = fp8_files["conditional"], str(fp8_files["unconditional"])
    (together,) = to_gguf(source, tmp_path / "one.gguf", one_file=True, **options)
    found = recipe(together.path)
    assert found["source_sha256"] == hashes
    for name, paths in (("activation_record", (record, other)), ("fragility_report", (fragility,) * 2)):
        assert found[f"{name}_sha256"] == dict(zip(hashes, map(sha256, paths), strict=True))
    for written, branch in zip(to_gguf(source, tmp_path / "two.gguf", **options), hashes, strict=True):
        alone = recipe(written.path)
        assert alone["source_sha256"] == {branch: hashes[branch]} and alone["protect_count"] == 2
        assert alone["activation_record_sha256"] == {branch: found["activation_record_sha256"][branch]}
    # From one file with both: its hash stands for either.
    (again,) = to_gguf(together.path, tmp_path / "again.gguf", "q8_0", one_file=True)
    assert recipe(again.path)["source_sha256"] == dict.fromkeys(hashes, sha256(together.path))
