"""An embedding whose table may be GGML blocks, for the operations class of a load."""

from __future__ import annotations

import comfy.ops
import torch

from ..formats import GgmlWeight
from ..kernels.unpack import unpack
from . import layouts

# Embeddings of fewer rows than any tokenizer's vocabulary are small: image indicators, position biases.
SMALLEST_VOCABULARY = 16_384


class LowbitEmbedding:
    """An embedding reads rows, not products: a vocabulary of GGML blocks stays in them, and a lookup unpacks its rows.

    A vocabulary of floats stays on the file's mapping, in the file's dtype. Any other table is small or of another
    format and is unpacked at load.
    """

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        key = f"{prefix}weight"
        quantized = layouts.from_host(state_dict.get(key))
        if quantized is not None and not (isinstance(quantized, GgmlWeight) and self._is_vocabulary()):
            state_dict[key] = quantized.dequantize(self.weight.dtype)
            quantized = None
        weight = state_dict.pop(key) if key in state_dict and self._is_vocabulary() else None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if weight is None:
            return
        if key in missing_keys:
            missing_keys.remove(key)
        if tuple(weight.shape) != tuple(self.weight.shape):
            errors.append(f"size mismatch for {key}: {list(weight.shape)} in the file, {list(self.weight.shape)} here.")
        elif quantized is not None:
            self.weight = torch.nn.Parameter(layouts.to_host(quantized, self.weight.dtype), requires_grad=False)
            self.layout_type, self.quant_format = self.weight._layout_cls, layouts.saved_format(quantized)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.weight_comfy_model_dtype = weight.dtype  # what dynamic VRAM casts a float table to

    def _is_vocabulary(self) -> bool:
        return self.num_embeddings >= SMALLEST_VOCABULARY

    def forward_comfy_cast_weights(self, input, out_dtype=None):
        if layouts.from_host(self.weight) is None:
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        dtype = self.weight.dtype
        weight, _, offload_stream = comfy.ops.cast_bias_weight(
            self, dtype=dtype, device=input.device, bias_dtype=dtype, offloadable=True
        )
        table = layouts.from_host(weight)
        if table is None:  # the host has unpacked it for a patch
            values = torch.nn.functional.embedding(input, weight)
        else:
            blocks = table.data.index_select(0, input.reshape(-1))
            values = unpack(blocks, table.ggml_type, out_dtype or dtype).unflatten(0, input.shape)
        comfy.ops.uncast_bias_weight(self, weight, None, offload_stream)
        return values.to(out_dtype or dtype)

    def _apply(self, fn, recurse=True):
        """Moving to a device: torch would write the moved table into `data`, see `LowbitLinear.set_weight`."""
        if layouts.from_host(self.weight) is None:
            return super()._apply(fn, recurse)
        self.weight = layouts.as_parameter(fn(self.weight))
        return self
