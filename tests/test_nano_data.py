"""The small checkpoint's data: what is held out stays out, and the same seed gives the same recordings and pictures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from export.nano import corpus, domain, outside, pictures, vocabulary
from export.nano.corpus import Clip
from export.nano.pitch import frame_f0
from export.nano.split import read_split

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def test_no_voice_noise_or_variant_is_on_both_sides_of_the_split():
    split = read_split()
    assert not set(split.train_voices) & set(split.heldout_voices)
    assert not set(split.train_noises) & set(split.heldout_noises)
    held = {name.rsplit("+", 1)[1] for name in split.heldout_voices if "+" in name}
    assert not held & {name.rsplit("+", 1)[1] for name in split.train_voices if "+" in name}


def test_about_a_tenth_of_the_sentences_with_content_of_their_own_are_held_out():
    rng, split = Random(0), read_split()
    keys = {turn.key for turn in (domain.draw_turn(rng) for _ in range(8000)) if turn.key is not None}
    share = sum(split.sentence_is_heldout(key) for key in keys) / len(keys)
    assert 0.07 < share < 0.13


def test_a_held_out_sum_is_held_out_under_every_carrier_phrase():
    turns = [domain.draw_turn(Random(seed)) for seed in range(300)]
    keys = {turn.key for turn in turns if turn.intent in ("add", "sub", "mul", "half") and turn.key}
    assert len(keys) > 50 and not any(key.startswith(("what is", "calculate", "how much")) for key in keys)


@pytest.mark.parametrize("seed", range(40))
def test_arithmetic_answers_are_right(seed):
    values = {domain.number(n): n for n in range(100)}
    rng = Random(seed)
    turn = domain.draw_turn(rng)
    while turn.intent not in ("add", "sub", "mul"):
        turn = domain.draw_turn(rng)
    for answer in [turn.answer] + [t.answer for t in [domain.draw_follow_up(rng, turn)] if t is not None]:
        left, right = answer.split(" is ")
        sign = next(word for word in ("plus", "minus", "times") if f" {word} " in left)
        a, b = (values[words] for words in left.split(f" {sign} "))
        assert values[right] == {"plus": a + b, "minus": a - b, "times": a * b}[sign]


def test_a_follow_up_answers_from_the_turn_before():
    light = domain.Turn("turn on the hall light", "the hall light is on", "light", "x")
    answers = {t.question: t.answer for t in (domain.draw_follow_up(Random(i), light) for i in range(200)) if t}
    assert answers["and the garden"] == "the garden light is on"
    assert answers["make it red"] == "the hall light is red"
    assert answers["say that again"] == light.answer


def test_what_only_follows_is_not_understood_with_nothing_before_it():
    for seed in range(20):
        stray = domain.draw_stray(Random(seed))
        assert stray.answer == domain.NOTHING_BEFORE and stray.question != "say that again"


def test_nothing_of_the_world_is_drawn_as_lying_outside_of_it_and_no_hand_written_sentence_is_trained():
    rng, inside = Random(0), set(domain.CHAT) | set(domain.picture_questions())
    for _ in range(20000):
        turn = domain.draw_turn(rng)
        if turn.intent not in ("outside", "look"):
            inside.add(turn.question)
    drawn = {outside.draw(rng) for _ in range(20000)}
    written = Path(outside.__file__).with_suffix(".txt").read_text().splitlines()
    assert not drawn & inside
    assert len(written) == len(set(written)) > 100 and not set(written) & (drawn | inside)


def test_talk_among_people_is_neither_asked_nor_among_the_sentences_of_the_measured_scenes():
    from apps.bench.scene_sounds import OTHERS

    rng = Random(0)
    talk = {outside.draw_talk(rng) for _ in range(5000)}
    assert not talk & ({domain.draw_turn(rng).question for _ in range(20000)} | set(OTHERS))


def test_a_murmur_is_no_word_that_is_answered():
    rng = Random(0)
    asked = {domain.draw_turn(rng).question for _ in range(20000)}
    assert not asked & set(domain.BACKCHANNELS)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("What's 7 + 5?", "what is seven plus five"),
        ("WHAT IS TWENTY-ONE MINUS 4", "what is twenty one minus four"),
        ("what is 7x5=", "what is seven times five"),
        ("Wake me up at 6:30 am!", "wake me up at six thirty in the morning"),
        ("set an alarm for 7:00 p.m.", "set an alarm for seven in the evening"),
        ("Set a timer for 10 min.", "set a timer for ten minutes"),
        ("What’s the colour of the star?", "what is the color of the star"),
        ("12 - 5", "twelve minus five"),
        ("hey Nano,  how are you?  ", "hey nano how are you"),
        ("I don't know", "i do not know"),
        (" nine plus four is thirteen", " nine plus four is thirteen"),
        (vocabulary.TRANSCRIBE, vocabulary.TRANSCRIBE),
        (vocabulary.SYSTEM_PROMPTS[1], vocabulary.SYSTEM_PROMPTS[1]),
    ],
)
def test_what_people_type_is_read_as_the_world_says_it(typed, read):
    tokenizer = Tokenizer.from_file(str(vocabulary.FOLDER / "tokenizer.json"))
    assert tokenizer.encode(typed).ids == tokenizer.encode(read).ids
    assert tokenizer.decode(tokenizer.encode(typed).ids) == read


def test_a_shard_reads_back_what_was_written(tmp_path):
    waves = [np.linspace(-0.5, 0.5, 100), np.full(50, 0.25)]
    clips = [
        Clip("a", "b", "add", "k", "espeak/x", 0, 16000, 0, 0, [(3, "a")]),
        Clip("", "", "noise", None, "n", 0, 8, 0, 0),
    ]
    corpus.write_shard(tmp_path / "s" / "000", list(zip(clips, waves, strict=True)))
    read = corpus.recordings(tmp_path / "s")
    assert [r.clip.samples for r in read] == [100, 50]
    for recording, wave in zip(read, waves, strict=True):
        assert np.abs(recording.wave() - wave).max() < 1e-4


def test_a_shard_without_its_manifest_does_not_exist(tmp_path):
    corpus.write_shard(tmp_path / "000", [(Clip("", "", "noise", None, "n", 0, 8, 0, 0), np.zeros(4))])
    (tmp_path / "000.jsonl").unlink()
    assert corpus.recordings(tmp_path) == []


@needs_espeak
def test_training_recordings_hold_no_held_out_sentence_and_no_held_out_voice(tmp_path):
    pytest.importorskip("scipy")
    from export.nano import synthesis

    split = read_split()
    for name in ("questions_espeak", "other_talk"):
        clips = [c for c, _ in synthesis.make_shard(synthesis.PLANS[name], name, 0, tmp_path, size=60)]
        assert not [c for c in clips if c.key is not None and split.sentence_is_heldout(c.key)]
        assert not [c for c in clips if split.voice_is_heldout(c.voice)]


@needs_espeak
def test_held_out_recordings_are_unseen_sentences_or_unseen_pairs_of_turns_in_unseen_voices(tmp_path):
    pytest.importorskip("scipy")
    from export.nano import synthesis

    split = read_split()
    clips = [c for c, _ in synthesis.make_shard(synthesis.PLANS["test_espeak"], "test_espeak", 0, tmp_path, size=80)]
    assert all(split.voice_is_heldout(c.voice) for c in clips)
    following = [*clips[1:], None]
    alone = [c for c, then in zip(clips, following, strict=True) if c.turn == 0 and (then is None or then.turn == 0)]
    assert all(c.key is None or split.sentence_is_heldout(c.key) for c in alone[:-1])
    assert sum(c.key is not None for c in alone) > 30
    pairs = [c for c in clips if c.turn == 1]
    assert len(pairs) > 5 and all(c.key and split.sentence_is_heldout(c.key) for c in pairs)


@needs_espeak
def test_the_same_shard_is_made_twice_alike_with_its_alignment(tmp_path):
    pytest.importorskip("scipy")
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        code = "from export.nano import corpus, synthesis; from pathlib import Path; "
        code += "plan = synthesis.PLANS['questions_espeak']; "
        code += "clips = synthesis.make_shard(plan, 'questions_espeak', 3, Path('x'), size=4); "
        code += f"corpus.write_shard(Path({str(folder)!r}) / '000', clips)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=120)
        made.append(corpus.recordings(folder))
    for one, two in zip(*made, strict=True):
        assert one.clip == two.clip and np.array_equal(one.wave(), two.wave())
        assert len(one.clip.alignment) >= len(one.clip.text.replace(" ", "")) / 3
        assert one.clip.alignment[-1][0] <= one.clip.samples


def test_noises_are_deterministic_and_of_the_kinds_asked_for():
    pytest.importorskip("scipy")
    from export.nano import noises

    split = read_split()
    for kind in split.train_noises + split.heldout_noises:
        drawn = [noises.draw_noise(Random(3), [kind], lambda: np.ones(8000, np.float32), 1.0) for _ in range(2)]
        assert drawn[0][0] == kind and np.array_equal(drawn[0][1], drawn[1][1])
        assert np.isfinite(drawn[0][1]).all() and np.abs(drawn[0][1]).max() <= 0.71


def test_pictures_are_deterministic_and_every_question_about_them_is_the_domains():
    pytest.importorskip("sklearn")
    known = set(domain.picture_questions())
    for seed in range(30):
        one, two = (pictures.draw_picture(Random(seed)) for _ in range(2))
        assert np.array_equal(one.pixels, two.pixels)
        assert {question for question, _ in pictures.questions(one)} <= known


def test_a_picture_has_whole_cells_and_its_shapes_stand_out_from_the_ground():
    pytest.importorskip("sklearn")
    for seed in range(60):
        rng = Random(seed)
        cells = pictures.draw_grid(rng)
        picture = pictures.draw_picture(rng, cells=cells)
        assert picture.pixels.shape == (28 * cells[0], 28 * cells[1], 3)
        assert all(part.shape == cells for part in picture.cells())
        corner = np.median(picture.pixels[:6, :6], axis=(0, 1))
        for shape in picture.shapes:
            here = picture.pixels[int(shape.y), int(shape.x)].astype(float)
            assert np.abs(here - corner).sum() > 40, seed


def test_picture_answers_say_what_was_drawn():
    shapes = (pictures.Shape("circle", "red", 20, 56, 18), pictures.Shape("star", "blue", 80, 60, 10))
    answers = dict(pictures.questions(pictures.Picture(np.zeros((112, 112, 3), np.uint8), shapes)))
    assert answers["how many shapes are there"] == "there are two shapes"
    assert answers["how many crosses are there"] == "there are no crosses"
    assert answers["what color is the circle"] == "the circle is red"
    assert answers["which shape is blue"] == "the star is blue"
    assert answers["where is the circle"] == "the circle is on the left"
    assert answers["which shape is the biggest"] == "the circle is the biggest"
    kind, color, _ = pictures.Picture(np.zeros((112, 112, 3), np.uint8), shapes).cells()
    assert pictures.KINDS[kind[2, 0]] == "circle" and color[2, 2] == 1 + domain.COLORS.index("blue")


def test_a_shape_is_where_the_camera_sees_it():
    """The pixels of the shape's colour lie around the centre that the picture names, tilted or not."""
    for seed in range(40):
        picture = pictures.draw_shapes(Random(seed), 1)
        shape = picture.shapes[0]
        ground = np.median(picture.pixels[[20, 20, 92, 92], [20, 92, 20, 92]], axis=0)
        apart = np.abs(picture.pixels - ground).sum(2)
        apart[(picture.pixels < 12).all(2)] = 0  # what the tilted picture does not reach is black
        own = np.argwhere(apart > 0.6 * apart[int(shape.y), int(shape.x)])
        inside = own[np.hypot(*(own - (shape.y, shape.x)).T) < 1.15 * shape.radius]
        assert np.hypot(*(inside.mean(0) - (shape.y, shape.x))) < 3, seed


@pytest.mark.parametrize(
    ("x", "y", "side"),
    [
        (56, 60, "in the middle"),
        (20, 56, "on the left"),
        (95, 40, "on the right"),
        (60, 15, "on the top"),
        (40, 95, "on the bottom"),
        (20, 20, None),
        (90, 25, None),
        (41, 56, None),
    ],
)
def test_where_a_shape_is_is_asked_only_if_one_place_is_clearly_right(x, y, side):
    picture = pictures.Picture(np.zeros((112, 112, 3)), (pictures.Shape("star", "red", x, y, 10),))
    answer = dict(pictures.questions(picture)).get("where is the star")
    assert answer == (side and f"the star is {side}")


def test_several_questions_about_a_picture_are_different_and_of_every_form_alike():
    picture = pictures.draw_shapes(Random(1), 4)
    pairs = pictures.questions(picture)
    drawn = [pictures.draw_questions(Random(seed), pairs, 5) for seed in range(300)]
    assert all(len({question for question, _ in asked}) == 5 and set(asked) <= set(pairs) for asked in drawn)
    # Seven of the questions count one colour, only one counts with "do you see": both come first equally often.
    first = [asked[0][0] for asked in drawn]
    colors = sum(question.split()[2] in domain.COLORS and "how many" in question for question in first)
    assert 0.6 < colors / first.count("how many shapes do you see") < 1.7
    assert sorted(pictures.draw_questions(Random(0), pairs, 99)) == sorted(pairs)


def test_articles_fit_the_word_after_them():
    answers = [
        dict(pictures.questions(pictures.Picture(np.zeros((1, 1, 3)), digit=d)))["what digit is this"] for d in (1, 8)
    ]
    assert answers == ["it is a one", "it is an eight"]


def test_patches_are_in_the_order_the_vision_encoder_takes_them():
    safetensors = pytest.importorskip("safetensors.numpy")
    golden = safetensors.load_file(Path(__file__).parent / "golden" / "a" / "g03_vision.safetensors")
    config = json.loads((Path(__file__).parent / "golden" / "a" / "checkpoint" / "config.json").read_text())
    vision = config["visual_config"]
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3)).astype(np.uint8)
    pixels[:56, :84] = golden["f0.resized_rgb"]
    got = pictures.patches(pixels, vision["image_mean"], vision["image_std"])
    want = golden["f0.patches"].reshape(2, 3, 4, -1)
    assert np.abs(got.reshape(4, 4, 4, -1)[:2, :3] - want).max() < 1e-5


def test_every_word_of_the_world_is_one_token_of_the_committed_tokenizer():
    tokenizer = Tokenizer.from_file(str(vocabulary.FOLDER / "tokenizer.json"))
    assert not [w for w in domain.spoken_words() if len(tokenizer.encode(" " + w).ids) != 1]
    config = json.loads((vocabulary.FOLDER / "config.json").read_text())
    for name, token in {"audio_pad": "<audio_pad_baichuan>", "audiogen_end": "<audiogen_end_baichuan>"}.items():
        assert config["audio_config"][f"{name}_token_id"] == tokenizer.token_to_id(token)
    assert config["visual_config"]["image_pad_token_id"] == tokenizer.token_to_id("<img_pad_baichuan>")
    assert config["video_config"]["video_place_token_id"] == tokenizer.token_to_id("<video_palce_baichuan>")
    assert tokenizer.get_vocab_size() <= config["vocab_size"]


def test_the_committed_tokenizer_is_the_one_that_the_script_makes(tmp_path):
    (tmp_path / "config.json").write_text((vocabulary.FOLDER / "config.json").read_text())
    vocabulary.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (vocabulary.FOLDER / path.name).read_text(), path.name


def test_the_pitch_tracker_follows_a_gliding_voice_and_hears_no_pitch_in_noise():
    rate, n = 24000, 24000
    f = np.linspace(100, 160, n)
    phase = 2 * np.pi * np.cumsum(f) / rate
    voice = sum(np.sin(h * phase) / h for h in range(1, 8))
    track = frame_f0(np.asarray(voice), rate, 480)
    assert np.abs(track[2:-4] - f[240::480][2:-4]).max() < 4
    noise = np.random.default_rng(0).standard_normal(n)
    assert (frame_f0(noise, rate, 480) > 0).mean() < 0.05


def test_two_voiced_frames_in_a_row_are_chance_and_three_are_a_voice():
    from export.nano.pitch import _without_short_stretches

    track = np.array([99.0, 98, 0, 90, 91, 92, 0, 0, 120])
    assert _without_short_stretches(track).tolist() == [0, 0, 0, 90, 91, 92, 0, 0, 0]


def test_the_judge_reads_digits_as_the_words_that_were_said():
    pytest.importorskip("num2words")
    pytest.importorskip("scipy")
    from export.nano.judge import distance, words

    assert words("87-12 is 75.") == "eighty seven minus twelve is seventy five".split()
    assert words("Okay, 1930 = 4 x 5") == words("okay nineteen thirty equals four times five")
    assert distance("turn on the light".split(), "turn the light off".split()) == 2


def test_another_voice_speaks_behind_a_recording_at_the_level_asked_for():
    pytest.importorskip("scipy")
    from export.nano import augment

    draws = np.random.default_rng(0)
    wave, other = (draws.standard_normal(16000).astype(np.float32) for _ in range(2))
    mixed = augment.talk_over(wave, other, Random(1), 10.0)
    added = (mixed - wave)[np.flatnonzero(mixed - wave)]
    assert 10 * np.log10((wave**2).mean() / (added**2).mean()) == pytest.approx(10, abs=0.3)


def test_a_disturbed_recording_keeps_its_alignment_and_meets_every_level():
    pytest.importorskip("scipy")
    from export.nano import augment

    wave, peaks = np.zeros(16000, np.float32), []
    wave[8000:9000] = 0.7 * np.sin(np.arange(1000))
    for seed in range(60):
        got, ((start, phone),) = augment.disturb(wave, Random(seed), [(8000, "a")])
        energy = np.convolve(got.astype(np.float64) ** 2, np.ones(800), "valid")
        assert phone == "a" and abs(int(energy.argmax()) - start) < 1200
        peaks.append(float(np.abs(got).max()))
    assert min(peaks) < 0.1 and max(peaks) > 0.8
