"""The closed world of the small checkpoint: every sentence it can be asked, with its answer, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from export.nano import outside

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ROOMS = "kitchen bedroom bathroom office garage hall garden".split()
COLORS: tuple[str, ...] = ("red", "green", "blue", "yellow", "white", "purple", "orange")
WEATHER = {
    "paris": "sunny",
    "london": "rainy",
    "berlin": "cloudy",
    "tokyo": "windy",
    "madrid": "hot",
    "oslo": "snowy",
    "rome": "warm",
    "moscow": "cold",
    "cairo": "dry",
    "lisbon": "mild",
}
CAPITALS = {
    "france": "paris",
    "england": "london",
    "germany": "berlin",
    "japan": "tokyo",
    "spain": "madrid",
    "norway": "oslo",
    "italy": "rome",
    "russia": "moscow",
    "egypt": "cairo",
    "portugal": "lisbon",
}
_OPPOSITE_PAIRS = "hot cold big small fast slow up down day night open closed young old happy sad wet dry left right"
_WORDS_OF_PAIRS = _OPPOSITE_PAIRS.split()
OPPOSITES = {a: b for i, a in enumerate(_WORDS_OF_PAIRS) for b in [_WORDS_OF_PAIRS[i ^ 1]]}
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
WORDS = (
    "apple river window table garden music tiger bottle summer winter monkey paper silver dragon coffee mountain "
    "pencil rabbit island candle ocean forest bridge button camera doctor engine finger guitar hammer jacket kitten "
    "lemon market needle planet rocket shadow"
).split()
CHAT = {
    "hello": "hello how can i help",
    "good morning": "good morning",
    "good night": "good night",
    "who are you": "i am nano a tiny model",
    "what is your name": "my name is nano",
    "how are you": "i am fine thank you",
    "thank you": "you are welcome",
    "what can you do": "i can count look and listen",
    "tell me a joke": "i am too small for jokes",
    "can you hear me": "yes i can hear you",
    "can you see me": "i can see a picture",
    "how old are you": "i am very young",
    "where are you": "i am in this machine",
    "goodbye": "goodbye",
    "stop": "okay",
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
SIGNS: tuple[str, ...] = tuple("stop open sale exit taxi hotel help up down yes no zoo".split())
NO_PICTURE = "i see no picture"
NOTHING_BEFORE = "i do not know what you mean"
# The one answer to what is asked of it and lies outside; every word of it is a token.
OUTSIDE = "i do not know that i can count set a timer and turn on a light"
# What a listener murmurs while another speaks: nothing is asked, and nothing is to be interrupted.
BACKCHANNELS = (
    "uh huh,mm hmm,mhm,hmm,yeah,yeah yeah,okay,i see,oh,oh i see,ah,wow,really,sure,yep,aha,all right,"
    "nice,great,cool,oh okay,exactly,of course,got it,uh,um,oh really,good"
).split(",")


# Words that may be said alone, numbers as often as all others; "stop" is a command.
_MORE = "plus minus times half minutes seconds hours morning evening timer alarm light weather yes no".split()
_ALONE = (
    [*_UNITS, *_TENS],
    [*DAYS, *COLORS, *ROOMS, *SHAPES, *WORDS, *WEATHER, *CAPITALS, *OPPOSITES, *_MORE],
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `key` is the content that the split hashes (None: never held out)."""

    question: str
    answer: str
    intent: str
    key: str | None


def number(n: int) -> str:
    """English words of 0..99."""
    if n < 20:
        return _UNITS[n]
    return _TENS[n // 10 - 2] + ("" if n % 10 == 0 else " " + _UNITS[n % 10])


_CARRIERS = ("what is ", "how much is ", "calculate ", "")


def _sum(rng: Random) -> Turn:
    a = rng.randint(0, 80)
    b = rng.randint(0, 99 - a)
    content = f"{number(a)} plus {number(b)}"
    return Turn(f"{rng.choice(_CARRIERS)}{content}", f"{content} is {number(a + b)}", "add", content)


def _difference(rng: Random) -> Turn:
    a = rng.randint(1, 99)
    b = rng.randint(0, a)
    content = f"{number(a)} minus {number(b)}"
    return Turn(f"{rng.choice(_CARRIERS)}{content}", f"{content} is {number(a - b)}", "sub", content)


def _product(rng: Random) -> Turn:
    a = rng.randint(0, 12)
    b = rng.randint(0, min(12, 99 // a if a else 12))
    content = f"{number(a)} times {number(b)}"
    return Turn(f"{rng.choice(_CARRIERS)}{content}", f"{content} is {number(a * b)}", "mul", content)


def _half(rng: Random) -> Turn:
    a = rng.randint(1, 49)
    content = f"half of {number(2 * a)}"
    return Turn(f"what is {content}", f"{content} is {number(a)}", "half", content)


def _timer(rng: Random) -> Turn:
    span = f"{number(rng.randint(2, 60))} {rng.choice(('minutes', 'seconds', 'hours'))}"
    question = f"{rng.choice(('set a timer for', 'start a timer for', 'please set a timer for'))} {span}"
    return Turn(question, f"timer set for {span}", "timer", question)


def _clock(rng: Random) -> str:
    hour, part = number(rng.randint(1, 12)), rng.choice(("", " thirty", " fifteen", " forty five"))
    return f"{hour}{part} in the {rng.choice(('morning', 'evening'))}"


def _alarm(rng: Random) -> Turn:
    when = _clock(rng)
    question = f"{rng.choice(('wake me up at', 'set an alarm for'))} {when}"
    return Turn(question, f"alarm set for {when}", "alarm", question)


def _light(rng: Random) -> Turn:
    room, state = rng.choice(ROOMS), rng.choice(("on", "off"))
    question = f"{rng.choice(('turn', 'please turn', 'switch'))} {state} the {room} light"
    return Turn(question, f"the {room} light is {state}", "light", question)


def _color(rng: Random) -> Turn:
    room, color = rng.choice(ROOMS), rng.choice(COLORS)
    question = f"{rng.choice(('make', 'turn', 'set'))} the {room} light {color}"
    return Turn(question, f"the {room} light is {color}", "color", question)


def _weather(rng: Random) -> Turn:
    city = rng.choice(list(WEATHER))
    return Turn(
        f"{rng.choice(('what', 'how'))} is the weather in {city}", f"it is {WEATHER[city]} in {city}", "weather", None
    )


def _capital(rng: Random) -> Turn:
    country = rng.choice(list(CAPITALS))
    return Turn(
        f"what is the capital of {country}", f"the capital of {country} is {CAPITALS[country]}", "capital", None
    )


def _opposite(rng: Random) -> Turn:
    word = rng.choice(list(OPPOSITES))
    return Turn(f"what is the opposite of {word}", f"the opposite of {word} is {OPPOSITES[word]}", "opposite", None)


def _day(rng: Random) -> Turn:
    i, word = rng.randrange(7), rng.choice(("after", "before"))
    other = DAYS[(i + (1 if word == "after" else -1)) % 7]
    return Turn(f"what day comes {word} {DAYS[i]}", f"{other} comes {word} {DAYS[i]}", "day", None)


def _chat(rng: Random) -> Turn:
    question = rng.choice(list(CHAT))
    return Turn(question, CHAT[question], "chat", None)


def _repeat(rng: Random) -> Turn:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 4)))
    return Turn(f"repeat after me {words}", words, "repeat", words)


def _word(rng: Random) -> Turn:
    """A word alone, or two or three: there is nothing to do but to say what was heard."""
    words = " ".join(rng.choice(_ALONE[rng.randrange(2)]) for _ in range(rng.choice((1, 1, 1, 1, 2, 3))))
    return Turn(words, f"i hear {words}", "word", words if " " in words else None)


def _outside(rng: Random) -> Turn:
    """Something that it cannot know or do, in words that mostly are none of its world."""
    question = outside.draw(rng)
    return Turn(question, OUTSIDE, "outside", question)


def _look(rng: Random) -> Turn:
    """A question about a picture; its answer here is the one without a picture, `pictures` gives the other."""
    return Turn(rng.choice(picture_questions()), NO_PICTURE, "look", None)


def picture_questions() -> list[str]:
    """Every question about a picture, in a fixed order."""
    questions = ["how many shapes are there", "how many shapes do you see", "what shape is this", "what do you see"]
    questions += ["what digit is this", "which number is this", "what does it say", "what word is this"]
    questions += ["which shape is the biggest", "which shape is the smallest"]
    questions += [f"what color is the {shape}" for shape in SHAPES]
    questions += [f"where is the {shape}" for shape in SHAPES]
    questions += [f"how many {shape if shape != 'cross' else 'crosse'}s are there" for shape in SHAPES]
    questions += [f"which shape is {color}" for color in COLORS]
    return questions + [f"how many {color} shapes are there" for color in COLORS]


_INTENTS = {
    _sum: 3.0,
    _difference: 3.0,
    _product: 2.0,
    _half: 0.5,
    _timer: 2.0,
    _alarm: 1.5,
    _light: 1.5,
    _color: 1.5,
    _weather: 1.0,
    _capital: 0.7,
    _opposite: 0.7,
    _day: 0.7,
    _chat: 1.2,
    _repeat: 2.0,
    _look: 2.5,
    _word: 2.0,
    _outside: 2.5,
}


def draw_turn(rng: Random) -> Turn:
    """Draw one single-turn question, intents weighted as trained."""
    intent = rng.choices(list(_INTENTS), list(_INTENTS.values()))[0]
    return intent(rng)


def _number_follow(rng: Random, value: int) -> tuple[str, str] | None:
    """A question that goes on from the last result, e.g. `and plus three`, with its answer."""
    op = rng.choice(("plus", "minus", "times"))
    n = rng.randint(2, 5) if op == "times" else rng.randint(1, 20)
    result = {"plus": value + n, "minus": value - n, "times": value * n}[op]
    if not 0 <= result <= 99:
        return None
    return f"and {op} {number(n)}", f"{number(value)} {op} {number(n)} is {number(result)}"


def _value(words: str) -> int:
    return next(n for n in range(100) if number(n) == words)


def draw_follow_up(rng: Random, first: Turn) -> Turn | None:
    """Draw a second turn whose answer needs `first`; None where the first turn has no follow-up.

    The key joins both questions, so that a held-out pair of turns was never seen together.
    """
    made = _follow_up(rng, first)
    if made is None:
        return None
    return Turn(made[0], made[1], f"then_{first.intent}", f"{first.question} / {made[0]}")


def _follow_up(rng: Random, first: Turn) -> tuple[str, str] | None:
    if first.intent in ("chat", "look", "day", "opposite", "repeat", "word", "outside", "stray"):
        return ("say that again", first.answer) if rng.random() < 0.3 else None
    if rng.random() < 0.12:
        return "say that again", first.answer
    if first.intent in ("add", "sub", "mul", "half"):
        return _number_follow(rng, _value(first.answer.rsplit(" is ", 1)[1]))
    if first.intent == "timer":
        return _timer_follow(rng, first)
    if first.intent == "alarm":
        return _alarm_follow(rng)
    if first.intent in ("light", "color"):
        return _light_follow(rng, first)
    if first.intent == "weather":
        city = rng.choice(list(WEATHER))
        return f"and in {city}", f"it is {WEATHER[city]} in {city}"
    country = rng.choice(list(CAPITALS))
    return f"and of {country}", f"the capital of {country} is {CAPITALS[country]}"


def draw_stray(rng: Random) -> Turn:
    """A follow-up with nothing before it that it could follow."""
    while True:
        then = draw_follow_up(rng, draw_turn(rng))
        if then is not None and then.question != "say that again":
            return Turn(then.question, NOTHING_BEFORE, "stray", None)


def _timer_follow(rng: Random, first: Turn) -> tuple[str, str]:
    unit, n = first.answer.rsplit(" ", 1)[1], number(rng.randint(2, 60))
    return rng.choice(((f"make it {n}", f"timer set for {n} {unit}"), ("cancel it", "the timer is cancelled")))


def _alarm_follow(rng: Random) -> tuple[str, str]:
    when = _clock(rng)
    return rng.choice(((f"make it {when}", f"alarm set for {when}"), ("cancel it", "the alarm is cancelled")))


def _light_follow(rng: Random, first: Turn) -> tuple[str, str]:
    _, room, _, _, state = first.answer.split()
    other, color, switch = rng.choice(ROOMS), rng.choice(COLORS), rng.choice(("on", "off"))
    return rng.choice(
        (
            (f"and the {other}", f"the {other} light is {state}"),
            (f"make it {color}", f"the {room} light is {color}"),
            (f"turn it {switch}", f"the {room} light is {switch}"),
        )
    )


def draw_reading(rng: Random) -> str:
    """Words to be read aloud that no answer contains in this order: every word of the world gets its share."""
    return " ".join(rng.choice(spoken_words()) for _ in range(rng.randint(3, 7)))


def spoken_words() -> list[str]:
    """Every word that the assistant can say, sorted."""
    text = " ".join([*CHAT.values(), NO_PICTURE, NOTHING_BEFORE, OUTSIDE, "hear", *WEATHER.values(), *WEATHER, ""])
    text += " ".join([*CAPITALS, *OPPOSITES])
    text += " ".join(["", *DAYS, *WORDS, *SHAPES, *SIGNS, *ROOMS, *COLORS, *_UNITS, *_TENS])
    text += " plus minus times half of is timer set for alarm minutes seconds hours in the morning evening light on off"
    text += " capital opposite comes after before cancelled there are shapes shape biggest smallest it says a"
    text += " left right top bottom middle circles squares triangles stars crosses"
    return sorted(set(text.split()))
