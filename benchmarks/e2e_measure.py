"""One variant's measurements: loading, steps of the stock sampler on both branches, memory, error."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import comfy.samplers
import psutil
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from comfy_extras.nodes_ideogram4 import ideogram4_sigmas

from .e2e_files import drop_from_page_cache
from .e2e_host import GB, Host
from .e2e_variants import Variant

CFG = 7.0
SIGMA_MEAN, SIGMA_SPREAD = 0.0, 1.75  # what the stock scheduler node starts with
LATENT_CHANNELS, PIXELS_PER_LATENT = 128, 16
CALLS = 3  # of the conditional branch alone: one warms up
SCHEDULE_OF_CALLS = 8  # steps, of which the first ones are taken
ROUNDS, STEPS_OF_ROUND = 4, 4  # of a variant and its base in turn
WATCH_INTERVAL_S = 0.05
READ_BYTES = 64 * 2**20

# (call of the model, its arguments) -> its result: what ComfyUI calls in place of a model
Wrapper = Callable[[Callable, dict[str, Any]], torch.Tensor]


def resident_bytes() -> tuple[int, int | None]:
    """This process's memory: all that is resident, mapped files included, and the anonymous part where Linux says."""
    status = pathlib.Path("/proc/self/status")
    anonymous = None
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        anonymous = int(fields["RssAnon"].split()[0]) * 1024
    return psutil.Process().memory_info().rss, anonymous


class MemoryWatch:
    """The least free device memory and the most host memory seen, in bytes, by a thread until `pause`.

    It is paused before steps are timed; `look` looks once.
    """

    def __init__(self, host: Host):
        self._host, self._stop = host, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.lowest_free, self.resident, self.anonymous = host.free_at_start, 0, 0

    def __enter__(self) -> MemoryWatch:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.pause()
        self._thread.join()
        self.look()

    def look(self) -> None:
        resident, anonymous = resident_bytes()
        self.resident, self.anonymous = max(self.resident, resident), max(self.anonymous, anonymous or 0)
        if self.lowest_free is not None:
            self.lowest_free = min(self.lowest_free, self._host.free_bytes())

    def pause(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(WATCH_INTERVAL_S):
            self.look()


@dataclasses.dataclass
class Sampled:
    """latent, velocity: the final latent and the model's first answer, float32 on the CPU. seconds: of each step."""

    latent: torch.Tensor
    velocity: torch.Tensor
    seconds: list[float]


@dataclasses.dataclass
class Sampler:
    """The stock sampler for images of size x size pixels: the same random text features and noise for all variants."""

    host: Host
    size: int
    steps: int
    tokens: int
    features: int

    def pair(self, models: tuple, steps: int | None = None, **options) -> Sampled:
        """Steps of both branches, by the guider of the node DualModelGuider; options as `_sample` takes them."""
        guider = Guider_DualModel(*models)
        guider.set_cfg(CFG)
        return self._sample(guider, self.sigmas(steps or self.steps), **options)

    def conditional(self, model, calls: int, **options) -> Sampled:
        """Steps of one call each, of the conditional branch alone."""
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(1.0)
        return self._sample(guider, self.sigmas(SCHEDULE_OF_CALLS)[: calls + 1], **options)

    def sigmas(self, steps: int) -> torch.Tensor:
        return ideogram4_sigmas(steps, self.size, self.size, SIGMA_MEAN, SIGMA_SPREAD)

    def conditioning(self) -> list:
        features = torch.randn(1, self.tokens, self.features, generator=torch.Generator().manual_seed(7))
        return [[features, {"attention_mask": torch.ones(1, self.tokens, dtype=torch.long)}]]

    def noise(self) -> torch.Tensor:
        side = self.size // PIXELS_PER_LATENT
        return torch.randn(1, LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(42))

    def _sample(
        self,
        guider,
        sigmas: torch.Tensor,
        wrapper: Wrapper | None = None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> Sampled:
        """after_step: called with the number of each step, in time that counts for no step."""
        guider.set_conds(self.conditioning(), [[None, {}]])
        if wrapper is not None:
            guider.model_options = {**guider.model_options, "model_function_wrapper": wrapper}
        seconds, velocities = [], []

        def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            nonlocal start
            self.host.synchronize()
            seconds.append(time.perf_counter() - start)
            if step == 0:
                velocities.append(((x.float() - denoised.float()) / float(sigmas[0])).cpu())
            after_step(step)
            self.host.synchronize()
            start = time.perf_counter()

        noise, euler = self.noise(), comfy.samplers.sampler_object("euler")
        self.host.synchronize()
        start = time.perf_counter()
        latent = guider.sample(
            noise, torch.zeros_like(noise), euler, sigmas, callback=callback, disable_pbar=True, seed=42
        )
        self.host.synchronize()
        self.host.end_node()
        return Sampled(latent.float().cpu(), velocities[0], seconds)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The Frobenius norm of the difference, relative to the reference's."""
    return float((value - reference).norm() / reference.norm())


class References:
    """What stock bf16 gave, by image size and number of LoRAs; kept in a file for runs that leave stock_bf16 out."""

    def __init__(self, path: pathlib.Path, made_by: dict[str, str]):
        """made_by: everything that has to be the same for another run's results to serve as references."""
        self._path, self._made_by, self._outputs = path, made_by, {}
        if path.exists():
            stored = torch.load(path)
            if stored["made_by"] == made_by:
                self._outputs = stored["outputs"]
        self.stored = bool(self._outputs)

    def set(self, size: int, loras: int, velocity: torch.Tensor, latent: torch.Tensor) -> None:
        self._outputs[f"{size} {loras}"] = (velocity, latent)
        torch.save({"made_by": self._made_by, "outputs": self._outputs}, self._path)

    def errors(self, size: int, loras: int, velocity: torch.Tensor, latent: torch.Tensor) -> dict[str, float | None]:
        """Relative errors of one call and of the final latent; None where stock bf16 was not run with these LoRAs."""
        if f"{size} {loras}" not in self._outputs:
            return {"error": None, "latent_error": None}
        expected_velocity, expected_latent = self._outputs[f"{size} {loras}"]
        return {
            "error": relative_error(velocity, expected_velocity),
            "latent_error": relative_error(latent, expected_latent),
        }


def load(variant: Variant, host: Host, files: list[pathlib.Path], loras: list[str]) -> tuple[tuple, tuple, float]:
    """The variant's two models, those of its base, and the seconds that loading them took."""
    host.synchronize()
    start = time.perf_counter()
    base = variant.load(files)
    models = variant.patch(base, loras)
    host.synchronize()
    host.end_node()
    return models, base, time.perf_counter() - start


def read_and_copy(files: list[pathlib.Path], host: Host) -> float:
    """Seconds to read the files and copy them to the device, piece by piece through one page-locked buffer, waiting for
    each copy: the least that loading without any overlap takes."""
    buffer = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=host.cuda)
    on_device = torch.empty(READ_BYTES, dtype=torch.uint8, device=host.device)
    view = memoryview(buffer.numpy())
    host.synchronize()
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(view):
                on_device[:size].copy_(buffer[:size], non_blocking=True)
                host.synchronize()
    return time.perf_counter() - start


COLD = ("read_and_copy_s", "cold_load_s", "cold_first_step_s")


def cold(variant: Variant, sampler: Sampler, files: list[pathlib.Path], loras: list[str]) -> dict[str, float]:
    """The numbers of COLD: everything from the disk, each time. Kernels are compiled and tuned by then."""
    seconds = []
    drop_from_page_cache(files)
    seconds.append(read_and_copy(files, sampler.host))
    drop_from_page_cache(files)
    models, _, load_s = load(variant, sampler.host, files, loras)
    seconds += [load_s, sampler.pair(models, steps=2).seconds[0]]
    return dict(zip(COLD, seconds, strict=True))


def beside_base(models: tuple, base: tuple, sampler: Sampler) -> dict[str, Any]:
    """Steps of a variant's models and of its base's in turn, in seconds: the time of either alone drifts by more than
    what is between them.

    times_base: the median over the rounds of the quotient of their fastest steps, of which the first counts for none.
    """
    rounds = [
        [min(sampler.pair(each, 1 + STEPS_OF_ROUND).seconds[1:]) for each in (models, base)] for _ in range(ROUNDS)
    ]
    return {"rounds_s": rounds, "times_base": statistics.median(step_s / base_s for step_s, base_s in rounds)}


def measure(models: tuple, sampler: Sampler, watch: MemoryWatch) -> tuple[dict[str, Any], Sampled, Sampled]:
    """Times and memory (GB of 2^30 bytes) of loaded models; the sampled latent; the conditional branch alone.

    first_sampling_step_s: the median of the later steps of the sampling that loads the weights, of which the first step
    is `first_step_s`. step_s: that of a second sampling, as for every image but the first.
    Raises RuntimeError when a result is not finite.
    """
    host = sampler.host

    def after_step(step: int) -> None:
        watch.pause()
        watch.look()

    if host.cuda:
        torch.cuda.reset_peak_memory_stats()
    sampled = sampler.pair(models, after_step=after_step)
    again = sampler.pair(models)
    numbers = {
        "first_step_s": sampled.seconds[0],
        "first_sampling_step_s": statistics.median(sampled.seconds[1:]),
        "step_s": statistics.median(again.seconds[1:]),
        "steps_s": [sampled.seconds[1:], again.seconds[1:]],
        "torch_allocated_gb": None,
        "torch_reserved_gb": None,
    }
    if host.cuda:
        numbers["torch_allocated_gb"] = (torch.cuda.max_memory_allocated() - host.ballast_bytes) / GB
        numbers["torch_reserved_gb"] = (torch.cuda.max_memory_reserved() - host.ballast_bytes) / GB
    numbers["weights_gb"] = [model.model_size() / GB for model in models]
    numbers["resident_weights_gb"] = [model.loaded_size() / GB for model in models]
    single = sampler.conditional(models[0], CALLS)
    numbers["call_s"] = min(single.seconds[1:])
    watch.look()
    if not (math.isfinite(float(sampled.latent.norm())) and math.isfinite(float(single.velocity.norm()))):
        raise RuntimeError("the sampled latent is not finite")
    numbers["peak_vram_gb"] = None if watch.lowest_free is None else (host.free_at_start - watch.lowest_free) / GB
    numbers["peak_ram_gb"] = watch.resident / GB
    numbers["peak_anonymous_ram_gb"] = watch.anonymous / GB if watch.anonymous else None
    return numbers, sampled, single
