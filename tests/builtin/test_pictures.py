"""Generated pictures: the answers are true of the pixels, training and held-out pictures never meet, the same seed gives the same bytes."""

import json
from collections import Counter

import numpy as np

from ta.builtin.pictures import (
    COLOURS,
    NUMBERS,
    PLACES,
    SHAPES,
    SIZE,
    Scene,
    draw_scene,
    make_scene,
    picture_questions,
    write_pictures,
)
from ta.media.images import media_path, read_image


def blobs(mask):
    """The number of connected parts of a mask, by flooding."""
    left, count = {tuple(point) for point in np.argwhere(mask).tolist()}, 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
    return count


def test_answers_are_true_of_the_pixels():
    seen = Counter()
    for index in range(120):
        scene = make_scene(3, index, held_out=bool(index % 2))
        image, asked = draw_scene(scene).astype(int), picture_questions(scene)
        assert image.shape == (SIZE, SIZE, 3)
        to_colour, to_background = (
            np.abs(image - rgb).sum(2) for rgb in (COLOURS[asked["colour"][1]], scene.background)
        )
        painted = to_colour < to_background
        assert blobs(painted) == 1 + NUMBERS.index(asked["count"][1])
        if "place" in asked:
            rows, columns = np.argwhere(painted).mean(0) > SIZE / 2
            assert asked["place"][1] == PLACES[2 * rows + columns]
            box = painted[painted.any(1)][:, painted.any(0)]
            near, foot = (
                box[int(len(box) * y), int(box.shape[1] * x)]
                for y, x in ((0.22, 0.22), (0.85, 0.2))
            )
            round_or_square = (
                "square" if box.mean() > 0.89 else "circle"
            )  # a circle fills pi/4 of its box
            assert (round_or_square if near else "triangle" if foot else "cross") == asked["shape"][
                1
            ]
        seen.update(answer for _, answer in asked.values())
    assert set(seen) == {*COLOURS, *SHAPES, *PLACES, *NUMBERS}


def test_written_pictures_and_records(tmp_path):
    for name in ("a", "b"):
        train, held_out = write_pictures(tmp_path / name, train=30, held_out=20, seed=1)
    paths = [
        path.relative_to(tmp_path / "a")
        for path in sorted((tmp_path / "a").rglob("*"))
        if path.is_file()
    ]
    assert len(paths) == 52 and all(
        (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        for path in paths
    )
    records = [[json.loads(line) for line in path.open()] for path in (train, held_out)]
    assert len(records[0]) == 30 and len(records[1]) >= 60
    pixels = []
    for split in records:
        names = {record["messages"][0]["content"] for record in split}
        pixels.append(
            {read_image(media_path(tmp_path / "b" / "images", name)).tobytes() for name in names}
        )
        assert len(pixels[-1]) == len(names)
    assert not pixels[0] & pixels[1]
    for record in records[0] + records[1]:
        kinds = [(message["role"], message["type"]) for message in record["messages"]]
        turns = (len(kinds) - 1) // 2
        assert kinds == [("user", "image")] + [("user", "text"), ("assistant", "text")] * turns
        assert turns == 1 if "kind" in record else turns in (3, 4)


def test_series_are_disjoint_by_construction():
    assert all(
        make_scene(0, i, held_out).background[0] % 2 == held_out
        for i in range(50)
        for held_out in (False, True)
    )


def test_drawing():
    centres = ((12.0, 24.0), (36.0, 24.0))
    for shape in ("square", "circle"):
        image = draw_scene(Scene(shape, "red", (), centres, 6.0, (9, 9, 9)), 16)
        assert image.shape == (16, 16, 3) and (image[0] == 9).all()
        assert (image[8, [4, 12]] == COLOURS["red"]).all()
        assert (image[6, 2] == COLOURS["red"]).all() == (shape == "square")
