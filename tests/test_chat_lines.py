"""What is typed to the chat command and within it: words, dropped files, commands, Tab, history, kept conversations."""

import json
import os
import stat
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image as Pictures

from apps import chat_file, line_input, terminal
from apps.chat_file import Exchange, Given, Saved
from apps.chat_words import bundle_and_text
from apps.typed import command_of, dropped
from runtime.audio_file import writable, write_audio
from runtime.conversation import Choices
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.files import cache_folder
from tests.test_chat import saying
from tests.test_cli import INPUTS, Run, Terminal, edgeomni, omni, one_message, process
from tests.tiny import omni_bundle

__all__ = ["edgeomni"]  # a fixture
GREEDY = Choices(greedy=True, max_new=20)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(omni_bundle())


# Words behind the command


def is_folder(word: str) -> bool:
    return word in ("b", "/b")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], (None, None)),
        (["b"], ("b", None)),
        (["b", "Hi"], ("b", "Hi")),
        (["b", "what", "is", "it?"], ("b", "what is it?")),
        (["what", "is", "the", "capital?"], (None, "what is the capital?")),
        (["What's 7 + 5?"], (None, "What's 7 + 5?")),
        (["hello!"], (None, "hello!")),
        (["你好"], (None, "你好")),
        ([""], (None, "")),
    ],
)
def test_words_are_a_bundle_and_a_sentence(words: list[str], found: tuple[str | None, str | None]) -> None:
    assert bundle_and_text(words, is_folder) == found


@pytest.mark.parametrize("words", [["smolm2"], ["smolm2", "What is the capital of France?"], ["smolm2", "hello"]])
def test_a_name_that_is_no_bundle_is_refused_with_the_nearest(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgeOmniError, match=r"smolm2 is no bundle, .* did you mean smollm2\?"):
        bundle_and_text(words, is_folder)


def test_a_lone_word_is_sent_to_no_model(edgeomni: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "smolm2 is no bundle, and a single word is no sentence" in one_message(edgeomni("chat", "smolm2"))


def test_unquoted_words_are_one_sentence_to_the_bundle(edgeomni: Run) -> None:
    options = ("--greedy", "--max-new", 4, "--json")
    quoted = json.loads(edgeomni("chat", omni(), "why is it so?", *options).out)
    unquoted = json.loads(edgeomni("chat", omni(), "why", "is", "it", "so?", *options).out)
    assert quoted["text"] == unquoted["text"]
    assert quoted["timings"]["prompt_positions"] == unquoted["timings"]["prompt_positions"]


# Lines


@pytest.mark.parametrize("word", ["exit", "quit", " exit ", "/quit", "/exit"])
def test_leaving_has_several_names_at_a_terminal(word: str) -> None:
    assert command_of(word, strict=True)[0] in ("/quit", "/exit")
    assert command_of("exit the motorway here?", strict=True)[0] is None
    assert command_of("exit", strict=False) == (None, "exit")


@pytest.mark.parametrize("name", ["a.png", "a b.PNG", "it's.png", "é (1).jpg", "a&b;$c.webp"])
def test_a_dropped_file_is_found_however_it_is_spelled_and_the_text_behind_it_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    backslashed = "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in str(path))
    spelled = [backslashed, path.as_uri(), *([f"'{path}'"] if "'" not in name else [])]
    for spelling in spelled:
        assert dropped(spelling) == ([("/image", path)], "")
        assert dropped(f"{spelling} what is this?") == ([("/image", path)], "what is this?")
        assert dropped(f"{spelling} {spelling} ") == ([("/image", path)] * 2, "")
    assert dropped(str(path)) == ([("/image", path)], "")


def test_only_media_files_that_exist_are_taken_for_dropped(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a.wav").touch()
    for line in (f"{tmp_path}/b.png", f"{tmp_path}/notes.txt", "/usr/bin holds what?", "it's 'a.png", "", "\\"):
        assert dropped(line) == ([], line)
    assert dropped(f"what is {tmp_path}/a.wav") == ([], f"what is {tmp_path}/a.wav")
    assert dropped(f"{tmp_path}/a.wav")[0] == [("/audio", tmp_path / "a.wav")]


def test_a_dropped_picture_is_attached_and_said_with_its_size(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my g.png"
    Pictures.new("RGB", (64, 48), "red").save(path)
    chat = terminal.Chat(engine, GREEDY, person=True)
    assert chat.turn(f"'{path}'", strict=True)
    assert "my g.png 64×48, goes with your next turn" in capsys.readouterr().err
    assert (len(chat.attached), len(chat.exchanges)) == (1, 0)
    chat.turn(f"/audio {INPUTS / 'w0.wav'}")
    assert " s, goes with your next turn" in capsys.readouterr().err
    chat.turn("what?", strict=True)
    assert chat.attached == [] and chat.exchanges[0].user == (
        Given("image", str(path)),
        Given("audio", str(INPUTS / "w0.wav")),
        Given("text", "what?"),
    )


def test_the_system_prompt_may_be_set_within_a_conversation(engine: Engine) -> None:
    chat, other = terminal.Chat(engine, GREEDY), terminal.Chat(engine, GREEDY, system="be brief")
    chat.turn("Hello")
    chat.turn("/system be brief")
    for each in (chat, other):
        each.turn("Hello")
    assert chat.conversation.context.ids == other.conversation.context.ids
    chat.turn('/system ""')
    assert chat.system == ""
    chat.turn("/system")
    assert chat.system is None


def test_an_answer_may_be_tried_again_and_its_turn_stands_once(engine: Engine) -> None:
    chat = terminal.Chat(engine, Choices(max_new=12), seed=1)
    with pytest.raises(EdgeOmniError, match="there is no answer to take back"):
        chat.turn("/retry")
    chat.turn("Hello")
    first, ids = chat.exchanges[-1], list(chat.conversation.context.ids)
    chat.turn("And now?")
    chat.turn("/retry")
    assert chat.exchanges[0] == first and len(chat.exchanges) == 2
    assert chat.exchanges[1].user == (Given("text", "And now?"),)
    context = chat.conversation.context
    assert context.ids[: len(ids)] == ids
    assert engine.tokenizer.decode(context.ids, skip_special=False).count("And now?") == 1
    chat.choices = GREEDY
    chat.turn("/retry")
    other = terminal.Chat(engine, Choices(max_new=12), seed=1)
    other.turn("Hello")
    other.choices = GREEDY
    other.turn("And now?")
    assert other.exchanges == chat.exchanges


def test_a_conversation_goes_on_from_its_file(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = engine.tokenizer.encode("it is seven", special=False).tolist()
    saying(engine, monkeypatch, cycle([*words, next(iter(engine.manifest.tokens.eos))]))
    first, second = (terminal.Chat(engine, GREEDY, system="be brief") for _ in range(2))
    first.turn(f"/image {INPUTS / 'i0.png'}")
    first.turn("What is it?")
    first.turn("Hm.")
    first.turn(f"/save '{tmp_path}/my chat.json'")
    second.turn("something else")
    second.turn(f"/load {tmp_path}/my chat.json")
    assert (second.system, second.exchanges) == (first.system, first.exchanges)
    for each in (first, second):
        each.turn("And why?")
    said = [engine.tokenizer.decode(each.conversation.context.ids, skip_special=False) for each in (first, second)]
    assert said[0] == said[1]
    assert len(second.conversation.starts) == 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "is no conversation that /save wrote"),
        (b"\xff", "is no conversation that /save wrote"),
        (b"[]", "is no conversation that /save wrote"),
        (b'{"edgeomni_chat": 2}', "its version is 2, expected 1"),
        (b'{"edgeomni_chat": 1, "system": null}', "'turns' is missing"),
        (b'{"edgeomni_chat": 1, "system": 3, "turns": []}', "3 stands where a text is expected"),
        (b'{"edgeomni_chat": 1, "system": null, "turns": [{"user": [{"kind": "x"}]}]}', "a part is of kind 'x'"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_conversation_is_one_message_and_the_present_one_stays(
    engine: Engine, tmp_path: Path, content: bytes | None, found: str
) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_bytes(content)
    chat = terminal.Chat(engine, GREEDY)
    before = chat.conversation
    with pytest.raises(EdgeOmniError, match=found):
        chat.turn(f"/load {path}")
    assert chat.conversation is before


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = Saved("be brief", (Exchange((Given("text", "é?\n"), Given("video", "/a.mp4")), ""), Exchange((), "so")))
    chat_file.save(tmp_path / "a.json", saved)
    assert chat_file.load(tmp_path / "a.json") == saved


# Tab and history


def test_tab_completes_commands_settings_and_paths_with_blanks(tmp_path: Path) -> None:
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "cat 1.png").touch()
    (tmp_path / ".hidden").touch()
    assert line_input.candidates("/im") == ["/image "]
    assert line_input.candidates("/set top") == ["/set top-p ", "/set top-k "]
    assert line_input.candidates(f"/image {tmp_path}/") == [f"/image {tmp_path}/my pictures/"]
    assert line_input.candidates(f"/image {tmp_path}/my p") == [f"/image {tmp_path}/my pictures/"]
    assert line_input.candidates(f"{tmp_path}/my pictures/c") == [f"{tmp_path}/my pictures/cat 1.png"]
    assert line_input.candidates(f"/save {tmp_path}/.") == [f"/save {tmp_path}/.hidden"]
    assert line_input.candidates("hello wor") == line_input.candidates("/image /no/such/place") == []


def test_at_a_terminal_lines_are_completed_and_remembered_for_this_user_alone(tmp_path: Path) -> None:
    for number in range(2):
        person = Terminal("chat", omni(), "--max-new", 2, cache=tmp_path)
        person.expect("> ")
        person.type("/set temper\t0.5" if number == 0 else "\x1b[A\x1b[A")
        person.expect("temperature 0.5 · ")
        person.expect("> ")
        person.type("exit")
        assert person.leave() == 0
    history = tmp_path / "edgeomni" / line_input.HISTORY
    assert "/set temperature 0.5\nexit\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.parametrize("home", ["", "/proc/none"])
def test_without_a_place_for_a_history_there_is_none(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", home)
    with line_input.editing():
        pass
    assert not home or not cache_folder().exists()


# Places that are full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_an_answer_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        started = process(
            *("chat", omni(), "Hi", "--max-new", 2, "--no-cache"),
            stdout=full,
            stderr=-1,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )
        _, err = started.communicate(timeout=300)
    messages = [line for line in err.decode().splitlines() if "random" not in line]
    assert started.returncode == 2 and len(messages) == 1, err
    assert "what the output goes to cannot be used: No space left on device" in messages[0]


# Speech


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "MP3"])
def test_speech_is_encoded_as_its_name_ends(tmp_path: Path, ending: str) -> None:
    if f".{ending.lower()}" not in writable():
        pytest.skip(f"the libsndfile of this system writes no {ending}")
    path, rate = tmp_path / f"a.{ending}", 24_000
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    write_audio(path, wave, rate)
    assert soundfile.info(path).format == ending.upper()
    read, read_rate = soundfile.read(path)
    assert read_rate == rate and abs(len(read) - rate) < 3000
    loudest = np.abs(np.fft.rfft(read[:20_000])).argmax() * rate / 20_000
    assert abs(loudest - 440) < 2


@pytest.mark.parametrize("name", ["a.aac", "a", "a.wav.txt", ".wav"])
def test_speech_in_a_format_that_cannot_be_written_is_refused_before_anything_is_said(
    edgeomni: Run, tmp_path: Path, name: str
) -> None:
    for command in (
        ("chat", "/nowhere", "Hi", "--speak", tmp_path / name),
        ("chat", omni(), "--speak", tmp_path / name),
    ):
        message = one_message(edgeomni(*command, stdin="never said\n"))
        assert "cannot be written as" in message and "ends in .wav, .flac" in message
    done = edgeomni("chat", omni(), "--max-new", 2, stdin=f"/speak {tmp_path / name}\nnever said\n")
    assert (done.code, done.out) == (2, "") and "cannot be written as" in done.err


def test_an_answer_is_spoken_into_an_mp3_file(edgeomni: Run, tmp_path: Path) -> None:
    done = edgeomni("chat", omni(), "Hello", "--seed", 3, "--speak", tmp_path / "a.mp3")
    assert done.code == 0 and f"speech in {tmp_path / 'a.mp3'}" in done.err
    assert soundfile.info(tmp_path / "a.mp3").format == "MP3"
