"""Every layout in circulation through the real host: loaded, sampled for two steps, compared with the floats it stands
for.

What a file stands for is computed here from the file by other readers (gguf-py, safetensors and the layout's own
formula). In `exact` mode and float32 the latent must agree with that of a full-precision model holding these floats;
its distance from the original weights' latent must be that of random noise of the size of the quantization error,
which is all a format may cost.
"""

import dataclasses
from collections.abc import Callable

import gguf
import pytest
import torch
from host_harness import small_models as small
from safetensors.torch import load_file

BRANCHES = ("conditional", "unconditional")
SMOOTHED = {None: lambda w, s: w, "divide": lambda w, s: w / s, "multiply": lambda w, s: w * s}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# What files stand for


def meant_by_gguf(path, prefix: str = "") -> dict[str, torch.Tensor]:
    floats = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith(prefix):
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            floats[tensor.name[len(prefix) :]] = values.reshape(tuple(reversed(tensor.shape.tolist())))
    return floats


def meant_by_native_int8(path) -> dict[str, torch.Tensor]:
    return meant_by_int8_tensors(load_file(path))


def meant_by_q8_cr(path, prefix: str, rotated: bool) -> dict[str, torch.Tensor]:
    tensors = {
        tensor.name.removeprefix(prefix): torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    marker = torch.tensor(list(b"convrot" if rotated else b""), dtype=torch.uint8)
    modules = [key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dtype == torch.int8]
    return meant_by_int8_tensors(tensors | {f"{module}.comfy_quant": marker for module in modules})


def meant_by_int8_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    floats = {}
    for key, value in tensors.items():
        if value.dtype == torch.int8:
            module = key.removesuffix(".weight")
            marker = tensors.get(f"{module}.comfy_quant")
            rotated = marker is not None and b"convrot" in bytes(marker.tolist())
            params = TensorWiseINT8Layout.Params(
                tensors[f"{module}.weight_scale"], torch.float32, tuple(value.shape), convrot=rotated
            )
            floats[key] = TensorWiseINT8Layout.dequantize(value, params)
        elif not key.endswith(("weight_scale", "comfy_quant")):
            floats[key] = value.float()
    return floats


def meant_by_transformer_lab(path, branch: str, base_path: str, smooth: str | None) -> dict[str, torch.Tensor]:
    floats = {key: value.float() for key, value in load_file(base_path).items() if "weight_scale" not in key}
    tensors = {key.removeprefix(f"{branch}."): t for key, t in load_file(path).items() if key.startswith(f"{branch}.")}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "wq":
            floats[f"{module}.weight"] = SMOOTHED[smooth](
                value.float() * tensors[f"{module}.ws"].reshape(-1, 1), tensors.get(f"{module}.smooth")
            )
        elif leaf in ("weight", "bias"):
            floats[key] = value.float()
    return floats


def meant_by_floats(path) -> dict[str, torch.Tensor]:
    """A float or FP8 file that is quantized while it loads: its block linears go through INT8, per channel."""
    tensors = load_file(path)
    scales = {
        key.rpartition(".")[0]: value
        for key, value in tensors.items()
        if key.endswith(("weight_scale", "scale_weight"))
    }
    floats = {key: value.float() for key, value in tensors.items() if key.endswith((".weight", ".bias"))}
    for module, scale in scales.items():
        floats[f"{module}.weight"] *= scale.reshape(-1, 1) if scale.numel() > 1 else scale
    for module in small.block_linears(floats):
        quantized, scale = small.quantize_int8(floats[f"{module}.weight"])
        floats[f"{module}.weight"] = quantized.float() * scale
    return floats


# Layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files are written, one or one a branch, and what a branch of them stands for."""

    name: str
    write: Callable  # (folder, {branch: floats}) -> [path] or [path, path]
    meaning: Callable  # (path, branch, base path) -> floats
    needs_base: bool = False
    quantize: bool = False


def safetensors_layout(name, make, meaning, **kwargs) -> Layout:
    def write(folder, originals):
        return [small.save(folder / f"{branch}.safetensors", make(originals[branch])) for branch in BRANCHES]

    return Layout(name, write, lambda path, branch, base: meaning(path), **kwargs)


def transformer_lab_layout(name, **kwargs) -> Layout:
    def write(folder, originals):
        return [small.save(folder / "int8-w8a8.safetensors", small.int8_transformer_lab(originals, **kwargs))]

    def meaning(path, branch, base):
        return meant_by_transformer_lab(path, branch, base, kwargs.get("smooth"))

    return Layout(name, write, meaning, needs_base=True)


def gguf_layout(name, prefix="", **kwargs) -> Layout:
    def write(folder, originals):
        names = {"conditional": "model-Q4_0.gguf", "unconditional": "model_uncond-Q4_0.gguf"}
        return [small.write_gguf(folder / names[b], originals[b], prefix=prefix, **kwargs) for b in BRANCHES]

    return Layout(name, write, lambda path, branch, base: meant_by_gguf(path, prefix))


def two_branch_gguf_layout(name, **kwargs) -> Layout:
    prefixes = dict(zip(BRANCHES, ("cond.", "uncond."), strict=True))

    def write(folder, originals):
        branches = {prefixes[branch]: originals[branch] for branch in BRANCHES}
        return [small.write_gguf(folder / "both.gguf", branches, **kwargs)]

    return Layout(name, write, lambda path, branch, base: meant_by_gguf(path, prefixes[branch]))


def q8_cr_layout(name, rotated=True, prefix="") -> Layout:
    def write(folder, originals):
        names = {"conditional": "model-Q8_CR.gguf", "unconditional": "model_uncond-Q8_CR.gguf"}
        return [small.write_q8_cr(folder / names[b], originals[b], rotated=rotated, prefix=prefix) for b in BRANCHES]

    return Layout(name, write, lambda path, branch, base: meant_by_q8_cr(path, prefix, rotated))


def cast_to(dtype):
    return lambda floats: {key: value.to(dtype) for key, value in floats.items()}


def int8(**kwargs):
    return lambda floats: small.int8_native(floats, **kwargs)


def fp8(writer, **kwargs):
    return lambda floats: writer(floats, **kwargs)


block_linears_only = {"modules": small.block_linears(small.ideogram4()), "rest": "BF16"}

LAYOUTS = [
    transformer_lab_layout("transformer_lab"),
    transformer_lab_layout("transformer_lab_smooth_divides", smooth="divide"),
    transformer_lab_layout("transformer_lab_smooth_multiplies", smooth="multiply", scale_shape="N1"),
    safetensors_layout("native_per_channel", int8(), meant_by_native_int8),
    safetensors_layout("native_per_tensor", int8(per_channel=False), meant_by_native_int8),
    safetensors_layout("native_convrot", int8(convrot=True), meant_by_native_int8),
    safetensors_layout("int8_fast", int8(marker=False), meant_by_native_int8),
    safetensors_layout("int8_fast_per_tensor", int8(marker=False, per_channel=False), meant_by_native_int8),
    safetensors_layout("bf16_on_the_fly", cast_to(torch.bfloat16), meant_by_floats, quantize=True),
    safetensors_layout("fp16_on_the_fly", cast_to(torch.float16), meant_by_floats, quantize=True),
    safetensors_layout("fp32_on_the_fly", cast_to(torch.float32), meant_by_floats, quantize=True),
    safetensors_layout("fp8_official", fp8(small.fp8_official), meant_by_floats, quantize=True),
    safetensors_layout("fp8_official_n1", fp8(small.fp8_official, scale_shape="N1"), meant_by_floats, quantize=True),
    safetensors_layout("fp8_scaled", fp8(small.fp8_scaled), meant_by_floats, quantize=True),
    safetensors_layout("fp8_scaled_old", fp8(small.fp8_scaled, marker="scaled_fp8"), meant_by_floats, quantize=True),
    two_branch_gguf_layout("gguf_two_branch_q4_k", linear="Q4_K"),
    two_branch_gguf_layout("gguf_two_branch_q8_0", linear="Q8_0"),
    gguf_layout("gguf_no_architecture_q4_0", linear="Q4_0", architecture=None),
    gguf_layout("gguf_prefix_q8_0", linear="Q8_0", prefix="model.diffusion_model.", architecture=None),
    gguf_layout("gguf_block_linears_only", linear="Q4_K", **block_linears_only),
    gguf_layout("gguf_every_weight", linear="Q8_0", every_weight=True),
    q8_cr_layout("gguf_q8_cr"),
    q8_cr_layout("gguf_q8_cr_prefix", prefix="model.diffusion_model."),
    q8_cr_layout("gguf_q8_cr_never_rotated", rotated=False),
]
# Every type for all weights, in one file a branch. Types that no Python quantizer writes hold random valid blocks:
# there the original weights are no yardstick.
RANDOM_VALUED = {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"}
TYPES = {t: gguf_layout(f"gguf_{t}", linear=t) for t in small.GGUF_TYPES}


@pytest.fixture(scope="module")
def lowbit_model(comfy_host):
    from lowbit.host import model

    return model


@pytest.fixture(scope="module")
def originals() -> dict[str, dict[str, torch.Tensor]]:
    return {branch: small.ideogram4(branch) for branch in BRANCHES}


@pytest.fixture(scope="module")
def base_paths(tmp_path_factory, originals) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("base")
    return {b: str(small.save(folder / f"{b}-fp8.safetensors", small.fp8_official(originals[b]))) for b in BRANCHES}


@pytest.fixture(scope="module")
def sample_floats(comfy_host):
    """(floats of each branch) -> latent of the stock model that holds them."""

    def sample(branches: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
        return comfy_host.sample(*(comfy_host.load_state_dict(branches[b], dtype=torch.float32) for b in BRANCHES))

    return sample


@pytest.fixture(scope="module")
def reference(sample_floats, originals) -> torch.Tensor:
    return sample_floats(originals)


def load_pair(lowbit_model, layout, paths, base_paths, **settings):
    base = {branch: base_paths[branch] if layout.needs_base else None for branch in BRANCHES}
    settings = {"compute_mode": "exact", "dtype": "fp32"} | settings
    request = lowbit_model.LoadRequest(
        str(paths[0]), base_path=base["conditional"], quantize=layout.quantize, **settings
    )
    unconditional = str(paths[1]) if len(paths) == 2 else lowbit_model.SAME_FILE
    return lowbit_model.load_pair(request, unconditional, base["unconditional"])


def meaning_of(layout, paths, base_paths) -> dict[str, dict[str, torch.Tensor]]:
    return {
        branch: layout.meaning(paths[i % len(paths)], branch, base_paths[branch]) for i, branch in enumerate(BRANCHES)
    }


def noise_like_error(meant: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original weights with Gaussian noise of each tensor's quantization error."""
    generator = torch.Generator().manual_seed(1)
    noisy = {}
    for key, value in original.items():
        rms = (meant[key] - value).square().mean().sqrt()
        noisy[key] = value + rms * torch.randn(value.shape, generator=generator)
    return noisy


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_samples_what_its_file_means(
    comfy_host, lowbit_model, sample_floats, originals, reference, base_paths, tmp_path, layout
):
    paths = layout.write(tmp_path, originals)
    meant = meaning_of(layout, paths, base_paths)
    latent = comfy_host.sample(*load_pair(lowbit_model, layout, paths, base_paths))
    assert relative(latent, sample_floats(meant)) < 1e-4
    noisy = sample_floats({branch: noise_like_error(meant[branch], originals[branch]) for branch in BRANCHES})
    assert relative(latent, reference) < 2 * relative(noisy, reference)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_every_ggml_type_samples_what_its_file_means(
    comfy_host, lowbit_model, sample_floats, originals, reference, base_paths, tmp_path, ggml_type
):
    layout = TYPES[ggml_type]
    paths = layout.write(tmp_path, originals)
    meant = meaning_of(layout, paths, base_paths)
    latent = comfy_host.sample(*load_pair(lowbit_model, layout, paths, base_paths))
    assert relative(latent, sample_floats(meant)) < 1e-4
    if ggml_type not in RANDOM_VALUED:
        noisy = sample_floats({branch: noise_like_error(meant[branch], originals[branch]) for branch in BRANCHES})
        assert relative(latent, reference) < 2 * relative(noisy, reference)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3], LAYOUTS[5]], ids=lambda layout: layout.name)
def test_int8_mode_is_near_exact_mode(comfy_host, lowbit_model, originals, base_paths, tmp_path, layout):
    """W8A8 in float32 against W8A16 on the same weights: what quantizing activations costs one call of each branch."""
    paths = layout.write(tmp_path, originals)
    exact = load_pair(lowbit_model, layout, paths, base_paths)
    int8_mode = load_pair(lowbit_model, layout, paths, base_paths, compute_mode="int8")
    x = torch.randn(1, 128, 16, 16, generator=torch.Generator().manual_seed(0))
    context = comfy_host.conditioning()[0][0]
    for branch_context, a, b in zip((context, None), exact, int8_mode, strict=True):
        expected = comfy_host.apply_model(a, x, context=branch_context)
        got = comfy_host.apply_model(b, x, context=branch_context)
        assert 0 < relative(got, expected) < 0.1


def test_two_layouts_of_one_model_differ_only_by_their_error(comfy_host, lowbit_model, originals, base_paths, tmp_path):
    """The marker is what tells native from INT8-Fast: the same bytes must load to the same weights."""
    native, fast = LAYOUTS[3], LAYOUTS[6]
    latents = []
    for layout in (native, fast):
        folder = tmp_path / layout.name
        latents.append(comfy_host.sample(*load_pair(lowbit_model, layout, layout.write(folder, originals), base_paths)))
    assert torch.equal(*latents)
