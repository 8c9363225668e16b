"""Numbers by kind of layer (rows) and depth (columns), as a picture."""

from __future__ import annotations

import dataclasses
import math
import os

from PIL import Image, ImageDraw, ImageFont

Place = tuple[str, int | None]  # of a layer: its kind and its depth

CELL_WIDTH, CELL_HEIGHT, MARGIN, LINE = 22, 18, 12, 20
BAR_WIDTH = 14
# From harmless to bad: light yellow over orange to dark violet, which is a ramp of brightness too.
_RAMP = ((255, 250, 214), (253, 204, 102), (240, 120, 60), (178, 40, 90), (70, 12, 84))
_EMPTY, _INK, _FRAME = (240, 240, 240), (30, 30, 30), (0, 90, 200)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One heat map. values: by (kind, depth); a layer without depth stands in the first column. framed: places.

    low_is_bad: which end of the numbers is dark.
    """

    title: str
    values: dict[Place, float]
    framed: set[Place] = dataclasses.field(default_factory=set)
    logarithmic: bool = False
    low_is_bad: bool = False

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in sorted(self.values, key=lambda place: (place[1] is None, place))))

    @property
    def columns(self) -> int:
        return 1 + max(depth or 0 for _, depth in self.values)

    @property
    def height(self) -> int:
        return 2 * LINE + CELL_HEIGHT * len(self.kinds) + MARGIN


def check_ending(path: str) -> None:
    """Raises ValueError for a file name whose ending names no kind of picture that can be written."""
    ending = os.path.splitext(path)[1].lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        found = f"the ending {ending}" if ending else "no ending"
        raise ValueError(f"{path}: found {found}, expected a kind of picture, such as .png.")


def draw(panels: list[Panel]) -> Image.Image:
    """The panels below each other."""
    font = ImageFont.load_default(12)
    names = max(font.getlength(kind) for panel in panels for kind in panel.kinds)
    left = round(MARGIN + names + 8)
    grid = CELL_WIDTH * max(panel.columns for panel in panels)
    titles = max(font.getlength(panel.title) for panel in panels)
    width = round(max(left + grid + BAR_WIDTH + 90, titles + 2 * MARGIN))
    image = Image.new("RGB", (width, sum(panel.height for panel in panels) + MARGIN), "white")
    pen, top = ImageDraw.Draw(image), MARGIN
    for panel in panels:
        _draw_panel(pen, font, panel, left, top)
        top += panel.height
    return image


def _draw_panel(pen: ImageDraw.ImageDraw, font, panel: Panel, left: int, top: int) -> None:
    pen.text((MARGIN, top), panel.title, _INK, font)
    columns, kinds, top = panel.columns, panel.kinds, top + 2 * LINE
    for depth in range(0, columns, 1 if columns <= 12 else 2):
        pen.text((left + CELL_WIDTH * (depth + 0.5), top - 3), str(depth), _INK, font, anchor="ms")
    scale = {place: math.log(max(value, 1e-9)) if panel.logarithmic else value for place, value in panel.values.items()}
    low, high = min(scale.values()), max(scale.values())
    for row, kind in enumerate(kinds):
        y = top + CELL_HEIGHT * row
        pen.text((left - 8, y + CELL_HEIGHT / 2), kind, _INK, font, anchor="rm")
        for depth in range(columns):
            place = (kind, depth) if (kind, depth) in scale else (kind, None)
            if place not in scale or (place[1] is None and depth):
                color = _EMPTY
            else:
                color = _color(scale[place], low, high, panel.low_is_bad)
            x = left + CELL_WIDTH * depth
            pen.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), fill=color)
            if place in panel.framed and place in scale:
                pen.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), outline=_FRAME, width=3)
    _draw_bar(pen, font, panel, left + CELL_WIDTH * columns + 10, top)


def _draw_bar(pen: ImageDraw.ImageDraw, font, panel: Panel, x: int, top: int) -> None:
    """What the colors mean, bad at the top."""
    height = max(CELL_HEIGHT * len(panel.kinds) - 2, 2 * LINE)
    for y in range(height):
        pen.line((x, top + y, x + BAR_WIDTH, top + y), fill=_color(height - 1 - y, 0, height - 1, False))
    low, high = min(panel.values.values()), max(panel.values.values())
    bad, good = (low, high) if panel.low_is_bad else (high, low)
    pen.text((x + BAR_WIDTH + 6, top), f"{bad:.4g}", _INK, font)
    pen.text((x + BAR_WIDTH + 6, top + height), f"{good:.4g}", _INK, font, anchor="ls")


def _color(value: float, low: float, high: float, low_is_bad: bool) -> tuple[int, int, int]:
    part = (value - low) / (high - low) if high > low else 0.0
    position = (1 - part if low_is_bad and high > low else part) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    first, second, mix = _RAMP[index], _RAMP[index + 1], position - index
    return tuple(round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))
