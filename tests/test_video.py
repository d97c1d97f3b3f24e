"""Videos: which frames are taken, what comes of their pixels, and files that cannot be used."""

import json
import re
import shutil
import struct
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
from runtime.container import read_container
from runtime.errors import MediaError
from runtime.image import patches, read_image, resize, token_count
from runtime.video import Clip, read_video, second_frames, shown_frames, thin_out

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


def test_officially_a_header_with_a_rate_of_frames_is_believed_rather_than_rounded_time_stamps(tmp_path):
    path = write_video(tmp_path / "a.mkv", [still(2 * i) for i in range(93)], 7.5, "MJPG")  # 7.4998 by its stamps
    taken = levels(read_video(path, RULES, FRONT, official=True))
    np.testing.assert_allclose(taken, [16 * second for second in range(12)], atol=6)


# Times (K3)


def restamped(path: Path, stamps: list[int]) -> Path:
    """An mkv file of MJPG frames with other times, in ms, as cameras and browsers write them (one cluster)."""
    left = iter(stamps)
    pattern = rb"(?<=\x81)(..)(?=\x80\xff\xd8)"  # of a SimpleBlock of track 1
    path.write_bytes(re.sub(pattern, lambda _: next(left).to_bytes(2, "big"), path.read_bytes(), flags=re.DOTALL))
    assert next(left, None) is None
    return path


def mjpeg(path: Path, levels_of: list[int], fps: float) -> Path:
    return write_video(path, [still(level, 28, 28) for level in levels_of], fps, "MJPG")


def test_of_a_video_that_is_fast_and_then_still_the_frames_shown_at_each_second_are_taken(tmp_path):
    path = mjpeg(tmp_path / "a.mkv", [3 * i for i in range(80)], 1000)  # one cluster
    stamps = [round(1000 * i / 30) if i < 60 else 2000 + 500 * (i - 60) for i in range(80)]
    taken = levels(read_video(restamped(path, stamps), RULES, FRONT))
    shown = [0, 30, 60, *range(62, 80, 2)]
    assert len(taken) == 12
    np.testing.assert_allclose(taken, [3 * i for i in shown], atol=9)


@pytest.mark.parametrize(
    ("times", "fps", "most", "taken"),
    [
        (np.arange(100) / 25, 25, 32, [0, 25, 50, 75]),
        (np.arange(100) / 25 + 30, 25, 32, [0, 25, 50, 75]),  # a file that starts at 30 s
        (np.arange(101) / 25, 25, 32, [0, 25, 50, 75]),  # one frame more is no second more
        (np.arange(95) / 10, 10, 32, [10 * i for i in range(10)]),
        (np.arange(95) * 1.001 / 30, 30 / 1.001, 32, [0, 29, 59, 89]),  # at 1 s, frame 29 is shown until 1.001 s
        (np.round(np.arange(91) * 1000 / 30) / 1000, 30, 32, [0, 30, 60]),  # times in whole milliseconds
        (np.array([0, 5, 10.0]), 0.2, 32, [0] * 5 + [1] * 5 + [2] * 5),  # slides
        (np.array([0, 1 / 30, 10]), 1000, 32, [0] + [1] * 9),
        (np.array([0, 0.02, 0.04, 0.06, 60]), 30, 3, [0, 3, 3]),
        (np.array([7.0]), 25, 32, [0]),
        (np.arange(25 * 40) / 25, 25, 3, [0, 25 * 19, 25 * 39]),
    ],
)
def test_the_frame_on_the_screen_at_each_whole_second_is_taken(times, fps, most, taken):
    assert shown_frames(np.asarray(times, float), fps, most) == taken


@given(st.lists(st.floats(0.001, 30), max_size=200), st.floats(0.1, 120), st.integers(1, 64))
def test_a_taken_frame_is_shown_already_and_the_next_one_not_yet(gaps, fps, most):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    taken = shown_frames(times, fps, most)
    assert taken[0] == 0 and len(taken) <= most and taken == sorted(taken)
    if len(taken) < most:
        for second, i in enumerate(taken):
            assert times[i] <= second + 0.0005 and (i + 1 == len(times) or times[i + 1] > second)


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def place_of(content: bytes, kind: bytes) -> int:
    """Where what the box holds begins."""
    assert content.count(kind) == 1
    return content.index(kind) + 4


def patched(path: Path, at: int, new: bytes) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    return path


def test_a_video_that_an_edit_list_begins_late_is_whole(tmp_path):
    path = write_video(tmp_path / "a.mp4", [still(2 * i) for i in range(100)], 25)
    content = path.read_bytes()
    scale = int.from_bytes(content[place_of(content, b"mvhd") + 12 :][:4], "big")
    units = int.from_bytes(content[place_of(content, b"mdhd") + 12 :][:4], "big")
    edit = place_of(content, b"elst") + 8
    patched(path, edit, struct.pack(">Ii", 2 * scale, 2 * units))  # the 2 s from second 2 on, as `ffmpeg -c copy` cuts
    patched(path, place_of(content, b"tkhd") + 20, (2 * scale).to_bytes(4, "big"))
    np.testing.assert_allclose(levels(read_video(path, RULES, FRONT)), [100, 150], atol=6)


def test_a_header_that_tells_the_length_of_a_longer_sound_refuses_no_video(tmp_path):
    path = mjpeg(tmp_path / "a.mkv", [2 * i for i in range(100)], 25)
    content = path.read_bytes()
    at = content.index(b"\x44\x89\x88") + 3  # Duration, as a double, in ms
    patched(path, at, struct.pack(">d", 10_000.0))
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 250
    np.testing.assert_allclose(levels(read_video(path, RULES, FRONT)), [0, 50, 100, 150], atol=6)


def test_an_mkv_file_that_is_shorter_than_it_says_is_refused(tmp_path):
    whole = mjpeg(tmp_path / "a.mkv", [2 * i for i in range(100)], 25).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"cut.mkv is damaged or cut short: it ends after \d\.\d of 4.0 seconds"):
        read_video(tmp_path / "cut.mkv", RULES, FRONT)


def ffmpeg(*arguments: object) -> None:
    """Runs the program; skips the test on machines without it, or whose build lacks what is asked of it."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed; the same values are tested with files that OpenCV wrote")
    run = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-y", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        pytest.skip(f"this ffmpeg cannot: {run.stderr[-200:]}")


def numbered(path: Path, *arguments: object, count: int = 100, fps: int = 25, extra: tuple[object, ...] = ()) -> Path:
    """A film of `count` plain frames, 2 i in the grey of frame i, encoded as the arguments say."""
    grey = f"color=black:size=128x96:rate={fps}:duration={count / fps:.4f},format=gray,geq=lum='2*N'"
    ffmpeg("-f", "lavfi", "-i", grey, *extra, *arguments, path)
    return path


def assert_taken(path: Path, indices: list[int]) -> None:
    taken = levels(read_video(path, RULES, FRONT))
    assert len(taken) == len(indices)
    np.testing.assert_allclose(taken, [2 * i for i in indices], atol=8)


def test_a_variable_rate_as_ffmpeg_writes_it(tmp_path):
    stretch = r"setpts=if(lt(N\,60)\,N/30\,2+(N-60)/2)/TB,format=yuv420p"
    options = ("-vf", stretch, "-vsync", "vfr", "-c:v", "libvpx", "-deadline", "realtime", "-b:v", "1M")
    path = numbered(tmp_path / "vfr.webm", *options, count=81, fps=30)
    assert_taken(path, [0, 30, 60, *range(62, 80, 2)])


def test_a_video_trimmed_without_encoding(tmp_path):
    whole = numbered(tmp_path / "whole.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 25)
    ffmpeg("-ss", 2, "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    assert_taken(tmp_path / "cut.mp4", [50, 75])


@pytest.mark.parametrize(
    ("name", "codecs"),
    [
        ("a.webm", "-c:v libvpx -deadline realtime -b:v 1M -c:a libopus"),
        ("a.mkv", "-c:v libx264 -pix_fmt yuv420p -c:a aac"),
        ("a.mp4", "-c:v libx264 -pix_fmt yuv420p -c:a aac"),
        ("a.avi", "-c:v mpeg4 -q:v 2 -c:a libmp3lame"),
        ("a.ts", "-c:v libx264 -pix_fmt yuv420p -c:a aac"),
        ("a.flv", "-c:v libx264 -pix_fmt yuv420p -c:a aac"),
    ],
)
def test_a_sound_that_outlasts_the_picture_refuses_no_video(tmp_path, name, codecs):
    path = numbered(tmp_path / name, *codecs.split(), extra=("-f", "lavfi", "-i", "sine=duration=10"))
    assert_taken(path, [0, 25, 50, 75])
    assert read_container(path).sound == (path.suffix not in (".ts", ".flv"))  # so that it can be said
    silent = tmp_path / f"silent{path.suffix}"
    ffmpeg("-i", path, "-an", "-c", "copy", silent)
    assert not read_container(silent).sound


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.webm"])
def test_a_file_that_starts_at_30_seconds(tmp_path, name):
    codec = ("-c:v", "libvpx", "-b:v", "1M") if name.endswith("webm") else ("-c:v", "libx264", "-pix_fmt", "yuv420p")
    assert_taken(numbered(tmp_path / name, *codec, "-output_ts_offset", 30), [0, 25, 50, 75])


def test_a_codec_that_this_opencv_lacks_is_named_with_a_command_for_this_file(tmp_path):
    path = numbered(tmp_path / "it's.mp4", "-c:v", "libaom-av1", "-cpu-used", 8, "-pix_fmt", "yuv420p", count=2)
    try:
        read_video(path, RULES, FRONT)
    except MediaError as error:
        assert "it's.mp4 holds AV1 video, which this OpenCV cannot decode; convert it: ffmpeg -i '/" in str(error)
    else:
        pytest.skip("this OpenCV decodes AV1")


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mjpeg(Path("clip.avi"), [0, 100], 1).rename("concat:1.avi")
    np.testing.assert_allclose(levels(read_video("concat:1.avi", RULES, FRONT)), [0, 100], atol=6)


def test_a_frame_that_stays_for_seconds_is_prepared_once(tmp_path):
    path = write_video(tmp_path / "a.mp4", [still(2 * i) for i in range(3)], 0.5)
    frames = read_video(path, RULES, FRONT)
    assert len(frames) == 6 and all(frames[i] is frames[i + 1] for i in (0, 2, 4))


@given(st.binary(max_size=200), st.sampled_from([b"\0\0\0\x18ftypisom", b"\0\0\0\x80moov", b"\x1aE\xdf\xa3", b"RIFF"]))
def test_headers_of_any_bytes_say_something_or_nothing(tmp_path_factory, content, beginning):
    path = tmp_path_factory.getbasetemp() / "any.mp4"
    path.write_bytes(beginning + content)
    assert read_container(path).matrix is None


# What a player shows (K4)

QUARTERS = np.kron(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]), np.ones((28, 56, 1)))


def matrix_written(path: Path, a: int, b: int, c: int, d: int) -> Path:
    content = path.read_bytes()
    at = place_of(content, b"tkhd") + 40
    fixed = (a << 16, b << 16, 0, c << 16, d << 16)
    return patched(path, at, struct.pack(">5i", *fixed))


@pytest.mark.parametrize(
    ("matrix", "show"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((0, -1, 1, 0), lambda a: np.rot90(a)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    ],
)
def test_a_turned_or_mirrored_film_is_upright_as_players_show_it(tmp_path, matrix, show):
    stored = QUARTERS.astype(np.uint8)
    path = matrix_written(write_video(tmp_path / "a.mp4", [stored] * 3, 1), *matrix)
    found, expected = read_video(path, RULES, FRONT)[0], show(stored)
    assert found.shape == expected.shape
    height, width = found.shape[:2]
    for row in (height // 4, 3 * height // 4):
        for column in (width // 4, 3 * width // 4):
            np.testing.assert_allclose(found[row, column].astype(int), expected[row, column], atol=40)


def test_pixels_that_are_not_square_are_shown_as_wide_as_the_file_says(tmp_path):
    path = numbered(tmp_path / "a.mp4", "-vf", "setsar=2/1", "-c:v", "libx264", "-pix_fmt", "yuv420p", count=2)
    assert read_video(path, RULES, FRONT)[0].shape == (84, 252, 3)  # 96 x 256, in whole blocks
    assert read_video(path, RULES, FRONT, official=True)[0].shape == (84, 140, 3)


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
    script = f"from runtime.video import open_film; open_film({str(tmp_path / 'a.mp4')!r})"
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
