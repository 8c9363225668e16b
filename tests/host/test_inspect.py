"""The inspection table: true numbers, protected layers, and what computes each op."""

import pytest
from host_harness import quantized_models as quantized
from host_harness import small_models as small


@pytest.fixture(scope="module")
def report_of(comfy_host, tmp_path_factory):
    from lowbit.host import inspect
    from lowbit.host.model import NONE, LoadRequest, load_pair

    def report(path, **settings):
        return inspect.report(load_pair(LoadRequest(str(path), **settings), NONE)[0])

    return report


def rows_of(report: str) -> dict[str, list[str]]:
    """The table's rows by format: tensors, parameters, bits a weight, size and its unit."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("format"))
    return {line.split()[0]: line.split()[1:] for line in lines[start + 1 : lines.index("", start)]}


def test_formats_and_sizes_are_those_of_the_file(report_of, tmp_path):
    floats = small.ideogram4()
    path = small.write_gguf(
        tmp_path / "q4.gguf", floats, linear="Q4_K", rest="F32", modules=small.block_linears(floats)
    )
    report = report_of(path, compute_mode="exact", dtype="fp32")
    rows = rows_of(report)
    quantized = sum(floats[f"{name}.weight"].numel() for name in small.block_linears(floats))
    total = sum(value.numel() for value in floats.values())
    assert rows["gguf_q4_k"][:3] == [str(len(small.block_linears(floats))), f"{quantized:,}", "4.50"]
    assert rows["fp32"][:3] == [str(len(floats) - len(small.block_linears(floats))), f"{total - quantized:,}", "32.00"]
    size_bytes = quantized * 4.5 / 8 + (total - quantized) * 4
    assert rows["all"] == [
        str(len(floats)),
        f"{total:,}",
        f"{8 * size_bytes / total:.2f}",
        f"{size_bytes / 2**20:.2f}",
        "MiB",
    ]
    assert report.startswith("Ideogram4, from q4.gguf, compute mode exact")
    assert "Protected layers (0): none" in report and "final_layer.linear" in report


def test_protected_layers_are_named(report_of, tmp_path):
    floats = small.ideogram4()
    modules = [name for name in small.block_linears(floats) if name != "layers.1.feed_forward.w2"]
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(floats, modules=modules))
    report = report_of(path)
    assert "Protected layers (1): layers.1.feed_forward.w2" in report
    assert rows_of(report)["int8"][0] == str(len(modules))


def test_layers_that_are_protected_in_every_block_are_named(report_of, tmp_path):
    floats = small.ideogram4()
    modules = [name for name in small.block_linears(floats) if not name.endswith("w2")]
    report = report_of(small.save(tmp_path / "int8.safetensors", small.int8_native(floats, modules=modules)))
    assert "Protected layers (2): layers.0.feed_forward.w2, layers.1.feed_forward.w2\n" in report
    assert "feed_forward" not in report.partition("Other unquantized linear layers")[2].splitlines()[0]


def test_what_computes_each_op_and_why(report_of, tmp_path):
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4(), convrot=True))
    report = report_of(path, compute_mode="int8")
    few = "for at most 16 tokens"
    assert f"int8_convrot: int8 product (activations quantized per token; {few} they stay floats)" in report
    assert "quantize_per_token: plain PyTorch" in report and "int8_linear: PyTorch's INT8 product" in report
    exact = report_of(path, compute_mode="auto")
    assert f"int8_convrot: exact (weight unpacked, then PyTorch's product; {few} it stays INT8)" in exact
    assert "unpack_int8: plain PyTorch" in exact
    of_gguf = report_of(quantized.write(tmp_path, "q4_k"), compute_mode="exact")
    assert "gguf_q4_k: exact (weight unpacked, then PyTorch's product)\n" in of_gguf and "INT8" not in of_gguf


@pytest.mark.triton
def test_refusals_are_shown(report_of, tmp_path, monkeypatch):
    from lowbit.kernels.int8_linear import torch_impl, triton_impl

    monkeypatch.setattr(triton_impl, "supports", lambda call: f"refuses K={call.K}")
    monkeypatch.setattr(torch_impl, "supports", lambda call: f"refuses N={call.N}")
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4()))
    expected = "int8_linear: plain PyTorch (not Triton: it refuses K=256; not PyTorch's INT8 product: it refuses N=768)"
    assert expected in report_of(path, compute_mode="int8")


@pytest.mark.triton
def test_fused_blocks_are_counted(report_of, tmp_path):
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4()))
    assert "Fused blocks: 2 of 2" in report_of(path, compute_mode="int8")
    exact = report_of(path, compute_mode="exact")
    assert "Fused blocks: 0 of 2" in exact and "2 not fused: none of its layers computes in int8" in exact


def test_a_stock_model_and_one_with_a_lora(comfy_host, report_of, tmp_path):
    from host_harness import quantized_models as quantized
    from lowbit.host import inspect

    stock = comfy_host.load_state_dict(small.ideogram4())
    assert "not loaded by Lowbit" in inspect.report(stock) and "No layers quantized by Lowbit." in inspect.report(stock)
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4()))
    of_stock_int8 = inspect.report(comfy_host.load_diffusion_model(path))
    row = rows_of(of_stock_int8)["TensorWiseINT8Layout"]
    table = of_stock_int8.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1, "columns stand below each other"
    assert row[0] == str(len(small.block_linears(small.ideogram4()))) and 8.0 < float(row[2]) < 8.3
    model = quantized.load(quantized.write(tmp_path, "q8_0"))
    patched = quantized.add_lora(comfy_host, model, quantized.lora())
    comfy_host.comfy.model_management.load_models_gpu([patched])
    assert f"Patched weights: {len(patched.patches)}" in inspect.report(patched)


def test_loras_are_counted_before_they_are_sampled(comfy_host, tmp_path):
    """As the node runs: nothing is loaded yet, or something else was."""
    from lowbit.host import inspect

    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    for kind, beside in (("lora", 10), ("lokr", 10), ("dora", 0)):
        text = inspect.report(quantized.add_lora(comfy_host, model, quantized.lora(kind)))
        assert f"Patched weights: 10 (for {beside} of them the patch is added beside the quantized weight)" in text
