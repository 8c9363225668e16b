"""The benchmarks' logic, on the CPU and on made-up times: nothing is timed here."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from lowbit.benchmarks import (
    bench_block,
    bench_gguf_linear,
    bench_gguf_unpack,
    bench_int8_linear,
    bench_quantize,
    operands,
    peers,
    results,
    run,
    shapes,
    timing,
)

COLUMNS = bench_int8_linear.COLUMNS


class FakeClock:
    """Time that passes only while `work` is done, faster or slower as the device is hot: `slowdown` per second."""

    def __init__(self, slowdown: float = 0.0):
        self.now_ms = 0.0
        self.slowdown = slowdown
        self.log = []

    def work(self, name: str, ms: float) -> None:
        self.log.append(name)
        self.now_ms += ms * (1 + self.slowdown * self.now_ms / 1000)

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        self.now_ms += 1e-9  # no batch takes no time at all
        return self.now_ms

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def variant(self, name: str, ms: float, copies: int = 1, repeats: int = 1) -> timing.Variant:
        names = [name] if copies == 1 else [f"{name}{i}" for i in range(copies)]
        return timing.Variant(name, [lambda n=n: self.work(n, ms) for n in names], repeats)


# Timing


def test_ratios_hold_while_the_device_slows_down():
    clock = FakeClock(slowdown=0.5)
    times = timing.Measure(clock)(
        [clock.variant("slow", 0.9), clock.variant("middle", 0.6), clock.variant("fast", 0.3)]
    )
    assert clock.now_ms > 1500 and times["fast"] > 0.3 * 1.5  # it did slow down
    assert times["slow"] / times["fast"] == pytest.approx(3, rel=0.05)
    assert times["middle"] / times["fast"] == pytest.approx(2, rel=0.05)


def test_every_round_has_a_batch_of_every_variant_in_changing_order():
    clock = FakeClock()
    variants = [clock.variant("a", 1.0), clock.variant("b", 2.0), clock.variant("c", 4.0)]
    times = timing.Measure(clock, rounds=8, batch_ms=20.0, warmup_ms=0.0)(variants)
    assert times == pytest.approx({"a": 1.0, "b": 2.0, "c": 4.0})
    assert len(clock.log) == 2 * 3 + 8 * (20 + 10 + 5)  # twice to estimate, then batches of about 20 ms
    timed = clock.log[6:]
    rounds = [tuple(dict.fromkeys(timed[i * 35 : (i + 1) * 35])) for i in range(8)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1


def test_warm_up_takes_its_time_under_all_variants():
    clock = FakeClock()
    timing.Measure(clock, rounds=1, batch_ms=10.0, warmup_ms=100.0)([clock.variant("a", 1.0), clock.variant("b", 1.0)])
    assert clock.log.count("a") == clock.log.count("b") == 2 + 50 + 10


def test_copies_are_used_in_turn_and_a_repeated_call_counts_as_often():
    clock = FakeClock()
    variants = [clock.variant("x", 1.0, copies=3), clock.variant("graph", 8.0, repeats=4)]
    times = timing.Measure(clock, rounds=2, batch_ms=4.0, warmup_ms=0.0)(variants)
    assert times == pytest.approx({"x": 1.0, "graph": 2.0})
    used = [name for name in clock.log if name.startswith("x")]
    assert used == [f"x{i % 3}" for i in range(len(used))]


def test_calls_go_through_the_copies_of_every_operand():
    calls = timing.cycled(lambda a, b: (a, b), [1, 2, 3], ["p", "q"])
    assert [call() for call in calls] == [(1, "p"), (2, "q"), (3, "p")]


def test_cold_copies_are_many_of_a_small_tensor_and_two_of_a_large_one(monkeypatch):
    monkeypatch.setattr(operands, "COLD_BYTES", 1000)
    x = torch.arange(100, dtype=torch.uint8)
    copies = operands.cold(x)
    assert len(copies) == 10 and all(torch.equal(copy, x) for copy in copies)
    assert len({copy.data_ptr() for copy in copies}) == 10
    assert len(operands.cold(torch.zeros(5000, dtype=torch.uint8))) == 2
    assert len(operands.cold(torch.zeros(1, dtype=torch.uint8))) == operands.MOST_COPIES


# CSV files


def row(variant="bf16", M=4352, N=13824, K=4608, ms=1.0, ratio=1.0, date="2026-01-01 10:00:00"):
    environment = {"date": date, "device": "a device", "torch": "2.11", "triton": "3.6"}
    shape = {"variant": variant, "M": M, "N": N, "K": K}
    return environment | shape | {"ms": ms, "tops": 1234.5678, "ratio_to_bf16": ratio, "error": 0.0123456}


def test_rows_are_added_after_older_ones(tmp_path):
    path = tmp_path / "results" / "int8_linear.csv"
    results.append(path, COLUMNS, [row(date="2026-01-01 10:00:00"), row("lowbit_int8", date="2026-01-01 10:00:00")])
    first = path.read_text()
    results.append(path, COLUMNS, [row(date="2026-01-02 10:00:00", ms=0.512345678)])
    assert path.read_text().startswith(first)
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == list(COLUMNS) and len(lines) == 3
    assert ",".join(lines[2]) == (
        "2026-01-02 10:00:00,a device,2.11,3.6,bf16,4352,13824,4608,0.51235,1234.6,1,0.012346"
    )
    assert [latest["date"] for latest in results.read_latest(path)] == ["2026-01-02 10:00:00"]


def test_a_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "int8_linear.csv"
    path.write_text("date,variant,ms\n2025-01-01,bf16,1\n")
    with pytest.raises(ValueError, match="has the columns date, variant, ms; this benchmark writes date, device"):
        results.append(path, COLUMNS, [row()])
    assert path.read_text() == "date,variant,ms\n2025-01-01,bf16,1\n"


def test_a_row_that_lacks_a_column_is_refused(tmp_path):
    incomplete = row()
    del incomplete["error"]
    with pytest.raises(ValueError, match="lacks error"):
        results.append(tmp_path / "new.csv", COLUMNS, [incomplete])


def test_the_columns_are_those_that_were_agreed():
    shared = "date, device, torch, triton, variant, "
    assert ", ".join(COLUMNS) == shared + "M, N, K, ms, tops, ratio_to_bf16, error"
    quantize = "M, K, ms, gbps, fraction_of_copy, fraction_of_same_size_copy"
    assert ", ".join(bench_quantize.COLUMNS) == shared + quantize
    assert ", ".join(bench_block.COLUMNS) == shared + "M, ms, ratio_to_bf16, error"


# Demands


def test_demands_compare_with_the_fastest_peer_of_the_same_shape():
    times = {
        "bf16": 0.8,
        "comfy_kitchen_cuda": 0.7,
        "comfy_kitchen_triton": 0.6,
        "comfy_kitchen_cuda_convrot": 0.9,
        "comfy_kitchen_triton_convrot": 0.65,
        "lowbit_int8": 0.4,
        "lowbit_int8_rotated": 0.5,
    }
    rows = [row(variant, ms=ms) for variant, ms in times.items()]
    rows += [row(variant, M=16640, ms=ms * 4) for variant, ms in times.items() if variant != "bf16"]
    found = {demand.text: demand for demand in bench_int8_linear.demands(rows)}
    assert len(found) == 6
    values = {text: (demand.value and pytest.approx(demand.value), demand.verdict) for text, demand in found.items()}
    assert values == {
        "qkv M=4352: lowbit_int8 / bf16": (2.0, "PASS"),
        "qkv M=4352: lowbit_int8 / fastest comfy-kitchen": (1.5, "PASS"),
        "qkv M=4352: lowbit_int8_rotated / fastest comfy-kitchen ConvRot": (1.3, "short"),
        "qkv M=16640: lowbit_int8 / bf16": (None, "no rows"),
        "qkv M=16640: lowbit_int8 / fastest comfy-kitchen": (1.5, "PASS"),
        "qkv M=16640: lowbit_int8_rotated / fastest comfy-kitchen ConvRot": (1.3, "short"),
    }
    table = results.table(list(found.values())).splitlines()
    assert len(table) == 6 and table[2].split()[-4:] == ["1.300", "floor", "1.45", "short"]


def test_every_layer_has_the_floors_that_were_asked():
    floors = {layer.name: [floor for *_, floor in bench_int8_linear.floors(layer)] for layer in shapes.LAYERS}
    block = [1.6, 1.35, 1.45]
    assert floors == {
        "qkv": block,
        "o": block,
        "w1": block,
        "w2": [*block, 1.6, 1.6],
        "llm_cond_proj": [1.15],
        "adaln_modulation": [1.0, 1.0],
    }


@pytest.mark.parametrize(
    "variant, baseline",
    [
        ("lowbit_int8", "bf16"),
        ("bf16", "bf16"),
        ("lowbit_swiglu_rotated", "bf16_swiglu"),
        ("comfy_kitchen_cuda_graph", "bf16_graph"),
    ],
)
def test_a_ratio_compares_the_same_work(variant, baseline):
    assert bench_int8_linear.baseline(variant) == baseline


# The benchmarks themselves, at sizes without meaning


@pytest.fixture
def small(monkeypatch):
    """Small layers, few copies, and graphs that are no graphs: they need a CUDA device."""
    layers = (
        shapes.Layer("w2", 64, 256),
        shapes.Layer("llm_cond_proj", 64, 512, bias=True, tokens=(20,)),
        shapes.Layer("adaln_modulation", 96, 256, bias=True, tokens=(1,)),
    )
    monkeypatch.setattr(shapes, "LAYERS", layers)
    for name, size in {"HIDDEN": 512, "FFN": 1024, "HEADS": 2, "ADALN": 64}.items():
        monkeypatch.setattr(shapes, name, size)
    monkeypatch.setattr(operands, "MOST_COPIES", 2)
    monkeypatch.setattr(bench_quantize, "COPY_BYTES", 2**16)
    monkeypatch.setattr(timing, "graphed", lambda variant, name: timing.Variant(name, variant.calls))
    measure = timing.Measure(FakeClock(), rounds=1, batch_ms=1e-9, warmup_ms=0.0)
    return timing.Options(measure, torch.device("cpu"), tokens=(24,))


def complete(module, rows) -> bool:
    environment = dict.fromkeys(results.ENVIRONMENT)
    return all((environment | row).keys() == set(module.COLUMNS) for row in rows)


def test_int8_linear_yields_complete_rows_and_every_variant_is_close_to_float32(small, capsys):
    rows = list(bench_int8_linear.rows(small))
    assert complete(bench_int8_linear, rows)
    ours = {"bf16", "fp8_unpacked", "lowbit_int8", "lowbit_int8_rotated"}
    large = ours | {"torch_int8", "lowbit_int8_product"}
    swiglu = {"bf16_swiglu", "lowbit_swiglu", "lowbit_swiglu_rotated"}
    expected = {24: large | swiglu, 20: large, 1: ours | {f"{name}_graph" for name in ours}}
    for M, variants in expected.items():
        measured = {row["variant"] for row in rows if row["M"] == M}
        assert {name for name in measured if not name.startswith("comfy_kitchen")} == variants
        if not torch.cuda.is_available():
            assert measured == variants
    if not torch.cuda.is_available():
        assert "left out: comfy_kitchen_cuda: comfy-kitchen: Backend 'cuda' is not available" in capsys.readouterr().out
    error = {row["variant"]: row["error"] for row in rows if row["M"] == 24}
    assert 1e-4 < error["bf16"] < 5e-3 and 1e-4 < error["bf16_swiglu"] < 5e-3
    assert 1e-2 < error["lowbit_int8"] < 6e-2 and error["lowbit_int8_product"] == error["lowbit_int8"]
    assert error["lowbit_int8_rotated"] < error["lowbit_int8"] / 2  # the loud channels are spread


def test_quantize_yields_complete_rows(small):
    rows = list(bench_quantize.rows(small))
    assert complete(bench_quantize, rows)
    variants = {row["variant"] for row in rows if not row["variant"].startswith("comfy_kitchen")}
    producers = {"lowbit_quantize", "lowbit_rms_norm_scale_quantize", "lowbit_swiglu_quantize"}
    copies = {"copy", "copy_same_size", "copy_swiglu_size"}
    assert variants == copies | producers | {f"{name}_rotated" for name in producers}
    assert all(row["fraction_of_copy"] == 1 for row in rows if row["variant"] == "copy")


def test_gguf_linear_yields_complete_rows(small):
    rows = list(bench_gguf_linear.rows(small))
    assert complete(bench_gguf_linear, rows)
    few = {"bf16", "torch_q4_k", "torch_q8_0", "lowbit_q4_k_exact", "lowbit_q8_0_exact"}
    many = few | {"lowbit_q4_k_int8", "lowbit_q8_0_int8"}
    for M, variants in {24: many, 20: many, 1: few | {f"{name}_graph" for name in few}}.items():
        assert {row["variant"] for row in rows if row["M"] == M} == variants
    error = {row["variant"]: row["error"] for row in rows if row["M"] == 24}
    assert error["torch_q8_0"] == pytest.approx(error["lowbit_q8_0_exact"], rel=0.01)
    assert error["bf16"] < error["torch_q8_0"] < 1e-2 < error["torch_q4_k"] < 0.1
    assert error["lowbit_q8_0_int8"] < 2e-2 and error["lowbit_q4_k_int8"] < 1.15 * error["torch_q4_k"]
    assert bench_gguf_linear.COLUMNS == COLUMNS


def test_gguf_unpack_yields_complete_rows(small):
    rows = list(bench_gguf_unpack.rows(small))
    assert complete(bench_gguf_unpack, rows)
    variants = {row["variant"] for row in rows}
    assert {"copy", "q4_k_to_bf16", "q4_k_to_int8", "q4_k_to_int8_rotated", "iq4_xs_to_bf16"} <= variants


def test_the_block_yields_complete_rows(small, comfy_host):
    with torch.inference_mode():
        small = timing.Options(small.measure, comfy_host.comfy.model_management.get_torch_device(), small.tokens)
        rows = list(bench_block.rows(small))
    assert complete(bench_block, rows)
    error = {row["variant"]: row["error"] for row in rows}
    assert error["bf16"] < 1e-2
    for variant in ("stock_int8_tensorwise", "lowbit_int8_unfused", "lowbit_int8_fused_swiglu", "lowbit_int8_fused"):
        assert error["bf16"] < error[variant] < 4e-2


def test_a_peer_that_is_not_there_is_left_out_with_its_reason(capsys):
    variants = peers.available(
        {
            "there": lambda: [print],
            "missing": lambda: [peers.comfy_kitchen("no_such_backend", "int8_linear")],
        }
    )
    assert [variant.name for variant in variants] == ["there"]
    assert "left out: missing: comfy-kitchen" in capsys.readouterr().out


def test_comfy_kitchen_is_called_with_operands_in_its_own_format():
    """Its plain torch backend takes the same arguments as the fast ones, and runs here."""
    pytest.importorskip("comfy_kitchen")
    gate, up = operands.normal(20, 256, device="cpu"), operands.activations(20, 256, torch.device("cpu"), seed=1)
    w = operands.normal(64, 256, device="cpu", seed=2)
    expected = operands.float32_linear(torch.nn.functional.silu(gate.float()) * up.float(), w)
    for convrot, bound in ((False, 6e-2), (True, 2e-2)):
        data, scale = peers.comfy_kitchen_weight(w, convrot)
        x = torch.cat((gate, up), dim=-1)
        linear = peers.comfy_kitchen_linear("eager", x, data, scale, None, convrot, "swiglu")
        assert operands.relative_error(linear(x, data), expected) < bound


# The picture


def test_the_picture_is_drawn_from_the_last_run(tmp_path):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "int8_linear.csv", tmp_path / "int8_linear.png"
    results.append(path, COLUMNS, [row("lowbit_int8", date="2026-01-01 10:00:00", ratio=1.1)])
    results.append(path, COLUMNS, [row(date="2026-01-02 10:00:00", N=1, K=1)])
    with pytest.raises(ValueError, match="there is nothing to draw"):
        results.draw(path, picture)
    rows = []
    for layer in shapes.BLOCK_LAYERS:
        for M in shapes.TOKENS:
            rows += [row(name, M, layer.N, layer.K, ratio=1.5, date="2026-01-03 10:00:00") for name in results.BARS]
    results.append(path, COLUMNS, rows[:-1])  # a variant that one shape lacks leaves a gap
    results.draw(path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


# The command line


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, run.__file__, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_help_needs_no_gpu():
    result = command("--help")
    assert (
        result.returncode == 0
        and "--skip-tests" in result.stdout
        and "int8_linear, quantize, gguf_linear" in result.stdout
    )


def test_without_a_gpu_it_says_so():
    result = command("--skip-tests")
    assert result.returncode == 2 and result.stderr.strip() == (
        "The benchmarks need a CUDA device, and torch finds none on this machine."
    )


@pytest.mark.parametrize("green", [True, False], ids=["green", "red"])
def test_nothing_is_timed_after_red_tests(green, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "tests_pass", lambda: green)
    timed = []
    monkeypatch.setattr(run, "measure", lambda options: timed.append(options) or 0)
    assert run.main([]) == (0 if green else 1)
    assert len(timed) == int(green)
    assert ("tests fail" in capsys.readouterr().err) is not green


def test_skipped_tests_show_in_the_files_names(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "tests_pass", lambda: pytest.fail("the tests were to be skipped"))
    monkeypatch.setattr(run, "measure", lambda options: 0)
    assert run.main(["--skip-tests"]) == 0
    assert "Tests skipped" in capsys.readouterr().out
    assert run.csv_name("int8_linear.csv", untested=True) == "int8_linear_untested.csv"
    assert run.csv_name("int8_linear.csv", untested=False) == "int8_linear.csv"


def test_a_run_writes_its_rows_and_goes_on_after_a_benchmark_that_broke_off(small, tmp_path, monkeypatch, capsys):
    environment = {"date": "2026-01-01 10:00:00", "device": "a device", "torch": "2.11", "triton": "3.6"}
    monkeypatch.setattr(results, "environment", lambda: environment)

    def broken(options):
        yield {"variant": "bf16", "M": 1, "N": 64, "K": 256, "ms": 1.0, "tops": 1.0, "ratio_to_bf16": 1.0, "error": 0.0}
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench_int8_linear, "rows", broken)
    monkeypatch.setattr(
        bench_quantize,
        "rows",
        lambda options: iter([dict.fromkeys(bench_quantize.COLUMNS[4:], 1.0) | {"variant": "x"}]),
    )
    monkeypatch.setattr(timing, "CudaClock", FakeClock)
    arguments = ["--only", "int8_linear,quantize", "--out", str(tmp_path), "--M", "24"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "tests_pass", lambda: True)
    assert run.main(arguments) == 1
    assert len((tmp_path / "int8_linear.csv").read_text().splitlines()) == 2
    assert len((tmp_path / "quantize.csv").read_text().splitlines()) == 2
    captured = capsys.readouterr()
    assert "out of luck" in captured.err and "Broke off (above): int8_linear" in captured.out


def test_names_and_token_counts_are_checked():
    assert run.benchmark_names("block,int8_linear") == ("int8_linear", "block")  # in their own order
    with pytest.raises(run.argparse.ArgumentTypeError, match="no benchmark conv; there are int8_linear"):
        run.benchmark_names("conv")
    assert run.token_counts("4352,16640") == (4352, 16640)
    with pytest.raises(run.argparse.ArgumentTypeError, match="counts tokens"):
        run.token_counts("0")
