"""Files of stable-diffusion.cpp, which keep tensors with other dimensions than ComfyUI's models have them."""

import pytest
import torch
from host_harness import small_models as small
from lowbit.loaders.branch import load_branch


def shapes_of(path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in load_branch(path).weights.items()}


def test_padding_tokens_get_their_first_dimension_back(tmp_path):
    model = small.lumina2()
    flat = {key: tensor[0] if key.endswith("pad_token") else tensor for key, tensor in model.items()}
    for path in (
        small.write_gguf(tmp_path / "z.gguf", flat),
        small.write_gguf(tmp_path / "packed.gguf", flat, choose=lambda key, tensor: "Q8_0"),
        small.save(tmp_path / "z.safetensors", flat),
    ):
        assert shapes_of(path) == {key: tuple(tensor.shape) for key, tensor in model.items()}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_leading_ones_come_back(tmp_path, kind):
    shapes = {
        "blocks.0.modulation": (1, 6, 256),  # Wan
        "head.modulation": (1, 2, 256),
        "img_emb.emb_pos": (1, 5, 256),
        "pos_embed": (1, 7, 256),  # SD3
        "register_tokens": (1, 8, 256),  # AuraFlow
        "single_blocks.0.modulation.lin.weight": (768, 256),  # Flux, which has it as it is
    }
    model = {key: torch.randn(shape) for key, shape in shapes.items()}
    flat = {key: tensor[0] if tensor.dim() == 3 else tensor for key, tensor in model.items()}
    path = small.write_gguf(tmp_path / "model.gguf", flat, choose=lambda key, tensor: kind)
    assert shapes_of(path) == shapes
    for key, weight in load_branch(path).weights.items():
        values = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
        torch.testing.assert_close(values, model[key], atol=0.02, rtol=0)


@pytest.mark.parametrize("context, becomes_linear", [(2048, True), (1024, True), (768, False)], ids=["xl", "2", "1"])
def test_projections_of_u_nets_with_linear_layers_are_no_convolutions(tmp_path, context, becomes_linear):
    module = "input_blocks.4.1"
    stored = {
        f"{module}.proj_in.weight": torch.randn(64, 32, 1, 1),
        f"{module}.proj_out.weight": torch.randn(32, 64, 1, 1),
        f"{module}.transformer_blocks.0.attn2.to_k.weight": torch.randn(64, context),
        "input_blocks.3.0.op.weight": torch.randn(32, 32, 1, 1),
    }
    path = small.write_gguf(tmp_path / "unet.gguf", stored, choose=lambda key, tensor: "F16")
    ones = () if becomes_linear else (1, 1)
    assert shapes_of(path) == {
        f"{module}.proj_in.weight": (64, 32, *ones),
        f"{module}.proj_out.weight": (32, 64, *ones),
        f"{module}.transformer_blocks.0.attn2.to_k.weight": (64, context),
        "input_blocks.3.0.op.weight": (32, 32, 1, 1),
    }
