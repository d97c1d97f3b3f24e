"""Pictures: recorded sizes, pixels and patches of the official code, the order of patches, and pictures to refuse."""

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from runtime.bundle import VisionFrontEnd
from runtime.errors import MediaError
from runtime.image import patches, read_image, resize, rotary_positions, smart_resize, token_count

GOLDEN = Path(__file__).parent / "golden" / "a"
RECORDED = load_file(GOLDEN / "g03_vision.safetensors")
TABLES = json.loads((GOLDEN / "tables.json").read_text(encoding="utf-8"))
CONFIG = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))


def golden_front(section: str) -> VisionFrontEnd:
    keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "min_pixels", "max_pixels")
    return VisionFrontEnd(**{key: CONFIG[section][key] for key in keys})


IMAGE, FRAME = golden_front("visual_config"), golden_front("video_config")
REAL = replace(IMAGE, min_pixels=3136, max_pixels=3_211_264)
INPUTS = [(name, row, IMAGE) for name, row in TABLES["images"].items()] + [
    (Path(row["file"]).stem, row, FRAME) for row in TABLES["frames"]
]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Recorded values


@pytest.mark.parametrize(("name", "row", "front"), INPUTS, ids=[name for name, _, _ in INPUTS])
def test_resized_pixels_patches_and_grids_of_each_recorded_picture_agree(name, row, front):
    rgb = read_image(GOLDEN / row["file"])
    rows, grid = patches(rgb, front)
    assert np.array_equal(resize(rgb, front), RECORDED[f"{name}.resized_rgb"])
    assert (list(grid), token_count(grid, front)) == (row["grid_thw"], row["pad_tokens"])
    assert rows.dtype == np.float32 and len(rows) == np.prod(grid)
    if f"{name}.patches" in RECORDED:
        np.testing.assert_allclose(rows, RECORDED[f"{name}.patches"], atol=1e-6)


def test_every_recorded_size_agrees():
    for row in TABLES["smart_resize"]:
        front = replace(IMAGE, min_pixels=row["min_pixels"], max_pixels=row["max_pixels"])
        assert list(smart_resize(row["height"], row["width"], front)) == row["result"], row


def test_rotary_positions_give_the_recorded_angles():
    recorded = RECORDED["i0.rotary_angles"]  # [patches, head_dim / 2]: row angles, then column angles
    half = recorded.shape[1] // 2
    positions = rotary_positions((1, 6, 8), IMAGE.merge_size)
    angles = positions[:, :, None] * 10000.0 ** (-np.arange(half) / half)
    assert positions.dtype == np.int64
    np.testing.assert_allclose(angles.reshape(recorded.shape), recorded, atol=1e-6)


# Sizes


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_are_whole_blocks_inside_the_limits_and_stay_as_they_are(height, width):
    if max(height, width) > 200 * min(height, width):
        return
    found = smart_resize(height, width, REAL)
    assert found[0] % 28 == 0 and found[1] % 28 == 0
    assert REAL.min_pixels <= found[0] * found[1] <= REAL.max_pixels
    assert smart_resize(*found, REAL) == found


@given(st.integers(200, 1500), st.integers(200, 1500))
def test_a_resized_picture_keeps_its_shape_to_one_block(height, width):
    rows, columns = (side / 28 for side in smart_resize(height, width, REAL))
    assert (rows - 1) / (columns + 1) <= height / width <= (rows + 1) / (columns - 1)


def test_other_patch_and_merge_sizes_are_honoured():
    front = replace(REAL, patch_size=8, temporal_patch_size=3, merge_size=4)
    rows, grid = patches(picture(100, 70), front)
    assert grid == (1, 12, 8)  # 96 x 64 pixels
    assert rows.shape == (96, 3 * 3 * 8 * 8)
    assert token_count(grid, front) == 6
    assert rotary_positions(grid, 4)[[0, 1, 4, 15, 16]].tolist() == [[0, 0], [0, 1], [1, 0], [3, 3], [0, 4]]


# Patches


def test_each_row_is_the_patch_at_its_rotary_position_in_channel_time_y_x_order():
    rgb = picture(84, 140)
    rows, grid = patches(rgb, REAL)
    scaled = (rgb / 255 - REAL.image_mean) / REAL.image_std
    for found, (row, column) in zip(rows, rotary_positions(grid, REAL.merge_size), strict=True):
        patch = scaled[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)  # [3, y, x]
        np.testing.assert_allclose(found.reshape(3, 2, 14, 14), np.stack([patch, patch], axis=1), atol=1e-6)


def test_the_patches_of_one_token_are_neighbours_that_fill_a_square():
    positions = rotary_positions((1, 6, 10), 2).reshape(-1, 4, 2)
    assert np.array_equal(positions - positions[:, :1], np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (15, 1, 1)))
    assert len(np.unique(positions.reshape(-1, 2), axis=0)) == 60


# Files


def test_a_path_and_its_bytes_give_the_same_picture():
    path = GOLDEN / TABLES["images"]["i0"]["file"]
    assert np.array_equal(read_image(path), read_image(path.read_bytes()))
    assert np.array_equal(read_image(str(path)), read_image(path))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_kinds_are_read_exactly(kind):
    rgb = picture(20, 30)
    assert np.array_equal(read_image(encoded(Image.fromarray(rgb), kind, lossless=True)), rgb)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "I;16"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.fromarray(np.zeros((20, 30), np.uint16)) if mode == "I;16" else Image.new(mode, (30, 20))
    assert read_image(encoded(image, "TIFF")).shape == (20, 30, 3)


def test_alpha_is_dropped_and_not_blended():
    rgba = np.full((20, 30, 4), (200, 100, 50, 0), np.uint8)
    assert np.array_equal(read_image(encoded(Image.fromarray(rgba))), rgba[..., :3])


def test_the_exif_orientation_is_ignored_as_in_the_official_code():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert read_image(encoded(Image.fromarray(picture(20, 30)), "JPEG", exif=exif)).shape == (20, 30, 3)


# Refused


def png_header(height: int, width: int) -> bytes:
    """A PNG file that promises a size and holds no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(1, 1), "the input is 1x1; at least 257 pixels are needed"),
        (png_header(16, 16), "the input is 16x16; at least 257"),
        (png_header(10, 20000), "the input is 20000x10; one side may be 200 times the other at most"),
        (png_header(50000, 50000), "the input is too large"),
        (encoded(Image.fromarray(picture(64, 64)))[:3000], "the input cannot be decoded .*truncated"),
        (png_header(10000, 10000), "the input cannot be decoded"),  # large enough for a warning of Pillow's
        (b"", "the input is no picture"),
        (b"text", "the input is no picture; expected one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "the input is no picture"),
    ],
    ids=["1x1", "16x16", "long", "bomb", "truncated", "large", "empty", "text", "postscript"],
)
def test_a_picture_that_cannot_be_used_gives_one_message(content, message, recwarn):
    with pytest.raises(MediaError, match=message):
        read_image(content)
    assert not recwarn


def test_the_smallest_picture_of_more_than_256_pixels_is_read():
    assert read_image(encoded(Image.fromarray(picture(2, 129)))).shape == (2, 129, 3)


def test_a_missing_picture_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(MediaError, match=f"{path.name} is not a file; expected one of PNG, JPEG"):
            read_image(path)


def test_a_shape_too_long_for_the_size_limit_is_refused_before_it_vanishes():
    row = next(row for row in TABLES["smart_resize"] if 0 in row["result"])
    front = replace(IMAGE, max_pixels=row["max_pixels"])
    with pytest.raises(MediaError, match=rf"too long and narrow for this model's {row['max_pixels']} pixels"):
        patches(picture(row["height"], row["width"]), front)


def test_sides_that_differ_by_more_than_200_are_refused_at_resizing_too():
    assert smart_resize(10, 2000, REAL) == (28, 1988)
    with pytest.raises(MediaError, match="2001x10; one side may be 200 times the other at most"):
        smart_resize(10, 2001, REAL)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"]),
    flips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 300),
)
@settings(max_examples=150, deadline=None)
def test_damaged_pictures_are_read_or_refused_and_nothing_else(kind, flips, cut):
    content = bytearray(encoded(Image.fromarray(picture(20, 30)), kind))
    for position, value in flips:
        content[position % len(content)] = value
    try:
        rgb = read_image(bytes(content[: len(content) - cut % len(content)]))
    except MediaError:
        return
    assert rgb.dtype == np.uint8 and rgb.shape[2] == 3
