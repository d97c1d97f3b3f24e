"""An open bundle: its graphs, its tokenizer, and what it does with a file; conversations are held on top of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.audio import load_mono, segments
from runtime.bundle import AudioFrontEnd, Manifest, VisionFrontEnd, read_bundle
from runtime.context import Context
from runtime.errors import EdgeOmniError, PromptError
from runtime.image import Grid, Rgb, patches, read_image, rotary_positions
from runtime.prompt import Audio, Image, Video, prompt_format
from runtime.reply import Compat, Voice, Writer
from runtime.sampling import AS_BUNDLE, SamplingOptions
from runtime.session import Options, Session
from runtime.speech import Mode, SpeechDecoder
from runtime.tokenizer import Tokenizer
from runtime.video import read_video


class Engine:
    """Graphs are opened when they are first needed; opening the engine itself reads only the manifest."""

    def __init__(self, folder: Path, options: Options | None = None, compat: Compat = "right"):
        self.folder = folder
        self.compat: Compat = compat
        self.manifest: Manifest = read_bundle(folder)
        self.options = options or Options(provider=self.manifest.profile)
        self.tokenizer = Tokenizer(folder / self.manifest.tokenizer)
        self.format = prompt_format(self.manifest, self.tokenizer)
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        """The graph `name`, opened at its first use; EdgeOmniError if the bundle has none of that name."""
        if name not in self.manifest.graphs:
            raise EdgeOmniError(
                f"{self.folder} ({self.manifest.family}) has no graph {name!r}, so it cannot do this; "
                f"it has {', '.join(self.manifest.graphs)}"
            )
        if name not in self._sessions:
            self._sessions[name] = Session(self.folder, self.manifest.graphs[name], self.options)
        return self._sessions[name]

    def open_all(self) -> None:
        """Open every graph now, so that the first reply does not wait for it."""
        for name in self.manifest.graphs:
            self.session(name)

    def cancel(self) -> None:
        """Stop whatever runs, in whatever thread, at its next node; `rearm` allows runs again."""
        for session in self._sessions.values():
            session.cancel()

    def rearm(self) -> None:
        for session in self._sessions.values():
            session.rearm()

    def hear(self, source: str | Path | bytes | NDArray[np.float32]) -> Audio:
        """Encode an audio file, its content, or a waveform float32 [n] at the bundle's rate, into codes; MediaError if
        it cannot."""
        wave = source if isinstance(source, np.ndarray) else self.listen(source)
        return Audio(np.concatenate(list(self.codes_of(wave))))

    def listen(self, source: str | Path | bytes) -> NDArray[np.float32]:
        """An audio file, or its content, as a waveform [n] at the bundle's rate; MediaError if it cannot be used."""
        front = self._ears()
        longest = self.manifest.cache.max_positions * front.samples_a_code / front.sampling_rate
        return load_mono(source, front.sampling_rate, longest)

    def codes_of(self, wave: NDArray[np.float32]) -> Iterator[NDArray[np.int64]]:
        """As `hear` of a waveform, one segment after the other."""
        encoder = self.session("audio_encoder")
        return (encoder.run(mel=mel[None])["codes"] for mel, _ in segments(wave, self._ears()))

    def _ears(self) -> AudioFrontEnd:
        if self.manifest.audio is None:
            raise PromptError(f"{self.manifest.family} does not listen: {self.folder} has no audio encoder")
        return self.manifest.audio

    def look(self, source: str | Path | bytes) -> Image:
        """Encode a picture into rows; MediaError if it cannot be used."""
        return self.look_at(read_image(source, official=self.compat == "official"))

    def look_at(self, picture: Rgb) -> Image:
        """As `look`, of a picture uint8 [height, width, 3]."""
        if self.manifest.image is None:
            raise PromptError(f"{self.manifest.family} does not see: {self.folder} has no vision encoder")
        return Image(self._rows_of(*patches(picture, self.manifest.image), self.manifest.image.merge_size))

    def watch(self, source: str | Path) -> Video:
        """Encode a video file, one frame a second up to the bundle's limit; MediaError if it cannot be used."""
        manifest = self.manifest
        if manifest.video is None or manifest.video_frames is None:
            raise PromptError(f"{manifest.family} does not watch: {self.folder} has no rules for video")
        frames = read_video(source, manifest.video, manifest.video_frames, official=self.compat == "official")
        return Video(tuple(self._rows_of_frames(frames, manifest.video_frames)))

    def _rows_of_frames(self, frames: Sequence[Rgb], front: VisionFrontEnd) -> list[NDArray[np.float32]]:
        """Rows of each frame; one that stays on the screen for several seconds is encoded once."""
        rows: list[NDArray[np.float32]] = []
        for i, frame in enumerate(frames):
            again = i > 0 and frame is frames[i - 1]
            rows.append(rows[-1] if again else self._rows_of(*patches(frame, front), front.merge_size))
        return rows

    def _rows_of(self, patch_rows: NDArray[np.float32], grid: Grid, merge: int) -> NDArray[np.float32]:
        encoder, projector = self.session("vision_encoder"), self.session("vision_projector")
        features = encoder.run(patches=patch_rows, positions=rotary_positions(grid, merge))["features"]
        return projector.run(features=features)["rows"].astype(np.float32)

    def context(self) -> Context:
        embed_audio = self.session("embed_audio") if "embed_audio" in self.manifest.graphs else None
        return Context(self.manifest, self.session("decoder"), self.session("embed_tokens"), embed_audio)

    def writer(self, rng: np.random.Generator, greedy: bool, options: SamplingOptions = AS_BUNDLE) -> Writer:
        return Writer(self.manifest, self.tokenizer, self.session("lm_head"), rng, greedy, options)

    def voice(self, greedy: bool) -> Voice:
        """The audio head; EdgeOmniError where the bundle cannot speak."""
        audio, speech = self.manifest.generation.audio, self.manifest.speech
        if audio is None or speech is None:
            raise PromptError(f"{self.manifest.family} does not speak: {self.folder} has no audio head")
        first, *others = speech.codebook_sizes
        sampling = replace(audio.sampling, greedy=True) if greedy else audio.sampling
        return Voice(self.session("audio_head"), (first + 1, *others), sampling)

    def speech(
        self, rng: np.random.Generator, mode: Mode, zero_noise: bool, first_codes: int | None = None
    ) -> SpeechDecoder:
        """The stages from codes to a waveform; `first_codes`: of the piece that is waited for, in prefix mode."""
        official = self.compat == "official"
        return SpeechDecoder(self.session, self.manifest, rng, mode, zero_noise, official, first_codes)
