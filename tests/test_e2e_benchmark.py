"""The benchmark of whole models: run on a small one in a process of its own, and its logic on made-up numbers."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from host_harness import inprocess, small_models
from lowbit.benchmarks import e2e, e2e_table, e2e_variants, results

PROGRAM = inprocess.ROOT / "benchmarks" / "e2e.py"


# The program


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of one run's results, and what it printed."""
    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    folder = tmp_path_factory.mktemp("e2e")
    variants = "lowbit_q4_k_exact,lowbit_int8_int8_lora,lowbit_int8_int8,stock_bf16,stock_int8"
    return folder, run(folder, variants, "--alternate", "2", "--profile", "lowbit_q4_k_exact")


def run(folder, variants: str, *options: str) -> str:
    command = [sys.executable, str(PROGRAM), "--tiny", "--variants", variants, "--steps", "3", *options]
    command += ["--workdir", str(folder / "work"), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_of(folder) -> list[dict[str, str]]:
    with (folder / "e2e_tiny.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_a_row_for_every_variant(measured):
    folder, printed = measured
    rows = rows_of(folder)
    names = [row["variant"] for row in rows]
    assert names == ["stock_bf16", "lowbit_q4_k_exact", "lowbit_int8_int8", "lowbit_int8_int8_lora", "stock_int8"]
    for row in rows:
        assert tuple(row) == e2e_table.COLUMNS
        assert row["device"] == "cpu" and row["size"] == "256" and row["free_vram_gb"] == row["peak_vram_gb"] == ""
        times = [float(row[key]) for key in ("load_s", "first_step_s", "step_s", "peak_ram_gb")]
        assert all(math.isfinite(time) and time > 0 for time in times)
        assert row["variant"] in printed
    error = {row["variant"]: row["error"] for row in rows}
    assert float(error["stock_bf16"]) == 0.0
    # Both are the same codes: a few of the activations' differ by the order of roundings.
    assert float(error["lowbit_int8_int8"]) == pytest.approx(float(error["stock_int8"]), rel=0.1)
    assert 1e-3 < float(error["stock_int8"]) < 2e-2 < float(error["lowbit_q4_k_exact"]) < 0.1
    assert error["lowbit_int8_int8_lora"] == ""  # stock bf16 was not run with it


def test_every_number_is_in_the_json_file_and_the_profile_beside_it(measured):
    folder, _ = measured
    (record,) = json.loads((folder / "e2e_tiny.json").read_text())
    assert record["failed"] == {} and record["left_out"] == [] and record["layers"] == 2
    for row in record["rows"]:
        assert [len(steps) for steps in row["steps_s"]] == [2, 2]  # of both samplings
        assert row["first_sampling_step_s"] > 0 and row["call_s"] > 0
        calls = row["alternate"]
        assert len(calls["conditional_ms"]) == len(calls["unconditional_ms"]) == 2
    profile = json.loads((folder / "e2e_tiny_profile_lowbit_q4_k_exact_256.json").read_text())
    assert 0 < profile["python_ms"] <= profile["wall_ms"]
    assert profile["device_ms"] == pytest.approx(sum(profile["parts_ms"].values()))
    assert profile["parts_ms"]["products"] > 0
    assert "aten::mm" in (folder / "e2e_tiny_profile_lowbit_q4_k_exact_256.md").read_text()
    assert not list((folder / "work" / "models" / "diffusion_models").iterdir())


def test_a_later_run_adds_its_rows_and_refers_to_the_first_ones_stock_model(measured, tmp_path):
    folder = tmp_path / "later"
    shutil.copytree(measured[0], folder)
    earlier = rows_of(folder)
    printed = run(folder, "lowbit_int8_int8", "--cold")
    assert "errors refer to stock_bf16 of an earlier run" in printed
    assert rows_of(folder)[:-1] == earlier
    error = {row["variant"]: row["error"] for row in earlier}
    assert rows_of(folder)[-1]["error"] == error["lowbit_int8_int8"]
    assert len(json.loads((folder / "e2e_tiny.json").read_text())) == 2


def test_without_a_gpu_the_full_model_is_refused(tmp_path):
    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    command = [sys.executable, str(PROGRAM), "--workdir", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "This needs a CUDA device, and torch finds none. --tiny runs on the CPU.\n" in done.stderr
    assert "Traceback" not in done.stderr


# Names


@pytest.mark.parametrize(
    "name, file, mode, loras, plain_torch",
    [
        ("stock_bf16", "bf16", None, 0, False),
        ("stock_int8_convrot_lora", "int8_convrot", None, 1, False),
        ("lowbit_int8", "int8", "auto", 0, False),
        ("lowbit_int8_int8", "int8", "int8", 0, False),
        ("lowbit_q4_k_exact_lora2", "q4_k", "exact", 2, False),
        ("torch_gguf_q4_k", "q4_k", "exact", 0, True),
        ("lowbit_q4_k_lora_two_gpus", "q4_k", "auto", 1, False),
        ("stock_int8_profiled", "int8", None, 0, False),
    ],
)
def test_a_name_says_what_is_measured(name, file, mode, loras, plain_torch):
    variant = e2e_variants.variant(name)
    assert (variant.name, variant.file, variant.mode, variant.loras) == (name, file, mode, loras)
    assert variant.plain_torch is plain_torch
    extras = [extra for extra in ("_two_gpus", "_profiled") if name.endswith(extra)]
    assert [variant.extra] == (extras or [""])


@pytest.mark.parametrize("name", ["stock_bf17", "stock_int8_exact", "lowbit_q8_0_fast", "lowbit_q5_k", "_lora", ""])
def test_a_name_of_no_variant_is_refused(name):
    with pytest.raises(ValueError, match=r"no variant .*; there are stock_bf16"):
        e2e_variants.variant(name)


def test_variants_of_one_file_follow_each_other_and_loras_their_base():
    names = ("lowbit_q4_k_lora", "lowbit_int8", "lowbit_q4_k", "stock_int8", "lowbit_q4_k", "stock_bf16_lora")
    expected = ["stock_bf16_lora", "lowbit_q4_k", "lowbit_q4_k_lora", "lowbit_int8", "stock_int8"]
    assert [variant.name for variant in e2e_variants.in_order(names)] == expected


def test_arguments_are_checked(capsys):
    assert e2e.parse(["--tiny"]).size == (256,) and e2e.parse([]).size == (1024,)
    assert e2e.parse(["--size", "1024,2048"]).size == (1024, 2048)
    assert e2e.parse([]).free_vram_gb == (None,)
    assert e2e.parse(["--free-vram-gb", "all,24,7.5"]).free_vram_gb == (None, 24.0, 7.5)
    for arguments, text in (
        (["--profile", "stock_fp8"], "stock_fp8 not among --variants"),
        (["--size", "1000"], "multiples of 16"),
        (["--steps", "1"], "at least 2, found 1"),
        (["--tiny", "--free-vram-gb", "all,24"], "needs a CUDA device"),
    ):
        with pytest.raises(SystemExit):
            e2e.parse(arguments)
        assert text in capsys.readouterr().err


# Table and demands


def row(variant: str, step_s: float, error: float | None = 0.1, peak: float | None = 10.0) -> dict:
    numbers = {"load_s": 1.0, "first_step_s": 2.0, "step_s": step_s, "peak_vram_gb": peak, "peak_ram_gb": 3.0}
    return {"variant": variant, "size": 1024, "free_vram_gb": None, "error": error} | numbers


def verdicts(*rows: dict, free_vram_gb: float | None = None) -> dict[str, str]:
    return {demand.text: demand.verdict for demand in e2e_table.demands(rows, 1024, free_vram_gb)}


def test_speed_and_errors_have_floors():
    rows = [row("stock_bf16", 0.34), row("stock_fp8_unpacked", 0.36), row("stock_int8", 0.32, error=0.07)]
    rows += [row("lowbit_int8", 0.235, error=0.0701), row("lowbit_q4_k", 0.25, error=0.21)]
    rows += [row("torch_gguf_q4_k", 0.6), row("lowbit_q4_k_exact", 0.35, error=0.2)]
    assert verdicts(*rows) == {
        "speed of lowbit_int8 / stock_fp8_unpacked": "PASS",
        "speed of lowbit_int8 / stock_int8": "short",  # 1.36
        "speed of lowbit_q4_k / stock_fp8_unpacked": "PASS",
        "speed of lowbit_q4_k / stock_bf16": "PASS",
        "speed of lowbit_q4_k / torch_gguf_q4_k": "PASS",
        "speed of lowbit_q4_k_exact / stock_bf16": "PASS",
        "error of lowbit_q8_0 / lowbit_q8_0_exact": "no rows",
        "error of lowbit_int8 / stock_int8": "short",
        "error of lowbit_q4_k / lowbit_q4_k_exact": "PASS",
        "cost of lowbit_..._lora, of a step": "no rows",
        "cost of lowbit_..._lora2, of a step": "no rows",
    }


def test_what_loras_cost_is_measured_in_turn_with_the_base():
    rows = [row("lowbit_int8", 0.2), row("lowbit_int8_lora", 0.3) | {"times_base": 1.07}]
    rows += [row("lowbit_int8_lora2", 0.2) | {"times_base": 1.15}, row("lowbit_q4_k_lora", 0.2)]
    found = verdicts(*rows, row("stock_int8_lora", 0.6) | {"times_base": 2.0})
    costs = {text: verdict for text, verdict in found.items() if text.startswith("cost")}
    assert costs == {
        "cost of lowbit_int8_lora, of a step": "PASS",
        "cost of lowbit_q4_k_lora, of a step": "no rows",
        "cost of lowbit_int8_lora2, of a step": "short",
    }
    assert e2e_table.Measured(rows).cost("lowbit_int8_lora") == pytest.approx(0.07)


def test_a_smaller_card_has_a_demand_of_its_own():
    text = "peak VRAM of lowbit_q4_k in GB"
    assert verdicts(row("lowbit_q4_k", 0.2, peak=13.9), free_vram_gb=24) == {text: "PASS"}
    assert verdicts(row("lowbit_q4_k", 0.2, peak=14.1), free_vram_gb=24) == {text: "short"}
    assert verdicts(row("lowbit_q4_k", 0.2), free_vram_gb=16) == {}
    assert list(e2e_table.demands([row("lowbit_int8", 0.2)], 2048, None)) == []


def test_on_12_gb_speeds_are_compared_with_all_memory_and_with_the_stock_loader():
    full = [row("lowbit_q4_k", 0.25), row("lowbit_int8", 0.2)]

    def small(q4_k: float, int8: float) -> dict[str, str]:
        rows = [row("lowbit_q4_k", q4_k), row("lowbit_int8", int8), row("stock_int8", 1.2)]
        return {demand.text: demand.verdict for demand in e2e_table.demands(rows, 1024, 12, full)}

    q4_k, int8 = "speed of lowbit_q4_k / with all memory", "speed of lowbit_int8 / stock_int8"
    assert small(0.26, 0.99) == {q4_k: "PASS", int8: "PASS"}
    assert small(0.27, 1.01) == {q4_k: "short", int8: "short"}
    assert verdicts(row("lowbit_q4_k", 0.2), free_vram_gb=12) == {q4_k: "no rows", int8: "no rows"}


def test_loading_a_cold_file_is_compared_with_reading_and_copying_it():
    text = "cold file to first step of lowbit_int8 / reading and copying"
    cold = row("lowbit_int8", 0.2) | {"cold_load_s": 1.0, "cold_first_step_s": 5.2}
    assert verdicts(cold | {"read_and_copy_s": 4.7})[text] == "PASS"
    assert verdicts(cold | {"read_and_copy_s": 4.5})[text] == "short"
    assert text not in verdicts(cold)


def test_what_recording_costs_is_measured_in_turn_with_the_base():
    text = "cost of stock_bf16_profiled, of a step"
    assert verdicts(row("stock_bf16_profiled", 0.5) | {"times_base": 1.09})[text] == "PASS"
    assert verdicts(row("stock_bf16_profiled", 0.3) | {"times_base": 1.11})[text] == "short"
    assert verdicts(row("stock_bf16_profiled", 0.3))[text] == "no rows"


def test_the_table_shows_ratios_within_the_run():
    rows = [row("stock_bf16", 0.4), row("lowbit_int8", 0.2, error=None), row("lowbit_int8_lora", 0.22, peak=None)]
    rows[-1]["times_base"] = 1.09
    rows.append(row("lowbit_int8_two_gpus", 0.12) | {"times_base": 0.6})
    heading, *lines = [line.split() for line in e2e_table.table(rows).splitlines()]
    assert heading[-5:] == ["latent", "/bf16", "/fp8_unpacked", "/int8", "cost"]
    assert [line[-5:] for line in lines] == [
        ["-", "1.000", "-", "-", "-"],
        ["-", "2.000", "-", "-", "-"],
        ["-", "1.818", "-", "-", "+9.0%"],
        ["-", "3.333", "-", "-", "-40.0%"],
    ]
    demands = list(e2e_table.demands(rows, 1024, None))
    assert "speed of lowbit_q4_k / stock_bf16" in e2e_table.verdicts(demands)
    assert e2e_table.Demand("d", 1.5, 1.4).line(3) == "d      1.500  floor 1.40  PASS"


ENVIRONMENT = {"date": "2026-01-01 10:00:00", "device": "a device", "torch": "2.11", "triton": "3.6", "comfyui": "0.30"}


def test_the_picture_shows_the_fullest_run_of_each_size_with_all_memory(tmp_path):
    path = tmp_path / "e2e.csv"

    def append(date: str, **values) -> None:
        measured = row("lowbit_int8", 0.2) | values
        written = e2e_table.csv_row(ENVIRONMENT | {"date": date}, measured)
        results.append(path, e2e_table.COLUMNS, [written])

    append("2026-01-01 10:00:00", step_s=0.5)
    append("2026-01-02 10:00:00", step_s=0.3)
    append("2026-01-02 10:00:00", variant="stock_bf16", step_s=0.4)
    append("2026-01-01 11:00:00", size=2048, step_s=0.9)
    append("2026-01-02 11:00:00", size=2048, step_s=0.8)  # the newer of two with as many variants
    append("2026-01-02 12:00:00", step_s=0.6)  # newer, with fewer
    append("2026-01-02 13:00:00", step_s=0.1)  # newer, with as many, of which none is stock
    append("2026-01-02 13:00:00", variant="lowbit_q4_k", step_s=0.1)
    append("2026-01-02 12:00:00", variant="lowbit_int8_lora", step_s=0.6)
    append("2026-01-03 10:00:00", step_s=0.7, free_vram_gb=24.0, error=None)
    assert e2e_table.fullest_runs(path) == {1024: {"lowbit_int8": 0.3, "stock_bf16": 0.4}, 2048: {"lowbit_int8": 0.8}}
    last = path.read_text().splitlines()[-1]
    assert last == "2026-01-03 10:00:00,a device,2.11,3.6,0.30,lowbit_int8,1024,24,1,2,0.7,10,3,"


# What needs ComfyUI's modules


def test_time_on_the_device_is_told_apart_by_kernel_names(comfy_host):
    from lowbit.benchmarks import e2e_profile

    parts = {
        "products": [
            "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>",
            "_int8_linear_kernel",
            "_weight_only_int8_linear_kernel",
        ],
        "attention": ["void pytorch_flash::flash_fwd_kernel<...>", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"],
        "unpacking, quantizing, fused elementwise": [
            *("_unpack_kernel", "_unpack_to_int8_kernel", "_quantize_per_token_kernel", "_gated_residual_kernel"),
            "void quantize_int8_rowwise_kernel<__nv_bfloat16>",
        ],
        "copies": ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)"],
        "the rest": ["void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"],
    }
    assert {name: e2e_profile.part_of(name) for names in parts.values() for name in names} == {
        name: part for part, names in parts.items() for name in names
    }
    found = e2e_profile.by_part([("_unpack_kernel", 3, 2.0), ("ampere_gemm", 1, 6.0), ("unused", 1, 0.0)])
    assert found["device_ms"] == 8.0 and found["parts_ms"]["products"] == 6.0
    assert [kernel["kernel"] for kernel in found["largest"]] == ["ampere_gemm", "_unpack_kernel"]


def test_bytes_to_the_device_are_those_of_copies_from_the_host(comfy_host):
    from lowbit.benchmarks import e2e_profile

    def event(category: str, name: str, size: int) -> dict:
        return {"cat": category, "name": name, "args": {"bytes": size}}

    trace = [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 100),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 20),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 3),
        {"cat": "kernel", "name": "_unpack_kernel", "args": {}},
        {"name": "process_name", "ph": "M"},
    ]
    assert e2e_profile.trace_bytes_to_device({"traceEvents": trace}) == 120


def test_files_hold_what_the_formats_quantizers_make(comfy_host, tmp_path):
    from lowbit.benchmarks import e2e_files, e2e_model
    from lowbit.formats import ggml, int8
    from lowbit.loaders.branch import load_branch

    for folder in ("diffusion_models", "loras"):
        (tmp_path / folder).mkdir()
    model = e2e_model.Model(small_models.SMALL, torch.device("cpu"))
    files = e2e_files.Files(model, tmp_path)
    key, norm = "layers.1.feed_forward.w2.weight", "layers.1.attention_norm1.weight"
    quantize = {
        "int8": lambda w: int8.quantize_weight(w).data,
        "int8_convrot": lambda w: int8.quantize_weight(w, rotation_group=256).data,
        "q8_0": lambda w: ggml.quantize(w, "Q8_0"),
        "q4_k": lambda w: ggml.quantize(w, "Q4_K"),
    }
    for name, quantized in quantize.items():
        paths = files.prepare(name)
        assert sorted((tmp_path / "diffusion_models").iterdir()) == paths
        for path, branch in zip(paths, e2e_model.BRANCHES, strict=True):
            weights = load_branch(str(path), branch).weights
            assert weights.keys() == model.shapes.keys()
            assert torch.equal(weights[key].data, quantized(model.weight(branch, key)))
            assert torch.equal(weights[norm].float(), model.weight(branch, norm).float())
    conditional, unconditional = (model.weight(branch, key) for branch in e2e_model.BRANCHES)
    assert not torch.equal(conditional, unconditional)
    loud = model.weight("conditional", "layers.0.feed_forward.w3.weight").float().norm(dim=1)
    assert int((loud > 10 * loud.median()).sum()) == 2


def test_a_variant_that_fails_is_recorded_and_the_run_goes_on(comfy_host, tmp_path, monkeypatch, capsys):
    from lowbit.benchmarks import e2e_host, e2e_run

    clock = [0.0]
    monkeypatch.setattr(e2e_run, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def measure(self, variant, size, free_vram_gb):
        clock[0] += 40.0
        if variant.name == "stock_fp8":
            raise RuntimeError("out of luck")

    monkeypatch.setattr(e2e_run.Run, "_measure", measure)
    arguments = ["--tiny", "--variants", "stock_bf16,stock_fp8,stock_int8,lowbit_int8", "--budget", "130"]
    options = e2e.parse([*arguments, "--workdir", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    assert e2e_run.Run(options, e2e_host.Host(comfy_host.dynamic_vram), 0.0).measure_all() == 1
    (record,) = json.loads((tmp_path / "out" / "e2e_tiny.json").read_text())
    assert record["failed"] == {"stock_fp8 at 256": "RuntimeError: out of luck"}
    assert record["left_out"] == ["lowbit_int8 at 256: would take about 40 s, 10 s are left"]
    printed = capsys.readouterr()
    assert "stock_int8 at 256\n" in printed.out and "out of luck" in printed.err
    assert "left out: lowbit_int8 at 256: would take about 40 s, 10 s are left" in printed.out
    assert "failed: stock_fp8 at 256: RuntimeError: out of luck" in printed.out
