"""Two text encoders in one CLIP, at least one of them GGUF, beside stock ones that hold the same weights as floats."""

import functools
import json
import os

import pytest
import torch
from host_harness import small_models as small
from host_harness.text_encoders import write_llama_cpp

PROMPT = 'a lighthouse at (dawn:1.2), the word "HELLO" on its door'
ROUNDING = 2e-5  # fp32 sums in another order


@pytest.fixture(scope="module")
def module(comfy_host):
    from lowbit.host import files, text_encoder

    files.register_gguf_folder()
    return text_encoder


@pytest.fixture(scope="module", autouse=True)
def small_sizes(comfy_host):
    """The host's own classes in small sizes."""
    sd = comfy_host.module("comfy.sd")
    sd1_clip, sd3_clip = comfy_host.module("comfy.sd1_clip"), comfy_host.module("comfy.text_encoders.sd3_clip")
    hunyuan_image, llama = map(comfy_host.module, ("comfy.text_encoders.hunyuan_image", "comfy.text_encoders.llama"))
    clip_model, t5 = comfy_host.module("comfy.clip_model"), comfy_host.module("comfy.text_encoders.t5")
    real_clip, detect = clip_model.CLIPTextModel.__init__, sd.detect_te_model

    def detect_small_t5(state_dict):
        middle = state_dict.get("encoder.block.23.layer.1.DenseReluDense.wi_1.weight")
        is_ours = middle is not None and middle.shape[0] == T5_XXL["d_ff"]
        return sd.TEModel.T5_XXL if is_ours else detect(state_dict)

    def small_clip(self, config, *args):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
        real_clip(self, config | sizes, *args)

    class SmallT5(sd1_clip.SDClipModel):
        config = T5_XXL

        def __init__(self, device="cpu", dtype=None, attention_mask=False, *, model_options):
            quantized = model_options.get("t5xxl_quantization_metadata")  # as in the host's T5-XXL
            model_options = model_options | ({"quantization_metadata": quantized} if quantized else {})
            super().__init__(
                **{"device": device, "dtype": dtype, "model_options": model_options, "model_class": t5.T5},
                **{"textmodel_json_config": dict(self.config), "special_tokens": {"end": 1, "pad": 0}},
                **{"enable_attention_masks": attention_mask, "return_attention_masks": attention_mask},
            )

    class SmallByT5(SmallT5):
        config = BYT5

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}
    qwen = {**sizes, "vocab_size": 152_064, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "detect_te_model", detect_small_t5)
        patch.setattr(clip_model.CLIPTextModel, "__init__", small_clip)
        patch.setattr(sd3_clip, "T5XXLModel", SmallT5)
        patch.setattr(hunyuan_image, "ByT5SmallModel", SmallByT5)
        patch.setattr(
            llama, "Llama2Config", functools.partial(llama.Llama2Config, **{**sizes, "num_key_value_heads": 1})
        )
        patch.setattr(llama, "Qwen25_7BVLI_Config", functools.partial(llama.Qwen25_7BVLI_Config, **qwen))
        yield


@pytest.fixture
def in_fp32(comfy_host, monkeypatch):
    """The host rounds floats to its default dtype for text encoders, fp16: so that it keeps what the files hold."""
    management = comfy_host.module("comfy.model_management")
    monkeypatch.setattr(management, "text_encoder_dtype", lambda device=None: torch.float32)


# By its 24 layers the host knows a T5-XXL, and a ByT5 by 384 features in attention.
_T5 = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5", "d_kv": 64}
T5_XXL = {**_T5, "d_ff": 256, "d_model": 32, "num_heads": 1, "num_layers": 24, "vocab_size": 32_128}
BYT5 = {**_T5, "d_ff": 128, "d_model": 64, "num_heads": 6, "num_layers": 2, "vocab_size": 1510}


@functools.cache
def t5(size: str = "xxl") -> small.StateDict:
    config = {"xxl": T5_XXL, "byt5": BYT5}[size]
    width, inner, middle = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes = {"shared.weight": (config["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(config["num_layers"]):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{x}.weight": (inner, width) for x in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (middle, width) for name in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, middle)
        shapes |= {f"{part}.layer_norm.weight": (width,) for part in (attention, feed_forward)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, config["num_heads"])
    values = small.fill(shapes, name=f"t5.{size}")
    # As in a trained model, attention is soft and a block adds little: else 24 random ones multiply every error.
    factors = {"shared.weight": 4.0, ".q.weight": 0.25, ".o.weight": 0.25, ".wo.weight": 0.25}
    return {
        key: value * next((factor for end, factor in factors.items() if key.endswith(end)), 1.0)
        for key, value in values.items()
    }


@functools.cache
def clip_l() -> small.StateDict:
    model = "text_model"
    shapes = {f"{model}.embeddings.token_embedding.weight": (49_408, 64)}
    shapes |= {f"{model}.embeddings.position_embedding.weight": (77, 64)}
    for i in range(3):
        layer = f"{model}.encoder.layers.{i}"
        for name, (rows, columns) in {
            **{f"self_attn.{x}_proj": (64, 64) for x in ("q", "k", "v", "out")},
            **{"mlp.fc1": (128, 64), "mlp.fc2": (64, 128)},
        }.items():
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (64,), f"{layer}.{name}.bias": (64,)}
    shapes |= {f"{model}.final_layer_norm.weight": (64,), f"{model}.final_layer_norm.bias": (64,)}
    return small.fill(shapes, name="clip_l", dtype=torch.float16)


@functools.cache
def decoder(heads: int = 1, vocabulary: int = 128_320, bias: bool = False) -> small.StateDict:
    """A Llama or, with biases, a Qwen2.5-VL's language model, 64 features wide and 128 a head."""
    shapes = {"model.embed_tokens.weight": (vocabulary, 64), "model.norm.weight": (64,)}
    for i in range(4):
        layer = f"model.layers.{i}"
        for x in "qkv":
            shapes[f"{layer}.self_attn.{x}_proj.weight"] = (128 * heads, 64)
            if bias:
                shapes[f"{layer}.self_attn.{x}_proj.bias"] = (128 * heads,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (64, 128 * heads)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (64, 64) for name in ("gate", "up", "down")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    return small.fill(shapes, name="decoder")


def llama(vocabulary: int = 128_320) -> small.StateDict:
    return decoder(vocabulary=vocabulary)


def qwen() -> small.StateDict:
    return decoder(heads=4, vocabulary=152_064, bias=True)


def gguf(path, state_dict, architecture="t5encoder", type="Q8_0"):
    heads = {"llama": (1, 1)}.get(architecture, (4, 4))
    return write_llama_cpp(path, state_dict, architecture, linear=type, table=type, heads=heads)


def load(module, *paths, type="flux", device="default"):
    return module.load_clip(module.TextEncoderRequest(tuple(map(str, paths)), type, device))


def stock(comfy_host, *paths, type="flux"):
    """What the host's own Load CLIP (Dual) does with these safetensors files."""
    sd = comfy_host.module("comfy.sd")
    return sd.load_clip([str(path) for path in paths], clip_type=getattr(sd.CLIPType, type.upper()))


def values_of(path):
    """A safetensors file of what a GGUF file's bytes mean, as float32."""
    from lowbit.formats import GgmlWeight
    from lowbit.loaders.text_encoder_gguf import read_text_encoder

    weights = read_text_encoder(path).weights
    values = {key: w.dequantize() if isinstance(w, GgmlWeight) else w.float() for key, w in weights.items()}
    return small.save(path.with_suffix(".values.safetensors"), values)


def encode(clip, text: str = PROMPT) -> dict[str, torch.Tensor]:
    """Everything that the stock node CLIP Text Encode puts into the conditioning."""
    values = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True, return_dict=True)
    return {key: value for key, value in values.items() if value is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys() and "cond" in actual
    for key, value in expected.items():
        error = float((actual[key].float() - value.float()).norm() / value.float().norm().clamp(min=1e-12))
        assert error <= tolerance, f"{key}: {error}"


def sqnr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (actual - expected).norm()))


# The same conditioning


@pytest.mark.parametrize("type", ["F32", "F16"])
def test_flux_with_a_t5_of_floats_is_the_stock_one_bit_by_bit(comfy_host, module, in_fp32, tmp_path, type):
    path, other = gguf(tmp_path / "t5.gguf", t5(), type=type), small.save(tmp_path / "clip_l.safetensors", clip_l())
    expected = encode(stock(comfy_host, other, values_of(path)))
    assert_same(encode(load(module, other, path)), expected)
    assert_same(encode(load(module, path, other)), expected)


def test_flux_with_a_t5_of_floats_as_the_host_rounds_it(comfy_host, module, tmp_path):
    path = gguf(tmp_path / "t5.gguf", t5(), type="F16")
    other = small.save(tmp_path / "clip_l.safetensors", clip_l())
    assert_same(encode(load(module, other, path)), encode(stock(comfy_host, other, values_of(path))))


def test_flux_with_a_quantized_t5(comfy_host, module, in_fp32, tmp_path):
    path, other = gguf(tmp_path / "t5.gguf", t5()), small.save(tmp_path / "clip_l.safetensors", clip_l())
    clip = load(module, other, path)
    actual = encode(clip)
    assert_same(actual, encode(stock(comfy_host, other, values_of(path))), ROUNDING)
    floats = encode(stock(comfy_host, other, small.save(tmp_path / "t5.safetensors", t5())))
    assert torch.equal(actual["pooled_output"], floats["pooled_output"])  # CLIP-L's own
    assert sqnr_db(actual["cond"], floats["cond"]) > 37  # 38.4 measured: Q8_0 through 24 layers

    t5xxl = clip.cond_stage_model.t5xxl.transformer
    for weight in (t5xxl.shared.weight, t5xxl.encoder.block[23].layer[1].DenseReluDense.wo.weight):
        assert weight._layout_cls == "LowbitGgufLayout" and weight._qdata.dtype == torch.uint8
    # All in all as large as the files are, but for the projection that CLIP-L lacks.
    assert clip.patcher.model_size() < 1.01 * (path.stat().st_size + other.stat().st_size) + 64 * 64 * 4


def test_sd3_takes_the_two_that_it_gets(comfy_host, module, in_fp32, tmp_path):
    path, other = gguf(tmp_path / "t5.gguf", t5()), small.save(tmp_path / "clip_l.safetensors", clip_l())
    clip, twin = load(module, path, other, type="sd3"), stock(comfy_host, other, values_of(path), type="sd3")
    tokens = twin.tokenize(PROMPT)
    for name, part in (("clip_l", "l"), ("t5xxl", "t5xxl")):  # apart: joined, they have the real width
        actual, expected = (getattr(each.cond_stage_model, name) for each in (clip, twin))
        actual, expected = (each.encode_token_weights(tokens[part])[0] for each in (actual, expected))
        assert_same({"cond": actual}, {"cond": expected}, ROUNDING)
    assert clip.cond_stage_model.clip_g is None


def test_hunyuan_video(comfy_host, module, in_fp32, tmp_path):
    path = gguf(tmp_path / "llama.gguf", llama(), "llama")
    other = small.save(tmp_path / "clip_l.safetensors", clip_l())
    expected = encode(stock(comfy_host, other, values_of(path), type="hunyuan_video"))
    assert_same(encode(load(module, path, other, type="hunyuan_video")), expected, ROUNDING)


def test_hidream_with_both_in_gguf(comfy_host, module, in_fp32, tmp_path):
    paths = gguf(tmp_path / "llama.gguf", llama(128_256), "llama"), gguf(tmp_path / "t5.gguf", t5())
    expected = encode(stock(comfy_host, *map(values_of, paths), type="hidream"))
    assert expected.keys() >= {"cond", "conditioning_llama3"}
    assert_same(encode(load(module, *paths, type="hidream")), expected, ROUNDING)


@pytest.mark.parametrize("marked_by", ["scaled_fp8", "metadata", "markers"])
def test_a_scaled_fp8_file_beside_it_is_read_as_the_host_reads_it(comfy_host, module, in_fp32, tmp_path, marked_by):
    path = gguf(tmp_path / "llama.gguf", llama(128_256), "llama")
    other = save_scaled_fp8(tmp_path / "t5_fp8_scaled.safetensors", t5(), marked_by)
    clip, twin = load(module, path, other, type="hidream"), stock(comfy_host, values_of(path), other, type="hidream")
    assert_same(encode(clip), encode(twin), ROUNDING)
    layers = [each.cond_stage_model.t5xxl.transformer.encoder.block[3].layer[0] for each in (clip, twin)]
    weights = [layer.SelfAttention.q.weight for layer in layers]
    assert weights[0]._layout_cls == weights[1]._layout_cls and weights[0]._qdata.dtype == torch.float8_e4m3fn
    assert torch.equal(weights[0]._qdata.view(torch.uint8), weights[1]._qdata.view(torch.uint8))


def test_a_lora_of_a_scaled_fp8_file_beside_it(comfy_host, module, in_fp32, tmp_path):
    """The host merges it into the layers that are the host's, and restores them."""
    path = gguf(tmp_path / "llama.gguf", llama(128_256), "llama")
    other = save_scaled_fp8(tmp_path / "t5_fp8_scaled.safetensors", t5(), "markers")
    name = "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.v"
    up, down = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4 for shape in ((64, 4), (4, 32)))
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    clip, twin = load(module, path, other, type="hidream"), stock(comfy_host, values_of(path), other, type="hidream")
    before, add = encode(clip), comfy_host.comfy.sd.load_lora_for_models
    actual, expected = (encode(add(None, each, dict(lora), 0.0, 1.0)[1]) for each in (clip, twin))
    assert_same(actual, expected, ROUNDING)
    assert not torch.allclose(actual["cond"], before["cond"], rtol=1e-2)
    assert_same(encode(clip), before)


def save_scaled_fp8(path, state_dict, marked_by: str):
    """The linear layers of a T5 in FP8 with a scale each, in the three ways in which such files are marked."""
    scale_name = "scale_weight" if marked_by == "scaled_fp8" else "weight_scale"
    marker, saved, layers = {"format": "float8_e4m3fn"}, {}, {}
    for key, value in state_dict.items():
        layer = key.removesuffix(".weight")
        if not layer.endswith((".q", ".k", ".v", ".o", ".wi_0", ".wi_1", ".wo")):
            saved[key] = value.half()
            continue
        scale = value.abs().max() / 448
        saved |= {key: (value / scale).to(torch.float8_e4m3fn), f"{layer}.{scale_name}": scale}
        layers[layer] = marker
        if marked_by == "markers":
            saved[f"{layer}.comfy_quant"] = small.comfy_quant(**marker)
    if marked_by == "scaled_fp8":
        saved["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if marked_by == "metadata" else {}
    return small.save(path, saved, metadata=metadata)


def test_a_safetensors_vision_part_beside_it_stays(comfy_host, module, in_fp32, tmp_path):
    path = gguf(tmp_path / "byt5.gguf", t5("byt5"))
    picture = {"visual.merger.mlp.2.bias": torch.ones(64)}
    other = small.save(tmp_path / "qwen.safetensors", qwen() | picture)
    clip = load(module, other, path, type="hunyuan_image")
    expected = encode(stock(comfy_host, other, values_of(path), type="hunyuan_image"))
    assert "conditioning_byt5small" in expected
    assert_same(encode(clip), expected, ROUNDING)
    assert torch.equal(clip.cond_stage_model.qwen25_7b.transformer.visual.merger.mlp[2].bias, torch.ones(64))


def test_a_gguf_without_its_vision_part(comfy_host, module, in_fp32, tmp_path):
    path = gguf(tmp_path / "qwen.gguf", qwen(), "qwen2vl")
    other = small.save(tmp_path / "clip_l.safetensors", clip_l())
    clip = load(module, path, other, type="kandinsky5")
    assert_same(encode(clip), encode(stock(comfy_host, other, values_of(path), type="kandinsky5")), ROUNDING)
    picture = {"type": "image", "data": torch.zeros(1, 64, 64, 3)}
    with pytest.raises(ValueError, match=r"^qwen\.gguf holds the language model alone, so it cannot read pictures"):
        clip.cond_stage_model.qwen25_7b.process_tokens([[1, picture, 2]], "cpu")


# What nodes do with a CLIP


@pytest.fixture(scope="module")
def flux_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return gguf(folder / "t5.gguf", t5()), small.save(folder / "clip_l.safetensors", clip_l())


def test_a_lora_of_both(comfy_host, module, in_fp32, flux_files):
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, (rows, columns) in {
        "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.q": (64, 32),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1": (128, 64),
    }.items():
        lora[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        lora[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 4
    clip, twin = load(module, *flux_files), stock(comfy_host, values_of(flux_files[0]), flux_files[1])
    before, add = encode(clip), comfy_host.comfy.sd.load_lora_for_models
    actual, expected = (encode(add(None, each, dict(lora), 0.0, 1.0)[1]) for each in (clip, twin))
    assert_same(actual, expected, 2e-4)  # the host merges into the fp16 of CLIP-L's file, as it does here
    assert all(not torch.allclose(actual[key], before[key], rtol=1e-2) for key in ("cond", "pooled_output"))
    assert_same(encode(clip), before)


def test_the_host_can_build_it_once_more_but_not_from_a_replaced_file(module, flux_files, tmp_path):
    paths = [tmp_path / path.name for path in flux_files]
    for path, source in zip(paths, flux_files, strict=True):
        path.write_bytes(source.read_bytes())
    clip = load(module, *paths)
    build, arguments = clip.patcher.cached_patcher_init
    copy = clip.clone()
    copy.patcher = build(*arguments, disable_dynamic=True)
    copy.cond_stage_model = copy.patcher.model
    assert_same(encode(copy), encode(clip))
    for path in paths:
        replacement = path.with_suffix(".new")
        replacement.write_bytes(path.read_bytes())
        kept = path.rename(path.with_suffix(".old"))
        replacement.rename(path)
        with pytest.raises(RuntimeError, match=f"^{path.name} was replaced or removed after it was loaded"):
            build(*arguments, disable_dynamic=True)
        path.unlink()
        kept.rename(path)
    build(*arguments, disable_dynamic=True)


def test_a_file_that_is_written_to_is_noticed(module, flux_files, tmp_path):
    path = tmp_path / "clip_l.safetensors"
    path.write_bytes(flux_files[1].read_bytes())
    clip = load(module, flux_files[0], path)
    encode(clip)
    os.utime(path, ns=(1, 1))
    with pytest.raises(RuntimeError, match=r"^clip_l\.safetensors was written to after it was loaded"):
        clip.patcher.pre_run()


def test_on_the_cpu(module, flux_files):
    clip = load(module, *flux_files, device="cpu")
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    assert all(value.isfinite().all() for value in encode(clip).values())


# What a person reads


def without(state_dict, part):
    return {key: value for key, value in state_dict.items() if part not in key}


def narrower(state_dict, key):
    return state_dict | {key: state_dict[key][:, :32].contiguous()}


VISION = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 32)}
LAYER = "text_model.encoder.layers.1.mlp.fc2.weight"


@pytest.mark.parametrize(
    ("first", "second", "type", "text"),
    [
        ((t5(), "t5encoder"), (llama(), "llama"), "flux", "two.gguf: found Llama 3 8B, expected CLIP-L or T5-XXL for"),
        ((t5(), "t5encoder"), clip_l(), "hunyuan_video", "one.gguf: found T5-XXL, expected CLIP-L or Llama 3 8B for"),
        (
            (t5(), "t5encoder"),
            clip_l(),
            "sdxl",
            "one.gguf: found T5-XXL, expected CLIP-L or CLIP-G for the type sdxl.*this type takes none",
        ),
        ((t5(), "t5encoder"), t5(), "flux", "two.safetensors: found T5-XXL, which one.gguf is too, expected CLIP-L be"),
        ((t5(), "t5encoder"), t5(), "sd3", "which one.gguf is too, expected CLIP-L or CLIP-G beside it"),
        ((t5("byt5"), "t5encoder"), clip_l(), "flux", "one.gguf: found ByT5 small, expected CLIP-L or T5-XXL"),
        (clip_l(), (VISION, "clip"), "flux", "two.gguf: found the vision part of a model (mmproj)"),
        (clip_l(), ({LAYER: torch.zeros(4, 32)}, "clip"), "flux", "two.gguf: found a CLIP in GGUF"),
        ((t5(), "t5encoder"), VISION, "flux", "two.safetensors: found a vision model, which reads pictures alone"),
        ((t5(), "t5encoder"), {"a": torch.zeros(1)}, "flux", "two.safetensors: found no text encoder that this Comfy"),
        (t5(), clip_l(), "flux", "one.safetensors: found a safetensors file beside another one, expected at least one"),
        ((t5(), "t5encoder"), without(clip_l(), LAYER), "flux", f"two.safetensors: found that 1 tensor .* {LAYER}"),
        (clip_l(), without(clip_l(), LAYER), "flux", "at least one text encoder in GGUF"),
        (
            (t5(), "t5encoder"),
            narrower(clip_l(), LAYER),
            "flux",
            "two.safetensors: the weight of .* has shape .64, 32",
        ),
        (without(clip_l(), LAYER), (t5(), "t5encoder"), "flux", f"one.safetensors: found that 1 tensor .* {LAYER}"),
        (
            (without(t5(), "block.23.layer.1.DenseReluDense.wo"), "t5encoder"),
            clip_l(),
            "flux",
            "one.gguf: found that 1",
        ),
        (
            (llama(1000), "llama"),
            clip_l(),
            "hunyuan_video",
            "one.gguf: found shapes that do not fit .*1000, 64. in the",
        ),
        ((t5(), "t5encoder"), clip_l(), "hidream", "two.safetensors: found that 1 tensor .* text_projection.weight"),
    ],
)
def test_errors_name_the_file(module, tmp_path, first, second, type, text):
    paths = []
    for name, content in (("one", first), ("two", second)):
        if isinstance(content, tuple):
            paths.append(gguf(tmp_path / f"{name}.gguf", *content))
        else:
            paths.append(small.save(tmp_path / f"{name}.safetensors", content))
    pattern = text.replace(".gguf", r"\.gguf").replace(".safetensors", r"\.safetensors").replace("(mm", r"\(mm")
    with pytest.raises(ValueError, match=pattern.replace("proj)", r"proj\)")):
        load(module, *paths, type=type)


def test_a_file_picked_twice(module, flux_files):
    with pytest.raises(ValueError, match=r"^t5\.gguf: found T5-XXL, picked twice, expected CLIP-L beside it"):
        load(module, flux_files[0], flux_files[0])


@pytest.mark.parametrize("which", [0, 1])
def test_a_cut_off_file_is_named(module, flux_files, tmp_path, which):
    paths = list(flux_files)
    paths[which] = tmp_path / f"cut{paths[which].suffix}"
    paths[which].write_bytes(flux_files[which].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"^cut\{paths[which].suffix}: found [\d,]+ of [\d,]+ bytes"):
        load(module, *paths)


def test_damaged_quantization_metadata_is_named(module, flux_files, tmp_path):
    path = small.save(tmp_path / "l.safetensors", clip_l(), metadata={"_quantization_metadata": "{"})
    with pytest.raises(ValueError, match=r"^l\.safetensors: found quantization metadata that cannot be read"):
        load(module, flux_files[0], path)


# The node


def test_the_node_offers_what_the_stock_node_does(comfy_host, module):
    from lowbit.nodes.load_dual_clip_gguf import LoadDualClipGguf

    inputs = {entry.id: entry for entry in LoadDualClipGguf.define_schema().inputs}
    known = comfy_host.nodes.DualCLIPLoader.INPUT_TYPES()
    assert list(inputs) == [*known["required"], *known["optional"]]
    assert inputs["type"].options == known["required"]["type"][0]
    assert inputs["device"].options == known["optional"]["device"][0] and inputs["device"].advanced
    assert all(entry.tooltip for entry in inputs.values())


def test_the_node_lists_loads_and_watches_both_files(comfy_host, module, flux_files):
    from lowbit.nodes.load_dual_clip_gguf import LoadDualClipGguf

    folder = comfy_host.models / "text_encoders" / "pairs"
    folder.mkdir(parents=True)
    for path in (*flux_files, flux_files[0].with_name("notes.txt")):
        (folder / path.name).write_bytes(path.read_bytes() if path.exists() else b"")
    names = [os.path.join("pairs", path.name) for path in flux_files]
    offered = next(entry for entry in LoadDualClipGguf.define_schema().inputs if entry.id == "clip_name1").options
    assert set(names) <= set(offered) and os.path.join("pairs", "notes.txt") not in offered

    picked = dict(zip(("clip_name1", "clip_name2"), names, strict=True))
    clip = LoadDualClipGguf.execute(**picked, type="flux").args[0]
    assert_same(encode(clip), encode(load(module, *flux_files)))

    seen = {str(LoadDualClipGguf.fingerprint_inputs(**picked, type="flux"))}
    for count, path in enumerate(flux_files, 2):
        os.utime(folder / path.name, ns=(1, 1))
        seen.add(str(LoadDualClipGguf.fingerprint_inputs(**picked, type="flux")))
        assert len(seen) == count
    (folder / flux_files[1].name).unlink()
    with pytest.raises(FileNotFoundError, match=r"clip_l\.safetensors is not in models/text_encoders any more"):
        LoadDualClipGguf.execute(**picked, type="flux")


def test_a_linked_name_is_loaded_anew_after_a_refusal(module, monkeypatch):
    from lowbit.host import files
    from lowbit.nodes.load_dual_clip_gguf import LoadDualClipGguf

    before = LoadDualClipGguf.fingerprint_inputs(type="flux")
    monkeypatch.setattr(files, "_refusals", files.refusals() + 1)
    assert LoadDualClipGguf.fingerprint_inputs(type="flux") != before


def test_the_errors_of_wrong_files_over_http(comfy_server):
    from host_harness import graphs
    from host_harness.server import PromptError

    folder = comfy_server.base_directory / "models" / "text_encoders"
    gguf(folder / "pair-mmproj.gguf", VISION, "clip")
    gguf(folder / "pair-byt5.gguf", t5("byt5"))
    small.save(folder / "pair-clip_l.safetensors", clip_l())
    errors = {
        "pair-mmproj.gguf": "pair-mmproj.gguf: found the vision part of a model (mmproj)",
        "pair-byt5.gguf": "pair-byt5.gguf: found ByT5 small, expected CLIP-L or T5-XXL for the type flux",
    }
    for name, text in errors.items():
        loader = graphs.node(
            "Lowbit_LoadDualClipGguf", clip_name1="pair-clip_l.safetensors", clip_name2=name, type="flux"
        )
        encode = graphs.node("CLIPTextEncode", clip=["clip", 0], text="a")
        with pytest.raises(PromptError) as failed:
            comfy_server.queue({"clip": loader, "text": encode, "show": graphs.node("PreviewAny", source=["text", 0])})
        assert failed.value.node_type == "Lowbit_LoadDualClipGguf" and failed.value.message.startswith(text)
