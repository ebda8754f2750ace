"""Pictures: what is drawn where."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from lit_gpt.training import pictures
from lit_gpt.training.pictures import (
    HIGHEST,
    LOWEST,
    ORANGE,
    AttentionPicture,
    Bars,
    Picture,
    choose_font,
    draw_bars,
    draw_curve,
    fit_text,
    nice_ticks,
    octave_means,
)


def pixels(picture: Picture) -> np.ndarray:
    """Return the numbers of the colours, (height, width)."""
    image = Image.open(io.BytesIO(picture.png))
    assert (image.mode, image.size) == ("P", (picture.width, picture.height))
    return np.asarray(image)


def test_palette_goes_from_black_to_white_and_from_white_to_dark() -> None:
    colours = np.array(pictures.palette()).reshape(256, 3)
    assert colours[[0, 127]].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert (np.diff(colours[LOWEST : HIGHEST + 1].sum(axis=1)) <= 0).all()


def test_attention_picture_has_a_cell_for_each_weight() -> None:
    maps = np.tril(np.random.default_rng(0).uniform(size=(5, 3, 3)))
    picture = AttentionPicture(["a", "␣b", "c"], [f"head {number}" for number in range(5)])
    cell = picture.CELL
    drawn = pixels(picture.draw(maps))
    for (x, y), weights in zip(picture._places, maps, strict=True):
        area = drawn[y : y + 3 * cell, x : x + 3 * cell].reshape(3, cell, 3, cell)
        expected = (LOWEST + weights * (HIGHEST - LOWEST)).round()
        assert (area == expected[:, None, :, None]).all()
    assert (pixels(picture.draw(maps * 0))[drawn < LOWEST] < LOWEST).all()  # the texts are still there


def test_fitting_text_is_as_long_as_there_is_room() -> None:
    font = ImageFont.load_default(15)
    text = "".join(chr(33 + number % 90) for number in range(10**4))  # one length at a time would take minutes
    assert fit_text("abc", font, font.getlength("abc")) == "abc"
    for keep_end in (False, True):
        shown = fit_text(text, font, 200, keep_end)
        kept = len(shown) - 1
        longer = f"…{text[-kept - 1 :]}" if keep_end else f"{text[: kept + 1]}…"
        assert shown == (f"…{text[-kept:]}" if keep_end else f"{text[:kept]}…")
        assert font.getlength(shown) <= 200 < font.getlength(longer)
    assert fit_text(text, font, 0) == "…"


def test_length_of_a_bar_is_its_value() -> None:
    drawn = pixels(draw_bars("header", [Bars("title", [("a", 0.25, True), ("b", 0.5, True), ("c", 1.0, False)])]))
    lengths = sorted({int(count) for count in (drawn == ORANGE).sum(axis=1)} - {0})
    assert len(lengths) == 2
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=2)


def test_curve_without_a_value_or_of_equal_values_is_drawn() -> None:
    for values in (np.array([2.0, np.nan, 1.0]), np.ones(7), np.array([3.0])):
        assert pixels(draw_curve("header", "x", values, 1.5, "mean")).std() > 0


def test_octave_means_cover_every_position_once() -> None:
    assert octave_means(np.arange(1.0, 7)) == [(1, 1), (2, 2), (3.5, 3.5), (5.5, 5.5)]
    assert octave_means(np.array([1.0, np.nan, 3.0])) == [(1, 1), (3, 3)]


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert nice_ticks(0.66, 1.73) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for low, high in ((0, 0), (5, 5), (-3.2, 7), (1e-9, 2e-9), (6.99, 7.01)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-12
        assert high - 1e-12 <= ticks[-1]
        assert 2 <= len(ticks) <= 9


@dataclass
class NoFonts:
    """Stands for a system without fonts."""

    def __call__(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, str):
            raise OSError("cannot open resource")
        return FREETYPE(name, *args, **kwargs)


FREETYPE = ImageFont.truetype


def test_without_a_font_for_them_tokens_become_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFont, "truetype", NoFonts())
    pictures.installed_fonts.cache_clear()
    try:
        assert choose_font(["abc"], 11)[1]
        assert not choose_font(["a静"], 11)[1]
        titles, maps = ["head"], np.ones((1, 2, 2))
        picture, numbers = (AttentionPicture(labels, titles) for labels in (["静", "夜"], ["1", "2"]))
        assert (picture.has_texts, numbers.has_texts) == (False, True)
        assert picture.draw(maps) == numbers.draw(maps)
    finally:
        pictures.installed_fonts.cache_clear()
