import pytest
import torch
from lowbit.kernels import record_channels as op
from lowbit.kernels.capability import interpreted
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.record_channels import record_channels
from lowbit.tests.kernels.comparing import INTERPRETER_WARNING, assert_grids_fit, by

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu
SHAPES = [
    *((1, 1), (1, 64), (2, 31), (255, 33), (257, 1), (300, 264), (600, 32)),
    *(pytest.param(4352, K, marks=gpu) for K in (4608, 12288)),
]
S = 64


def tokens(M, K, dtype, device, seed=0):
    """x [M, K] of about 1, so that no token vanishes in its channel's sum; one channel is loud and one is silent."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(seed))
    x[:, K // 3] *= 20
    x[:, K // 2 + 1 :][:, :1] = 0
    return x.to(device, dtype)


def fresh(K, device, samples=S):
    """absmax, square_sum, sample as a record begins; what is not drawn into the sample stays 77."""
    statistics = torch.zeros(2, K, device=device)
    return statistics[0], statistics[1], torch.full((samples, K), 77.0, dtype=torch.bfloat16, device=device)


def drawn(M, n, device, samples=S, seed=0):
    """rows, slots [n]: any tokens, the last one among them, and distinct slots in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(M, (n,), generator=generator)
    rows[-1:] = M - 1
    return rows.to(device), torch.randperm(samples, generator=generator)[:n].to(device)


def in_bfloat16(implementation, x):
    """x as it comes into the sample. The interpreter cuts a float32 off to bfloat16 where a device rounds it."""
    if implementation == "triton_impl" and interpreted() and x.dtype != torch.bfloat16:
        return (x.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    return x.to(torch.bfloat16)


def assert_square_sum(square_sum, *recorded):
    """Within (8 + sqrt(M)) float32 eps of the sum in float64 over the M tokens of all calls, relative to it.

    Terms are not negative, so nothing cancels: a rounding moves the sum by at most half an eps. Adding one token after
    another, as plain torch and the interpreter may do, rounds M times, up and down alike where tokens differ: about
    sqrt(M) halves. On a device Triton adds each 256th token apart, and rounds M / 256 + 10 times at most. The rest is
    for squares, roots and the sum of the calls. A token that is forgotten or counted twice is a part of about 1 / M,
    which is more up to some 40 000 tokens.
    """
    x = torch.cat(recorded).double()
    expected = x.square().sum(dim=0)
    off = (square_sum.double() - expected).abs()
    eps = torch.finfo(torch.float32).eps
    bound = (8 + x.shape[0] ** 0.5) * eps * expected
    assert (off <= bound).all(), f"off by {float((off / expected / eps).nan_to_num().max())} eps"


def check(implementation, x, second, n=20):
    """Two calls, x and second [..., K] of one dtype, into one record."""
    K, device = x.shape[-1], x.device
    absmax, square_sum, sample = fresh(K, device)
    kept = sample.clone()
    seen = []
    for call, one in enumerate((x, second)):
        flat = one.reshape(-1, K)
        rows, slots = drawn(flat.shape[0], n, device, seed=call)
        assert by(implementation, record_channels, one, absmax, square_sum, sample, rows, slots) is None
        kept[slots] = in_bfloat16(implementation, flat[rows])
        seen.append(flat)
        assert torch.equal(absmax, torch.cat(seen).float().abs().amax(dim=0))
        assert_square_sum(square_sum, *seen)
        assert torch.equal(sample, kept)


@pytest.mark.parametrize("M, K", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_two_calls_are_the_definition(implementation, dtype, M, K, device, poison_empty):
    check(implementation, tokens(M, K, dtype, device), tokens(M // 2 + 1, K, dtype, device, seed=1) * 0.99)


@pytest.mark.parametrize("n", [0, 1, S])
@pytest.mark.parametrize("samples", [S, 100, 128])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_any_number_of_drawn_tokens(implementation, samples, n, device):
    x = tokens(70, 40, torch.bfloat16, device)
    *statistics, sample = fresh(40, device, samples)
    kept = sample.clone()
    rows, slots = drawn(70, n, device, samples)
    kept[slots] = x[rows]
    by(implementation, record_channels, x, *statistics, sample, rows, slots)
    assert torch.equal(sample, kept)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_every_slot_and_no_slot_at_all(implementation, device):
    x = tokens(5, 40, torch.bfloat16, device)
    for samples in (0, 1, 5):
        absmax, square_sum, sample = fresh(40, device, samples)
        slots = torch.arange(samples, device=device).flip(0)
        by(implementation, record_channels, x, absmax, square_sum, sample, slots.flip(0), slots)
        assert torch.equal(sample, x[:samples].flip(0))
        assert torch.equal(absmax, x.float().abs().amax(dim=0))
        assert_square_sum(square_sum, x)


STRIDED = {
    "tokens apart": lambda x: torch.stack((x, torch.full_like(x, 99)), dim=2)[:, :, 0],
    "every other token": lambda x: torch.stack((x, torch.full_like(x, 99)), dim=2).flatten(1, 2)[:, ::2],
    "a part of wider tokens": lambda x: torch.cat((torch.full_like(x, 99), x, torch.full_like(x, 99)), dim=-1).chunk(
        3, dim=-1
    )[1],
    "transposed batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features apart": lambda x: x.flatten(0, 1).t().contiguous().t(),
    "not aligned": lambda x: torch.cat((x.new_full((1,), 99), x.flatten()))[1:].view(x.shape),
    "one sample for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("K", [1, 31, 48])
@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_strides(implementation, strided, K, device):
    """Strangers between the tokens and features are not recorded."""
    x, second = (STRIDED[strided](tokens(3 * 90, K, torch.float16, device, seed).view(3, 90, K)) for seed in (0, 1))
    assert float(x.abs().max()) < 99
    check(implementation, x, second)


@pytest.mark.parametrize("K", [1, 31, 33])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_nothing_is_written_beside_the_arguments(implementation, K, device):
    x = tokens(300, K, torch.bfloat16, device)
    *statistics, sample = (torch.full((4, K), 5.0, device=device) for _ in range(3))
    sample = sample.to(torch.bfloat16)
    inner = [statistics[0][1], statistics[1][1], sample[1:3]]
    for tensor in inner:
        tensor.zero_()
    rows, slots = (torch.tensor(values, device=device) for values in ([299, 7, 0, 0], [1, 0, 0, 0]))
    by(implementation, record_channels, x, *inner, rows[:2], slots[:2])
    assert torch.equal(inner[0], x.float().abs().amax(dim=0)) and torch.equal(inner[2], x[[7, 299]])
    for tensor, last in ((statistics[0], 2), (statistics[1], 2), (sample, 3)):
        assert (tensor[0] == 5).all() and (tensor[last:] == 5).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 299])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_what_is_not_finite_stays_in_its_channel(implementation, dtype, where, value, device):
    """And stays in it after a further call. A NaN is above an infinity."""
    x = tokens(300, 40, dtype, device)
    plain, record = fresh(40, device), fresh(40, device)
    rows, slots = (torch.tensor([index], device=device) for index in (where, 3))
    by(implementation, record_channels, x, *plain, rows, slots)
    by(implementation, record_channels, x, *plain, rows, slots)
    spoiled = x.clone()
    spoiled[150, 5] = float("inf")
    spoiled[where, 5] = value
    by(implementation, record_channels, spoiled, *record, rows, slots)
    by(implementation, record_channels, x, *record, rows[:0], slots[:0])
    expected = float("nan") if value != value else float("inf")
    others = torch.arange(40, device=device) != 5
    for actual, without in zip(record[:2], plain[:2], strict=True):
        assert torch.equal(actual[5].nan_to_num(nan=-1), torch.tensor(expected, device=device).nan_to_num(nan=-1))
        assert torch.equal(actual[others], without[others])
    torch.testing.assert_close(record[2][3, 5].float().cpu(), torch.tensor(value), equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_values_at_the_ends_of_the_range(implementation, device):
    """Subnormal magnitudes count, and a square beyond float32 is an infinity, not an error."""
    x = torch.zeros(3, 4, device=device)
    x[1] = torch.tensor([2.0**-149, -(2.0**-126), -3e38, -0.0], device=device)
    absmax, square_sum, sample = fresh(4, device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    by(implementation, record_channels, x, absmax, square_sum, sample, nothing, nothing)
    assert torch.equal(absmax, x[1].abs()) and not absmax[3].signbit()
    assert square_sum.tolist() == [0, 0, float("inf"), 0]


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (3, 0)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens_change_nothing(implementation, shape, device):
    x, nothing = torch.zeros(shape, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    record = [torch.full_like(tensor, 3) for tensor in fresh(shape[-1], device)]
    by(implementation, record_channels, x, *record, nothing, nothing)
    for tensor in record:
        assert torch.equal(tensor, torch.full_like(tensor, 3))


@pytest.mark.parametrize("M, K", [(300, 70), pytest.param(4352, 4608, marks=gpu)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_same_tokens_give_the_same_bytes(implementation, M, K, device):
    x, (rows, slots) = tokens(M, K, torch.bfloat16, device), drawn(M, S, device)
    first, *others = (fresh(K, device) for _ in range(4))
    for record in (first, *others):
        for _ in range(2):
            by(implementation, record_channels, x, *record, rows, slots)
    for record in others:
        for actual, expected in zip(record, first, strict=True):
            assert torch.equal(actual, expected)


def test_a_parameter_can_be_recorded(device):
    """Outside of no_grad too: nothing is remembered for a backward pass."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.nn.Parameter(tokens(5, 40, torch.float32, device))
        record, (rows, slots) = fresh(40, device), drawn(5, 2, device)
        record_channels(x, *record, rows, slots)
        assert not any(tensor.requires_grad for tensor in record)
    assert torch.equal(record[0], x.detach().abs().amax(dim=0))


@pytest.mark.triton
@pytest.mark.parametrize("M, K", [(1, 1), (300_000, 4608), (1, 3_000_000)])
def test_grids_fit_any_shape(M, K, monkeypatch):
    x, channels = (torch.empty(shape, device="meta") for shape in ((M, K), (K,)))
    sample = torch.empty(S, K, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(S, dtype=torch.int64, device="meta")
    assert_grids_fit(monkeypatch, op, op.RecordChannelsCall(x, channels, channels, sample, rows, rows))


@gpu
def test_more_than_2_to_31_values(device):
    M, K = 262_150, 8448
    x = torch.zeros(M, K, device=device, dtype=torch.bfloat16)
    x[-1] = tokens(1, K, torch.bfloat16, device)[0]
    absmax, square_sum, sample = fresh(K, device)
    rows, slots = (torch.tensor(values, device=device) for values in ([0, M - 1], [5, 2]))
    by("triton_impl", record_channels, x, absmax, square_sum, sample, rows, slots)
    assert torch.equal(absmax, x[-1].float().abs())
    assert torch.equal(square_sum, x[-1].float().square())  # bfloat16 squares are exact, and zeros add nothing
    assert torch.equal(sample[2], x[-1]) and not sample[5].any() and (sample[[0, 63]] == 77).all()


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("x", lambda x: x.int(), r"x must be bf16, fp16 or fp32 \[\.\.\., K\], got torch\.int32 \(5, 40\)"),
        ("x", lambda x: x.double(), r"x must be .* got torch\.float64 \(5, 40\)"),
        ("x", lambda x: x[0, 0], r"x must be .* got torch\.float32 \(\)"),
        ("x", lambda x: x[:, 1:], r"absmax must be contiguous float32 of shape \(39,\), got torch\.float32 \(40,\)"),
        ("absmax", lambda a: a.half(), r"absmax must be .* got torch\.float16 \(40,\)"),
        ("absmax", lambda a: a[None], r"absmax must be .* got torch\.float32 \(1, 40\)"),
        ("square_sum", lambda s: s.double(), r"square_sum must be .* of shape \(40,\), got torch\.float64 \(40,\)"),
        ("square_sum", lambda s: s.repeat(2)[::2], r"square_sum must be .* \(40,\) with strides \(2,\)"),
        ("sample", lambda s: s.float(), r"sample must be contiguous bfloat16 \[S, 40\], got torch\.float32 \(64, 40\)"),
        ("sample", lambda s: s[:, 1:], r"sample must be .* got torch\.bfloat16 \(64, 39\) with strides \(40, 1\)"),
        ("sample", lambda s: s[0], r"sample must be .* got torch\.bfloat16 \(40,\)"),
        ("sample", lambda s: s.t().contiguous().t(), r"sample must be .* with strides \(1, 64\)"),
        ("sample", lambda s: s[:2], r"3 rows do not fit a sample of 2"),
        ("rows", lambda r: r.int(), r"rows and slots must be int64 of one shape \[n\], got torch\.int32 \(3,\) and"),
        ("rows", lambda r: r[:2], r"rows and slots must be .* got torch\.int64 \(2,\) and torch\.int64 \(3,\)"),
        ("slots", lambda s: s.float(), r"rows and slots must be .* and torch\.float32 \(3,\)"),
        ("slots", lambda s: s.to("meta"), r"all tensors must be on one device, got cpu, meta"),
    ],
)
def test_what_does_not_fit_is_refused(name, make, message):
    rows, slots = drawn(5, 3, "cpu")
    absmax, square_sum, sample = fresh(40, "cpu")
    x = tokens(5, 40, torch.float32, "cpu")
    arguments = {"x": x, "absmax": absmax, "square_sum": square_sum, "sample": sample, "rows": rows, "slots": slots}
    arguments[name] = make(arguments[name])
    with pytest.raises(ValueError, match=f"record_channels: {message}"):
        record_channels(**arguments)
    assert not absmax.any() and not square_sum.any() and (sample == 77).all()


@pytest.mark.triton
def test_what_triton_refuses_is_computed_by_the_reference(device):
    x, nothing = tokens(5, 40, torch.float32, device), torch.zeros(0, dtype=torch.int64, device=device)
    record = fresh(40, device, samples=129)
    refused = "fills samples of up to 128 tokens, found 129"
    with use_implementation("triton_impl"), pytest.raises(RuntimeError, match=refused):
        record_channels(x, *record, nothing, nothing)
    record_channels(x, *record, nothing, nothing)
    assert torch.equal(record[0], x.abs().amax(dim=0))
