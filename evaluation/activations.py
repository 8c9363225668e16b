"""What the linear layers of a running model read: largest magnitude and mean square of each input channel, and some
rows.

Everything is accumulated on the device that the model runs on, by two reductions a layer and call and two small
additions; nothing waits for the device until the result is asked for.
"""

from __future__ import annotations

import functools

import torch

from ..convert.record import LayerActivations

# Rows kept of each layer's input: enough for an output error within a few tenths of a dB.
SAMPLE_ROWS = 64
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

    N, K: output and input features. rows: seen so far. calls: of the layer.
    """

    def __init__(self, N: int, K: int, device: torch.device):
        self.N, self.K, self.rows, self.calls = N, K, 0, 0
        self._absmax = torch.zeros(K, dtype=torch.float32, device=device)
        self._square_sum = torch.zeros(K, dtype=torch.float32, device=device)
        self._sample = torch.zeros((SAMPLE_ROWS, K), dtype=torch.bfloat16, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add what a call reads: x[..., K]."""
        x = x.detach().reshape(-1, self.K)
        count, device = x.shape[0], self._absmax.device
        if count == 0:
            return
        absmax = torch.linalg.vector_norm(x, float("inf"), dim=0).to(device, torch.float32, non_blocking=True)
        root = torch.linalg.vector_norm(x, 2, dim=0, dtype=torch.float32).to(device, non_blocking=True)
        torch.maximum(self._absmax, absmax, out=self._absmax)
        self._square_sum.addcmul_(root, root)
        drawn = _draw(self.rows, count, x.device, device)
        if drawn is not None:
            slots, rows = drawn
            picked = x.index_select(0, rows).to(device, torch.bfloat16, non_blocking=True)
            self._sample.index_copy_(0, slots, picked)
        self.rows += count
        self.calls += 1

    @property
    def sample(self) -> torch.Tensor:
        return self._sample[: min(self.rows, SAMPLE_ROWS)]

    def activations(self) -> LayerActivations:
        absmax = self._absmax.to("cpu", copy=True)
        return LayerActivations(absmax, (self._square_sum / self.rows).cpu(), spikiness(absmax))


@functools.lru_cache(maxsize=256)
def _draw(seen: int, count: int, *devices: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which of `count` new rows go where in a sample of SAMPLE_ROWS out of `seen` rows: Vitter's algorithm R.

    Slots on the second device, rows on the first; None for no row at all. Drawn anew from the counts alone, so that
    layers which see the same tokens keep the same ones, and runs can be repeated.
    """
    generator = torch.Generator().manual_seed(seen * 1_000_003 + count)
    places = torch.arange(seen, seen + count, dtype=torch.float64)
    slots = (torch.rand(count, dtype=torch.float64, generator=generator) * (places + 1)).long()
    slots = torch.where(places < SAMPLE_ROWS, places.long(), slots)
    rows = (slots < SAMPLE_ROWS).nonzero().flatten()
    chosen = dict(zip(slots[rows].tolist(), rows.tolist(), strict=True))  # of two rows for a slot the later one stays
    if not chosen:
        return None
    row_device, slot_device = devices
    # From ordinary memory a copy without waiting is staged: the device does not have to catch up.
    return (
        torch.tensor(list(chosen), dtype=torch.int64).to(slot_device, non_blocking=True),
        torch.tensor(list(chosen.values()), dtype=torch.int64).to(row_device, non_blocking=True),
    )


class ActivationRecorder:
    """The statistics of all linear layers of a model that were called while it was attached, by module name."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerStatistics] = {}
        # By model: the hooks, and the compiled calls that were taken off.
        self._attached: dict[torch.nn.Module, tuple[list, list]] = {}

    def attach(self, model: torch.nn.Module) -> None:
        """Record what the model's linear layers read from now on. A second call changes nothing."""
        if model in self._attached:
            return
        hooks = [
            module.register_forward_pre_hook(functools.partial(self._observe, name), with_kwargs=True)
            for name, module in model.named_modules()
            if is_linear(module)
        ]
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

    @torch.inference_mode()
    def _observe(self, name: str, module: torch.nn.Module, arguments: tuple, named: dict) -> None:
        x = next(iter((*arguments, *named.values())))
        if name not in self.layers:
            self.layers[name] = LayerStatistics(module.out_features, module.in_features, x.device)
        self.layers[name].update(x)
