"""Thousands of damaged files: each either loads or is refused with a CheckpointError, quickly and within its memory."""

import contextlib
import json
import mmap
import random
import re
import signal
import struct
import time
import tracemalloc

import psutil
import pytest
import torch
from lowbit.formats import ggml
from lowbit.loaders import CheckpointError, open_checkpoint
from lowbit.tests.loaders.raw_files import (
    ARRAY,
    BLOCKS,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    GgufBytes,
    entry,
    safetensors_bytes,
)

try:
    import resource
except ImportError:  # Windows: Python's own allocations are still measured
    resource = None

FILES_PER_SEED = 500
SEEDS = range(4)
LIMIT_SECONDS = 2.0
SLACK_BYTES = 64 * 2**20
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    256,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**60,
    2**63,
    2**64 - 1,
)


class TookTooLongError(Exception):
    pass


@contextlib.contextmanager
def guard(file_bytes):
    """Interrupt after the time limit; let nothing allocate more than twice the file and the slack."""
    allowed = 2 * file_bytes + SLACK_BYTES
    start = time.perf_counter()
    with _address_space(allowed + file_bytes), _alarm():  # the mapping itself is the file once more
        tracemalloc.start()
        try:
            yield
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak <= allowed, f"Python allocated {peak:,} bytes for a file of {file_bytes:,}"
    assert time.perf_counter() - start < LIMIT_SECONDS


@contextlib.contextmanager
def _address_space(more_bytes):
    """A limit on new memory that torch's allocations cannot pass either; free room of the heap can still be reused."""
    if resource is None or not psutil.LINUX:
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@contextlib.contextmanager
def _alarm():
    if not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_):
        raise TookTooLongError

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def gguf_file(version, alignment):
    """A correct file with most kinds of metadata and tensors, and the places of its numbers."""
    shapes = {
        "plain": ((3, 5), 0),
        "half": ((4,), 1),
        "brain": ((2, 2, 2), 30),
        "one": ((), 0),
        "q8": ((64, 3), 8),
        "q4": ((256, 2), 12),
        "q6": ((512,), 14),
        "iq4": ((32, 2, 2), 20),
        "conv": ((96, 3), 8),
        "q4_0": ((32, 32), 2),
    }
    builder = GgufBytes(version, len(shapes), 8)
    builder.value("general.architecture", STRING, "ideogram4").value("general.alignment", U32, alignment)
    builder.value("ints", ARRAY, I32, [1, 2, 3]).value("tokens", ARRAY, STRING, ["ab", "", "ä"] * 30)
    builder.value("nested", ARRAY, ARRAY, [(U8, [1, 2]), (STRING, ["x"])]).value("split.count", U16, 1)
    builder.value("number", F32, 0.5).value("comfy.gguf.orig_shape.conv", ARRAY, I32, [16, 2, 3, 3])
    data = b""
    filler = random.Random(version)
    for name, (dims, type_id) in shapes.items():
        block_size, type_size = BLOCKS[type_id]
        count = 1
        for size in dims:
            count *= size
        builder.info(name, dims, type_id, len(data))
        data += filler.randbytes(count // block_size * type_size)
        data += bytes(-len(data) % alignment)
    return builder.data(data, alignment), builder.fields


def safetensors_file(metadata):
    header = {"__metadata__": metadata, "a.weight": entry("BF16", [4, 8], 0, 64), "a.scale": entry("F32", [], 64, 68)}
    header |= {
        "b.wq": entry("I8", [2, 3, 4], 68, 92),
        "none": entry("F8_E4M3", [0, 7], 92, 92),
        "c": entry("I64", [2], 92, 108),
    }
    return safetensors_bytes(header, random.Random(0).randbytes(108))


def mutate_numbers(rng, raw, fields):
    """Other numbers in the places of numbers: lengths, counts, kinds, dims, types, offsets, versions."""
    for position, code in rng.sample(fields, rng.choice((1, 1, 1, 2, 3))):
        size = struct.calcsize("<" + code)
        old = int.from_bytes(raw[position : position + size], "little")
        new = rng.choice(
            (
                rng.choice(NUMBERS),
                old + 1,
                old - 1,
                old * 2,
                old // 2,
                old ^ (1 << rng.randrange(64)),
                rng.getrandbits(64),
            )
        )
        raw[position : position + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return raw


def mutate_header_text(rng, raw):
    """Other JSON in the header of a safetensors file, half of the time with the length that belongs to it."""
    end = 8 + int.from_bytes(raw[:8], "little")
    text, data = raw[8:end].decode(), raw[end:]
    junk = [
        *map(str, NUMBERS),
        "-1",
        "1.5",
        "1e999",
        "NaN",
        "true",
        "null",
        "[]",
        "{}",
        '"F4"',
        '"U8"',
        '"a.weight"',
        '"',
        "[",
        "]",
        "{",
        "}",
    ]
    junk += [",", ":", "\\", '"\\ud800"', '"__metadata__"', "ä", "\0", '{"a":' * 50, "[" * 500, "9" * 500, " " * 100]
    for _ in range(rng.choice((1, 1, 2, 4))):
        token = rng.choice(list(re.finditer(r'"[^"]*"|-?\d+|[\[\]{}:,]', text)) or [re.search("", text)])
        kind = rng.randrange(4)
        new = "" if kind == 0 else token.group() * 2 if kind == 1 else rng.choice(junk)
        text = text[: token.start()] + new + text[token.end() :]
    raw_text = text.encode()
    length = len(raw_text) if rng.random() < 0.7 else rng.choice((end - 8, *NUMBERS))
    return bytearray((length % 2**64).to_bytes(8, "little") + raw_text + data)


def mutate_bytes(rng, raw, other):
    """What happens to any file: flipped bytes, a cut, an extension, pieces moved in or taken from another file."""
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice((1, 2, 8, 64))):
            raw[rng.randrange(len(raw) if rng.random() < 0.3 else min(len(raw), 600))] = rng.randrange(256)
    elif kind == 1:
        del raw[rng.randrange(1, len(raw)) :]
    elif kind == 2:
        raw += rng.randbytes(rng.choice((1, 100, 10_000)))
    else:
        start, size = rng.randrange(len(raw)), rng.choice((1, 8, 40, 400))
        source = raw if kind < 5 else other
        place = rng.randrange(len(source))
        piece = source[place : place + rng.choice((size, size, 0))]
        raw[start : start + (size if kind == 3 else len(piece) if kind == 4 else 0)] = piece
    return raw or bytearray(b"\0")


def use_everything(path):
    """Open, load every tensor, touch its last element, dequantize a first row."""
    for stored in open_checkpoint(path).tensors.values():
        loaded = stored.load()
        assert tuple(loaded.shape) == stored.shape
        if isinstance(loaded, torch.Tensor):
            if loaded.numel():
                loaded.reshape(-1)[-1:].clone()
        else:
            row = loaded.data.reshape(-1, loaded.data.shape[-1])[:1]
            assert ggml.dequantize(row, loaded.ggml_type).shape == (1, loaded.shape[-1])


GGUFS = [gguf_file(3, 32), gguf_file(2, 64), gguf_file(3, 1)]
SAFETENSORS = [safetensors_file({"format": "pt", "note": json.dumps({"a": [1, 2]})}), safetensors_file({})]


def damaged_gguf(rng):
    raw, fields = rng.choice(GGUFS)
    raw = bytearray(raw)
    if rng.random() < 0.6:
        mutate_numbers(rng, raw, fields)
    return raw if rng.random() < 0.5 else mutate_bytes(rng, raw, rng.choice([*GGUFS, (SAFETENSORS[0], None)])[0])


def damaged_safetensors(rng):
    raw = bytearray(rng.choice(SAFETENSORS))
    if rng.random() < 0.7:
        raw = mutate_header_text(rng, raw)
    return raw if rng.random() < 0.6 else mutate_bytes(rng, raw, rng.choice([*SAFETENSORS, GGUFS[0][0]]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("suffix", "damage"), [(".gguf", damaged_gguf), (".safetensors", damaged_safetensors)])
def test_damaged_file_loads_or_is_refused(tmp_path, suffix, damage, seed):
    rng = random.Random(f"{suffix} {seed}")
    whole = tmp_path / f"whole{suffix}"
    whole.write_bytes(GGUFS[0][0] if suffix == ".gguf" else SAFETENSORS[0])
    use_everything(whole)  # also starts torch's threads before memory is limited
    loaded, reasons = 0, set()
    path = tmp_path / f"damaged{suffix}"
    for index in range(FILES_PER_SEED):
        content = bytes(damage(rng))
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        try:
            with guard(len(content)):
                use_everything(path)
            loaded += 1
        except CheckpointError as error:
            reasons.add(re.sub(r"\d+", "#", f"{error.found} {error.expected}")[:40])
            assert str(error).startswith(path.name)
            assert len(str(error)) < 900
        except BaseException:
            print(f"file {index} of seed {seed}")  # noqa: T201
            raise
    assert loaded > FILES_PER_SEED // 50, "some mutations leave a usable file"
    assert len(reasons) > 20, "the mutations reach many checks"


def crowded_safetensors():
    """As many of the smallest tensors as are allowed, and metadata up to its limit."""
    entries = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % index for index in range(65_536))
    metadata = b",".join(b'"%d":"\\ud83d\\ude00%s"' % (index, b"x" * 100) for index in range(20_000))
    return b'{"__metadata__":{' + metadata + b"}," + entries + b"}"


def crowded_gguf():
    """As much metadata as is allowed, of the kind that grows most in memory, and many tensors."""
    builder = GgufBytes(3, 65_536, 20_000)
    for index in range(20_000):
        builder.value(str(index), ARRAY, U16, range(1000, 1064))
    for index in range(65_536):
        builder.info(f"{index}", (0,), 1, 0)
    return builder.data()


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_crowded_header_stays_within_its_memory(tmp_path, suffix):
    content = crowded_gguf() if suffix == ".gguf" else safetensors_bytes(crowded_safetensors())
    path = tmp_path / f"crowded{suffix}"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file.tensors) == 65_536
    assert peak <= 2 * len(content) + SLACK_BYTES


@pytest.mark.parametrize("content", [GGUFS[1][0], SAFETENSORS[0]], ids=["gguf", "safetensors"])
def test_every_cut_is_refused(tmp_path, content):
    path = tmp_path / ("x.gguf" if content.startswith(b"GGUF") else "x.safetensors")
    for size in {*range(1, min(len(content), 1200)), len(content) - 65}:
        path.unlink(missing_ok=True)
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError), guard(size):
            use_everything(path)


def test_guard_stops_what_takes_memory():
    with pytest.raises((AssertionError, MemoryError)), guard(1000):
        bytearray(SLACK_BYTES + 2**20)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")
def test_guard_stops_what_takes_time():
    with pytest.raises(TookTooLongError), guard(1000):
        time.sleep(LIMIT_SECONDS + 1)


LIMITED = pytest.mark.skipif(resource is None or not psutil.LINUX, reason="the address space cannot be limited here")


@LIMITED
def test_guard_stops_large_tensors():
    with pytest.raises(RuntimeError, match="allocate memory"), guard(1000):
        torch.empty(2**40, dtype=torch.uint8)


@LIMITED
def test_guard_stops_new_memory_above_the_slack():
    """Mapped here, not allocated: after other tests the heap may hold free room of this size, without new memory."""
    with pytest.raises(OSError, match="allocate memory"), guard(1000):
        mmap.mmap(-1, SLACK_BYTES + 2**22)
