"""Pieces side by side: in their order, the same bytes as one after the other, and no worker that outlives its work."""

import threading
import time

import pytest
import torch
from lowbit.convert import pieces
from lowbit.convert.pieces import in_pieces
from lowbit.tests.convert.making import spiky_record, to_gguf, to_int8

SHAPE, PIECES = (100, 10), 20


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "WORKER_ELEMENTS", 50)


@pytest.fixture
def three_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "what the workers set is taken back"
    torch.set_num_threads(before)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lowbit_convert")]


def test_pieces_come_in_their_order_from_several_threads(three_cores):
    seen = set()

    def compute(rows: slice) -> int:
        seen.add((threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        time.sleep(0.02 if rows.start % 2 else 0.002)
        return rows.start

    found = list(in_pieces(compute, SHAPE))
    assert [rows for rows, _ in found] == [slice(5 * i, 5 * i + 5) for i in range(PIECES)]
    assert all(rows.start == result for rows, result in found)
    assert len(seen) == 3 and {state[1:] for state in seen} == {(1, True)} and not workers()


def test_no_more_pieces_are_begun_than_are_soon_needed(three_cores):
    begun = []
    for taken, _ in enumerate(in_pieces(lambda rows: begun.append(rows), SHAPE), start=1):
        time.sleep(0.005)
        assert len(begun) <= taken + 3
    assert len(begun) == PIECES


def test_one_core_and_other_devices_have_no_workers(three_cores):
    assert list(in_pieces(lambda rows: threading.current_thread(), (4, 10))) == [
        (slice(0, 4), threading.main_thread())
    ]  # too small for two
    on_another_device = list(in_pieces(lambda rows: threading.current_thread(), SHAPE, "meta"))
    assert on_another_device == [(slice(0, 100), threading.main_thread())]
    assert not list(in_pieces(lambda rows: rows, (0, 10)))


def test_an_error_ends_the_workers(three_cores):
    done = []

    def compute(rows: slice) -> None:
        done.append(rows)
        if rows.start == 10:
            raise KeyError("the third piece")

    with pytest.raises(KeyError, match="the third piece"):
        list(in_pieces(compute, SHAPE))
    assert not workers() and len(done) < PIECES


@pytest.fixture
def record(tmp_path):
    return str(spiky_record(tmp_path / "record.safetensors"))


CONVERSIONS = {
    "int8": (to_int8, "out.safetensors", {}),
    "rotated": (to_int8, "out.safetensors", {"rotate": True}),
    "q4_k": (to_gguf, "out.gguf", {"policy": "q4_k"}),
    "q8_0": (to_gguf, "out.gguf", {"policy": "q8_0"}),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_the_bytes_do_not_depend_on_the_number_of_cores(tmp_path, fp8_files, record, monkeypatch, kind):
    monkeypatch.setattr(pieces, "WORKER_ELEMENTS", 20_000)
    convert, name, options = CONVERSIONS[kind]
    if kind != "q8_0":
        options = options | {"records": (record,)}
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            convert(fp8_files["conditional"], tmp_path / name, overwrite=True, **options)
            found.append((tmp_path / name).read_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["rotated", "q4_k"])
def test_cancelling_waits_for_the_workers_and_leaves_nothing(tmp_path, fp8_files, three_cores, monkeypatch, kind):
    class Cancelled(BaseException):
        pass

    def report(progress) -> None:
        if progress.stage == "writing" and 2 * progress.done_bytes > progress.total_bytes:
            assert workers(), "in the midst of a tensor"
            raise Cancelled

    monkeypatch.setattr(pieces, "WORKER_ELEMENTS", 5_000)
    convert, name, options = CONVERSIONS[kind]
    with pytest.raises(Cancelled):
        convert(fp8_files["conditional"], tmp_path / name, report=report, **options)
    assert not workers() and not list(tmp_path.iterdir())


def test_a_value_that_no_type_holds_is_told_from_a_worker_too(tmp_path, three_cores, monkeypatch):
    from host_harness import small_models as small

    monkeypatch.setattr(pieces, "WORKER_ELEMENTS", 5_000)
    floats = small.ideogram4()
    floats["layers.1.attention.o.weight"][100, 3] = float("nan")
    source = small.save(tmp_path / "bad.safetensors", floats)
    with pytest.raises(ValueError, match=r"found 'layers\.1\.attention\.o\.weight' with values that are not finite"):
        to_gguf(source, tmp_path / "out.gguf", "q4_k")
    assert not workers() and [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]
