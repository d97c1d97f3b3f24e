"""A conversation on the terminal: text as it is certain, speech into a file, commands that begin with a slash."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps import chat_file, chat_settings, line_input
from apps.chat_file import Exchange, Given, Kind, Saved
from apps.embedded import greeting
from apps.interrupt import Interrupt, interruptible
from apps.streams import dim, json_text
from apps.typed import command_of, dropped, paths_of, refuse_bytes
from runtime.audio import Wave
from runtime.audio_file import refuse_format, write_audio
from runtime.container import read_container
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, Event, Finish, Forgotten, Reading, ReplyDone, StepDone, TextDelta, Timings
from runtime.image import read_image
from runtime.prompt import Part, Text
from runtime.sound_header import conversion
from runtime.speech import SpeechDecoder

HELP = """\
/audio PATH, /image PATH, /video PATH   show it with the next turn (an empty line then sends it alone);
                                        so does a file that is dropped here
/speak PATH.wav, /speak off             answer in speech, or in text again
/set NAME VALUE                         draw words otherwise: temperature, top-p, top-k, repeat-penalty, min-p
/retry                                  take the last answer back and answer once more
/system TEXT                            begin a new conversation with this system prompt
/reset                                  begin a new conversation
/save PATH, /load PATH                  keep the conversation in a file, or go on with one
/quit                                   leave (so do exit, quit and Ctrl-D)
Ctrl-C interrupts an answer; what was said until then stays in the conversation. While your turn is still read, Ctrl-C
takes it back."""

# What a model writes may not move the cursor or change the colours of the terminal that shows it.
UNPRINTABLE = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


ENDINGS: dict[Finish | None, str] = {
    "length": "cut at its longest",
    "context": "the context is full",
    "repeats": "it went round in a loop and was ended; a repeat-penalty of 1.1 or another temperature may help",
    "unaddressed": "not answered: the model found that nobody spoke to it",
}


@dataclass
class Answer:
    """What a reply has come to so far; `finish` is None for one that was interrupted."""

    text: str = ""
    finish: Finish | None = None
    timings: Timings = field(default_factory=Timings)
    chunks: list[Wave] = field(default_factory=list)
    segments: list[NDArray[np.int64]] = field(default_factory=list)  # codes [frames, codebooks] of each
    sampling_rate: int = 0

    def take(self, event: Event) -> str:
        """Count one event in; returns the text to show for it."""
        match event:
            case TextDelta(text):
                self.text += text
                return text
            case AudioChunk(samples, rate):
                self.chunks.append(samples)
                self.sampling_rate = rate
            case StepDone("audio", codes=codes) if len(codes) > 1:  # the end code's frame alone is silence
                self.segments.append(codes)
            case ReplyDone(text, finish, timings):
                self.text, self.finish, self.timings = text, finish, timings
        return ""

    def write_speech(self, path: Path | None) -> Path | None:
        """Write the samples to `path`, in the format of its ending; returns it, None if there is nothing to write."""
        if path is None or not self.chunks:
            return None
        write_audio(path, np.concatenate(self.chunks), self.sampling_rate)
        return path

    def record(self, speech: Path | None, low_latency_error: float | None) -> dict[str, object]:
        """For machines: seconds, counts, and null where something did not happen."""
        rates = {
            "tokens_per_second": self.timings.tokens_per_second,
            "real_time_factor": self.timings.real_time_factor,
        }
        return {
            "text": self.text,
            "finish": self.finish or "interrupted",
            "speech": str(speech) if speech else None,
            "low_latency_error": low_latency_error,
            "timings": asdict(self.timings) | rates,
        }


def one_answer(
    events: Iterator[Event],
    speak: Path | None,
    as_json: bool,
    stop: Callable[[], bool] = lambda: False,
    decoder: SpeechDecoder | None = None,
) -> Answer:
    """Show one reply as it comes, write its speech, and say how long it took.

    `stop` is asked after each event; with `decoder`, what low latency cost is measured when the reply is over.
    """
    answer, progress = Answer(), Progress()
    try:
        for event in events:
            text = answer.take(event)
            if not as_json:
                progress.show(event)
            if isinstance(event, Forgotten):
                print(dim(f"{event}; /reset begins anew", sys.stderr), file=sys.stderr)
            if text and not as_json:
                print(text.translate(UNPRINTABLE), end="", flush=True)
            if stop():
                break
    finally:
        speech = answer.write_speech(speak)
        if answer.text and not as_json:
            print(flush=True)
    errors = [decoder.prefix_error(codes) for codes in answer.segments] if decoder else []
    worst = max((error.mel for error in errors), default=None)
    if as_json:
        print(json_text(answer.record(speech, worst)), flush=True)
    else:
        figures = "interrupted" if answer.finish is None else timing_line(answer, speech)
        print(dim(figures, sys.stderr), file=sys.stderr)
        if worst is not None:
            print(f"low latency: the log-mel of the worst segment is off by {worst:.1%} (rms)", file=sys.stderr)
    return answer


def timing_line(answer: Answer, speech: Path | None) -> str:
    """The figures of a reply in one line; what did not happen is left out."""
    timings = answer.timings
    figures = [
        ("prompt {:.0f} positions", timings.prompt_positions),
        ("first token {:.2f} s", timings.first_token),
        ("first audio {:.2f} s", timings.first_audio),
        ("{:.1f} tokens/s", timings.tokens_per_second),
        ("RTF {:.2f}", timings.real_time_factor),
        ("{:.2f} s in all", timings.total),
    ]
    shown = [template.format(value) for template, value in figures if value is not None]
    shown += [f"speech in {speech}"] if speech else []
    shown += [ENDINGS[answer.finish]] if answer.finish in ENDINGS else []
    return " · ".join(shown)


class Progress:
    """How far a long prompt has been read, in a line that the answer takes the place of; nothing but on a terminal."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, event: Event) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            return
        line = f"reading {event.done:,} of {event.total:,}" if isinstance(event, Reading) else ""
        if line or self._width:
            print(
                f"\r{' ' * self._width}\r{dim(line, sys.stderr) if line else ''}", end="", file=sys.stderr, flush=True
            )
        self._width = len(line)


@dataclass
class Chat:
    """One person at one terminal (or one pipe) with one open bundle."""

    engine: Engine
    choices: Choices
    system: str | None = None
    seed: int | None = None
    speak: Path | None = None
    as_json: bool = False
    attached: list[Part] = field(default_factory=list)
    shown: list[Given] = field(default_factory=list)  # the files that these were made of
    answers: int = 0
    person: bool = False  # at a terminal, who is told what was taken in
    exchanges: list[Exchange] = field(default_factory=list)
    asked: list[Part] = field(default_factory=list)  # in the last turn

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.begin(self.system)

    def begin(self, system: str | None) -> None:
        """Begin a new conversation with a system prompt; PromptError, and the old one stays, where it cannot be."""
        self.conversation = Conversation.open(self.engine, system, self.seed)
        self.system, self.exchanges, self.asked = system, [], []

    def attach(self, audios: Sequence[Path], images: Sequence[Path], videos: Sequence[Path]) -> None:
        """Encode media for the next turn; MediaError for files that cannot be used."""
        given: tuple[tuple[Kind, Sequence[Path]], ...] = (("audio", audios), ("image", images), ("video", videos))
        for kind, paths in given:
            for path in paths:
                part, size = self._encoded(kind, path)
                self.attached.append(part)
                self.shown.append(Given(kind, str(path.absolute())))
                self.tell(f"{path.name} {size}, goes with your next turn")
        if self.engine.manifest.audio is not None:
            self._name_unheard(videos)

    def _encoded(self, kind: Kind, path: Path) -> tuple[Part, str]:
        """A file as a part of a turn, and how large it is."""
        match kind:
            case "audio":
                audio, front = self.engine.hear(path), self.engine.manifest.audio
                assert front is not None  # it was heard
                step = front.hop_length * front.stride * front.avg_pooler
                return audio, f"{len(audio.codes) * step / front.sampling_rate:.1f} s"
            case "image":
                picture = read_image(path, official=self.engine.compat == "official")
                return self.engine.look_at(picture), f"{picture.shape[1]}×{picture.shape[0]}"
            case "video":
                video = self.engine.watch(path)
                return video, f"{len(video.frames)} frame{'s' * (len(video.frames) > 1)}"
            case "text":
                raise AssertionError("a text is no file")

    def tell(self, line: str) -> None:
        """Say to a person, rather than into a pipe, what a command did."""
        if self.person:
            print(dim(line, sys.stderr), file=sys.stderr)

    def _name_unheard(self, videos: Sequence[Path]) -> None:
        """Say of clips with sound that the model only sees them."""
        for path in videos:
            if read_container(path).sound:
                print(f"edgeomni: the sound of {path} is not heard; for that, {conversion(path)}", file=sys.stderr)

    def answer(self, text: str | None, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer one turn: what is attached, then the text. What was attached stays so if the turn is refused."""
        parts, given = list(self.attached), list(self.shown)
        if text is not None:
            parts.append(Text(text))
            given.append(Given("text", text))
        self._reply(parts, given, stop)
        self.attached, self.shown = [], []

    def retry(self, stop: Callable[[], bool]) -> None:
        """Take the last answer back and answer the same turn once more."""
        self.conversation.take_back()
        self._reply(self.asked, list(self.exchanges.pop().user), stop)

    def _reply(self, parts: list[Part], given: list[Given], stop: Callable[[], bool]) -> None:
        choices = replace(self.choices, spoken=self.speak is not None)
        if choices.spoken:
            self.engine.open_all()  # before the clock of this answer starts
        events = self.conversation.reply(parts, choices)
        if isinstance(stop, Interrupt):
            events = stop.watching(events)
        approximate = choices.spoken and choices.mode == "prefix"
        decoder = self.engine.speech(np.random.default_rng(0), "exact", zero_noise=True) if approximate else None
        answer = one_answer(events, self._speech_file(), self.as_json, stop, decoder)
        self.asked = parts
        self.exchanges.append(Exchange(tuple(given), answer.text))
        self.answers += 1

    def load(self, path: Path) -> None:
        """Go on with the conversation in a file; the present one stays where that cannot be."""
        saved = chat_file.load(path)
        loaded = Conversation.open(self.engine, saved.system, self.seed)
        for turn in saved.turns:
            loaded.remember([self._part(given) for given in turn.user], turn.answer)
        self.conversation, self.system = loaded, saved.system
        self.exchanges, self.asked, self.attached, self.shown = list(saved.turns), [], [], []
        count = len(saved.turns)
        self.tell(f"{count} turn{'s' * (count != 1)} of {path}, which are read with your next one")

    def _part(self, given: Given) -> Part:
        return Text(given.value) if given.kind == "text" else self._encoded(given.kind, Path(given.value))[0]

    def _speech_file(self) -> Path | None:
        """The file for this answer: the one that was named, then NAME-2.wav and so on."""
        if self.speak is None or self.answers == 0:
            return self.speak
        return self.speak.with_name(f"{self.speak.stem}-{self.answers + 1}{self.speak.suffix}")

    def run(self) -> None:
        """Until /quit or the end of the input. From a pipe each line is a turn and a mistake ends the program."""
        if sys.stdin is None:  # closed by whoever started us
            return
        if sys.stdin.isatty():
            self._converse()
        else:
            for number, line in enumerate(sys.stdin):
                if not self.turn(line.rstrip("\r\n").removeprefix("" if number else "\ufeff")):
                    return

    def _converse(self) -> None:
        self.person = True
        with line_input.editing():
            self._lines()

    def _lines(self) -> None:
        print(greeting(self.engine.folder, self.engine.manifest.family))
        while True:
            try:
                line = input("> ")
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit to leave)")
                continue
            with interruptible(self.engine) as stop:
                try:
                    if not self.turn(line, stop, strict=True):
                        return None
                except EdgeOmniError as error:
                    print("\ncancelled; nothing was added" if stop() else f"edgeomni: {error}", file=sys.stderr)

    def turn(self, line: str, stop: Callable[[], bool] = lambda: False, *, strict: bool = False) -> bool:
        """One line of input: a command or something to answer. False if it ends the conversation.

        `strict`: a word that looks like a command and is none is a mistake, rather than something to answer.
        """
        command, argument = command_of(line, strict=strict)
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                print(HELP, file=sys.stderr)
            case "/reset":
                self.attached, self.shown = [], []
                self.reset()
            case "/retry":
                self.retry(stop)
            case "/system":
                self.begin("" if argument == '""' else argument or None)
                self.tell("a new conversation, with " + ("this system prompt" if argument else "the bundle's own"))
            case "/save":
                path = self._one_path(argument)
                chat_file.save(path, Saved(self.system, tuple(self.exchanges)))
                self.tell(f"{len(self.exchanges)} turns are in {path}")
            case "/load":
                self.load(self._one_path(argument))
            case "/audio":
                self.attach(paths_of(argument), [], [])
            case "/image":
                self.attach([], paths_of(argument), [])
            case "/video":
                self.attach([], [], paths_of(argument))
            case "/speak":
                self.speak, self.answers = self._asked_speech(argument), 0
            case "/set":
                self._set(argument)
            case _:
                self._say(line, stop, strict)
        return True

    def _say(self, line: str, stop: Callable[[], bool], strict: bool) -> None:
        """Answer a line; at a terminal the files that were dropped there are attached, and wait for a text."""
        files, text = dropped(line) if strict else ([], line)
        for command, path in files:
            self.attach(*([path] if command == one else [] for one in ("/audio", "/image", "/video")))
        if text.strip() or (self.attached and not files):
            refuse_bytes(text)
            self.answer((text if text.strip() else None), stop)

    def _one_path(self, argument: str) -> Path:
        return paths_of(argument)[0]

    def _set(self, argument: str) -> None:
        if argument:
            self.choices = chat_settings.changed(self.choices, argument)
        print(chat_settings.described(self.choices, self.engine.manifest.generation.text.sampling), file=sys.stderr)

    def _asked_speech(self, argument: str) -> Path | None:
        if not argument:
            raise EdgeOmniError("/speak needs the name of a file, or off")
        if argument == "off":
            return None
        path = paths_of(argument)[0]
        refuse_format(path)
        return path
