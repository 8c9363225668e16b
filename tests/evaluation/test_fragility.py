"""The ranking by two measures, where they disagree, and the picture of both."""

import pytest
import torch
from lowbit.convert.record import LayerActivations
from lowbit.evaluation.fragility import MEASURES, panels, rank_layers, table
from lowbit.evaluation.int8_error import output_sqnr_db
from lowbit.evaluation.metrics import EXACT_DB, sqnr_of
from lowbit.evaluation.names import kind_and_depth
from lowbit.evaluation.picture import CELL_HEIGHT, CELL_WIDTH, draw
from lowbit.formats import int8

# Spikiness and error in dB.
LAYERS = {
    "input_proj": (900.0, 5.0),
    "layers.0.feed_forward.w2": (80.0, 20.0),
    "layers.1.feed_forward.w2": (60.0, 30.0),
    "layers.0.attention.o": (5.0, 25.0),
    "layers.1.attention.o": (4.0, 40.0),
}


def ranked(protect_count=2, measure=MEASURES[0], errors=True):
    record = {name: LayerActivations(torch.ones(8), torch.ones(8), spiky) for name, (spiky, _) in LAYERS.items()}
    shapes = dict.fromkeys(LAYERS, (512, 512))
    sqnr = {name: error for name, (_, error) in LAYERS.items()} if errors else {}
    return rank_layers(record, shapes, sqnr, measure, protect_count)


def test_layers_are_ranked_and_the_most_fragile_that_would_be_quantized_are_protected():
    fragility = ranked()
    assert [layer.name for layer in fragility.layers] == list(LAYERS)
    assert fragility.kept == {"input_proj"}  # outside the blocks: a conversion leaves it alone anyway
    assert fragility.protected == {"layers.0.feed_forward.w2", "layers.1.feed_forward.w2"}
    by_error = ranked(measure=MEASURES[1])
    assert [layer.sqnr_db for layer in by_error.layers] == [5, 20, 25, 30, 40]
    assert by_error.protected == {"layers.0.feed_forward.w2", "layers.0.attention.o"}


def test_the_table_shows_both_measures_and_where_they_disagree():
    lines = table(ranked()).splitlines()
    assert lines[1].split() == ["kept", "input_proj", "900.0", "1", "5.0", "1"]
    assert lines[3].split() == ["protect", "layers.1.feed_forward.w2", "60.0", "3", "30.0", "4"]
    assert lines[4].split() == ["layers.0.attention.o", "5.0", "4", "25.0", "3"]
    assert "  only by spikiness: layers.1.feed_forward.w2" in lines
    assert "  only by output error: layers.0.attention.o" in lines
    assert "name different layers" not in table(ranked(protect_count=1))


def test_a_table_without_the_second_measure():
    text = table(ranked(errors=False))
    assert "layers.1.feed_forward.w2       60.0     3          -     -" in text and "different" not in text
    assert len(panels("model", ranked(errors=False))) == 1


def test_a_long_table_is_cut():
    record = {f"layers.{i}.w": LayerActivations(torch.ones(8), torch.ones(8), 100.0 - i) for i in range(40)}
    fragility = rank_layers(record, dict.fromkeys(record, (512, 512)), {}, protect_count=3)
    assert "and 24 more, less fragile" in table(fragility) and "layers.16.w" not in table(fragility)


@pytest.mark.parametrize("N, K", [(33, 64), (5000, 4096)], ids=["small", "in_parts"])
def test_the_output_error_is_that_of_int8(N, K):
    """Against the product of the codes themselves; the large weight is read in two parts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, K, generator=generator)
    x[:, 3] *= 30
    w = torch.randn(N, K, generator=generator)
    xq, wq = int8.quantize_weight(x), int8.quantize_weight(w)
    product = (xq.data.double() @ wq.data.double().t()) * xq.scale * wq.scale.t()
    assert output_sqnr_db(x, w) == pytest.approx(sqnr_of(x @ w.t(), product.float()), abs=0.01)
    assert output_sqnr_db(x, wq) > output_sqnr_db(x, w)  # against what the layer is, as it is loaded
    assert output_sqnr_db(torch.zeros(20, K), w) == EXACT_DB


def test_kinds_of_layers():
    assert kind_and_depth("layers.12.feed_forward.w2") == ("layers.N.feed_forward.w2", 12)
    assert kind_and_depth("double_blocks.3.img_mlp.0") == ("double_blocks.N.img_mlp.0", 3)
    assert kind_and_depth("final_layer.linear") == ("final_layer.linear", None)


def test_the_picture_frames_protected_layers_and_darkens_fragile_ones():
    (spiky, _) = panels("model", ranked(protect_count=1))
    picture = draw([spiky])
    assert spiky.kinds == ["layers.N.attention.o", "layers.N.feed_forward.w2", "input_proj"]
    blue = (0, 90, 200)
    framed = [(x, y) for x in range(picture.width) for y in range(picture.height) if picture.getpixel((x, y)) == blue]
    left, top = min(framed)
    assert max(framed) == (left + CELL_WIDTH - 2, top + CELL_HEIGHT - 2)

    def brightness(row, column):
        center = (left + CELL_WIDTH * column + CELL_WIDTH // 2, top + CELL_HEIGHT * row + CELL_HEIGHT // 2)
        return sum(picture.getpixel(center))

    protected, second, harmless, worst = (brightness(*p) for p in ((0, 0), (0, 1), (-1, 1), (1, 0)))
    assert worst < protected < second < harmless
