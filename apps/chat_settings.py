"""How a conversation at the terminal draws its words: /set NAME VALUE, and the line that shows what holds."""

from dataclasses import replace

from runtime.bundle import Sampling
from runtime.conversation import Choices
from runtime.errors import EdgeOmniError
from runtime.sampling import SamplingOptions

NAMES = {
    "temperature": "temperature",
    "top-p": "top_p",
    "top-k": "top_k",
    "repeat-penalty": "repetition_penalty",
    "min-p": "min_p",
}  # as the options of the command are called -> the field
DEFAULT = "default"


def changed(choices: Choices, argument: str) -> Choices:
    """Choices with one setting more, "NAME VALUE"; "default" gives it back to the bundle. EdgeOmniError for others."""
    words = argument.replace("=", " ").split()
    if len(words) != 2:
        raise EdgeOmniError(f"/set takes a name and a value, or {DEFAULT}; the names are {', '.join(NAMES)}")
    name, value = words[0].lstrip("-").replace("_", "-"), words[1]
    if name not in NAMES:
        raise EdgeOmniError(f"there is no setting {words[0]}; there are {', '.join(NAMES)}")
    sampling = replace(choices.sampling, **{NAMES[name]: None if value == DEFAULT else _number(name, value)})
    alone = SamplingOptions(**{NAMES[name]: getattr(sampling, NAMES[name])})
    return replace(choices, sampling=sampling, greedy=choices.greedy and not alone.draws)


def _number(name: str, value: str) -> float:
    try:
        return int(value) if name == "top-k" else float(value)
    except ValueError:
        kind = "a whole number" if name == "top-k" else "a number"
        raise EdgeOmniError(f"{name} is {value!r}, expected {kind} or {DEFAULT}") from None


def described(choices: Choices, bundled: Sampling) -> str:
    """What holds for an answer in text, in the words of /set."""
    used = choices.sampling.of(bundled)
    if choices.greedy or used.greedy:
        return f"always the likeliest token · repeat-penalty {used.repetition_penalty:g}"
    return " · ".join(f"{name} {getattr(used, field):g}" for name, field in NAMES.items())
