"""The camera: a video file through the same OpenCV path stands in for it."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import MediaError
from runtime.live.camera import Camera, frame_ms

cv2 = pytest.importorskip("cv2")

FPS, FRAMES = 20, 24


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.2 seconds; the red channel of frame i is 10 i."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (64, 48))
    for i in range(FRAMES):
        writer.write(np.full((48, 64, 3), (200, 30, 10 * i), np.uint8))
    writer.release()
    return path


class Plugged:
    """Camera 0 as OpenCV opens it: a film over and over, a frame every 10 ms, while its plug is in."""

    def __init__(self, film: Path, monkeypatch: pytest.MonkeyPatch):
        self.film, self.present, self.opened = str(film), True, 0
        self._open = cv2.VideoCapture
        monkeypatch.setattr(cv2, "VideoCapture", self)

    def __call__(self, source: int | str, *_: int) -> Any:
        assert source == 0
        self.opened += 1
        capture = self._open(self.film if self.present else "/nowhere/at/all.mp4", cv2.CAP_FFMPEG)
        return Endless(capture, self) if self.present else capture


class Endless:
    def __init__(self, capture: Any, plug: Plugged):
        self._capture, self._plug = capture, plug

    def grab(self) -> bool:
        time.sleep(0.01)
        rewound = self._capture.grab() or (self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0) and self._capture.grab())
        return self._plug.present and rewound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)


def wait_for(condition: Any, seconds: float = 3.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return bool(condition())


def red(camera: Camera) -> float:
    newest = camera.newest()
    assert newest is not None
    return float(np.asarray(newest[0])[..., 0].mean())


def test_a_film_plays_in_its_own_time_and_the_newest_frame_is_the_one_that_is_due(film: Path):
    with Camera(film) as camera:
        assert wait_for(camera.newest)
        begun = time.monotonic()
        while (at := time.monotonic() - begun) < 0.9:
            due = 10 * FPS * at
            assert due - 60 <= red(camera) <= due + 40  # frames are taken every 100 ms
            time.sleep(0.03)
        newest = camera.newest()
        assert newest is not None and newest[0].size == (64, 48) and newest[0].mode == "RGB" and 0 <= newest[1] < 250
        blue = np.asarray(newest[0])[..., 2].mean()
        assert blue == pytest.approx(200, abs=8)
        assert wait_for(lambda: camera.ended) and not camera.lost and camera.on
        assert 1.0 < time.monotonic() - begun < 2.5
        time.sleep(0.1)
        last = camera.newest()
        assert last is not None and last[1] > 100  # its age says that it is over


def test_it_is_off_until_started_and_after_it_is_closed(film: Path):
    threads = threading.active_count()
    camera = Camera(film)
    assert not camera.on and camera.newest() is None and threading.active_count() == threads
    camera.start()
    assert camera.on and wait_for(camera.newest)
    begun = time.monotonic()
    camera.close()
    assert time.monotonic() - begun < 0.5
    assert not camera.on and camera.newest() is None and threading.active_count() == threads
    camera.close()
    camera.start()  # from the beginning
    assert wait_for(camera.newest) and red(camera) < 40
    camera.close()


def test_a_camera_that_is_lost_gives_no_old_frame_and_is_found_again(film: Path, monkeypatch: pytest.MonkeyPatch):
    plug, threads = Plugged(film, monkeypatch), threading.active_count()
    with Camera("0", retry_seconds=0.1) as camera:
        assert wait_for(camera.newest)
        plug.present = False
        assert wait_for(lambda: camera.lost)
        assert camera.newest() is None and camera.on
        opened = plug.opened
        assert wait_for(lambda: plug.opened >= opened + 2) and camera.lost
        plug.present = True
        assert wait_for(lambda: not camera.lost) and wait_for(camera.newest)
        plug.present = False
        assert wait_for(lambda: camera.lost)
    assert threading.active_count() == threads and not camera.lost


@pytest.mark.parametrize(
    ("source", "said"),
    [(97, "camera 97 cannot be used"), ("nowhere.mp4", "neither the number of a camera nor a file")],
)
def test_a_camera_that_is_not_there_is_one_message(source: int | str, said: str):
    with pytest.raises(MediaError, match=said) as raised:
        Camera(source).start()
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_video_is_one_message(tmp_path: Path):
    (tmp_path / "text.mp4").write_text("no video")
    camera = Camera(tmp_path / "text.mp4")
    with pytest.raises(MediaError, match=r"text\.mp4 cannot be decoded"):
        camera.start()
    assert not camera.on


class Stamped:
    """A capture whose last frame has a time, or none."""

    def __init__(self, ms: float, fps: float):
        self.found = {cv2.CAP_PROP_POS_MSEC: ms, cv2.CAP_PROP_FPS: fps}

    def get(self, what: int) -> float:
        return self.found[what]


@pytest.mark.parametrize(("ms", "fps", "due"), [(2500, 30, 2500), (0, 20, 3050), (0, 1000, 0), (61, 1000, 61)])
def test_a_frame_of_a_file_is_due_at_its_own_time_and_by_its_number_only_without_one(ms: float, fps: float, due: float):
    assert frame_ms(Stamped(ms, fps), 61) == due
