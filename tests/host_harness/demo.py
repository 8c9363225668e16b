"""`python -m host_harness.demo`, from tests/: a shipped workflow on the real host, once a format, and a table.

The files are small stand-ins with random weights for the 20 GB checkpoints, in the same layouts. Each format runs the
same prompt and seed; the error compares its final latent with the one of the fp32 files through the stock loader.
"""

import argparse
import itertools
import json
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file

from . import graphs, inprocess, server, small_models

BASE = inprocess.ROOT / ".dev" / "base"
RESULTS = inprocess.ROOT / ".dev" / "demo"
WORKFLOWS = inprocess.ROOT / "workflows"

INT8_LOADER = "Lowbit_LoadDiffusionModelInt8"
GGUF_LOADER = "Lowbit_LoadDiffusionModelGguf"
SIZE, STEPS, SEED = 256, 8, 7

Branches = dict[str, small_models.StateDict]


@dataclass(frozen=True)
class Variant:
    """One row of the table. `write` makes the files (name -> written path) from the two float branches.

    loader: a node of ours, given `inputs`; None stands for two stock loaders on the `files` in order.
    """

    name: str
    files: tuple[str, ...]
    write: Callable[[pathlib.Path, Branches], object]
    loader: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)


def _full(dtype: torch.dtype, name: str) -> Variant:
    files = (f"{name}.safetensors", f"{name}_unconditional.safetensors")

    def write(folder: pathlib.Path, branches: Branches) -> None:
        for file, state_dict in zip(files, branches.values(), strict=True):
            small_models.save(folder / file, state_dict, dtype)

    return Variant(str(dtype).removeprefix("torch."), files, write)


FP32 = _full(torch.float32, "demo_fp32")
BF16 = _full(torch.bfloat16, "demo_bf16")


def _native_int8(title: str, name: str, **options) -> Variant:
    files = (f"{name}.safetensors", f"{name}_unconditional.safetensors")

    def write(folder: pathlib.Path, branches: Branches) -> None:
        for file, state_dict in zip(files, branches.values(), strict=True):
            small_models.save(folder / file, small_models.int8_native(state_dict, **options))

    return Variant(title, files, write, INT8_LOADER, {"checkpoint": files[0], "unconditional": files[1]})


def _two_branch_int8(title: str, name: str, **options) -> Variant:
    file = f"{name}.safetensors"

    def write(folder: pathlib.Path, branches: Branches) -> None:
        small_models.save(folder / file, small_models.int8_transformer_lab(branches, **options))

    base = {"base_checkpoint": BF16.files[0], "base_checkpoint_unconditional": BF16.files[1]}
    return Variant(title, (file,), write, INT8_LOADER, {"checkpoint": file, "unconditional": "same file", **base})


def _two_branch_gguf(title: str, ggml_type: str, compute_mode: str) -> Variant:
    file = f"demo_{ggml_type.lower()}.gguf"

    def write(folder: pathlib.Path, branches: Branches) -> None:
        prefixed = {"cond.": branches["conditional"], "uncond.": branches["unconditional"]}
        small_models.write_gguf(folder / file, prefixed, linear=ggml_type)

    inputs = {"checkpoint": file, "unconditional": "same file", "compute_mode": compute_mode}
    return Variant(title, (file,), write, GGUF_LOADER, inputs)


FULL_PRECISION = [FP32, BF16]
QUANTIZED = [
    _two_branch_int8("INT8, two branches a file", "demo_int8_w8a8"),
    _two_branch_int8("INT8, two branches, smoothed", "demo_int8_w8a8_smooth", smooth="divide"),
    _native_int8("INT8, ComfyUI's format", "demo_int8"),
    _native_int8("INT8, ComfyUI's, rotated", "demo_int8_convrot", convrot=True),
    _two_branch_gguf("GGUF Q8_0, exact", "Q8_0", "exact"),
    _two_branch_gguf("GGUF Q8_0, int8", "Q8_0", "int8"),
    _two_branch_gguf("GGUF Q4_K, exact", "Q4_K", "exact"),
    _two_branch_gguf("GGUF Q4_K, int8", "Q4_K", "int8"),
]


@dataclass(frozen=True)
class Result:
    name: str
    size_bytes: int
    bits_per_weight: float
    step_time_ms: float
    latent: torch.Tensor
    image: pathlib.Path


# The prompt of a variant


def shipped_prompts(object_info: dict) -> dict[str, graphs.Prompt]:
    """The first shipped workflow of each loader node, as {node type: prompt}."""
    found: dict[str, graphs.Prompt] = {}
    for path in sorted(WORKFLOWS.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        for loader in (INT8_LOADER, GGUF_LOADER):
            if loader not in found and any(node["type"] == loader for node in workflow["nodes"]):
                print(f"workflow: {path.name}")
                found[loader] = graphs.from_workflow(workflow, object_info)
    return found


def fit(prompt: graphs.Prompt, files: dict[str, str]) -> graphs.Prompt:
    """A copy with the small text encoder and VAE, a small image and few steps."""
    size = {"width": SIZE, "height": SIZE}
    for class_type, inputs in (
        ("EmptyFlux2LatentImage", size),
        ("Ideogram4Scheduler", {"steps": STEPS, **size}),
        ("RandomNoise", {"noise_seed": SEED}),
        ("CLIPLoader", {"clip_name": files["text_encoder"], "type": "ideogram4"}),
        ("VAELoader", {"vae_name": files["vae"]}),
    ):
        prompt = graphs.with_inputs(prompt, class_type, **inputs)
    return prompt


def with_stock_loaders(prompt: graphs.Prompt, files: tuple[str, ...]) -> graphs.Prompt:
    """A copy in which two stock loaders stand where our loader was, or where stock loaders were."""
    loaders = [node_id for kind in (INT8_LOADER, GGUF_LOADER) for node_id in graphs.nodes_of(prompt, kind)]
    links = {(node_id, slot): (("model", "model_negative")[slot], 0) for node_id in loaders for slot in (0, 1)}
    prompt = {key: value for key, value in graphs.rewired(prompt, links).items() if key not in loaders}
    for node_id, file in zip(("model", "model_negative"), files, strict=True):
        prompt[node_id] = graphs.node("UNETLoader", unet_name=file, weight_dtype="default")
    return prompt


def with_our_loader(prompt: graphs.Prompt, variant: Variant, information: dict) -> graphs.Prompt:
    """A copy whose loader node reads the variant's files, its other inputs at their defaults; the stock graph gets such
    a node in place of its loaders."""
    if not graphs.nodes_of(prompt, variant.loader):
        prompt = graphs.rewired(prompt, {("model", 0): ("loader", 0), ("model_negative", 0): ("loader", 1)})
        prompt = {key: value for key, value in prompt.items() if key not in ("model", "model_negative")}
        prompt["loader"] = graphs.node(variant.loader, **default_inputs(information))
    defaults = default_inputs(information)
    inputs = {name: variant.inputs.get(name, default) for name, default in defaults.items()}
    return graphs.with_inputs(prompt, variant.loader, **inputs)


def default_inputs(information: dict) -> dict:
    """The value that each combo of a node shows when the node is new."""
    inputs = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in (information["input"].get(group) or {}).items():
            choices = kind if isinstance(kind, list) else (options[0] if options else {}).get("options") or [None]
            inputs[name] = (options[0] if options else {}).get("default", choices[0])
    return inputs


# Running and reporting


def run(running: server.ComfyServer, variant: Variant, prompt: graphs.Prompt) -> Result:
    sampler = graphs.nodes_of(prompt, "SamplerCustomAdvanced")[0]
    latent = f"demo_{variant.files[0]}"
    prompt = prompt | {"demo_latent": graphs.node("LowbitTest_SaveLatent", latent=[sampler, 0], filename=latent)}
    steps: list[server.Progress] = []

    def show(step: server.Progress) -> None:
        if step.node_id == sampler and step.maximum:
            steps.append(step)
            bar = "#" * (20 * step.value // step.maximum)
            if sys.stdout.isatty() or step.value == step.maximum:
                start = "\r" if sys.stdout.isatty() else ""
                print(f"{start}{variant.name:<30} [{bar:<20}] {step.value}/{step.maximum}", end="", flush=True)

    outputs = running.queue(prompt, on_progress=show)
    print(flush=True)
    image = next(path for path in running.files(outputs) if path.suffix == ".png")
    image = server.copy_file(image, RESULTS / f"{pathlib.Path(variant.files[0]).stem}{_suffix(variant)}.png")
    folder = running.base_directory / "models" / "diffusion_models"
    size_bytes = sum((folder / file).stat().st_size for file in variant.files)
    return Result(
        name=variant.name,
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / weight_count(),
        step_time_ms=1000 * median_step_time_s(steps),
        latent=load_file(running.base_directory / "output" / f"{latent}.safetensors")["samples"],
        image=image,
    )


def median_step_time_s(steps: list[server.Progress]) -> float:
    """Between reports; the host leaves out reports that follow each other too fast, so one may cover several steps."""
    pairs = [(a, b) for a, b in itertools.pairwise(steps) if b.value > a.value]
    times = [(b.time_s - a.time_s) / (b.value - a.value) for a, b in pairs]
    return statistics.median(times) if times else float("nan")


def _suffix(variant: Variant) -> str:
    mode = variant.inputs.get("compute_mode")
    return f"_{mode}" if mode else ""


def weight_count() -> int:
    """Weights of both branches."""
    shapes = small_models.ideogram4_shapes().values()
    return 2 * sum(int(torch.tensor(shape).prod()) for shape in shapes)


def table(results: list[Result]) -> str:
    reference = results[0].latent
    lines = [
        "| format | files, MB | bits a weight | ms a step (CPU) | error |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        error = ((result.latent - reference).norm() / reference.norm()).item()
        lines.append(
            f"| {result.name:<30} | {result.size_bytes / 1e6:.2f} | {result.bits_per_weight:.2f} "
            f"| {result.step_time_ms:.0f} | {error:.4f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock-only", action="store_true", help="only the full-precision graph of stock nodes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the host ends with us
    variants = FULL_PRECISION + ([] if options.stock_only else QUANTIZED)

    print("writing small models ...", flush=True)
    inprocess.register_pack()
    files = small_models.write_stand_ins(BASE)
    branches = {name: small_models.ideogram4(name) for name in ("conditional", "unconditional")}
    for variant in variants:
        variant.write(BASE / "models" / "diffusion_models", branches)
    print("starting ComfyUI ...", end=" ", flush=True)
    start = time.monotonic()
    try:
        with server.ComfyServer(BASE) as running:
            print(f"{time.monotonic() - start:.0f} s, {running.url}, log {running.log}")
            object_info = running.object_info()
            missing = {variant.loader for variant in variants if variant.loader} - object_info.keys()
            if missing:
                print(f"The host has no node {', '.join(sorted(missing))}:\n{running.log_tail()}", file=sys.stderr)
                return 1
            prompts = {} if options.stock_only else shipped_prompts(object_info)
            stock = graphs.stock_ideogram4(files, text="a small lighthouse")
            full = next(iter(prompts.values()), stock)
            results = []
            for variant in variants:
                if variant.loader is None:
                    prompt = with_stock_loaders(full, variant.files)
                else:
                    prompt = with_our_loader(prompts.get(variant.loader, stock), variant, object_info[variant.loader])
                results.append(run(running, variant, fit(prompt, files)))
    except (server.HostError, server.PromptError, graphs.WorkflowError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\n")
    print(
        "The weights are random: the pictures are noise on purpose, and should all look alike. Files this small carry"
    )
    print("more header and float layers than real ones: 'two branches' and GGUF quantize every layer, ComfyUI's format")
    print("those inside the blocks alone, hence its size and its smaller error. The smoothing factors are random, too.")
    print(
        "error: distance of the final latent from full precision's, 0 is the same, 0.1 is 10 % off. Times on a CPU say"
    )
    print("nothing about a GPU.")
    print(f"images: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
