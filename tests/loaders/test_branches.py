import pytest
from lowbit.loaders.branches import branch_of_name, split_branches
from lowbit.loaders.errors import CheckpointError

MODULES = ("layers.0.a.weight", "layers.0.b.weight", "llm_cond_proj.weight")


def two_branches(conditional="conditional.", unconditional="unconditional.", leave_out=()):
    keys = [conditional + key for key in MODULES] + [unconditional + key for key in MODULES]
    return {key: number for number, key in enumerate(keys) if key not in leave_out}


@pytest.mark.parametrize("prefixes", [("conditional.", "unconditional."), ("cond.", "uncond.")])
@pytest.mark.parametrize("model_prefix", ["", "model.diffusion_model."])
def test_both_branches_come_without_prefixes(prefixes, model_prefix):
    branches = split_branches("f", two_branches(*(prefix + model_prefix for prefix in prefixes)))
    assert list(branches) == ["conditional", "unconditional"]
    assert branches["conditional"] == dict(zip(MODULES, (0, 1, 2), strict=True))
    assert branches["unconditional"] == dict(zip(MODULES, (3, 4, 5), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_a_file_without_branches_is_one_branch(prefix):
    assert split_branches("f", {prefix + key: 0 for key in MODULES}) == {"only": dict.fromkeys(MODULES, 0)}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model."])
def test_what_lies_beside_the_diffusion_model_is_left_out(prefix):
    keys = [f"{prefix}{index}.weight" for index in range(6)]
    beside = ["first_stage_model.b.weight", "text_encoders.t5.model.c.weight", "0.weight"]
    expected = {key.removeprefix(prefix): key for key in keys}
    assert split_branches("f", {key: key for key in keys + beside}) == {"only": expected}


def test_a_few_keys_are_of_a_module_called_net():
    tensors = dict.fromkeys([f"net.{index}.weight" for index in range(5)] + ["layers.0.a.weight"], 0)
    assert split_branches("f", tensors) == {"only": tensors}


def test_how_an_sdxl_was_trained_stays_with_the_model():
    flags = dict.fromkeys(["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"], 1)
    tensors = {"model.diffusion_model.a.weight": 0, "first_stage_model.b.weight": 0, **flags}
    assert split_branches("f", tensors) == {"only": {"a.weight": 0, **flags}}


def test_branches_under_one_model_prefix():
    tensors = {"model.diffusion_model." + key: value for key, value in two_branches().items()}
    assert split_branches("f", {**tensors, "vae.weight": 0}) == split_branches("f", two_branches())


def test_a_module_called_cond_is_no_branch():
    keys = ("cond.proj.weight", "layers.0.a.weight")
    assert split_branches("f", dict.fromkeys(keys, 0)) == {"only": dict.fromkeys(keys, 0)}


def test_half_a_branch_is_refused():
    with pytest.raises(CheckpointError) as refused:
        split_branches("two.gguf", two_branches(leave_out=("unconditional.layers.0.b.weight",)))
    found = "half a branch: the unconditional one lacks 1 module of the conditional one, such as layers.0.b"
    assert str(refused.value).startswith(f"two.gguf: found {found}, expected")
    assert "download the file again or take another quantization of the model." in str(refused.value)


def test_the_unconditional_branch_may_lack_what_only_text_passes_through():
    tensors = two_branches(leave_out=("unconditional.llm_cond_proj.weight",))
    assert "llm_cond_proj.weight" not in split_branches("f", tensors)["unconditional"]
    with pytest.raises(CheckpointError, match="the conditional one lacks 1 module"):
        split_branches("f", two_branches(leave_out=("conditional.llm_cond_proj.weight",)))


def test_tensors_beside_two_branches_are_refused():
    with pytest.raises(CheckpointError, match="two branches and 1 tensor that belong to neither"):
        split_branches("f", {**two_branches(), "stray.weight": 0})


@pytest.mark.parametrize(
    "name, branch",
    [
        ("ideogram4-Q4_0.gguf", None),
        ("ideogram4_uncond-Q4_0.gguf", "unconditional"),
        ("ideogram4_unconditional-Q8_0.gguf", "unconditional"),
        ("Ideogram4-Conditional-Q8_0.gguf", "conditional"),
        ("second-order.gguf", None),
    ],
)
def test_branch_of_name(name, branch):
    assert branch_of_name(name) == branch
