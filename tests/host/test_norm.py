"""The weights of norms, which GGUF files hold in float32, lie in the model's dtype."""

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small


def norms(model) -> dict[str, torch.nn.Module]:
    found = {name: module for name, module in model.model.named_modules() if "norm" in name.rpartition(".")[2]}
    return {name: module for name, module in found.items() if module.weight is not None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_values_are_the_files_in_the_models_dtype(comfy_host, tmp_path, dtype):
    floats = small.ideogram4()
    model = quantized.load(quantized.write(tmp_path, "q4_k"), dtype=dtype)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert len(norms(model)) == 2 * 6 + 1, "of two blocks and of the text's features"
    for name, module in norms(model).items():
        stored = floats[f"{name.removeprefix('diffusion_model.')}.weight"]
        assert stored.dtype == torch.float32 and stored.std() > 0
        assert module.weight.dtype == expected and torch.equal(module.weight, stored.to(expected)), name
