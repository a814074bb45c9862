"""Test decoding: every kind of image file becomes what a viewer shows, or is refused in a line that names its mode."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from helpers.image_sets import write_image_folder
from sid_trainer.data.datasets import DataError, load_data
from sid_trainer.data.image_files import read_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # 0 to 252
LEFT = np.zeros((8, 8), np.uint8)  # 255 in the left half
LEFT[:, :4] = 255


def save(file, image, **options):
    image.save(file, **options)
    return str(file)


def test_16_bit_grey_is_scaled(tmp_path):
    values = RAMP.astype(np.uint16) * 256 + 100  # its high bytes are RAMP
    for name in ("a.png", "a.tif"):
        actual = read_image(save(tmp_path / name, Image.fromarray(values)))
        assert np.array_equal(actual, RAMP[..., None].repeat(3, 2)), name


def test_16_bit_color_keeps_its_high_bytes(tmp_path):
    values = (RAMP.astype(">u2") * 256 + 255).astype(">u2")[..., None].repeat(3, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # each without a filter
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert np.array_equal(read_image(str(tmp_path / "a.png"))[..., 0], RAMP)


@pytest.mark.parametrize(("values", "mode"), [
    (RAMP.astype(np.int32) * 70000, "I"), ((RAMP / 255).astype(np.float32), "F"),
])  # fmt: skip
def test_pixels_without_a_range_are_refused_in_one_line(tmp_path, values, mode):
    file = save(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(
        DataError, match=rf"a\.tif: not a readable image \(mode {mode}: the range of its pixels"
    ) as caught:
        read_image(file)
    assert str(caught.value).isprintable()
    with pytest.raises(DataError, match=rf"a\.tif: .*mode {mode}"):
        read_image(file, image_size=4)


def test_a_drawing_in_the_alpha_channel_lies_over_white(tmp_path):
    black = np.zeros((8, 8), np.uint8)
    for file in (
        save(tmp_path / "a.png", Image.merge("RGBA", [Image.fromarray(x) for x in (black, black, black, RAMP)])),
        save(tmp_path / "b.png", Image.merge("LA", [Image.fromarray(x) for x in (black, RAMP)])),
        save(
            tmp_path / "c.webp",
            Image.merge("RGBA", [Image.fromarray(x) for x in (black, black, black, RAMP)]),
            lossless=True,
        ),
        save(tmp_path / "d.tif", Image.merge("RGBA", [Image.fromarray(x) for x in (black, black, black, RAMP)])),
    ):
        assert np.array_equal(read_image(file), 255 - RAMP[..., None].repeat(3, 2)), file


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_color_is_white(tmp_path, mode):
    image = Image.fromarray((255 - LEFT) // 5 * 3)  # 0 on the left, 153 on the right
    transparent = {"P": 0, "RGB": (0, 0, 0), "L": 0}[mode]
    if mode == "P":
        image = image.quantize(2)
        transparent = image.getpixel((0, 0))
    else:
        image = image.convert(mode)
    actual = read_image(save(tmp_path / "a.png", image, transparency=transparent))
    assert (actual[:, :4] == 255).all() and (actual[:, 4:] == 153).all()


@pytest.mark.parametrize(("suffix", "mode"), [
    ("jpg", "L"), ("jpg", "CMYK"), ("png", "L"), ("png", "RGBA"), ("webp", "RGB"), ("tif", "L"), ("tif", "RGB"),
    ("tif", "CMYK"),
])  # fmt: skip
@pytest.mark.parametrize(("orientation", "turned"), [
    (1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90),
])  # fmt: skip
def test_photographs_are_turned(tmp_path, suffix, mode, orientation, turned):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = LEFT[:, :6].copy()
    pixels[:2] //= 2
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    actual = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(pixels).convert(mode), exif=exif, **options))
    expected = turned(pixels)
    assert actual.shape == (*expected.shape, 3) and np.abs(actual[..., 0].astype(int) - expected).max() < 40


def test_other_kinds_are_shown_as_before(tmp_path):
    grey = Image.fromarray(LEFT)
    for file in (
        save(tmp_path / "grey.PNG", grey),
        save(tmp_path / "bits.png", grey.convert("1")),
        save(tmp_path / "bits.tif", grey.convert("1")),
        save(tmp_path / "palette.png", grey.convert("P")),
        save(tmp_path / "photo.JPEG", grey.convert("RGB"), quality=100),
        save(tmp_path / "print.jpg", grey.convert("RGB").convert("CMYK"), quality=100),
        save(tmp_path / "print.tif", grey.convert("RGB").convert("CMYK")),
        save(tmp_path / "web.webp", grey.convert("RGB"), lossless=True),
        save(tmp_path / "moving.png", grey, save_all=True, append_images=[Image.fromarray(255 - LEFT)]),
        save(tmp_path / "moving.webp", grey, save_all=True, lossless=True, append_images=[Image.fromarray(255 - LEFT)]),
    ):
        actual = read_image(file).astype(int)
        assert np.abs(actual - LEFT[..., None]).max() <= 3, file


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_classes_that_only_a_right_decoding_tells_apart(tmp_path, suffix):
    """Decode in memory, and as a stream by this process and by workers."""
    root = write_image_folder(tmp_path / "set", count=3)
    for i, folder in enumerate(sorted(root.glob("*/*"))):
        for j, file in enumerate(sorted(folder.iterdir())):
            file.unlink()
            values = np.where(LEFT if folder.name == "a" else 255 - LEFT, 40000 + i, 20000 + j).astype(np.uint16)
            Image.fromarray(values).save(file.with_suffix(f".{suffix}"))
    kept = load_data("folder", root, cache=tmp_path / "cache").train
    streamed = load_data("folder", root, stream=True).train.images
    assert (kept.images[:3, :, :4] == 156).all() and (kept.images[3:, :, :4] == 78).all()
    for workers in (0, 1):
        assert torch.equal(torch.cat(list(streamed.batches(torch.arange(6).split(4), workers))), kept.images)


def test_arrays_that_an_older_decoder_cached_are_not_used(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "set")
    monkeypatch.setattr("sid_trainer.data.image_files.DECODER_VERSION", 1)
    load_data("folder", root, cache=tmp_path / "cache")
    older = set((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    load_data("folder", root, cache=tmp_path / "cache")
    assert len(older) == 2 and not older & set((tmp_path / "cache").iterdir())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_text_chunks_and_odd_metadata_change_nothing(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "any")
    assert np.array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(RAMP), pnginfo=info))[..., 0], RAMP)
    broken = save(tmp_path / "b.jpg", Image.fromarray(RAMP), quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    assert np.abs(read_image(broken)[..., 0].astype(int) - RAMP).max() < 8
