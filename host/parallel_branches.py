"""Two branches on two GPUs at the same time.

The host's Select Model Device node puts the unconditional model on another GPU. DualModelGuider then still calls one
model after the other, and the second call's inputs are made on the first GPU, behind all the work of the first call: no
GPU ever works beside the other. Here the second call starts in a thread of its own before the first one; when the
guider comes to it, its result is there, or nearly.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import math

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, get_all_wrappers

_KEY = "lowbit_parallel_branches"
_LEFT_TO_THE_HOST = ("multigpu_clones", "context_handler", "model_function_wrapper")  # of a sampling's options
_AROUND_CALLS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
_SHARED = ("mask", "control", "gligen")  # of conditioning


def run_in_parallel(patcher: ModelPatcher) -> None:
    """Have samplings with this patcher, or a clone of it, run an unconditional model on another GPU beside it."""
    patcher.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, _sample)


def other_device(guider: comfy.samplers.CFGGuider, device: torch.device, model_options: dict) -> torch.device | None:
    """The GPU on which the guider's unconditional model runs beside the conditional one on `device`, or None.

    It is left to the host with whatever holds tensors of the first GPU or is shared by both calls (masks, ControlNets,
    GLIGEN), with its own split of one model's calls, with context windows, which ask for pieces of the latent, and with
    wrappers around a model's calls, such as EasyCache: they remember one call for the next, of whichever model.
    """
    if getattr(guider, "uncond_inner", None) is None:
        return None
    other = guider.uncond_model_patcher.load_device
    if not _is_another_gpu(other, device) or any(model_options.get(name) for name in _LEFT_TO_THE_HOST):
        return None
    if any(get_all_wrappers(kind, model_options, is_model_options=True) for kind in _AROUND_CALLS):
        return None
    return None if any(cond.get(name) is not None for cond in guider._uncond_conds for name in _SHARED) else other


def _is_another_gpu(device: torch.device, other: torch.device) -> bool:
    return device != other and device.type == other.type == "cuda"


def _sample(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    device = other_device(guider, noise.device, extra_args["model_options"])
    if device is None:
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    # Whatever happens, its call has ended before the host frees or unloads anything.
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lowbit_unconditional") as thread:
        # These options are this sampling's own.
        call = _UnconditionalCall(guider, device, thread)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, call, extra_args["model_options"], is_model_options=True)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


class _UnconditionalCall:
    """Wraps the guider's calls of its models: the first one of a step starts the second one beside it."""

    def __init__(self, guider, device: torch.device, thread: concurrent.futures.ThreadPoolExecutor):
        self._guider, self._device, self._thread = guider, device, thread
        self._x: torch.Tensor | None = None  # the latent of the step that was started last
        self._result: concurrent.futures.Future | None = None
        self._starts = True

    def __call__(self, executor, model, conds, x, timestep, model_options):
        if model is self._guider.uncond_inner:
            if x is self._x and self._result is not None:
                result, self._result = self._result.result(), None
            else:
                result = self._run(executor, conds, *self._inputs(x, timestep, model_options))
            return [part.to(x.device) for part in result]
        # Other packs call the model again in a step: only a new latent is a new step.
        if model is self._guider.inner_model and x is not self._x and self._is_asked_for(model_options):
            self._start(executor, x, timestep, model_options)
        return executor(model, conds, x, timestep, model_options)

    def _is_asked_for(self, model_options: dict) -> bool:
        """Whether the guider will make the second call in this step: guidance of 1 has no use for it."""
        return not math.isclose(self._guider.cfg, 1.0) or model_options.get("disable_cfg1_optimization", False)

    def _start(self, executor, x: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> None:
        if self._result is not None:  # nobody came for the last one: another pack hands on other latents than it gets
            self._result.result()  # raises what went wrong in it
            self._result, self._starts = None, False
        if not self._starts:
            return
        # Copied now: later, these copies would stand behind the first model's work.
        inputs = self._inputs(x, timestep, model_options)
        self._x = x
        # A thread has an inference mode and context variables of its own.
        run, mode = contextvars.copy_context().run, torch.is_inference_mode_enabled()
        self._result = self._thread.submit(run, self._run, executor, [self._guider._uncond_conds], *inputs, mode)

    def _inputs(self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> tuple:
        """What the call takes, on its own GPU."""
        options = {**model_options, "transformer_options": dict(model_options.get("transformer_options", {}))}
        if "sample_sigmas" in options["transformer_options"]:
            sigmas = options["transformer_options"]["sample_sigmas"]
            options["transformer_options"]["sample_sigmas"] = sigmas.to(self._device)
        return x.to(self._device), timestep.to(self._device), options

    def _run(
        self, executor, conds, x, timestep, model_options, inference_mode: bool | None = None
    ) -> list[torch.Tensor]:
        mode = contextlib.nullcontext() if inference_mode is None else torch.inference_mode(inference_mode)
        with comfy.model_management.cuda_device_context(self._device), mode, torch.no_grad():
            return executor(self._guider.uncond_inner, conds, x, timestep, model_options)
