"""Pictures: paths below the root, decoding of good and bad files, preprocessing equal to transformers' bit for bit."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ta.media.images import (
    CLIP,
    SIGLIP,
    Preprocessing,
    find_media,
    media_key,
    media_path,
    preprocess,
    read_image,
    read_pixels,
    read_preprocessing,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_media_path_stays_below_the_root(tmp_path):
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    for path in (secret, root / "sub" / "a.png"):
        Image.fromarray(noise(4, 4)).save(path)
    (root / "empty.png").touch()
    (root / "inner.png").symlink_to(root / "sub" / "a.png")
    (root / "outer.png").symlink_to(secret)
    (root / "outer").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    assert (
        media_path(root, "sub/a.png")
        == media_path(root, "./sub//a.png")
        == media_path(root, "inner.png")
        == (root / "sub/a.png").resolve()
    )
    assert media_key("./sub//a.png") == "sub/a.png"
    (tmp_path / "linked").symlink_to(root)
    assert media_path(
        tmp_path / "linked", "sub/a.png"
    ).is_file()  # the root itself may be a symlink
    for given, reason in {
        str(secret): "absolute",
        "../secret.png": r"'\.\.'",
        "sub/../../secret.png": r"'\.\.'",
        "outer.png": "symlink",
        "outer/secret.png": "symlink",
        "https://x.org/a.png": "URL",
        "data:image/png;base64,AAAA": "URL",
        "file:///etc/passwd": "URL",
        "sub": "is a directory",
        ".": "is a directory",
        "pipe.png": "not a regular file",
        "none.png": "no such file",
        "sub/a.png/b.png": "no such file",
        "empty.png": "0 bytes",
        "": "not a path",
        "a\0b": "not a path",
    }.items():
        with pytest.raises(ValueError, match=reason):
            media_path(root, given)


def test_odd_paths_are_wrong_records(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 5000, "a/" * 3000 + "b.png", "x" * 300 + ".png", "loop", "loop/a.png"):
        with pytest.raises(ValueError, match=r"cannot be|no such file") as caught:
            media_path(tmp_path, path)
        assert "; " in str(caught.value) and len(str(caught.value)) < 300


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/d.txt", ".hidden/e.png", "a/.f.png", "g.png/h.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(find_media(tmp_path, "image")[0]) == ["a/c.JPG", "b.png", "g.png/h.webp"]
    with pytest.raises(ValueError, match="not a folder"):
        find_media(tmp_path / "none", "image")


def test_read_image_modes(tmp_path):
    def through(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    rgb = noise(5, 7)
    assert (through(Image.fromarray(rgb)) == rgb).all()
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert (through(Image.fromarray(grey)) == grey[..., None]).all()
    assert (
        through(Image.fromarray(grey.astype(np.uint16) * 257)) == grey[..., None]
    ).all()  # 16 bits are scaled, not clipped to white
    assert (
        through(Image.fromarray(grey.astype(np.uint16) * 257), "a.pgm") == grey[..., None]
    ).all()
    clear = np.dstack([rgb, np.zeros((5, 7), np.uint8)])
    clear[0, 0, 3] = 255
    seen = through(Image.fromarray(clear))
    assert (seen[0, 0] == rgb[0, 0]).all() and (seen[1:] == 255).all()
    palette = Image.fromarray(np.dstack([grey // 16 * 16] * 3)).quantize(8)
    assert (through(palette) == np.asarray(palette.convert("RGB"))).all()
    assert (through(palette, "b.png", transparency=palette.getpixel((0, 0)))[0, 0] == 255).all()
    assert through(Image.fromarray(rgb).convert("CMYK"), "a.jpg").shape == (5, 7, 3)
    wide = grey.astype(np.uint16) * 257
    assert (through(Image.fromarray(wide), "a.tiff") == grey[..., None]).all()
    seen = through(Image.fromarray(wide), "c.png", transparency=int(wide[0, 3]))
    assert (seen[0, 3] == 255).all()  # the transparent grey, over white
    assert (np.delete(seen.reshape(35, 3), 3, 0) == np.delete(grey.ravel(), 3)[:, None]).all()
    for values, said in (
        (np.zeros((4, 4), np.float32), "floating-point numbers without a known range"),
        (np.full((4, 4), 255, np.int32), "32-bit integers without a known range"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            through(Image.fromarray(values), "f.tiff")
        assert "broken" not in str(error.value) and "f.tiff" in str(error.value)


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored on the left is seen at the top
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    seen = read_image(tmp_path / "a.png")
    assert seen.shape == (40, 20, 3) and (seen[:20] == (255, 0, 0)).all() and (seen[20:] == 0).all()


def bomb(width, height):
    """A PNG of a few hundred bytes whose header claims width x height pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_broken_files_are_named(tmp_path, monkeypatch):
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    png = (tmp_path / "whole.png").read_bytes()
    for data, reason in (
        (whole[: len(whole) // 2], "cut short"),
        (png[: len(png) // 2], "cut short"),
        (png[:2000] + bytes(400) + png[2400:], "broken|does not load as a picture"),
        (b"hello, I am no picture", "does not load as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "does not load as a picture"),
        (bomb(12_000, 12_000), "144000000 pixels, the limit is 64000000"),
        (bomb(60_000, 60_000), "exceeds limit"),
        (bomb(300, 300), "cut short"),
        (b"", "0 bytes"),
    ):
        path = tmp_path / "bad.bin"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=reason) as error:
            read_image(path)
        assert "bad.bin" in str(error.value)
    monkeypatch.setattr("ta.media.images.MAX_PIXELS", 4095)
    with pytest.raises(ValueError, match="4096 pixels, the limit is 4095"):
        read_image(tmp_path / "whole.jpg")
    monkeypatch.setattr("ta.media.images.MAX_PIXELS", 4096)
    assert read_image(tmp_path / "whole.jpg").shape == (64, 64, 3)


def test_any_cut_or_flipped_byte_is_a_picture_or_a_value_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ta.media.images.MAX_PIXELS", 100_000)
    random = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff"):
        Image.fromarray(noise(16, 16)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for _ in range(40):
            broken = bytearray(data[: random.integers(1, len(data) + 1)])
            broken[random.integers(len(broken))] ^= int(random.integers(1, 256))
            (tmp_path / name).write_bytes(broken)
            try:
                assert read_image(tmp_path / name).shape[2] == 3
            except ValueError as error:
                assert name in str(error)


@pytest.mark.parametrize("processor", ["clip", "siglip"])
def test_preprocessing_equals_transformers_bit_for_bit(processor, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    kind, default = {
        "clip": (CLIPImageProcessorPil, CLIP),
        "siglip": (SiglipImageProcessorPil, SIGLIP),
    }[processor]
    random = np.random.default_rng(1)
    settings = [
        {},
        {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 31, "width": 16},
            "do_center_crop": True,
            "resample": 2,
        },
    ]
    settings += [{"image_mean": 0.25, "image_std": [0.5, 0.6, 0.7]}]
    settings += [
        {"size": {"height": 17, "width": 40}, "do_normalize": False},
        {"do_resize": False, "do_rescale": False},
    ]
    for given in settings:
        theirs = kind(**given)
        theirs.save_pretrained(tmp_path)
        ours = read_preprocessing(tmp_path, default)
        assert given or ours == default
        for _ in range(12):
            image = noise(*random.integers(2, 300, 2), seed=int(random.integers(1 << 30)))
            expected = np.asarray(
                theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
            )
            got = preprocess(image, ours)
            assert (
                got.dtype == np.float32 and got.shape == expected.shape and (got == expected).all()
            )


def test_preprocessing_settings(tmp_path):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    path = tmp_path / "preprocessor_config.json"
    path.write_text(
        json.dumps({"size": 30, "crop_size": 28, "feature_extractor_type": "CLIPFeatureExtractor"})
    )  # the oldest published form
    assert read_preprocessing(tmp_path, CLIP) == CLIP._replace(size=30, crop=(28, 28))
    for given in (
        {"image_processor_type": "Qwen2VLImageProcessor"},
        {"size": {"longest_edge": 3}},
        {"size": {"shortest_edge": 28, "longest_edge": 60}},
        {"size": {"max_height": 28, "max_width": 28}},
        {"do_pad": True},
        {"use_square_size": True},
        {"image_mean": None},
    ):
        path.write_text(json.dumps(given))
        with pytest.raises(ValueError, match="preprocessor_config"):
            read_preprocessing(tmp_path, CLIP)
    path.unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        read_preprocessing(tmp_path, CLIP)
    both = tmp_path / "processor_config.json"
    both.write_text(json.dumps({"image_processor": {"size": {"height": 5, "width": 6}}}))
    assert read_preprocessing(tmp_path, SIGLIP) == SIGLIP._replace(size=(5, 6))
    # where both files have settings, those that transformers reads
    path.write_text(json.dumps({"size": {"height": 7, "width": 8}}))
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path).size
    assert read_preprocessing(tmp_path, SIGLIP).size == (theirs.height, theirs.width) == (5, 6)
    both.write_text(json.dumps({"image_processor": [5]}))
    with pytest.raises(ValueError, match="image_processor cannot be"):
        read_preprocessing(tmp_path, SIGLIP)
    both.write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert read_preprocessing(tmp_path, SIGLIP).size == (7, 8)


def test_a_thin_strip_cannot_grow_without_limit(tmp_path):
    Image.fromarray(np.zeros((1, 60_000, 3), np.uint8)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png.*13440000 x 224"):
        read_pixels(tmp_path / "strip.png", CLIP)


def test_channels_are_red_green_blue(tmp_path):
    Image.fromarray(np.broadcast_to(np.array([255, 0, 0], np.uint8), (8, 8, 3))).save(
        tmp_path / "red.png"
    )
    plain = Preprocessing((4, 4), None, None, None)
    assert (
        read_pixels(tmp_path / "red.png", plain) == np.array([1, 0, 0], np.float32)[:, None, None]
    ).all()
