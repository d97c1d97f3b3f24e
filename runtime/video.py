"""A video file to the few frames that the model looks at: one a second, thinned out evenly where there are too many."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from runtime.bundle import VideoRules, VisionFrontEnd
from runtime.errors import MediaError
from runtime.image import Rgb, check_size, read_image, resize

Frame = TypeVar("Frame")

MAX_FPS = 480  # above, a header states its clock's rate rather than the frames'
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Clip:
    frames: int
    fps: float  # average


def read_video(path: str | Path, rules: VideoRules, front: VisionFrontEnd, *, official: bool = False) -> list[Rgb]:
    """The frames of a video file that second_frames names, each RGB uint8 [height, width, 3].

    They come at smart_resize's size, which `patches` leaves as it is: 32 frames of 4K video would take 800 MB.
    The official code stores each frame as a JPEG of quality 95 and reads it back; official=True does the same.

    The whole file is decoded, since seeking is not exact. Raises MediaError: OpenCV not installed, no such file, not
    decodable, cut short, frames of a size that check_size refuses, or a decode_way other than "1fps".
    """
    if rules.decode_way != "1fps":
        raise MediaError(f'this model samples video by decode_way "{rules.decode_way}"; only "1fps" is supported')
    if not Path(path).is_file():
        raise MediaError(f"{path} is not a file; expected a video such as mp4, mkv, webm or avi")

    def prepared(frame: Rgb) -> Rgb:
        check_size(frame.shape[0], frame.shape[1], str(path))
        return resize(_through_jpeg(frame) if official else frame, front)

    return _sampled(str(path), rules.max_frame_num, prepared)


def second_frames(clip: Clip, max_frame_num: int) -> list[int]:
    """Indices of the frames taken for each second, at most max_frame_num of them, evenly from the first on.

    The step between them is a whole number of frames: at 29.97 frames a second, frame 30 k stands for second k.
    """
    seconds = range(0, clip.frames, max(1, round(clip.fps)))
    if len(seconds) <= max_frame_num:
        return list(seconds)
    return [seconds[int(i)] for i in np.linspace(0, len(seconds) - 1, max_frame_num)]


def thin_out(frames: Sequence[Frame], max_frame_num: int) -> list[Frame]:
    """At most max_frame_num of frames that were extracted beforehand; unlike second_frames it may drop the last."""
    kept = min(len(frames), max_frame_num)
    return [frames[i * len(frames) // kept] for i in range(kept)]


def _sampled(path: str, max_frame_num: int, prepared: Callable[[Rgb], Rgb]) -> list[Rgb]:
    promised = _header(path)
    wanted = second_frames(promised, max_frame_num) if promised else []
    frames, found = _decode(path, wanted, prepared)
    if promised:
        _check_whole(path, promised, found)
        found = Clip(found.frames, promised.fps)
    if wanted == second_frames(found, max_frame_num):
        return frames
    return _decode(path, second_frames(found, max_frame_num), prepared)[0]


def _header(path: str) -> Clip | None:
    """What the file says of itself, or None where that cannot be true (live recordings of browsers)."""
    cv2 = opencv()
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    clip = Clip(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS))
    return clip if 0 < clip.fps <= MAX_FPS else None


def _decode(path: str, wanted: list[int], prepared: Callable[[Rgb], Rgb]) -> tuple[list[Rgb], Clip]:
    """The wanted frames, each prepared as it comes, and what the file turned out to hold."""
    cv2 = opencv()
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    frames: list[Rgb] = []
    count, last_ms = 0, 0.0
    while capture.grab():
        if len(frames) < len(wanted) and count == wanted[len(frames)]:
            whole, bgr = capture.retrieve()
            if not whole:
                break
            frames.append(prepared(np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)))
        count, last_ms = count + 1, capture.get(cv2.CAP_PROP_POS_MSEC)
    if not count:
        raise MediaError(f"{path} cannot be decoded; expected a video such as mp4, mkv, webm or avi")
    return frames, Clip(count, 1000 * (count - 1) / last_ms if last_ms > 0 else 1.0)


def _check_whole(path: str, promised: Clip, found: Clip) -> None:
    """Raise MediaError where frame count and clock both end early: one alone may be an estimate of the header."""
    end, promised_end = found.frames / found.fps, promised.frames / promised.fps
    if found.frames < promised.frames and end + 1 < promised_end:
        raise MediaError(
            f"{path} is damaged or cut short: it ends after {end:.1f} of {promised_end:.1f} seconds "
            f"({found.frames} of {promised.frames} frames)"
        )


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
