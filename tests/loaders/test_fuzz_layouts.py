"""Correct containers with layouts that contradict themselves: each loads and dequantizes, or is a CheckpointError."""

import json
import random
import re

import pytest
import torch
from lowbit.formats import QuantizedWeight
from lowbit.loaders.branch import load_branch
from lowbit.loaders.errors import CheckpointError
from lowbit.tests.loaders.test_fuzz import guard
from safetensors.torch import save_file

FILES_PER_SEED = 150
N, K = 8, 32
DTYPES = (
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64),
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES = (
    (),
    (1,),
    (1, 1),
    (N,),
    (K,),
    (N, 1),
    (1, N),
    (1, K),
    (N, K),
    (K, K),
    (0, K),
    (N, 0),
    (0,),
    (N, 2, 16),
    (4, 144),
)
LEAVES = (
    *("weight", "weight_scale", "scale_weight", "weight_smooth", "wq", "ws", "smooth", "bias", "comfy_quant"),
    *("input_scale", "weight_scale_2", "weight_zero_point", "weight_scale_inv", "pre_quant_scale", ""),
)
PREFIXES = ("", "model.diffusion_model.", "conditional.", "unconditional.", "cond.", "vae.")
FORMATS = (
    "int8_tensorwise",
    "lowbit_int8_smooth",
    "float8_e4m3fn",
    "float8_e5m2",
    "gguf_q4_k",
    "gguf_q8_0",
    "gguf_f16",
)
JUNK = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        16,
        64,
        256,
        2**70,
        1.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "16",
        "gguf_",
        "GGUF",
    ),
    *([], {}, [16], {"convrot": True}, {"convrot": True, "convrot_groupsize": 16}, "gguf_" + "x" * 5000, "\ud800"),
)
MARKER_BYTES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 60_000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b'{"format":"\\ud800"}',
    b'{"format":' + b"[" * 900 + b"]" * 900 + b"}",
)


def random_tensor(rng, dtype, shape):
    values = torch.tensor([rng.uniform(-3, 3) for _ in range(64)]).repeat(4096)
    count = torch.Size(shape).numel()
    return values[:count].reshape(shape).to(dtype)


def marker_tensor(raw, dtype=torch.uint8):
    return torch.tensor(list(raw), dtype=torch.uint8).view(torch.uint8).to(dtype)


def correct_module(rng):
    """The tensors of a module in one of the layouts."""
    weight, scale = random_tensor(rng, torch.int8, (N, K)), random_tensor(rng, torch.float32, rng.choice(((), (N, 1))))
    kind = rng.randrange(6)
    if kind == 0:
        return {"wq": weight, "ws": random_tensor(rng, torch.float32, (N,)), "smooth": torch.ones(K)}
    if kind == 1:
        return {"weight": weight, "weight_scale": scale}
    if kind == 2:
        return {"weight": weight, "weight_scale": scale, "comfy_quant": marker(rng, "int8_tensorwise")}
    if kind == 3:
        fp8 = random_tensor(rng, rng.choice((torch.float8_e4m3fn, torch.uint8)), (N, K))
        return {"weight": fp8, "weight_scale": scale, "comfy_quant": marker(rng, "float8_e4m3fn")}
    if kind == 4:
        return {"weight": random_tensor(rng, torch.uint8, (4, 144)), "comfy_quant": marker(rng, "gguf_q4_k")}
    return {"weight": random_tensor(rng, torch.bfloat16, (N, K)), "bias": torch.ones(N)}


def marker(rng, name):
    return marker_tensor(json.dumps(marker_fields(rng, name)).encode())


def marker_fields(rng, name):
    fields = {"format": name}
    if rng.random() < 0.4:
        fields |= {"convrot": True, "convrot_groupsize": 16}
    if rng.random() < 0.15:
        place = rng.choice(("format", "convrot", "convrot_groupsize", "params", "other"))
        fields[place] = rng.choice((*JUNK, *FORMATS))
    return fields


def damage_module(rng, leaves):
    name = rng.choice(list(leaves))
    kind = rng.randrange(7)
    if kind == 0:
        leaves[name] = random_tensor(rng, rng.choice(DTYPES), tuple(leaves[name].shape))
    elif kind == 1:
        leaves[name] = random_tensor(rng, leaves[name].dtype, rng.choice(SHAPES))
    elif kind == 2:
        del leaves[name]
    elif kind == 3:
        leaves[rng.choice(LEAVES)] = leaves.pop(name)
    elif kind == 4:
        leaves[rng.choice(LEAVES)] = random_tensor(rng, rng.choice(DTYPES), rng.choice(SHAPES))
    elif kind == 5:
        raw = bytearray(json.dumps(marker_fields(rng, rng.choice(FORMATS))).encode())
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        leaves["comfy_quant"] = marker_tensor(raw)
    else:
        raw = rng.choice(MARKER_BYTES)
        leaves["comfy_quant"] = marker_tensor(raw, rng.choice((torch.uint8, torch.uint8, torch.int8, torch.float32)))


def random_metadata(rng, names):
    if rng.random() < 0.6:
        return None
    layers = {name: marker_fields(rng, rng.choice(FORMATS)) for name in names if rng.random() < 0.7}
    if rng.random() < 0.3:
        layers[rng.choice(("other", *names))] = rng.choice(JUNK)
    text = json.dumps(rng.choice(({"layers": layers}, {"layers": layers}, {"layers": rng.choice(JUNK)}, layers)))
    if rng.random() < 0.2:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(("", "[", "{", '"', "9" * 5000, "[" * 5000)) + text[place + 1 :]
    return {"_quantization_metadata": text}


def as_base(leaves):
    """What a base checkpoint holds for a module of the linears-only layout."""
    return {"weight": leaves["wq"].float() * leaves["ws"][:, None]} if "wq" in leaves else leaves


def random_file(rng, path, modules):
    prefixes = rng.choice((("",), ("",), ("model.diffusion_model.",), ("conditional.", "unconditional."), PREFIXES[:2]))
    names, tensors = [], {}
    for prefix in prefixes:
        for index, leaves in enumerate(modules):
            leaves = dict(leaves)
            for _ in range(rng.choice((0, 0, 1, 1, 2))):
                if leaves:
                    damage_module(rng, leaves)
            names.append(f"{prefix}layers.{index}.qkv")
            tensors |= {f"{names[-1]}.{leaf}" if leaf else names[-1]: tensor for leaf, tensor in leaves.items()}
        if rng.random() < 0.7:
            tensors[f"{prefix}norm.weight"] = torch.ones(K)
    if rng.random() < 0.1:
        tensors[rng.choice(PREFIXES) + "x_pad_token"] = random_tensor(rng, rng.choice(DTYPES), rng.choice(SHAPES))
    # Two names may be one object, which the library refuses to write.
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, random_metadata(rng, names))


def use_everything(path, branch, base):
    for key, weight in load_branch(path, branch, base).weights.items():
        if isinstance(weight, QuantizedWeight):
            assert weight.dequantize().shape == tuple(weight.shape), key


@pytest.mark.parametrize("seed", range(4))
def test_random_layout_loads_or_is_refused(tmp_path, seed):
    rng = random.Random(f"layouts {seed}")
    paths = [tmp_path / f"{name}.safetensors" for name in ("file", "other")]
    whole = {
        "layers.0.qkv.weight": torch.ones(N, K, dtype=torch.int8),
        "layers.0.qkv.weight_scale": torch.ones(1),
    }
    save_file(whole, paths[0])
    use_everything(paths[0], "conditional", None)  # starts torch's threads before memory is limited
    loaded, reasons = 0, set()
    for index in range(FILES_PER_SEED):
        modules = [correct_module(rng) for _ in range(rng.choice((1, 2)))]
        for path, held in zip(paths, (modules, [as_base(leaves) for leaves in modules]), strict=True):
            path.unlink(missing_ok=True)
            random_file(rng, path, held)
        base = rng.choice((None, None, paths[1], paths[0]))
        branch = rng.choice(("conditional", "unconditional"))
        try:
            with guard(sum(path.stat().st_size for path in paths)):
                use_everything(paths[0], branch, base)
            loaded += 1
        except CheckpointError as error:
            reasons.add(re.sub(r"\d+", "#", error.found)[:30])
            assert str(error).encode() and len(str(error)) < 900
        except BaseException:
            print(f"file {index} of seed {seed}")  # noqa: T201
            raise
    assert loaded > FILES_PER_SEED // 10, "some files are left whole"
    assert len(reasons) > 15, "the mutations reach many checks"
