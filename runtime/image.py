"""Pictures to the patches that the vision encoder takes: read, resize to whole merge blocks, normalise, cut."""

import io
import math
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtime.bundle import VisionFrontEnd
from runtime.errors import MediaError
from runtime.files import is_file
from runtime.shown import shown

Rgb = NDArray[np.uint8]  # [height, width, 3]
Grid = tuple[int, int, int]  # patches in time, height, width

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # Pillow's others may start other programs
if find_spec("PIL.AvifImagePlugin") is None:  # before Pillow 11.3
    FORMATS = FORMATS[:-1]
OTHERS = {
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "a HEIC picture",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL picture",
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    rb"8BPS": "a Photoshop file",
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg\b": "an SVG drawing",
    rb"%PDF-": "a PDF file",
}  # how what is not read begins -> its name
BEGINNING = 512  # bytes that are looked at for that
MIN_AREA = 257  # pixels: the official code takes no picture of 256 or fewer
MAX_RATIO = 200  # of the longer to the shorter side


def read_image(source: str | Path | bytes, *, official: bool = False) -> Rgb:
    """A picture file, or its bytes, as viewers show it (runtime/shown.py): RGB, upright, on white.

    The official code drops alpha, ignores the EXIF orientation and clips samples of more than 8 bits; official=True
    does the same. Of an animation, the first frame.

    Raises MediaError: no such file, not decodable, or a size that check_size refuses (before anything is decoded).
    """
    name = "the input" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not is_file(source):
        raise MediaError(f"{name} is not a file; expected one of {', '.join(FORMATS)}")
    try:
        return _decode(io.BytesIO(source) if isinstance(source, bytes) else Path(source), name, official)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(_unidentified(source, name)) from None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large ({error}); scale it down") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise whatever they stumble over
        raise MediaError(f"{name} cannot be decoded ({error}); save it again, for example as PNG") from None


def _unidentified(source: str | Path | bytes, name: str) -> str:
    """What a file is that Pillow does not know, and what to do with it."""
    if isinstance(source, bytes):
        beginning = source[:BEGINNING]
    else:
        with Path(source).open("rb") as file:
            beginning = file.read(BEGINNING)
    found = next((kind for pattern, kind in OTHERS.items() if re.match(pattern, beginning, re.DOTALL)), None)
    if found is None:
        return f"{name} is no picture; expected one of {', '.join(FORMATS)}"
    return f"{name} is {found}, which is not read; save it as PNG or JPEG"


def _decode(source: io.BytesIO | Path, name: str, official: bool) -> Rgb:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata, and of large pictures: huge ones are an error
        with Image.open(source, formats=FORMATS) as image:
            check_size(image.height, image.width, name)
            return np.asarray(image.convert("RGB") if official else shown(image))


def check_size(height: int, width: int, name: str) -> None:
    """Raise MediaError for a picture of too few pixels or of too extreme a shape."""
    if height * width < MIN_AREA:
        raise MediaError(f"{name} is {width}x{height}; at least {MIN_AREA} pixels are needed, for example 17x17")
    _check_ratio(height, width, name)


def _check_ratio(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_RATIO * min(height, width):
        raise MediaError(f"{name} is {width}x{height}; one side may be {MAX_RATIO} times the other at most: crop it")


def smart_resize(height: int, width: int, front: VisionFrontEnd) -> tuple[int, int]:
    """Height and width in whole merge blocks, near the given ones, with an area from min_pixels to max_pixels.

    Qwen2-VL's rule, which lets the short side of a long picture vanish where max_pixels is below 200 blocks (resize
    refuses that). Raises MediaError for sides that differ by more than a factor of 200.
    """
    _check_ratio(height, width, "the picture")
    block = front.patch_size * front.merge_size
    rows, columns = max(1, round(height / block)), max(1, round(width / block))  # half to even
    if rows * columns * block**2 > front.max_pixels:
        shrink = math.sqrt(height * width / front.max_pixels)
        rows, columns = (math.floor(side / shrink / block) for side in (height, width))
    elif rows * columns * block**2 < front.min_pixels:
        grow = math.sqrt(front.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / block) for side in (height, width))
    return rows * block, columns * block


def resize(rgb: Rgb, front: VisionFrontEnd) -> Rgb:
    """The picture at smart_resize's size, by Pillow's bicubic filter (a = -0.5, antialiased, 8 bits).

    The vision encoder was trained on this filter; other libraries' bicubic differs visibly.
    Raises MediaError for a shape that does not fit into max_pixels.
    """
    height, width = smart_resize(rgb.shape[0], rgb.shape[1], front)
    if not height or not width:
        found = f"a picture of {rgb.shape[1]}x{rgb.shape[0]}"
        raise MediaError(f"{found} is too long and narrow for this model's {front.max_pixels} pixels: crop it")
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def patches(rgb: Rgb, front: VisionFrontEnd) -> tuple[NDArray[np.float32], Grid]:
    """Normalised patches of a picture, float32 [n, 3 * temporal * patch * patch], and their grid.

    Rows run merge block by merge block and inside one row by row, so that the patches of one token are neighbours.
    In a row: channel, time (copies of the same picture), y, x.
    """
    resized = resize(rgb, front)
    size, merge = front.patch_size, front.merge_size
    height, width = resized.shape[0] // size, resized.shape[1] // size
    blocks = resized.reshape(height // merge, merge, size, width // merge, merge, size, 3)
    cut = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, size, size)
    still = np.broadcast_to(_normalised(cut, front), (len(cut), 3, front.temporal_patch_size, size, size))
    return still.reshape(len(cut), -1), (1, height, width)


def _normalised(cut: Rgb, front: VisionFrontEnd) -> NDArray[np.float32]:
    """(x / 255 - mean) / std of each channel, [n, 3, ...], looked up: a byte has only 256 values."""
    levels = np.arange(256)[:, None] / 255
    table = ((levels - front.image_mean) / front.image_std).astype(np.float32)  # [256, 3]
    return table[cut, np.arange(3)[:, None, None, None]]


def token_count(grid: Grid, front: VisionFrontEnd) -> int:
    """Positions that the picture takes in the language model."""
    return math.prod(grid) // front.merge_size**2


def rotary_positions(grid: Grid, merge: int) -> NDArray[np.int64]:
    """Row and column of each patch in the order of `patches`: [n, 2]."""
    time, height, width = grid
    cells = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    order = cells.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(order, (time, 1)).astype(np.int64)
