"""Which layers someone may keep: by name, by part, by pattern, by report."""

import pytest
from lowbit.convert.policy import protected_layers
from lowbit.convert.record import FragileLayer, write_fragility_report
from lowbit.tests.convert.making import BLOCK_LINEARS, to_gguf, to_int8

NAMES = [f"layers.{i}.feed_forward.{w}" for i in (1, 10) for w in ("w1", "w2")]


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("layers.1.feed_forward.w2", {1}),
        ("feed_forward.w2", {1, 3}),
        ("layers.1", {0, 1}),
        ("layers.1.*", {0, 1}),
        ("layers.1*", {0, 1, 2, 3}),
        ("layers.1?.*.w[12]", {2, 3}),
        ("*.w2", {1, 3}),
    ],
)
def test_names_parts_and_patterns(entry, expected):
    assert protected_layers("m", NAMES, [entry]) == {NAMES[i] for i in expected}


@pytest.mark.parametrize("entry", ["w3", "layers.2", "W2", "*.W2", "w2", "ayers.1"])
def test_what_fits_nothing_is_refused_unless_it_is_a_part(entry):
    if entry == "w2":
        assert protected_layers("m", NAMES, [entry])
        return
    with pytest.raises(ValueError, match="fits no layer of m that would be quantized"):
        protected_layers("m", NAMES, [entry])


def test_the_first_layers_of_a_report_that_the_model_has():
    report = [FragileLayer(name, 9.0) for name in ("other.model", NAMES[3], NAMES[0], NAMES[1])]
    assert protected_layers("m", NAMES, [], report, 2) == {NAMES[3], NAMES[0]}
    assert protected_layers("m", NAMES, [NAMES[2]], report, 1) == {NAMES[3], NAMES[2]}
    assert protected_layers("m", NAMES, [], report, 0) == set()
    assert protected_layers("m", NAMES, [], report, 99) == {NAMES[3], NAMES[0], NAMES[1]}
    with pytest.raises(ValueError, match=r"none of its 1 layers, such as other\.model, is a layer of m"):
        protected_layers("m", NAMES, [], report[:1], 2)


def test_reports_and_lists_count_in_both_containers(tmp_path, fp8_files):
    write_fragility_report(tmp_path / "r.json", [FragileLayer(name, 1.0) for name in reversed(BLOCK_LINEARS)])
    options = {"reports": (str(tmp_path / "r.json"),), "protect_count": 3, "protected": ("layers.0.attention",)}
    for convert, name in ((to_int8, "m.safetensors"), (to_gguf, "m.gguf")):
        (written,) = convert(fp8_files["conditional"], tmp_path / name, **options)
        assert (written.quantized, written.protected) == (len(BLOCK_LINEARS) - 5, 5)
        assert "5 layers protected" in str(written)
