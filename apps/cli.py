"""The command line: each command reads its arguments here and hands them to the floor below that does the work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from apps import cache_command, list_command
from apps.names import NANO, bundle_named, with_bundle
from apps.options import (
    RECIPES,
    Bundle,
    CalibrationFile,
    Compat,
    Force,
    Greedy,
    Json,
    Limit,
    Link,
    LowLatency,
    MaxFrames,
    MaxNew,
    MinP,
    NoCache,
    Official,
    OptionalBundle,
    PartialCalibration,
    Profile,
    RepeatPenalty,
    Seed,
    ShowSuites,
    SuiteData,
    SuiteNames,
    Temperature,
    Threads,
    TopK,
    TopP,
    TurnFiles,
    VadName,
    Workers,
)
from runtime.errors import EdgeOmniError
from runtime.files import exists

EXTRAS = {
    "onnxruntime": "cpu",
    "cv2": "camera",
    "ray": "cluster",
    **dict.fromkeys(("sounddevice", "soxr", "livekit", "textual"), "talk"),
    **dict.fromkeys(("starlette", "uvicorn", "python_multipart", "prometheus_client"), "serve"),
    **dict.fromkeys(("scipy", "jiwer", "yaml"), "compare"),
    **dict.fromkeys(("onnxscript", "onnx_ir", "onnx", "ml_dtypes", "jinja2"), "export"),
}  # a missing package -> the extra that brings it

app = typer.Typer(
    help="Run omni-modal language models on this device: text, speech, pictures and video in, text and speech out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_command.app, name="cache")
app.command("list")(list_command.show)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"edgeomni {version('edgeomni')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint, or a GGUF file.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="BUNDLE", help="Folder to write.")] = None,
    profile: Annotated[Profile, typer.Option(help="Where it will run: fp32 for cpu, fp16 for cuda.")] = "cpu",
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Copy the weights alone, also where whole files could be cloned.")
    ] = False,
    link: Link = False,
    force: Force = False,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.toml", help="Quantize in the same pass, so that no float bundle is written."),
    ] = None,
    calibration: CalibrationFile = None,
    partial_calibration: PartialCalibration = False,
    floats: Annotated[
        bool, typer.Option("--float", help="Make floats also of what the checkpoint stores as integers.")
    ] = False,
    random: Annotated[bool, typer.Option("--random", help="Mark the weights as never trained.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    threads: Workers = 0,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs."""
    from apps import one_pass, tables
    from export import convert
    from quant import quantize as quantization
    from quant.examples import read_calibrating
    from quant.scheme import read_recipe
    from runtime.bundle_writer import refuse_target

    refuse_both(standalone, link)
    if out is None and not dry_run:
        raise EdgeOmniError("where to? name the bundle with -o BUNDLE, or see the plan with --dry-run")
    if out is not None and not dry_run:
        refuse_target(out, force)  # before the checkpoint is read
    if floats and recipe is not None:
        raise EdgeOmniError("--float and --recipe exclude each other")
    if calibration is not None and recipe is None:
        raise EdgeOmniError("--calibration goes with a --recipe that calibrates")
    calibrating = read_calibrating(calibration, partial_calibration)
    wanted = None if recipe is None else read_recipe(recipe)
    with tables.waiting("reading the checkpoint", quiet=as_json):
        planned, smaller = one_pass.plan(checkpoint, profile, wanted, random, floats)
    if dry_run or out is None:
        return emit(tables.plan_record(planned)) if as_json else tables.show_plan(planned)
    total = smaller.bytes_now if smaller else sum(row.bytes_after for row in planned.graphs)
    with tables.progress(total, quiet=as_json) as step:
        if smaller is None:
            manifest = convert.write(planned, out, standalone, force, random, step, link)
        else:
            manifest = quantization.write(smaller, out, standalone, force, step, threads, calibrating, link)
    return emit(tables.bundle_record(out, manifest)) if as_json else tables.show_written(out, manifest, link)


@app.command()
def quantize(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", help="Folder to write.")],
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME|FILE.toml", help=f"A recipe that comes along ({RECIPES}), or one of your own."),
    ] = "int4-rtn",
    calibration: CalibrationFile = None,
    partial_calibration: PartialCalibration = False,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="Copy weights that stay floats, also where whole files could be cloned."),
    ] = False,
    link: Link = False,
    force: Force = False,
    threads: Workers = 0,
    as_json: Json = False,
) -> None:
    """Make a smaller bundle of a float one; after a kill the same command goes on where it was."""
    from apps import tables
    from quant.examples import read_calibrating
    from quant.quantize import quantize as run
    from quant.scheme import read_recipe
    from runtime.bundle import read_bundle

    refuse_both(standalone, link)
    calibrating = read_calibrating(calibration, partial_calibration)
    total = sum(graph.weight_bytes for graph in read_bundle(bundle).graphs.values())
    with tables.progress(total, quiet=as_json) as step:
        manifest = run(bundle, out, read_recipe(recipe), standalone, force, step, threads, calibrating, link)
    emit(tables.bundle_record(out, manifest)) if as_json else tables.show_written(out, manifest, link)


@app.command("quantize-cache")
def quantize_cache(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", help="Folder to write.")],
    calibration: CalibrationFile = None,
    partial_calibration: PartialCalibration = False,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Copy the weights, also where they could be cloned.")
    ] = False,
    link: Link = False,
    force: Force = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Let a bundle, quantized or not, remember conversations in 8 bits: a quarter of the memory for each position."""
    from apps import tables
    from quant.cache import quantize_cache as run
    from quant.examples import read_calibrating
    from runtime.session import Options

    refuse_both(standalone, link)
    calibrating = read_calibrating(calibration, partial_calibration)
    with tables.waiting("reading conversations", quiet=as_json):
        manifest = run(bundle, out, calibrating, standalone, force, Options(threads=threads), link)
    emit(tables.bundle_record(out, manifest)) if as_json else tables.show_written(out, manifest, link)


@app.command()
def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", parser=bundle_named, help="Folder that an export wrote, or nano.")
    ] = None,
    as_json: Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of manifest.json.")] = False,
) -> None:
    """Show what a bundle holds: graphs, ports, precisions, sizes, memory, source and licence."""
    from apps import tables
    from runtime.bundle import manifest_schema, read_bundle

    if schema:
        return emit(manifest_schema())
    if bundle is None:
        raise EdgeOmniError("which bundle? give its folder, or --schema for the schema of manifest.json")
    manifest = read_bundle(bundle)
    return emit(tables.bundle_record(bundle, manifest)) if as_json else tables.show_bundle(bundle, manifest)


@app.command()
def verify(bundle: Bundle, as_json: Json = False) -> None:
    """Recompute every checksum, load every graph and compare its ports with the manifest."""
    from apps import tables
    from runtime.bundle import read_bundle
    from runtime.verify import refuse_failed
    from runtime.verify import verify as run_checks

    checks = []
    for check in run_checks(bundle, read_bundle(bundle)):
        checks.append(check)
        if not as_json:
            tables.show_check(check)
    if as_json:
        emit(tables.checks_record(checks))
    refuse_failed(bundle, checks)


@app.command()
def parity(
    bundle: Bundle,
    golden: Annotated[Path, typer.Argument(metavar="GOLDEN", help="Folder of a golden set.")],
    as_json: Json = False,
) -> None:
    """Compare every recorded stage of the official code with this bundle's own; exit code 1 if one differs."""
    from apps import tables
    from export.parity.golden import Golden
    from export.parity.replay import parity as replay

    with tables.waiting("replaying the golden set", quiet=as_json):
        result = replay(bundle, Golden(golden))
    emit(tables.parity_record(result)) if as_json else tables.show_parity(result)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def record(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="REFDIR", help="Folder to write.")],
    turns: TurnFiles = None,
    suite: SuiteNames = None,
    data: SuiteData = None,
    limit: Limit = 0,
    _suites: ShowSuites = False,
    max_new: MaxNew = 48,
    max_frames: MaxFrames = 64,
    seed: Annotated[int, typer.Option(help="Seed of the speech decoder's noise.")] = 0,
    threads: Threads = 0,
    no_cache: NoCache = False,
) -> None:
    """Store a bundle's answers, so that a machine which cannot load it can compare against them."""
    from apps.compare_command import Settings, record_command
    from apps.turn_sources import turn_sources
    from quant.limits import Limits

    asked = turn_sources(turns, suite, data, limit, seed)
    record_command(bundle, out, Settings(asked, Limits(max_new, max_frames, seed), threads, no_cache))


@app.command()
def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="REF", parser=bundle_named, help="A bundle, or what `edgeomni record` wrote.")
    ],
    candidate: Annotated[
        Path, typer.Argument(metavar="CAND", parser=bundle_named, help="The bundle that is to be judged.")
    ],
    report: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report.html, report.md and report.json.")],
    turns: TurnFiles = None,
    suite: SuiteNames = None,
    data: SuiteData = None,
    limit: Limit = 0,
    _suites: ShowSuites = False,
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Limits of figures; exit code 1 if one is not kept.")
    ] = None,
    max_new: MaxNew = 48,
    max_frames: MaxFrames = 64,
    swap_turns: Annotated[int, typer.Option(min=0, help="Turns for which each graph is swapped; 0: none.")] = 8,
    margin: Annotated[float, typer.Option(min=0, max=1, help="Loss of accuracy that would be tolerated.")] = 0.02,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Report of another recipe on the same turns; may be repeated."),
    ] = None,
    recogniser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|COMMAND",
            help="Who listens to spoken answers: whisper (used where installed), none, a bundle that transcribes, or a "
            "command that is given a WAV file ({wav}, {language}) and prints what it heard.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|local", help="Spread the turns over a Ray cluster, or this machine's cores."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the speech decoder's noise.")] = 0,
    threads: Threads = 0,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure what a smaller bundle loses against its reference, and in which graph."""
    from apps.compare_command import Settings, compare_command, show
    from apps.report.findings import report_record
    from apps.turn_sources import turn_sources
    from quant.limits import Limits

    settings = Settings(
        turn_sources(turns, suite, data, limit, seed), Limits(max_new, max_frames, seed), threads, no_cache
    )
    listener = str(bundle_named(NANO)) if recogniser == NANO else recogniser
    found = compare_command(
        reference, candidate, report, settings, gates, swap_turns, margin, as_json, beside or (), listener, ray
    )
    emit(report_record(found)) if as_json else show(found, report)
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def chat(
    bundle: OptionalBundle = None,
    text: Annotated[
        list[str] | None, typer.Argument(help="What to say. Without it: an interactive conversation.")
    ] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="wav, flac, mp3 or ogg; may be repeated.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; may be repeated.")] = None,
    speak: Annotated[
        Path | None, typer.Option(metavar="OUT.wav", help="Answer in speech, written here; or .flac, .ogg, .mp3.")
    ] = None,
    system: Annotated[str | None, typer.Option(help='System prompt; "" for none.')] = None,
    seed: Seed = None,
    greedy: Greedy = False,
    as_json: Json = False,
    threads: Threads = 0,
    max_new: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer in text.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repeat_penalty: RepeatPenalty = None,
    min_p: MinP = None,
    low_latency: LowLatency = False,
    compat: Official = "right",
    no_cache: NoCache = False,
) -> None:
    """Answer one turn, or hold a conversation: interactive on a terminal, one line a turn from a pipe."""
    from apps import terminal
    from apps.chat_words import bundle_and_text
    from runtime.audio_file import refuse_format
    from runtime.conversation import Choices
    from runtime.sampling import SamplingOptions

    sampling = SamplingOptions(temperature, top_p, top_k, repeat_penalty, min_p)
    if greedy and sampling.draws:
        raise EdgeOmniError("--greedy draws nothing; leave it out, or what says how to draw")
    if speak is not None:
        refuse_format(speak)
    words = [word for word in (bundle, *(text or [])) if word is not None]
    bundle, said = bundle_and_text(words, could_be_folder)
    greeted = said is None and sys.stdin is not None and sys.stdin.isatty()
    engine = open_engine(bundle_or_nano(bundle, quiet=greeted), threads, compat, no_cache)
    mode = "prefix" if low_latency else "exact"
    choices = Choices(greedy=greedy, mode=mode, max_new=max_new, sampling=sampling)
    session = terminal.Chat(engine, choices, system=system, seed=seed, speak=speak, as_json=as_json)
    session.attach(audio or [], image or [], video or [])
    if said is not None or session.attached:
        session.answer(said)
    else:
        session.run()


@app.command()
def talk(
    bundle: OptionalBundle = None,
    mic: Annotated[str | None, typer.Option(help="Microphone, by number or a part of its name.")] = None,
    speaker: Annotated[str | None, typer.Option(help="Loudspeaker, by number or a part of its name.")] = None,
    camera: Annotated[str | None, typer.Option(help="Begin with this camera, or video file, on.")] = None,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Show what devices there are.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Record two seconds, play them, say what is wrong.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show how turns are taken, and leave.")] = False,
    push_to_talk: Annotated[bool, typer.Option("--push-to-talk", help="Listen only while space says so.")] = False,
    half_duplex: Annotated[bool, typer.Option("--half-duplex", help="Do not listen while speaking.")] = False,
    no_aec: Annotated[bool, typer.Option("--no-aec", help="No echo cancelling: for headphones.")] = False,
    vad: Annotated[VadName, typer.Option(help="What tells speech from other sounds.")] = "auto",
    system: Annotated[str | None, typer.Option(help='System prompt; "" for none.')] = None,
    remember: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Turns that are remembered. Unless given, all that there is room for; the embedded model, which was "
            "trained on short conversations, remembers five.",
        ),
    ] = None,
    simulate: Annotated[
        Path | None, typer.Option(metavar="FILE.wav", help="Hear this file instead of a microphone.")
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(metavar="DIR|VIDEO", help="See these pictures, one a second, with --simulate.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.wav", help="With --simulate: left the person, right the answers.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --simulate: each event, one JSON object a line.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="With --simulate: what ran when, for Perfetto.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="With --simulate: do not wait for the file's time.")] = False,
    seed: Seed = None,
    greedy: Greedy = False,
    as_json: Json = False,
    threads: Threads = 0,
    no_cache: NoCache = False,
) -> None:
    """Hold a live conversation by microphone, loudspeaker and camera; it may be interrupted by speaking."""
    from apps import talk_command
    from apps.embedded import REMEMBERED

    if explain:
        return emit(talk_command.explanation()) if as_json else talk_command.explain()
    if list_devices:
        found = talk_command.list_devices()
        return emit(found) if as_json else talk_command.show_devices(found)
    if check:
        from apps.check_audio import check_audio

        checked = check_audio(mic, speaker, note if as_json else print)
        if as_json:
            emit(checked)
        raise typer.Exit(0 if checked["ok"] else 1)
    given = {"--frames": frames, "--out": out, "--log": log, "--trace": trace}
    if simulate is None and any(given.values()):
        wanted = ", ".join(name for name, path in given.items() if path)
        raise EdgeOmniError(f"{wanted} belongs to a simulated conversation; add --simulate FILE.wav")
    if remember is None and bundle in (None, NANO):
        remember = REMEMBERED
    chosen = talk_command.Chosen(vad, not no_aec, half_duplex, push_to_talk, system, seed, greedy, remember)
    if simulate is not None:
        files = talk_command.Files(simulate, frames, out, log, trace)
        talk_command.check_files(files)
        engine = open_engine(bundle_or_nano(bundle), threads, "right", no_cache)
        record = talk_command.from_files(engine, chosen, files, fast, as_json)
        return emit(record) if as_json else None
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise EdgeOmniError("talk needs a terminal to show itself on; without one, use talk --simulate FILE.wav")
    engine = open_engine(bundle_or_nano(bundle), threads, "right", no_cache)
    return talk_command.talk(engine, chosen, talk_command.Devices(mic, speaker, camera))


@app.command()
def serve(
    bundle: OptionalBundle = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    token: Annotated[
        str | None, typer.Option(envvar="EDGEOMNI_TOKEN", help="What clients must show as their API key.")
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Replies at once; who comes beyond that is told so.")] = 8,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; unless given, its folder's name.")
    ] = None,
    threads: Threads = 0,
    no_cache: NoCache = False,
) -> None:
    """Serve a bundle over HTTP as the OpenAI API has it, to programs of this machine."""
    from apps.server import command
    from apps.server.settings import ServerSettings

    called = name or ("edgeomni-nano" if bundle in (None, NANO) else Path(bundle).resolve().name)
    settings = ServerSettings(called, host, port, token, max_sessions)
    command.serve_command(open_engine(bundle_or_nano(bundle), threads, "right", no_cache), settings, note)


@app.command()
def transcribe(
    bundle: OptionalBundle = None,
    audio: Annotated[str | None, typer.Argument(metavar="AUDIO", help="wav, flac, mp3 or ogg.")] = None,
    as_json: Json = False,
    threads: Threads = 0,
    no_cache: NoCache = False,
) -> None:
    """Write down what an audio file says (nano, and checkpoints with a transcription prompt, that is -Base)."""
    from apps import terminal
    from runtime import conversation

    bundle, audio = with_bundle(bundle, audio, wanted="the name of an audio file")
    engine = open_engine(bundle_named(bundle), threads, "right", no_cache)
    terminal.one_answer(conversation.transcribe(engine, engine.hear(audio)), None, as_json)


@app.command()
def say(
    bundle: OptionalBundle = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What to read aloud.")] = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT.wav", help="The file to write.")] = None,
    seed: Seed = None,
    greedy: Greedy = False,
    as_json: Json = False,
    threads: Threads = 0,
    low_latency: LowLatency = False,
    no_cache: NoCache = False,
) -> None:
    """Read a text aloud (nano, and checkpoints with a reading prompt, that is -Base)."""
    from apps import terminal
    from runtime.audio_file import refuse_format
    from runtime.conversation import Choices, read_aloud

    bundle, text, out = with_bundle(bundle, text, out, wanted="a text and the name of a sound file")
    refuse_format(Path(out))
    engine = open_engine(bundle_named(bundle), threads, "right", no_cache)
    choices = Choices(greedy=greedy, mode="prefix" if low_latency else "exact")
    terminal.one_answer(read_aloud(engine, text, choices, seed), Path(out), as_json)


@app.command()
def bench(
    bundle: Bundle,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Threads; may be given more than once. 1 and 2 unless given"),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", min=1, help="Positions to read before decoding. 32, 128 and 512 unless given"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; what is shown are medians and spreads.")] = 7,
    audio_head: Annotated[
        bool, typer.Option("--audio-head", help="Also time one audio frame against the official order of work.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Measure, instead of all else, prefill and decode beside those of other programs that are installed: "
            "llama.cpp,onnxruntime-genai,transformers or some of them."
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Measure, instead of all else, how a live conversation takes turns.")
    ] = False,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes of turn-taking that --live draws.")] = 300,
    questions: Annotated[int, typer.Option(min=1, help="Questions that --live takes the time of.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the scenes of --live.")] = 0,
    vad: Annotated[VadName, typer.Option(help="What tells speech from other sounds, with --live.")] = "auto",
    no_aec: Annotated[bool, typer.Option("--no-aec", help="No echo cancelling, with --live.")] = False,
    remember: Annotated[
        int | None,
        typer.Option(min=0, help="Turns that --live lets the model remember; unless given, all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on this CPU: starts and memory, prefill, decode, overhead, bandwidth, a whole turn."""
    from dataclasses import asdict

    from apps import tables
    from apps.bench import against as bench_against
    from apps.bench import bench as benchmark
    from apps.bench import show as bench_show

    with tables.waiting("measuring", quiet=as_json) as status:
        shown = (lambda doing: None) if status is None else status.update
        if against is not None:
            compared = bench_against.against(bundle, against.split(","), threads or (1, 2), repeats, shown)
            return emit(asdict(compared)) if as_json else bench_show.show_against(compared)
        if live:
            from apps.bench import live as bench_live
            from apps.bench import live_show

            how = bench_live.How(scenes, questions, seed, (threads or [0])[0], vad, not no_aec, remember)
            talked = bench_live.bench_live(bundle, how, shown)
            return emit(bench_live.record(talked)) if as_json else live_show.show_live(talked)
        result = benchmark.bench(bundle, threads or (1, 2), lengths or (32, 128, 512), repeats, audio_head, shown)
    return emit(benchmark.record(result)) if as_json else bench_show.show(result)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, execution providers, CPU features, cache, and what is wrong with them."""
    from apps import doctor as examination

    found = examination.examine()
    emit(found.record()) if as_json else examination.show(found)
    raise typer.Exit(0 if not found.problems else 1)


def refuse_both(standalone: bool, link: bool) -> None:
    if standalone and link:
        raise EdgeOmniError("--standalone and --link exclude each other: the one copies, the other does not")


def could_be_folder(argument: str) -> bool:
    """Whether the only argument names a bundle rather than says something: it exists, or is spelled as a path."""
    rooted = argument.startswith(("/", "./", "../", "~/"))
    return argument == NANO or exists(argument) or rooted or (os.sep in argument and " " not in argument)


def bundle_or_nano(bundle: str | None, quiet: bool = False) -> Path:
    """The folder of the bundle that is named; where none is, the embedded one, and a word about it on stderr."""
    if bundle is None and not quiet:
        note("no bundle is named, so Nano answers, which is built in and knows a small world only")
    return bundle_named(NANO if bundle is None else bundle)


def open_engine(bundle: Path, threads: int, compat: Compat, no_cache: bool):
    """The bundle, open; says on stderr if its weights were never trained."""
    from runtime.bundle import read_bundle
    from runtime.engine import Engine
    from runtime.session import Options

    profile = read_bundle(bundle).profile
    options = Options(threads=threads, provider=profile, prepack_cache=None if no_cache else packed_weights())
    engine = Engine(bundle, options, compat)
    if engine.manifest.source.random:
        note("the weights of this bundle are random: its answers are noise that proves arithmetic, not quality")
    return engine


def packed_weights() -> Path | None:
    """Where packed weights are kept; says on stderr if there is no place for them."""
    from runtime.files import cache_folder

    try:
        return cache_folder()
    except EdgeOmniError as error:
        note(f"weights are packed anew at each start: {error}")
        return None


def emit(record: Any) -> None:
    """One JSON object on stdout."""
    from apps.streams import json_text

    print(json_text(record, indent=1, allow_nan=False))


def note(message: str) -> None:
    print(f"edgeomni: {message}", file=sys.stderr)


@contextmanager
def one_message() -> Iterator[None]:
    """Turn what a user can set right into one message on stderr and exit code 2; anything else is a bug and shows."""
    try:
        yield
        if sys.stdout is not None:  # None: closed by whoever started us
            sys.stdout.flush()
    except EdgeOmniError as error:
        note(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        note(f"this needs the Python package {error.name}, which is not installed: pip install 'edgeomni[{extra}]'")
        sys.exit(2)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        silence_stdout()
        sys.exit(1)
    except OSError as error:  # of a place that is full, read-only, not ours, or named too long
        if error.errno is None:
            raise
        silence_stdout()
        what = error.filename or "what the output goes to"
        note(f"{what} cannot be used: {error.strerror}; check its name, its rights and the room")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def silence_stdout() -> None:
    """Let what is still to be written go nowhere, so that leaving does not fail once more."""
    with suppress(OSError, ValueError):
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    from apps.streams import accept_any_encoding

    accept_any_encoding()
    with one_message():
        app(prog_name="edgeomni")
