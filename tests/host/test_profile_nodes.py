"""Profiling in the real host: what samplers run is recorded, planted outliers come first, and nothing stays behind."""

import json

import pytest
import torch
from host_harness import graphs
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from lowbit.convert.record import branch_of_record, branch_of_report, read_activation_record, read_fragility_report

LOUD = "layers.1.feed_forward.w2"
BRANCHES = ("conditional", "unconditional")
BLOCK_LINEARS = small.block_linears(small.ideogram4())


@pytest.fixture
def profiling(comfy_host):
    from lowbit.host import profile_activations

    return profile_activations


def with_outliers(branch: str = "conditional", layer: str = LOUD, strength: float = 60.0) -> small.StateDict:
    """The small model with three loud inputs of one w2: w3's rows grow, w2's columns shrink, the function stays."""
    floats, block = small.ideogram4(branch), layer.removesuffix(".w2")
    loud = torch.randperm(512, generator=torch.Generator().manual_seed(1))[:3]
    for name, rows, factor in ((f"{block}.w3", True, strength), (f"{block}.w2", False, 1 / strength)):
        weight = floats[f"{name}.weight"].clone()
        (weight if rows else weight.t())[loud] *= factor
        floats[f"{name}.weight"] = weight
    return floats


def modules(model):
    return model.model.diffusion_model.modules()


def hooks(model) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(getattr(module, "observers", ()))
        for module in modules(model)
    )


def sample(host, model, negative=None, seed=0):
    return host.sample(model, negative, steps=2, width=128, height=128, seed=seed)


def request(profiling, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(profiling.folder_paths, "get_output_directory", lambda: str(tmp_path))
    return profiling.ReportRequest(**{"protect_count": 1, "measure": "spikiness", "filename_prefix": "p/m", **options})


LOADERS = {
    "stock": lambda host, folder: host.load_state_dict(with_outliers()),
    "stock_int8": lambda host, folder: host.load_state_dict(small.int8_native(with_outliers())),
    "int8": lambda host, folder: quantized.load(
        small.save(folder / "m.safetensors", small.int8_native(with_outliers())), "int8"
    ),
    "q4_k": lambda host, folder: quantized.load(
        small.write_gguf(
            folder / "m.gguf", with_outliers(), linear="Q4_K", modules=small.block_linears(with_outliers())
        )
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_planted_outliers_come_first_by_both_measures(comfy_host, profiling, tmp_path, monkeypatch, loader):
    model = LOADERS[loader](comfy_host, tmp_path)
    patched, _, profile = profiling.profile_models(model)
    sample(comfy_host, patched)
    found = profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    report, record = read_fragility_report(tmp_path / found.reports), read_activation_record(tmp_path / found.records)
    assert report[0].name == LOUD and report[0].spikiness > 5 * report[1].spikiness
    assert LOUD == min(report, key=lambda layer: layer.sqnr_db).name
    # Every linear layer, those of no block as well.
    assert record.keys() == {layer.name for layer in report} == set(small.linears(small.ideogram4()))
    assert f"protect   {LOUD}" in found.text and f"{found.records} and {found.reports}" in found.text
    assert (found.records, found.reports) == ("p/m_00001_record.safetensors", "p/m_00001_report.json")
    assert found.picture.shape[0] == 1 and found.picture.shape[3] == 3 and 0 <= found.picture.min() < 0.5
    assert found.picture.max() == 1


@pytest.mark.parametrize("loader", ["stock", "int8"])
def test_the_record_is_what_the_layers_have_read(comfy_host, profiling, tmp_path, loader):
    model = LOADERS[loader](comfy_host, tmp_path)
    patched, _, profile = profiling.profile_models(model)
    seen = {}
    for name, module in model.model.diffusion_model.named_modules():
        if hasattr(module, "in_features"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(name, []).append(args[0].detach().cpu().clone())
            )
    sample(comfy_host, patched)
    sample(comfy_host, patched, seed=1)  # a second prompt goes on
    record = profile.branches[0].recorder.activations()
    assert record.keys() == seen.keys()
    for name, calls in seen.items():
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in calls]).double()
        assert len(calls) == 4 == profile.branches[0].recorder.layers[name].calls
        assert torch.equal(record[name].absmax.double(), rows.abs().amax(dim=0))
        torch.testing.assert_close(record[name].mean_square.double(), rows.square().mean(dim=0), rtol=1e-4, atol=0)
        sampled = {tuple(row.tolist()) for row in profile.branches[0].recorder.layers[name].sample.cpu()}
        assert sampled <= {tuple(row.tolist()) for row in rows.to(torch.bfloat16)}


@pytest.mark.parametrize("loader", ["stock", "int8", "q4_k"])
def test_the_profiled_model_computes_the_same_and_the_original_is_left_alone(comfy_host, profiling, tmp_path, loader):
    model = LOADERS[loader](comfy_host, tmp_path)
    before = sample(comfy_host, model)
    patched, _, profile = profiling.profile_models(model)
    during = sample(comfy_host, patched)
    (branch,) = profile.branches
    calls = branch.recorder.layers[LOUD].calls
    assert calls == 2 and hooks(model) == 0
    assert torch.equal(sample(comfy_host, model), before)
    assert branch.recorder.layers[LOUD].calls == calls
    assert torch.equal(during, before)


@pytest.mark.triton
def test_fused_blocks_stay_fused_while_their_layers_are_recorded(comfy_host, profiling, tmp_path, monkeypatch):
    from lowbit.host import fused_block

    model = LOADERS["int8"](comfy_host, tmp_path)
    patched, _, profile = profiling.profile_models(model)
    kept, original = [], fused_block.swiglu_quantize

    def counted(*arguments):
        kept.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(fused_block, "swiglu_quantize", counted)
    sample(comfy_host, patched)
    assert kept == [True] * 4  # two layers, two steps, and the floats beside the codes
    assert {layer.calls for layer in profile.branches[0].recorder.layers.values()} == {2}
    sample(comfy_host, model)
    assert kept[4:] == [False] * 4


@pytest.mark.parametrize("loader", ["stock", "int8"])
def test_a_run_that_fails_leaves_no_hooks(comfy_host, profiling, tmp_path, loader):
    model = LOADERS[loader](comfy_host, tmp_path)
    patched, _, _ = profiling.profile_models(model)

    def cancel(*args):
        assert hooks(model) > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comfy_host.sample(patched, steps=2, width=128, height=128, callback=cancel)
    assert hooks(model) == 0


@pytest.mark.parametrize("loader", ["stock", "int8"])
def test_the_stock_compile_node_does_not_compile_the_recorder(comfy_host, profiling, tmp_path, recwarn, loader):
    import torch._dynamo

    model = LOADERS[loader](comfy_host, tmp_path)
    compile_node = comfy_host.module("comfy_extras.nodes_torch_compile").TorchCompileModel
    torch._dynamo.reset()
    patched, _, profile = profiling.profile_models(compile_node.execute(model, "eager").result[0])
    sample(comfy_host, patched)
    torch._dynamo.reset()
    assert not any("lru_cache" in str(warning.message) for warning in recwarn)  # of `_draw`, where it is traced
    assert {layer.calls for layer in profile.branches[0].recorder.layers.values()} == {2}


def test_each_branch_has_a_record_of_its_own(comfy_host, profiling, tmp_path, monkeypatch):
    model = comfy_host.load_state_dict(with_outliers())
    negative = comfy_host.load_state_dict(with_outliers("unconditional", "layers.0.feed_forward.w2"))
    patched, patched_negative, profile = profiling.profile_models(model, negative)
    sample(comfy_host, patched, patched_negative)
    assert hooks(model) == hooks(negative) == 0
    found = profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    reports = [read_fragility_report(tmp_path / path) for path in found.reports.split(", ")]
    assert [report[0].name for report in reports] == [LOUD, "layers.0.feed_forward.w2"]
    records = [read_activation_record(tmp_path / path) for path in found.records.split(", ")]
    assert records[0].keys() - records[1].keys() == {"llm_cond_proj"}  # which the unconditional branch never runs
    assert found.records == "p/m_00001_record.safetensors, p/m_00001_record_uncond.safetensors"
    branches = ["conditional", "unconditional"]
    assert [branch_of_record(tmp_path / path) for path in found.records.split(", ")] == branches
    assert [branch_of_report(tmp_path / path) for path in found.reports.split(", ")] == branches
    again = profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    assert again.reports == "p/m_00002_report.json, p/m_00002_report_uncond.json"


def test_one_weight_set_for_both_has_one_record(comfy_host, profiling):
    model = comfy_host.load_state_dict(small.ideogram4())
    patched, negative, profile = profiling.profile_models(model, model.clone())
    sample(comfy_host, patched, negative)
    (branch,) = profile.branches
    assert branch.recorder.layers["layers.0.attention.o"].calls == 4  # two steps of two calls, each counted once
    assert hooks(model) == 0
    alone, same, _ = profiling.profile_models(model)
    assert alone is same


def test_loras_hooks_and_compilation_behind_the_node_are_recorded_too(comfy_host, profiling, tmp_path):
    from lowbit.host.compile import compile_model

    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    patched, _, profile = profiling.profile_models(compile_model(model, "eager"))
    layers = profile.branches[0].recorder.layers
    sample(comfy_host, compile_model(model, "eager"))  # compiled without hooks before
    sample(comfy_host, patched)
    assert layers[LOUD].calls == 2
    sample(comfy_host, quantized.add_lora(comfy_host, patched, quantized.lora()))
    assert layers[LOUD].calls == 4
    group = comfy_host.module("comfy.hooks").create_hook_lora(quantized.lora(), 1.0, 0.0)
    ((features, extra),) = comfy_host.conditioning(tokens=8)
    comfy_host.sample(patched, positive=[[features, extra | {"hooks": group}]], steps=1, width=128, height=128)
    assert layers[LOUD].calls > 4 and hooks(model) == 0


def test_another_architecture(comfy_host, profiling, tmp_path, monkeypatch):
    patched, _, profile = profiling.profile_models(comfy_host.load_state_dict(small.flux()))
    positive = comfy_host.conditioning(256, pooled_width=64)
    comfy_host.sample(patched, positive=positive, steps=1, width=128, height=128)
    found = profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    assert read_activation_record(tmp_path / found.records).keys() == set(small.linears(small.flux()))


def test_a_branch_that_was_not_sampled_is_named_and_nothing_is_written(comfy_host, profiling, tmp_path, monkeypatch):
    models = [comfy_host.load_state_dict(small.ideogram4(branch)) for branch in BRANCHES]
    patched, negative, profile = profiling.profile_models(*models)
    comfy_host.sample(patched, negative, steps=1, width=128, height=128, cfg=1.0)
    with pytest.raises(ValueError, match="no sampler has run the model_negative that came out of Profile Activations"):
        profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    assert not list(tmp_path.rglob("*.*"))


def test_errors_are_sentences(comfy_host, profiling, tmp_path, monkeypatch):
    _, _, profile = profiling.profile_models(comfy_host.load_state_dict(small.ideogram4()))
    with pytest.raises(ValueError, match="The record is empty: no sampler has run the model"):
        profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch))
    for prefix, expected in {
        "../elsewhere/m": "expected a name inside the output folder",
        "  ": "expected a name inside the output folder",
        "a, b": "expected a name without commas",
    }.items():
        with pytest.raises(ValueError, match=expected):
            profiling.fragility_report(profile, request(profiling, tmp_path, monkeypatch, filename_prefix=prefix))


# The nodes, over HTTP


@pytest.fixture(scope="module")
def files(comfy_server):
    names, folder = small.write_stand_ins(comfy_server.base_directory), comfy_server.base_directory / "models"
    for branch in BRANCHES:
        names[branch] = f"loud_{branch}.safetensors"
        small.save(folder / "diffusion_models" / names[branch], with_outliers(branch), torch.bfloat16)
    return names


def profiled_graph(files, seed=0):
    prompt = graphs.stock_ideogram4(files, text=None, seed=seed)
    prompt = graphs.rewired(prompt, {("model", 0): ("profile", 0), ("model_negative", 0): ("profile", 1)})
    prompt["profile"] = graphs.node(
        "Lowbit_ProfileActivations", model=["model", 0], model_negative=["model_negative", 0]
    )
    prompt["report"] = graphs.node(
        "Lowbit_FragilityReport",
        record=["profile", 2],
        after=["decode", 0],
        protect_count=1,
        measure="spikiness",
        filename_prefix="lowbit/profile",
    )
    prompt["save"]["inputs"]["images"] = ["report", 0]
    return prompt


def test_from_profile_to_a_verified_file(comfy_server, files):
    """Sample, report, convert with what was recorded, and check the result: three prompts as a user runs them."""
    output = comfy_server.base_directory / "output"
    shown = comfy_server.queue(profiled_graph(files))
    text = shown["report"]["text"][0]
    assert text.count(f"protect   {LOUD}") == 2 and "model_negative: 18 linear layers, 2 calls" in text
    assert any(path.suffix == ".png" and path.exists() for path in comfy_server.files({"report": shown["report"]}))

    # A second prompt on the same record; the conversion reads what the report has written.
    prompt = profiled_graph(files, seed=1)
    prompt["convert"] = graphs.node(
        "Lowbit_SaveAsInt8",
        checkpoint=files["conditional"],
        unconditional=files["unconditional"],
        filename="profiled",
        branches="one file for both",
        overwrite=True,
        activation_record=["report", 3],
        fragility_report=["report", 4],
        protect_count=1,
    )
    shown = comfy_server.queue(prompt)
    assert "2 layers protected" in shown["convert"]["text"][0]
    with open(output / "lowbit" / "profile_00002_report_uncond.json", encoding="utf-8") as file:
        assert json.load(file)["calls"] == 4

    verify = graphs.node(
        "Lowbit_VerifyQuantized",
        checkpoint="profiled.safetensors",
        source=files["conditional"],
        source_unconditional=files["unconditional"],
    )
    shown = comfy_server.queue({"verify": verify})
    assert shown["verify"]["text"][0].startswith("Nothing looks broken.")
    assert comfy_server.files(shown)[0].read_bytes().startswith(b"\x89PNG")


def test_verify_names_a_damaged_file_and_refuses_what_cannot_be_compared(comfy_server, files):
    from host_harness.server import PromptError

    folder = comfy_server.base_directory / "models" / "diffusion_models"
    stored = small.int8_native(with_outliers())
    stored["layers.0.attention.o.weight_scale"][:] = float("nan")
    small.save(folder / "damaged_int8.safetensors", stored)
    verify = graphs.node("Lowbit_VerifyQuantized", checkpoint="damaged_int8.safetensors", source=files["conditional"])
    text = comfy_server.queue({"verify": verify})["verify"]["text"][0]
    assert text.startswith("LOOKS BROKEN: 1 of 42 tensors.") and "<- NaN or infinity" in text

    small.save(folder / "half.safetensors", small.int8_transformer_lab({b: small.ideogram4(b) for b in BRANCHES}))
    verify["inputs"]["checkpoint"] = "half.safetensors"
    with pytest.raises(PromptError) as failed:
        comfy_server.queue({"verify": verify})
    assert "found no unconditional branch, expected the branches of half.safetensors" in failed.value.message


def test_a_report_without_a_sampled_model(comfy_server, files):
    from host_harness.server import PromptError

    prompt = profiled_graph(files)
    prompt = graphs.rewired(prompt, {("profile", 0): ("model", 0), ("profile", 1): ("model_negative", 0)})
    with pytest.raises(PromptError) as failed:
        comfy_server.queue(prompt)
    assert failed.value.node_type == "Lowbit_FragilityReport"
    assert failed.value.message.startswith("The record is empty: no sampler has run the model")
