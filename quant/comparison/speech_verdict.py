"""What can be said of the speech in sentences: whether it is understood as well as before, and who says so."""

from collections.abc import Callable, Iterator, Sequence

from quant.comparison.figures import Figure, TurnResult

Look = Callable[[str], Figure | None]
STREAMED = 1e-3  # of full scale: a larger difference could be heard


def speech_sentences(figure: Look, results: Sequence[TurnResult], listener: str, random: bool) -> Iterator[str]:
    """Of spoken answers; nothing where there are none. `listener` is the recogniser's name, "" for none."""
    spoken = [result for result in results if result.speech is not None]
    if not spoken:
        return
    if listener:
        yield _understood(figure, len(spoken), listener)
    elif not random:
        yield (
            f"Nobody listened to {_answers(len(spoken))}, so that it is not known whether the words are understood; "
            "install the extra `recognise`, or name a recogniser."
        )
    streamed = figure("speech.streamed")
    if streamed is not None and not streamed.value <= STREAMED:
        yield (
            f"Regression: speech that is streamed differs from the same made at once, by up to {streamed.value:.3g} of "
            "full scale."
        )


def _understood(figure: Look, asked: int, listener: str) -> str:
    before, after, added = (figure(f"speech.wer{which}") for which in ("_reference", "", "_added"))
    if before is None or after is None or added is None:
        return f"{listener} listened to {_answers(asked)}, of which none was said to its end by the reference."
    change = (
        f"{listener} misheard {before.value:.1%} of the reference's words and {after.value:.1%} of the candidate's, in "
        f"{added.count} of {_answers(asked)}"
    )
    if added.low is None or added.high is None:
        return f"Cannot say that the speech is as clear as before: {change}, and the difference is equal in all."
    spread = f"95 % interval of the difference {added.low:+.1%} to {added.high:+.1%}"
    if added.low > 0:
        return f"Regression of the speech: {change} ({spread})."
    if added.high < 0:
        return f"Improvement of the speech: {change} ({spread})."
    return f"No change of the speech is shown: {change} ({spread})."


def _answers(count: int) -> str:
    return f"{count} spoken answer{'' if count == 1 else 's'}"
