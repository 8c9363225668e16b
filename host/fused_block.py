"""Ideogram 4's transformer blocks with quantizers fused into what stands before their linear layers.

A block reads and writes every token a dozen times between its products: norms, modulation, gates, residuals, SwiGLU and
the quantizers themselves. Here RMSNorm and modulation leave codes instead of floats (`w1` and `w3` read the same ones),
SwiGLU leaves codes for `w2`, and the end of the attention branch runs into the start of the feed-forward branch.

Nothing of the host is rewritten: the loader puts object patches on the blocks' `forward` and on SwiGLU's function, and
the host's own attention and feed-forward code runs between them, handing `QuantizedActivations` to a linear layer in
place of a tensor. Where a LoRA beside a layer reads floats, the same kernels leave them too. Wherever somebody else
changed a module (a hook, another patch), the host's own code runs instead.
"""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import inspect
import textwrap
import weakref
from collections.abc import Callable

import comfy.ldm.ideogram4.model as host_model
import comfy.ldm.lumina.model as host_feed_forward
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ..kernels.gated_residual import gated_residual
from ..kernels.gated_residual_norm_quantize import gated_residual_norm_quantize
from ..kernels.rms_norm_scale_quantize import rms_norm_scale_quantize
from ..kernels.swiglu_quantize import swiglu_quantize
from .activations import QuantizedActivations, changed, differentiated
from .ops import LowbitLinear


def _host_functions() -> tuple[Callable | None, ...]:
    block, feed_forward = host_model.Ideogram4TransformerBlock, host_feed_forward.FeedForward
    return block.forward, feed_forward.forward, getattr(feed_forward, "_forward_silu_gating", None)


# The host's functions that are replaced, as they are known to compute what is computed here (ComfyUI 0.30 to 0.39);
# None where a host has no such function.
REPLACED = _host_functions()
ATTENTION = host_model.Ideogram4Attention.forward
_KEY = "lowbit_fused_block"
FORWARD, GATING = "forward", "feed_forward._forward_silu_gating"  # of a block
_watched: weakref.WeakSet = weakref.WeakSet()  # models whose modules are let go with them
KNOWN_FINGERPRINT = "d4a7aca6eef982b3"


def fuse_blocks(patcher: ModelPatcher) -> None:
    """Put object patches on the blocks of the patcher's model that can be fused."""
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, _KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _follow)
    for name, block in _blocks(patcher):
        if unfusable(block) is None:
            for attribute, function in replacements(block).items():
                patcher.add_object_patch(f"{name}.{attribute}", function)
    if patcher.model not in _watched:
        _watched.add(patcher.model)
        weakref.finalize(patcher.model, _let_go, list(patcher.model.diffusion_model.modules())).atexit = False


def _let_go(modules: list[torch.nn.Module]) -> None:
    """Free the modules of a model that is gone. A patched module refers to itself, as does one whose patch the host has
    taken back (ours, or a bypass LoRA's): until Python looks for cycles, such a model's file would stay open and its
    weights in memory."""
    for module in modules:
        for function_name in (FORWARD, GATING.rpartition(".")[2]):
            module.__dict__.pop(function_name, None)


def _follow(source: ModelPatcher, clone: ModelPatcher) -> None:
    """A clone with modules of its own, as the host makes for hooks and for further GPUs, must not run the source's."""
    ours = [key for key, patch in clone.object_patches.items() if isinstance(patch, (_FusedBlock, _FusedGating))]
    if clone.model is not source.model and ours:
        for key in ours:
            del clone.object_patches[key]
        fuse_blocks(clone)


def replacements(block: torch.nn.Module) -> dict[str, Callable]:
    """What stands in for the host's functions of one block, by dotted attribute name."""
    return {
        FORWARD: _FusedBlock(block),
        GATING: _FusedGating(block.feed_forward),
    }


def report(patcher: ModelPatcher) -> list[str]:
    """How many of the model's blocks are fused and why the others are not, as lines for people."""
    blocks = _blocks(patcher)
    reasons: collections.Counter = collections.Counter()
    for name, block in blocks:
        patch = patcher.object_patches.get(f"{name}.forward")
        if patch is not None and not isinstance(patch, _FusedBlock):
            reasons["another pack has patched the block"] += 1
        else:
            reasons[unfusable(block) or in_the_way(block)] += 1
    fused = reasons.pop(None, 0)
    lines = [f"Fused blocks: {fused} of {len(blocks)}"] if blocks else []
    return lines + [f"  {count} not fused: {reason}" for reason, count in reasons.items()]


def unfusable(block: torch.nn.Module) -> str | None:
    """The reason why a block can never run fused as it was loaded, or None."""
    if fingerprint() != KNOWN_FINGERPRINT or not attention_hands_on():
        return "this ComfyUI's block is not one that this version of Lowbit knows"
    linears = (
        block.attention.qkv,
        block.attention.o,
        *(getattr(block.feed_forward, name) for name in ("w1", "w2", "w3")),
    )
    if not all(isinstance(linear, LowbitLinear) for linear in linears):
        return "its layers were not loaded by Lowbit"
    if not any(linear.mode == "int8" for linear in linears):
        return "none of its layers computes in int8"
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    if len({norm.eps for norm in norms}) > 1:
        return "its norms have different eps"
    return None


def in_the_way(block: torch.nn.Module) -> str | None:
    """What somebody else has put on the block or on a module in it since, so that the host's code has to run."""
    for name, module in block.named_modules():
        if name and (reason := changed(module)):
            return reason
    if block._forward_hooks or block._forward_pre_hooks:
        return "the block has a forward hook"
    return None if classes_are_known() else "another pack has patched the block's class"


def classes_are_known() -> bool:
    """Whether the host's functions are still those that were there when this module was imported."""
    return REPLACED == _host_functions() and host_model.Ideogram4Attention.forward is ATTENTION


@functools.cache
def attention_hands_on() -> bool:
    """Whether the host's attention, which is handed codes in place of x, needs no more of x than its shape and what
    `qkv` makes of it. The rest of it may be any version's: nothing of it is replaced."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(ATTENTION))).body[0]
    except (OSError, TypeError):  # compiled, or something that another pack has put there
        return False
    name = tree.args.args[1].arg
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    shapes = [node for node in ast.walk(tree) if ast.unparse(node) == f"{name}.shape"]
    products = [node for node in ast.walk(tree) if ast.unparse(node) == f"self.qkv({name})"]
    return len(products) == 1 and len(uses) == len(shapes) + len(products)


@functools.cache
def fingerprint() -> str:
    """A hash of the host's replaced functions that comments and formatting leave alone; empty without their source."""
    try:
        sources = [textwrap.dedent(inspect.getsource(function)) for function in REPLACED]
    except (OSError, TypeError):  # compiled, or something that another pack has put there
        return ""
    return hashlib.sha256("".join(ast.unparse(ast.parse(source)) for source in sources).encode()).hexdigest()[:16]


def _blocks(patcher: ModelPatcher) -> list[tuple[str, torch.nn.Module]]:
    model = patcher.model.diffusion_model
    if not isinstance(model, host_model.Ideogram4Transformer):
        return []
    return [(f"diffusion_model.layers.{index}", block) for index, block in enumerate(model.layers)]


class _FusedBlock:
    """The `forward` of one block."""

    def __init__(self, block: torch.nn.Module):
        self.block = block

    def __call__(self, x, attn_mask, freqs_cis, adaln_input, transformer_options={}):  # noqa: B006, the host's own
        block = self.block
        # The kernels take one modulation a picture; a caller may give one for all, or one a token.
        same_batch = adaln_input.shape[:-1] == (x.shape[0], 1)
        if differentiated(x) or not same_batch or in_the_way(block) is not None:
            return type(block).forward(
                block, x, attn_mask, freqs_cis, adaln_input, transformer_options=transformer_options
            )
        scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaln_modulation(adaln_input).chunk(4, dim=-1)
        gate_msa, gate_mlp = torch.tanh(gate_msa), torch.tanh(gate_mlp)
        scale_msa, scale_mlp = 1.0 + scale_msa, 1.0 + scale_mlp
        y = _norm_scale(block.attention_norm1, x, scale_msa, (block.attention.qkv,))
        y = block.attention(y, attn_mask, freqs_cis, transformer_options=transformer_options)
        feed_forward = block.feed_forward
        x, y = _residual_norm_scale(
            x, y, block.attention_norm2, gate_msa, block.ffn_norm1, scale_mlp, (feed_forward.w1, feed_forward.w3)
        )
        return _residual(x, feed_forward(y), block.ffn_norm2, gate_mlp)


class _FusedGating:
    """SwiGLU of one feed-forward module."""

    def __init__(self, feed_forward: torch.nn.Module):
        self.feed_forward = feed_forward

    def __call__(self, gate, up):
        quantizer = None if changed(self.feed_forward) else self.feed_forward.w2.quantizer(gate)
        if quantizer is None:
            return type(self.feed_forward)._forward_silu_gating(self.feed_forward, gate, up)
        xq, x_scale, *values = swiglu_quantize(gate, up, *quantizer, self.feed_forward.w2.reads_values)
        return QuantizedActivations(gate.dtype, [(quantizer, xq, x_scale)], *values)


def _norm_scale(norm, x, scale, linears: tuple[LowbitLinear, ...]):
    """norm(x) * scale, as what these linears read."""
    quantizers = [linear.quantizer(x) for linear in linears]
    if None in quantizers:
        return norm(x) * scale
    weight, uncast = _weight(norm, x)
    activations = QuantizedActivations(x.dtype, [])
    for quantizer in quantizers:
        if activations.codes_for(quantizer) is None:
            keep_values = activations.values is None and _reads_values(linears)
            codes = rms_norm_scale_quantize(x, weight, scale, norm.eps, *quantizer, keep_values)
            if keep_values:
                *codes, activations.values = codes
            activations.parts.append((quantizer, *codes))
    uncast()
    return activations


def _residual(x, y, norm, gate):
    """x + gate * norm(y)."""
    weight, uncast = _weight(norm, x)
    x = gated_residual(x, y, weight, gate, norm.eps)
    uncast()
    return x


def _residual_norm_scale(x, y, y_norm, gate, norm, scale, linears: tuple[LowbitLinear, ...]):
    """x + gate * y_norm(y), and norm of that * scale as what these linears read."""
    first, *others = [linear.quantizer(x) for linear in linears]
    if first is None or not all(first.same_as(other) for other in others):
        x = _residual(x, y, y_norm, gate)
        return x, _norm_scale(norm, x, scale, linears)
    y_weight, uncast_y = _weight(y_norm, x)
    weight, uncast = _weight(norm, x)
    x, xq, x_scale, *values = gated_residual_norm_quantize(
        x, y, y_weight, gate, weight, scale, norm.eps, *first, _reads_values(linears)
    )
    uncast_y()
    uncast()
    return x, QuantizedActivations(x.dtype, [(first, xq, x_scale)], *values)


def _reads_values(linears: tuple[LowbitLinear, ...]) -> bool:
    return any(linear.reads_values for linear in linears)


def _weight(norm, x: torch.Tensor):
    """A norm's weight on x's device in x's dtype, and what to call when it is no longer needed."""
    weight = norm.weight
    if weight.device == x.device and weight.dtype == x.dtype and not (norm.weight_function or hasattr(norm, "_v")):
        return weight, _nothing  # as nearly always: dynamic VRAM leaves small weights on the device
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    return weight, functools.partial(comfy.ops.uncast_bias_weight, norm, weight, bias, stream)


def _nothing() -> None:
    pass
