"""The save nodes in the real host: what they write loads in stock nodes and in ours, and they behave at the canvas."""

import importlib
import json
import re

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from lowbit.convert.record import FragileLayer, write_fragility_report
from lowbit.tests.convert.making import spiky_record

BRANCHES = ("conditional", "unconditional")
INT8, GGUF = "Lowbit_SaveAsInt8", "Lowbit_SaveAsGguf"


@pytest.fixture(scope="module")
def convert(comfy_host):
    from lowbit.host import convert, files

    files.register_gguf_folder()
    return convert


@pytest.fixture
def folders(comfy_host, tmp_path, monkeypatch):
    """Sources in a folder of diffusion models, and an output folder of this test's own."""
    sources, output = tmp_path / "sources", tmp_path / "output"
    for folder in (sources, output):
        folder.mkdir()
    for branch in BRANCHES:
        small.save(sources / f"t_{branch}.safetensors", small.ideogram4(branch), torch.bfloat16)
    comfy_host.folder_paths.add_model_folder_path("diffusion_models", str(sources))
    monkeypatch.setattr(comfy_host.folder_paths, "output_directory", str(output))
    yield sources, output
    comfy_host.folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(sources))
    comfy_host.folder_paths.filename_list_cache.clear()


@pytest.fixture
def save(convert, folders):
    """Run a node's function with defaults; returns the file that it wrote."""

    def save(kind: str, filename: str = "out", **options):
        others = ("convrot", "smoothing_alpha", "policy", "policy_file", "architecture")
        extra = {k: options.pop(k) for k in others if k in options}
        request = {
            "checkpoint": "t_conditional.safetensors", "unconditional": "same file", "filename": filename,
            "branches": "one file each", "overwrite": False, "device": "cpu",
        } | options  # fmt: skip
        if kind == "int8":
            convert.save_as_int8(convert.SaveRequest(**request), **({"convrot": False, "smoothing_alpha": 0.5} | extra))
        else:
            convert.save_as_gguf(convert.SaveRequest(**request), **({"policy": "q8_0"} | extra))
        return folders[1] / "diffusion_models" / f"{filename}.{'safetensors' if kind == 'int8' else 'gguf'}"

    return save


@pytest.mark.parametrize("kind", ["plain", "convrot", "smoothed", "protected"])
def test_the_stock_loader_reads_our_int8(comfy_host, save, folders, kind):
    options = {
        "plain": {},
        "convrot": {"convrot": True},
        "smoothed": {"records": "record.safetensors"},
        "protected": {"reports": "report.json", "protect_count": 2},
    }[kind]
    spiky_record(folders[1] / "record.safetensors")
    fragile = ["layers.0.feed_forward.w2", "layers.1.feed_forward.w2"]
    write_fragility_report(folders[1] / "report.json", [FragileLayer(name, 1.0) for name in fragile])
    path = save("int8", **options)
    comfy_host.folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    try:
        (stock,) = comfy_host.nodes.UNETLoader().load_unet(path.name, "default")
    finally:
        comfy_host.folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(path.parent))
    layers = sum(quantized.is_quantized(parameter.data) for parameter in stock.model.parameters())
    assert layers == (8 if kind == "protected" else 10)
    # float32, so that only the two programs' INT8 products differ; the stock one quantizes activations, so ours does.
    stock = comfy_host.load_diffusion_model(path, dtype=torch.float32)
    ours = quantized.on_host_blocks(quantized.load(path, compute_mode="int8"))
    actual, expected = quantized.output(comfy_host, ours), quantized.output(comfy_host, stock)
    # A value halfway between two codes falls to either side: see test_saving.
    assert quantized.relative(actual, expected) < (0.05 if torch.cuda.is_available() else 2e-3)
    original = comfy_host.load_state_dict(small.ideogram4(), dtype=torch.float32)
    # The record is of no real activations: what it smooths by is worse for this model than nothing.
    bound = 0.2 if kind == "smoothed" else 0.05
    assert quantized.relative(actual, quantized.output(comfy_host, original)) < bound


@pytest.mark.parametrize("architecture", ["ideogram4", "lumina2"])
def test_folded_factors_do_not_change_the_host_s_model(comfy_host, architecture):
    """Powers of two, folded into every block that has room for them: the same output bit for bit, in float32."""
    from lowbit.convert.record import LayerActivations
    from lowbit.convert.smoothing import smoothing_factors
    from lowbit.convert.source import floats_of

    weights = {"ideogram4": small.ideogram4, "lumina2": small.lumina2}[architecture]()
    linears = small.block_linears(weights)
    record = {}
    for name in linears:
        K = weights[f"{name}.weight"].shape[1]
        absmax = torch.exp(1.5 * quantized.random_values(name.replace("w3", "w1"), K))
        record[name] = LayerActivations(absmax, absmax**2, 1.0)
    factors = smoothing_factors(weights, linears, record, 0.5)
    changed = dict(weights)
    everything = slice(0, None)
    for key, factor in factors.items():
        changed[key] = factor.apply(floats_of(weights[key], everything), everything).reshape(weights[key].shape)
        assert not torch.equal(changed[key], weights[key])
    assert {f"{name}.weight" for name in linears} <= factors.keys()
    outputs = []
    for state_dict in (weights, changed):
        model = comfy_host.load_state_dict(state_dict, dtype=torch.float32)
        if architecture == "ideogram4":
            outputs.append(quantized.output(comfy_host, model))
        else:
            x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
            context = comfy_host.conditioning(width=256, tokens=8)[0][0]
            outputs.append(comfy_host.apply_model(model, x, context=context, num_tokens=8))
    assert torch.isfinite(outputs[0]).all() and outputs[0].std() > 0.01
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["mps", "xpu", "privateuseone"])
def test_where_the_host_has_a_gpu_that_computes_no_conversion_the_cpu_does(
    comfy_host, convert, save, monkeypatch, kind
):
    monkeypatch.setattr(comfy_host.comfy.model_management, "get_torch_device", lambda: torch.device(kind))
    assert convert.ChosenDevice("default").device == torch.device("cpu")
    assert save("int8", device="default").is_file()


def test_lists_files_and_where_they_go(convert, save, folders):
    one = save("int8", "sub/both", unconditional="t_unconditional.safetensors", branches="one file for both")
    two = save("gguf", "two", unconditional="t_unconditional.safetensors", policy="q4_k")
    assert one.is_file() and two.is_file() and two.with_name("two_uncond.gguf").is_file()
    from lowbit.loaders.branch import open_branches

    assert open_branches(one).names == BRANCHES and open_branches(two).names == ("only",)


@pytest.mark.parametrize(
    "filename, written",
    [("n.gguf", "n"), ("n.GGUF", "n"), ("n.gguf.gguf", "n"), ("v1.5", "v1.5"), ("n.safetensors.gguf", "n.safetensors")],
)
def test_the_ending_appears_once(save, folders, filename, written):
    save("gguf", filename)
    assert [path.name for path in (folders[1] / "diffusion_models").iterdir()] == [f"{written}.gguf"]


@pytest.mark.parametrize("given, named", [("", "ideogram4"), (" my_model ", "my_model")])
def test_a_gguf_names_the_model_family_that_is_given_or_found(save, given, named):
    from lowbit.loaders.branch import load_branch

    metadata = load_branch(save("gguf", architecture=given), "only").metadata
    assert metadata["general.architecture"] == named


def test_what_is_remarked_stands_in_the_report_and_in_the_log(convert, save, folders, caplog):
    save("gguf", "q8").rename(folders[0] / "q8.gguf")
    request = convert.SaveRequest("q8.gguf", "same file", "out", "one file each", False, device="cpu")
    text = convert.save_as_int8(request, False, 0.5)
    assert text.startswith("q8.gguf is quantized already (gguf_q8_0): its errors stay") and "10 linear layers" in text
    assert [record.getMessage() for record in caplog.records if "already" in record.getMessage()] == [
        f"Lowbit: {text.splitlines()[0]}"
    ]


def test_an_int8_unet_that_the_stock_loader_would_misread_is_told(convert, save, folders):
    floats = {
        "conv_in.weight": torch.zeros(32, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.randn(256, 256),
    }  # fmt: skip
    small.save(folders[0] / "t_unet.safetensors", floats)
    request = convert.SaveRequest("t_unet.safetensors", "same file", "out", "one file each", False, device="cpu")
    text = convert.save_as_int8(request, False, 0.5)
    assert text.startswith("t_unet.safetensors has the names of the diffusers library") and "drops the scales" in text
    assert "diffusers" not in convert.save_as_gguf(request, "q8_0")


MODELS = {
    "aura": ("aura.mmdit.MMDiT", {"dim": 256, "n_heads": 1, "n_layers": 2, "n_double_layers": 1}),
    "cosmos": (
        "cosmos.predict2.MiniTrainDIT",
        {
            "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
            "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256, "num_blocks": 1, "num_heads": 2,
            "pos_emb_cls": "rope3d",
        },
    ),
    "hidream": (
        "hidream.model.HiDreamImageTransformer2DModel",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 128, "num_attention_heads": 2, "caption_channels": [64, 64], "text_emb_dim": 64,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128), "llama_layers": [0],
        },
    ),
    "hyvid": (
        "hunyuan_video.model.HunyuanVideo",
        {
            "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16,
            "vec_in_dim": 64, "axes_dim": [16, 56, 56], "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0,
            "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True,
            "guidance_embed": True, "byt5": False, "meanflow": False, "meanflow_sum": False,
            "use_cond_type_embedding": False, "vision_in_dim": None,
        },
    ),
    "ltxv": ("lightricks.model.LTXVModel", {"num_layers": 1}),
    "sd3": ("modules.diffusionmodules.mmdit.MMDiT", {"depth": 2, "input_size": None, "pos_embed_max_size": 16}),
    "sdxl": (
        "modules.diffusionmodules.openaimodel.UNetModel",
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
            "transformer_depth_middle": 1, "channel_mult": [1, 2, 4], "use_linear_in_transformer": True,
            "context_dim": 64, "num_classes": "sequential", "adm_in_channels": 64, "use_spatial_transformer": True,
            "legacy": False, "num_head_channels": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_host_s_models_have_the_names_of_files_in_circulation(comfy_host, name):
    import comfy.ops
    from lowbit.convert.gguf import architecture_of
    from lowbit.loaders.branch import Branch

    path, options = MODELS[name]
    module, _, kind = f"comfy.ldm.{path}".rpartition(".")
    model = getattr(importlib.import_module(module), kind)(
        **options, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    assert architecture_of(Branch("m", "only", model.state_dict(), {})) == name


def test_a_policy_file_in_the_output_folder(save, folders):
    policy = {"default": "Q4_K", "layers": {"*.w2": "Q8_0"}}
    (folders[1] / "policy.json").write_text(json.dumps(policy))
    from lowbit.loaders import open_checkpoint

    tensors = open_checkpoint(save("gguf", policy_file="policy.json")).tensors
    assert tensors["layers.0.feed_forward.w2.weight"].ggml_type == "Q8_0"
    assert tensors["layers.0.feed_forward.w1.weight"].ggml_type == "Q4_K"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"filename": "../../escaped"}, "lies outside ComfyUI's output folder"),
        ({"filename": "/tmp/escaped"}, "lies outside ComfyUI's output folder"),
        ({"filename": " "}, "filename: found none"),
        ({"filename": ".safetensors"}, "filename: found none"),
        ({"filename": "sub/"}, "filename: found none"),
        ({"filename": "name.gguf"}, "found the ending .gguf in name.gguf, expected .safetensors, or no ending at all"),
        ({"filename": "name.CKPT"}, "found the ending .ckpt in name.CKPT, expected .safetensors"),
        ({"records": "../secret.safetensors"}, "lies outside ComfyUI's output folder"),
        ({"records": "gone.safetensors"}, "no such file"),
        ({"reports": "gone.json"}, "cannot be read"),
        ({"protected": "w9"}, "'w9' fits no layer of t_conditional"),
        ({"checkpoint": "t_gone.safetensors"}, "not in models/diffusion_models any more"),
        ({"protect_count": 4}, "number of layers to protect: found 4 without a fragility report"),
        ({"smoothing_alpha": 0.6}, "alpha of smoothing: found 0.6 without an activation record"),
        ({"branches": "one file for both"}, "one file for both branches: found one branch in t_conditional"),
    ],
)
def test_refusals(comfy_host, save, folders, monkeypatch, options, text):
    """They change nothing: no folder is made, no model is moved off the GPU."""
    freed = []
    monkeypatch.setattr(comfy_host.comfy.model_management, "free_memory", lambda *arguments: freed.append(arguments))
    with pytest.raises((ValueError, FileNotFoundError), match=text) as refused:
        save("int8", **({"device": "default"} | options))
    assert type(refused.value) in (ValueError, FileNotFoundError), "a type that the page can show"
    assert not list(folders[1].iterdir()) and not freed
    # And what is not refused makes its folder, and its room on the device.
    assert save("int8", "sub/folder/name", device="default").is_file() and len(freed) == 1


def test_a_refused_comparison_moves_no_model_and_a_running_one_shows_its_progress(
    comfy_host, save, folders, monkeypatch
):
    from lowbit.host.verify import VerifyRequest, verify_files

    freed, seen = [], []
    path = save("int8")
    comfy_host.folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    monkeypatch.setattr(comfy_host.comfy.model_management, "free_memory", lambda *arguments: freed.append(arguments))
    monkeypatch.setattr(
        comfy_host.comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *rest, **r: seen.append((value, total))
    )
    try:
        request = VerifyRequest(
            path.name, "t_conditional.safetensors", source_unconditional="t_unconditional.safetensors"
        )
        with pytest.raises(ValueError, match="unconditional source: found no unconditional branch in out"):
            verify_files(request)
        assert not freed and not seen
        report, _ = verify_files(VerifyRequest(path.name, "t_conditional.safetensors"))
    finally:
        comfy_host.folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(path.parent))
    assert report.startswith("Nothing looks broken.") and len(freed) == 1 and seen[-1][0] == seen[-1][1] > 10**6


def test_nothing_is_overwritten_unasked(save):
    path = save("int8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out\.safetensors: exists already"):
        save("int8", convrot=True)
    assert path.read_bytes() == before
    save("int8", convrot=True, overwrite=True)
    assert path.read_bytes() != before


def test_sources_are_opened_once(save, monkeypatch):
    from lowbit.convert import source

    opened, real = [], source.open_branches
    monkeypatch.setattr(source, "open_branches", lambda path, *rest: opened.append(path) or real(path, *rest))
    save("int8", unconditional="t_unconditional.safetensors")
    assert len(opened) == 2


def test_diffusers_names_are_refused_with_a_way_out(comfy_host, save, folders, monkeypatch):
    """The host can load these floats, renaming and joining them; quantized ones it could not."""
    floats = {}
    for block in range(2):
        prefix = f"transformer_blocks.{block}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            floats[f"{prefix}.attn.{name}.weight"] = torch.zeros(256, 256)
        floats[f"{prefix}.norm1.linear.weight"] = torch.zeros(6 * 256, 256)
    floats |= {"x_embedder.weight": torch.zeros(256, 64), "context_embedder.weight": torch.zeros(256, 256)}
    floats |= {"proj_out.weight": torch.zeros(64, 256), "x_embedder.bias": torch.zeros(256)}
    small.save(folders[0] / "t_diffusers.safetensors", floats)
    freed = []
    monkeypatch.setattr(comfy_host.comfy.model_management, "free_memory", lambda *arguments: freed.append(arguments))
    with pytest.raises(ValueError, match=r"the names of the diffusers library.*save it with Save Model"):
        save("int8", checkpoint="t_diffusers.safetensors", device="default")
    assert not freed and not list(folders[1].iterdir())


def test_cancel_leaves_nothing_behind_and_the_bar_moves(comfy_host, save, folders, monkeypatch):
    management, values, cancel_at = comfy_host.comfy.model_management, [], []

    def hook(value, total, preview, node_id=None):
        values.append((value, total))
        if len(values) in cancel_at:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy_host.comfy.utils, "PROGRESS_BAR_HOOK", hook)
    path = save("gguf", policy="q4_k")
    assert values[-1][0] == values[-1][1] > 10**6 and len({total for _, total in values}) == 2
    path.unlink()
    for updates in (1, len(values) // 2):
        cancel_at[:] = [updates]
        values.clear()
        with pytest.raises(management.InterruptProcessingException):
            save("gguf", policy="q4_k")
        assert not list(path.parent.iterdir())


@pytest.fixture(scope="module")
def server(comfy_server):
    folder = comfy_server.base_directory / "models" / "diffusion_models"
    for branch in BRANCHES:
        small.save(folder / f"c_{branch}.safetensors", small.ideogram4(branch), torch.bfloat16)
    return comfy_server


def prompt(node: str, filename: str, **inputs) -> dict:
    shared = {
        "checkpoint": "c_conditional.safetensors", "unconditional": "c_unconditional.safetensors",
        "filename": filename, "branches": "one file for both", "overwrite": True,
    }  # fmt: skip
    return {"1": {"class_type": node, "inputs": shared | inputs}}


@pytest.mark.parametrize(
    "node, loader, suffix",
    [(INT8, "Lowbit_LoadDiffusionModelInt8", ".safetensors"), (GGUF, "Lowbit_LoadDiffusionModelGguf", ".gguf")],
)
def test_what_is_saved_is_found_and_loaded_by_the_loader_node(server, node, loader, suffix):
    """Over HTTP: the output folder is one of the host's own for diffusion models."""
    name, steps = f"c_saved{suffix}", []
    inputs = {"type": "q8_0"} if node == GGUF else {}
    outputs = server.queue(prompt(node, "c_saved", **inputs), on_progress=steps.append)
    (text,) = outputs["1"]["text"]
    assert re.search(rf"{name}: \d\.\d\d MB, 20 linear layers quantized", text) and text.splitlines()[-1].endswith(" s")
    assert any(step.node_id == "1" and step.maximum and step.value == step.maximum for step in steps)
    load = {
        "1": {
            "class_type": loader,
            "inputs": {"checkpoint": name, "unconditional": "same file", "compute_mode": "auto", "dtype": "default"},
        },
        "2": {"class_type": "Lowbit_InspectQuantizedModel", "inputs": {"model": ["1", 1]}},
    }
    (report,) = server.queue(load)["2"]["text"]
    assert ("int8" if node == INT8 else "gguf_q8_0") in report


@pytest.mark.parametrize("node", [INT8, GGUF, "Lowbit_VerifyQuantized"])
def test_a_node_runs_again_when_a_file_that_it_reads_was_replaced(server, node):
    """And only then. Its widgets are the same each time."""
    folder, output = server.base_directory / "models" / "diffusion_models", server.base_directory / "output"
    weights = {branch: folder / f"r_{branch}.safetensors" for branch in BRANCHES}
    sources = {branch: folder / f"r_source_{branch}.safetensors" for branch in BRANCHES}
    for paths in (weights, sources):
        for branch, path in paths.items():
            small.save(path, small.ideogram4(branch), torch.bfloat16)
    names = [path.name for path in weights.values()]
    if node == "Lowbit_VerifyQuantized":
        read = [*weights.values(), *sources.values()]
        inputs = dict(zip(("source", "source_unconditional"), (path.name for path in sources.values()), strict=True))
        asked = {"1": {"class_type": node, "inputs": {"checkpoint": names[0], "unconditional": names[1], **inputs}}}
    else:
        record, report, policy = output / "r_record.safetensors", output / "r_report.json", output / "r_policy.json"
        spiky_record(record)
        write_fragility_report(report, [FragileLayer("layers.0.feed_forward.w2", 1.0)])
        policy.write_text(json.dumps({"default": "Q4_K"}))
        inputs = {
            "activation_record": f"{record.name}, {record.name}",
            "fragility_report": f"{report.name},{report.name}",
        }
        if node == GGUF:
            inputs |= {"type": "q8_0", "policy_file": policy.name}
        asked = prompt(node, "r_saved", checkpoint=names[0], unconditional=names[1], **inputs)
        read = [*weights.values(), record, report, *([policy] if node == GGUF else [])]

    def executed() -> set[str]:
        steps = []
        server.queue(asked, on_progress=steps.append)
        return {step.node for step in steps}

    assert executed() == {node}
    for path in read:
        assert executed() == set(), path.name
        copy = path.with_name("r_new")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        assert executed() == {node}, path.name


def test_an_error_reaches_the_page(server):
    from host_harness.server import PromptError

    with pytest.raises(PromptError) as failed:
        server.queue(prompt(INT8, "../../c_escaped"))
    assert failed.value.node_type == INT8 and "lies outside ComfyUI's output folder" in failed.value.message
