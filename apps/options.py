"""Arguments and options that several commands share, each with its help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from apps.names import bundle_named

Profile = Literal["cpu", "cuda"]
Compat = Literal["right", "official"]
VadName = Literal["auto", "silero", "bundle", "energy"]

Bundle = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE", parser=bundle_named, help="Folder that `edgeomni export` wrote, or nano, which is built in."
    ),
]
OptionalBundle = Annotated[
    str | None, typer.Argument(metavar="[BUNDLE]", help="Folder of a bundle; without one nano, which is built in.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]
Seed = Annotated[int | None, typer.Option(help="Makes every random draw repeatable.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token and code.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of each graph; 0: as many as there are cores.")]
Workers = Annotated[int, typer.Option("--threads", min=0, help="Threads that quantize; 0: as many as there are cores.")]
Temperature = Annotated[
    float | None, typer.Option(help="How daring draws of text are; 0: the likeliest always. Else as the bundle says.")
]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that share this probability; 1: all.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens; 0: all.")]
RepeatPenalty = Annotated[float | None, typer.Option(help="Make tokens that were there less likely; 1: not.")]
MinP = Annotated[
    float | None, typer.Option(help="Leave out tokens of less than this share of the likeliest's probability; 0: none.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Pack weights anew instead of keeping them in a cache.")]
Official = Annotated[Compat, typer.Option(help="`official` reproduces the bugs of the official code, for comparisons.")]
LowLatency = Annotated[bool, typer.Option("--low-latency", help="Send speech before its clause is complete.")]
TurnFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--turns", metavar="FILE.jsonl", help="Turns to answer, as often as wanted; else those that come along."
    ),
]
SuiteNames = Annotated[
    list[str] | None,
    typer.Option("--suite", metavar="NAME", help="A data set as its authors publish it, as often as wanted."),
]
SuiteData = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="DIR", help="Where it lies: one for each --suite, in their order."),
]
Limit = Annotated[int, typer.Option(min=0, help="Items of each data set, drawn with the seed; 0: all.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Most text tokens of an answer.")]
MaxFrames = Annotated[int, typer.Option(min=1, help="Most audio frames of a spoken answer.")]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE.jsonl",
        help="Turns, with their answers, that a recipe with calibration is fitted to; else those that come along.",
    ),
]
PartialCalibration = Annotated[
    bool, typer.Option("--partial-calibration", help="Calibrate also on turns that never let the model hear or see.")
]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Hard-link weight files that stay as they are instead of copying them; the bundle opens no more when the "
        "originals were written to.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the bundle that is already there.")]


def show_suites(wanted: bool) -> None:
    if wanted:
        from apps.turn_sources import suites_as_text

        print(suites_as_text())
        raise typer.Exit


ShowSuites = Annotated[
    bool, typer.Option("--suites", callback=show_suites, is_eager=True, help="Show what suites there are, and leave.")
]
# Read from the folder, since quant.scheme would cost every start what its libraries take to load.
RECIPES = ", ".join(sorted(path.stem for path in (Path(__file__).parents[1] / "quant" / "recipes").glob("*.toml")))
