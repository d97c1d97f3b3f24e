"""What people type: text with ~ and /, commands, dropped paths in every spelling, bytes of another encoding."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.terminal import Chat
from apps.typed import command_of, path_of, paths_of, refuse_bytes
from runtime.audio import read_audio
from runtime.bundle import VideoRules, VisionFrontEnd
from runtime.errors import EdgeOmniError, MediaError
from runtime.files import exists, is_file
from runtime.image import read_image
from runtime.video import read_video

FRONT = VisionFrontEnd(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    min_pixels=3136,
    max_pixels=602_112,
)


class Listener(Chat):
    """A conversation without a model: it notes what it is asked and shown."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.speak, self.answers, self.attached = None, 0, []

    def attach(self, audios: Sequence[Path], images: Sequence[Path], videos: Sequence[Path]) -> None:
        self.heard.append([str(path) for path in (*audios, *images, *videos)])

    def answer(self, text: str | None, stop: Callable[[], bool] = lambda: False) -> None:
        self.heard.append(text)

    def reset(self) -> None:
        self.heard.append("reset")


def heard(line: str, *, strict: bool = False) -> list[Any]:
    listener = Listener()
    assert listener.turn(line, strict=strict)
    return listener.heard


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "line",
    [
        "about ~10 people came, is that many?",
        "~",
        "hello ~root",
        "hello ~nobody-of-this-name/x",
        "/usr/bin holds what?",
        "/ is what in maths?",
        "/2 of it",
        "//",
        "/quit smoking, how?",
        "/reset my router, how?",
        "/help me, please",
        "/home/me/a.png",
        " /image",
        "a\0b",
        "x" * 5000,
        "what is a /image?",
    ],
)
def test_what_is_no_command_is_answered(line, strict):
    assert heard(line, strict=strict) == [line]


@pytest.mark.parametrize("line", ["/imgae a.png", "/shrug", "/s means sarcasm", "/Quit"])
def test_a_word_that_looks_like_a_command_is_a_mistake_at_a_terminal_and_a_text_in_a_pipe(line):
    assert heard(line) == [line]
    with pytest.raises(EdgeOmniError, match=r"there is no command /\w+; /help lists them"):
        heard(line, strict=True)


def test_commands_are_found_with_spaces_and_tabs_around_their_argument(tmp_path):
    path = tmp_path / "a.png"
    for line in (f"/image {path}", f"/image\t{path}  ", f"/image   {path}"):
        assert heard(line) == [[str(path)]]
    assert command_of("/quit ", strict=True) == ("/quit", "")
    assert heard("/reset") == ["reset"]
    for line in ("/quit", "/exit", "/quit  "):
        assert not Listener().turn(line)


@pytest.mark.parametrize(
    "name",
    ["a.png", "a b.png", "it's.png", 'say "x".png', "a\\b.png", "~a.png", "é (1).png", "a&b;$c.png", "50%20#1?.png"],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_dropped_path_is_found_however_it_is_spelled(tmp_path, name, there):
    path = tmp_path / name
    if there:
        path.write_bytes(b"")
    backslashed = "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in str(path))
    spelled = [str(path), backslashed, path.as_uri()]
    spelled += [f"'{path}'"] if "'" not in name else []
    spelled += [f'"{path}"'] if not set(name) & set('"\\$') else []
    for spelling in spelled:
        if there or spelling is not spelled[0]:
            assert paths_of(spelling) == [path], spelling
    if not there and not set(name) & set("\\'\"") and " " in name:
        assert paths_of(str(path)) == [path]


def test_several_dropped_paths_are_several_only_if_all_of_them_exist(tmp_path):
    one, two = tmp_path / "a b.png", tmp_path / "c.png"
    one.touch()
    assert paths_of(f"'{one}' {two}") == [Path(f"'{one}' {two}")]
    two.touch()
    assert paths_of(f"'{one}' {two}") == [one, two]
    assert heard(f"/image '{one}' {two}") == [[str(one), str(two)]]


def test_a_tilde_is_the_home_folder_where_it_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/a.png") == tmp_path / "a.png"
    assert path_of("~nobody-of-this-name/a.png") == Path("~nobody-of-this-name/a.png")
    with pytest.raises(EdgeOmniError, match="the name of a file is missing"):
        paths_of("")


def test_a_speech_file_may_be_quoted_too(tmp_path):
    chat = Listener()
    chat.turn(f"/speak '{tmp_path}/my answer.wav'")
    assert chat.speak == tmp_path / "my answer.wav"
    chat.turn(f"/speak {tmp_path}/my other answer.wav")
    assert chat.speak == tmp_path / "my other answer.wav"
    chat.turn("/speak off")
    assert chat.speak is None


def test_bytes_of_another_encoding_are_refused_with_where_they_stand():
    with pytest.raises(EdgeOmniError, match=r"holds the byte 0xE9 at character 4, which is no text"):
        refuse_bytes(b"caf\xe9".decode("utf-8", "surrogateescape"))
    with pytest.raises(EdgeOmniError, match="0xE9"):
        heard("caf\udce9?")
    refuse_bytes("café \U0001f600")


def test_a_name_that_is_too_long_or_impossible_names_nothing():
    for name in ("x" * 300, "a/" * 5000, "a\0b", ""):
        assert not is_file(name)
    assert not exists("x" * 300)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "a/" * 3000 + "b.wav"])
def test_an_impossible_name_of_a_medium_is_one_message(name):
    rules = VideoRules(max_frame_num=1, decode_way="1fps")
    for read in (read_audio, read_image, lambda path: read_video(path, rules, FRONT)):
        with pytest.raises(MediaError, match="is not a file"):
            read(name)


@given(st.text(st.characters(codec=None), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_line_is_taken_or_refused_and_nothing_else(text, strict):
    for line in (
        text,
        f"/{text}",
        f"~{text}",
        f"/image {text}",
        f"/speak {text}",
        f"/audio '{text}",
        f"/video file://{text}",
    ):
        with suppress(EdgeOmniError):
            Listener().turn(line, strict=strict)
