"""What the tests of the ops share: running one implementation or skipping with its reason, and comparing results."""

import importlib

import pytest
import torch
from lowbit.formats.int8 import rotate
from lowbit.kernels.capability import interpreted
from lowbit.kernels.dispatch import use_implementation

# For every step of a loop that it runs.
INTERPRETER_WARNING = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"


def by(implementation, function, *arguments, **options):
    """`function(...)` computed by this implementation; skips the test, with the reason, where it refuses the call.

    An implementation that does not import fails the test, unless it is Triton itself that is missing.
    """
    with use_implementation(implementation):
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            refused = f"{implementation!r} was asked for, but it" in str(error)
            broken = "failed to import" in str(error) and "No module named 'triton'" not in str(error)
            if not refused or broken:
                raise
            reason = str(error)
    pytest.skip(reason)


def assert_grids_fit(monkeypatch, op, call):
    """That the grids which Triton's implementation launches for the call are within CUDA's limits; no kernel runs, so
    the call may hold tensors of the meta device."""
    implementation = importlib.import_module(f"{op.__name__}.triton_impl")
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append((*grid, 1, 1)[:3])
            return lambda *arguments, **options: None

    for name in vars(implementation):
        if name.endswith("_kernel"):
            monkeypatch.setattr(implementation, name, Kernel())
    implementation.run(call)
    assert grids
    for grid in grids:
        assert all(size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=True)), grid


def assert_within_eps(actual, expected, eps):
    """Values of one dtype that differ by at most `eps` of its machine epsilons, relative to the value; where terms
    cancel, by what float32 loses of the largest."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    rtol = eps * torch.finfo(expected.dtype).eps
    atol = 8 * torch.finfo(torch.float32).eps * float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


def assert_same_codes(actual, expected):
    """(xq, x_scale) of both equal bit for bit; where a scale is not finite, codes are zero and scales not compared."""
    _assert_same_form(actual, expected)
    finite = expected[1].isfinite()
    assert torch.equal(actual[1].isfinite(), finite)
    assert torch.equal(actual[1][finite], expected[1][finite])
    differing = int((actual[0] != expected[0]).sum())
    assert differing == 0, f"{differing} of {expected[0].numel()} codes differ"
    assert not actual[0][~finite.squeeze(-1)].any()


def assert_nearly_the_same_codes(actual, expected, rotated=None, eps=8):
    """(xq, x_scale) whose values were computed in another order: scales within `eps` float32 eps, and at most one code
    in a thousand (or a single one) differs, by 1, where a value lies between two codes.

    rotated: the dtype that values were rounded to before they were rotated. The rotation carries 16 bits, and a value
    between two of that dtype moves its whole group a little: scales may differ by the larger of the two. The
    interpreter cuts a float32 off to bfloat16 where a device rounds it, hence any number of codes is off by 1 there.
    """
    _assert_same_form(actual, expected)
    finite = expected[1].isfinite()
    assert torch.equal(actual[1].isfinite(), finite)
    rtol = eps * torch.finfo(torch.float32).eps if rotated is None else max(2**-16, torch.finfo(rotated).eps)
    torch.testing.assert_close(actual[1][finite], expected[1][finite], rtol=rtol, atol=0)
    off = (actual[0].int() - expected[0].int()).abs()
    differing = int((off != 0).sum())
    assert off.numel() == 0 or int(off.max()) <= 1, f"a code is off by {int(off.max())}"
    if not (rotated == torch.bfloat16 and interpreted()):
        assert differing <= max(1, 1e-3 * off.numel()), f"{differing} of {off.numel()} codes differ"
    assert not actual[0][~finite.squeeze(-1)].any()


def assert_codes_of(codes, values, smooth=None, rotation_group=0):
    """That (xq, x_scale) are float32 values, smoothed and rotated, to within half a step, the largest at +-127."""
    xq, x_scale = codes[0].double(), codes[1].double()
    values = values.double() if smooth is None else values.double() * smooth.double()
    values = rotate(values, rotation_group) if rotation_group else values
    off = ((xq * x_scale - values).abs() / x_scale).max()
    assert float(off) <= 0.501, f"a value is {float(off)} steps from its code"
    assert (xq.abs().amax(-1) == 127).all()


def listening_block(comfy_host, device, eps=1e-5):
    """A small transformer block of the host whose attention and FFN return what they are given, and the list of
    that."""
    ideogram4 = comfy_host.module("comfy.ldm.ideogram4.model")
    operations = comfy_host.module("comfy.ops").disable_weight_init
    block = ideogram4.Ideogram4TransformerBlock(256, 512, 2, eps, 64, torch.bfloat16, device, operations)
    generator = torch.Generator().manual_seed(1)
    # Loaded, not assigned: with dynamic VRAM the host's modules have no weights before.
    shapes = {f"{part}_norm{number}.weight": (256,) for part in ("attention", "ffn") for number in (1, 2)}
    shapes |= {"adaln_modulation.weight": (4 * 256, 64), "adaln_modulation.bias": (4 * 256,)}
    floats = {name: torch.rand(shape, generator=generator) * 0.5 + 0.2 for name, shape in shapes.items()}
    block.load_state_dict({name: value.to(device, torch.bfloat16) for name, value in floats.items()}, strict=False)
    heard = []

    class Ear(torch.nn.Module):
        def forward(self, x, *arguments, **options):
            heard.append(x)
            return x

    block.attention, block.feed_forward = Ear(), Ear()
    return block, heard


def _assert_same_form(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
