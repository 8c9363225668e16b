"""Run as a program by test_loading_memory: peak resident memory of loading one file, twice, in a process of its own.

    measure_loading.py BASE_FOLDER CHECKPOINT [--quantize]

Prints one JSON object: bytes added to the resident set at the peak of the first load, after it, and after a second one.
"""

import gc
import importlib.util
import json
import pathlib
import re
import sys

TESTS = pathlib.Path(__file__).resolve().parents[1]


def status_bytes(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.M)[1]) * 1024


def reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    base, checkpoint, *options = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("tests_conftest", TESTS / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # registers `lowbit` and `host_harness`
    import torch
    from host_harness import inprocess

    host = inprocess.start(base, small=False)
    from lowbit.host.model import NONE, LoadRequest, load_pair

    def load():
        with torch.inference_mode():
            request = LoadRequest(checkpoint, compute_mode="exact", quantize="--quantize" in options)
            model, _ = load_pair(request, NONE)
            host.comfy.model_management.load_models_gpu([model])
            return model

    gc.collect()
    reset_peak()
    before = status_bytes("VmRSS")
    model = load()
    peak, after = status_bytes("VmHWM") - before, status_bytes("VmRSS") - before
    parameters = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
    host.unload()
    del model
    gc.collect()
    load()
    print(json.dumps({"peak": peak, "after": after, "twice": status_bytes("VmRSS") - before, "parameters": parameters}))


if __name__ == "__main__":
    main()
