"""Who speaks when, as a table: in a state, when something happens, these actions, then that state. Pure; nothing else
decides.

The rows are numbered as in the specification of the duplex loop, which follows what VITA (arXiv 2408.05211) showed:
no wake word, an answer that can be interrupted by speaking, and noise that does not interrupt it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.live.events import State, Verdict

HEARS: tuple[State, ...] = ("HEAR", "R_HEAR")
ANSWERS: tuple[State, ...] = ("THINK", "SPEAK")
OVER: tuple[State, ...] = ("R_HEAR", "R_GATE")
JUDGES: tuple[State, ...] = ("GATE", "R_GATE")
ALL: tuple[State, ...] = ("IDLE", "HEAR", "GATE", "THINK", "SPEAK", "R_HEAR", "R_GATE")
Next = State | Literal["same", "THINK or SPEAK"]
SAME: Next = "same"
BACK: Next = "THINK or SPEAK"  # whichever the answer had reached


@dataclass(frozen=True)
class Facts:
    """What guards may look at."""

    voiced_ms: float = 0.0
    voiced_query: float = 1000.0
    voiced_query_play: float = 1500.0
    echo: bool = False  # what was heard resembles what is being played
    half_duplex: bool = False
    played: bool = False  # some of the answer was heard
    sound_ready: bool = False  # some of the answer can be played
    full: bool = False  # the turn has reached the longest that one may be
    reading: bool = False  # a turn that needs no verdict is being read, and has no answer yet


Guard = Callable[[Facts], bool]
GUARDS: dict[str, Guard] = {
    "": lambda facts: True,
    "echo or half duplex": lambda facts: facts.echo or facts.half_duplex,
    "some was heard": lambda facts: facts.played,
    "sound is ready": lambda facts: facts.sound_ready,
    "a turn is being read": lambda facts: facts.reading,
    "turn is full": lambda facts: facts.full,
    "long speech": lambda facts: facts.voiced_ms >= facts.voiced_query,
    "long speech over an answer": lambda facts: facts.voiced_ms >= facts.voiced_query_play,
}


@dataclass(frozen=True)
class Row:
    number: int
    states: tuple[State, ...]
    event: str
    guard: str
    actions: tuple[str, ...]
    next: Next


def verdict(v: Verdict) -> str:
    return f"G({v})"


def _rows() -> tuple[Row, ...]:
    rows = [
        Row(1, ("IDLE",), "V_ON", "", ("fork", "see_newest"), "HEAR"),
        Row(3, ("IDLE", "HEAR", "GATE"), "TXT", "", ("drop_listening", "read_text"), "THINK"),
        Row(5, HEARS, "FRM", "", ("see",), SAME),
        Row(6, HEARS, "V_SOFT", "", ("speculate",), SAME),
        Row(7, HEARS, "V_RES", "", ("unhear",), SAME),
        Row(8, HEARS, "V_CUT", "", ("hear_segment",), SAME),
        Row(9, ("HEAR",), "V_MAX", "", ("end_speech", "hear_all"), "GATE"),
        Row(9, ("R_HEAR",), "V_MAX", "", ("end_speech", "hear_all"), "R_GATE"),
        Row(10, ("HEAR",), "V_BLIP", "", ("drop_listening",), "IDLE"),
        Row(11, ("HEAR",), "V_END", "", ("hear_all",), "GATE"),
        Row(12, ("GATE",), "G(QUERY)", "sound is ready", ("answer", "play"), "SPEAK"),
        Row(12, ("GATE",), "G(QUERY)", "", ("answer",), "THINK"),
    ]
    rows += [
        Row(13, ("GATE",), verdict(v), "", ("drop_listening",), "IDLE")
        for v in ("NOISE", "BACKCHANNEL", "ECHO", "STOP")
    ]
    rows += [
        Row(14, ("GATE",), "G(INCOMPLETE)", "", ("wait",), "HEAR"),
        Row(14, ("HEAR",), "T_INCOMPLETE", "", ("rejudge",), "GATE"),
        Row(15, JUDGES, "V_ON", "turn is full", ("ignore_speech",), SAME),
        Row(15, ("GATE",), "V_ON", "", ("go_on",), "HEAR"),
        Row(15, ("R_GATE",), "V_ON", "", ("go_on",), "R_HEAR"),
        Row(15, HEARS, "V_ON", "", ("go_on",), SAME),
        Row(16, ("GATE",), "G_TO", "long speech", ("answer",), "THINK"),
        Row(16, ("GATE",), "G_TO", "", ("drop_listening",), "IDLE"),
        Row(17, ("THINK",), "A_RDY", "", ("play",), "SPEAK"),
        Row(18, ("THINK",), "GEN_EOS", "", ("commit",), "IDLE"),
        Row(19, ("THINK",), "T_FIRST", "", ("answer_in_text",), SAME),
        Row(20, ANSWERS, "V_ON", "a turn is being read", ("ignore_speech",), SAME),
        Row(20, ANSWERS, "V_ON", "echo or half duplex", ("ignore_speech",), SAME),
        Row(21, ANSWERS, "V_ON", "", ("fork_heard", "duck", "see_newest"), "R_HEAR"),
        Row(22, ("R_HEAR",), "PAUSE", "", ("pause",), SAME),
        Row(23, ("R_HEAR",), "V_BLIP", "", ("drop_listening", "resume"), BACK),
        Row(24, ("R_HEAR",), "V_END", "", ("hear_all",), "R_GATE"),
        Row(25, ("R_GATE",), "G(QUERY)", "some was heard", ("stop_reply", "answer"), "THINK"),
        Row(26, ("R_GATE",), "G(QUERY)", "", ("stop_reply", "answer"), "THINK"),
        Row(27, ("R_GATE",), "G(STOP)", "", ("stop_reply", "keep_heard", "drop_listening"), "IDLE"),
    ]
    rows += [
        Row(28, ("R_GATE",), verdict(v), "", ("drop_listening", "resume"), BACK)
        for v in ("NOISE", "BACKCHANNEL", "ECHO")
    ]
    rows += [
        Row(29, ("R_GATE",), "G(INCOMPLETE)", "", ("pause", "wait"), "R_HEAR"),
        Row(29, ("R_HEAR",), "T_INCOMPLETE", "", ("rejudge",), "R_GATE"),
        Row(30, ("R_GATE",), "G_TO", "long speech over an answer", ("stop_reply", "answer"), "THINK"),
        Row(30, ("R_GATE",), "G_TO", "", ("drop_listening", "resume"), BACK),
        Row(31, ("R_HEAR",), "P_DONE", "", ("commit",), "HEAR"),
        Row(31, ("R_GATE",), "P_DONE", "", ("commit",), "GATE"),
        Row(32, ("SPEAK",), "P_DONE", "", ("commit",), "IDLE"),
        Row(33, ("SPEAK",), "UNDERRUN", "", ("count_underrun",), SAME),
        Row(34, ALL, "RST", "", ("reset",), "IDLE"),
        Row(35, ("THINK", "SPEAK"), "TXT", "", ("fork_heard", "stop_reply", "read_text"), "THINK"),
        Row(35, OVER, "TXT", "", ("stop_reply", "keep_heard", "drop_listening", "read_text"), "THINK"),
        Row(36, ("HEAR", "GATE"), "ERR(hear)", "", ("drop_listening",), "IDLE"),
        Row(36, ("THINK",), "ERR(hear)", "", ("drop_listening",), "IDLE"),
        Row(36, OVER, "ERR(hear)", "", ("drop_listening", "resume"), BACK),
        Row(36, ("THINK",), "ERR(speech)", "", ("answer_in_text",), SAME),
        Row(36, ("SPEAK",), "ERR(speech)", "", ("end_early",), SAME),
        Row(36, OVER, "ERR(speech)", "", ("end_early",), SAME),
        Row(36, ANSWERS, "ERR(reply)", "", ("stop_reply", "keep_heard"), "IDLE"),
        Row(36, ("R_HEAR",), "ERR(reply)", "", ("stop_reply", "keep_heard"), "HEAR"),
        Row(36, ("R_GATE",), "ERR(reply)", "", ("stop_reply", "keep_heard"), "GATE"),
        Row(36, ALL, "ERR(capture)", "", ("lose_microphone",), SAME),
        Row(36, ALL, "ERR(playback)", "", ("lose_loudspeaker",), SAME),
        Row(37, ("IDLE",), "T_SESSION", "", ("close",), "CLOSED"),
        Row(38, ANSWERS, "STOP", "", ("stop_reply", "keep_heard"), "IDLE"),
        Row(38, OVER, "STOP", "", ("stop_reply", "keep_heard", "drop_listening"), "IDLE"),
    ]
    return tuple(rows)


TABLE = _rows()


def row_for(state: State, event: str, facts: Facts = Facts()) -> Row | None:
    """The first row of this state and event whose guard holds; None: the event changes nothing here."""
    for row in TABLE:
        if state in row.states and row.event == event and GUARDS[row.guard](facts):
            return row
    return None
