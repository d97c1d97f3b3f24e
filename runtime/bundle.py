"""The contract between the exporters and the device: what a bundle's manifest says, and how one is read and written."""

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from runtime.errors import BundleError
from runtime.files import is_file, sha256_of
from runtime.vouched import holds, sample_of

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="null")

BLANK = "\u2581"  # how SentencePiece writes a blank
TODAY = "{today}"  # in the strings of a PromptTemplate
DType = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
CACHE_BYTES: dict[DType, int] = {"int8": 1, "float16": 2, "float32": 4}  # of a value of the cache
Profile = Literal["cpu", "cuda"]
Count = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"the path {path!r} leaves the bundle; a manifest may only name files inside its own folder")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


@dataclass(frozen=True, config=STRICT)
class Port:
    """One input or output of a graph. A string in `shape` is a dimension that varies from run to run."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True, config=STRICT)
class Linked:
    """What a file was when the bundle was written that shares it, by a hard link, with what the bundle was made from.

    Who saves that again in place changes the bundle. As long as inode, time and the `sample` of its content are these,
    nobody has.
    """

    inode: Annotated[int, Field(ge=0)]
    mtime_ns: int
    sample: Sha256  # vouched.sample_of


@dataclass(frozen=True, config=STRICT)
class File:
    path: RelativePath
    nbytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    linked: Linked | None = None  # None: the bundle's own


@dataclass(frozen=True, config=STRICT)
class Graph:
    """One ONNX subgraph: its file, the files that hold its weights, its ports and how its weights are stored."""

    file: RelativePath
    weights: tuple[RelativePath, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str
    parameters: Annotated[int, Field(ge=0)]
    weight_bytes: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class CacheLayout:
    """Key/value cache of the decoder: per layer two arrays [1, kv_heads, positions, head_dim].

    As int8 each channel of each head has a scale, which lies in the decoder's graph and was fitted to
    `calibrated_positions` positions of conversations.
    """

    layers: Count
    kv_heads: Count
    head_dim: Count
    dtype: DType
    max_positions: Count
    calibrated_positions: Count | None = None

    @property
    def bytes_per_position(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * CACHE_BYTES.get(self.dtype, 4)


@dataclass(frozen=True, config=STRICT)
class AudioFrontEnd:
    """How a waveform becomes log-mel segments and how long their codes are (Whisper front end)."""

    sampling_rate: Count
    n_fft: Count
    hop_length: Count
    num_mel_bins: Count
    max_audio_seconds: Count
    split_overlap: float  # seconds; negative: never split
    avg_pooler: Count  # encoder frames a code
    stride: Count  # log-mel frames an encoder frame
    codebook_sizes: tuple[Count, ...]

    @property
    def samples_a_code(self) -> int:
        """How much sound one position of the language model stands for."""
        return self.hop_length * self.stride * self.avg_pooler


@dataclass(frozen=True, config=STRICT)
class VisionFrontEnd:
    """How a picture becomes patches (Qwen2-VL image processor)."""

    patch_size: Count
    temporal_patch_size: Count
    merge_size: Count
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    min_pixels: Count
    max_pixels: Count


@dataclass(frozen=True, config=STRICT)
class VideoRules:
    max_frame_num: Count
    decode_way: str


@dataclass(frozen=True, config=STRICT)
class SpeechLayout:
    """How codes become a waveform: rates, Euler steps, and how much context each stage needs when streamed."""

    codebook_sizes: tuple[Count, ...]  # the code that ends a segment is codebook_sizes[0]
    frames_per_code: Count  # mel frames that one code gives
    frames_short: int  # mel frames that a segment of n codes falls short of n * frames_per_code; below 0: they overlap
    mel_bins: Count
    sampling_rate: Count
    samples_per_frame: Count
    time_steps: tuple[float, ...]  # times at which the flow is evaluated, and the end
    chunk_frames: Count  # attention of the flow looks ahead to the end of its own chunk of this many frames
    harmonics: Count  # sines of the vocoder's source, the fundamental among them
    f0_context: Count  # mel frames on both sides that the F0 predictor sees
    wave_context: Count  # mel frames on both sides that a sample of the waveform depends on
    max_frames: Count  # longest segment that the position table allows
    overlap_samples: Annotated[int, Field(ge=0)]  # cross-fade between two segments


@dataclass(frozen=True, config=STRICT)
class SpecialTokens:
    """Token ids that the runtime must know; None where the model has no such token."""

    eos: tuple[int, ...]
    audio_start: int | None = None
    audio_end: int | None = None
    audio_pad: int | None = None
    img_start: int | None = None
    img_end: int | None = None
    img_pad: int | None = None
    video_place: int | None = None
    audiogen_start: int | None = None
    audiogen_end: int | None = None
    not_addressed: int | None = None  # first token of an answer to something that was not meant for the assistant


@dataclass(frozen=True, config=STRICT)
class Gate:
    """From which probability on a turn is taken as meant for the assistant, where the model has `not_addressed`.

    That probability is 1 less that of `not_addressed` as the first token of the answer. Over an answer it has to be
    surer, since a wrong yes cuts off what somebody listens to.
    """

    in_silence: Annotated[float, Field(ge=0, lt=1)] = 0.5
    over_answer: Annotated[float, Field(ge=0, lt=1)] = 0.6


@dataclass(frozen=True, config=STRICT)
class PromptTemplate:
    """Strings around each turn: (before, after). Special tokens are spelled out and parsed."""

    system: tuple[str, str] | None  # None: the model takes no system turn
    user: tuple[str, str]
    assistant: tuple[str, str]
    spoken_assistant: tuple[str, str] | None = None
    transcribe: str | None = None  # with {audio}
    speak: str | None = None  # with {text}
    default_system: str | None = None  # "": a system turn without a text is written all the same
    begin: str = ""  # what every conversation begins with
    no_system: str = ""  # stands in place of a system turn, where a conversation has none
    opens_answer: str = ""  # stands before an answer that is to be generated, and not before one of a history
    forgets: str | None = None  # of an earlier answer all is left out that stands before the last of these
    given_answer: str = ""  # stands before an answer that is given, as in a history, and not before a generated one
    trimmed: tuple[Literal["system", "user", "assistant"], ...] = ()  # whose text loses the blanks around it
    blanks_behind_system: bool = False  # those ahead of the first user's text stay behind a system turn all the same
    today: str | None = None  # strftime format of the date that stands for TODAY before the first turn


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """Logits processors in the order repetition penalty, temperature, top-k, top-p, min-p.

    top_k 0, top_p 1 and min_p 0 switch off. min_p is of text alone: the share of the likeliest token's probability
    that any other must have.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    greedy: bool = False
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=STRICT)
class Step:
    """Defaults of one kind of generation step: how to sample, how long at most, which strings end it."""

    sampling: Sampling
    max_new: Count
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class GenerationDefaults:
    text: Step  # an answer in text alone
    first_text: Step | None = None  # a spoken answer: its first piece of text
    later_text: Step | None = None  # its later pieces
    audio: Step | None = None  # one segment of audio frames
    transcribe: Step | None = None


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where the weights came from; `random` says that they were never trained."""

    name: str
    config_sha256: str
    stored_dtypes: tuple[str, ...]
    licence: str
    random: bool = False


@dataclass(frozen=True, config=STRICT)
class QuantizedWeight:
    """A matrix that is stored as integers: (code - zero) * scale, with a scale for each `group_size` columns."""

    graph: str
    name: str
    parameters: Count
    bits: Literal[2, 4, 8]
    group_size: Count
    symmetric: bool  # zero is the middle code; else every group has its own
    method: str
    activations: Literal["int8", "float"]  # in what it multiplies on a CPU
    bits_per_weight: Annotated[float, Field(gt=0)]  # with scales and zeros
    stored_as: str | None = None  # the checkpoint's own type, where a quantization had been through it before
    sqnr_db: float | None = None  # what rounding that once more left of it; None: it was not rounded, or not twice


@dataclass(frozen=True, config=STRICT)
class FloatWeight:
    """A matrix, table or convolution kernel of a quantized bundle that stayed as it was; vectors always do."""

    graph: str
    name: str
    parameters: Count
    bits_per_weight: Annotated[float, Field(gt=0)]
    reason: str


@dataclass(frozen=True, config=STRICT)
class Quantization:
    """What made a bundle smaller, and what it did to each weight."""

    recipe: str
    recipe_toml: str
    quantized: tuple[QuantizedWeight, ...]
    kept: tuple[FloatWeight, ...]


@dataclass(frozen=True, config=STRICT)
class Manifest:
    schema_version: Literal[1]
    family: str
    profile: Profile
    source: Source
    vocab_size: Count
    known_tokens: Count  # ids from here on have rows in the embedding but no text
    hidden_size: Count
    tokenizer: RelativePath
    files: tuple[File, ...]
    graphs: dict[str, Graph]
    cache: CacheLayout
    tokens: SpecialTokens
    template: PromptTemplate
    generation: GenerationDefaults
    audio: AudioFrontEnd | None = None
    image: VisionFrontEnd | None = None
    video_frames: VisionFrontEnd | None = None
    video: VideoRules | None = None
    speech: SpeechLayout | None = None
    gate: Gate = Gate()
    quantization: Quantization | None = None  # None: all weights are floats
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on disk, shared ones counted once."""
        return sum(f.nbytes for f in self.files if any(f.path in g.weights for g in self.graphs.values()))


_ADAPTER = TypeAdapter(Manifest)


def manifest_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of manifest.json."""
    return _ADAPTER.json_schema()


def parse_manifest(text: str | bytes, where: str = MANIFEST) -> Manifest:
    """Check a manifest's text; every mistake is named in the one BundleError."""
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{where} is not a JSON object ({error}); export the bundle again") from None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r}, this EdgeOmni reads {SCHEMA_VERSION}; "
            "export the bundle again, or use the EdgeOmni that wrote it"
        )
    try:
        return _ADAPTER.validate_json(text, strict=True)  # "12" is no 12, nor is true 1
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise BundleError(f"{where} does not follow its schema:\n" + "\n".join(lines)) from None


def pieces_of(document: Mapping[str, Any], subject: str) -> int | None:
    """None for a tokenizer.json of byte-level BPE; for one of SentencePiece's pieces, how many blanks at the beginning
    of a text its decoder drops. BundleError for any other, which cannot be streamed.
    """
    decoder = document.get("decoder") or {}
    kinds = [step.get("type") for step in decoder.get("decoders", [decoder])]
    if kinds == ["ByteLevel"]:
        return None
    steps = {step.get("type"): step for step in decoder.get("decoders", [])}
    replaces = steps.get("Replace", {})
    strip = steps.get("Strip", {"content": " ", "start": 0, "stop": 0})
    if (
        kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"])
        and (replaces.get("pattern"), replaces.get("content")) == ({"String": BLANK}, " ")
        and (strip.get("content"), strip.get("stop")) == (" ", 0)
    ):
        return int(strip["start"])
    found = " + ".join(map(str, kinds))
    raise BundleError(
        f"{subject} decodes by {found}, expected ByteLevel, or Replace + ByteFallback + Fuse + Strip of {BLANK!r}; "
        "only BPE over bytes or over SentencePiece's pieces can be streamed"
    )


def is_bundle(folder: Path) -> bool:
    """Whether `folder`/manifest.json is one of ours, of whatever version; other programs use that name as well."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes()) if is_file(folder / MANIFEST) else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "family", "graphs"} <= found.keys()


def read_bundle(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json; the files it names must exist with the size it gives (BundleError).

    Contents are not read, but for files that the bundle does not have to itself: one that a link leads to, as in a
    hub's cache, must have the manifest's checksum, and one that is hard-linked must be what it was.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with `edgeomni export CHECKPOINT -o BUNDLE`"
        )
    manifest = parse_manifest(path.read_bytes(), str(path))
    if changed := [file.path for file in manifest.files if file.linked and not _as_linked(folder / file.path, file)]:
        raise BundleError(
            f"{', '.join(changed)} of the bundle {folder} is hard-linked from what the bundle was made from, and has "
            "been changed since the export; export it again, without --link for files of its own"
        )
    if wrong := list(_contradictions(manifest)):
        raise BundleError(f"{path} contradicts itself:\n" + "\n".join(wrong) + "\nexport the bundle again")
    wrong = list(_missing_or_cut(folder, manifest))
    if wrong:
        raise BundleError(f"the bundle {folder} is not whole:\n" + "\n".join(wrong) + "\nexport it again")
    return manifest


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Sizes that memory is taken by, and that the graphs' ports do not have."""
    hidden, cache = manifest.hidden_size, manifest.cache
    for graph, port, shape in (
        ("embed_tokens", "rows", (None, hidden)),
        ("embed_audio", "rows", (None, hidden)),
        ("vision_projector", "rows", (None, hidden)),
        ("decoder", "inputs_embeds", (1, None, hidden)),
        ("decoder", "hidden", (1, None, hidden)),
        *(("decoder", f"past.0.{name}", (1, cache.kv_heads, None, cache.head_dim)) for name in ("key", "value")),
        ("lm_head", "hidden", (None, hidden)),
        ("lm_head", "logits", (None, manifest.vocab_size)),
    ):
        if graph in manifest.graphs and (found := _sizes(manifest.graphs[graph], port)) != shape:
            yield f"  its sizes ask {_spelled(shape)} of {graph}'s {port}, and the graph has {_spelled(found)}"
    if "decoder" in manifest.graphs:
        layers = sum(port.name.startswith("past.") for port in manifest.graphs["decoder"].inputs) // 2
        if layers != cache.layers:
            yield f"  its cache has {cache.layers} layers, the decoder {layers}"


def _sizes(graph: Graph, name: str) -> tuple[int | None, ...] | None:
    """Of a port, those that are fixed; None where the graph has no such port."""
    shape = next((port.shape for port in (*graph.inputs, *graph.outputs) if port.name == name), None)
    return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


def _spelled(sizes: tuple[int | None, ...] | None) -> str:
    if sizes is None:
        return "no such port"
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"


def _as_linked(path: Path, file: File) -> bool:
    """Whether a hard-linked file is what it was, or a copy of that. One that is no regular file is not judged here."""
    assert file.linked is not None
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return True
        same = (state.st_ino, state.st_mtime_ns) == (file.linked.inode, file.linked.mtime_ns)
        if state.st_size != file.nbytes:
            return False
        return (same and sample_of(path) == file.linked.sample) or holds(path, file.sha256)
    except OSError:
        return True


def _missing_or_cut(folder: Path, manifest: Manifest) -> Iterator[str]:
    root = folder.resolve()
    listed = {f.path for f in manifest.files}
    for file in manifest.files:
        if problem := _wrong_with(folder / file.path, file, root):
            yield f"  {file.path}: {problem}"
    for name, graph in manifest.graphs.items():
        for used in (graph.file, *graph.weights):
            if used not in listed:
                yield f"  {used}: used by graph {name} but not listed with a checksum"
    if manifest.tokenizer not in listed:
        yield f"  {manifest.tokenizer}: the tokenizer is not listed with a checksum"


def _wrong_with(path: Path, file: File, root: Path) -> str | None:
    """Why `path` cannot be the file of that description in the bundle `root`; None if it can."""
    try:
        target = path.resolve(strict=True)
        state = target.stat()
        if not stat.S_ISREG(state.st_mode):
            return "no regular file"
        if state.st_size != file.nbytes:
            return f"{state.st_size} bytes, expected {file.nbytes}"
        if not target.is_relative_to(root) and not holds(target, file.sha256):
            return f"leads outside the bundle, to {target}, which does not have its checksum"
    except FileNotFoundError:
        return "a link to a file that is not there" if path.is_symlink() else "missing"
    except RuntimeError:  # so Python before 3.13 calls links that lead to each other
        return "a link that leads back to itself"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def altered_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Recompute every checksum; yield the path of each file whose content is not what was written."""
    for file in manifest.files:
        if sha256_of(folder / file.path) != file.sha256:
            yield file.path


def describe_file(folder: Path, path: str, linked: bool = False) -> File:
    """Size and checksum of a bundle's file and, if it is `linked` from what the bundle is made from, what it is now."""
    state = (folder / path).stat()  # first: what is written later has another time
    sample = Linked(state.st_ino, state.st_mtime_ns, sample_of(folder / path)) if linked else None
    return File(path=path, nbytes=state.st_size, sha256=sha256_of(folder / path), linked=sample)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json; the folder becomes a bundle by this, so it is written last."""
    text = _ADAPTER.dump_json(manifest, indent=1, exclude_none=True).decode()
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
