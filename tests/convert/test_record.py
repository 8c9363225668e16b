"""The activation record and the fragility report: what goes in comes out, and anything else is refused with a
sentence."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit.convert.record import (
    FragileLayer,
    LayerActivations,
    read_activation_record,
    read_fragility_report,
    write_activation_record,
    write_fragility_report,
)
from lowbit.loaders import CheckpointError
from safetensors import safe_open
from safetensors.torch import save_file

RECORD = {"format": "lowbit_activation_record", "version": "1"}
REPORT = {"format": "lowbit_fragility_report", "version": 1}
any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

magnitudes = st.floats(0, 2.0**100, width=32)
channels = st.integers(1, 40)


@st.composite
def layer(draw):
    K = draw(channels)
    vectors = [torch.tensor(draw(st.lists(magnitudes, min_size=K, max_size=K))) for _ in range(2)]
    return LayerActivations(*vectors, draw(magnitudes))


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
    lambda name: name != "__metadata__"
)


@any_folder
@given(layers=st.dictionaries(names, layer(), min_size=1, max_size=4))
def test_a_record_comes_back(tmp_path_factory, layers):
    path = tmp_path_factory.getbasetemp() / "record.safetensors"
    write_activation_record(path, layers, {"steps": "20"}, overwrite=True)
    got = read_activation_record(path)
    assert got.keys() == layers.keys()
    for name, expected in layers.items():
        assert torch.equal(got[name].absmax, expected.absmax)
        assert torch.equal(got[name].mean_square, expected.mean_square)
        assert got[name].spikiness == expected.spikiness
    with safe_open(path, "pt") as file:
        assert file.metadata() == {**RECORD, "steps": "20"} and len(file.keys()) == 3 * len(layers)


@any_folder
@given(data=st.data())
def test_a_record_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    layers = {name: LayerActivations(torch.ones(3), torch.ones(3), 2.0) for name in ("a.b", "c")}
    write_activation_record(path, layers, overwrite=True)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        got = read_activation_record(path)
    except CheckpointError as error:
        assert str(error).startswith("changed.safetensors: found ") and ", expected " in str(error)
        return
    for each in got.values():
        for vector in (each.absmax, each.mean_square):
            assert vector.shape == (each.absmax.shape[0],) and torch.isfinite(vector).all() and (vector >= 0).all()


def good() -> dict[str, torch.Tensor]:
    return {"m.absmax": torch.ones(4), "m.mean_square": torch.ones(4), "m.spikiness": torch.ones(1)}


@pytest.mark.parametrize(
    "change, metadata, text",
    [
        ({}, {"format": "pt"}, "found a safetensors file of the format 'pt', expected an activation record"),
        ({}, None, "found a safetensors file of the format None"),
        ({}, RECORD | {"version": "2"}, "found version '2', expected version 1"),
        ({"m.absmax": None}, RECORD, r"found no 'm\.absmax'"),
        ({"m.absmax": torch.ones(5)}, RECORD, "found the shapes"),
        ({"m.spikiness": torch.ones(2)}, RECORD, "found the shapes"),
        ({"m.absmax": torch.ones(4, dtype=torch.float16)}, RECORD, r"the tensor 'm\.absmax' of torch\.float16"),
        ({"m.absmax": torch.ones(2, 2)}, RECORD, r"expected <module>\.<absmax\|mean_square\|spikiness>"),
        ({"m.weight": torch.ones(4)}, RECORD, r"the tensor 'm\.weight'"),
        ({"absmax": torch.ones(4)}, RECORD, "the tensor 'absmax'"),
        ({"m.mean_square": torch.tensor([1.0, -1, 1, 1])}, RECORD, "negative or not finite"),
        ({"m.absmax": torch.tensor([1.0, float("nan"), 1, 1])}, RECORD, "negative or not finite"),
    ],
)
def test_records_that_are_none(tmp_path, change, metadata, text):
    tensors = {name: tensor for name, tensor in (good() | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "r.safetensors", metadata)
    with pytest.raises(CheckpointError, match=text):
        read_activation_record(tmp_path / "r.safetensors")


def test_what_is_no_record_is_not_written(tmp_path):
    path = tmp_path / "r.safetensors"
    wrong = LayerActivations(torch.ones(4), torch.ones(5), 1.0)
    with pytest.raises(CheckpointError, match="found the shapes"):
        write_activation_record(path, {"m": wrong})
    with pytest.raises(ValueError, match="at least one layer"):
        write_activation_record(path, {})
    assert not path.exists()
    fine = {"m": LayerActivations(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16), 1.0)}
    write_activation_record(path, fine)
    with pytest.raises(ValueError, match="exists already"):
        write_activation_record(path, fine)
    assert read_activation_record(path)["m"].absmax.dtype == torch.float32


numbers = st.floats(-1e30, 1e30)


@any_folder
@given(
    layers=st.lists(
        st.builds(FragileLayer, names, numbers.map(abs), st.none() | numbers),
        min_size=1,
        max_size=5,
        unique_by=lambda layer: layer.name,
    )
)
def test_a_report_comes_back_in_its_order(tmp_path_factory, layers):
    path = tmp_path_factory.getbasetemp() / "report.json"
    write_fragility_report(path, layers, {"model": "m"})
    assert read_fragility_report(path) == layers
    report = json.loads(path.read_text())
    assert report == {**REPORT, "model": "m", "layers": [dataclasses.asdict(layer) for layer in layers]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3),
    max_leaves=10,
)


@any_folder
@given(entries=json_values | st.lists(st.fixed_dictionaries({"name": json_values, "spikiness": json_values})))
def test_any_json_is_a_report_or_refused(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for content in (entries, {**REPORT, "layers": entries}):
        path.write_text(json.dumps(content))
        try:
            layers = read_fragility_report(path)
        except CheckpointError as error:
            assert str(error).startswith("any.json: found ") and "expected a fragility report" in str(error)
        else:
            assert all(layer.name and layer.spikiness >= 0 for layer in layers)


@any_folder
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_report(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="expected a fragility report"):
        read_fragility_report(path)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": "lowbit_activation_record"}, "the format 'lowbit_activation_record'"),
        ({"version": 2}, "version 2 instead of 1"),
        ({"layers": []}, r"\[\] as `layers`"),
        ({"layers": [{"name": "a", "spikiness": 1}, {"name": "a", "spikiness": 2}]}, "listed twice"),
        ({"layers": [{"name": "a"}]}, "the numbers None and None for 'a'"),
        ({"layers": [{"name": "a", "spikiness": True}]}, "the numbers True"),
        ({"layers": [{"name": "a", "spikiness": -1}]}, "the numbers -1"),
        ({"layers": ["a"]}, "the layer 'a'"),
    ],
)
def test_reports_that_are_none(tmp_path, change, text):
    (tmp_path / "r.json").write_text(json.dumps({**REPORT, "layers": [{"name": "a", "spikiness": 1}], **change}))
    with pytest.raises(CheckpointError, match=text):
        read_fragility_report(tmp_path / "r.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_fragility_report(tmp_path / "gone.json")
