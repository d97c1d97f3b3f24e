"""Was that meant for the assistant? Rules on what is known of the speech come first, the model is asked after them."""

import re

from runtime.live.events import Verdict

# Listening noises that people make over somebody who speaks; they do not want the floor. Nor does any single word.
BACKCHANNELS = frozenset(
    "mm mhm mmhm mmm hm hmm mm-hm mm-hmm uh-huh uhuh uh huh ah oh okay ok yeah yes yep yup right sure i see "
    "嗯 嗯嗯 对 对对 是 是的 好 好的 哦 噢 啊".split()
)
# Alone, these end an answer and ask for no other.
STOPS = frozenset(
    [
        "stop",
        "stop it",
        "wait",
        "wait a moment",
        "be quiet",
        "quiet",
        "enough",
        "shut up",
        "停",
        "停下",
        "等一下",
        "别说了",
    ]
)
ECHO_SHARE = 0.7  # of its words were just played
BACKCHANNEL_SHARE = 0.6


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese character is one."""
    return re.findall(r"[一-鿿]|[\w'-]+", text.lower())


def by_rule(text: str | None, played: str, voiced_ms: float, short_ms: float, speaking: bool) -> Verdict | None:
    """The verdict that needs no model; None: ask it. `played` is what the loudspeaker said in the last seconds.

    `text` is what was said, if the bundle can write it down. Without a text there is no rule: a short sound over an
    answer may be "stop" as well as "mm-hm".
    """
    if not text or not (said := words(text)):
        return None
    if " ".join(said) in STOPS or "".join(said) in STOPS:
        return "STOP"
    if not speaking:
        return None
    known = sum(word in BACKCHANNELS for word in said)
    if voiced_ms < short_ms and (len(said) == 1 or known >= BACKCHANNEL_SHARE * len(said)):
        return "BACKCHANNEL"
    heard = set(words(played))
    if len(said) > 1 and sum(word in heard for word in said) >= ECHO_SHARE * len(said):
        return "ECHO"
    return None
