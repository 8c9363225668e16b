"""A file is there whole or not at all: nothing is overwritten unasked, and what goes wrong leaves nothing behind."""

import contextlib
import errno
import functools
import io
import logging
import os
import pathlib
import shutil
import stat
import sys
import types

import pytest
import torch
from lowbit.convert import output_file, source
from lowbit.convert.output_file import OutputFile
from lowbit.convert.progress import Progress, clock
from lowbit.tests.convert.making import bf16, to_gguf, to_int8

CONVERT = {"int8": (to_int8, "out.safetensors"), "gguf": (to_gguf, "out.gguf")}
both_kinds = pytest.mark.parametrize("kind", CONVERT)


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces of each matrix, so that a conversion can break off inside one."""
    monkeypatch.setattr(source, "CHUNK_ELEMENTS", 20_000)


def convert(kind, fp8_files, folder, branches=2, **options):
    function, name = CONVERT[kind]
    if branches == 2:
        options["unconditional"] = str(fp8_files["unconditional"])
    return function(fp8_files["conditional"], folder / name, **options)


@both_kinds
def test_nothing_is_overwritten_unasked(tmp_path, fp8_files, kind):
    written = convert(kind, fp8_files, tmp_path)
    contents = [pathlib.Path(w.path).read_bytes() for w in written]
    for path in (pathlib.Path(w.path) for w in written):
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match=rf"{path.name}: exists already"):
            convert(kind, fp8_files, tmp_path)
        assert path.read_bytes() == b"mine"
        path.unlink()
    again = convert(kind, fp8_files, tmp_path)
    convert(kind, fp8_files, tmp_path, overwrite=True)
    assert [pathlib.Path(w.path).read_bytes() for w in again] == contents and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_link_to_nothing_is_a_file_that_is_there(tmp_path, fp8_files):
    link = tmp_path / "out.gguf"
    link.symlink_to(tmp_path / "elsewhere" / "model.gguf")
    with pytest.raises(ValueError, match=r"out\.gguf: exists already"):
        convert("gguf", fp8_files, tmp_path, branches=1)
    assert link.is_symlink()
    convert("gguf", fp8_files, tmp_path, branches=1, overwrite=True)
    assert link.is_file() and not link.is_symlink()
    link.unlink()
    with pytest.raises(ValueError, match="exists already"), OutputFile(str(link)) as output:
        output.write(0, b"new")
        link.symlink_to(tmp_path / "elsewhere")
        output.finish(3)
    assert link.is_symlink() and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, fp8_files):
    def appear(progress: Progress) -> None:
        (tmp_path / "out.gguf").write_bytes(b"mine")

    with pytest.raises(ValueError, match="exists already"):
        convert("gguf", fp8_files, tmp_path, branches=1, report=appear)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and (tmp_path / "out.gguf").read_bytes() == b"mine"


@both_kinds
def test_what_is_read_is_never_the_result(tmp_path, fp8_files, kind):
    function, name = CONVERT[kind]
    copy = shutil.copy(fp8_files["conditional"], tmp_path / "m.safetensors")
    (first,) = function(copy, tmp_path / name)
    with pytest.raises(ValueError, match="is read itself and cannot be the result"):
        function(first.path, first.path, overwrite=True)
    if sys.platform == "win32":  # links need a right of their own there
        return
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is read itself"):
        function(first.path, tmp_path / "link" / name, overwrite=True)


@both_kinds
def test_what_is_read_is_known_by_other_names(tmp_path, fp8_files, kind):
    """A second name of the same file, as another spelling is where capitals do not matter."""
    function, name = CONVERT[kind]
    (first,) = function(fp8_files["conditional"], tmp_path / name)
    before, other = pathlib.Path(first.path).read_bytes(), tmp_path / f"other_{name}"
    os.link(first.path, other)
    with pytest.raises(ValueError, match="is read itself and cannot be the result"):
        function(first.path, other, overwrite=True)
    assert other.read_bytes() == before


def test_folders_that_do_not_do(tmp_path, fp8_files):
    with pytest.raises(ValueError, match="there is no folder"):
        convert("gguf", fp8_files, tmp_path / "none")
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(ValueError, match="found a folder"):
        convert("gguf", fp8_files, tmp_path, overwrite=True)
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="there is no folder"):
        convert("gguf", fp8_files, tmp_path / "file" / "sub", make_folder=True)


def test_a_folder_is_made_once_nothing_is_refused_any_more(tmp_path, fp8_files):
    with pytest.raises(ValueError, match="fits no layer"):
        convert("int8", fp8_files, tmp_path / "a" / "b", make_folder=True, protected=("w9",))
    assert not list(tmp_path.iterdir())
    written = convert("int8", fp8_files, tmp_path / "a" / "b", make_folder=True)
    assert {pathlib.Path(w.path) for w in written} == set((tmp_path / "a" / "b").iterdir())


@both_kinds
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_cancelling_leaves_nothing_behind(tmp_path, fp8_files, small_pieces, kind, share):
    class Cancelled(BaseException):
        pass

    seen = []

    def report(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage == "writing" and progress.done_bytes >= share * progress.total_bytes:
            raise Cancelled

    with pytest.raises(Cancelled):
        convert(kind, fp8_files, tmp_path, report=report)
    assert not list(tmp_path.iterdir())
    assert {p.stage for p in seen} == {"reading", "writing"}
    assert all(0 <= p.done_bytes <= p.total_bytes for p in seen)


@both_kinds
def test_progress_ends_at_its_total_and_knows_rate_and_rest(tmp_path, fp8_files, small_pieces, kind):
    seen = []
    written = convert(kind, fp8_files, tmp_path, report=seen.append)
    for stage in ("reading", "writing"):
        stages = [p for p in seen if p.stage == stage]
        assert len(stages) > 2 and stages[-1].done_bytes == stages[-1].total_bytes
        assert [p.done_bytes for p in stages] == sorted(p.done_bytes for p in stages)
        assert stages[0].remaining_s is None and stages[-1].remaining_s == 0 and stages[-1].rate_bytes_s > 0
    tensors = sum(w.size_bytes for w in written)
    assert 0.9 * tensors < seen[-1].total_bytes < tensors
    assert str(Progress("writing", 2 * 10**9, 10**10, 4.0)) == "writing: 2.00 GB of 10.0 GB, 500 MB/s, 0:16 left"
    assert [clock(s) for s in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]


@both_kinds
def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, fp8_files, monkeypatch, kind):
    usage = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(output_file.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RuntimeError, match=r"found 1\.00 MB of free disk space, expected 2.\.. MB.*Free some space"):
        convert(kind, fp8_files, tmp_path)
    assert not list(tmp_path.iterdir())


@both_kinds
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EIO], ids=["full", "too_large", "broken"])
@pytest.mark.parametrize("after", [0, 1, 30])
def test_a_disk_that_becomes_full_leaves_nothing_behind(
    tmp_path, fp8_files, small_pieces, monkeypatch, kind, code, after
):
    class Full:
        writes = 0

        def __init__(self, file):
            self._file = file

        def write(self, data):
            Full.writes += 1
            if Full.writes > after:
                raise OSError(code, os.strerror(code))
            return self._file.write(data[:1000])  # as an unbuffered file may

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(output_file, "open", lambda path, *rest, **options: Full(io.FileIO(path, "xb")), raising=False)
    text = "cannot be written" if code == errno.EIO else "the disk is full, or does not take files of this size"
    with pytest.raises(RuntimeError, match=text):
        convert(kind, fp8_files, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on file sizes to set")
def test_a_real_limit_on_the_file_size(tmp_path, fp8_files):
    """The system's own refusal in the middle of a file, as a full disk gives it."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        with pytest.raises(RuntimeError, match="the disk is full, or does not take files of this size"):
            convert("int8", fp8_files, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user whom folders can refuse")
def test_a_folder_without_the_right_to_write(tmp_path, fp8_files):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RuntimeError, match=r"cannot be written.*Pick a folder that you may write to"):
        convert("int8", fp8_files, tmp_path)


class Interrupted(BaseException):
    pass


@both_kinds
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "broken, error, raised",
    [
        ("fsync", OSError(errno.ENOSPC, "full"), RuntimeError),
        ("fsync", Interrupted(), Interrupted),
        ("replace", OSError(errno.EACCES, "in use"), RuntimeError),
    ],
    ids=["full", "interrupted", "in_use"],
)
def test_two_branches_stand_together_or_not_at_all(
    tmp_path, fp8_files, monkeypatch, kind, overwrite, broken, error, raised
):
    """Whatever goes wrong with the second file when the first is already whole."""
    calls, real = [], getattr(os, broken)

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    old = {}
    if overwrite:
        old = {pathlib.Path(w.path): b"mine" for w in convert(kind, fp8_files, tmp_path)}
        for path in old:
            path.write_bytes(b"mine")
    monkeypatch.setattr(output_file.os, broken, second_fails)
    # The folder has no part in this: its fsync would be the second call.
    monkeypatch.setattr(output_file, "_sync_folder", lambda folder: None)
    with pytest.raises(raised):
        convert(kind, fp8_files, tmp_path, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def pair(folder):
    """Two finished files under whose names others lie, as two branches are when only renaming is left."""
    paths = [folder / "m", folder / "m_uncond"]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(OutputFile(str(path), overwrite=True)) for path in paths]
        for path, file in zip(paths, files, strict=True):
            path.write_bytes(b"old" + path.name.encode())
            file.write(0, b"new" + path.name.encode())
            file.finish(3 + len(path.name))
        output_file.commit_together(files)


def test_both_files_of_a_pair_are_there_at_any_moment(tmp_path, monkeypatch):
    """Whenever the process is killed: the old ones or the new ones, the first under another name at most."""
    seen = []

    def watched(function):
        def call(*arguments):
            function(*arguments)
            seen.append({path.name.partition(".")[0] + path.suffix: path.read_bytes() for path in tmp_path.iterdir()})

        return call

    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(output_file.os, name, watched(getattr(os, name)))
    pair(tmp_path)
    new = {"m": b"newm", "m_uncond": b"newm_uncond"}
    seconds = {"m_uncond": b"oldm_uncond", "m_uncond.partial": b"newm_uncond"}
    assert seen == [
        {"m.previous": b"oldm", "m.partial": b"newm"} | seconds,
        {"m.previous": b"oldm", "m": b"newm"} | seconds,
        {"m.previous": b"oldm"} | new,
        new,
    ]


@pytest.mark.parametrize("broken, call", [("rename", 1), ("replace", 1), ("replace", 2)])
def test_a_pair_that_cannot_be_replaced_stays(tmp_path, monkeypatch, broken, call):
    """As on Windows, where the first, its new name, or the second is open in another program."""
    calls, real = [], getattr(os, broken)

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(*arguments)

    monkeypatch.setattr(output_file.os, broken, fails)
    text = r"m(_uncond)?: cannot be written \(Access is denied\)\. If the file is in use, let go of it"
    with pytest.raises(RuntimeError, match=text):
        pair(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"m": b"oldm", "m_uncond": b"oldm_uncond"}


def test_on_windows_a_file_in_use_is_refused_before_anything_takes_time(tmp_path, monkeypatch):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"mapped by a loaded model")
    monkeypatch.setattr(output_file, "WINDOWS", True)
    output_file.check_targets([str(target)], [], overwrite=True)

    def denied(*arguments):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(output_file.os, "rename", denied)
    with pytest.raises(RuntimeError, match=r"cannot access the file.* Unload Models and Execution Cache"):
        output_file.check_targets([str(target)], [], overwrite=True)
    assert target.read_bytes() == b"mapped by a loaded model"


@pytest.mark.parametrize("windows", [False, True])
def test_on_windows_a_colon_names_a_part_of_another_file(tmp_path, monkeypatch, windows):
    monkeypatch.setattr(output_file, "WINDOWS", windows)
    check = functools.partial(output_file.check_targets, [str(tmp_path / "model:v2?.gguf")], [], overwrite=False)
    if windows:
        with pytest.raises(ValueError, match=r"model:v2\?\.gguf: found : \? in the name, which Windows does not take"):
            check()
    else:
        check()
    assert not list(tmp_path.iterdir())


def test_an_old_file_that_cannot_be_put_back_or_deleted_is_told(tmp_path, monkeypatch, caplog):
    def denied(*arguments):
        raise PermissionError(errno.EACCES, "Access is denied")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="Access is denied"):
        patched.setattr(output_file.os, "replace", denied)
        pair(tmp_path)
    (previous,) = tmp_path.glob("m.*.previous")
    assert previous.read_bytes() == b"oldm" and f"is now {previous} and could not be put back" in caplog.text
    previous.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(output_file.os, "unlink", denied)
        pair(tmp_path)
    (previous,) = tmp_path.glob("m.*.previous")
    assert f"{previous} stays behind (Access is denied). Delete it." in caplog.text
    assert (tmp_path / "m").read_bytes() == b"newm" and (tmp_path / "m_uncond").read_bytes() == b"newm_uncond"


@pytest.mark.parametrize("names", [1, 2])
def test_who_interrupts_after_the_last_name_finds_the_new_files(tmp_path, monkeypatch, names):
    def interrupt(folder):
        raise Interrupted

    monkeypatch.setattr(output_file, "_sync_folder", interrupt)
    with pytest.raises(Interrupted):
        if names == 2:
            pair(tmp_path)
        else:
            (tmp_path / "m").write_bytes(b"oldm")
            with OutputFile(str(tmp_path / "m"), overwrite=True) as file:
                file.write(0, b"newm")
                file.finish(4)
                file.commit()
    assert all((tmp_path / name).read_bytes() == b"new" + name.encode() for name in ("m", "m_uncond")[:names])


@both_kinds
def test_a_name_that_is_too_long_for_its_temporary_is_refused_first(tmp_path, fp8_files, kind):
    function, name = CONVERT[kind]
    stages = []
    for length, options in ((250, {}), (234, {"unconditional": str(fp8_files["unconditional"])})):
        target = tmp_path / f"{'n' * (length - len(name))}{name}"
        with pytest.raises(ValueError, match=r"the name is too long .*\. Pick a shorter name\."):
            function(fp8_files["conditional"], target, report=stages.append, **options)
    assert not stages and not list(tmp_path.iterdir())
    assert function(fp8_files["conditional"], tmp_path / f"{'n' * (234 - len(name))}{name}")


@both_kinds
def test_a_second_name_that_is_taken_meanwhile(tmp_path, fp8_files, kind):
    name = CONVERT[kind][1].replace(".", "_uncond.")

    def appear(progress: Progress) -> None:
        (tmp_path / name).write_bytes(b"mine")

    with pytest.raises(ValueError, match=rf"{name}: exists already"):
        convert(kind, fp8_files, tmp_path, report=appear)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"mine"}


def test_closing_a_file_that_is_thrown_away_hides_no_error(tmp_path, monkeypatch):
    class Unclosable(io.FileIO):
        def close(self):
            super().close()
            raise OSError(errno.EIO, "close failed")

    monkeypatch.setattr(output_file, "open", lambda path, *rest, **options: Unclosable(path, "xb"), raising=False)
    with pytest.raises(KeyError, match="the real one"), OutputFile(str(tmp_path / "file")):
        raise KeyError("the real one")
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(RuntimeError, match=r"cannot be written \(close failed"),
        OutputFile(str(tmp_path / "file")) as file,
    ):
        file.finish(12)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="folders are not synchronized there")
@pytest.mark.parametrize("broken", ["open", "fsync", "close"])
def test_a_folder_that_cannot_be_synchronized_is_no_failure(tmp_path, monkeypatch, caplog, broken):
    real = {name: getattr(os, name) for name in ("open", "fsync", "close")}

    def fails_for_folders(first, *rest):
        is_folder = os.path.isdir(first) if broken == "open" else stat.S_ISDIR(os.fstat(first).st_mode)
        if is_folder:
            raise OSError(errno.EIO, "no such call here")
        return real[broken](first, *rest)

    with OutputFile(str(tmp_path / "file")) as file, caplog.at_level(logging.INFO), monkeypatch.context() as patched:
        patched.setattr(output_file.os, broken, fails_for_folders)
        file.finish(3)
        file.commit()
    assert (tmp_path / "file").read_bytes() == bytes(3)
    assert "cannot be synchronized with the disk (no such call here)" in caplog.text


def test_the_disk_has_the_bytes_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, then rename, then fsync of its folder."""
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}

    def record(name):
        def call(*arguments):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            calls.append(f"{name} folder" if is_folder else name)
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(output_file.os, name, record(name))
    with OutputFile(str(tmp_path / "file")) as file:
        file.write(4, torch.arange(3, dtype=torch.int16))
        file.write(0, b"abcd")
        file.finish(12)
        file.commit()
    assert calls == (["fsync", "replace", "fsync folder"] if os.name == "posix" else ["fsync", "replace"])
    assert (tmp_path / "file").read_bytes() == b"abcd\0\0\1\0\2\0\0\0"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) & 0o077 == 0o777 & ~_umask() & 0o066


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_does_not_grow_with_the_file(tmp_path):
    """Pages of the source that were read are let go: after converting no more of it is resident than one piece."""
    import psutil

    floats = {f"layers.{i}.w.weight": torch.randn(1024, 4096) for i in range(16)}  # 256 MB
    from host_harness import small_models as small

    path = small.save(tmp_path / "m.safetensors", floats)
    del floats
    peak, process = [0], psutil.Process()
    start = process.memory_info().rss

    def report(progress: Progress) -> None:
        peak[0] = max(peak[0], process.memory_info().rss - start)

    to_int8(path, tmp_path / "out.safetensors", report=report)
    assert peak[0] < 160 * 2**20


def test_bf16_sources_on_a_read_only_disk_are_fine(tmp_path):
    path = bf16(tmp_path)
    path.chmod(stat.S_IRUSR)
    assert to_int8(path, tmp_path / "out.safetensors")
