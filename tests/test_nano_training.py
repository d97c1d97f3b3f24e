"""Each training stage takes a step on a few made-up recordings, and what it feeds the model is what was meant."""

from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import soundfile  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from export.nano import (  # noqa: E402  # noqa: E402
    codes,
    corpus,
    decoder_stage,
    language_stage,
    sequences,
    tokenizer_stage,
    vad,
    vad_stage,
    vocabulary,
    vocoder_stage,
)
from export.nano.codes import CodedSet  # noqa: E402
from export.nano.composer import CONFIG, MIX, SPEECH_MIX, Composer, Library  # noqa: E402
from export.nano.config import read_config  # noqa: E402
from export.nano.corpus import Clip, Recording  # noqa: E402
from export.nano.features import heard_mel, spoken_mel  # noqa: E402
from export.nano.split import read_split  # noqa: E402

pytestmark = pytest.mark.oracle
GOLDEN = Path(__file__).parent / "golden" / "a"


def tone(rng: Random, samples: int, rate: int) -> np.ndarray:
    """A gliding harmonic sound with pauses, standing in for speech."""
    t = np.arange(samples) / rate
    pitch = 2 * np.pi * np.cumsum(rng.uniform(90, 180) + 20 * np.sin(6 * t)) / rate
    voice = sum(np.sin(h * pitch) / h for h in range(1, 9)) * (np.sin(9 * t) > -0.5)
    return 0.2 * np.asarray(voice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Questions, noises and answers as synthesis leaves them."""
    root, rng = tmp_path_factory.mktemp("data"), Random(0)
    kinds = {"questions_espeak": ("add", 16000), "noises": ("noise", 16000), "answers": ("read", 24000)}
    for name, (intent, rate) in kinds.items():
        clips = []
        for i in range(40):
            wave = tone(rng, int(rate * rng.uniform(0.6, 0.9)), rate)
            alignment = [] if intent == "noise" else [(j * len(wave) // 8, "aɪstəlɛm"[j]) for j in range(8)]
            turn = 1 if name == "questions_espeak" and i % 2 else 0
            answer = "one plus one is two" if intent == "add" else ""
            text = "" if intent == "noise" else f"it is a {('two', 'six')[i % 2]}"
            clips.append((Clip(text, answer, intent, None, "espeak/x", turn, rate, 0, 0, alignment), wave))
        corpus.write_shard(root / name / "000", clips)
    return root


@cache
def trainer() -> tokenizer_stage.TokenizerTrainer:
    torch.manual_seed(0)
    return tokenizer_stage.TokenizerTrainer()


def coded(recordings: list[Recording], variants: int) -> CodedSet:
    """Random codes of the right length and range."""
    sizes = read_config(CONFIG).codebook_sizes
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.stack([torch.randint(size, (6 + i % 2,), generator=generator) for size in sizes], 1)
        for i in range(len(recordings) * variants)
    ]
    return CodedSet(torch.cat(parts), torch.tensor([0, *(len(p) for p in parts)]).cumsum(0), variants)


def test_the_training_log_mel_is_the_official_front_ends():
    for name in ("w0", "w2"):
        want = torch.from_numpy(load_file(next(GOLDEN.glob("g01_*")))[f"{name}.seg0.logmel"])
        wave, rate = soundfile.read(GOLDEN / "inputs" / f"{name}.wav", dtype="float32")
        assert rate == 16000
        padded = torch.nn.functional.pad(torch.from_numpy(wave), (0, 800))[None]
        got = heard_mel(padded, want.shape[0])[0, :, : want.shape[1]]
        assert float((got - want).abs().max()) < 2e-4 * float(want.abs().max())


def test_labels_name_the_phone_under_the_centre_of_each_frame():
    labels = tokenizer_stage.frame_labels([(0, "a"), (640, "s")], 1000, 6)
    a, s = (tokenizer_stage.phones.INDEX[p] for p in "as")
    assert labels.tolist() == [a, a, s, s, -100, -100]


def test_a_tokenizer_step_moves_the_encoder_and_the_codebooks(folder):
    stage, bridge = trainer().train(), trainer().tokenizer.audio_bridge_model
    data = tokenizer_stage.Data.read(folder)
    vectors = torch.randn(600, bridge.down_proj.out_features)
    tokenizer_stage.start_codebooks(bridge, vectors, rounds=1)
    before = bridge.codebooks[0].embed.clone()
    loss, parts = tokenizer_stage.train_step(stage, data, Random(1), quantizing=True)
    loss.backward()
    gradient = stage.tokenizer.audio_model.conv1.weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    assert not torch.equal(before, bridge.codebooks[0].embed)
    assert all(torch.isfinite(part) for part in parts.values())


def test_recordings_coded_in_one_batch_have_the_codes_they_have_alone(folder):
    tokenizer = trainer().tokenizer.eval()
    waves = [r.wave() for r in corpus.recordings(folder / "questions_espeak")[:5]]
    together = codes.encode_waves(tokenizer, waves, 80)
    for wave, got in zip(waves, together, strict=True):
        alone = heard_mel(torch.nn.functional.pad(torch.from_numpy(wave), (0, 16000))[None], 80)[0]
        want = tokenizer.encode(alone[:, : len(wave) // 160 + 1])
        assert got.shape == want.shape
        # A distance that rounds differently in another batch may flip a code; most must stay.
        assert float((got == want).float().mean()) > 0.97


def test_decoder_and_flow_learn_from_a_batch(folder, tmp_path):
    from export.nano import training

    training.save_state(tmp_path / "tokenizer.pt", model=trainer().state_dict())
    recordings = corpus.recordings(folder / "answers")
    some = coded(recordings, codes.SHIFTS)
    target = decoder_stage.TargetCodes([(r, some, i) for i, r in enumerate(recordings)], 80)
    stage = decoder_stage.DecoderTrainer(tmp_path)
    batch = target.draw(Random(2), 6)
    assert batch[1].shape[2] == 4 * batch[0].shape[1] - 1
    first = [float(stage.prenet_step(*batch)["mel"]) for _ in range(6)]
    assert first[-1] < first[0]
    torch.manual_seed(0)
    second = [float(stage.flow_step(*batch, Random(i), 20)["flow"]) for i in range(12)]
    assert np.mean(second[-4:]) < np.mean(second[:4])
    stage.step = 7
    stage.save()
    again = decoder_stage.DecoderTrainer(tmp_path)
    assert again.step == 7
    assert torch.equal(again.network.final_proj.weight, stage.network.final_proj.weight)


def test_the_vocoder_learns_from_a_batch_and_goes_on_from_sampled_mels(folder, tmp_path, monkeypatch):
    from export.nano import training

    torch.manual_seed(0)
    stage = vocoder_stage.VocoderTrainer(tmp_path)
    voice = vocoder_stage.TargetVoice(corpus.recordings(folder / "answers")[:8], tmp_path / "f0.npz", stage.bins)
    piece = voice.draw(Random(0), 2, 10)
    assert piece.wave.shape[1] == 480 * piece.mel.shape[2] and float((piece.f0 > 0).float().mean()) > 0.3
    losses = [float(stage.train_step(piece)["spectrum"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    stage.save()
    # Steps five and six of six are in the second half, which meets what the decoder stage has left.
    training.save_state(tmp_path / vocoder_stage.PREDICTED, mels=[torch.zeros(80, 30, dtype=torch.bfloat16)])
    met: list[int] = []
    drawn = vocoder_stage.TargetVoice.draw_predicted
    monkeypatch.setattr(vocoder_stage, "_SAMPLED", 1.0)
    monkeypatch.setattr(vocoder_stage.TargetVoice, "draw_predicted", lambda *given: met.append(1) or drawn(*given))
    vocoder_stage.train(folder, tmp_path, 6)
    assert vocoder_stage.VocoderTrainer(tmp_path).step == 6 and len(met) == 2


def test_two_stretches_of_noise_are_alike_in_bands_and_not_in_bins():
    draws = np.random.default_rng(0)
    one, two = (torch.from_numpy(0.1 * draws.standard_normal((1, 24000))).float() for _ in range(2))
    bins, bands = vocoder_stage.spectral_loss(one, two)
    assert float(bands) < 0.3 * float(bins)
    assert [float(loss) for loss in vocoder_stage.spectral_loss(one, one)] == [0, 0]
    assert float(vocoder_stage.spectral_loss(3 * one, two)[1]) > 1  # ln 3 louder in every band


def library(folder: Path) -> Library:
    found = Library()
    for name, variants in (("questions_espeak", 3), ("noises", 3), ("answers", 4)):
        recordings = corpus.recordings(folder / name)
        found.add(recordings, coded(recordings, variants))
    return found


def test_every_kind_of_sequence_trains_the_language_model(folder):
    pytest.importorskip("sklearn")
    stage = language_stage.LanguageTrainer(None).train()
    composer = Composer(library(folder), stage.config)
    mix = dict.fromkeys([*MIX, *SPEECH_MIX], 2.0)
    batch, drawn = composer.batch(Random(4), mix)
    parts = stage.losses(batch, drawn)
    assert set(parts) == {"text", "speech", "picture"}
    torch.stack(list(parts.values())).sum().backward()
    omni = stage.omni
    for part in (omni.model.visual_model.patch_embed.proj, omni.audio_head.heads[7], omni.lm_head):
        gradient = part.get_parameter("weight").grad
        assert gradient is not None and float(gradient.abs().max()) > 0


def test_sequences_that_share_a_row_are_predicted_as_they_are_alone(folder):
    torch.manual_seed(6)
    stage = language_stage.LanguageTrainer(None).eval()
    composer = Composer(library(folder), stage.config)
    drawn = [composer.draw(Random(seed), kind)[0] for seed, kind in enumerate(("ask", "reply", "typed", "look"))]
    with torch.no_grad():
        together = stage.hidden(sequences.pack([drawn[:2], drawn[2:]], 256, 0, 8))[0]
        for i, sequence in enumerate(drawn):
            alone = stage.hidden(sequences.collate([sequence], 0, 8))[0][0]
            start = len(drawn[i - 1].ids) if i % 2 else 0
            assert torch.allclose(together[i // 2, start : start + len(alone)], alone, atol=1e-4)


def test_the_eyes_learn_from_a_batch_of_drawings_and_are_taken_over(tmp_path):
    pytest.importorskip("sklearn")
    from export.nano import pictures, training, vision_stage

    torch.manual_seed(0)
    stage = vision_stage.VisionTrainer(read_config(CONFIG)).train()
    optimizer = training.adamw(stage.parameters(), 1e-3)
    drawn = [pictures.draw_picture(Random(seed)) for seed in range(12)]
    losses = []
    for _ in range(8):
        loss = stage.labels.loss(stage(drawn), drawn)
        training.clipped_step(loss, optimizer, stage.parameters())
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    language = language_stage.LanguageTrainer(None)
    with pytest.raises(FileNotFoundError, match="vision_stage"):
        language.open_eyes(tmp_path)
    training.save_state(tmp_path / "vision.pt", model=stage.state_dict(), step=8)
    language.open_eyes(tmp_path)
    assert torch.equal(
        language.omni.model.visual_model.patch_embed.proj.weight, stage.visual_model.patch_embed.proj.weight
    )


def test_muon_and_adamw_share_a_network_and_go_on_from_their_state():
    from export.nano import training

    def run(steps: int, start: dict | None = None):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.Tanh(), torch.nn.Conv1d(8, 2, 3))
        optimizer = training.MuonAdamW(network, r"0\.", 0.02, 0.1)
        if start is not None:
            network.load_state_dict(start["network"])
            optimizer.load_state_dict(start["optimizer"])
        training.set_rate(optimizer, 0.02)
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, pytest.approx(0.002)]
        x, losses = torch.randn(3, 4, 30), []
        for _ in range(steps):
            loss = (network(x) - x[:, :2, 2:-2]).square().mean()
            training.clipped_step(loss, optimizer, network.parameters())
            losses.append(float(loss.detach()))
        return network, optimizer, losses

    whole, _, losses = run(30)
    assert losses[-1] < 0.6 * losses[0]
    network, optimizer, first = run(20)
    _, _, second = run(10, {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    assert first + second == pytest.approx(losses)
    fresh = run(0)[0]
    assert not torch.equal(fresh[0].weight, whole[0].weight) and not torch.equal(fresh[2].weight, whole[2].weight)


def test_some_turns_of_a_conversation_are_typed(folder):
    composer = Composer(library(folder), read_config(CONFIG))
    start = composer.writer.token("<audio_start_baichuan>")
    heard = {composer.draw(Random(seed), "follow")[0].ids.count(start) for seed in range(200)}
    assert heard == {0, 1, 2}


def test_a_telephone_carries_nothing_above_four_kilohertz():
    from export.nano import augment

    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(augment.telephone_band(wave))) ** 2
    assert spectrum[4400:].sum() < 1e-3 * spectrum.sum() and spectrum[:3600].sum() > 0.9 * spectrum.sum()


def test_a_spoken_answer_is_laid_out_as_the_official_loop_generates_it():
    config = read_config(CONFIG)
    writer = sequences.Writer(CONFIG, config.codebook_sizes)
    sequence, spoken = sequences.Sequence(), torch.zeros(3, 8, dtype=torch.long)
    writer.text(sequence, "<C_Q>stop")
    writer.answer(sequence, " okay", spoken)
    names = {n: writer.token(n) for n in ("<audiogen_start_baichuan>", "<audiogen_end_baichuan>", vocabulary.EOS)}
    start, end = (sequence.ids.index(names[n]) for n in ("<audiogen_start_baichuan>", "<audiogen_end_baichuan>"))
    assert sequence.ids[-1] == names[vocabulary.EOS] and end - start == 4
    assert sorted(sequence.frames) == list(range(start, end))
    assert sequence.frames[end - 1][0] == config.codebook_sizes[0]
    assert sequence.labels[start - 1] == names["<audiogen_start_baichuan>"]
    assert sequence.labels[end] == names[vocabulary.EOS]
    assert all(label == -100 for label in sequence.labels[start:end])


def test_a_conversation_about_a_picture_shows_it_once_and_learns_every_answer(folder):
    pytest.importorskip("sklearn")
    composer = Composer(library(folder), read_config(CONFIG))
    turns, ends = composer.writer.token("<C_Q>"), composer.writer.token(vocabulary.EOS)
    drawn = [composer.draw(Random(seed), "look")[0] for seed in range(30)]
    assert all(len(sequence.pictures) == 1 for sequence in drawn)
    assert max(sequence.ids.count(turns) for sequence in drawn) > 3
    for sequence in drawn:
        assert sequence.labels.count(ends) == sequence.ids.count(turns)
        assert sequence.ids.count(ends) == 1 and sequence.ids[-1] == ends
        # Where the reply ends before another question, the token that ends it is due but not there.
        assert all(sequence.ids[i + 1] in (turns, ends) for i, label in enumerate(sequence.labels) if label == ends)


def test_a_picture_is_described_aloud_where_its_description_was_recorded(folder):
    pytest.importorskip("sklearn")
    config = read_config(CONFIG)
    composer = Composer(library(folder), config)
    drawn = [composer.draw(Random(seed), "look_aloud") for seed in range(40)]
    assert all(len(seen) == 1 and len(sequence.pictures) == 1 for sequence, seen in drawn)
    aloud = [seen[0] for sequence, seen in drawn if sequence.frames]
    # The made-up answers are "it is a two" and "it is a six".
    assert aloud and all(picture.digit in (2, 6) for picture in aloud)


def test_a_conversation_learns_the_answer_of_each_turn_whatever_the_subject_was_before(folder):
    pytest.importorskip("sklearn")
    composer = Composer(library(folder), read_config(CONFIG))
    turn, end = composer.writer.token("<C_Q>"), composer.writer.token(vocabulary.EOS)
    for kind in ("conversation", "conversation_aloud"):
        drawn = [composer.draw(Random(seed), kind) for seed in range(30)]
        for sequence, seen in drawn:
            assert 2 <= sequence.ids.count(turn) <= 8 and sequence.labels.count(end) == sequence.ids.count(turn)
            assert len(sequence.pictures) == len(seen) and len(sequence.ids) <= 512
        assert any(len(seen) > 1 for _, seen in drawn)


def test_pictures_of_several_sizes_are_predicted_as_each_is_alone(folder):
    pytest.importorskip("sklearn")
    torch.manual_seed(3)
    stage = language_stage.LanguageTrainer(None).eval()
    composer = Composer(library(folder), stage.config)
    sizes = ((4, 4), (3, 5), (4, 4), (5, 3))
    drawn = [composer.draw(Random(seed), "look", cells)[0] for seed, cells in enumerate(sizes)]
    together = language_stage.predict(stage, drawn, 0)
    assert together == [language_stage.predict(stage, [sequence], 0)[0] for sequence in drawn]


def test_the_noise_marker_is_the_first_token_of_the_answer_to_noise(folder):
    config = read_config(CONFIG)
    composer = Composer(library(folder), config)
    sequence, _ = composer.draw(Random(0), "noise")
    learnt = [label for label in sequence.labels if label >= 0]
    assert learnt == [composer.writer.token(vocabulary.NOISE_MARKER), composer.writer.token(vocabulary.EOS)]


def test_the_voice_detector_hop_by_hop_equals_the_whole(folder):
    detector = vad.load_vad()
    wave = torch.from_numpy(np.concatenate([r.wave() for r in corpus.recordings(folder / "questions_espeak")[:3]]))
    hops = wave[: len(wave) // vad.HOP * vad.HOP].view(-1, vad.HOP)
    state, streamed = vad.start_state(), []
    with torch.no_grad():
        for hop in hops:
            probability, state = detector(hop[None], state)
            streamed.append(float(probability))
        whole = torch.sigmoid(detector.logits(hops.reshape(1, -1)))[0]
    assert np.allclose(streamed, whole.numpy(), atol=1e-5)


def test_the_voice_detector_is_small_and_hears_nothing_in_silence():
    detector = vad.load_vad()
    assert sum(4 * t.numel() for t in detector.state_dict().values()) <= 200_000
    with torch.no_grad():
        assert float(torch.sigmoid(detector.logits(torch.zeros(1, 50 * vad.HOP))).max()) < 0.2


def test_scenes_label_the_hops_in_which_speech_is_audible(folder):
    sounds = vad_stage.Sounds(corpus.recordings(folder / "questions_espeak"), ("white", "clicks"))
    waves, labels = vad_stage.draw_batch(Random(0), sounds, 4)
    assert waves.shape[1] == labels.shape[1] * vad.HOP and float(waves.abs().max()) <= 1
    assert set(labels.unique().tolist()) <= {-1.0, 0.0, 1.0} and 0.05 < float((labels == 1).float().mean()) < 0.9


def test_the_spoken_mel_has_fifty_frames_a_second():
    assert spoken_mel(torch.zeros(1, 24000), 80).shape == (1, 80, 50)


def test_an_assembled_checkpoint_is_small_and_loads_back(tmp_path):
    from export.nano import assemble
    from export.nano.model import load_checkpoint

    model, vocoder, missing = assemble.trained_tensors(tmp_path / "nothing")
    assert missing == ["tokenizer", "decoder", "language", "vocoder"]
    assert assemble.write_checkpoint(model, vocoder, tmp_path / "checkpoint") < 40_000_000
    omni, hift = load_checkpoint(tmp_path / "checkpoint")
    name = "audio_head.heads.3.weight"
    assert torch.equal(omni.state_dict()[name], model[name].bfloat16().float())
    assert hift.conv_pre.weight_g.shape == (128, 1, 1)


def test_a_checkpoint_that_was_laid_out_for_more_training_assembles_to_the_same_bytes(tmp_path):
    from export.nano import assemble, resume

    torch.manual_seed(5)
    model, vocoder, _ = assemble.trained_tensors(tmp_path / "nothing")
    assemble.write_checkpoint(model, vocoder, tmp_path / "first")
    resume.lay_out(tmp_path / "first", tmp_path / "run")
    model, vocoder, missing = assemble.trained_tensors(tmp_path / "run")
    assemble.write_checkpoint(model, vocoder, tmp_path / "second")
    assert not missing
    for path in sorted((tmp_path / "first").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert decoder_stage.DecoderTrainer(tmp_path / "run").step == 0
    with pytest.raises(FileExistsError, match="holds tokenizer, vision, decoder"):
        resume.lay_out(tmp_path / "first", tmp_path / "run")


def test_an_untrained_checkpoint_can_be_examined_and_answers_nothing_right(folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from export.nano import assemble, evaluation

    unseen = next(f"{n} plus {n}" for n in range(999) if read_split().sentence_is_heldout(f"{n} plus {n}"))
    for name, intent in (("test_espeak", "add"), ("test_noises", "noise")):
        wave = tone(Random(1), 12000, 16000)
        rows = [Clip("a", "b", intent, unseen, "espeak/x", turn, 16000, 0, 0) for turn in (0, 1, 0)]
        corpus.write_shard(tmp_path / name / "000", [(row, wave) for row in rows])
    model, vocoder, _ = assemble.trained_tensors(tmp_path)
    assemble.write_checkpoint(model, vocoder, tmp_path / "checkpoint")
    monkeypatch.setattr(evaluation, "_MOST", 2)
    examiner = evaluation.Examiner(tmp_path, tmp_path / "checkpoint")
    figures = evaluation.hearing(examiner) | evaluation.reading(examiner) | evaluation.looking(examiner)
    assert figures["test_espeak answered"]["share"] == 0 and figures["test_noises marked"]["n"] == 2
    assert figures["test_espeak followed"]["n"] == 1 and figures["looking"]["n"] == 8
    assert figures["typed answered"]["share"] == figures["typed followed"]["share"] == 0
    assert figures["looking again"]["n"] == 2
    frames = examiner.utter(torch.zeros(256), examiner.write(sequence_of(examiner), ("<C_A>",))[2])
    wave = examiner.speak(torch.zeros(3, 8, dtype=torch.long))
    assert len(frames) <= 80 and wave.shape == (480 * 11,)


def sequence_of(examiner) -> sequences.Sequence:
    sequence = sequences.Sequence()
    examiner.writer.text(sequence, "<C_Q>hello<C_A>")
    return sequence


def test_a_share_has_wilsons_interval():
    from export.nano.evaluation import interval

    low, high = interval(85, 100)
    assert round(low, 3) == 0.767 and round(high, 3) == 0.907


def test_a_word_error_rate_is_of_all_words_and_its_interval_is_narrower_with_more_clips():
    from export.nano.evaluation import word_error_rate

    wrong, words = np.array([0, 3, 0, 1, 0, 0]), np.array([4, 6, 5, 5, 4, 6])
    few, many = (word_error_rate(np.tile(wrong, times), np.tile(words, times)) for times in (1, 50))
    assert few["wer"] == many["wer"] == 4 / 30 and (few["n"], many["n"]) == (6, 300)
    assert 0 == few["low"] < many["low"] < 4 / 30 < many["high"] < few["high"]
    assert word_error_rate(wrong - 1, words)["wer"] == -2 / 30
