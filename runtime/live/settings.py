"""The parameters of a live conversation, in milliseconds of sound heard unless said otherwise."""

from dataclasses import dataclass

RATE = 16_000  # Hz of what is heard
HOP = 512  # samples that the detector takes at once
HOP_MS = 1000 * HOP / RATE


@dataclass(frozen=True)
class Settings:
    """When a turn begins and ends, how long a verdict may take, how the loudspeaker behaves meanwhile."""

    vad_on: float = 0.60  # probability of speech from which a hop is voiced
    vad_off: float = 0.45  # the same once somebody speaks
    vad_on_play: float = 0.75  # the same two while the assistant is audible, so that its echo counts less
    vad_off_play: float = 0.60
    t_start: float = 96  # voiced without a break until speech has begun
    t_start_play: float = 192
    preroll: float = 320  # heard before the first voiced hop that goes to the model
    t_soft: float = 256  # silence after which an answer is prepared, unheard
    t_res: float = 64  # voiced without a break until a pause is over
    t_end: float = 608  # silence that ends a turn
    pad: float = 200  # heard behind the last voiced hop that goes to the model
    min_voiced: float = 160  # less is a blip
    min_voiced_play: float = 256
    t_pause: float = 704  # voiced over an answer until the answer pauses
    seg_soft: float = 24_000  # from here on a quiet hop cuts what the model hears at once
    seg_max: float = 30_000
    utt_max: float = 120_000  # a turn ends here at the latest
    t_end_more: float = 160  # more silence that ends one, of a person whose turns were found incomplete twice
    gap_max: float = 300  # what is kept of the silence inside a turn that had seemed to be over
    t_gate: float = 1500  # a verdict has to come within this after the end of a turn
    t_incomplete: float = 1500  # how long a person who seems to think may think
    t_first_audio: float = 8000  # an accepted answer that is silent for so long is given as text
    voiced_query: float = 1000  # without a verdict, so much speech is taken for a question
    voiced_query_play: float = 1500
    short_speech: float = 800  # below, speech over an answer may be "mm-hm" or "stop"
    duck_db: float = -12
    duck_ms: float = 20
    resume_ms: float = 80
    rewind_ms: float = 100
    fade_ms: float = 20
    mouth_tail: float = 300  # the mouth counts as active for so long after it fell silent
    buffer_low: float = 300  # an answer with less sound in hand goes before all else
    buffer_high: float = 1500  # with more it waits: a person who interrupts wastes no more than that
    lead_max: float = 600  # an answer waits no longer than this to have enough sound in hand
    frame_period: float = 1000
    frame_stale: float = 1000
    frame_ring: int = 8
    frame_max: int = 8  # pictures of one turn
    speculations: int = 2  # answers that are prepared within one turn at most
    t_session: float = 600_000  # after so long without any event the conversation is closed
    context_reserve: int = 512  # positions that are kept free for the next turn and its answer
    echoes_a_minute: int = 3  # more, and the microphone is ignored while the assistant speaks
    underruns: int = 3  # within 10 s; more, and the same
    wary: float = 0.05  # added to the thresholds from which a hop is voiced, for wary_ms after an echo was judged
    wary_ms: float = 30_000
    half_duplex: bool = False
    spoken: bool = True  # answers are spoken, if the bundle can


DEFAULTS = Settings()
