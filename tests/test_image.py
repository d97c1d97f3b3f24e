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
from PIL import Image, features
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


def png_header(height: int, width: int) -> bytes:
    """A PNG file that promises a size and holds no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


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


# As every viewer shows them (K4)

WIDTH = 256
RAMP = np.tile(np.arange(WIDTH, dtype=np.uint8), (8, 1))  # a grey of each level: [8, 256]
TWIN = np.stack([RAMP] * 3, axis=-1)  # what each of the greys below looks like in 8 bits of RGB
VEILED = np.full_like(RAMP, 128)  # half transparent
ON_WHITE = np.rint((TWIN * 128.0 + 255 * 127) / 255).astype(np.uint8)


def with_tag(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF file with another number in one of its 16-bit tags."""
    start = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", tiff, start)[0], 12):
        if struct.unpack_from("<H", tiff, entry)[0] == tag:
            return tiff[: entry + 8] + struct.pack("<H", value) + tiff[entry + 10 :]
    raise AssertionError(f"no tag {tag}")


def grey_tiff(samples: np.ndarray, **tags: int) -> bytes:
    return encoded(Image.fromarray(samples), "TIFF", tiffinfo={int(tag[1:]): value for tag, value in tags.items()})


def uint32_tiff(samples: np.ndarray) -> bytes:
    return with_tag(grey_tiff(samples.view(np.int32)), 339, 1)


def png(depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file of 256 by 8 pixels of any depth and kind of colour; Pillow writes few of them."""
    size = struct.pack(">IIBBBBB", WIDTH, 8, depth, colour, 0, 0, 0)
    step = len(rows) // 8
    lines = b"".join(b"\0" + rows[i * step : (i + 1) * step] for i in range(8))
    parts = [png_chunk(b"IHDR", size), *chunks, png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wide(samples: np.ndarray) -> bytes:
    """The bytes of 16-bit samples of a PNG file."""
    return (samples.astype(np.uint16) * 257).astype(">u2").tobytes()


def packed(samples: np.ndarray, bits: int) -> bytes:
    spread = (samples.reshape(8, -1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(8, -1), axis=1).tobytes()


def premultiplied(image: Image.Image) -> bytes:
    """TIFF: the alpha that the colours were multiplied by already."""
    return with_tag(encoded(image, "TIFF"), 338, 1)


def palette_alpha() -> bytes:
    image = Image.fromarray(RAMP, "P")
    image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    return encoded(image, transparency=bytes([128] * 256))


DARK = np.rint(RAMP * 128.0 / 255).astype(np.uint8)
OPAQUE_TWINS = {
    "L": encoded(Image.fromarray(RAMP)),
    "RGB": encoded(Image.fromarray(TWIN)),
    "P": encoded(Image.fromarray(RAMP).convert("P")),
    "CMYK": encoded(Image.fromarray(np.stack([255 - RAMP] * 3 + [RAMP * 0], -1), "CMYK"), "TIFF"),
    "YCbCr": encoded(Image.fromarray(TWIN).convert("YCbCr"), "TIFF"),
    "LAB": encoded(Image.fromarray(TWIN).convert("LAB"), "TIFF"),
    "L white is zero": grey_tiff(RAMP, t262=0),  # Pillow inverts it when it writes
    "PNG 16 bit grey": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "PNG 16 bit RGB": png(16, 2, wide(TWIN)),
    "PGM 16 bit": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PPM"),
    "PFM": encoded(Image.fromarray(RAMP / np.float32(255)), "PPM"),
    "TIFF 16 bit": grey_tiff(RAMP.astype(np.uint16) * 257),
    "TIFF 16 bit big-endian": encoded(Image.fromarray((RAMP.astype(">u2") * 257).astype(">u2")), "TIFF"),
    "TIFF 16 bit white is zero": grey_tiff(65535 - RAMP.astype(np.uint16) * 257, t262=0),
    "TIFF 32 bit of 8": grey_tiff(RAMP.astype(np.int32)),
    "TIFF 32 bit of 16": grey_tiff(RAMP.astype(np.int32) * 257),
    "TIFF 32 bit": grey_tiff(RAMP.astype(np.int32) * (2**23)),
    "TIFF 32 bit unsigned": uint32_tiff(RAMP.astype(np.uint32) * (2**24 + 2**16 + 257)),
    "TIFF float to 1": grey_tiff(RAMP / np.float32(255)),
    "TIFF float to 255": grey_tiff(RAMP.astype(np.float32)),
    "TIFF float to 65535": grey_tiff(RAMP.astype(np.float32) * 257),
    "TIFF float white is zero": grey_tiff(1 - RAMP / np.float32(255), t262=0),
}
VEILED_TWINS = {
    "RGBA": encoded(Image.fromarray(np.dstack([TWIN, VEILED]))),
    "LA": encoded(Image.fromarray(np.dstack([RAMP, VEILED]), "LA")),
    "PNG 16 bit LA": png(16, 4, wide(np.dstack([RAMP, VEILED]))),
    "PNG 16 bit RGBA": png(16, 6, wide(np.dstack([TWIN, VEILED]))),
    "P with alphas": palette_alpha(),
    "PA": encoded(Image.merge("PA", [Image.fromarray(RAMP).convert("P"), Image.fromarray(VEILED)]), "TIFF"),
    "La": premultiplied(Image.fromarray(np.dstack([DARK, VEILED]), "LA")),
    "RGBa": premultiplied(Image.fromarray(np.dstack([np.stack([DARK] * 3, -1), VEILED]))),
    "WEBP": encoded(Image.fromarray(np.dstack([TWIN, VEILED])), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", OPAQUE_TWINS)
def test_every_sample_type_and_colour_model_looks_as_its_eight_bit_twin(name):
    found = read_image(OPAQUE_TWINS[name])
    assert found.dtype == np.uint8 and found.shape == TWIN.shape
    np.testing.assert_allclose(found.astype(int), TWIN, atol=2)


@pytest.mark.parametrize("name", VEILED_TWINS)
def test_every_form_of_alpha_lies_on_white(name):
    np.testing.assert_allclose(read_image(VEILED_TWINS[name]).astype(int), ON_WHITE, atol=2)


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = RAMP.astype(np.uint16)  # at most 255 of 65535
    for content in (encoded(Image.fromarray(dark)), encoded(Image.fromarray(dark), "PPM"), grey_tiff(dark)):
        assert not read_image(content).any()


def test_samples_that_are_no_numbers_are_black_and_endless_ones_white():
    values = np.full((8, WIDTH), np.nan, np.float32)
    values[0], values[1], values[2] = 0.5, np.inf, -np.inf
    assert read_image(grey_tiff(values))[:4, 0, 0].tolist() == [128, 255, 0, 0]


def test_black_on_transparent_is_black_on_white():
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[5:15, 5:25, 3] = 255
    found = read_image(encoded(Image.fromarray(rgba)))
    assert not found[5:15, 5:25].any() and (found[:5] == 255).all() and (found[15:] == 255).all()


@pytest.mark.parametrize(
    ("content", "clear"),
    [
        (png(1, 0, packed(RAMP >> 7, 1), png_chunk(b"tRNS", b"\0\0")), RAMP < 128),
        (png(2, 0, packed(RAMP >> 6, 2), png_chunk(b"tRNS", b"\0\2")), RAMP >> 6 == 2),
        (png(4, 0, packed(RAMP >> 4, 4), png_chunk(b"tRNS", b"\0\2")), RAMP >> 4 == 2),
        (png(8, 0, RAMP.tobytes(), png_chunk(b"tRNS", b"\0\2")), RAMP == 2),
        (png(16, 0, wide(RAMP), png_chunk(b"tRNS", b"\2\2")), RAMP == 2),
        (png(8, 2, TWIN.tobytes(), png_chunk(b"tRNS", b"\0\2\0\2\0\2")), RAMP == 2),
        (png(16, 2, wide(TWIN), png_chunk(b"tRNS", b"\2\2\2\2\2\2")), RAMP == 2),
    ],
    ids=["1", "2", "4", "8", "16", "RGB", "RGB 16"],
)
def test_the_one_transparent_colour_of_a_png_is_white_whatever_its_depth(content, clear):
    found, stored = read_image(content), read_image(content, official=True)
    assert (found[clear] == 255).all()
    if stored.max() > stored.min() and content[24] != 16:  # of 16 bits, the official code clips
        assert np.array_equal(found[~clear], stored[~clear])


def test_a_picture_of_one_bit_is_black_and_white():
    found = read_image(encoded(Image.fromarray(RAMP >= 128)))
    assert np.array_equal(found, np.where(TWIN >= 128, 255, 0))


def turned(orientation: int) -> np.ndarray:
    """How a picture has to be stored so that `orientation` shows it upright."""
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    undo |= {5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1)}
    undo |= {8: lambda a: np.rot90(a, -1)}
    return undo[orientation](CORNERS)


CORNERS = np.kron(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]), np.ones((24, 32, 1)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_picture_is_upright_as_viewers_show_it(kind, orientation):
    if not features.check("avif") and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned(orientation)).astype(np.uint8))
    found = read_image(encoded(image, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "AVIF") else {})))
    assert found.shape == CORNERS.shape
    for row, column in ((12, 16), (12, 48), (36, 16), (36, 48)):
        np.testing.assert_allclose(found[row, column].astype(int), CORNERS[row, column], atol=12)


def test_broken_exif_data_leave_a_picture_as_it_is_stored():
    rgb = picture(20, 30)
    assert np.array_equal(read_image(encoded(Image.fromarray(rgb), exif=b"Exif\0\0MM\0*\xff\xff")), rgb)


def test_the_colours_are_those_that_the_profile_of_the_file_stands_for():
    cms = pytest.importorskip("PIL.ImageCms")
    linear = cms.createProfile("LAB")  # a profile of other colours is left aside
    rgb = Image.fromarray(picture(20, 30))
    assert np.array_equal(read_image(encoded(rgb, icc_profile=cms.ImageCmsProfile(linear).tobytes())), np.asarray(rgb))
    assert np.array_equal(read_image(encoded(rgb, icc_profile=b"broken")), np.asarray(rgb))
    swapped = swapped_profile(cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes())
    red = Image.new("RGB", (30, 20), (255, 0, 0))
    np.testing.assert_allclose(read_image(encoded(red, icc_profile=swapped))[0, 0], (0, 255, 0), atol=40)


def swapped_profile(profile: bytes) -> bytes:
    """An sRGB profile whose red and green are exchanged, under another name."""
    content = bytearray(profile)
    count = struct.unpack_from(">I", content, 128)[0]
    tags = {bytes(content[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    content[tags[b"rXYZ"] : tags[b"rXYZ"] + 4], content[tags[b"gXYZ"] : tags[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    for spelled in (b"sRGB", "sRGB".encode("utf-16-be")):
        content = content.replace(spelled, spelled.replace(b"R", b"S"))
    return bytes(content)


def test_the_official_way_drops_alpha_ignores_the_orientation_and_clips():
    rgba = np.full((20, 30, 4), (200, 100, 50, 0), np.uint8)
    assert np.array_equal(read_image(encoded(Image.fromarray(rgba)), official=True), rgba[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    stored = encoded(Image.fromarray(picture(20, 30)), "JPEG", exif=exif)
    assert read_image(stored, official=True).shape == (20, 30, 3)
    assert read_image(stored).shape == (30, 20, 3)
    assert (read_image(OPAQUE_TWINS["PNG 16 bit grey"], official=True)[:, 1:] == 255).all()


# Refused


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
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "the input is a HEIC picture, which is not read; save it as PNG or JPEG",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the input is an SVG drawing, which is not read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "the input is no picture"),
    ],
    ids=["1x1", "16x16", "long", "bomb", "truncated", "large", "empty", "text", "heic", "svg", "postscript"],
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
