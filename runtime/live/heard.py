"""What of a spoken reply was heard: from milliseconds of its sound to a position of the context, and to its text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.bundle import SpeechLayout

LETTERS_A_SECOND = 15  # of a segment whose sound is not complete, where none before it tells how fast the voice speaks


@dataclass
class Segment:
    """A run of audio frames and the text that it says."""

    first: int  # position in the context of its first frame
    text_end: int  # characters of the reply up to the end of its text
    frames: int = 0
    ended: bool = False


@dataclass
class ReplyLog:
    """A reply as it was generated. Without speech (`layout` None, or a written reply) there are no segments."""

    layout: SpeechLayout | None
    official: bool = False  # cross-fades are inserted between segments, instead of laid over them
    text: str = ""
    segments: list[Segment] = field(default_factory=list)

    def frame(self, position: int) -> None:
        """Count a frame that stands at `position`; the first one behind other text begins a segment."""
        if not self.segments or self.segments[-1].ended:
            self.segments.append(Segment(position, len(self.text)))
        self.segments[-1].frames += 1

    def end_segment(self) -> None:
        if self.segments:
            self.segments[-1].ended = True

    def position(self, heard_ms: float) -> int | None:
        """Position behind the last frame that was heard, even in part; None if no frame was."""
        at = self._at(heard_ms)
        return None if at is None else at[0].first + at[1]

    def heard_text(self, heard_ms: float) -> str:
        """The text up to what was heard: whole segments, and of the one in progress its share, to the end of a word."""
        at = self._at(heard_ms)
        if at is None:
            return ""
        segment, frames = at
        index = self.segments.index(segment)
        begin = self.segments[index - 1].text_end if index else 0
        share = frames / max(segment.frames, 0 if segment.ended else self._expected(begin, segment))
        if share >= 1 and segment.ended:
            return self.text[: segment.text_end]
        return self.text[: begin + _whole_words(self.text[begin : segment.text_end], share)]

    def _at(self, heard_ms: float) -> tuple[Segment, int] | None:
        """The segment that is being heard and how many of its frames were."""
        if self.layout is None:
            return None
        heard, code = heard_ms * self.layout.sampling_rate / 1000, self._samples(1)
        for start, segment in reversed(list(self._starts())):
            if start < heard:
                return segment, min(segment.frames, math.ceil((heard - start) / code - 1e-6))
        return None

    def _starts(self) -> Iterator[tuple[int, Segment]]:
        """Each segment and the sample of the joined wave with which it begins (`runtime.audio.join`)."""
        assert self.layout is not None
        overlap, end, before = self.layout.overlap_samples, 0, 0
        for segment in self.segments:
            short = self.layout.frames_short * self.layout.samples_per_frame if segment.ended else 0
            length = self._samples(segment.frames) - short
            if min(before, length) > overlap > 0:
                end += overlap if self.official else -overlap
            yield end, segment
            end, before = end + length, length

    def _samples(self, frames: int) -> int:
        assert self.layout is not None
        return frames * self.layout.frames_per_code * self.layout.samples_per_frame

    def _expected(self, begin: int, segment: Segment) -> float:
        """Frames that the text of an unfinished segment will take, by the pace of those before it."""
        said, frames = begin, sum(other.frames for other in self.segments if other is not segment)
        assert self.layout is not None
        rate = said / frames if said and frames else LETTERS_A_SECOND * self._samples(1) / self.layout.sampling_rate
        return (segment.text_end - begin) / rate


def _whole_words(text: str, share: float) -> int:
    """Characters of a text up to the last word border within its first `share`; a script without spaces has all."""
    end = min(len(text), round(share * len(text)))
    if end == len(text) or " " not in text.strip():
        return end
    return len(text[: end + 1].rstrip(" ")) if text[end] == " " else text.rfind(" ", 0, end) + 1
