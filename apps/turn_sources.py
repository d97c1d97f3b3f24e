"""Where the turns of `compare` and `record` come from: files, suites of data sets, or what comes along."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quant.comparison.suites import SUITES, read_suite
from quant.turn import DEFAULT, Turn, lacking, read_turns, refuse_unfit
from runtime.bundle import Manifest, sha256_of
from runtime.errors import EdgeOmniError


@dataclass(frozen=True)
class TurnSources:
    """Files of turns, suites with the folder of each, and how many items of each suite are drawn; 0: all."""

    files: tuple[Path, ...] = ()
    suites: tuple[tuple[str, Path], ...] = ()
    limit: int = 0
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.files or self.suites)

    def turns_for(self, manifest: Manifest, say: Callable[[str], None] = lambda note: None) -> tuple[Turn, ...]:
        """All turns, which must fit the bundle; or those that come along, as far as they do.

        `say` is told what of a data set is left out.
        """
        if not self:
            return tuple(turn for turn in read_turns(DEFAULT) if not lacking(turn, manifest))
        sources = self._sources(say)
        named = [name for source in sources for name in {turn.suite for turn in source}]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise EdgeOmniError(f"two sources give a data set called {', '.join(twice)}; rename one, or join them")
        turns = tuple(turn for source in sources for turn in source)
        refuse_unfit(turns, manifest)
        return turns

    def _sources(self, say: Callable[[str], None]) -> list[tuple[Turn, ...]]:
        """The turns of each source; EdgeOmniError with what is wrong in all of them."""
        several = len(self.files) + len(self.suites) > 1
        readers = [partial(read_turns, file, file.stem if several else "") for file in self.files]
        readers += [partial(read_suite, name, data, self.limit, self.seed, say) for name, data in self.suites]
        found: list[tuple[Turn, ...]] = []
        problems: list[str] = []
        for read in readers:
            try:
                found.append(read())
            except EdgeOmniError as error:
                problems.append(str(error))
        if problems:
            raise EdgeOmniError("\n".join(problems))
        return found

    def sha256(self, turns: Sequence[Turn]) -> str:
        """Of the one file; of several sources, of everything that is asked and expected, media by their names."""
        if not self.suites and len(self.files) < 2:
            return sha256_of(next(iter(self.files), DEFAULT))
        return hashlib.sha256("\n".join(map(_spelled, turns)).encode()).hexdigest()


def _spelled(turn: Turn) -> str:
    media = [file.name for file in (turn.audio, *turn.images) if file is not None]
    return repr(
        (turn.suite, turn.item, turn.text, media, turn.spoken, turn.answers, turn.choices, turn.metric, *turn.cuts)
    )


def turn_sources(
    files: Sequence[Path] | None, suites: Sequence[str] | None, data: Sequence[Path] | None, limit: int, seed: int
) -> TurnSources:
    """Pair every suite with its folder; EdgeOmniError where one is missing."""
    names, folders = suites or (), data or ()
    if len(names) != len(folders):
        raise EdgeOmniError(
            f"found {len(names)} --suite and {len(folders)} --data; give each suite its folder, as in "
            "--suite mcq --data ceval --suite asr --data recordings"
        )
    if limit and not names:
        raise EdgeOmniError("--limit draws from a --suite, and there is none; leave it out")
    return TurnSources(tuple(files or ()), tuple(zip(names, folders, strict=True)), limit, seed)


def suites_as_text() -> str:
    """Every layout that is read, what it needs and how it is judged."""
    return "\n\n".join(f"{suite.name}\n  reads   {suite.needs}\n  judges  {suite.judged}" for suite in SUITES.values())
