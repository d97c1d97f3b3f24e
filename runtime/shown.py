"""A picture as every viewer shows it: upright, in 8 bits of sRGB, on white where it is transparent."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 262, 0  # tags of EXIF and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # an EXIF orientation -> what undoes it
# What stands for white, the first that holds every value: files of 32 bits rarely use them all.
WHITES = {
    "I;12": (4095,),
    "I;16S": (255, 32767),
    "I;16BS": (255, 32767),
    "I;32N": (255, 65535, 2**32 - 1),  # unsigned
    "I;32S": (255, 65535, 2**31 - 1),
    "I;32BS": (255, 65535, 2**31 - 1),
}
FLOAT_WHITES = (1, 255, 65535)
KEY_SCALES = {"L;2": 85, "L;4": 17}  # of the transparent grey, which a PNG states in the file's own bits


def shown(image: Image.Image) -> Image.Image:
    """The picture in mode RGB. `image` is as Image.open gives it, not loaded yet: its file's sample type is asked for.

    Raises whatever Pillow's decoders raise on broken bytes.
    """
    raw = _raw_mode(image)
    image.load()
    colours, alpha = _separated(_eight_bits(image, raw))
    colours = _in_srgb(colours, image.info.get("icc_profile"))
    if alpha is not None and alpha.getextrema() != (255, 255):
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return _upright(colours, image)


def _raw_mode(image: Image.Image) -> str:
    """How the file stores its samples, in Pillow's words; "" where it does not say."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _eight_bits(image: Image.Image, raw: str) -> Image.Image:
    """Grey of other samples in 8 bits, which Pillow would clip rather than scale; other modes as they are."""
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = Image.fromarray(_grey(values, raw, image.format == "PPM"))
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = Image.fromarray(255 - np.asarray(grey))
        if key is not None:
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "La":
        return image.convert("LA")
    if raw in KEY_SCALES and isinstance(key, int):
        image.info["transparency"] = key * KEY_SCALES[raw]
    elif raw == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _grey(values: NDArray[np.generic], raw: str, is_ppm: bool) -> NDArray[np.uint8]:
    """Samples of any type as bytes; integers lose their low bits, as Pillow's do in pictures of 16-bit colour."""
    if values.dtype.kind == "f":
        finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=0.0)
        largest = finite.max(initial=0.0, where=np.isfinite(finite))
        white = next((white for white in FLOAT_WHITES if largest <= white), largest)
        return np.rint(np.clip(finite / white, 0, 1) * 255).astype(np.uint8)
    if raw == "I;32N":
        values = values.view(np.uint32)
    whites = (65535,) if is_ppm else WHITES.get(raw, (65535,))
    white = next(white for white in whites if white >= min(int(values.max()), whites[-1]))
    return (np.clip(values.astype(np.int64), 0, white) * 256 // (white + 1)).astype(np.uint8)


def _separated(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours alone, and how opaque they are ("L"), where the file says anything of that."""
    if not image.has_transparency_data:
        return image, None
    mixed = image.convert("RGBA")
    return mixed.convert("RGB"), mixed.getchannel("A")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, by way of the colour profile that the file carries, where there is one that fits its colours."""
    plain = image if image.mode in ("L", "CMYK", "RGB") else image.convert("RGB")
    if profile and image.mode in ("L", "CMYK", "RGB", "P"):
        try:
            from PIL import ImageCms

            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(given):
                found = ImageCms.profileToProfile(plain, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
                plain = found if found is not None else plain
        except Exception:  # a broken profile, one of another kind of colours, or Pillow without its library:
            pass  # viewers show the numbers then
    return plain.convert("RGB")


def _upright(picture: Image.Image, opened: Image.Image) -> Image.Image:
    """`picture` turned and mirrored as the EXIF data of the file say; a TIFF file was turned when it was loaded."""
    try:
        method = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF data: viewers show the picture as it is stored
        return picture
    return picture if method is None else picture.transpose(method)
