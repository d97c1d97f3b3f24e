"""The camera, or a video file in its place: a thread that keeps the newest frame, and notices when it is lost."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import MediaError
from runtime.files import is_file
from runtime.video import MAX_FPS, Film, open_film, opencv

RETRY_SECONDS = 2.0  # between looking whether a lost camera is back
PERIOD_MS = 100  # a frame is decoded this often; the others are passed over
READ_SECONDS = "2"  # OpenCV gives up on a camera that sends nothing after 10 otherwise


class Camera:
    """Off until `start`; `source` is the number of a camera, or a video file, which plays once in its own time.

    Only `start` raises. `lost` says that the camera is gone; it is looked for until `close`. `ended` says that the
    file is over.
    """

    def __init__(self, source: int | str | Path = 0, *, retry_seconds: float = RETRY_SECONDS):
        text = str(source).strip()
        self.source: int | str = int(text) if text.isdecimal() else text
        self.retry_seconds = retry_seconds
        self.lost = self.ended = False
        self._film: Film | None = None  # where the source is a file
        self._newest: tuple[Any, float] | None = None  # OpenCV's blue-green-red frame, when it was taken
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def __enter__(self) -> "Camera":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def on(self) -> bool:
        """Whether the camera is, or tries to be, in use: what the person has to see at any time."""
        return self._thread is not None

    def start(self) -> None:
        """Begin to take frames. MediaError: OpenCV is not installed, no such camera or file, busy, or not permitted."""
        self.close()
        capture = self._opened()
        if capture is None:
            raise MediaError(_unusable(self.source))
        self.lost = self.ended = False
        self._closing.clear()
        self._thread = threading.Thread(target=self._watch, args=(capture,), name="camera", daemon=True)
        self._thread.start()

    def newest(self) -> tuple[Image.Image, float] | None:
        """The newest frame in RGB and its age in ms; None before the first, and while the camera is off or lost."""
        newest = self._newest
        if newest is None or not self.on or self.lost:
            return None
        frame, taken = newest
        return Image.fromarray(np.ascontiguousarray(frame[..., ::-1])), _now() - taken

    def close(self) -> None:
        """Turn it off: no thread and no device stays open, no frame is kept."""
        thread, self._thread = self._thread, None
        self._closing.set()
        if thread is not None:
            thread.join()
        self._newest, self.lost = None, False

    def _opened(self) -> Any:
        """OpenCV's capture, or None where it cannot be used."""
        os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", READ_SECONDS)
        cv2 = opencv()
        if isinstance(self.source, int):
            capture = cv2.VideoCapture(self.source)
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # frames that wait in the driver are old
        elif is_file(self.source):
            self._film = open_film(self.source)
            capture = self._film.open()
        else:
            return None
        if capture.isOpened():
            return capture
        capture.release()
        return None

    def _watch(self, capture: Any) -> None:
        """The thread: frames until it is closed; a camera that stops is opened again and again, a file is over."""
        while capture is not None:
            with suppress(opencv().error):  # counts as lost, as a frame that does not come
                self._take(capture)
            capture.release()
            if self._closing.is_set():
                return
            if not isinstance(self.source, int):
                self.ended = True
                return
            self.lost = True
            capture = self._found_again()
            self._newest, self.lost = None, capture is None

    def _take(self, capture: Any) -> None:
        """Frames until there are no more, or it is closed."""
        live, begun, taken = isinstance(self.source, int), _now(), -float(PERIOD_MS)
        position = 0
        while not self._closing.is_set() and capture.grab():
            if not live and self._closing.wait(max(0.0, begun + frame_ms(capture, position) - _now()) / 1000):
                return
            position += 1
            if _now() - taken < PERIOD_MS:
                continue
            whole, frame = capture.retrieve()
            if not whole:
                return
            taken = _now()
            self._newest = frame if self._film is None else self._film.shown(capture, frame)[..., ::-1], taken

    def _found_again(self) -> Any:
        """The camera, once it is back; None when it is closed before."""
        while not self._closing.wait(self.retry_seconds):
            if (capture := self._opened()) is not None:
                return capture
        return None


def frame_ms(capture: Any, index: int) -> float:
    """When the frame of a file that was grabbed last is due, from its start; by its number where it has no time."""
    cv2 = opencv()
    stamp, fps = float(capture.get(cv2.CAP_PROP_POS_MSEC)), capture.get(cv2.CAP_PROP_FPS)
    return stamp if stamp > 0 or not 0 < fps <= MAX_FPS else 1000 * index / fps


def _unusable(source: int | str) -> str:
    if isinstance(source, str):
        what = "cannot be decoded" if is_file(source) else "is neither the number of a camera nor a file"
        return f"{source} {what}; expected a number such as 0, or a video such as mp4, mkv, webm or avi"
    there = sorted(path.name for path in Path("/dev").glob("video*")) if os.name == "posix" else []
    seen = f"this machine has {', '.join(there)}" if there else "this machine shows none"
    return f"camera {source} cannot be used ({seen}): connect it, close a program that has it, or permit its use"


def _now() -> float:
    return 1000 * time.monotonic()
