"""Two branches on two GPUs at the same time.

The host's Select Model Device node puts the unconditional model on another GPU. DualModelGuider then still calls one
model after the other, and the second call's inputs are made on the first GPU, behind all the work of the first call: no
GPU ever works beside the other. Here the second call starts in a thread of its own before the first one; when the
guider comes to it, its result is there, or nearly.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

_KEY = "lowbit_parallel_branches"


def run_in_parallel(patcher: ModelPatcher) -> None:
    """Have samplings with this patcher, or a clone of it, run an unconditional model on another GPU beside it."""
    patcher.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, _sample)


def unconditional_device(guider: comfy.samplers.CFGGuider, device: torch.device) -> torch.device:
    """Where the guider's unconditional model runs: `device` where it has no second model."""
    if getattr(guider, "uncond_inner", None) is None:
        return device
    return guider.uncond_model_patcher.load_device


def _sample(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    device = unconditional_device(guider, noise.device)
    if not _is_another_gpu(device, noise.device):
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    # Whatever happens, its call has ended before the host frees or unloads anything.
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lowbit_unconditional") as thread:
        # These options are this sampling's own.
        call = _UnconditionalCall(guider, device, thread)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, call, extra_args["model_options"], is_model_options=True)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _is_another_gpu(device: torch.device, other: torch.device) -> bool:
    return device != other and device.type == other.type == "cuda"


class _UnconditionalCall:
    """Wraps the guider's calls of its models: the first one of a step starts the second one beside it."""

    def __init__(self, guider, device: torch.device, thread: concurrent.futures.ThreadPoolExecutor):
        self._guider, self._device, self._thread = guider, device, thread
        self._x: torch.Tensor | None = None  # the latent of the step that was started last
        self._result: concurrent.futures.Future | None = None

    def __call__(self, executor, model, conds, x, timestep, model_options):
        if model is self._guider.uncond_inner and x is self._x and self._result is not None:
            result, self._result = self._result.result(), None
            return [part.to(x.device) for part in result]
        # Other packs call the model again in a step: only a new latent is a new step.
        if model is not self._guider.inner_model or x is self._x or self._is_left_out(model_options):
            return executor(model, conds, x, timestep, model_options)
        self._start(executor, x, timestep, model_options)
        return executor(model, conds, x, timestep, model_options)

    def _is_left_out(self, model_options: dict) -> bool:
        """Whether the guider will not ask for this call: guidance of 1 has no use for it, and context windows ask for
        pieces of the latent, first all conditional ones."""
        if model_options.get("context_handler") is not None:
            return True
        return math.isclose(self._guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)

    def _start(self, executor, x: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> None:
        # Copied now: later, these copies would stand behind the first model's work.
        options = {name: value for name, value in model_options.items() if name != "multigpu_clones"}
        transformer_options = dict(options.get("transformer_options", {}))
        if "sample_sigmas" in transformer_options:
            transformer_options["sample_sigmas"] = transformer_options["sample_sigmas"].to(self._device)
        options["transformer_options"] = transformer_options
        inputs = x.to(self._device), timestep.to(self._device), options
        self._x = x
        self._result = self._thread.submit(self._run, executor, torch.is_inference_mode_enabled(), *inputs)

    def _run(self, executor, inference_mode: bool, *inputs) -> list[torch.Tensor]:
        # A thread has a current device and an inference mode of its own.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with on_device, torch.inference_mode(inference_mode), torch.no_grad():
            return executor(self._guider.uncond_inner, [self._guider._uncond_conds], *inputs)
