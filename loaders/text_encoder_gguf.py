"""Text encoders in GGUF as llama.cpp's converter writes them: its tensor names to those that the host knows.

The architecture stands in the metadata. Names are mapped by the tables below, and a file must hold all tensors of its
family and no unknown ones: the host itself only logs what a text encoder lacks. Weights stay as they lie in the file,
but for the q and k projections of architecture `llama`: the converter reorders their rows, because its rotary embedding
turns neighbouring features and not those half a head apart. Rows are whole blocks, so putting them back moves bytes and
changes none.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable

import torch

from ..formats import GgmlWeight
from . import open_checkpoint
from .checkpoint import CheckpointFile
from .errors import TAKE_ANOTHER, CheckpointError, counted, quoted
from .mapped_file import MappedFile

Weights = dict[str, "torch.Tensor | GgmlWeight"]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """The weights of a text encoder under the host's names. architecture: llama.cpp's word for the model family; None
    for a file whose tensors had the host's names already."""

    path: str
    architecture: str | None
    weights: Weights


@dataclasses.dataclass(frozen=True)
class _Family:
    """How a model family is named: pairs of llama.cpp's names and the host's, `{}` standing for the block number.

    top, block: outside and inside of the numbered blocks. optional: of the names on the left, those that a file may
    lack. permuted: whether the rows of q and k were reordered. ignored: what the host has no use for.
    """

    top: dict[str, str]
    block_prefix: str
    block: dict[str, str]
    optional: frozenset[str] = frozenset()
    permuted: bool = False
    ignored: tuple[str, ...] = ("rope_freqs.weight",)


def _decoder(*, qk_norm: bool = False, qkv_bias: bool = False, permuted: bool = False) -> _Family:
    """Llama and its relatives: the first half of a language model, so to speak; `output` is its last layer."""
    layer = "model.layers.{}"
    block = {
        "attn_norm.weight": f"{layer}.input_layernorm.weight",
        "attn_q.weight": f"{layer}.self_attn.q_proj.weight",
        "attn_k.weight": f"{layer}.self_attn.k_proj.weight",
        "attn_v.weight": f"{layer}.self_attn.v_proj.weight",
        "attn_output.weight": f"{layer}.self_attn.o_proj.weight",
        "ffn_norm.weight": f"{layer}.post_attention_layernorm.weight",
        "ffn_gate.weight": f"{layer}.mlp.gate_proj.weight",
        "ffn_up.weight": f"{layer}.mlp.up_proj.weight",
        "ffn_down.weight": f"{layer}.mlp.down_proj.weight",
    }
    if qk_norm:
        block |= {f"attn_{x}_norm.weight": f"{layer}.self_attn.{x}_norm.weight" for x in "qk"}
    if qkv_bias:
        block |= {f"attn_{x}.bias": f"{layer}.self_attn.{x}_proj.bias" for x in "qkv"}
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    return _Family(top, "blk.", block, frozenset({"output.weight"}), permuted)


def _t5() -> _Family:
    """The encoder of T5; a whole T5 has a decoder too, which no image model reads."""
    block = "encoder.block.{}.layer"
    return _Family(
        top={"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"},
        block_prefix="enc.blk.",
        block={
            "attn_norm.weight": f"{block}.0.layer_norm.weight",
            "attn_q.weight": f"{block}.0.SelfAttention.q.weight",
            "attn_k.weight": f"{block}.0.SelfAttention.k.weight",
            "attn_v.weight": f"{block}.0.SelfAttention.v.weight",
            "attn_o.weight": f"{block}.0.SelfAttention.o.weight",
            "attn_rel_b.weight": f"{block}.0.SelfAttention.relative_attention_bias.weight",
            "ffn_norm.weight": f"{block}.1.layer_norm.weight",
            "ffn_gate.weight": f"{block}.1.DenseReluDense.wi_0.weight",
            "ffn_up.weight": f"{block}.1.DenseReluDense.wi_1.weight",
            "ffn_down.weight": f"{block}.1.DenseReluDense.wo.weight",
        },
        optional=frozenset({"attn_rel_b.weight", "ffn_gate.weight"}),
        ignored=("dec.", "output.weight"),
    )


FAMILIES = {
    "llama": _decoder(permuted=True),
    "qwen2": _decoder(qkv_bias=True),
    "qwen2vl": _decoder(qkv_bias=True),
    "qwen3": _decoder(qk_norm=True),
    "qwen3vl": _decoder(qk_norm=True),
    "t5": _t5(),
    "t5encoder": _t5(),
}
# What the host reads the tokenizer of from the text encoder's own file, in a form that GGUF does not hold.
_TOKENIZER_MISSING = ("gemma", "gemma2", "gemma3", "mistral3")


def read_text_encoder(path: str | os.PathLike, open_file: Callable[..., MappedFile] = MappedFile) -> TextEncoder:
    """Read a text encoder; its tensors are views on the mapped file. Raises CheckpointError."""
    return text_encoder_of(open_checkpoint(path, open_file))


def text_encoder_of(file: CheckpointFile) -> TextEncoder:
    """The text encoder in an opened GGUF file. Raises CheckpointError."""
    architecture = _architecture(file)
    family = FAMILIES[architecture]
    keys = _host_keys(file, family)
    if architecture.startswith("t5"):
        _check_t5(file, keys)
    weights = {key: file.tensors[name].load() for name, key in keys.items()}
    if family.permuted:
        _restore_order(file, architecture, weights)
    return TextEncoder(file.path, architecture, weights)


def _architecture(file: CheckpointFile) -> str:
    if file.container != "gguf":
        raise CheckpointError(
            file.path,
            found="a safetensors file",
            expected="a text encoder in GGUF",
            todo="Pick a .gguf file, or load this one with ComfyUI's Load CLIP node.",
        )
    architecture = file.metadata.get("general.architecture")
    if isinstance(architecture, str) and architecture in FAMILIES:
        return architecture
    if architecture == "clip" and any(name.startswith(("text_model.", "t.")) for name in file.tensors):
        raise CheckpointError(
            file.path,
            found="a CLIP in GGUF",
            expected=f"one of {', '.join(FAMILIES)}",
            todo="Take its safetensors version, which is small: ComfyUI's loaders read it, and so does Load Dual CLIP "
            "(GGUF) beside a GGUF file.",
        )
    if architecture == "clip" or file.metadata.get("general.type") == "mmproj":
        raise CheckpointError(
            file.path,
            found="the vision part of a model (mmproj)",
            expected="its language model",
            todo="Pick the main file of the same model, whose name does not start with mmproj.",
        )
    if architecture in _TOKENIZER_MISSING:
        raise CheckpointError(
            file.path,
            found=f"a text encoder of architecture {quoted(architecture)}",
            expected=f"one of {', '.join(FAMILIES)}",
            todo="ComfyUI takes this model's tokenizer from a safetensors file, and GGUF files hold it in another "
            "form: use the safetensors version with ComfyUI's Load CLIP node.",
        )
    found = "a file without an architecture" if architecture is None else f"the architecture {quoted(architecture)}"
    raise CheckpointError(
        file.path,
        found=found,
        expected=f"a text encoder made with llama.cpp's converter: one of {', '.join(FAMILIES)}",
        todo="If it is a diffusion model, move it to models/diffusion_models and use Load Diffusion Model (GGUF); else "
        "pick another file.",
    )


def _host_keys(file: CheckpointFile, family: _Family) -> dict[str, str]:
    """The host's key of every tensor that the host wants, by the name in the file."""
    keys, blocks = {}, set()
    for name in file.tensors:
        number, leaf = _block_of(name, family)
        if number is not None and leaf in family.block:
            blocks.add(number)
            keys[name] = family.block[leaf].format(number)
        elif name in family.top:
            keys[name] = family.top[name]
        elif not name.startswith(family.ignored):
            raise CheckpointError(
                file.path,
                found=f"the tensor {quoted(name)}",
                expected=f"the tensors of a text encoder of architecture {file.metadata['general.architecture']}",
                todo="The file is of a variant that is not known here: take another file of the model, or its "
                "safetensors version with ComfyUI's Load CLIP node.",
            )
    _check_complete(file, keys, _required(family, range(_block_count(file, blocks))))
    return keys


def _block_of(name: str, family: _Family) -> tuple[int | None, str]:
    """The block number and the rest of a name: `blk.7.attn_q.weight` is 7, `attn_q.weight`."""
    match = re.fullmatch(rf"{re.escape(family.block_prefix)}(0|[1-9][0-9]{{0,3}})\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _block_count(file: CheckpointFile, blocks: set[int]) -> int:
    announced = file.metadata.get(f"{file.metadata['general.architecture']}.block_count")
    return max([*blocks, 0]) + 1 if type(announced) is not int else min(max(announced, 1), 10_000)


def _required(family: _Family, blocks: Iterable[int]) -> Iterable[str]:
    yield from (name for name in family.top if name not in family.optional)
    for number in blocks:
        yield from (f"{family.block_prefix}{number}.{leaf}" for leaf in family.block if leaf not in family.optional)


def _check_complete(file: CheckpointFile, keys: dict[str, str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in keys]
    if missing:
        raise CheckpointError(
            file.path,
            found=f"that {counted(len(missing), 'tensor')} of the text encoder are missing, such as {missing[0]}",
            expected="every weight of the text encoder",
            todo=f"The file is incomplete: {TAKE_ANOTHER}",
        )


def _check_t5(file: CheckpointFile, keys: dict[str, str]) -> None:
    """Refuse UMT5, and name the feed-forward of T5 1.0, which has no gate, as the host does."""
    if "enc.blk.1.attn_rel_b.weight" in keys:
        raise CheckpointError(
            file.path,
            found="a UMT5, which has position biases in every block",
            expected="a T5",
            todo="ComfyUI takes UMT5's tokenizer from a safetensors file, and GGUF files hold it in another form: use "
            "the safetensors version with ComfyUI's Load CLIP node.",
        )
    _check_complete(file, keys, ["enc.blk.0.attn_rel_b.weight"])
    gates = sum(name.endswith(".ffn_gate.weight") for name in keys)
    ups = [name for name in keys if name.endswith(".ffn_up.weight")]
    if gates == 0:
        for name in ups:
            keys[name] = keys[name].replace(".wi_1.", ".wi.")
    elif gates < len(ups):
        _check_complete(file, keys, [name.replace("ffn_up", "ffn_gate") for name in ups])


def _restore_order(file: CheckpointFile, architecture: str, weights: Weights) -> None:
    heads = file.metadata.get(f"{architecture}.attention.head_count")
    kv_heads = file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    for key, weight in weights.items():
        for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if key.endswith(f".self_attn.{name}.weight"):
                weights[key] = _restored(file, key, weight, count)


def _restored(
    file: CheckpointFile, key: str, weight: torch.Tensor | GgmlWeight, heads: object
) -> torch.Tensor | GgmlWeight:
    """A weight [N, K] with the rows of each head back in two halves, as a copy."""
    rows = weight.data if isinstance(weight, GgmlWeight) else weight
    if type(heads) is not int or heads < 1 or rows.dim() != 2 or rows.shape[0] % (2 * heads):
        raise CheckpointError(
            file.path,
            found=f"{quoted(heads)} attention heads for the weight {key} of shape {list(weight.shape)}",
            expected="a number of heads that divides its rows",
            todo=f"The file is damaged: {TAKE_ANOTHER}",
        )
    rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return dataclasses.replace(weight, data=rows) if isinstance(weight, GgmlWeight) else rows
