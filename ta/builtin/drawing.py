"""Drawing of the shapes in generated pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


class Shape(NamedTuple):
    """One drawn shape: a circle, square, triangle or cross around (x, y), all in pixels."""

    kind: str
    colour: tuple[int, int, int]
    x: float
    y: float
    radius: float


def draw(size: int, background: tuple[int, int, int], shapes: Sequence[Shape]) -> np.ndarray:
    """A (size, size, 3) uint8 picture with `shapes` drawn in order.

    The shapes are drawn four times as large and reduced, which smooths their edges. ValueError for
    an unknown kind of shape.
    """
    large = Image.new("RGB", (size * 4, size * 4), background)
    pen = ImageDraw.Draw(large)
    for kind, colour, x, y, radius in shapes:
        corners = (x - radius, y - radius, x + radius, y + radius)
        left, top, right, bottom = (value * 4 for value in corners)
        third = radius * 4 / 3
        if kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif kind == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        elif kind == "triangle":
            pen.polygon([(x * 4, top), (left, bottom), (right, bottom)], fill=colour)
        elif kind == "cross":
            pen.rectangle((x * 4 - third, top, x * 4 + third, bottom), fill=colour)
            pen.rectangle((left, y * 4 - third, right, y * 4 + third), fill=colour)
        else:
            raise ValueError(
                f"shape {kind!r} cannot be drawn; give circle, square, triangle or cross"
            )
    return np.asarray(large.resize((size, size), resample=Image.Resampling.BOX))


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8 in the format of the path's suffix."""
    Image.fromarray(image).save(path)
