"""What is measured: a file, a loader and a compute mode by the name of each variant. Imports neither torch nor ComfyUI.

stock_bf16, stock_fp8, ...           ComfyUI's own loader
lowbit_q4_k, lowbit_q4_k_exact       Lowbit's, in mode `auto` or the one that the suffix names
torch_gguf_q4_k                      Lowbit's, exact, unpacking by plain torch: what a GGUF path without kernels costs
lowbit_q4_k_lora, ..._lora2          with one or two LoRAs of rank 32 on all linear layers of the blocks
lowbit_q4_k_two_gpus                 the unconditional model on a second GPU, by ComfyUI's node Select Model Device
stock_bf16_profiled                  while Profile Activations records what the linear layers read
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

REFERENCE = "stock_bf16"
LOWBIT_FILES = {"lowbit_int8": "int8", "lowbit_q8_0": "q8_0", "lowbit_q4_k": "q4_k"}
STOCK_FILES = {
    REFERENCE: "bf16",
    "stock_fp8": "fp8",
    "stock_fp8_unpacked": "fp8_unpacked",
    "stock_int8": "int8",
    "stock_int8_convrot": "int8_convrot",
}
PLAIN_TORCH = "torch_gguf_q4_k"
MODES = ("exact", "int8")
LORAS = {"_lora": 1, "_lora2": 2}
TWO_GPUS, PROFILED = "_two_gpus", "_profiled"
DEFAULT = (
    *("stock_bf16", "stock_fp8_unpacked", "stock_int8"),
    *("lowbit_int8", "lowbit_q4_k", "lowbit_q4_k_exact", "lowbit_q8_0"),
)
NAMES = (
    f"{', '.join((*STOCK_FILES, *LOWBIT_FILES, PLAIN_TORCH))}; lowbit ones also with _exact or _int8; "
    "each also with _lora or _lora2, and with _two_gpus or _profiled"
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """file: a kind of `e2e_files.FILES`. mode: None for ComfyUI's own loader, else Lowbit's compute mode.

    plain_torch: whether Lowbit's ops are computed by their definitions in plain torch. extra: TWO_GPUS,
    PROFILED or nothing.
    """

    name: str
    file: str
    mode: str | None = None
    loras: int = 0
    plain_torch: bool = False
    extra: str = ""

    @property
    def base(self) -> str:
        """The name of the same variant without LoRA and extra."""
        return without_loras(without_extra(self.name))

    @property
    def is_base(self) -> bool:
        return self.name == self.base

    def computing(self) -> contextlib.AbstractContextManager:
        """In force while the variant runs."""
        if not self.plain_torch:
            return contextlib.nullcontext()
        from ..kernels.dispatch import use_implementation

        return use_implementation("reference")

    def load(self, files: Sequence[pathlib.Path]) -> tuple:
        """The two MODELs of the conditional and the unconditional file, as the loader nodes make them."""
        if self.mode is None:
            import comfy.sd

            return tuple(comfy.sd.load_diffusion_model(str(path)) for path in files)
        from ..host.model import LoadRequest, load_pair

        return load_pair(LoadRequest(str(files[0]), compute_mode=self.mode), str(files[1]))

    def patch(self, models: tuple, loras: Sequence[str]) -> tuple:
        """The loaded models with what the variant adds to its base, which is put on them by nodes.

        loras: names of LoRA files below ComfyUI's base directory, put on both models by the stock node.
        """
        for lora in loras:
            import nodes

            node = nodes.LoraLoaderModelOnly()
            models = tuple(node.load_lora_model_only(model, lora, 1.0)[0] for model in models)
        if self.extra == TWO_GPUS:
            return models[0], _on_second_gpu(models[1])
        if self.extra == PROFILED:
            from ..host.profile_activations import profile_models

            return profile_models(*models)[:2]
        return models


def _on_second_gpu(model):
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    moved = SelectModelDeviceNode.execute(model, "gpu:1").result[0]
    if moved.load_device == model.load_device:  # the node only logs that it cannot
        raise RuntimeError("the unconditional model stayed on the first GPU: this needs a second one")
    return moved


def without_extra(name: str) -> str:
    return name.removesuffix(TWO_GPUS).removesuffix(PROFILED)


def without_loras(name: str) -> str:
    suffix = next((suffix for suffix in LORAS if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def variant(name: str) -> Variant:
    """The variant of a name. Raises ValueError for a name that means none."""
    plain = without_extra(name)
    base = without_loras(plain)
    options = {"loras": LORAS.get(plain.removeprefix(base), 0), "extra": name.removeprefix(plain)}
    if base in STOCK_FILES:
        return Variant(name, STOCK_FILES[base], **options)
    if base == PLAIN_TORCH:
        return Variant(name, "q4_k", "exact", plain_torch=True, **options)
    if base in LOWBIT_FILES:
        return Variant(name, LOWBIT_FILES[base], "auto", **options)
    stem, _, mode = base.rpartition("_")
    if stem in LOWBIT_FILES and mode in MODES:
        return Variant(name, LOWBIT_FILES[stem], mode, **options)
    raise ValueError(f"no variant {name!r}; there are {NAMES}")


def in_order(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, each once: those of bf16 first, as errors refer to them; those that read the same
    file after one another, so that it is written once; one with LoRAs or an extra after the one without."""
    variants = [variant(name) for name in dict.fromkeys(names)]
    files = list(dict.fromkeys(["bf16", *(v.file for v in variants)]))
    bases = list(dict.fromkeys(v.base for v in variants))
    return sorted(variants, key=lambda v: (files.index(v.file), bases.index(v.base), v.extra, v.loras))
