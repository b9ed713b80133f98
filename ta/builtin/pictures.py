"""Generated pictures with questions and right answers: shapes, colours, places and counts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    return Scene(
        shape=SHAPES[random.integers(len(SHAPES))],
        colour=list(COLOURS)[random.integers(len(COLOURS))],
        places=tuple(PLACES[cell] for cell in cells),
        centres=tuple(centres),
        radius=radius,
        background=(
            int(random.integers(0, 30)) * 2 + held_out,
            *random.integers(0, 60, 2).tolist(),
        ),
    )


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, (SIZE, SIZE, 3) uint8."""
    from ta.builtin.drawing import Shape, draw

    colour, radius = COLOURS[scene.colour], scene.radius
    shapes = [Shape(scene.shape, colour, x, y, radius) for x, y in scene.centres]
    return draw(SIZE, scene.background, shapes)


def picture_questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """{kind: (question, answer)}: colour, shape and count, and the place of a single shape."""
    one = len(scene.places) == 1
    asked = {
        "colour": (
            "What colour is the shape?" if one else "What colour are the shapes?",
            scene.colour,
        ),
        "shape": ("Which shape is it?" if one else "Which shape are they?", scene.shape),
        "count": ("How many shapes are there?", NUMBERS[len(scene.places) - 1]),
    }
    return asked | ({"place": ("Where is the shape?", scene.places[0])} if one else {})


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
    asked = {
        text for scene in scenes for pair in picture_questions(scene).values() for text in pair
    }
    return tuple(sorted({*asked, *COLOURS, *SHAPES, *PLACES, *NUMBERS}))


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
) -> tuple[Path, Path]:
    """Draw pictures into `folder`/images; their records go to train.jsonl and held_out.jsonl.

    `train` pictures become one dialogue each, `held_out` pictures one record a question. Paths in
    the records are relative to `folder`/images. Returns the two files. The same arguments write the
    same bytes. ValueError for a count below 1.
    """
    from ta.builtin.drawing import write_image

    if train < 1 or held_out < 1:
        raise ValueError(
            f"{train} training and {held_out} held-out pictures; give 1 or more of each"
        )
    written = []
    for split, count in (("train", train), ("held_out", held_out)):
        (Path(folder) / "images" / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            scene, name = make_scene(seed, index, split == "held_out"), f"{split}/{index:05d}.png"
            write_image(Path(folder) / "images" / name, draw_scene(scene))
            training = [training_record(scene, name, seed, index)]
            records = training if split == "train" else question_records(scene, name)
            lines += [json.dumps(record) + "\n" for record in records]
        path = Path(folder) / f"{split}.jsonl"
        path.write_text("".join(lines))
        written.append(path)
    return written[0], written[1]
