"""Pictures that come with a request: bytes in memory, bounded before anything large is made of them."""

import base64
import binascii
import re
from io import BytesIO

from PIL import Image

from apps.server.failures import refused
from apps.server.settings import Limits
from runtime.errors import MediaError
from runtime.image import FORMATS, Rgb, read_image

DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)


def decoded_url(url: str, param: str) -> bytes:
    """What a data URL holds. ApiError for any other URL: this server fetches nothing."""
    head = DATA_URL.match(url[:256])
    if head is None:
        scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
        if scheme in ("http", "https", "file", "ftp"):
            raise refused(
                f"{scheme} URLs are not fetched: this server opens no connection and no file on a client's behalf; "
                "send the picture itself, as data:image/png;base64,...",
                param,
                "invalid_image_url",
            )
        raise refused("expected a data URL with base64, as data:image/png;base64,...", param, "invalid_image_url")
    return decoded(url[head.end() :], param)


def decoded(text: str, param: str) -> bytes:
    """Bytes of base64. ApiError where it is none, or empty."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refused("the data is no base64", param, "invalid_base64") from None
    if not data:
        raise refused("the data is empty", param, "invalid_base64")
    return data


def picture(data: bytes, limits: Limits) -> Rgb:
    """A picture file's pixels, uint8 [height, width, 3]. MediaError where it is none, and ApiError for too many."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads the header alone
            pixels = image.width * image.height
    except Exception:  # read_image says what is wrong
        pixels = 0
    if pixels > limits.pixels:
        raise refused(f"a picture has {pixels} pixels, at most {limits.pixels} are read; scale it down", "messages")
    try:
        return read_image(data)
    except MediaError as error:
        raise refused(str(error).replace("the input", "a picture", 1), "messages", "invalid_image") from None
