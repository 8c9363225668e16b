"""LoRA, merging and saving of quantized weights under the host's patchers.

The host would merge every patch into the weight and pack it again. Here low-rank patches go to the module as a side
path, and other small ones are applied to the unpacked weight where it is used; only a merge of whole models is packed
again. What the modules do follows from the patcher's patches alone, set anew after each load, in whatever order models
were loaded in part, unloaded or patched before.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import (
    LazyCastingParam,
    LazyCastingParamPiece,
    LazyCastingQuantizedParam,
    LowVramPatch,
    ModelPatcher,
    ModelPatcherDynamic,
)
from comfy.patcher_extension import CallbacksMP

from ..kernels import scratch
from ..loaders.file_state import FileState
from . import layouts
from .files import check_not_written_to
from .lora import SidePath, side_path, small_changes
from .ops import LowbitLinear

_FILES = "lowbit_files"


def adopt(patcher: ModelPatcher, files: tuple[FileState, ...]) -> ModelPatcher:
    """Make a patcher that the host built one of ours, clones and non-dynamic delegates included.

    files: what its weights lie on, as the files were before they were opened.
    """
    patcher.set_attachments(_FILES, files)
    _take_class(None, patcher)
    patcher.add_callback(CallbacksMP.ON_CLONE, _take_class)
    return patcher


def _take_class(_source, patcher: ModelPatcher) -> None:
    # The host chooses the class itself, when loading as when it clones a dynamic patcher for hooks.
    ours = {ModelPatcher: LowbitModelPatcher, ModelPatcherDynamic: LowbitModelPatcherDynamic}
    patcher.__class__ = ours.get(type(patcher), type(patcher))


class _Backup(NamedTuple):
    """What the host restores a weight from."""

    weight: torch.Tensor
    inplace_update: bool = False


class _HookPatch:
    """A hook's patches of one weight, applied to the unpacked weight where it is used, after the model's own patches
    if these would be beside it otherwise. side_paths: what was there for those."""

    def __init__(self, key: str, patches: list[list[tuple]], original: torch.Tensor, side_paths: list[SidePath]):
        self.key, self.patches, self.original_weights = key, patches, {key: [(original,)]}
        self.side_paths = side_paths

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        for patches in self.patches:
            weight = comfy.lora.calculate_weight(
                patches, weight, self.key, weight.dtype, original_weights=self.original_weights
            )
        return weight


class _KeepsQuantized:
    """What both of the host's patchers need: mixed into each."""

    def load(self, *args, **kwargs):
        self._check_files()
        super().load(*args, **kwargs)
        self._hand_over_patches()

    def pre_run(self):
        # What is loaded may be streamed from the file in every step.
        self._check_files()
        super().pre_run()

    def cleanup(self):
        super().cleanup()
        # Without an error of its own a sampling ends in one here, instead of in a broken image.
        if sys.exc_info()[0] is None:
            self._check_files()

    def _check_files(self) -> None:
        # A patcher that another pack made from our class, not as a clone, knows no files.
        check_not_written_to(self.get_attachment(_FILES) or ())

    def detach(self, unpatch_all=True):
        scratch.release()
        return super().detach(unpatch_all)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for _, module in self._linears():
                _without_patches(module)

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        module = None if return_weight else self._quantized_linear(key)
        if module is None or not (force_cast or key in self.patches) or self._is_packed_again(key, module):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if force_cast:
            # Dynamic VRAM moves small modules over in this way. The host would unpack the weight and pack it again.
            self.backup.setdefault(key, _Backup(module.weight))
            comfy.utils.set_attr_param(self.model, key, module.weight.to(device_to))
        return None

    def model_state_dict_for_saving(self, model=None, prefix=""):
        state_dict = super().model_state_dict_for_saving(model, prefix)
        for name, module in self._linears():
            key = f"{name}.weight"
            if key not in self.patches or not key.startswith(prefix) or layouts.from_host(module.weight) is None:
                continue
            if key in self.backup and self._is_packed_again(key, module):
                continue  # merged already
            stored, leaf = module.weight.state_dict(key), key.removeprefix(prefix)
            if layouts.can_requantize(layouts.from_host(module.weight)):
                caster = LazyCastingQuantizedParam(self, key)
                for piece, tensor in stored.items():
                    state_dict[piece.removeprefix(prefix)] = LazyCastingParamPiece(caster, piece, tensor)
            else:
                for piece in (*stored, f"{name}.comfy_quant"):
                    del state_dict[piece.removeprefix(prefix)]
                placeholder = torch.empty(module.weight.shape, dtype=module.weight.dtype, device="meta")
                state_dict[leaf] = LazyCastingParam(self, key, placeholder)
        return state_dict

    def _hand_over_patches(self) -> None:
        """Make the quantized linears apply this patcher's patches, and no others."""
        for name, module in self._linears():
            key = f"{name}.weight"
            if layouts.from_host(module.weight) is None or (key in self.patches and self._is_packed_again(key, module)):
                module.model_patches = []
                continue
            _without_patches(module)
            if key not in self.patches:
                continue
            side = self._side_path(key, self.patches[key], module)
            if side is not None:
                module.model_patches = [side]
            else:
                module.weight_function = [LowVramPatch(key, self.patches), *module.weight_function]

    def _side_path(self, key: str, patches: list[tuple], module: LowbitLinear) -> SidePath | None:
        """The patches of a weight beside it, or None where they, or a pack that wraps it, have to see the weight."""
        if key in self.weight_wrapper_patches:
            return None
        return side_path(key, patches, *module.weight.shape, module.lowbit_settings.kept_patches)

    def _is_packed_again(self, key: str, module: LowbitLinear) -> bool:
        """Whether the patches of a quantized weight are left to the host, which merges them into it."""
        if key not in self.patches:
            return False
        if comfy.lora.calculate_shape(self.patches[key], module.weight, key) != module.weight.shape:
            return True
        # Dynamic VRAM merges into the memory of the weight itself, where floats have no room.
        can_hold = layouts.can_requantize(layouts.from_host(module.weight)) or not self.is_dynamic()
        return can_hold and not small_changes(self.patches[key])

    def _linears(self) -> list[tuple[str, LowbitLinear]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, LowbitLinear)]

    def _quantized_linear(self, key: str) -> LowbitLinear | None:
        name, _, leaf = key.rpartition(".")
        if leaf != "weight":
            return None
        module = comfy.utils.get_attr(self.model, name)
        is_ours = isinstance(module, LowbitLinear) and layouts.from_host(module.weight) is not None
        return module if is_ours else None


def _without_patches(module: LowbitLinear) -> None:
    module.model_patches = []
    module.weight_function = [function for function in module.weight_function if not isinstance(function, LowVramPatch)]
    module.weight_lowvram_function = None


def _differ_in_strength_alone(patches: list[tuple], others: list[tuple]) -> bool:
    """Of patches as the host hands them over: strength, value, and what else there is."""
    pairs = zip(patches, others, strict=False)
    return len(patches) == len(others) and all(one[1] is other[1] and one[2:] == other[2:] for one, other in pairs)


class LowbitModelPatcherDynamic(_KeepsQuantized, ModelPatcherDynamic):
    """The host's patcher for dynamic VRAM. It leaves hooks to a delegate of the other class."""

    # The host sees no LoRA matrices on the device: they are ours, beside its own memory.

    def loaded_size(self):
        return super().loaded_size() + sum(side.device_bytes for side in self._side_paths())

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = super().partially_unload(device_to, memory_to_free, force_patch_weights)
        if freed < memory_to_free:
            freed += sum(side.release() for side in self._side_paths())
        return freed

    def _side_paths(self) -> list[SidePath]:
        return [side for _, module in self._linears() for side in module.model_patches]


class LowbitModelPatcher(_KeepsQuantized, ModelPatcher):
    """The host's plain patcher: on the CPU, without dynamic VRAM, and for hooks."""

    def partially_unload(self, *args, **kwargs):
        freed = super().partially_unload(*args, **kwargs)
        self._hand_over_patches()
        return freed

    def _hand_over_patches(self) -> None:
        # A hook's patches stand on the model's own: they are taken off, and put on again.
        hooks = self.current_hooks
        if hooks is not None:
            self.patch_hooks(None)
        super()._hand_over_patches()
        if hooks is not None:
            self.patch_hooks(hooks)

    # The host overwrites hooked weights in place and restores bytes without scales: quantized ones stay as they are.

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        if hooks is None:
            return
        for key, patches in self.get_combined_hook_patches(hooks).items():
            module = self._quantized_linear(key)
            if module is None:
                continue
            side = self._side_path_of_hooks(key, patches, module)
            if side is not None:
                module.hook_patches = [side]
            else:
                original = self.backup[key].weight if key in self.backup else module.weight
                both = [self.patches[key], patches] if module.model_patches else [patches]
                hook_patch = _HookPatch(key, both, original, module.model_patches)
                module.model_patches = []
                # Patches come before what wraps the weight, as in the host.
                ours = [function for function in module.weight_function if isinstance(function, LowVramPatch)]
                others = [function for function in module.weight_function if not isinstance(function, LowVramPatch)]
                module.weight_function = [*ours, hook_patch, *others]

    def _side_path_of_hooks(self, key: str, patches: list[tuple], module: LowbitLinear) -> SidePath | None:
        """Kept, with its matrices on the device, as long as the host would keep merged weights: prompts with different
        hooks take turns in every step. The same patches in another strength, as keyframes give them, take its place."""
        kept = self.__dict__.setdefault("_hook_side_paths", {}).setdefault(key, [])
        for index, (known, side) in enumerate(kept):
            if _differ_in_strength_alone(known, patches):
                if all(one[0] == other[0] for one, other in zip(known, patches, strict=True)):
                    return side
                del kept[index]
                break
        side = self._side_path(key, patches, module)
        kept.append((patches, side))
        return side

    def clear_cached_hook_weights(self):
        self.__dict__.pop("_hook_side_paths", None)
        super().clear_cached_hook_weights()

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if key not in combined_patches or self._quantized_linear(key) is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        for _, module in self._linears():
            module.hook_patches = []
            for hook_patch in [f for f in module.weight_function if isinstance(f, _HookPatch)]:
                module.weight_function = [f for f in module.weight_function if f is not hook_patch]
                module.model_patches = hook_patch.side_paths
