"""Draw heat maps, bars and curves with Pillow, for TensorBoard's page of images.

matplotlib would take 0.8 s to import, which is all that these pictures may cost a short run. A picture has one byte for
each pixel and a palette of 256 colours, so that it is encoded three times as fast as one of three bytes.
"""

import bisect
import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Numbers of colours in the palette. From INK to PAPER it is a ramp of grays, in which the edges of letters are smooth;
# from LOWEST to HIGHEST the ramp of heat maps.
INK, GRAY, LIGHT, PAPER = 0, 64, 112, 127
LOWEST, HIGHEST = 128, 253
BLUE, ORANGE = 254, 255
RAMP = np.array([(255, 255, 255), (254, 227, 145), (251, 140, 60), (190, 40, 90), (85, 15, 110), (10, 5, 40)])

# Fonts with Chinese characters on Linux, Windows and macOS, each with the number of its Simplified Chinese face, and
# fonts without them. Pillow looks for them in the folders of the system.
FONTS = (
    *(("NotoSansCJK-Regular.ttc", 2), ("NotoSansCJKsc-Regular.otf", 0), ("SourceHanSansSC-Regular.otf", 0)),
    *(("wqy-microhei.ttc", 0), ("wqy-zenhei.ttc", 0), ("DroidSansFallbackFull.ttf", 0)),
    *(("msyh.ttc", 0), ("simhei.ttf", 0), ("PingFang.ttc", 2), ("Hiragino Sans GB.ttc", 0), ("STHeiti Light.ttc", 1)),
    *(("Arial Unicode.ttf", 0), ("DejaVuSans.ttf", 0), ("segoeui.ttf", 0), ("Helvetica.ttc", 0), ("arial.ttf", 0)),
)
NO_CHARACTER = "\uffff"  # has no glyph in any font
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Picture:
    """A PNG file and its size in pixels."""

    png: bytes
    width: int
    height: int


# ------------------------------------------------------------------------------------------------------------- fonts


@functools.cache
def installed_fonts(size: int) -> list[Font]:
    """Return the fonts of `FONTS` that are installed, in this order, and Pillow's own, which has Latin letters only."""
    found: list[Font] = []
    for name, index in FONTS:
        try:
            found.append(ImageFont.truetype(name, size, index, layout_engine=ImageFont.Layout.BASIC))
        except OSError:
            continue
        if len(found) == 2:  # more are not needed, and each takes a millisecond to look for
            break
    return [*found, ImageFont.load_default(size)]


def choose_font(texts: list[str], size: int) -> tuple[Font, bool]:
    """Return the font that has the most of the characters of these texts, and whether it has all of them."""
    characters = sorted(set("".join(texts)))
    best, most = installed_fonts(size)[-1], -1
    for font in installed_fonts(size):
        no_glyph = bytes(font.getmask(NO_CHARACTER))
        count = sum(bytes(font.getmask(character)) != no_glyph for character in characters if character != " ")
        if count > most:
            best, most = font, count
    return best, most == sum(character != " " for character in characters)


def fit_text(text: str, font: Font, width: float, keep_end: bool = False) -> str:
    """Return the beginning of a text that is at most `width` pixels wide, or its end, with `…` for the rest."""
    if font.getlength(text) <= width:
        return text

    def shortened(length: int) -> str:
        return f"…{text[len(text) - length :]}" if keep_end else f"{text[:length]}…"

    # the number of lengths that fit; found by bisection, because a text may have many thousands of characters
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda length: font.getlength(shortened(length)))
    return shortened(max(0, fitting - 1))


# ----------------------------------------------------------------------------------------------------------- drawing


@functools.cache
def palette() -> list[int]:
    """Return red, green and blue of the 256 colours."""
    grays = np.linspace(0, 255, PAPER + 1)[:, None].repeat(3, axis=1)
    places = np.linspace(0, len(RAMP) - 1, HIGHEST - LOWEST + 1)
    heat = np.stack([np.interp(places, range(len(RAMP)), channel) for channel in RAMP.T], axis=1)
    colours = np.concatenate((grays, heat, [(76, 120, 168), (245, 133, 24)]))
    return [int(value) for value in colours.round().flatten()]


def new_canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty picture and what draws in it. Its pixels are numbers of colours."""
    image = Image.new("L", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def encode(image: Image.Image) -> Picture:
    """Return a drawn picture as a PNG file."""
    image.putpalette(palette())
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return Picture(file.getvalue(), image.width, image.height)


class AttentionPicture:
    """Heat maps of attention weights, in rows of four, with the texts of the tokens on the axes.

    The texts do not change during a run, so they are drawn once.

    Args:
        labels: The texts of the T tokens.
        titles: A title for each map.

    Attributes:
        has_texts: Whether a font has all characters of the texts. If none has, the axes have the numbers of the tokens.
    """

    CELL = 12  # pixels for a token
    LABELS = 72  # pixels for the texts of the tokens
    COLUMNS = 4
    GAP, TITLE, HEADER = 6, 26, 34

    def __init__(self, labels: list[str], titles: list[str]) -> None:
        font, self.has_texts = choose_font(labels, self.CELL - 1)
        if not self.has_texts:
            labels = [str(position) for position in range(1, len(labels) + 1)]
        side, strip = len(labels) * self.CELL, self._draw_strip(labels, font)
        columns, rows = min(self.COLUMNS, len(titles)), -(-len(titles) // self.COLUMNS)
        width = max(640, self.LABELS + columns * (side + self.GAP))
        height = self.HEADER + rows * (side + self.TITLE) + self.LABELS
        self._image, draw = new_canvas(width, height)
        self._places = []
        title_font, _ = choose_font(["Attention"], 14)
        header = "Attention: a row is the token that reads, a column the token that is read"
        draw.text((self.LABELS, 8), header, INK, title_font)
        self._draw_scale(draw, width, title_font)
        for number, title in enumerate(titles):
            row, column = divmod(number, columns)
            x, y = self.LABELS + column * (side + self.GAP), self.HEADER + row * (side + self.TITLE) + self.TITLE
            draw.text((x, y - 21), title, GRAY, title_font)
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline=LIGHT)
            self._places.append((x, y))
            if column == 0:
                self._image.paste(strip, (0, y))
            if number + columns >= len(titles):  # no map is below
                self._image.paste(strip.transpose(Image.Transpose.ROTATE_90), (x, y + side))

    def _draw_strip(self, labels: list[str], font: Font) -> Image.Image:
        """Return the texts of the tokens below each other, at the right edge."""
        strip, draw = new_canvas(self.LABELS, len(labels) * self.CELL)
        for number, label in enumerate(labels):
            place = self.LABELS - 4, number * self.CELL + self.CELL // 2
            draw.text(place, fit_text(label, font, self.LABELS - 6), INK, font, anchor="rm")
        return strip

    def _draw_scale(self, draw: ImageDraw.ImageDraw, width: int, font: Font) -> None:
        """Draw which colours mean 0 and 1, at the right."""
        left, steps = width - self.GAP - 150, 100
        for step in range(steps):
            colour = LOWEST + step * (HIGHEST - LOWEST) // (steps - 1)
            draw.line((left + 20 + step, 10, left + 20 + step, 22), fill=colour)
        draw.text((left + 14, 8), "0", GRAY, font, anchor="ra")
        draw.text((left + 26 + steps, 8), "1", GRAY, font)

    def draw(self, maps: np.ndarray) -> Picture:
        """Return the picture of weights (maps, T, T), from 0 to 1."""
        image = self._image.copy()
        colours = (LOWEST + maps * (HIGHEST - LOWEST)).round().astype(np.uint8)
        for place, cells in zip(self._places, colours, strict=True):
            pixels = cells.repeat(self.CELL, axis=0).repeat(self.CELL, axis=1)
            image.paste(Image.fromarray(pixels), place)
        return encode(image)


@dataclass(frozen=True)
class Bars:
    """Bars below each other: a title, and for each bar its label, a value from 0 to 1 and whether it is marked."""

    title: str
    bars: list[tuple[str, float, bool]]


def draw_bars(header: str, panels: list[Bars]) -> Picture:
    """Draw panels of bars, two in a row, each bar with its label on the left and its value in percent on the right."""
    panel_width, bar_height, label_width, top = 480, 24, 150, 40
    rows = max(len(panel.bars) for panel in panels)
    panel_height = 34 + rows * bar_height + 10
    columns = min(2, len(panels))
    image, draw = new_canvas(columns * panel_width, top + -(-len(panels) // columns) * panel_height)
    texts = [text for panel in panels for text in (panel.title, *(label for label, _, _ in panel.bars))]
    font, _ = choose_font([header, *texts], 15)
    draw.text((12, 10), header, INK, font)
    for number, panel in enumerate(panels):
        x, y = number % columns * panel_width, top + number // columns * panel_height
        draw.text((x + 12, y + 6), fit_text(panel.title, font, panel_width - 30, keep_end=True), GRAY, font)
        length = panel_width - label_width - 76
        for row, (label, value, is_marked) in enumerate(panel.bars):
            left, middle = x + label_width, y + 34 + row * bar_height + bar_height // 2
            draw.text((left - 8, middle), fit_text(label, font, label_width - 14), INK, font, anchor="rm")
            right = left + max(1, round(value * length))
            draw.rectangle((left, middle - 9, right, middle + 9), fill=ORANGE if is_marked else BLUE)
            draw.text((right + 6, middle), percent(value), INK, font, anchor="lm")
    return encode(image)


def percent(share: float) -> str:
    """Return a share as text, as `4.3%`."""
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def draw_curve(header: str, x_label: str, values: np.ndarray, mean: float, mean_label: str) -> Picture:
    """Draw values (N,) at x = 1 … N on a logarithmic axis: each one in gray, means of 1, 1, 2, 4, 8, … of them in blue.

    Args:
        header: Above the picture.
        x_label: Below the axis.
        values: Where they are not finite, nothing is drawn.
        mean: Of all values; a line across the picture.
        mean_label: Is written at the top, in the colour of the line.
    """
    width, height, left, right, top, bottom = 960, 480, 70, 940, 56, 62
    image, draw = new_canvas(width, height)
    font, _ = choose_font([header], 15)
    draw.text((16, 12), header, INK, font)
    draw.text((right, 12), mean_label, INK, font, anchor="ra")
    length = font.getlength(mean_label)
    draw.line((right - length - 40, 21, right - length - 8, 21), fill=ORANGE, width=3)
    finite = values[np.isfinite(values)]
    ticks = nice_ticks(float(finite.min()), float(finite.max()))
    octaves = math.log2(max(2, len(values)))

    def place(position: float, value: float) -> tuple[float, float]:
        share = (ticks[-1] - value) / (ticks[-1] - ticks[0])
        return left + math.log2(position) / octaves * (right - left), top + share * (height - top - bottom)

    def line(points: list[tuple[float, float]], colour: int, thickness: int) -> None:
        draw.line([place(x, y) for x, y in points if math.isfinite(y)], fill=colour, width=thickness, joint="curve")

    for tick in ticks:
        line([(1, tick), (len(values), tick)], LIGHT, 1)
        draw.text((left - 8, place(1, tick)[1]), f"{tick:.4g}", INK, font, anchor="rm")
    for exponent in range(int(octaves) + 1):
        draw.text((place(2**exponent, 0)[0], height - bottom + 8), str(2**exponent), INK, font, anchor="ma")
    draw.text(((left + right) / 2, height - 10), x_label, GRAY, font, anchor="md")
    line(list(enumerate(values.tolist(), 1)), GRAY + 20, 1)
    line([(1, mean), (len(values), mean)], ORANGE, 2)
    line(octave_means(values), BLUE, 4)
    return encode(image)


def octave_means(values: np.ndarray) -> list[tuple[float, float]]:
    """Return (x, mean) of the values at x = 1, 2, 3 … 4, 5 … 8, …, without those that are not finite."""
    means, start = [], 1
    while start <= len(values):
        stop = min(max(start, 2 * (start - 1)), len(values))  # the last one
        part = values[start - 1 : stop]
        part = part[np.isfinite(part)]
        if len(part):
            means.append(((start + stop) / 2, float(part.mean())))
        start = stop + 1
    return means


def nice_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … and 0.5, 0.2, 0.1, … that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers, equally spaced, from at most `low` to at least `high`."""
    step = nice_step(max(high - low, 1e-3 * max(abs(high), 1e-9)) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
