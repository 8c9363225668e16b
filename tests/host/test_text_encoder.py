"""Text encoders in GGUF through the host's own encoding, beside stock ones that hold the same weights as floats.

Twice the truth: `values` are what the file's bytes mean, unpacked, and must give the same conditioning but for
rounding; `floats` are what the file was made of, and may differ by the format's error.
"""

import functools

import pytest
import torch
from host_harness import small_models as small
from host_harness.text_encoders import write_llama_cpp

PROMPT = "a lighthouse at dawn, the word HELLO on its door"
ROUNDING = 2e-5  # fp32 sums in another order, through up to 36 layers


@pytest.fixture(scope="module")
def module(comfy_host):
    from lowbit.host import files, text_encoder

    files.register_gguf_folder()
    return text_encoder


@pytest.fixture
def wide(comfy_host, monkeypatch):
    """Qwen3-VL-8B's layers at 256 features, so that rows hold whole super-blocks. The vocabulary is a part of it."""
    ideogram4, sd = comfy_host.module("comfy.text_encoders.ideogram4"), comfy_host.module("comfy.sd")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, size in sizes.items():
        monkeypatch.setitem(ideogram4.QWEN3VL_8B_CONFIG, name, size)
    monkeypatch.setattr(sd, "detect_te_model", lambda state_dict: sd.TEModel.QWEN3_8B)


def small_floats() -> small.StateDict:
    return small.text_encoder(dtype=torch.float32) | {"model.norm.weight": torch.ones(64)}


@functools.cache
def wide_floats() -> small.StateDict:
    return decoder(256, heads=2, kv_heads=1, layers=36, vocabulary=151_936, norms=True)


def decoder(width, *, heads, kv_heads, layers, vocabulary, norms=False, bias=False) -> small.StateDict:
    """A Llama-like language model under the host's names: 128 features a head, a feed-forward as wide as the model."""
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q_proj", 128 * heads), ("k_proj", 128 * kv_heads), ("v_proj", 128 * kv_heads)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, width)
            if bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, 128 * heads)
        if norms:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (128,) for x in "qk"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (width, width) for name in ("gate", "up", "down")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return small.fill(shapes, name="decoder")


def load(module, path, type="ideogram4", device="default"):
    return module.load_clip(module.TextEncoderRequest((str(path),), type, device))


def stock(comfy_host, state_dict: small.StateDict, type: str = "ideogram4"):
    """The host's own CLIP of these floats."""
    sd = comfy_host.module("comfy.sd")
    return sd.load_text_encoder_state_dicts([dict(state_dict)], clip_type=getattr(sd.CLIPType, type.upper()))


def values_of(path) -> small.StateDict:
    """What a file's bytes mean, as float32."""
    from lowbit.formats import GgmlWeight
    from lowbit.loaders.text_encoder_gguf import read_text_encoder

    weights = read_text_encoder(path).weights
    return {key: w.dequantize() if isinstance(w, GgmlWeight) else w.float() for key, w in weights.items()}


def encode(comfy_host, clip, text: str = PROMPT) -> torch.Tensor:
    """What the stock node CLIP Text Encode gives."""
    return comfy_host.nodes.CLIPTextEncode().encode(clip, text)[0][0][0]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def vocabulary(clip) -> torch.nn.Module:
    return clip.cond_stage_model.qwen3vl_8b.transformer.get_input_embeddings()


# The same conditioning. The bounds against the floats are a fifth above what was measured: each of the 36 layers of
# random weights adds its own error.


@pytest.mark.parametrize(("linear", "bound"), [("F16", 1.3e-3), ("Q8_0", 0.031)])
def test_qwen3vl_encodes_as_its_floats_do(comfy_host, module, tmp_path, linear, bound):
    floats = small_floats()
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "qwen3vl", linear=linear, table=linear)
    actual = encode(comfy_host, load(module, path))
    assert relative(actual, encode(comfy_host, stock(comfy_host, values_of(path)))) < ROUNDING
    assert relative(actual, encode(comfy_host, stock(comfy_host, floats))) < bound


@pytest.mark.parametrize(("table", "bound"), [("Q4_K", 0.41), ("Q8_0", 0.39)])
def test_qwen3vl_in_four_bits(comfy_host, module, wide, tmp_path, table, bound):
    path = write_llama_cpp(tmp_path / "m.gguf", wide_floats(), "qwen3vl", linear="Q4_K", table=table)
    actual = encode(comfy_host, load(module, path))
    assert relative(actual, encode(comfy_host, stock(comfy_host, values_of(path)))) < ROUNDING
    assert relative(actual, encode(comfy_host, stock(comfy_host, wide_floats()))) < bound


def test_qwen25vl_with_biases_and_without_its_vision_part(comfy_host, module, monkeypatch, tmp_path):
    """Known to the host by the 512 biases of k; the vision part, which the file lacks, is dropped."""
    llama = comfy_host.module("comfy.text_encoders.llama")
    small_config = functools.partial(
        llama.Qwen25_7BVLI_Config,
        vocab_size=152_064,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    monkeypatch.setattr(llama, "Qwen25_7BVLI_Config", small_config)
    floats = decoder(256, heads=4, kv_heads=4, layers=2, vocabulary=152_064, bias=True)
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "qwen2vl", linear="Q5_0", table="Q8_0", heads=(4, 4))
    clip = load(module, path, "qwen_image")
    assert relative(encode(comfy_host, clip), encode(comfy_host, stock(comfy_host, values_of(path), "qwen_image"))) < (
        ROUNDING
    )
    assert not any("visual" in key for key in clip.get_sd())
    picture = {"type": "image", "data": torch.zeros(1, 64, 64, 3)}
    with pytest.raises(ValueError, match=r"m\.gguf holds the language model alone, so it cannot read pictures"):
        clip.cond_stage_model.qwen25_7b.process_tokens([[1, picture, 2]], "cpu")


def test_llamas_rows_are_put_back_in_order(comfy_host, module, monkeypatch, tmp_path):
    llama = comfy_host.module("comfy.text_encoders.llama")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = functools.partial(llama.Llama2Config, **sizes, num_key_value_heads=2)
    monkeypatch.setattr(llama, "Llama2Config", config)
    # The host rounds the floats of this one to its default dtype, fp16.
    management = comfy_host.module("comfy.model_management")
    monkeypatch.setattr(management, "text_encoder_dtype", lambda device=None: torch.float32)
    floats = decoder(256, heads=4, kv_heads=2, layers=2, vocabulary=128_256)
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "llama", linear="Q4_K", table="Q8_0", heads=(4, 2))
    twin = floats | {key: value for key, value in values_of(path).items() if "embed" in key}
    actual = encode_llama(load(module, path, "hidream"))
    assert relative(actual, encode_llama(stock(comfy_host, values_of(path), "hidream"))) < ROUNDING
    assert relative(actual, encode_llama(stock(comfy_host, twin, "hidream"))) < 0.2  # rows out of order: 0.6 and more


def encode_llama(clip) -> torch.Tensor:
    """The states of all layers, which HiDream takes."""
    return clip.encode_from_tokens(clip.tokenize(PROMPT), return_dict=True)["conditioning_llama3"]


@pytest.mark.parametrize("gated", [False, True])
def test_t5(comfy_host, module, monkeypatch, tmp_path, gated):
    sa_t5, t5 = comfy_host.module("comfy.text_encoders.sa_t5"), comfy_host.module("comfy.text_encoders.t5")
    config = {
        **{"d_ff": 512, "d_kv": 64, "d_model": 256, "num_heads": 4, "num_layers": 3, "vocab_size": 32_128},
        **{"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": gated, "model_type": "t5"},
    }

    class SmallT5(comfy_host.module("comfy.sd1_clip").SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                **{"device": device, "dtype": torch.float32, "model_options": model_options, "model_class": t5.T5},
                **{"textmodel_json_config": dict(config), "special_tokens": {"end": 1, "pad": 0}},
                **{"enable_attention_masks": True, "zero_out_masked": True},
            )

    monkeypatch.setattr(sa_t5, "T5BaseModel", SmallT5)
    shapes = {"shared.weight": (32_128, 256), "encoder.final_layer_norm.weight": (256,)}
    for i in range(3):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{x}.weight": (256, 256) for x in "qkvo"}
        inner = ("wi_0", "wi_1") if gated else ("wi",)
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (512, 256) for name in inner}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (256, 512)
        shapes |= {f"{part}.layer_norm.weight": (256,) for part in (attention, feed_forward)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    floats = small.fill(shapes, name="t5")
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "t5encoder", linear="Q8_0", table="Q4_K")
    actual = encode(comfy_host, load(module, path, "stable_audio"))
    expected = encode(comfy_host, stock(comfy_host, values_of(path), "stable_audio"))
    assert relative(actual, expected) < ROUNDING


def test_qwen3vl_for_a_model_that_takes_its_vision_part_too(comfy_host, module, monkeypatch, tmp_path):
    """The host asks for the vision part's keys to tell a Qwen3-VL from a Qwen3; the text is encoded without it."""
    qwen3vl = comfy_host.module("comfy.text_encoders.qwen3vl")
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = functools.partial(qwen3vl.Qwen3VL_8BConfig, **sizes, num_hidden_layers=2, vocab_size=16_384, lm_head=False)
    monkeypatch.setitem(qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_8b", config)
    floats = decoder(4096, heads=2, kv_heads=1, layers=2, vocabulary=16_384, norms=True)
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "qwen3vl", linear="Q8_0", table="Q8_0")
    clip = load(module, path, "boogu")
    model = clip.cond_stage_model.qwen3vl_8b
    assert isinstance(model, comfy_host.module("comfy.text_encoders.boogu").BooguQwen3VLClipModel)
    values = {key.replace("model.", "model.language_model.", 1): value for key, value in values_of(path).items()}
    twin = stock(comfy_host, values | _vision_keys(), "boogu").cond_stage_model.qwen3vl_8b
    tokens = [[5, 6, 700, 16_000]]
    assert relative(model(tokens)[0], twin(tokens)[0]) < ROUNDING
    assert model.transformer.visual is None


def _vision_keys() -> small.StateDict:
    return {
        "model.visual.deepstack_merger_list.0.norm.weight": torch.ones(4608),
        "model.visual.merger.linear_fc2.weight": torch.ones(4096, 4608),
    }


# The vocabulary


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    path = tmp_path_factory.mktemp("four_bits") / "m.gguf"
    return write_llama_cpp(path, wide_floats(), "qwen3vl", linear="Q4_K", table="Q4_K")


@pytest.fixture
def loaded(module, wide, four_bits):
    return four_bits, load(module, four_bits)


def test_the_vocabulary_stays_quantized_and_the_whole_model_as_large_as_its_file(loaded):
    path, clip = loaded
    table = vocabulary(clip).weight
    assert tuple(table.shape) == (151_936, 256) and table._qdata.shape == (151_936, 144)
    assert clip.patcher.model_size() < 1.01 * path.stat().st_size


def test_a_lookup_unpacks_the_rows_it_reads_and_no_others(comfy_host, loaded, monkeypatch):
    from lowbit.host import embedding

    _, clip = loaded
    table, unpacked = vocabulary(clip), []

    def watched(blocks, ggml_type, dtype):
        unpacked.append(tuple(blocks.shape))
        return real(blocks, ggml_type, dtype)

    real = embedding.unpack
    monkeypatch.setattr(embedding, "unpack", watched)
    encode(comfy_host, clip)
    tokens = len(next(iter(clip.tokenize(PROMPT).values()))[0])
    assert unpacked == [(tokens, 144)]

    ids = torch.tensor([[0, 151_935, 7], [7, 7, 1]])
    whole = table.weight.dequantize()
    for dtype in (torch.float32, torch.bfloat16):
        values = table(ids, out_dtype=dtype)
        assert values.dtype == dtype and torch.equal(values, whole[ids].to(dtype))
    assert table(ids).dtype == table.weight.dtype
    with pytest.raises(IndexError):
        table(torch.tensor([151_936]))


def test_a_vocabulary_moves_and_takes_patches(comfy_host, loaded):
    """As the host's patchers do it: moved as a whole, and a patch applied to the unpacked table where it is used."""
    _, clip = loaded
    table, ids = vocabulary(clip), torch.tensor([3, 5])
    before = table(ids)
    moved = table._apply(lambda tensor: tensor.clone())
    assert moved.weight._qdata.data_ptr() != 0 and torch.equal(table(ids), before)
    table.weight_function = [lambda weight: weight + 1]
    assert torch.equal(table(ids), before + 1)


def test_a_float_vocabulary_stays_in_the_files_dtype(comfy_host, module, wide, tmp_path):
    path = write_llama_cpp(tmp_path / "m.gguf", wide_floats(), "qwen3vl", linear="Q4_K", table="F16")
    clip = load(module, path)
    assert vocabulary(clip).weight.dtype == torch.float16
    assert clip.patcher.model_size() < 1.01 * path.stat().st_size


@pytest.mark.parametrize("rows", [16, 20_000])
@pytest.mark.parametrize("kind", ["int8", "fp8", "q8_0"])
def test_only_a_vocabulary_in_blocks_stays_quantized(comfy_host, kind, rows):
    """The others are unpacked at load, and all give the rows that their bytes mean."""
    from lowbit.formats import Fp8Weight, GgmlWeight, ggml, int8
    from lowbit.host import layouts
    from lowbit.host.ops import LoadSettings, make_operations

    values = small.fill({"table": (rows, 64)})["table"]
    if kind == "int8":
        weight = int8.quantize_weight(values)
    elif kind == "fp8":
        weight = Fp8Weight(values.to(torch.float8_e4m3fn), (rows, 64), torch.ones(()))
    else:
        weight = GgmlWeight(ggml.quantize(values, "Q8_0"), (rows, 64), "Q8_0")
    table = make_operations(LoadSettings("m", "exact")).Embedding(rows, 64, dtype=torch.float32)
    table.load_state_dict({"weight": layouts.to_host(weight, torch.float32)})
    assert (layouts.from_host(table.weight) is not None) == (kind == "q8_0" and rows == 20_000)
    ids = torch.tensor([0, rows - 1, 3])
    assert torch.equal(table(ids, out_dtype=torch.float32), weight.dequantize()[ids])


# What nodes do with a CLIP


def test_a_lora_of_the_text_encoder_is_a_side_path(comfy_host, loaded):
    path, clip = loaded
    name = "text_encoders.qwen3vl_8b.transformer.model.layers.20.mlp.up_proj"
    up, down = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 16 for shape in ((256, 4), (4, 256)))
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    before = encode(comfy_host, clip)
    with_lora = comfy_host.comfy.sd.load_lora_for_models(None, clip, dict(lora), 0.0, 1.0)[1]
    twin = comfy_host.comfy.sd.load_lora_for_models(None, stock(comfy_host, values_of(path)), dict(lora), 0.0, 1.0)[1]
    changed = encode(comfy_host, with_lora)
    assert relative(changed, encode(comfy_host, twin)) < ROUNDING < 1e-3 < relative(changed, before)
    assert torch.equal(encode(comfy_host, clip), before)


def test_the_host_can_build_it_once_more(comfy_host, loaded):
    _, clip = loaded
    build, arguments = clip.patcher.cached_patcher_init
    again = build(*arguments, disable_dynamic=True)
    copy = clip.clone()
    copy.patcher, copy.cond_stage_model = again, again.model
    assert torch.equal(encode(comfy_host, copy), encode(comfy_host, clip))


def test_on_the_cpu(comfy_host, module, tmp_path):
    path = write_llama_cpp(tmp_path / "m.gguf", small_floats(), "qwen3vl", linear="Q8_0")
    clip = load(module, path, device="cpu")
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    assert encode(comfy_host, clip).isfinite().all()


# What a person reads


@pytest.mark.parametrize(
    ("width", "options", "architecture", "type", "text"),
    [
        (512, {"bias": True}, "qwen2", "qwen_image", "a qwen2 of a size that this ComfyUI does not know"),
        (5120, {"norms": True}, "qwen3", "flux2", "a qwen3 of a size that this ComfyUI does not know"),
        (5120, {}, "llama", "flux2", "a Mistral text encoder"),
        (512, {}, "llama", "hidream", "the model expects"),
        (2048, {"norms": True}, "qwen3vl", "krea2", "a Qwen3-VL with 2,048 features"),
        (2560, {"norms": True}, "qwen3vl", "ideogram4", "a qwen3vl that is no Qwen3-VL-8B"),
    ],
)
def test_errors_name_the_file(module, tmp_path, width, options, architecture, type, text):
    floats = decoder(width, heads=1, kv_heads=1, layers=1, vocabulary=32, **options)
    path = write_llama_cpp(tmp_path / "picked.gguf", floats, architecture)
    with pytest.raises(ValueError, match=text) as error:
        load(module, path, type)
    assert str(error.value).startswith("picked.gguf: ")


def test_a_vocabulary_of_another_size(module, tmp_path):
    floats = small_floats()
    table = floats["model.embed_tokens.weight"][:1000]
    path = write_llama_cpp(tmp_path / "short.gguf", floats | {"model.embed_tokens.weight": table}, "qwen3vl")
    with pytest.raises(ValueError, match=r"shapes that do not fit .*\[1000, 64\] in the file, \[151936, 64\] here"):
        load(module, path)


# The node


def test_a_file_that_is_gone_is_named(module):
    from lowbit.nodes.load_clip_gguf import LoadClipGguf

    with pytest.raises(FileNotFoundError, match=r"gone\.gguf is not in models/text_encoders any more"):
        LoadClipGguf.execute("gone.gguf", "ideogram4")


def test_the_node_offers_what_the_stock_node_does(comfy_host, module):
    from lowbit.nodes.load_clip_gguf import LoadClipGguf

    inputs = {entry.id: entry for entry in LoadClipGguf.define_schema().inputs}
    known = comfy_host.nodes.CLIPLoader.INPUT_TYPES()
    assert inputs["type"].options == known["required"]["type"][0] and "ideogram4" in inputs["type"].options
    assert inputs["device"].options == known["optional"]["device"][0] and inputs["device"].advanced
    assert all(entry.tooltip for entry in inputs.values())


def test_a_whole_prompt_over_http(comfy_server, tmp_path):
    """The stock graph with this node: the latent is that of the same weights as floats through the stock node."""
    from host_harness import graphs

    names = small.write_stand_ins(comfy_server.base_directory)
    folder = comfy_server.base_directory / "models" / "text_encoders"
    path = write_llama_cpp(folder / "small-qwen3vl-Q8_0.gguf", small_floats(), "qwen3vl", linear="Q8_0", table="Q8_0")
    small.save(folder / "values.safetensors", values_of(path))
    latents = {}
    for kind, file in (("stock", "values.safetensors"), ("lowbit", path.name)):
        prompt = graphs.stock_ideogram4({**names, "text_encoder": file}, latent=f"text_encoder_{kind}")
        if kind == "lowbit":
            prompt["clip"] = graphs.node("Lowbit_LoadClipGguf", clip_name=file, type="ideogram4", device="default")
        comfy_server.queue(prompt)
        latents[kind] = _latent(comfy_server, f"text_encoder_{kind}")
    assert relative(latents["lowbit"], latents["stock"]) < 1e-3


def _latent(server, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(server.base_directory / "output" / f"{name}.safetensors")["samples"]


def test_the_error_of_a_wrong_file_over_http(comfy_server):
    from host_harness import graphs
    from host_harness.server import PromptError

    folder = comfy_server.base_directory / "models" / "text_encoders"
    write_llama_cpp(folder / "mmproj-F16.gguf", {"v.patch_embd.weight": torch.zeros(4, 32)}, "clip")
    prompt = {
        "clip": graphs.node("Lowbit_LoadClipGguf", clip_name="mmproj-F16.gguf", type="ideogram4", device="default"),
        "text": graphs.node("CLIPTextEncode", clip=["clip", 0], text="a"),
        "show": graphs.node("PreviewAny", source=["text", 0]),
    }
    with pytest.raises(PromptError) as failed:
        comfy_server.queue(prompt)
    assert failed.value.node_type == "Lowbit_LoadClipGguf"
    assert "mmproj-F16.gguf: found the vision part of a model (mmproj)" in failed.value.message
