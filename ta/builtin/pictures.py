"""Generated pictures with questions and right answers: shapes, colours, places and counts."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ta.builtin.tasks import write_jsonl

if TYPE_CHECKING:
    import numpy as np

# pixels
SIZE = 48
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")


class Scene(NamedTuple):
    """One picture of one or more equal shapes in different quarters."""

    shape: str
    colour: str
    places: tuple[str, ...]
    # (x, y) in pixels
    centres: tuple[tuple[float, float], ...]
    radius: float
    background: tuple[int, int, int]


def make_scene(seed: int, index: int, held_out: bool) -> Scene:
    """Picture `index` of a seeded endless series.

    The red value of the background is even in training and odd in held-out pictures, so no picture
    is in both.
    """
    import numpy as np

    random = np.random.default_rng([seed, index, held_out])
    count = 1 if random.random() < 0.7 else int(random.integers(2, 5))
    cells = sorted(random.choice(4, count, replace=False).tolist())
    radius = float(random.uniform(7, 10))
    # the greatest distance of a centre from the middle of its quarter
    reach = SIZE / 4 - 1 - radius
    shift = random.uniform(-reach, reach, (count, 2))
    centres = []
    for cell, (dx, dy) in zip(cells, shift.tolist(), strict=True):
        row, column = divmod(cell, 2)
        centres.append((SIZE / 4 * (1 + 2 * column) + dx, SIZE / 4 * (1 + 2 * row) + dy))
    shape = SHAPES[random.integers(len(SHAPES))]
    colour = list(COLOURS)[random.integers(len(COLOURS))]
    red = int(random.integers(0, 30)) * 2 + held_out
    background = (red, *random.integers(0, 60, 2).tolist())
    places = tuple(PLACES[cell] for cell in cells)
    return Scene(shape, colour, places, tuple(centres), radius, background)


def draw_scene(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture, (size, size, 3) uint8.

    It is drawn four times as large and reduced, which smooths the edges.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    zoom, radius, colour = 4 * size / SIZE, scene.radius, COLOURS[scene.colour]
    large = Image.new("RGB", (size * 4, size * 4), scene.background)
    pen = ImageDraw.Draw(large)
    for x, y in scene.centres:
        corners = (x - radius, y - radius, x + radius, y + radius)
        left, top, right, bottom = (value * zoom for value in corners)
        third = radius * zoom / 3
        match scene.shape:
            case "circle":
                pen.ellipse((left, top, right, bottom), fill=colour)
            case "square":
                pen.rectangle((left, top, right, bottom), fill=colour)
            case "triangle":
                pen.polygon([(x * zoom, top), (left, bottom), (right, bottom)], fill=colour)
            case "cross":
                pen.rectangle((x * zoom - third, top, x * zoom + third, bottom), fill=colour)
                pen.rectangle((left, y * zoom - third, right, y * zoom + third), fill=colour)
    return np.asarray(large.resize((size, size), resample=Image.Resampling.BOX))


def picture_questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """{kind: (question, answer)}: colour, shape and count, and the place of a single shape."""
    one = len(scene.places) == 1
    colour = "What colour is the shape?" if one else "What colour are the shapes?"
    asked = {
        "colour": (colour, scene.colour),
        "shape": ("Which shape is it?" if one else "Which shape are they?", scene.shape),
        "count": ("How many shapes are there?", NUMBERS[len(scene.places) - 1]),
    }
    if one:
        asked["place"] = ("Where is the shape?", scene.places[0])
    return asked


def training_record(scene: Scene, name: str, seed: int, index: int) -> dict:
    """One dialogue: the picture, then all its questions in seeded order, each with its answer."""
    import numpy as np

    asked = list(picture_questions(scene).values())
    messages = [{"role": "user", "type": "image", "content": name}]
    for i in np.random.default_rng([seed, index, 7]).permutation(len(asked)):
        messages += _turn(*asked[i])
    return {"id": name, "messages": messages}


def question_records(scene: Scene, name: str) -> list[dict]:
    """One record a question; its `kind` allows accuracy by kind."""
    picture = {"role": "user", "type": "image", "content": name}
    return [
        {"id": f"{name}#{kind}", "kind": kind, "messages": [picture, *_turn(*asked)]}
        for kind, asked in picture_questions(scene).items()
    ]


def texts() -> tuple[str, ...]:
    """All questions, answers and words of them, each once, sorted."""
    scenes = (make_scene(0, index, False) for index in range(100))
    asked = (pair for scene in scenes for pair in picture_questions(scene).values())
    return tuple(sorted({*chain(*asked), *COLOURS, *SHAPES, *PLACES, *NUMBERS}))


def pictures_version() -> str:
    """A hash of this code: the key of folders that hold its pictures."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _turn(question: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "type": "text", "content": question},
        {"role": "assistant", "type": "text", "content": answer},
    ]


def write_pictures(
    folder: str | Path, train: int, held_out: int, seed: int = 0
) -> tuple[Path, ...]:
    """Draw pictures into `folder`/images; their records go to train.jsonl and held_out.jsonl.

    `train` pictures become one dialogue each, `held_out` pictures one record a question. Paths in
    the records are relative to `folder`/images. Returns the two files. The same arguments write the
    same bytes.
    """
    from PIL import Image

    paths = Path(folder, "train.jsonl"), Path(folder, "held_out.jsonl")
    for path, count in zip(paths, (train, held_out), strict=True):
        split, records = path.stem, []
        Path(folder, "images", split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            scene, name = make_scene(seed, index, split == "held_out"), f"{split}/{index:05d}.png"
            Image.fromarray(draw_scene(scene)).save(Path(folder, "images", name))
            training = [training_record(scene, name, seed, index)]
            records += training if split == "train" else question_records(scene, name)
        write_jsonl(path, records)
    return paths
