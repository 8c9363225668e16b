"""The host inside this process: its loaders, samplers and detection called directly, without a server.

    host = start(base_directory)                # once a process
    model = host.load_diffusion_model(path)     # a ModelPatcher, as the stock loader node gives
    latent = host.sample(model, model_negative, steps=2)

Import no module of the host before `start`: it puts the host on `sys.path` and reads the host's command line.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEFAULT_HOST = ROOT / ".dev" / "ComfyUI"

# Packages that the host imports but a diffusion model does not need: a machine without them still runs the models.
OPTIONAL_PACKAGES = {
    *("aiohttp", "alembic", "av", "blake3", "kornia", "pydantic", "pydantic_settings", "simpleeval", "spandrel"),
    *("sqlalchemy", "torchaudio", "torchsde", "trampoline", "yarl"),
}

_host = None


def find_host() -> pathlib.Path | None:
    """The host's folder: COMFYUI_PATH, else the one that `python dev.py setup` made; None when there is neither."""
    path = pathlib.Path(os.environ.get("COMFYUI_PATH") or DEFAULT_HOST)
    return path.resolve() if (path / "comfy" / "sd.py").is_file() else None


def missing_host_reason() -> str:
    wanted = os.environ.get("COMFYUI_PATH")
    if wanted:
        return f"COMFYUI_PATH={wanted} holds no ComfyUI (no comfy/sd.py)"
    return "no ComfyUI: run `python dev.py setup`, or set COMFYUI_PATH to a checkout"


def register_pack(name: str = "lowbit") -> None:
    """Makes this repository's folder importable as the package `name`, as tests/conftest.py does for pytest."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


class _Stub(types.ModuleType):
    """Answers every attribute with a class that accepts everything: enough for imports and type annotations."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _AnythingMeta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __getitem__(cls, item):
        return cls


class _Anything(metaclass=_AnythingMeta):
    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: set[str]):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


class Host:
    """The imported host. `comfy`, `nodes` and `folder_paths` are its modules; `module(name)` imports any other."""

    def __init__(self, path: pathlib.Path, base_directory: pathlib.Path, dynamic_vram: bool):
        self.path = path
        self.base_directory = base_directory
        self.models = base_directory / "models"
        self.dynamic_vram = dynamic_vram
        self.version = self.module("comfyui_version").__version__
        for name in ("comfy.sd", "comfy.utils", "comfy.sample", "comfy.samplers", "comfy.model_management"):
            self.module(name)
        self.comfy = sys.modules["comfy"]
        self.folder_paths = self.module("folder_paths")
        self.nodes = self.module("nodes")

    @staticmethod
    def module(name: str) -> types.ModuleType:
        return importlib.import_module(name)

    def load_diffusion_model(self, path, **model_options):
        """What the stock loader node does with a safetensors file."""
        import torch

        with torch.inference_mode():  # the host runs every node so; a quantized model loaded without it cannot be moved
            return self.comfy.sd.load_diffusion_model(str(path), model_options=model_options)

    def load_state_dict(self, state_dict: dict, **model_options):
        """A model from a state dict in memory. The host empties the dict that it is given, so it gets a copy."""
        import torch

        def load(disable_dynamic: bool = False):
            with torch.inference_mode():
                return self.comfy.sd.load_diffusion_model_state_dict(
                    dict(state_dict), model_options=model_options, disable_dynamic=disable_dynamic
                )

        model = load()
        model.cached_patcher_init = (load, ())  # as stock loaders do: hooks and clones load the model once more
        return model

    def conditioning(self, width: int = 832, tokens: int = 16, seed: int = 0, pooled_width: int = 0) -> list:
        """Random text features: the value of a CONDITIONING output."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(1, tokens, width, generator=generator)
        extra = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}
        if pooled_width:
            extra["pooled_output"] = torch.randn(1, pooled_width, generator=generator)
        return [[features, extra]]

    def sample(
        self,
        model,
        model_negative=None,
        *,
        positive=None,
        steps=2,
        width=256,
        height=256,
        cfg=7.0,
        seed=0,
        callback=None,
    ):
        """The final latent in fp32 on the CPU, through the host's samplers (euler).

        With `model_negative`: the stock Ideogram 4 graph, DualModelGuider and Ideogram4Scheduler. Without: CFGGuider at
        cfg 1 and the model's own "simple" schedule. The latent has the shape that the model's latent format asks for.
        """
        import torch

        with torch.inference_mode():
            positive = self.conditioning() if positive is None else positive
            latent_format = model.get_model_object("latent_format")
            ratio = getattr(latent_format, "spacial_downscale_ratio", 8)
            shape = (1, latent_format.latent_channels, height // ratio, width // ratio)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if model_negative is not None:
                guider = self.module("comfy_extras.nodes_custom_sampler").Guider_DualModel(model, model_negative)
                guider.set_conds(positive, [[None, {}]])
                guider.set_cfg(cfg)
                sigmas = self.module("comfy_extras.nodes_ideogram4").ideogram4_sigmas(steps, width, height, 0.0, 1.75)
            else:
                guider = self.comfy.samplers.CFGGuider(model)
                guider.set_conds(positive, positive)
                guider.set_cfg(1.0)
                sampling = model.get_model_object("model_sampling")
                sigmas = self.comfy.samplers.calculate_sigmas(sampling, "simple", steps)
            sampler = self.comfy.samplers.sampler_object("euler")
            options = {"callback": callback, "disable_pbar": True, "seed": seed}
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, **options).float().cpu()

    def apply_model(self, model, x, sigma: float = 0.5, context=None, **conditions):
        """One call of the diffusion model, loaded to its device, as the sampler makes it; returns fp32 on the CPU."""
        import torch

        with torch.inference_mode():
            self.comfy.model_management.load_models_gpu([model])
            device = model.load_device
            sigmas = torch.full((x.shape[0],), sigma, device=device)
            context = None if context is None else context.to(device)
            return model.model.apply_model(x.to(device), sigmas, c_crossattn=context, **conditions).float().cpu()

    def unload(self) -> None:
        self.comfy.model_management.unload_all_models()
        self.comfy.model_management.soft_empty_cache()


def start(base_directory: str | os.PathLike, *, small: bool = True, arguments: tuple[str, ...] = ()) -> Host:
    """Imports the host, on the GPU if there is one (LOWBIT_TEST_DEVICE=cpu forbids it); later calls return the same.

    small: give Ideogram 4, Lumina 2 and the text encoder the sizes of `small_models`.
    """
    global _host
    if _host is not None:
        return _host
    path = find_host()
    if path is None:
        raise FileNotFoundError(missing_host_reason())
    base_directory = pathlib.Path(base_directory).resolve()
    for folder in ("custom_nodes", "models", "input", "output"):
        (base_directory / folder).mkdir(parents=True, exist_ok=True)

    missing = {name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None}
    if missing:
        sys.meta_path.append(_StubFinder(missing))
    sys.path.insert(0, str(path))

    import torch

    cpu = not torch.cuda.is_available() or os.environ.get("LOWBIT_TEST_DEVICE") == "cpu"
    argv, level = sys.argv, logging.getLogger().level
    sys.argv = ["main.py", "--base-directory", str(base_directory), "--disable-api-nodes", *arguments]
    if cpu:
        sys.argv.append("--cpu")
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = argv
    logging.getLogger().setLevel(max(level, logging.WARNING))  # the host greets with a page of INFO lines
    try:
        dynamic_vram = False if cpu else _start_dynamic_vram()
        _host = Host(path, base_directory, dynamic_vram)
    finally:
        logging.getLogger().setLevel(level)
    if small:
        from host_harness.small_ideogram4.patch import patch

        patch()
    return _host


def _start_dynamic_vram() -> bool:
    """What the host's main module does before it loads a model on an NVIDIA device."""
    cli_args = importlib.import_module("comfy.cli_args")
    if not cli_args.enables_dynamic_vram():
        return False
    control = importlib.import_module("comfy_aimdo.control")
    control.init()
    management = importlib.import_module("comfy.model_management")
    headroom = int(cli_args.args.vram_headroom * 1024**3)
    devices = management.get_all_torch_devices()
    try:
        ready = control.init_devices((device.index, headroom) for device in devices)
    except TypeError:  # comfy-aimdo 0.4.9
        ready = control.init_devices(device.index for device in devices)
    if ready:
        control.set_log_warning()
        patcher = importlib.import_module("comfy.model_patcher")
        patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
        importlib.import_module("comfy.memory_management").aimdo_enabled = True
    return bool(ready)
