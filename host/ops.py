"""The operations class of one load: the host builds the model from these modules.

A class made fresh for each load holds that load's settings; nothing is written on shared classes, so two loader nodes
with different settings never disturb each other.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable

import comfy.model_management
import comfy.model_prefetch
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch.utils.hooks import RemovableHandle

from ..formats import Fp8Weight, GgmlWeight, Int8Weight, QuantizedWeight, int8
from ..kernels import kept_memory, quantized_linear
from ..kernels.int8_linear import int8_linear
from ..kernels.kept_memory import KeptMemory
from ..kernels.unpack_to_int8 import find_row_scale
from . import layouts
from .activations import QuantizedActivations, Quantizer, changed, differentiated
from .embedding import LowbitEmbedding
from .lora import SidePath
from .norm import LowbitNorm

# A newer host puts an activation before or behind the product in `forward`, and the product in this.
_FORWARD_LINEAR = hasattr(comfy.ops.mixed_precision_ops().Linear, "_forward_linear")
kept_memory.outside_recording = getattr(comfy.model_prefetch, "pause_malloc_graph", kept_memory.outside_recording)


@dataclasses.dataclass
class LoadSettings:
    """What one load decided, and what it found out.

    file_name: for messages. compute_mode: `auto`, `int8` or `exact`. tune: whether kernels may measure their
    configurations at first use. quantize_layer: whether a float linear weight of this module name and shape [N, K] is
    quantized to INT8 at load. before_quantizing: called before each of them; it may raise to cancel the load.
    missing_keys: filled by the load, what the file did not supply. has_fused_kernels: whether the device that runs
    models has them, for `auto`; found out here, because a compiler cannot trace it. kept, kept_patches: device memory
    of what the layers find out at their first use, and of LoRA matrices, which go before the model does.
    """

    file_name: str
    compute_mode: str
    tune: bool = True
    quantize_layer: Callable[[str, int, int], bool] = lambda name, N, K: False
    before_quantizing: Callable[[], None] = lambda: None
    missing_keys: list[str] = dataclasses.field(default_factory=list)
    has_fused_kernels: bool = dataclasses.field(init=False, default=False)
    kept: KeptMemory = dataclasses.field(default_factory=KeptMemory)
    kept_patches: KeptMemory = dataclasses.field(default_factory=KeptMemory)

    def __post_init__(self) -> None:
        if self.compute_mode == "auto":
            device = comfy.model_management.get_torch_device()
            self.has_fused_kernels = quantized_linear.has_fused_kernels(device)

    def mode_of(self, weight: QuantizedWeight) -> str:
        """`int8` or `exact`: what `auto` means for this weight, as `quantized_linear.fastest_mode` has it."""
        if self.compute_mode != "auto":
            return self.compute_mode
        return "int8" if self.has_fused_kernels and quantized_linear.is_coarse(weight) else "exact"


def make_operations(settings: LoadSettings) -> type:
    """A fresh operations class for one load, to be passed to the host as `custom_operations`."""
    layouts.register()
    host_operations = comfy.ops.mixed_precision_ops()

    class LowbitOperations(host_operations):
        class Linear(LowbitLinear, host_operations.Linear):
            lowbit_settings = settings

        class Embedding(LowbitEmbedding, host_operations.Embedding):
            pass

        class RMSNorm(LowbitNorm, host_operations.RMSNorm):
            pass

        class LayerNorm(LowbitNorm, host_operations.LayerNorm):
            pass

    return LowbitOperations


def _saved(name: str) -> property:
    """What a saved file holds of a layer beside its weight, for the host's model merging: it reads every key of the
    state dict as an attribute of its module."""

    def read(self: LowbitLinear) -> torch.Tensor:
        saved = self.state_dict()
        if name not in saved:
            raise AttributeError(name)  # torch's module then says that it has no such attribute
        return saved[name]

    return property(read)


class LowbitLinear:
    """A linear layer whose weight may be quantized: mixed into the host's mixed-precision Linear.

    model_patches, hook_patches: the side paths of LoRA nodes and of hooks, at most one each. observers: see
    `observe_input`.
    """

    lowbit_settings: LoadSettings
    comfy_quant, weight_scale, weight_smooth = map(_saved, ("comfy_quant", "weight_scale", "weight_smooth"))

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        if dtype is not None:
            # The host's class allocates in one dtype for all layers, stock models in the dtype that a layer asks for.
            self.factory_kwargs["dtype"] = dtype
            if self.bias is not None:
                self.bias = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        # What dynamic VRAM casts a float weight to when it moves it.
        self.weight_comfy_model_dtype = self.factory_kwargs["dtype"]
        self.model_patches: list[SidePath] = []
        self.hook_patches: list[SidePath] = []
        self.observers: dict[int, Callable[[torch.Tensor], None]] = collections.OrderedDict()
        self._row_scale: torch.Tensor | None = None
        self._smooth: torch.Tensor | None = None
        self.register_load_state_dict_post_hook(_keep_missing_keys)

    # Loading

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            self._set_loaded_weight(weight, prefix[:-1])
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )
        if weight is not None and f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")
        elif weight is None:
            self.weight = None
            if f"{prefix}weight" not in missing_keys:
                missing_keys.append(f"{prefix}weight")

    def _set_loaded_weight(self, weight: torch.Tensor, name: str) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{self.lowbit_settings.file_name}: the weight of {name} has shape {tuple(weight.shape)}, the model "
                f"expects {expected}. The file belongs to another model or a newer version of it."
            )
        dtype = self.factory_kwargs["dtype"]
        quantized = layouts.from_host(weight)
        if quantized is None or isinstance(quantized, Fp8Weight):
            if self.lowbit_settings.quantize_layer(name, *expected):
                self.lowbit_settings.before_quantizing()
                quantized = self._quantized_on_the_fly(weight, name)
            else:
                # A float weight stays in the file's dtype, on the file's mapping: the host casts it where it is used.
                self.weight = torch.nn.Parameter(weight if quantized is None else quantized.dequantize(dtype), False)
                return
        self._set_quantized_weight(layouts.to_host(quantized, dtype))

    def _quantized_on_the_fly(self, weight: torch.Tensor, name: str) -> QuantizedWeight:
        try:
            return quantize_on_the_fly(weight)
        except ValueError as error:
            raise ValueError(
                f"{self.lowbit_settings.file_name}: the weight of {name} cannot be quantized: {error}. The file is "
                "damaged: download it again, or pick another one."
            ) from error

    def _set_quantized_weight(self, weight: QuantizedTensor) -> None:
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantized = layouts.from_host(weight)
        self.layout_type = weight._layout_cls
        self.quant_format = layouts.saved_format(quantized)
        self._full_precision_mm_config = isinstance(quantized, Int8Weight) and quantized.prefers_exact  # to be saved

    # Computing

    def forward(self, input, *args, **kwargs):
        if args or kwargs:
            return super().forward(input, *args, **kwargs)
        return self._forward_linear(input)

    def _forward_linear(self, input):
        has_codes = isinstance(input, QuantizedActivations)
        values = input.values if has_codes else input
        for observer in self.observers.values():
            observer(values)
        if layouts.from_host(self.weight) is None:
            return super()._forward_linear(input) if _FORWARD_LINEAR else super().forward(input)
        comfy.ops.run_every_op()
        weight, bias, offload_stream = comfy.ops.cast_bias_weight(
            self,
            dtype=self.weight.dtype,
            device=input.device,
            bias_dtype=input.dtype,
            offloadable=True,
            compute_dtype=input.dtype,
            want_requant=True,
        )
        side_paths = (*self.model_patches, *self.hook_patches)
        low_rank, *others = [side_path.hidden_and_up(values) for side_path in side_paths] or [None]
        if has_codes:
            y = self._linear_of_codes(input, layouts.from_host(weight), bias, low_rank)
        else:
            y = self._linear(input, weight, bias, low_rank)
        for term in others:
            quantized_linear.add_low_rank(y, term)
        for side_path in side_paths:
            side_path.add_kronecker(y, values)
        comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)
        return y

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low_rank: quantized_linear.LowRank | None,
    ) -> torch.Tensor:
        quantized = layouts.from_host(weight)
        if quantized is None:  # the host has unpacked it for a patch
            y = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
            return quantized_linear.add_low_rank(y, low_rank)
        mode = "exact" if differentiated(x) else self.mode
        tune = self.lowbit_settings.tune
        if isinstance(quantized, Int8Weight):
            return quantized_linear.int8_weight_linear(x, quantized, bias, mode, tune, low_rank)
        row_scale = self._row_scale_of(quantized) if quantized_linear.wants_int8(x, mode) else None
        return quantized_linear.ggml_weight_linear(x, quantized, bias, mode, row_scale, tune, low_rank)

    def _linear_of_codes(
        self,
        x: QuantizedActivations,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        low_rank: quantized_linear.LowRank | None,
    ) -> torch.Tensor:
        xq, x_scale = x.codes_for(self._quantizer(x.device))
        tune = self.lowbit_settings.tune
        if isinstance(weight, Int8Weight):
            return int8_linear(xq, x_scale, weight.data, weight.scale, bias, x.dtype, tune, low_rank)
        row_scale = self._row_scale_of(weight)
        return quantized_linear.ggml_weight_linear_of_codes(
            xq, x_scale, weight, bias, x.dtype, row_scale, tune, low_rank
        )

    @property
    def mode(self) -> str:
        """`int8` or `exact`: how the weight as it is loaded computes; `exact` for one that is not quantized."""
        weight = layouts.from_host(self.weight)
        return "exact" if weight is None else self.lowbit_settings.mode_of(weight)

    def quantizer(self, x: torch.Tensor) -> Quantizer | None:
        """How a fused kernel may quantize what this layer reads, or None where the layer has to see the floats x.

        Hooks do, and a `forward` that another pack has put here; a patched weight may no longer be quantized, and few
        tokens are not quantized.
        """
        if differentiated(x) or changed(self) is not None:
            return None
        if self.weight_function or self.weight_lowvram_function is not None:
            return None
        return self._quantizer(x.device) if quantized_linear.wants_int8(x, self.mode) else None

    @property
    def reads_values(self) -> bool:
        """Whether this layer also reads the floats that quantized activations stand for: a LoRA's side path does, and
        an observer."""
        return len(self.model_patches) + len(self.hook_patches) + len(self.observers) > 0  # torch.compile can trace it

    def observe_input(self, observer: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Have observer(x) called with the floats x [..., K] that each call reads, until the handle is removed.

        A forward hook would have the fused kernels step aside; for an observer they keep the floats beside the codes.
        """
        handle = RemovableHandle(self.observers)
        self.observers[handle.id] = observer
        return handle

    def _quantizer(self, device: torch.device) -> Quantizer:
        weight = layouts.from_host(self.weight)
        if not isinstance(weight, Int8Weight):
            return Quantizer(None, quantized_linear.row_rotation_group(weight))
        if weight.smooth is not None and (self._smooth is None or self._smooth.device != device):
            # The weight itself may lie elsewhere until it is used.
            self._smooth = self.lowbit_settings.kept.keep(weight.smooth.to(device))
        return Quantizer(self._smooth, weight.rotation_group)

    def _row_scale_of(self, weight: GgmlWeight) -> torch.Tensor | None:
        """The row scales of this module's own weight, found once; None for one that the host patched."""
        if self.weight_lowvram_function is not None:
            return None
        if self._row_scale is None or self._row_scale.device != weight.data.device:
            rotation_group = quantized_linear.row_rotation_group(weight)
            row_scale = find_row_scale(weight.data, weight.ggml_type, rotation_group)
            self._row_scale = self.lowbit_settings.kept.keep(row_scale)
        return self._row_scale

    def _apply(self, fn, recurse=True):
        """Moving to a device. The host's own would copy a weight that stays where it is when it unloads models outside
        inference mode, 20 GB of a mapped file, and leave a parameter that cannot be moved inside it."""
        weight = self.weight
        if layouts.from_host(weight) is None:
            return super()._apply(fn, recurse)
        moved = fn(weight)
        self._parameters["weight"] = None
        try:
            return super()._apply(fn, recurse)
        finally:
            self.weight = layouts.as_parameter(moved)

    def register_parameter(self, name, param):
        """However the weight is replaced or moved, it comes through here: what was found out about the old one ends."""
        if name == "weight":
            self._row_scale = self._smooth = None
        super().register_parameter(name, param)

    # What the host's patchers call

    weight_lowvram_function: Callable | None = None  # set on the instance by dynamic VRAM

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The float weight that the host merges patches into."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take a merged float weight back, in this weight's format where it has a quantizer, else as floats."""
        quantized = layouts.from_host(self.weight)
        if quantized is not None and layouts.can_requantize(quantized) and weight.shape == self.weight.shape:
            weight = self.weight.requantize_from_float(weight)
        if return_weight:  # to be saved: in the dtype that the file has been told
            return weight.to(self.weight.dtype)
        # A float weight may lie in a file's narrower dtype; merged, it is the model's own, as in a stock model.
        dtype = self.weight.dtype if quantized is not None else self.weight_comfy_model_dtype
        if inplace_update:
            # The host keeps the tensor it gives for the next time, and copies the weight of before into what is made
            # here: it must not be the same memory, nor round that weight.
            dtype = max(dtype, self.weight.dtype, key=lambda each: each.itemsize)
        weight = weight.to(dtype, copy=inplace_update)
        # Never in place: a weight may lie on the mapped file, which is read-only on Windows, and the `data` of a
        # quantized parameter has scales of its own, so that writing to it would change the bytes alone.
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        """The host's, which writes the rotation of its own format only."""
        saved = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        quantized = layouts.from_host(self.weight)
        if isinstance(quantized, Int8Weight) and self.quant_format != layouts.INT8_FORMAT and quantized.rotation_group:
            marker = {"format": self.quant_format, "convrot": True, "convrot_groupsize": quantized.rotation_group}
            if quantized.prefers_exact:
                marker["full_precision_matrix_mult"] = True
            saved[f"{prefix}comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        return saved


def quantize_on_the_fly(weight: torch.Tensor) -> QuantizedWeight:
    """A float or FP8 weight [N, K] as an INT8 weight with per-channel scales, found on the device that runs models."""
    quantized = layouts.from_host(weight)
    device = comfy.model_management.get_torch_device()
    if quantized is not None and device.type != "cuda":  # Apple's GPUs hold no FP8
        weight, quantized = quantized.dequantize(), None
    values = weight.to(device) if quantized is None else _moved(quantized, device).dequantize()
    return _moved(int8.quantize_weight(values), weight.device)


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return dataclasses.replace(weight, **{name: tensor.to(device) for name, tensor in weight.tensors().items()})


def _keep_missing_keys(module: LowbitLinear, incompatible_keys) -> None:
    # One list object runs through the whole load: what it holds at the end is what the file did not supply.
    module.lowbit_settings.missing_keys = incompatible_keys.missing_keys
