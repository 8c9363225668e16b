"""Small text encoders in GGUF, named and ordered as llama.cpp's converter does it, from the host's names.

write_llama_cpp(path, small_models.text_encoder(), "qwen3vl", linear="Q8_0", table="Q8_0")
"""

import pathlib
import re

import torch

from . import small_models as small

_DECODER = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.",
    ".self_attn.v_proj.": ".attn_v.",
    ".self_attn.o_proj.": ".attn_output.",
    ".self_attn.q_norm.": ".attn_q_norm.",
    ".self_attn.k_norm.": ".attn_k_norm.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".mlp.gate_proj.": ".ffn_gate.",
    ".mlp.up_proj.": ".ffn_up.",
    ".mlp.down_proj.": ".ffn_down.",
}
_T5 = {
    "shared.": "token_embd.",
    "encoder.final_layer_norm.": "enc.output_norm.",
    "encoder.block.": "enc.blk.",
    ".layer.0.SelfAttention.relative_attention_bias.": ".attn_rel_b.",
    ".layer.0.SelfAttention.": ".attn_",
    ".layer.0.layer_norm.": ".attn_norm.",
    ".layer.1.layer_norm.": ".ffn_norm.",
    ".layer.1.DenseReluDense.wi_0.": ".ffn_gate.",
    ".layer.1.DenseReluDense.wi_1.": ".ffn_up.",
    ".layer.1.DenseReluDense.wi.": ".ffn_up.",
    ".layer.1.DenseReluDense.wo.": ".ffn_down.",
}


def llama_cpp_name(key: str) -> str:
    for part, name in (_T5 if key.startswith(("shared.", "encoder.")) else _DECODER).items():
        key = key.replace(part, name)
    return key


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a q or k projection in the order in which the converter writes them for architecture `llama`."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(weight.shape)


def write_llama_cpp(
    path: pathlib.Path,
    state_dict: small.StateDict,
    architecture: str | None,
    *,
    linear: str = "F16",
    table: str = "F16",
    heads: tuple[int, int] = (1, 1),
    metadata: dict | None = None,
) -> pathlib.Path:
    """Writes a text encoder under the host's names as a GGUF file; returns the path.

    linear, table: the types of the linear layers and of the vocabulary; vectors and the position biases of T5 are F32.
    heads: of q and of k, by which architecture `llama` permutes. metadata: numbers, strings and lists to add, under
    full keys. A value may be a numpy array of uint8: bytes packed already.
    """
    import gguf
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), architecture or "")
    if architecture is None:
        for pairs in writer.kv_data:
            pairs.pop("general.architecture", None)
    else:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
        blocks = {match[1] for key in state_dict if (match := re.search(r"(?:layers|block)\.(\d+)\.", key))}
        writer.add_block_count(max(map(int, blocks), default=0) + 1)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint32)
        add(key, value)
    for key, tensor in state_dict.items():
        name = llama_cpp_name(key)
        if isinstance(tensor, np.ndarray):
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[table])
            continue
        if architecture == "llama" and (match := re.search(r"\.([qk])_proj\.weight$", key)):
            tensor = permuted(tensor, heads["qk".index(match[1])])
        chosen = "F32" if tensor.ndim == 1 or "attn_rel_b" in name else table if "token_embd" in name else linear
        if chosen in ("F32", "F16"):
            writer.add_tensor(name, tensor.to({"F32": torch.float32, "F16": torch.float16}[chosen]).numpy())
        else:
            packed = small.ggml_bytes(tensor, chosen)
            writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
