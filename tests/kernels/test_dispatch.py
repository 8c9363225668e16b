"""The order, the reasons and the refusals of the dispatch, on an op made of modules that exist only here."""

import sys
import types

import pytest
import torch
from lowbit.kernels import dispatch, int8_linear  # noqa: F401  (an op with other implementations' names)
from lowbit.kernels.dispatch import Op, use_implementation


@pytest.fixture
def op(monkeypatch):
    """An op with a fast implementation for even calls, a slow one for all but 99, and one that does not import."""

    def module(name, supports, result):
        made = types.ModuleType(f"fake_op.{name}")
        made.supports, made.run = supports, lambda call: (result, call)
        monkeypatch.setitem(sys.modules, f"fake_op.{name}", made)

    monkeypatch.setitem(sys.modules, "fake_op", types.ModuleType("fake_op"))
    module("fast", lambda call: None if call % 2 == 0 else f"needs an even call, found {call}", "fast")
    module("slow", lambda call: "refuses 99" if call == 99 else None, "slow")
    return Op("fake_op", ("missing", "fast", "slow"))


def test_the_first_that_accepts_runs(op):
    assert op.run(2) == ("fast", 2)
    assert op.run(3) == ("slow", 3)


def test_every_answer_is_told(op):
    answers = op.refusals(3)
    assert list(answers) == ["missing", "fast", "slow"]
    assert answers["missing"].startswith("failed to import: ModuleNotFoundError: No module named 'fake_op.missing'")
    assert answers["fast"] == "needs an even call, found 3" and answers["slow"] is None


def test_nobody_accepting_raises_all_reasons(op):
    with pytest.raises(RuntimeError) as refused:
        op.run(99)
    text = str(refused.value)
    assert text.startswith("fake_op: no implementation can run this call: missing failed to import")
    assert "fast needs an even call, found 99; slow refuses 99" in text


def test_an_implementation_asked_for_by_name_runs_or_says_why_not(op):
    with use_implementation("slow"):
        assert op.run(2) == ("slow", 2)
    with (
        use_implementation("fast"),
        pytest.raises(RuntimeError, match="'fast' was asked for, but it needs an even call"),
    ):
        op.run(3)
    with use_implementation("missing"), pytest.raises(RuntimeError, match="failed to import"):
        op.run(2)
    with use_implementation("torch_impl"):  # of other ops
        assert op.run(2) == ("fast", 2)
    assert op.run(2) == ("fast", 2)
    with pytest.raises(ValueError, match="no op has an implementation 'refrence'"), use_implementation("refrence"):
        pass


def test_whatever_an_import_raises_is_a_refusal(monkeypatch, tmp_path):
    """Triton without a driver raises RuntimeError while a module that uses it is imported."""
    package = tmp_path / "broken_op"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "triton_impl.py").write_text("raise RuntimeError('0 active drivers')")
    monkeypatch.syspath_prepend(tmp_path)
    refusals = Op("broken_op", ("triton_impl",)).refusals(None)
    assert refusals == {"triton_impl": "failed to import: RuntimeError: 0 active drivers"}


def test_a_bug_in_an_implementation_is_not_taken_for_a_refusal(op, monkeypatch):
    monkeypatch.setattr(op.pick(2), "supports", lambda call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        op.run(2)


def test_the_choice_is_logged_once_with_the_refusals(op, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level("INFO"):
        op.run(5)
        op.run(5)
        op.run(7)  # refused for another number, as each size of picture is
    lines = [line for line in caplog.messages if "fake_op is computed by" in line]
    assert len(lines) == 1 and lines[0].startswith("Lowbit: fake_op is computed by slow (missing failed to import")
    assert "needs an even call, found 5" in lines[0]


def test_a_second_copy_of_the_kernels_says_so():
    """As where the pack lies in two folders of custom_nodes."""
    with pytest.raises(RuntimeError, match=r"already loaded in this process \(the op lowbit::int8_linear exists\)"):

        @dispatch.custom_op("int8_linear")
        def again(x: torch.Tensor) -> torch.Tensor:
            return x
