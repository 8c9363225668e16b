"""Sound files of every layout pass, damaged ones are named, and both against their source in all arrangements."""

import re

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from lowbit.evaluation import verify_report
from lowbit.evaluation.metrics import EXACT_DB
from lowbit.evaluation.pairs import Files
from lowbit.evaluation.picture import draw
from lowbit.evaluation.verify import FLOORS_DB, verify
from lowbit.loaders import CheckpointError
from lowbit.tests.convert import making
from safetensors.torch import load_file, save_file

BRANCHES = making.BRANCHES
FLOATS = {branch: small.ideogram4(branch) for branch in BRANCHES}
W2 = "layers.1.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {branch: small.save(folder / f"{branch}.safetensors", FLOATS[branch]) for branch in BRANCHES}


def int8_file(path, **options):
    return small.save(path.with_suffix(".safetensors"), small.int8_native(FLOATS["conditional"], **options))


def gguf_file(path, ggml_type):
    return small.write_gguf(path.with_suffix(".gguf"), FLOATS["conditional"], linear=ggml_type, every_weight=True)


# What normally distributed weights give, in dB: a floor has to lie well below it.
LAYOUTS = {
    "int8": (int8_file, {}, 42),
    "int8_per_tensor": (int8_file, {"per_channel": False}, 38),
    "int8_rotated": (int8_file, {"convrot": True}, 42),
    "int8_smooth": (lambda path: small.save(path, quantized.int8_smooth(FLOATS["conditional"])), {}, 35),
    "fp8": (lambda path: small.save(path, small.fp8_official(FLOATS["conditional"])), {}, 31),
    **{
        name: (gguf_file, {"ggml_type": name}, db)
        for name, db in {"Q8_0": 45, "Q5_1": 28, "Q5_0": 27, "Q4_K": 22, "Q4_1": 21, "Q4_0": 21}.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_files_pass_with_room_to_spare(tmp_path, sources, layout):
    write, options, expected_db = LAYOUTS[layout]
    path = write(tmp_path / "file.safetensors", **options)
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    assert not check.broken and len(check.tensors) == len(FLOATS["conditional"])
    stored = [tensor for tensor in check.tensors if tensor.format.startswith(("int8", "fp8", "gguf"))]
    worst = min(tensor.sqnr_db for tensor in stored if not (tensor.format == "gguf_q8_0" and layout != "Q8_0"))
    assert expected_db <= worst < expected_db + 4
    floor = next(floor for name, floor in FLOORS_DB.items() if stored[0].format.startswith(name))
    assert floor < worst - 7
    assert "Nothing looks broken." in verify_report.text([check])


def test_the_number_is_that_of_a_direct_computation(tmp_path, sources):
    path = int8_file(tmp_path / "a", convrot=True)
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    meant = making.floats_of(path)
    for tensor in check.tensors:
        if tensor.sqnr_db < EXACT_DB:
            expected = making.sqnr_db(FLOATS["conditional"][tensor.name], meant[tensor.name])
            assert tensor.sqnr_db == pytest.approx(expected, abs=0.01)
        else:
            assert torch.equal(meant[tensor.name], FLOATS["conditional"][tensor.name])
    assert [t.sqnr_db for t in check.tensors] == sorted(t.sqnr_db for t in check.tensors)


def damaged(path, sources, change):
    """A sound INT8 file after `change` of its stored tensors, checked."""
    stored = load_file(int8_file(path))
    change(stored)
    save_file(stored, path.with_suffix(".safetensors"), {"format": "pt"})
    (check,) = verify(Files(str(path.with_suffix(".safetensors")), str(sources["conditional"])))
    return check


DAMAGES = {
    "NaN or infinity": lambda t: t[f"{W2}_scale"][3].fill_(float("nan")),
    "all zero": lambda t: t[W2].zero_(),
    "missing in the quantized file": lambda t: [t.pop(key) for key in [k for k in t if k.startswith(W2[:-7])]],
    "shape [128, 512], in the source [256, 512]": lambda t: t.update(
        {W2: t[W2][:128].clone(), f"{W2}_scale": t[f"{W2}_scale"][:128].clone()}
    ),
    "expected at least 24 for int8": lambda t: t[f"{W2}_scale"].mul_(1.5),
    "dB, expected at least 24": lambda t: t[W2].copy_(t[W2].flip(0)),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_damage_is_named_and_nothing_else_is(tmp_path, sources, problem):
    check = damaged(tmp_path / "damaged", sources, DAMAGES[problem])
    (tensor,) = check.broken
    assert tensor.name == W2 and problem in tensor.problems[0]
    assert check.tensors[0] is tensor
    text = verify_report.text([check])
    assert (
        text.startswith(f"LOOKS BROKEN: 1 of {len(FLOATS['conditional'])} tensors.")
        and f"<- {tensor.problems[0]}" in text
    )
    (panel,) = verify_report.panels([check])
    assert panel.framed == {("layers.N.feed_forward.w2", 1)}
    assert min(panel.values, key=panel.values.get) == ("layers.N.feed_forward.w2", 1)
    assert draw([panel]).width > 300


def test_a_tensor_that_the_source_lacks(tmp_path, sources):
    check = damaged(tmp_path / "a", sources, lambda t: t.update({"layers.9.ffn_norm1.weight": torch.ones(256)}))
    assert [(t.name, t.problems) for t in check.broken] == [("layers.9.ffn_norm1.weight", ("not in the source",))]


def test_a_broken_source_is_told_apart(tmp_path):
    floats = dict(FLOATS["conditional"])
    floats[W2] = floats[W2].clone()
    floats[W2][0, 0] = float("inf")
    source = small.save(tmp_path / "source.safetensors", floats)
    (check,) = verify(Files(str(int8_file(tmp_path / "a")), str(source)))
    assert [t.problems for t in check.broken] == [("the source has NaN or infinity",)]


@pytest.mark.parametrize("rotate", [False, True])
def test_smoothing_folded_into_weights_is_found_again(tmp_path, rotate):
    source = making.fp8(tmp_path)
    record = making.spiky_record(tmp_path / "record.safetensors")
    making.to_int8(source, tmp_path / "out.safetensors", rotate=rotate, records=(str(record),))
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(source)))
    assert not check.broken and check.smoothed == 14  # two norms and five linears of two blocks
    # Factors of a wide spread leave a row's largest values far above the others, which rotation mends.
    worst = min(t.sqnr_db for t in check.tensors if t.format.startswith("int8"))
    assert 42 < worst < 44 if rotate else 33 < worst < 36
    assert all(t.sqnr_db == EXACT_DB for t in check.tensors if "norm1" in t.name)
    assert "Smoothing is folded into 14 weights" in verify_report.text([check])


def test_smoothing_that_its_reader_does_not_know_of_is_broken(tmp_path):
    """Norms divided as smoothing does, without the columns that make up for it."""
    source = making.fp8(tmp_path)
    making.to_int8(source, tmp_path / "out.safetensors")
    stored = load_file(tmp_path / "out.safetensors")
    stored["layers.0.ffn_norm1.weight"][::2] /= 4
    save_file(stored, tmp_path / "wrong.safetensors", {"format": "pt"})
    (check,) = verify(Files(str(tmp_path / "wrong.safetensors"), str(source)))
    broken = {t.name.removeprefix("layers.0.feed_forward.") for t in check.broken}
    assert {"w1.weight", "w3.weight"} <= broken <= {"w1.weight", "w2.weight", "w3.weight"}


# Arrangements of branches and files


def two_branches(path, sources):
    return str(small.write_gguf(path, {"cond.": FLOATS["conditional"], "uncond.": FLOATS["unconditional"]}))


def test_two_branches_in_one_file_against_two_files(tmp_path, sources):
    path = two_branches(tmp_path / "both.gguf", sources)
    checks = verify(Files(path, str(sources["conditional"]), None, str(sources["unconditional"])))
    assert [check.name for check in checks] == list(BRANCHES) and not any(check.broken for check in checks)
    with pytest.raises(CheckpointError, match="found no unconditional branch, expected the branches of both"):
        verify(Files(path, str(sources["conditional"])))


def test_another_branch_is_told_from_damage(tmp_path, sources):
    """One sentence instead of a table of nonsense: norms of two branches that differ look like smoothing."""
    path = two_branches(tmp_path / "both.gguf", sources)
    swapped = verify(Files(path, str(sources["unconditional"]), None, str(sources["conditional"])))
    assert all(check.foreign and not check.smoothed and len(check.broken) > 30 for check in swapped)
    lines = verify_report.text(swapped).splitlines()
    for line, branch, other in zip(lines[:2], BRANCHES, reversed(BRANCHES), strict=True):
        assert re.match(
            rf"NOT MADE FROM THIS SOURCE: 19 quantized weights of both\.gguf, {branch} branch are not those of "
            rf"{other}\.safetensors \(median -[23]\.\d dB\)\. The files seem to belong to different models or branches"
            r": compare it with the file that it was made from\. If this is that file",
            line,
        )
    assert "Smoothing" not in "".join(lines) and "worst first" not in "".join(lines) and len(lines) < 20


@pytest.mark.parametrize("layout", ["int8", "int8_smooth", "fp8", "Q4_0"])
def test_another_model_of_the_same_shapes_is_told_from_damage(tmp_path, layout):
    write, options, _ = LAYOUTS[layout]
    path = write(tmp_path / "file.safetensors", **options)
    source = small.save(tmp_path / "source.safetensors", small.ideogram4(seed=1))
    (check,) = verify(Files(str(path), str(source)))
    assert check.foreign and verify_report.text([check]).startswith("NOT MADE FROM THIS SOURCE: ")


def test_a_smoothed_file_against_another_branch(tmp_path):
    record = making.spiky_record(tmp_path / "record.safetensors")
    making.to_int8(making.fp8(tmp_path), tmp_path / "out.safetensors", records=(str(record),))
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(making.fp8(tmp_path, "unconditional"))))
    assert check.foreign and not check.smoothed


def test_unquantized_files_of_two_branches(sources):
    (check,) = verify(Files(str(sources["conditional"]), str(sources["unconditional"])))
    assert len(check.foreign) == 20 and not check.smoothed
    text = verify_report.text([check])
    assert text.startswith(
        "NOT MADE FROM THIS SOURCE: 20 weights of conditional.safetensors, conditional branch are not"
    )
    assert "different models or branches" in text and "Smoothing" not in text and "worst first" not in text
    (same,) = verify(Files(str(sources["conditional"]), str(sources["conditional"])))
    assert not same.foreign and verify_report.text([same]).startswith("Nothing looks broken.")


def test_another_model_is_refused_and_a_file_that_lacks_weights_is_not(tmp_path, sources):
    larger = small.ideogram4(size=small.Ideogram4Size(heads=4, ffn=1024))
    for name, floats, found in (("flux", small.flux(), "0 of 52"), ("larger", larger, "7 of 42")):
        path = small.write_gguf(tmp_path / f"{name}.gguf", floats)
        text = (
            rf"{name}\.gguf: found {found} weights with a name and shape that conditional\.safetensors has too.*another"
        )
        with pytest.raises(CheckpointError, match=text):
            verify(Files(str(path), str(sources["conditional"])))
    few = {name: FLOATS["conditional"][name] for name in (W2, "adaln_proj.weight", "layers.0.ffn_norm1.weight")}
    (check,) = verify(Files(str(small.save(tmp_path / "few.safetensors", few)), str(sources["conditional"])))
    assert {t.problems for t in check.broken} == {("missing in the quantized file",)} and len(check.broken) == 39


def test_a_few_bad_weights_or_empty_ones_are_damage(tmp_path, sources):
    def most_scaled(stored):
        for name in making.BLOCK_LINEARS[:-2]:
            stored[f"{name}.weight_scale"].mul_(1.5)

    def all_zero(stored):
        for name in making.BLOCK_LINEARS:
            stored[f"{name}.weight"].zero_()

    for change, count in ((most_scaled, 8), (all_zero, 10)):
        check = damaged(tmp_path / change.__name__, sources, change)
        assert not check.foreign and len(check.broken) == count
        assert verify_report.text([check]).startswith(f"LOOKS BROKEN: {count} of ")


def test_a_source_of_a_branch_that_is_not_compared_is_refused(tmp_path, sources):
    path = small.write_gguf(tmp_path / "m.gguf", FLOATS["conditional"])
    with pytest.raises(ValueError, match=r"unconditional source: found no unconditional branch in m\.gguf to compare"):
        verify(Files(str(path), str(sources["conditional"]), None, str(sources["unconditional"])))


def test_two_files_against_two_branches_in_one_and_against_two_files(tmp_path, sources):
    paths = [
        str(small.write_gguf(tmp_path / f"{name}.gguf", FLOATS[branch]))
        for name, branch in (("m", "conditional"), ("m_uncond", "unconditional"))
    ]
    both = two_branches(tmp_path / "both.gguf", sources)
    for files in (
        Files(paths[0], both, paths[1]),
        Files(paths[0], str(sources["conditional"]), paths[1], str(sources["unconditional"])),
    ):
        assert [check.name for check in verify(files) if not check.broken] == list(BRANCHES)
    (alone,) = verify(Files(paths[1], both))  # its name says which branch it is
    assert not alone.broken
    (other,) = verify(Files(paths[0], both))  # and a name that says nothing stands for the conditional one
    assert not other.broken and (alone.name, other.name) == ("unconditional", "conditional")


@pytest.mark.parametrize("smooth", [None, "divide", "multiply"])
def test_linears_alone_take_the_rest_from_their_source(tmp_path, sources, smooth):
    path = small.save(tmp_path / "tl.safetensors", small.int8_transformer_lab(FLOATS, smooth=smooth))
    checks = verify(Files(str(path), str(sources["conditional"]), None, str(sources["unconditional"])))
    assert len(checks) == 2
    for check in checks:
        assert not check.broken and check.linears_only
        assert "The file holds linear layers alone" in verify_report.text([check])
        kinds = {tensor.name: tensor.format for tensor in check.tensors}
        assert kinds["input_proj.weight"].startswith("int8") and kinds[W2] == "bf16"


def test_an_unconditional_branch_may_lack_what_only_text_needs(tmp_path, sources):
    floats = {key: value for key, value in FLOATS["unconditional"].items() if not key.startswith("llm_cond")}
    both = small.write_gguf(tmp_path / "both.gguf", {"cond.": FLOATS["conditional"], "uncond.": floats})
    checks = verify(Files(str(both), str(sources["conditional"]), None, str(sources["unconditional"])))
    assert not any(check.broken for check in checks)
    alone = small.write_gguf(tmp_path / "m_uncond.gguf", floats)
    assert not verify(Files(str(alone), str(sources["unconditional"])))[0].broken
    (wrong,) = verify(Files(str(small.write_gguf(tmp_path / "m.gguf", floats)), str(sources["conditional"])))
    assert ("llm_cond_norm.weight", ("missing in the quantized file",)) in [(t.name, t.problems) for t in wrong.broken]


def test_progress_counts_the_bytes_of_the_quantized_file(tmp_path, sources):
    heard = []
    verify(Files(str(int8_file(tmp_path / "a")), str(sources["conditional"])), "cpu", heard.append)
    assert [p.done_bytes for p in heard] == sorted(p.done_bytes for p in heard)
    assert heard[-1].done_bytes == heard[-1].total_bytes > 1_000_000 and {p.stage for p in heard} == {"comparing"}
