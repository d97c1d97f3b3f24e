"""What so many items allow to be said of right and wrong answers, in a sentence for each data set."""

from collections.abc import Callable, Iterator, Sequence

from quant.comparison.figures import Figure, TurnResult
from quant.comparison.metrics import unseen_share
from quant.comparison.task_figures import holm, suites_of

Look = Callable[[str], Figure | None]


def task_sentences(figure: Look, results: Sequence[TurnResult], margin: float) -> Iterator[str]:
    """Regression, no regression, or that so few cannot tell; p-values of several data sets are corrected for that."""
    suites = suites_of(results)
    names = {f"suite.{suite}": f" in {suite}" for suite in suites} or {"answers": ""}
    tested = {name: p.value for name in names if (p := _tested(figure, name))}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    if not tested and not suites:
        yield "No turn has an expected answer, so nothing is said about right and wrong."
    for name, where in names.items():
        if figure(f"{name}.error_rate_added"):
            yield _errors(figure, name, where, margin)
        elif name in adjusted:
            yield _accuracy(figure, name, where, margin, adjusted[name], len(adjusted))
            yield from _options(figure, name, where)
        elif where:
            yield f"Not judged{where}: no answer is expected there, or only another model could tell which are right."


def _tested(figure: Look, name: str) -> Figure | None:
    """The p-value by which a data set is judged; None for transcriptions, whose error rates say more."""
    return None if figure(f"{name}.error_rate_added") else figure(f"{name}.mcnemar_p")


def _accuracy(figure: Look, name: str, where: str, margin: float, p: float, tests: int) -> str:
    loss, least = figure(f"{name}.accuracy_loss"), figure(f"{name}.detectable_loss")
    assert loss is not None and least is not None
    corrected = f", Holm's correction for {tests} data sets" if tests > 1 else ""
    change = f"accuracy changed by {0 - loss.value:+.1%} on {_many(loss, where)} (exact McNemar p = {p:.3g}{corrected})"
    if p < 0.05:
        return f"{'Regression' if loss.value > 0 else 'Improvement'}{where}: {change}."
    if least.value <= margin and loss.high is not None and loss.high <= margin:
        return (
            f"No regression beyond {margin:.1%}{where}: the loss is {loss.value:.1%}, at most {loss.high:.1%} (95 %)."
        )
    shown = f"so many show only a loss of {least.value:.1%} or more (in 4 of 5 cases)"
    if least.value >= 1:
        shown = "so few would not show even the loss of all"
    return f"Cannot say that nothing was lost{where}: {change}, and {shown}; the margin is {margin:.1%}."


def _options(figure: Look, name: str, where: str) -> Iterator[str]:
    loss = figure(f"{name}.right_option_loss")
    if loss is not None and loss.low is not None and loss.high is not None and loss.low * loss.high > 0:
        yield (
            f"The right option{where} became {'less' if loss.value > 0 else 'more'} likely, by {abs(loss.value):.1%} "
            f"(95 % interval {min(abs(loss.low), abs(loss.high)):.1%} to {max(abs(loss.low), abs(loss.high)):.1%})."
        )


def _many(figure: Figure, where: str) -> str:
    return f"{figure.count} {'item' if where else 'turn'}{'' if figure.count == 1 else 's'}"


def _errors(figure: Look, name: str, where: str, margin: float) -> str:
    before, after, added = (figure(f"{name}.error_rate{which}") for which in ("_reference", "", "_added"))
    assert before is not None and after is not None and added is not None
    change = f"the error rate went from {before.value:.2%} to {after.value:.2%} on {_many(added, where)}"
    if added.value and (added.low is None or added.high is None):
        return f"Cannot say whether it is chance{where}: {change}, by as much in each, which tells of no spread."
    if added.low is None or added.high is None:
        return (
            f"Cannot say that nothing was lost{where}: no transcription of {added.count} differs in how many errors it "
            f"has, which would happen in 5 of 100 cases even if {unseen_share(added.count):.1%} of all did."
        )
    spread = f"(95 % interval of the difference {added.low:+.2%} to {added.high:+.2%})"
    if added.low > 0:
        return f"Regression{where}: {change} {spread}."
    if added.high < 0:
        return f"Improvement{where}: {change} {spread}."
    if added.high <= margin:
        return f"No regression beyond {margin:.1%}{where}: {change} {spread}."
    return f"Cannot say that nothing was lost{where}: {change} {spread}; the margin is {margin:.1%}."
