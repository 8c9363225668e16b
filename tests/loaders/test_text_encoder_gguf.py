"""llama.cpp's names and row order turned into the host's, and what a person reads about a file that is none."""

import pytest
import torch
from host_harness import small_models as small
from host_harness.text_encoders import write_llama_cpp
from lowbit.formats import GgmlWeight
from lowbit.loaders import CheckpointError
from lowbit.loaders.text_encoder_gguf import FAMILIES, read_text_encoder

WIDTH, HEADS = 256, (4, 2)


def decoder(*, norms: bool = False, bias: bool = False, blocks: int = 2) -> small.StateDict:
    """A Llama-like model under the host's names, 64 features a head."""
    shapes = {"model.embed_tokens.weight": (32, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (32, WIDTH)}
    for i in range(blocks):
        layer = f"model.layers.{i}"
        for name, rows in (("q_proj", WIDTH), ("k_proj", WIDTH // 2), ("v_proj", WIDTH // 2)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, WIDTH)
            if bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
        if norms:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (64,) for x in "qk"}
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            shapes[f"{layer}.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (WIDTH,)
    return small.fill(shapes)


def t5(*, gated: bool = True, blocks: int = 2, biases: int = 1) -> small.StateDict:
    shapes = {"shared.weight": (32, WIDTH), "encoder.final_layer_norm.weight": (WIDTH,)}
    for i in range(blocks):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{x}.weight": (WIDTH, WIDTH) for x in "qkvo"}
        if i < biases:
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, 4)
        for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            shapes[f"{feed_forward}.DenseReluDense.{name}.weight"] = (WIDTH, WIDTH)
        shapes |= {f"{part}.layer_norm.weight": (WIDTH,) for part in (attention, feed_forward)}
    return small.fill(shapes)


MODELS = {
    "llama": decoder(),
    "qwen2": decoder(bias=True),
    "qwen2vl": decoder(bias=True),
    "qwen3": decoder(norms=True),
    "qwen3vl": decoder(norms=True),
    "t5": t5(),
    "t5encoder": t5(),
}


def test_every_family_is_tested():
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("linear", ["F32", "Q8_0", "Q4_K"])
def test_names_shapes_and_values_come_back(tmp_path, architecture, linear):
    floats = MODELS[architecture]
    path = write_llama_cpp(tmp_path / "m.gguf", floats, architecture, linear=linear, table=linear, heads=HEADS)
    encoder = read_text_encoder(path)
    assert encoder.architecture == architecture and encoder.weights.keys() == floats.keys()
    for key, weight in encoder.weights.items():
        expected = floats[key]
        assert tuple(weight.shape) == tuple(expected.shape)
        is_quantized = linear != "F32" and expected.ndim == 2 and "relative_attention_bias" not in key
        assert isinstance(weight, GgmlWeight) == is_quantized
        if is_quantized:
            # Packed row by row, so the bytes of the rows in the host's order are those of the ordered floats.
            packed = torch.from_numpy(small.ggml_bytes(expected, linear))
            assert weight.ggml_type == linear and torch.equal(weight.data, packed)
        else:
            assert weight.dtype == torch.float32 and torch.equal(weight, expected)


def test_only_llama_is_reordered_and_everything_else_stays_on_the_mapping(tmp_path):
    floats = MODELS["llama"]
    for architecture in ("llama", "qwen3"):
        source = floats if architecture == "llama" else MODELS["qwen3"]
        path = write_llama_cpp(tmp_path / f"{architecture}.gguf", source, architecture, linear="Q8_0", heads=HEADS)
        weights = read_text_encoder(path).weights
        copied = {key for key, weight in weights.items() if not _is_mapped(weight)}
        expected = {key for key in weights if key.endswith(("q_proj.weight", "k_proj.weight"))}
        assert copied == (expected if architecture == "llama" else set())


def _is_mapped(weight) -> bool:
    data = weight.data if isinstance(weight, GgmlWeight) else weight
    # torch can resize memory of its own, and not that of a mapped file.
    return not data.untyped_storage().resizable()


def test_t5_without_gates(tmp_path):
    floats = t5(gated=False)
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "t5encoder", linear="F32", table="F32")
    weights = read_text_encoder(path).weights
    assert weights.keys() == floats.keys()
    assert all(torch.equal(weights[key], floats[key]) for key in floats)


def test_a_t5_may_bring_its_decoder_and_a_llama_its_rope_factors(tmp_path):
    floats = t5()
    extra = {"dec.blk.0.attn_q.weight": torch.zeros(4, 32), "output.weight": torch.zeros(4, 32)}
    path = write_llama_cpp(tmp_path / "t5.gguf", floats | extra, "t5")
    assert read_text_encoder(path).weights.keys() == floats.keys()
    path = write_llama_cpp(
        tmp_path / "l.gguf", MODELS["llama"] | {"rope_freqs.weight": torch.ones(32)}, "llama", heads=HEADS
    )
    assert read_text_encoder(path).weights.keys() == MODELS["llama"].keys()


def test_a_tied_output_is_no_missing_tensor(tmp_path):
    floats = {key: value for key, value in MODELS["qwen3"].items() if key != "lm_head.weight"}
    path = write_llama_cpp(tmp_path / "m.gguf", floats, "qwen3")
    assert read_text_encoder(path).weights.keys() == floats.keys()


def without(floats: small.StateDict, part: str) -> small.StateDict:
    return {key: value for key, value in floats.items() if part not in key}


@pytest.mark.parametrize(
    ("floats", "architecture", "metadata", "found", "todo"),
    [
        (MODELS["qwen3"], "clip", {}, "vision part of a model (mmproj)", "main file of the same model"),
        ({"text_model.a.weight": torch.zeros(4, 32)}, "clip", {}, "a CLIP in GGUF", "Take its safetensors version"),
        (MODELS["qwen3"], "flux", {}, "the architecture 'flux'", "Load Diffusion Model (GGUF)"),
        (MODELS["qwen3"], None, {}, "a file without an architecture", "Load Diffusion Model (GGUF)"),
        (MODELS["qwen3"], None, {"general.architecture": ["qwen3"]}, "the architecture ['qwen3']", "Load Diffusion"),
        (MODELS["llama"], "gemma3", {}, "architecture 'gemma3'", "safetensors version"),
        (MODELS["qwen3"], "qwen3", {"split.count": 2}, "one part of a model split into 2 files", "llama-gguf-split"),
        (without(MODELS["qwen3"], "1.mlp.up"), "qwen3", {}, "1 tensor of the text encoder are missing", "incomplete"),
        (without(MODELS["qwen3"], "layers.1."), "qwen3", {"qwen3.block_count": 2}, "11 tensors of the", "incomplete"),
        (without(MODELS["qwen2"], "k_proj.bias"), "qwen2", {}, "2 tensors of the text encoder are", "incomplete"),
        (MODELS["qwen3"], "qwen2", {}, "the tensor 'blk.0.attn_q_norm.weight'", "variant that is not known"),
        (t5(biases=2), "t5encoder", {}, "a UMT5", "safetensors version"),
        (t5(biases=0), "t5encoder", {}, "missing, such as enc.blk.0.attn_rel_b.weight", "incomplete"),
        (without(t5(), "1.layer.1.DenseReluDense.wi_0"), "t5", {}, "such as enc.blk.1.ffn_gate.weight", "incomplete"),
    ],
)
def test_what_is_no_text_encoder_says_so(tmp_path, floats, architecture, metadata, found, todo):
    path = write_llama_cpp(tmp_path / "picked.gguf", floats, architecture, metadata=metadata)
    with pytest.raises(CheckpointError) as error:
        read_text_encoder(path)
    assert str(error.value).startswith("picked.gguf: found ") and str(path) in str(error.value)
    assert found in error.value.found and todo in error.value.todo and error.value.expected


def test_heads_that_do_not_divide_the_rows(tmp_path):
    path = write_llama_cpp(tmp_path / "m.gguf", MODELS["llama"], "llama", metadata={"llama.attention.head_count": 3})
    with pytest.raises(CheckpointError, match=r"3 attention heads for the weight model\.layers\.0\.self_attn\.q_proj"):
        read_text_encoder(path)


def test_safetensors_belong_to_the_stock_node(tmp_path):
    with pytest.raises(CheckpointError, match="expected a text encoder in GGUF"):
        read_text_encoder(small.save(tmp_path / "m.safetensors", MODELS["qwen3"]))
