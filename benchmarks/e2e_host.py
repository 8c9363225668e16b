"""ComfyUI inside this process, started as its own main module starts it, and the device's memory around it.

The order matters on a CUDA device: comfy-aimdo (dynamic VRAM) starts before torch is imported, and ComfyUI chooses
torch's allocator by an environment variable that torch reads once. So nothing here imports torch before `start`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import sys

GB = 2**30
BALLAST_STEP = 2**21  # the device hands out memory in pages of 2 MiB


class CannotRunError(RuntimeError):
    """What this machine lacks, as a sentence for the person at the console."""


def start(base: pathlib.Path, cpu: bool, fast_disk: bool = False) -> Host:
    """Imports ComfyUI (COMFYUI_PATH, or the one of `python dev.py setup`) with `base` as its base directory.

    cpu, fast_disk: start it with `--cpu`, with `--fast-disk`. Raises CannotRunError without ComfyUI or a device,
    RuntimeError when torch is imported already.
    """
    from host_harness import inprocess

    path = inprocess.find_host()
    if path is None:
        raise CannotRunError(inprocess.missing_host_reason())
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: ComfyUI could no longer choose its allocator as it does alone")
    stub_missing_packages()
    for folder in ("custom_nodes", "input", "output", "models/diffusion_models", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="  %(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("lowbit").setLevel(logging.INFO)  # says once which implementation computes an op

    sys.path.insert(0, str(path))
    ours = sys.argv
    sys.argv = ["main.py", "--base-directory", str(base), "--disable-api-nodes"]
    sys.argv += ["--cpu"] * cpu + ["--fast-disk"] * fast_disk
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        cli = importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = ours
    _start_aimdo(cli)
    importlib.import_module("cuda_malloc")
    if not (cpu or importlib.import_module("torch").cuda.is_available()):
        raise CannotRunError("This needs a CUDA device, and torch finds none. --tiny runs on the CPU.")
    importlib.import_module("comfy.utils")
    return Host(_start_dynamic_vram(cli))


def stub_missing_packages() -> None:
    """Makes imports of packages that ComfyUI names but a diffusion model never calls succeed where they are missing.

    A machine for measurements has torch and little else; a web server, video and database packages are of no use there.
    """
    from host_harness import inprocess

    missing = {name for name in inprocess.OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None}
    if missing:
        print(f"not installed, stubbed for ComfyUI: {', '.join(sorted(missing))}")
        sys.meta_path.append(inprocess._StubFinder(missing))


def _start_aimdo(cli) -> None:
    """The part of dynamic VRAM that ComfyUI starts before anything imports torch."""
    control = importlib.import_module("comfy_aimdo.control")
    if not cli.enables_dynamic_vram():
        return
    reserved = None if cli.args.reserve_vram is None else int(cli.args.reserve_vram * GB)
    control.init(simple_vram_headroom=reserved, nvml_pressure=not cli.args.disable_nvml_pressure)


def _start_dynamic_vram(cli) -> bool:
    """The rest of it, once ComfyUI knows its devices. Returns whether models are patched by dynamic VRAM."""
    management = importlib.import_module("comfy.model_management")
    patcher = importlib.import_module("comfy.model_patcher")
    memory = importlib.import_module("comfy.memory_management")
    if not (cli.enables_dynamic_vram() and management.is_nvidia() and not management.is_wsl()):
        return False
    if management.torch_version_numeric < (2, 8):
        return False
    control = importlib.import_module("comfy_aimdo.control")
    headroom = int(cli.args.vram_headroom * GB)
    if not control.init_devices((device.index, headroom) for device in management.get_all_torch_devices()):
        return False
    control.set_log_warning()
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
    memory.aimdo_enabled = True
    return True


class Host:
    """The running ComfyUI. `device` runs the models; `free_at_start`: its free bytes before any model, None on a CPU.

    ballast_bytes: device memory that `leave_free` holds.
    """

    def __init__(self, dynamic_vram: bool):
        import torch

        self.dynamic_vram = dynamic_vram
        self.version = importlib.import_module("comfyui_version").__version__
        self._management = importlib.import_module("comfy.model_management")
        self.device = self._management.get_torch_device()
        self.cuda = self.device.type == "cuda"
        self.ballast_bytes, self._ballast = 0, None
        if self.cuda:  # the context and the library of products have their memory before any is counted
            torch.zeros(8, 8, device=self.device) @ torch.zeros(8, 8, device=self.device)
            torch.cuda.synchronize()
        self.free_at_start = self.free_bytes()

    def describe(self) -> dict[str, str]:
        """What beside the CSV's columns decides the numbers of a run."""
        facts = {"ComfyUI": self.version, "dynamic VRAM": "on" if self.dynamic_vram else "off"}
        for package in ("comfy-kitchen", "comfy-aimdo"):
            facts[package] = importlib.metadata.version(package)
        facts["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "torch's default")
        facts["most pinned memory"] = f"{max(0, self._management.MAX_PINNED_MEMORY) / GB:.0f} GB"
        if self.cuda:
            facts["free VRAM"] = f"{self.free_at_start / GB:.1f} GB"
        return facts

    def free_bytes(self) -> int | None:
        """Free memory of the device as the driver sees it: dynamic VRAM is not in torch's own counters."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else None

    def leave_free(self, free_gb: float | None) -> None:
        """Hold so much device memory that `free_gb` (of 2^30 bytes) stay free, as on a smaller card; None: hold none.

        Called while no model is loaded. Raises CannotRunError where less is free without that.
        """
        import torch

        self._ballast, self.ballast_bytes = None, 0
        self.cleanup()
        if free_gb is not None:
            size = int(self.free_bytes() - free_gb * GB) // BALLAST_STEP * BALLAST_STEP
            if size <= 0:
                found = f"the device has only {self.free_bytes() / GB:.1f} GB free to begin with"
                raise CannotRunError(f"--free-vram-gb {free_gb:g}: {found}")
            self._ballast = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._ballast[::BALLAST_STEP] = 1  # memory that nobody touches may not be there at all
            torch.cuda.synchronize()
            self.ballast_bytes = torch.cuda.memory_allocated()
        self.free_at_start = self.free_bytes()

    def synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def end_node(self) -> None:
        """What ComfyUI's executor does after every node."""
        if importlib.import_module("comfy.memory_management").aimdo_enabled:
            self._management.reset_cast_buffers()
            importlib.import_module("comfy.model_prefetch").cleanup_prefetch_queues()
            importlib.import_module("comfy_aimdo.model_vbar").vbars_reset_watermark_limits()

    def cleanup(self) -> None:
        """Unload all models; those that nothing refers to any more are gone afterwards."""
        import torch

        self._management.unload_all_models()
        gc.collect()
        self._management.cleanup_models_gc()
        self._management.soft_empty_cache()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
