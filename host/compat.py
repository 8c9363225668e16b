"""What this pack needs of the host, said in one sentence when it is missing, and the one host bug that has to be
mended."""

from __future__ import annotations

import functools
import importlib

import torch

OLDEST_HOST = "0.30.0"

# Attributes this pack is built on, with the module each must come from.
_NEEDED = {
    "comfy.quant_ops": ("QuantizedTensor", "QUANT_ALGOS", "register_layout_class"),
    "comfy.ops": ("mixed_precision_ops", "cast_bias_weight", "uncast_bias_weight"),
    "comfy.weight_adapter.lora": ("LoRAAdapter",),
    "comfy.ldm.ideogram4.model": ("Ideogram4TransformerBlock",),
    "comfy.ldm.lumina.model": ("FeedForward",),
    "comfy.text_encoders.qwen3vl": ("QWEN3VL_VISION",),
    "comfy.sd": ("CLIPType", "TEModel", "detect_te_model"),
    "comfy.model_prefetch": ("prefetch_queue_pop",),
    "comfy_api.torch_helpers.torch_compile": ("COMPILE_KEY",),
    "comfy_api.latest": ("ComfyExtension", "io", "ui"),
}


@functools.cache
def check_host() -> None:
    """Raise RuntimeError, with the versions, when the host is too old for this pack."""
    missing = []
    for module_name, names in _NEEDED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            missing.append(f"{module_name} ({error})")
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"Lowbit needs ComfyUI {OLDEST_HOST} or newer; this is {_host_version()}, which lacks "
            f"{', '.join(missing)}. Update ComfyUI, and its requirements."
        )


def _host_version() -> str:
    try:
        return f"ComfyUI {importlib.import_module('comfyui_version').__version__}"
    except ImportError:
        return "a ComfyUI that does not say its version"


@functools.cache
def allow_saving_offloaded_integers() -> None:
    """Let the host save integer weights of offloaded modules.

    Its placeholder for a tensor that is fetched while a file is written is an `nn.Parameter` that asks for gradients,
    which torch refuses for integers (seen in ComfyUI 0.30 to 0.39; a host that has it mended is left alone).
    """
    from comfy.model_patcher import LazyCastingParamPiece

    try:
        LazyCastingParamPiece(None, "", torch.zeros(1, dtype=torch.int8))
    except RuntimeError:
        LazyCastingParamPiece.__new__ = lambda cls, caster, state_dict_key, tensor: torch.nn.Parameter.__new__(
            cls, tensor, requires_grad=tensor.dtype.is_floating_point
        )
