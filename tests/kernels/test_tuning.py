"""The choice of launch configurations: in memory, on disk, within the budget. A `Bench` stands for the device and its
clock; the last tests measure on a real one."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit.kernels import kept_memory, tuning

GPU = torch.device("cuda", 0)
KEY = "M4096 N13824 K4608 bfloat16"
A, B, C, D, E = [{"BLOCK_M": size, "num_warps": 4} for size in (16, 32, 64, 128, 256)]
FILE = "tuning-nvidia-geforce-rtx-3090-sm86-triton3.6.0.json"


class Bench:
    """A device on which candidates take times that are told, and a clock that only their work moves.

    Compiling is per configuration and `variant`, as Triton compiles a kernel again for other dtypes.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.path = folder / FILE
        self.ms = {16: 5.0, 32: 3.0, 64: 4.0, 128: 2.0, 256: 1.0}
        self.compile_s = dict.fromkeys(self.ms, 0.125)
        self.measure_s = 0.03125
        self.errors = {}
        self.compiled = set()
        self.variant = "bfloat16"
        self.clock = 0.0
        self.runs = []
        self.capturing = False

    def run(self, config):
        size = config["BLOCK_M"]
        self.runs.append(size)
        if (size, self.variant) not in self.compiled:
            self.clock += self.compile_s[size]
            self.compiled.add((size, self.variant))
        if size in self.errors:
            raise self.errors[size]

    def measure_ms(self, run, config, device):
        run(config)
        self.clock += self.measure_s
        return self.ms[config["BLOCK_M"]]

    def choose(self, *candidates, op="int8_linear", source="source", device=GPU, key=KEY, tune=True):
        return tuning.choose(op, source, device, key, candidates, self.run, tune)

    def next_process(self):
        tuning.forget()
        self.compiled.clear()
        self.runs.clear()

    def stored(self):
        """{op: {key: configuration}} of the file."""
        return {op: entry["keys"] for op, entry in json.loads(self.path.read_text())["winners"].items()}

    def write(self, keys, op="int8_linear", source="source"):
        self.folder.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({"format": 1, "winners": {op: {"source": source, "keys": keys}}}))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    made = Bench(tmp_path / "cache")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(made.folder))
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_measure_ms", made.measure_ms)
    monkeypatch.setattr(tuning, "_now", lambda: made.clock)
    monkeypatch.setattr(tuning, "_synchronize", lambda device: None)
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: made.capturing)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "NVIDIA GeForce RTX 3090 sm86")
    monkeypatch.setattr(tuning, "_triton_version", lambda: "3.6.0")
    tuning.forget()
    yield made
    tuning.forget()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "M, expected",
    [(1, 16), (16, 16), (17, 32), (256, 256), (257, 512), (4096, 4096), (4352, 8192), (16384, 16384), (16640, 16384)],
)
def test_buckets_are_powers_of_two_between_16_and_16384(M, expected):
    assert tuning.bucket(M) == expected


def test_measuring_is_no_part_of_a_host_s_recording(bench, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def outside_recording():
        runs = len(bench.runs)
        yield
        seen.append(len(bench.runs) - runs)

    monkeypatch.setattr(kept_memory, "outside_recording", outside_recording)
    bench.choose(A, B)
    assert seen == [len(bench.runs)] and bench.runs
    bench.choose(A, B)
    assert len(seen) == 1


def test_the_fastest_is_chosen_and_kept_in_memory(bench):
    assert bench.choose(A, B, C) is B
    assert set(bench.runs) == {16, 32, 64}
    bench.runs.clear()
    bench.path.unlink()
    assert bench.choose(A, B, C) is B
    assert not bench.runs and not bench.path.exists()


def test_the_next_process_reads_the_winner(bench):
    bench.choose(A, B, C)
    bench.next_process()
    assert bench.choose(A, C, dict(B)) == B
    assert not bench.runs


def test_the_file_is_readable_json_named_after_device_and_triton(bench):
    bench.choose(A, B, C)
    assert [path.name for path in bench.folder.iterdir()] == [FILE]
    assert json.loads(bench.path.read_text()) == {
        "format": 1,
        "winners": {"int8_linear": {"source": "source", "keys": {KEY: B}}},
    }


@pytest.mark.parametrize("other", [{"op": "unpack"}, {"source": "edited"}, {"key": "M16"}, {"device": "cuda:1"}])
def test_op_source_device_and_key_are_told_apart(bench, other):
    if "device" in other:
        other = {"device": torch.device(other["device"])}
    bench.choose(A, B)
    bench.ms[32] = 9.0
    bench.path.unlink()
    assert bench.choose(A, B, **other) is A
    assert bench.choose(A, B) is B


def test_what_is_off_takes_the_first_and_touches_no_file(bench, monkeypatch):
    bench.write({KEY: B})
    before = bench.path.read_bytes()
    assert bench.choose(A, B, tune=False) is A
    assert bench.choose(A, B, device=torch.device("cpu")) is A
    assert bench.choose(A) is A
    monkeypatch.setenv("LOWBIT_TUNING", "0")
    assert bench.choose(A, B) is A and bench.choose(A, B, key="M16") is A
    assert not bench.runs and bench.path.read_bytes() == before


def test_the_node_option_also_holds_after_tuning(bench):
    assert bench.choose(A, B) is B
    assert bench.choose(A, B, tune=False) is A


@pytest.mark.parametrize("value", ["", "1", "off"])
def test_any_other_value_of_the_variable_leaves_tuning_on(bench, monkeypatch, value):
    monkeypatch.setenv("LOWBIT_TUNING", value)
    assert bench.choose(A, B) is B


def test_the_budget_is_kept_and_the_first_ones_compiling_is_not_counted(bench):
    bench.compile_s = {16: 0.875, 32: 0.875, 64: 0.875, 128: 0.875, 256: 0.875}
    assert bench.choose(A, B, C, D, E) is D
    assert 256 not in bench.runs  # 0.03125 + 3 * 0.90625 s are spent, a fifth would not fit
    assert bench.clock - 0.875 <= tuning.BUDGET_S
    assert bench.stored() == {"int8_linear": {KEY: D}}
    bench.next_process()
    assert bench.choose(A, B, C, D, E) is D  # what did not fit is not tried later
    assert not bench.runs


def test_many_keys_together_keep_the_budget_and_later_ones_wait_for_nothing(bench):
    """The first key's compiling takes most of the budget; the same configurations are then quick to measure."""
    bench.compile_s = dict.fromkeys(bench.compile_s, 0.75)
    keys = [f"M{2**i} bfloat16" for i in range(4, 14)]
    for key in keys:
        bench.choose(A, B, C, D, E, key=key)
    waited_s = bench.clock - bench.compile_s[16]
    assert tuning.BUDGET_S - bench.measure_s <= waited_s <= tuning.BUDGET_S
    assert 256 not in bench.runs
    stored = bench.stored()["int8_linear"]
    assert stored == dict.fromkeys(keys[:6], D)  # 0.03125 + 3 * 0.78125 s, then 4 * 0.03125 s a key
    bench.runs.clear()
    assert [bench.choose(A, B, C, D, E, key=key) for key in keys] == [D] * 6 + [A] * 4
    assert not bench.runs


def test_an_unknown_candidate_is_expected_to_take_what_the_slowest_of_all_keys_took(bench):
    bench.compile_s[32] = 2.0
    bench.choose(A, B)
    assert bench.choose(A, C, key="M16") is A  # less than 2 s are left
    assert 64 not in bench.runs


def test_the_first_candidates_compiling_counts_as_an_expectation(bench):
    bench.compile_s |= {16: 2.5, 32: 0.75}
    bench.choose(A, B)
    assert bench.choose(A, C, key="M16") is A  # less than 2.5 s are left
    assert 64 not in bench.runs


def test_a_known_candidate_is_still_tried_where_an_unknown_one_does_not_fit(bench):
    bench.compile_s[64] = 2.0
    bench.choose(A, C)
    assert bench.choose(A, B, C, key="M16") is C
    assert 32 not in bench.runs


def test_a_known_candidate_is_expected_to_take_what_others_of_its_key_take(bench):
    bench.compile_s = dict.fromkeys(bench.compile_s, 0.5)
    assert bench.choose(A, B, C) is B
    bench.variant = "float16"
    bench.compiled.add((16, "float16"))  # as from Triton's own cache
    bench.compile_s[32] = 1.0
    assert bench.choose(A, B, C, key="M4096 float16") is B
    assert (64, "float16") not in bench.compiled


def test_a_budget_that_ends_with_the_first_candidate_has_compared_nothing(bench):
    bench.measure_s = 2.0
    assert bench.choose(A, B) is A
    assert 32 not in bench.runs and not bench.path.exists()


def test_a_dtype_that_compiles_again_is_not_expected_to_be_quick(bench):
    bench.compile_s = dict.fromkeys(bench.compile_s, 1.0)
    assert bench.choose(A, B, C) is B  # takes 2.09375 s
    bench.variant = "float16"
    assert bench.choose(A, B, C, key="M4096 float16") is A
    assert bench.clock == 1.0 + 2.09375 + 1.0
    assert list(bench.stored()["int8_linear"]) == [KEY]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    compile_s=st.lists(st.integers(0, 64), min_size=5, max_size=5),
    order=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["bfloat16", "float16"])), max_size=12),
)
def test_the_budget_is_overrun_by_no_more_than_one_candidate(bench, compile_s, order):
    """Only a candidate that takes longer than all before it can overrun the budget, and nothing is tried after it."""
    tuning.forget()
    bench.__init__(bench.folder)
    bench.path.unlink(missing_ok=True)
    bench.compile_s = {size: units / 16 for size, units in zip(bench.ms, compile_s, strict=True)}
    spent_s = 0.0
    for i, (count, dtype) in enumerate(order):
        bench.variant = dtype
        free_s = 0.0 if (16, dtype) in bench.compiled else bench.compile_s[16]
        before = bench.clock
        bench.choose(A, *(B, C, D, E)[:count], key=f"M{i} {dtype}")
        if spent_s > tuning.BUDGET_S:
            assert bench.clock == before
        elif bench.clock > before:
            spent_s += bench.clock - before - free_s
    assert spent_s <= tuning.BUDGET_S + max(bench.compile_s.values()) + bench.measure_s


def test_a_key_that_the_budget_does_not_reach_is_left_to_a_later_process(bench):
    bench.compile_s[16] = 10.0  # as long is expected of the others
    assert bench.choose(A, B) is A
    assert bench.choose(A, B) is A
    assert bench.runs == [16] and not bench.path.exists()
    assert bench.choose(A, B, key="M16") is A
    assert bench.runs == [16, 16] and not bench.path.exists()
    bench.next_process()
    bench.compile_s[16] = 0.0
    assert bench.choose(A, B) is B
    assert bench.stored() == {"int8_linear": {KEY: B}}


def test_a_spent_budget_runs_nothing(bench):
    bench.compile_s[32] = 4.0
    assert bench.choose(A, B, C) is B
    assert 64 not in bench.runs
    bench.runs.clear()
    assert bench.choose(A, B, key="M16") is A
    assert not bench.runs and list(bench.stored()["int8_linear"]) == [KEY]


def test_a_spent_budget_still_reads_the_file(bench):
    bench.compile_s[32] = 4.0
    bench.choose(A, B)
    bench.write({"M16": B})
    assert bench.choose(A, B, key="M16") is B


def test_what_the_first_candidate_raises_is_raised_and_nothing_is_remembered(bench):
    bench.errors[16] = RuntimeError("no kernel image is available")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no kernel image is available"):
            bench.choose(A, B)
    assert bench.runs == [16, 16] and not bench.path.exists()
    bench.errors.clear()
    assert bench.choose(A, B) is B


class OutOfResourcesError(Exception):
    """Triton's own is no RuntimeError either."""


@pytest.mark.parametrize("error", [OutOfResourcesError("shared memory"), RuntimeError("shared memory")])
def test_another_candidate_that_raises_is_dropped(bench, error, caplog):
    bench.errors[32] = error
    with caplog.at_level("DEBUG"):
        assert bench.choose(A, B, C) is C
    assert [r.levelname for r in caplog.records if "shared memory" in r.getMessage()] == ["DEBUG"]
    assert not warnings(caplog)


def test_if_all_others_raise_the_first_is_stored(bench):
    bench.errors = {32: RuntimeError(), 64: RuntimeError()}
    assert bench.choose(A, B, C) is A
    assert bench.stored() == {"int8_linear": {KEY: A}}


def test_a_failing_candidate_counts_against_the_budget(bench):
    bench.errors[32] = RuntimeError()
    bench.compile_s[32] = 2.0
    assert bench.choose(A, B, C) is A  # 1 s is left, C may take 2
    assert 64 not in bench.runs


def test_nothing_is_measured_while_a_graph_is_captured(bench):
    bench.capturing = True
    assert bench.choose(A, B) is A
    assert not bench.runs and not bench.path.exists()
    bench.write({"M16": B})
    assert bench.choose(A, B, key="M16") is B  # a stored winner needs no measuring
    bench.capturing = False
    assert bench.choose(A, B) is B


def test_a_tuned_key_is_logged_once(bench, caplog):
    with caplog.at_level("INFO"):
        bench.choose(A, B, C)
        bench.choose(A, B, C)
    assert caplog.messages == [
        f"Lowbit: int8_linear, {KEY}: the fastest of 3 configurations is {B}, 3.000 ms. "
        "Tuning took 0.34 s so far, of 3 s at most."
    ]


def test_threads_measure_a_key_once(bench, monkeypatch):
    bench.folder.write_text("no folder: the winner is in memory alone")
    arrivals, all_arrived = [], threading.Event()

    class CountingLock:
        lock = threading.Lock()

        def __enter__(self):
            arrivals.append(self)
            if len(arrivals) == 4:
                all_arrived.set()
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    def measure_ms(run, config, device):
        assert all_arrived.wait(10)
        return bench.measure_ms(run, config, device)

    monkeypatch.setattr(tuning, "_lock", CountingLock())
    monkeypatch.setattr(tuning, "_measure_ms", measure_ms)
    found = []
    threads = [threading.Thread(target=lambda: found.append(bench.choose(A, B))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [B] * 4
    assert bench.runs == [16, 16, 32, 32]


def test_a_stored_winner_that_is_no_candidate_any_more_is_measured_again(bench):
    bench.write({KEY: {"BLOCK_M": 99}, "M16": C})
    assert bench.choose(A, B) is B
    assert bench.stored() == {"int8_linear": {KEY: B, "M16": C}}


def test_winners_of_another_source_are_dropped_and_other_ops_stay(bench):
    bench.choose(A, B)
    bench.choose(A, C, op="unpack")
    bench.next_process()
    assert bench.choose(A, B, key="M16", source="edited") is B
    assert bench.stored() == {"int8_linear": {"M16": B}, "unpack": {KEY: C}}


def test_a_stored_winner_of_another_source_does_not_count(bench):
    bench.write({KEY: B}, source="before the edit")
    bench.ms[32] = 9.0
    assert bench.choose(A, B) is A
    assert bench.stored() == {"int8_linear": {KEY: A}}


def test_what_another_process_stored_meanwhile_stays(bench, monkeypatch):
    def measure_ms(run, config, device):
        bench.write({"M16": C})
        return bench.measure_ms(run, config, device)

    monkeypatch.setattr(tuning, "_measure_ms", measure_ms)
    bench.choose(A, B)
    assert bench.stored() == {"int8_linear": {"M16": C, KEY: B}}


def entry(**changes):
    return {"format": 1, "winners": {"int8_linear": {"source": "source", "keys": {KEY: B}} | changes}}


DAMAGED = {
    "empty": b"",
    "cut": json.dumps(entry()).encode()[:-9],
    "no_text": bytes(range(256)),
    "deep": b"[" * 200_000,
    "list": b"[]",
    "number": b"1",
    "other_format": json.dumps(entry() | {"format": 2}).encode(),
    "no_winners": b'{"format": 1}',
    "winners_list": b'{"format": 1, "winners": []}',
    "entry_none": b'{"format": 1, "winners": {"int8_linear": null}}',
    "source_number": json.dumps(entry(source=1)).encode(),
    "keys_list": json.dumps(entry(keys=[])).encode(),
    "config_list": json.dumps(entry(keys={KEY: [1, 2]})).encode(),
    "config_text": json.dumps(entry(keys={KEY: {"BLOCK_M": "32"}})).encode(),
    "config_float": json.dumps(entry(keys={KEY: {"BLOCK_M": 32.0, "num_warps": 4}})).encode(),
    "config_nan": b'{"format": 1, "winners": {"int8_linear": {"source": "source", "keys": {"x": {"a": NaN}}}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(bench, content, caplog):
    bench.folder.mkdir()
    bench.path.write_bytes(content)
    assert bench.choose(A, C) is C
    assert bench.choose(A, B, key="M16") is B
    [text] = warnings(caplog)
    assert text.startswith(f"Lowbit: {bench.path} is not a file of tuning results and is ignored")
    assert bench.stored() == {"int8_linear": {KEY: C, "M16": B}}


def test_a_path_that_is_no_file_is_ignored_with_a_warning_each_for_reading_and_writing(bench, caplog):
    bench.path.mkdir(parents=True)
    assert bench.choose(A, B) is B
    assert bench.choose(A, B, key="M16") is B
    reading, writing = warnings(caplog)
    assert f"{bench.path} is not a file of tuning results" in reading
    assert f"{bench.path} cannot be written" in writing
    assert list(bench.folder.iterdir()) == [bench.path]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1, "source"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["int8_linear", "source", "keys", KEY, "BLOCK_M"]), inner, max_size=3)
    ),
    max_leaves=8,
)
contents = (
    st.binary(max_size=200)
    | st.builds(lambda winners: json.dumps({"format": 1, "winners": winners}).encode(), json_values)
    | st.builds(lambda keys: json.dumps(entry(keys=keys)).encode(), json_values)
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=contents)
def test_no_content_of_the_file_raises_or_is_trusted(bench, content):
    tuning.forget()
    bench.folder.mkdir(exist_ok=True)
    bench.path.write_bytes(content)
    assert bench.choose(A, B) is B
    assert bench.stored()["int8_linear"][KEY] == B


def test_a_failing_replace_leaves_the_old_file_and_nothing_beside_it(bench, monkeypatch, caplog):
    bench.write({"M16": C})
    before = bench.path.read_bytes()

    def denied(source, target):
        assert json.loads(pathlib.Path(source).read_text())["winners"]["int8_linear"]["keys"] == {"M16": C, KEY: B}
        raise PermissionError(13, "another process reads it", str(target))

    monkeypatch.setattr(os, "replace", denied)
    assert bench.choose(A, B) is B
    assert bench.choose(A, B) is B
    assert bench.path.read_bytes() == before and list(bench.folder.iterdir()) == [bench.path]
    [text] = warnings(caplog)
    assert text.startswith(f"Lowbit: {bench.path} cannot be written, tuning results hold until this process ends")
    assert "another process reads it" in text


def test_a_folder_that_cannot_be_made_is_one_warning(bench, caplog):
    bench.folder.write_text("a file where the folder should be")
    assert bench.choose(A, B) is B
    assert bench.choose(A, C, key="M16") is C
    assert len(warnings(caplog)) == 1 and "cannot be written" in caplog.text
    assert bench.choose(A, B) is B


def test_the_cache_folder_is_the_platforms(monkeypatch, tmp_path):
    for name in ("LOWBIT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    assert tuning._cache_folder() == tmp_path / ".cache" / "lowbit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning._cache_folder() == tmp_path / "xdg" / "lowbit"
    monkeypatch.setattr(tuning.sys, "platform", "win32")
    assert tuning._cache_folder() == tmp_path / "AppData" / "Local" / "lowbit"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert tuning._cache_folder() == tmp_path / "local" / "lowbit"
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "mine"))
    assert tuning._cache_folder() == tmp_path / "mine"


def test_without_a_home_folder_the_temporary_one_is_used(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOWBIT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    monkeypatch.setattr(tuning.tempfile, "gettempdir", lambda: str(tmp_path))
    assert tuning._cache_folder() == tmp_path / "lowbit"


@pytest.mark.parametrize(
    "installed, expected",
    [
        ({"triton": "3.6.0"}, "3.6.0"),
        ({"triton-windows": "3.3.1.post19"}, "3.3.1.post19"),
        ({"pytorch-triton": "3.7.0+git1234"}, "3.7.0+git1234"),
        ({}, "unknown"),
    ],
)
def test_the_triton_version_comes_from_whichever_package_is_installed(monkeypatch, installed, expected):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert tuning._triton_version() == expected


def test_odd_characters_do_not_reach_the_file_name(bench, monkeypatch):
    monkeypatch.setattr(tuning, "_device_name", lambda device: "NVIDIA H200 MIG 1g.18gb/../x sm90")
    monkeypatch.setattr(tuning, "_triton_version", lambda: "3.7.0+git1234")
    assert tuning._file(GPU) == bench.folder / "tuning-nvidia-h200-mig-1g.18gb-..-x-sm90-triton3.7.0+git1234.json"


def test_a_source_hash_is_that_of_the_contents(tmp_path):
    kernel, table = tmp_path / "kernel.py", tmp_path / "table.py"
    kernel.write_text("a")
    table.write_text("b")
    before = tuning.source_hash(str(kernel), str(table))
    assert before == tuning.source_hash(str(kernel), str(table))
    assert before != tuning.source_hash(str(kernel))
    table.write_text("c")
    assert before != tuning.source_hash(str(kernel), str(table))


@pytest.mark.parametrize(
    "once_ms, expected_ms, expected_runs",
    [(0.5, 0.25, 6), (7.0, 0.25, 4), (12.0, 12.0, 1), (500.0, 500.0, 1)],
    ids=["five", "fewer", "one", "very_slow"],
)
def test_a_time_is_the_median_of_as_many_runs_as_fit(monkeypatch, once_ms, expected_ms, expected_runs):
    """The first run takes `once_ms`, those after it 0.25 ms but for a late one that the median leaves out."""
    runs_ms = [once_ms, 9.0, *[0.25] * 4]
    now_ms, runs = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = now_ms[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.ms - self.ms

    def run(config):
        now_ms[0] += runs_ms[len(runs)]
        runs.append(config)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert tuning._measure_ms(run, A, GPU) == expected_ms
    assert runs == [A] * expected_runs


@pytest.fixture
def real_device(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    tuning.forget()
    yield torch.device("cuda", torch.cuda.current_device())
    tuning.forget()


@pytest.mark.gpu
def test_the_faster_one_is_found_on_a_real_device(real_device, tmp_path):
    a, b = (torch.randn(1024, 1024, device=real_device) for _ in range(2))
    out = torch.empty_like(a)
    calls = []

    def run(config):
        calls.append(config)
        for _ in range(config["REPEATS"]):
            torch.mm(a, b, out=out)

    candidates = [{"REPEATS": 20}, {"REPEATS": 1}]
    assert tuning.choose("test", "source", real_device, "M1024", candidates, run, True) is candidates[1]
    [path] = tmp_path.glob("tuning-*-sm*-triton*.json")
    assert json.loads(path.read_text())["winners"]["test"]["keys"] == {"M1024": {"REPEATS": 1}}
    tuning.forget()
    calls.clear()
    assert tuning.choose("test", "source", real_device, "M1024", candidates, run, True) is candidates[1]
    assert not calls


@pytest.mark.gpu
def test_a_real_capture_is_noticed(real_device):
    x = torch.zeros(16, device=real_device)
    candidates, calls = [{"ADD": 1}, {"ADD": 2}], []
    chosen = []
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        chosen.append(tuning.choose("test", "source", real_device, "M16", candidates, calls.append, True))
        x.add_(1)
    assert chosen[0] is candidates[0] and not calls
