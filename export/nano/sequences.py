"""Training sequences in the official prompt format: token ids, audio codes, pictures, and what to predict where.

The strings are those that the runtime builds: `<C_Q>{user}<C_A>{answer}<|endoftext|>` for a text answer, the same with
`<audiotext_start>` before `<C_A>` and `{text}<audiogen_start>{frames}<audiogen_end>` for a spoken one, an instruction
and the audio alone for a transcription, `{text}<audiogen_start>{frames}` for reading aloud; a system prompt in front
or none.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from export.nano import vocabulary

_NONE = -100


@dataclass
class Sequence:
    """One sequence in the making; a label sits on the position that predicts it."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # next token to learn, or -100
    codes: list[Tensor] = field(default_factory=list)  # [levels] of each audio pad
    heard: list[bool] = field(default_factory=list)  # of each audio pad: was it input (true) or generated
    frames: dict[int, Tensor] = field(default_factory=dict)  # position -> codes [levels] of the frame to predict
    pictures: list[Tensor] = field(default_factory=list)  # patches [n, values] of each picture, in order
    cells: tuple[int, int] | None = None  # rows and columns of tokens of its pictures, all alike

    def add(self, ids: list[int], learn: bool = False) -> None:
        """Append tokens; `learn`: each is a label of the position before it."""
        for token in ids:
            if learn:
                self.labels[-1] = token
            self.ids.append(token)
            self.labels.append(_NONE)


@dataclass(frozen=True)
class Batch:
    """Sequences packed into rows of one length: ids, labels, positions [rows, T] (positions count from 1 in each
    sequence), which sequence of its row a token belongs to [rows, T]; codes of all audio pads [n, levels]; frames to
    predict; pictures."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    sequence: Tensor
    codes: Tensor
    heard: Tensor  # [n] bool
    frame_at: Tensor  # [m, 2]: row, column
    frames: Tensor  # [m, levels]
    pictures: Tensor  # [pictures, patches, values], all of one size
    cells: tuple[int, int]  # rows and columns of tokens of each picture

    def bias(self) -> Tensor:
        """Added to attention scores, [rows, 1, T, T]: 0 where a token looks at itself and at what is before it in its
        own sequence, else very low."""
        own = self.sequence[:, :, None] == self.sequence[:, None]
        visible = own & torch.ones(own.shape[1:], dtype=torch.bool).tril()
        return torch.zeros(own.shape).masked_fill(~visible, -1e4)[:, None]


class Writer:
    """Writes the parts of a prompt with the checkpoint's own tokenizer."""

    def __init__(self, folder: Path, end_frame: tuple[int, ...]) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._end_frame = torch.tensor(end_frame)

    def token(self, name: str) -> int:
        """Id of an added token."""
        found = self._tokenizer.token_to_id(name)
        assert found is not None, name
        return found

    def decode(self, ids: list[int]) -> str:
        """The text of ordinary tokens."""
        return self._tokenizer.decode(ids)

    def text(self, sequence: Sequence, text: str, learn: bool = False) -> None:
        """Plain text and added tokens by name."""
        sequence.add(self._tokenizer.encode(text).ids, learn)

    def hear(self, sequence: Sequence, codes: Tensor) -> None:
        """The user's audio."""
        sequence.add([self.token("<audio_start_baichuan>")])
        sequence.add([self.token("<audio_pad_baichuan>")] * len(codes))
        sequence.codes += list(codes)
        sequence.heard += [True] * len(codes)
        sequence.add([self.token("<audio_end_baichuan>")])

    def see(self, sequence: Sequence, patches: Tensor, cells: tuple[int, int]) -> None:
        """A picture of `cells` rows and columns of tokens."""
        sequence.add([self.token("<img_start_baichuan>")])
        sequence.add([self.token("<img_pad_baichuan>")] * (cells[0] * cells[1]))
        sequence.pictures.append(patches)
        sequence.cells = cells
        sequence.add([self.token("<img_end_baichuan>")])

    def say(self, sequence: Sequence, codes: Tensor, learn: bool = True) -> None:
        """The assistant's audio after audiogen_start, frames and end frame to be learnt; closes with audiogen_end."""
        for frame in [*codes, self._end_frame]:
            if learn:
                sequence.frames[len(sequence.ids) - 1] = frame
            if frame is not self._end_frame:
                sequence.add([self.token("<audio_pad_baichuan>")])
                sequence.codes.append(frame)
                sequence.heard.append(False)
        sequence.add([self.token("<audiogen_end_baichuan>")])

    def system(self, sequence: Sequence, which: int | None) -> None:
        """One of the official system prompts, or none."""
        if which is not None:
            self.text(sequence, "<B_SYS>" + vocabulary.SYSTEM_PROMPTS[which])

    def answer(
        self, sequence: Sequence, text: str, spoken: Tensor | None = None, last: bool = True, learn: bool = True
    ) -> None:
        """The assistant's turn: text and its speech if given, to be predicted if `learn`. So is the token that ends the
        reply, which stands there only after the last turn."""
        self.text(sequence, ("<audiotext_start_baichuan>" if spoken is not None else "") + "<C_A>")
        self.text(sequence, text, learn)
        if spoken is not None:
            self.text(sequence, "<audiogen_start_baichuan>", learn)
            self.say(sequence, spoken, learn)
        if last:
            self.text(sequence, vocabulary.EOS, learn)
        elif learn:
            sequence.labels[-1] = self.token(vocabulary.EOS)

    def refuse(self, sequence: Sequence, spoken: bool) -> None:
        """The assistant's turn where nobody asked anything: the noise marker and the end, whether in speech or text."""
        self.text(sequence, ("<audiotext_start_baichuan>" if spoken else "") + "<C_A>")
        self.text(sequence, vocabulary.NOISE_MARKER + vocabulary.EOS, learn=True)


def collate(sequences: list[Sequence], pad: int, levels: int) -> Batch:
    """One sequence a row, padded with `pad` (end of text) on the right."""
    return pack([[sequence] for sequence in sequences], max(len(s.ids) for s in sequences), pad, levels)


def pack(rows: list[list[Sequence]], length: int, pad: int, levels: int) -> Batch:
    """Several sequences a row, one after the other, padded on the right to `length`; their pictures are of one size."""
    ids = torch.full((len(rows), length), pad)
    labels = torch.full_like(ids, _NONE)
    positions, owner = torch.ones_like(ids), torch.full_like(ids, -1)
    places, frames, codes, heard, pictures = [], [], [], [], []
    for i, row in enumerate(rows):
        start = 0
        for k, sequence in enumerate(row):
            span = slice(start, start + len(sequence.ids))
            ids[i, span] = torch.tensor(sequence.ids)
            labels[i, span] = torch.tensor(sequence.labels)
            positions[i, span] = torch.arange(1, len(sequence.ids) + 1)
            owner[i, span] = k
            places += [(i, start + position) for position in sequence.frames]
            frames += list(sequence.frames.values())
            codes += sequence.codes
            heard += sequence.heard
            pictures += sequence.pictures
            start = span.stop
    empty = torch.zeros(0, levels, dtype=torch.long)
    return Batch(
        ids,
        labels,
        positions,
        owner,
        torch.stack(codes) if codes else empty,
        torch.tensor(heard, dtype=torch.bool),
        torch.tensor(places, dtype=torch.long).view(-1, 2),
        torch.stack(frames) if frames else empty,
        torch.stack(pictures) if pictures else torch.zeros(0, 0, 0),
        next((s.cells for row in rows for s in row if s.cells is not None), (0, 0)),
    )
