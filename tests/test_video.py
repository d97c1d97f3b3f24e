"""Videos: which frames are taken, what comes of their pixels, and files that cannot be used."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle import VideoRules, VisionFrontEnd
from runtime.errors import MediaError
from runtime.image import patches, read_image, resize, token_count
from runtime.video import Clip, read_video, second_frames, thin_out

cv2 = pytest.importorskip("cv2")

REPOSITORY = Path(__file__).parents[1]
GOLDEN = REPOSITORY / "tests" / "golden" / "a"
TABLES = json.loads((GOLDEN / "tables.json").read_text(encoding="utf-8"))
RULES = VideoRules(max_frame_num=32, decode_way="1fps")
FRONT = VisionFrontEnd(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    min_pixels=3136,
    max_pixels=602_112,
)
HEIGHT, WIDTH = 84, 112  # whole blocks: resizing leaves them as they are


def still(level: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A plain frame whose red channel says which one it is: [height, width, 3] in RGB."""
    return np.full((height, width, 3), (level, 30, 200), np.uint8)


def write_video(path: Path, frames: list[np.ndarray], fps: float, codec: str = "mp4v") -> Path:
    size = (frames[0].shape[1], frames[0].shape[0])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def levels(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame[..., 0].mean())) for frame in frames]


def test_one_frame_a_second_is_taken_in_rgb(tmp_path):
    path = write_video(tmp_path / "a.mp4", [still(2 * i) for i in range(95)], 10)
    frames = read_video(path, RULES, FRONT)
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8 for frame in frames)
    np.testing.assert_allclose(levels(frames), [20 * i for i in range(10)], atol=6)
    np.testing.assert_allclose(frames[3].mean(axis=(0, 1)), [60, 30, 200], atol=6)


def test_a_long_video_is_thinned_out_evenly_to_the_most_frames_allowed(tmp_path):
    path = write_video(tmp_path / "a.mp4", [still(2 * i) for i in range(95)], 5)
    frames = read_video(path, replace(RULES, max_frame_num=4), FRONT)
    np.testing.assert_allclose(levels(frames), [2 * 5 * second for second in (0, 6, 12, 18)], atol=6)


@pytest.mark.parametrize(
    ("clip", "most", "taken"),
    [
        (Clip(95, 29.97), 32, [0, 30, 60, 90]),
        (Clip(90, 30), 32, [0, 30, 60]),
        (Clip(5, 0.25), 32, [0, 1, 2, 3, 4]),
        (Clip(1, 25), 32, [0]),
        (Clip(25 * 40, 25), 3, [0, 25 * 19, 25 * 39]),
        (Clip(100, 10), 1, [0]),
    ],
)
def test_the_step_is_the_frame_rate_rounded_to_whole_frames(clip, most, taken):
    assert second_frames(clip, most) == taken


@given(st.integers(1, 100_000), st.floats(0.1, 120), st.integers(1, 64))
def test_frames_are_distinct_whole_seconds_in_order(count, fps, most):
    clip = Clip(count, fps)
    taken, step = second_frames(clip, most), max(1, round(fps))
    assert taken[0] == 0 and len(taken) == min(most, -(-count // step))
    assert all(index % step == 0 and index < count for index in taken)
    assert all(early < late for early, late in pairwise(taken))


def test_extracted_frames_are_thinned_out_from_the_first_on():
    assert thin_out("abcdefg", 5) == ["a", "b", "c", "e", "f"]
    assert thin_out("abcde", 5) == list("abcde")
    assert thin_out("abc", 5) == list("abc")
    assert thin_out([], 5) == []


def test_the_recorded_video_takes_the_recorded_number_of_frames_and_tokens():
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))["video_config"]
    keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "min_pixels", "max_pixels")
    front = VisionFrontEnd(**{key: config[key] for key in keys})
    frames = thin_out([read_image(GOLDEN / row["file"]) for row in TABLES["frames"]], config["max_frame_num"])
    tokens = [token_count(patches(frame, front)[1], front) for frame in frames]
    assert tokens == TABLES["prompts"]["mixed"]["videos_patch_nums"]


def test_large_frames_come_at_the_size_that_patches_leaves_as_it_is(tmp_path):
    path = write_video(tmp_path / "a.avi", [still(100, 1080, 1920)] * 2, 1, "MJPG")
    frames = read_video(path, RULES, FRONT)
    assert [frame.shape for frame in frames] == [(560, 1008, 3)] * 2
    assert np.array_equal(resize(frames[0], FRONT), frames[0])


def test_the_official_way_goes_through_a_jpeg_file_and_the_default_does_not(tmp_path):
    sharp = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.avi", [sharp] * 3, 1, "FFV1")
    plain, official = read_video(path, RULES, FRONT), read_video(path, RULES, FRONT, official=True)
    cv2.imwrite(str(tmp_path / "a.jpg"), plain[0][..., ::-1])  # quality 95 is OpenCV's default
    assert np.array_equal(official[0], read_image(tmp_path / "a.jpg"))
    assert not np.array_equal(official[0], plain[0])


def test_a_recording_without_a_frame_count_is_counted(tmp_path):
    frames = [cv2.imencode(".jpg", still(2 * i)[..., ::-1])[1].tobytes() for i in range(60)]
    path = tmp_path / "a.mjpeg"  # pictures one after the other, no header: read at 25 frames a second
    path.write_bytes(b"".join(frames))
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) < 0
    np.testing.assert_allclose(levels(read_video(path, RULES, FRONT)), [0, 50, 100], atol=6)


def test_a_header_with_the_rate_of_its_clock_is_not_believed(tmp_path):
    path = write_video(tmp_path / "a.mkv", [still(15 * i, 28, 28) for i in range(15)], 1000, "MJPG")
    slow = re.sub(rb"\x81(..)(?=\x80\xff\xd8)", lambda m: b"\x81" + stretched(m[1]), path.read_bytes(), flags=re.DOTALL)
    path.write_bytes(slow)  # still says 1000 frames a second, but shows one each 200 ms, as browsers record
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == 1000
    np.testing.assert_allclose(levels(read_video(path, RULES, FRONT)), [0, 75, 150], atol=6)


def stretched(milliseconds: bytes) -> bytes:
    return (int.from_bytes(milliseconds, "big") * 200).to_bytes(2, "big")


def test_a_header_with_a_rate_of_frames_is_believed_rather_than_rounded_time_stamps(tmp_path):
    path = write_video(tmp_path / "a.mkv", [still(2 * i) for i in range(93)], 7.5, "MJPG")  # 7.4998 by its stamps
    np.testing.assert_allclose(levels(read_video(path, RULES, FRONT)), [16 * second for second in range(12)], atol=6)


def test_a_video_that_is_cut_short_is_refused_with_where_it_ends(tmp_path):
    whole = write_video(tmp_path / "a.avi", [still(2 * i) for i in range(95)], 10, "MJPG").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"half.avi is damaged or cut short: it ends after \d\.\d of 9.5 seconds"):
        read_video(tmp_path / "half.avi", RULES, FRONT)


@pytest.mark.parametrize("content", [b"", b"no video", bytes(5000)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_video_is_refused(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"a.mp4 cannot be decoded; expected a video such as mp4"):
        read_video(tmp_path / "a.mp4", RULES, FRONT)


def test_a_video_without_its_index_is_refused(tmp_path):
    whole = write_video(tmp_path / "a.mp4", [still(2 * i) for i in range(30)], 10).read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"a.mp4 cannot be decoded"):
        read_video(tmp_path / "a.mp4", RULES, FRONT)


def test_opencv_prints_nothing_of_its_own_about_a_broken_file(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    script = f"from runtime.video import _header; _header({str(tmp_path / 'a.mp4')!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_a_missing_video_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(MediaError, match=f"{path.name} is not a file; expected a video"):
            read_video(path, RULES, FRONT)


def test_frames_of_too_few_pixels_are_refused(tmp_path):
    path = write_video(tmp_path / "a.avi", [still(0, 16, 16)], 1, "MJPG")
    with pytest.raises(MediaError, match=r"a.avi is 16x16; at least 257 pixels"):
        read_video(path, RULES, FRONT)


def test_another_way_of_decoding_is_refused_by_name(tmp_path):
    with pytest.raises(MediaError, match='decode_way "key"; only "1fps" is supported'):
        read_video(tmp_path / "a.mp4", replace(RULES, decode_way="key"), FRONT)


def test_without_opencv_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(MediaError, match=r"pip install edgeomni\[camera\]"):
        read_video(tmp_path / "a.mp4", RULES, FRONT)
