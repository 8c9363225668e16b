"""What the linear layers of a running model read: largest magnitude and mean square of each input channel, and some
rows.

Everything is accumulated on the device that the model runs on, by one call of `record_channels` a layer; nothing waits
for the device until the result is asked for.
"""

from __future__ import annotations

import functools
import threading

import torch

from ..convert.record import LayerActivations
from ..kernels.kept_memory import KeptMemory
from ..kernels.record_channels import DTYPES, record_channels

# Rows kept of each layer's input: enough for an output error within a few tenths of a dB.
SAMPLE_ROWS = 64
# Of 32 bits that a layer's statistics take for each channel: two numbers, and the sample in 16 bits.
WORDS = 2 + SAMPLE_ROWS // 2
# A median below this part of the largest channel counts as this: a layer with mostly dead channels stays finite.
SMALLEST_MEDIAN = 1e-6


def spikiness(absmax: torch.Tensor) -> float:
    """The loudest input channel over the median one, of the channels' largest magnitudes [K]; 0 for silence.

    Channels that stand out are what makes INT8 activations inexact (Xiao et al., "SmoothQuant", arXiv 2211.10438, who
    find them about 100 times as large as the others); the median as the measure of what is usual is that of Sun et al.,
    "Massive Activations in Large Language Models", arXiv 2402.17762.
    """
    largest = float(absmax.max())
    if largest == 0:
        return 0.0
    return largest / max(float(absmax.median()), SMALLEST_MEDIAN * largest)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, the host's or ours, which share no class."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


class LayerStatistics:
    """Of one layer; `sample` holds rows drawn evenly from all rows so far, bf16 [at most SAMPLE_ROWS, K].

    N, K: output and input features. memory: float32 zeros [WORDS * K] on the device that computes. rows: seen so far.
    calls: of the layer.
    """

    def __init__(self, N: int, K: int, memory: torch.Tensor):
        self.N, self.K, self.rows, self.calls = N, K, 0, 0
        self._memory = memory  # the next layer's is put beside it while this tensor lives: views do not count
        self._absmax, self._square_sum, sample = memory.split([K, K, (WORDS - 2) * K])
        self._sample = sample.view(torch.bfloat16).view(SAMPLE_ROWS, K)

    def update(self, x: torch.Tensor) -> None:
        """Add what a call reads: x[..., K]. Brought to the layer's device where the model runs on a second one too."""
        device = self._absmax.device
        x = x.detach().reshape(-1, self.K).to(device, non_blocking=device.type == "cuda")
        if x.dtype not in DTYPES:
            x = x.float()
        count = x.shape[0]
        if count == 0:
            return
        record_channels(x, self._absmax, self._square_sum, self._sample, *_draw(self.rows, count, device))
        self.rows += count
        self.calls += 1

    @property
    def sample(self) -> torch.Tensor:
        return self._sample[: min(self.rows, SAMPLE_ROWS)]

    def activations(self) -> LayerActivations:
        absmax = self._absmax.to("cpu", copy=True)
        return LayerActivations(absmax, (self._square_sum / self.rows).cpu(), spikiness(absmax))


@functools.lru_cache(maxsize=256)
def _draw(seen: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `count` new rows go where in a sample of SAMPLE_ROWS out of `seen` rows: Vitter's algorithm R.

    Rows and slots, int64 [n] on the device. Drawn anew from the counts alone, so that layers which see the same tokens
    keep the same ones, and runs can be repeated.
    """
    generator = torch.Generator().manual_seed(seen * 1_000_003 + count)
    places = torch.arange(seen, seen + count, dtype=torch.float64)
    slots = (torch.rand(count, dtype=torch.float64, generator=generator) * (places + 1)).long()
    slots = torch.where(places < SAMPLE_ROWS, places.long(), slots)
    rows = (slots < SAMPLE_ROWS).nonzero().flatten()
    chosen = dict(zip(slots[rows].tolist(), rows.tolist(), strict=True))  # of two rows for a slot the later one stays
    # From ordinary memory a copy without waiting is staged on CUDA: the device does not have to catch up. On Apple's
    # GPUs it would read memory that is gone by then.
    return tuple(
        torch.tensor(list(numbers), dtype=torch.int64).to(device, non_blocking=device.type == "cuda")
        for numbers in (chosen.values(), chosen)
    )


class ActivationRecorder:
    """The statistics of all linear layers of a model that were called while it was attached, by module name."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerStatistics] = {}
        self._kept = KeptMemory()
        self._lock = threading.Lock()  # with a model on two GPUs, two threads record
        # By model: the hooks, and the compiled calls that were taken off.
        self._attached: dict[torch.nn.Module, tuple[list, list]] = {}

    def attach(self, model: torch.nn.Module) -> None:
        """Record what the model's linear layers read from now on. A second call changes nothing."""
        if model in self._attached:
            return
        hooks = [self._hook(name, module) for name, module in model.named_modules() if is_linear(module)]
        # A compiled call runs no hooks that came after it was compiled.
        compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
        for module, _ in compiled:
            module._compiled_call_impl = None
        self._attached[model] = (hooks, compiled)

    def detach(self, model: torch.nn.Module) -> None:
        """Leave the model as it was before `attach`."""
        hooks, compiled = self._attached.pop(model, ((), ()))
        for hook in hooks:
            hook.remove()
        for module, call in compiled:
            module._compiled_call_impl = call

    def activations(self, model: str = "model") -> dict[str, LayerActivations]:
        """The record. model: what it is called in Profile Activations. Raises ValueError where nothing was recorded, or
        numbers that are none."""
        if not self.layers:
            raise ValueError(
                f"The record is empty: no sampler has run the {model} that came out of Profile Activations (Lowbit). "
                "Connect it to the sampler or guider, with a cfg other than 1 if it is the negative one, and the "
                "sampler's result to this node."
            )
        with torch.inference_mode():
            record = {name: statistics.activations() for name, statistics in self.layers.items()}
        for name, layer in record.items():
            if not bool(torch.isfinite(layer.mean_square).all()):
                raise ValueError(
                    f"{name} of {model} has read infinite numbers or numbers that are none (NaN): it overflowed. "
                    "Load it in bf16 and record again."
                )
        return record

    def _hook(self, name: str, module: torch.nn.Module):
        observe = functools.partial(self._observe, name, module)
        if hasattr(module, "observe_input"):  # ours, which fused kernels leave their floats for
            return module.observe_input(observe)
        return module.register_forward_pre_hook(
            lambda _, arguments, named: observe(next(iter((*arguments, *named.values())))), with_kwargs=True
        )

    @torch.compiler.disable
    @torch.inference_mode()
    def _observe(self, name: str, module: torch.nn.Module, x: torch.Tensor) -> None:
        with self._lock:
            if name not in self.layers:
                memory = self._kept.keep(torch.zeros(WORDS * module.in_features, device=x.device))
                self.layers[name] = LayerStatistics(module.out_features, module.in_features, memory)
            self.layers[name].update(x)
