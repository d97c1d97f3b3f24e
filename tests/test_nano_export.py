"""The small checkpoint goes the way of the large one: exported without a special case, it computes what torch does."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")
from export.nano import assemble, pictures, vocabulary  # noqa: E402
from export.nano.model import Omni, load_checkpoint  # noqa: E402
from export.nano.sequences import Sequence, Writer, collate  # noqa: E402
from quant.turn import read_turns  # noqa: E402
from runtime.conversation import Choices, Conversation  # noqa: E402
from runtime.engine import Engine  # noqa: E402
from runtime.events import StepDone  # noqa: E402
from runtime.prompt import Audio, Prompt, Text, prompt_format  # noqa: E402
from tests.tiny import export  # noqa: E402

pytestmark = pytest.mark.oracle
LEVELS = 8
CHECKPOINT = vocabulary.FOLDER
SAMPLES = CHECKPOINT.parent / "samples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The shipped layout with weights as they are before training."""
    folder = tmp_path_factory.mktemp("nano")
    torch.manual_seed(1)
    model, vocoder, _ = assemble.trained_tensors(folder)
    for name, tensor in model.items():
        if name.endswith("codebook.embed"):
            torch.nn.init.normal_(tensor)  # as far apart as trained ones
    assemble.write_checkpoint(model, vocoder, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def omni(checkpoint: Path) -> Omni:
    return load_checkpoint(checkpoint)[0]


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory) -> Engine:
    bundle = tmp_path_factory.mktemp("nano-bundle") / "bundle"
    export(checkpoint, bundle, random=True)
    return Engine(bundle)


@pytest.fixture(scope="module")
def writer(omni: Omni) -> Writer:
    return Writer(vocabulary.FOLDER, omni.config.codebook_sizes)


@pytest.fixture(scope="module")
def heard(omni: Omni):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(n, (9,), generator=generator) for n in omni.config.codebook_sizes], 1)


def trained_sequences(writer: Writer, heard) -> Iterator[tuple[str, Sequence]]:
    """Prompts as the training stages write them, up to where the answer begins."""
    for name, opening in (("written", ""), ("spoken", "<audiotext_start_baichuan>")):
        sequence = Sequence()
        writer.system(sequence, 0)
        writer.text(sequence, "<C_Q>")
        writer.hear(sequence, heard)
        writer.text(sequence, "and the garden" + opening + "<C_A>")
        yield name, sequence
    sequence = Sequence()
    writer.text(sequence, vocabulary.TRANSCRIBE)
    writer.hear(sequence, heard)
    yield "transcribe", sequence
    sequence = Sequence()
    writer.text(sequence, "the hall light is on<audiogen_start_baichuan>")
    yield "speak", sequence


def runtime_prompt(engine: Engine, name: str, heard) -> list[Prompt]:
    """The same prompts as the runtime builds them."""
    spelled, audio = prompt_format(engine.manifest, engine.tokenizer), Audio(heard.numpy())
    if name == "transcribe":
        return [spelled.transcribe(audio)]
    if name == "speak":
        return [spelled.speak("the hall light is on")]
    turn = spelled.user_turn([audio, Text("and the garden")], spoken=name == "spoken")
    return [spelled.open_conversation(), turn]


def test_training_prompts_are_the_prompts_that_the_runtime_builds(engine: Engine, writer: Writer, heard) -> None:
    for name, sequence in trained_sequences(writer, heard):
        ids = np.concatenate([piece.ids for piece in runtime_prompt(engine, name, heard)])
        assert ids.tolist() == sequence.ids, name


@torch.no_grad()
def test_the_exported_decoder_and_heads_choose_what_torch_chooses(engine: Engine, omni: Omni, writer, heard) -> None:
    for name, sequence in trained_sequences(writer, heard):
        context = engine.context()
        for piece in runtime_prompt(engine, name, heard):
            context.append(piece)
        got = context.hidden().copy()
        batch = collate([sequence], 0, LEVELS)
        codes = batch.codes if len(batch.codes) else None
        rows = omni.model.embed(batch.ids, codes)
        want = omni.model(rows, torch.arange(1, rows.shape[1] + 1))[0][0, -1]
        assert np.abs(got[0] - want.numpy()).max() < 2e-4 * float(want.abs().max())
        token = int(engine.session("lm_head").run(hidden=got)["logits"].argmax())
        assert token == int(omni.lm_head(want).argmax())
        voice = engine.voice(greedy=True)
        assert voice.frame(got, np.random.default_rng(0))[0].tolist() == omni.greedy_frame(want).tolist()


def test_the_exported_ears_give_torchs_codes(engine: Engine, omni: Omni) -> None:
    from export.nano.codes import encode_waves

    time = np.arange(24000) / 16000
    wave = (0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32)
    got, want = engine.hear(wave).codes, encode_waves(omni.audio_tokenizer, [wave], 80)[0].numpy()
    assert got.shape == want.shape
    # The resampled mels agree to rounding, which may flip a close choice and what follows it in the frame.
    assert (got[:, 0] == want[:, 0]).mean() > 0.95


@torch.no_grad()
def test_the_exported_eyes_give_torchs_rows(engine: Engine, omni: Omni, tmp_path) -> None:
    from random import Random

    from PIL import Image

    picture = pictures.draw_shapes(Random(0), 3)
    Image.fromarray(picture.pixels).save(tmp_path / "picture.png")
    vision = omni.config.vision
    patches = torch.from_numpy(pictures.patches(picture.pixels, vision.image_mean, vision.image_std)).float()
    want = omni.model.embed_images(patches, [(8, 8)]).numpy()
    got = engine.look(tmp_path / "picture.png").rows
    assert got.shape == want.shape and np.abs(got - want).max() < 2e-4 * np.abs(want).max()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Engine:
    bundle = tmp_path_factory.mktemp("shipped") / "bundle"
    export(CHECKPOINT, bundle)
    return Engine(bundle)


def test_the_shipped_weights_answer_held_out_recordings_in_the_words_and_codes_of_torch(shipped: Engine) -> None:
    from export.nano.examiner import Examiner

    examiner = Examiner(SAMPLES, CHECKPOINT)
    recordings = [turn.audio for turn in read_turns(SAMPLES / "turns.jsonl") if turn.audio]
    for path in recordings[::4]:
        heard = shipped.hear(path)
        sequence = Sequence()
        examiner.writer.text(sequence, "<C_Q>")
        examiner.writer.hear(sequence, torch.from_numpy(heard.codes))
        examiner.writer.text(sequence, "<audiotext_start_baichuan><C_A>")
        tokens, hidden, past = examiner.write(sequence, ("<audiogen_start_baichuan>", vocabulary.EOS))
        frames = examiner.utter(hidden, past).numpy()
        reply = Conversation.open(shipped, system="").reply([heard], Choices(spoken=True, greedy=True))
        steps = [event for event in reply if isinstance(event, StepDone)]
        text, audio = (next(s for s in steps if s.kind == kind) for kind in ("text", "audio"))
        assert len(tokens) > 1 and len(frames) > 5, path
        assert list(text.ids[len(text.inputs) :])[: len(tokens)] == tokens, path
        assert audio.codes[: len(frames), 0].tolist() == frames[:, 0].tolist(), path


def test_the_shipped_ears_hear_held_out_recordings_as_torch_does(shipped: Engine) -> None:
    import soundfile

    from export.nano.codes import encode_waves

    tokenizer = load_checkpoint(CHECKPOINT)[0].audio_tokenizer
    same = []
    for turn in read_turns(SAMPLES / "turns.jsonl"):
        if turn.audio:
            wave = soundfile.read(turn.audio, dtype="float32")[0]
            got, want = shipped.hear(turn.audio).codes, encode_waves(tokenizer, [wave], 80)[0].numpy()
            same += (got[:, 0] == want[:, 0]).tolist()
    # The mels agree to rounding, which flips a close choice now and then, mostly in silence.
    assert np.mean(same) > 0.97
