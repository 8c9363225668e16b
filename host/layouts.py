"""Quantized weights as the host's `QuantizedTensor`s: the bytes stay the file's, the shape is the logical [N, K].

So model detection, offload, dynamic VRAM, merging and saving work through the host's own paths. One layout a kind of
weight; the compute mode is no part of the tensor, it lives on the operations class of the load.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..formats import Fp8Weight, GgmlWeight, Int8Weight, QuantizedWeight, UnknownQuantizationError, ggml, int8

_REMEMBERED = "_lowbit_weight"  # of a host's tensor: what `from_host` found, and for which data and params

INT8_FORMAT = "int8_tensorwise"  # the host's own name: stock ComfyUI reads what we save
INT8_SMOOTH_FORMAT = "lowbit_int8_smooth"  # no host format holds smoothing factors, and dropping them would be silent


@dataclasses.dataclass(frozen=True)
class _Params(BaseLayoutParams):
    """Layout parameters whose tensor fields may be None."""

    OPTIONAL_TENSORS = ("scale",)

    def _tensor_fields(self) -> list[str]:
        return [name for name in self.OPTIONAL_TENSORS if getattr(self, name) is not None]


class _LowbitLayout(QuantizedLayout):
    """What the layouts share: each says how its params and a `QuantizedWeight` become each other."""

    @classmethod
    def weight(cls, qdata: torch.Tensor, params) -> QuantizedWeight:
        raise NotImplementedError

    @classmethod
    def params(cls, weight: QuantizedWeight, dtype: torch.dtype):
        raise NotImplementedError

    @classmethod
    def quantized_like(cls, values: torch.Tensor, params) -> QuantizedWeight:
        raise NotImplementedError

    @classmethod
    def quantize(cls, tensor, like=None, scale=None, stochastic_rounding=0, inplace_ops=False):
        """Quantize float values [N, K] the way the weight with params `like` is.

        The host's other arguments are accepted for its calling convention: scales are always found anew, and rounding
        is to nearest, so that the same merge gives the same bytes.
        """
        if like is None:
            raise ValueError(f"{cls.__name__} quantizes only like an existing weight: use requantize_from_float")
        weight = cls.quantized_like(tensor, like)
        return weight.data, cls.params(weight, tensor.dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor):
        return {"like": qtensor._params}

    @classmethod
    def dequantize(cls, qdata, params):
        return cls.weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return tuple(cls.weight(qtensor._qdata, qtensor._params).tensors().values())

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        fields = {name: getattr(params, name) for name in params._tensor_fields()}
        return {"": qdata, **{f"_{name}": tensor for name, tensor in fields.items()}}


class LowbitInt8Layout(_LowbitLayout):
    """`formats.Int8Weight`. The rotation has the host's field names: its writer marks a saved file by them."""

    @dataclasses.dataclass(frozen=True)
    class Params(_Params):
        OPTIONAL_TENSORS = ("scale", "smooth")
        smooth: torch.Tensor | None = None
        convrot: bool = False
        convrot_groupsize: int = 256
        prefers_exact: bool = False

    @classmethod
    def weight(cls, qdata, params):
        rotation_group = params.convrot_groupsize if params.convrot else 0
        shape = tuple(params.orig_shape)
        return Int8Weight(qdata, shape, params.scale, params.smooth, rotation_group, params.prefers_exact)

    @classmethod
    def params(cls, weight, dtype):
        rotation = {"convrot": True, "convrot_groupsize": weight.rotation_group} if weight.rotation_group else {}
        others = {"smooth": weight.smooth, "prefers_exact": weight.prefers_exact}
        return cls.Params(weight.scale, dtype, tuple(weight.shape), **others, **rotation)

    @classmethod
    def quantized_like(cls, values, params):
        rotation_group = params.convrot_groupsize if params.convrot else 0
        # The host merges on the GPU while the weight it is like may lie on the CPU.
        smooth = None if params.smooth is None else params.smooth.to(values.device)
        weight = int8.quantize_weight(values, params.scale.numel() > 1, smooth, rotation_group)
        return dataclasses.replace(weight, prefers_exact=params.prefers_exact)


class LowbitGgufLayout(_LowbitLayout):
    """`formats.GgmlWeight`: GGML blocks of any type."""

    @dataclasses.dataclass(frozen=True)
    class Params(_Params):
        ggml_type: str = ""

    @classmethod
    def weight(cls, qdata, params):
        return GgmlWeight(qdata, tuple(params.orig_shape), params.ggml_type)

    @classmethod
    def params(cls, weight, dtype):
        return cls.Params(None, dtype, tuple(weight.shape), ggml_type=weight.ggml_type)

    @classmethod
    def quantized_like(cls, values, params):
        return GgmlWeight(ggml.quantize(values, params.ggml_type), tuple(values.shape), params.ggml_type)


class LowbitFp8Layout(_LowbitLayout):
    """`formats.Fp8Weight`: carried from a file into a module, which quantizes or unpacks it."""

    class Params(_Params):
        pass

    @classmethod
    def weight(cls, qdata, params):
        return Fp8Weight(qdata, tuple(params.orig_shape), params.scale)

    @classmethod
    def params(cls, weight, dtype):
        return cls.Params(weight.scale, dtype, tuple(weight.shape))

    @classmethod
    def quantized_like(cls, values, params):
        raise UnknownQuantizationError("FP8 weights are a source to quantize from, Lowbit does not write them")


LAYOUTS = {Int8Weight: LowbitInt8Layout, GgmlWeight: LowbitGgufLayout, Fp8Weight: LowbitFp8Layout}


@functools.cache
def register() -> None:
    """Make the layouts and the format names of saved files known to the host. Calling it again changes nothing."""
    for layout in LAYOUTS.values():
        register_layout_class(layout.__name__, layout)
    int8_algo = {"storage_t": torch.int8, "parameters": {"weight_scale", "weight_smooth"}, "quantize_input": False}
    QUANT_ALGOS[INT8_SMOOTH_FORMAT] = {**int8_algo, "comfy_tensor_layout": LowbitInt8Layout.__name__}
    gguf_algo = {"storage_t": torch.uint8, "parameters": set(), "quantize_input": False}
    for ggml_type in ggml.TYPES.values():
        if ggml_type.plain_dtype is None:
            name = ggml_type.format_name
            QUANT_ALGOS[name] = {**gguf_algo, "comfy_tensor_layout": LowbitGgufLayout.__name__}


class LoadingTensor(QuantizedTensor):
    """A quantized weight in a state dict. Modules of ours take it as it is; what copies it into a float parameter, as
    torch does where a module is not of the load's operations class, gets its values."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], QuantizedTensor):
            return args[0].copy_(args[1].dequantize(), *args[2:], **(kwargs or {}))
        if func is torch.ops.aten.detach.default:  # what becomes a parameter has to keep its class
            return cls(args[0]._qdata, args[0]._layout_cls, args[0]._params)
        return super().__torch_dispatch__(func, types, args, kwargs)


def to_host(
    weight: QuantizedWeight, dtype: torch.dtype, tensor_class: type[QuantizedTensor] = QuantizedTensor
) -> QuantizedTensor:
    """A quantized weight as the host's tensor of logical dtype `dtype`, on the same bytes."""
    register()
    layout = LAYOUTS[type(weight)]
    return tensor_class(weight.data, layout.__name__, layout.params(weight, dtype))


def unpack_in_other_modules(model: torch.nn.Module, ours: tuple[type, ...]) -> None:
    """Unpack parameters that a load has put as they were into modules not of the classes `ours`: such a module would
    not know what to do with them, and the host would save them as if they were floats."""
    for module in model.modules():
        if isinstance(module, ours):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QuantizedTensor):
                setattr(module, name, torch.nn.Parameter(parameter.dequantize(), requires_grad=False))


def from_host(tensor: torch.Tensor) -> QuantizedWeight | None:
    """The quantized weight behind a tensor of ours, on the same bytes; None for any other tensor.

    Remembered on the tensor: layers ask several times in every call, where Python may take longer than the device.
    """
    if not isinstance(tensor, QuantizedTensor):
        return None
    data, params = tensor._qdata, tensor._params
    found = getattr(tensor, _REMEMBERED, None)
    if found is None or found[0] is not data or found[1] is not params:  # the host replaces what a tensor consists of
        ours = issubclass(tensor.layout_cls, _LowbitLayout)
        found = data, params, tensor.layout_cls.weight(data, params) if ours else None
        if not torch.compiler.is_compiling():
            setattr(tensor, _REMEMBERED, found)
    return found[2]


def as_parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    """A moved weight as a parameter.

    Torch lets a quantized tensor made outside inference mode become no parameter inside it. The host loads inside and
    unloads on either side: here the tensor is always made inside, on whatever bytes it has.
    """
    quantized = from_host(weight)
    with torch.inference_mode():
        if quantized is not None:
            weight = to_host(quantized, weight.dtype)
        return torch.nn.Parameter(weight, requires_grad=False)


def saved_format(weight: QuantizedWeight) -> str:
    """The `format` that a saved file's `comfy_quant` marker carries."""
    if isinstance(weight, Int8Weight):
        return INT8_FORMAT if weight.smooth is None else INT8_SMOOTH_FORMAT
    return weight.format_name


def can_requantize(weight: QuantizedWeight) -> bool:
    """Whether float values can be put back into this weight's format."""
    return isinstance(weight, Int8Weight) or (
        isinstance(weight, GgmlWeight) and ggml.TYPES[weight.ggml_type].can_quantize
    )
