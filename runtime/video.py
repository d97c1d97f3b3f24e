"""A video file to the few frames that the model looks at: one a second, thinned out evenly where there are too many."""

import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.bundle import VideoRules, VisionFrontEnd
from runtime.container import Container, Matrix, read_container
from runtime.errors import MediaError
from runtime.files import is_file
from runtime.image import Rgb, check_size, read_image, resize

Frame = TypeVar("Frame")

MAX_FPS = 480  # above, a header states its clock's rate rather than the frames'
MOST_PREDICTED = 10_000_000  # frames; a header that promises more is not believed
STAMP_ERROR = 0.0005  # s: containers round the time of a frame to milliseconds
SLIVER = 0.05  # s: a second of which the video has no more than this is none of its own
JPEG_QUALITY = 95
CODECS = {"AV01": "AV1", "HEVC": "H.265", "HEV1": "H.265", "HVC1": "H.265", "H264": "H.264", "VP90": "VP9"}
Seconds = NDArray[np.float64]  # when each frame is first shown


@dataclass(frozen=True)
class Clip:
    frames: int
    fps: float  # average


@dataclass(frozen=True)
class Film:
    """A video file as its headers describe it; `clip` is None where they cannot be true (browsers' recordings)."""

    path: str
    container: Container
    clip: Clip | None
    official: bool

    def open(self) -> Any:
        """A capture at the first frame, which OpenCV turns upright unless it is mirrored too."""
        cv2 = opencv()
        capture = cv2.VideoCapture(self.path, cv2.CAP_FFMPEG)
        if self._mirrored():
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        return capture

    def shown(self, capture: Any, bgr: Rgb) -> Rgb:
        """The frame as a player shows it: in RGB, mirrored where the file says so, with square pixels."""
        cv2 = opencv()
        rgb = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        if self.official:
            return rgb
        turned = capture.get(cv2.CAP_PROP_ORIENTATION_META) % 180 and not self._mirrored()
        rgb = _square(rgb, capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN), bool(turned))
        return placed(rgb, self.container.matrix) if self.container.matrix and self._mirrored() else rgb

    def _mirrored(self) -> bool:
        """Whether what is stored has to be mirrored, and not only turned; OpenCV would only turn it."""
        if self.container.matrix is None or self.official:
            return False
        a, b, c, d = self.container.matrix
        return a * d - b * c < 0


def open_film(path: str | Path, *, official: bool = False) -> Film:
    """Read the headers of a video file. MediaError: OpenCV is not installed, or the file cannot be read."""
    cv2 = opencv()
    # FFmpeg would take "a:b.mp4" for an address of the protocol a.
    name = str(Path(path).absolute())
    try:
        container = read_container(Path(name))
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    except (OSError, UnicodeError, cv2.error) as error:
        raise MediaError(f"{path} cannot be read ({error}); check its name and its permissions") from None
    clip = Clip(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS))
    return Film(name, container, clip if 0 < clip.fps <= MAX_FPS else None, official)


def placed(rgb: Rgb, matrix: Matrix) -> Rgb:
    """The picture mirrored, turned or both, as the display matrix of an mp4 file says."""
    a, b, c, d = matrix
    across, down = (a, d) if a else (c, b)
    rgb = rgb if a else rgb.swapaxes(0, 1)
    rgb = rgb[:, ::-1] if across < 0 else rgb
    return np.ascontiguousarray(rgb[::-1] if down < 0 else rgb)


def _square(rgb: Rgb, wide: float, high: float, turned: bool) -> Rgb:
    """The picture with square pixels, where those of the file are `wide` to `high` before it is turned upright."""
    if wide <= 0 or high <= 0 or wide == high:
        return rgb
    height, width = rgb.shape[:2]
    stretched = (width, round(height * wide / high)) if turned else (round(width * wide / high), height)
    return np.asarray(Image.fromarray(rgb).resize((max(1, stretched[0]), max(1, stretched[1]))))


def read_video(path: str | Path, rules: VideoRules, front: VisionFrontEnd, *, official: bool = False) -> list[Rgb]:
    """The frames of a video file that a player shows at each whole second, RGB uint8 [height, width, 3].

    They come at smart_resize's size, which `patches` leaves as it is: 32 frames of 4K video would take 800 MB.
    The official code counts frames at the average rate (second_frames), looks at no display matrix that mirrors and
    at no shape of pixels, stores each frame as a JPEG of quality 95 and reads it back; official=True does the same.

    The whole file is decoded, since seeking is not exact. Raises MediaError: OpenCV not installed, no such file, not
    decodable, cut short, frames of a size that check_size refuses, or a decode_way other than "1fps".
    """
    if rules.decode_way != "1fps":
        raise MediaError(f'this model samples video by decode_way "{rules.decode_way}"; only "1fps" is supported')
    if not is_file(path):
        raise MediaError(f"{path} is not a file; expected a video such as mp4, mkv, webm or avi")

    def prepared(frame: Rgb) -> Rgb:
        check_size(frame.shape[0], frame.shape[1], str(path))
        return resize(_through_jpeg(frame) if official else frame, front)

    return _sampled(str(path), open_film(path, official=official), rules.max_frame_num, prepared)


def second_frames(clip: Clip, max_frame_num: int) -> list[int]:
    """The official choice: indices of the frames taken for each second, at most max_frame_num, evenly from the first.

    The step between them is a whole number of frames: at 29.97 frames a second, frame 30 k stands for second k.
    """
    seconds = range(0, clip.frames, max(1, round(clip.fps)))
    if len(seconds) <= max_frame_num:
        return list(seconds)
    return [seconds[int(i)] for i in np.linspace(0, len(seconds) - 1, max_frame_num)]


def shown_frames(times: Seconds, fps: float, max_frame_num: int) -> list[int]:
    """Indices of the frames that are on the screen at each whole second, at most max_frame_num, evenly from the first.

    A frame that stays for several seconds is taken for each of them. The last one is taken to stay as long as most
    do, and no longer than 1 / fps.
    """
    since = times - times[0]
    stays = min(float(np.median(np.diff(since))), 1 / fps) if len(since) > 1 else 0.0
    count = max(1, math.ceil(since[-1] + stays - SLIVER))
    seconds = np.linspace(0, count - 1, min(count, max_frame_num)).astype(np.int64)
    return [int(i) for i in np.searchsorted(since, seconds + STAMP_ERROR, side="right") - 1]


def thin_out(frames: Sequence[Frame], max_frame_num: int) -> list[Frame]:
    """At most max_frame_num of frames that were extracted beforehand; unlike second_frames it may drop the last."""
    kept = min(len(frames), max_frame_num)
    return [frames[i * len(frames) // kept] for i in range(kept)]


def _sampled(path: str, film: Film, max_frame_num: int, prepared: Callable[[Rgb], Rgb]) -> list[Rgb]:
    wanted = _predicted(film, max_frame_num)
    frames, stamps = _decode(path, film, wanted, prepared)
    found = _clip(film, stamps)
    _check_whole(path, film, found)
    if film.official:
        taken = second_frames(found, max_frame_num)
    else:
        taken = shown_frames(_times(stamps, found), found.fps, max_frame_num)
    if taken == wanted[: len(taken)]:  # a header may promise more, the length of the sound for instance
        return frames[: len(taken)]
    return _decode(path, film, taken, prepared)[0]


def _predicted(film: Film, max_frame_num: int) -> list[int]:
    """The frames that will be wanted if the header is right, so that most files are decoded once."""
    clip = film.clip
    if clip is None or not 0 < clip.frames < MOST_PREDICTED:
        return []
    if film.official:
        return second_frames(clip, max_frame_num)
    return shown_frames(np.arange(clip.frames) / clip.fps, clip.fps, max_frame_num)


def _decode(
    path: str, film: Film, wanted: list[int], prepared: Callable[[Rgb], Rgb]
) -> tuple[list[Rgb], NDArray[np.float64]]:
    """The wanted frames, each prepared as it comes, and the time stamp of every frame that the file holds, in s."""
    cv2 = opencv()
    capture = film.open()
    frames: list[Rgb] = []
    stamps: list[float] = []
    while capture.grab():
        due = wanted[len(frames) :].count(len(stamps)) if len(frames) < len(wanted) else 0
        if due:
            whole, bgr = capture.retrieve()
            if not whole:
                break
            frames += due * [prepared(film.shown(capture, bgr))]
        stamps.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    if not stamps:
        raise MediaError(_undecodable(path, capture))
    return frames, np.array(stamps)


def _clip(film: Film, stamps: Seconds) -> Clip:
    """What the file turned out to hold, at the rate of its header if that can be true."""
    if film.clip is not None:
        return Clip(len(stamps), film.clip.fps)
    return Clip(len(stamps), (len(stamps) - 1) / stamps[-1] if stamps[-1] > 0 else 1.0)


def _times(stamps: Seconds, found: Clip) -> Seconds:
    """The time stamps, or those of frames evenly at the rate where they stand still or go back."""
    in_order = len(stamps) == 1 or (np.all(np.diff(stamps) >= 0) and stamps[-1] > stamps[0])
    return stamps if in_order else np.arange(found.frames) / found.fps


def _check_whole(path: str, film: Film, found: Clip) -> None:
    """Raise MediaError where frames and clock both end early, in files whose headers speak of the picture alone.

    Elsewhere the header tells the length of the sound, too, and only bytes that are missing are a sign.
    """
    if film.clip is None or not (film.container.counts or film.container.cut):
        return
    end, promised_end = found.frames / found.fps, film.clip.frames / film.clip.fps
    if film.container.seconds is not None:
        promised_end = min(promised_end, film.container.seconds)
    if found.frames < film.clip.frames and end + 1 < promised_end:
        raise MediaError(
            f"{path} is damaged or cut short: it ends after {end:.1f} of {promised_end:.1f} seconds "
            f"({found.frames} of {film.clip.frames} frames)"
        )


def _undecodable(path: str, capture: Any) -> str:
    """Why no frame came, by the name of the codec where OpenCV knows it, and what to do."""
    code = int(capture.get(opencv().CAP_PROP_FOURCC)) if capture.isOpened() else 0
    if code <= 0:
        return f"{path} cannot be decoded; expected a video such as mp4, mkv, webm or avi"
    codec = code.to_bytes(4, "little").decode("latin-1").strip("\0 ")
    codec = CODECS.get(codec.upper(), repr(codec))
    target = Path(path).with_name(f"{Path(path).stem}-h264.mp4")
    command = f"ffmpeg -i {shlex.quote(path)} -c:v libx264 {shlex.quote(str(target))}"
    return f"{path} holds {codec} video, which this OpenCV cannot decode; convert it: {command}"


def _through_jpeg(frame: Rgb) -> Rgb:
    cv2 = opencv()
    encoded = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return read_image(encoded.tobytes())


def opencv():
    """The module cv2, told not to print about broken files; MediaError where it is not installed."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise MediaError("videos need OpenCV, which is not installed: pip install edgeomni[camera]") from None
    return cv2
