"""Real people speaking, from what Debian and Python packages carry: clips of 16 kHz, by speaker."""

import subprocess
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np

from runtime.audio import Wave, load_mono
from runtime.live.settings import RATE

SHARE = Path("/usr/share")
# What each speaker's clips are called, below /usr/share. On Debian: apt-get install ffmpeg alsa-utils ktuberling-data
# pocketsphinx-testdata asterisk-core-sounds-{en,es,fr,it,ru}-g722.
SPEAKERS = {
    "Allison, English": "asterisk/sounds/en_US_f_Allison/*.g722",
    "Allison, Spanish": "asterisk/sounds/es_MX_f_Allison/*.g722",
    "June, French": "asterisk/sounds/fr_CA_f_June/*.g722",
    "Carlo, Italian": "asterisk/sounds/it_IT_m_Carlo/*.g722",
    "IvrvoiceRU, Russian": "asterisk/sounds/ru_RU_f_IvrvoiceRU/*.g722",
    "LibriVox, English": "pocketsphinx/test/data/librivox/*.wav",
    "alsa-utils, English": "sounds/alsa/*_*.wav",
    **{f"ktuberling, {name}": f"ktuberling/sounds/{name}/*.*" for name in ("ca", "da", "de", "en", "lt", "ru", "uk")},
}
SHORTEST, LONGEST = 0.4, 20.0  # seconds of a clip
BACKGROUND_DB = -30.0  # below its loud hops, at least: where a room hums louder, energy does not tell speech from pause


def recordings(seconds: float, rng: Random) -> dict[str, list[Wave]]:
    """About so many seconds of each speaker that is installed, clips drawn at random, at one level."""
    found = {speaker: sorted(SHARE.glob(pattern)) for speaker, pattern in SPEAKERS.items()}
    spec = find_spec("moonshine_onnx")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found["Beckett, English"] = [Path(place) / "assets" / "beckett.wav"]
    drawn = {speaker: draw(paths, seconds, rng) for speaker, paths in found.items() if paths}
    return {speaker: clips for speaker, clips in drawn.items() if clips}


def draw(paths: list[Path], seconds: float, rng: Random) -> list[Wave]:
    clips: list[Wave] = []
    for path in rng.sample(paths, len(paths)):
        if sum(map(len, clips)) >= seconds * RATE:
            break
        wave = decoded(path)
        if SHORTEST * RATE <= len(wave) <= LONGEST * RATE and clean(wave):
            clips.append(levelled(wave))
    return clips


def clean(wave: Wave) -> bool:
    quiet, loud = np.percentile(hop_levels(wave), (5, 90))
    return quiet < loud + BACKGROUND_DB


def decoded(path: Path) -> Wave:
    if path.suffix != ".g722":
        return load_mono(path, RATE)
    command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)


def hop_levels(wave: Wave, hop: int = 512) -> np.ndarray:
    """dB of full scale of each whole hop."""
    hops = wave[: len(wave) // hop * hop].reshape(-1, hop)
    return 10 * np.log10(np.square(hops, dtype=np.float64).mean(axis=1) + 1e-12)


def levelled(wave: Wave, level: float = -26.0) -> Wave:
    """Scaled so that its louder hops (the 90th percentile) lie at `level` dBFS."""
    return (wave * 10 ** ((level - np.percentile(hop_levels(wave), 90)) / 20)).astype(np.float32)
