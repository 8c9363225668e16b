"""What is recorded of a running model: the numbers of a direct computation, an even sample, and nothing left behind."""

import pytest
import torch
from lowbit.evaluation import activations
from lowbit.evaluation.activations import SAMPLE_ROWS, WORDS, ActivationRecorder, LayerStatistics, spikiness


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(24, 40, bias=False), torch.nn.LayerNorm(40)
        self.second = torch.nn.Linear(40, 8)

    def forward(self, x):
        return self.second(input=self.norm(self.first(x)))


def recorded(model, inputs) -> ActivationRecorder:
    recorder = ActivationRecorder()
    recorder.attach(model)
    for x in inputs:
        model(x)
    recorder.detach(model)
    return recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_record_is_what_a_direct_computation_gives(dtype, device):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(torch.randn(24, generator=generator))
    calls = [(torch.randn(shape, generator=generator) * sizes).to(device, dtype) for shape in ((2, 50, 24), (7, 24))]
    calls.append(calls[0].transpose(0, 1)[::2])  # with strides
    recorder = recorded(torch.nn.Sequential(torch.nn.Linear(24, 8)).to(device, dtype), calls)
    rows = torch.cat([x.reshape(-1, 24) for x in calls]).double().cpu()
    layer = recorder.activations()["0"]
    assert torch.equal(layer.absmax.double(), rows.abs().amax(dim=0))
    torch.testing.assert_close(layer.mean_square.double(), rows.square().mean(dim=0), rtol=1e-5, atol=0)
    assert layer.spikiness == pytest.approx(float(layer.absmax.max() / layer.absmax.median()))
    assert (recorder.layers["0"].N, recorder.layers["0"].K) == (8, 24)
    assert (recorder.layers["0"].rows, recorder.layers["0"].calls) == (len(rows), 3)


def test_all_linear_layers_and_only_they_are_recorded():
    recorder = recorded(TwoLayers(), [torch.randn(5, 24)])
    assert recorder.layers.keys() == {"first", "second"}
    assert recorder.layers["second"].K == 40


def test_calls_without_tokens_count_for_nothing():
    recorder = recorded(torch.nn.Sequential(torch.nn.Linear(24, 8)), [torch.ones(0, 24), torch.ones(3, 24)])
    assert (recorder.layers["0"].rows, recorder.layers["0"].calls) == (3, 1)


def test_the_sample_holds_every_row_as_likely():
    """Rows that name themselves, in calls of different sizes: a mean and a spread of whole numbers drawn evenly."""
    total, found = 4000, []
    for seed in range(40):
        statistics = LayerStatistics(1, 2, torch.zeros(2 * WORDS))
        start = 0
        for size in (30, 50, 1 + seed, 200, total):
            size = min(size, total - start)
            numbers = torch.arange(start, start + size)
            statistics.update(torch.stack([numbers // 64, numbers % 64], dim=1).float())  # bf16 holds them
            start += size
        sample = statistics.sample.float()
        numbers = sample[:, 0] * 64 + sample[:, 1]
        assert len(numbers.unique()) == SAMPLE_ROWS
        found.append(numbers)
    found = torch.cat(found)
    deviation = total / 12**0.5
    assert abs(float(found.mean()) - total / 2) < 4 * deviation / len(found) ** 0.5
    assert float(found.std()) == pytest.approx(deviation, rel=0.05)


def test_a_short_run_is_sampled_whole_and_runs_repeat():
    x = torch.randn(SAMPLE_ROWS - 10, 24)
    short = recorded(torch.nn.Sequential(torch.nn.Linear(24, 8)), [x[:20], x[20:]]).layers["0"]
    assert torch.equal(short.sample, x.to(torch.bfloat16))
    inputs = [torch.randn(90, 24) for _ in range(3)]
    one, two = (recorded(torch.nn.Sequential(torch.nn.Linear(24, 8)), inputs).layers["0"] for _ in range(2))
    assert torch.equal(one.sample, two.sample)


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_call_costs_one_kernel_and_waits_for_nothing(monkeypatch):
    """Beside it nothing runs, neither a number nor a copy is asked of the device, and layers that see the same tokens
    share what is drawn."""
    x, drawn = torch.randn(2, 50, 24), []
    monkeypatch.setattr(activations, "record_channels", lambda *arguments: drawn.append(arguments[-1]))
    first, second = (LayerStatistics(8, 24, torch.zeros(24 * WORDS)) for _ in range(2))
    for _ in range(40):
        first.update(x)
        with Ops() as ops:
            second.update(x)
        assert set(ops.names) <= {"detach", "view", "reshape", "to"}  # the last two in inference mode alone
    assert len(drawn) == 80 and all(one is other for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert len(drawn[0]) == SAMPLE_ROWS and 3 < sum(len(slots) > 0 for slots in drawn[::2]) < 38  # ever fewer calls


def test_layers_share_one_piece_of_memory():
    recorder = recorded(TwoLayers(), [torch.randn(5, 24)])
    pointers = {layer._absmax.untyped_storage().data_ptr() for layer in recorder.layers.values()}
    assert len(recorder.layers) == 2 and len(pointers) == 1


def test_spikiness_is_the_loudest_channel_over_the_median_one():
    assert spikiness(torch.tensor([1.0, 2.0, 4.0, 2.0, 50.0])) == 25
    assert spikiness(torch.zeros(4)) == 0
    assert spikiness(torch.tensor([0.0, 0.0, 0.0, 3.0])) == pytest.approx(1e6)  # finite: files hold it


def test_nothing_is_left_on_the_model():
    model, x = TwoLayers(), torch.randn(5, 24)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    recorder = ActivationRecorder()
    recorder.attach(model)
    recorder.attach(model)  # a second model of one guider may be the same
    model(x)
    assert recorder.layers["first"].calls == 1
    recorder.detach(model)
    recorder.detach(model)
    model(x)
    assert recorder.layers["first"].calls == 1
    for name, module in model.named_modules():
        assert vars(module) == before[name] and not module._forward_pre_hooks


def test_hooks_of_others_stay():
    model, seen = TwoLayers(), []
    model.first.register_forward_pre_hook(lambda module, args: seen.append(args))
    recorded(model, [torch.randn(5, 24)])
    model(torch.randn(5, 24))
    assert len(seen) == 2


def test_a_compiled_module_is_recorded_and_stays_compiled():
    model, compiled = TwoLayers(), []
    model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph)
    x = torch.randn(5, 24)
    model(x)
    call = model._compiled_call_impl
    assert recorded(model, [x]).layers["first"].calls == 1
    assert model._compiled_call_impl is call and compiled


def test_an_empty_record_and_an_overflowing_model_are_told_to_people():
    with pytest.raises(ValueError, match="The record is empty: no sampler has run the model that came out of Profile"):
        ActivationRecorder().activations()
    recorder = recorded(TwoLayers(), [torch.full((2, 24), float("inf"))])
    with pytest.raises(ValueError, match="first of model has read infinite numbers or numbers that are none"):
        recorder.activations()
