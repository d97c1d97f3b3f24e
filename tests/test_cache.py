"""A cache of 8 bits: what it costs in accuracy, that it is rewound exactly, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from apps.cli import app
from quant.cache import LEAST, ROOM, meet, quantize_cache, scales
from quant.comparison.metrics import kl_divergence
from quant.examples import BUILT_IN, Calibrating
from quant.quantize import quantize
from quant.scheme import read_recipe
from quant.turn import Turn
from runtime.bundle import read_bundle, write_manifest
from runtime.context import Context
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import ReplyDone
from runtime.prompt import Text
from runtime.session import Options
from runtime.verify import refuse_failed, verify
from tests import tiny_llama
from tests.tiny import omni_bundle

ONE = Options(threads=1)
IDS = np.random.default_rng(0).integers(0, 256, 90)


@pytest.fixture(scope="module")
def floats() -> Path:
    return tiny_llama.bundle()


@pytest.fixture(scope="module")
def small(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "small"
    quantize_cache(floats, out, options=ONE, link=True)
    return out


def read(context: Context, ids: np.ndarray) -> np.ndarray:
    for token in ids:
        context.push(int(token))
    return context.hidden().copy()


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Scores [n, vocabulary] behind each position."""
    engine = Engine(folder, ONE)
    context, head = engine.context(), engine.session("lm_head")
    return np.concatenate([head.run(hidden=read(context, ids[at : at + 1]))["logits"] for at in range(len(ids))])


def test_it_takes_a_quarter_of_the_memory(floats: Path, small: Path) -> None:
    before, after = (read_bundle(folder).cache for folder in (floats, small))
    assert after.bytes_per_position * 4 == before.bytes_per_position
    buffers = Engine(small, ONE).context().cache.buffers.values()
    assert {buffer.dtype for buffer in buffers} == {np.dtype(np.int8)}


def test_what_follows_a_text_is_almost_what_it_was(floats: Path, small: Path) -> None:
    exact, rounded = (logits(folder, IDS) for folder in (floats, small))
    assert not np.array_equal(exact, rounded)
    assert kl_divergence(exact, rounded).mean() < 0.01  # of random weights, with bytes that calibration never saw


def test_weights_and_cache_can_both_be_small(floats: Path, tmp_path: Path) -> None:
    quantize(floats, tmp_path / "int8", read_recipe("int8"))
    manifest = quantize_cache(tmp_path / "int8", tmp_path / "both", options=ONE)
    assert manifest.quantization is not None
    assert kl_divergence(logits(tmp_path / "int8", IDS), logits(tmp_path / "both", IDS)).mean() < 0.01


def test_rewinding_is_exact(small: Path) -> None:
    engine = Engine(small, ONE)
    context, fresh = engine.context(), engine.context()
    read(context, IDS)
    context.truncate(40)
    np.testing.assert_array_equal(read(context, IDS[50:60]), read(fresh, np.concatenate([IDS[:40], IDS[50:60]])))


def test_positions_read_one_by_one_equal_those_read_at_once(small: Path) -> None:
    engine = Engine(small, ONE)
    once, single = engine.context(), engine.context()
    read(once, IDS)
    for token in IDS:
        read(single, np.array([token]))
    for name, buffer in once.cache.buffers.items():
        steps = np.abs(buffer.astype(int) - single.cache.buffers[name]).max()
        assert steps <= 1, name


def test_codes_use_the_range_and_their_scales_cover_what_was_met(floats: Path, small: Path) -> None:
    met = meet(Engine(floats, ONE), BUILT_IN)
    assert met.positions == read_bundle(small).cache.calibrated_positions
    peaks = next(iter(met.peaks.values()))
    np.testing.assert_allclose(scales(peaks)[0, :, 0] * 127, np.maximum(ROOM * peaks, LEAST), rtol=1e-6)
    context = Engine(small, ONE).context()
    read(context, IDS)
    codes = context.cache.buffers["0.key"][0, :, : len(IDS)]
    assert np.abs(codes.astype(int)).max() > 90


def test_a_channel_that_is_always_zero_gets_a_scale_all_the_same() -> None:
    assert (scales(np.zeros((2, 16), np.float32)) > 0).all()


def test_the_bundle_verifies_and_its_files_are_linked(floats: Path, small: Path) -> None:
    refuse_failed(small, verify(small, read_bundle(small)))
    assert (floats / "decoder.data").samefile(small / "decoder.data")


def test_an_omni_bundle_answers_with_it(tmp_path: Path) -> None:
    one_turn = Calibrating((Turn("What is a tram?", answers=("A train in the street.",)),), partial=True)
    manifest = quantize_cache(omni_bundle(), tmp_path / "small", one_turn, options=ONE)
    assert {port.dtype for port in manifest.graphs["decoder"].inputs if port.name.startswith("past.")} == {"int8"}
    conversation = Conversation.open(Engine(tmp_path / "small", ONE), seed=0)
    events = list(conversation.reply([Text("hello")], Choices(max_new=4)))
    assert isinstance(events[-1], ReplyDone)


def test_the_command_says_what_it_wrote_and_inspect_how_it_remembers(floats: Path, tmp_path: Path) -> None:
    for command in (["quantize-cache", str(floats), "-o", str(tmp_path / "out")], ["inspect", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "kept as int8" in result.output


def test_what_cannot_be_done_is_refused_and_nothing_is_written(floats: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeOmniError, match="remembers in 8 bits already"):
        quantize_cache(small, tmp_path / "out")
    with pytest.raises(EdgeOmniError, match="is the bundle itself"):
        quantize_cache(floats, floats, force=True)
    cuda = tmp_path / "cuda"
    quantize_cache(floats, cuda, options=ONE)
    write_manifest(cuda, replace(read_bundle(floats), profile="cuda", files=read_bundle(cuda).files))
    with pytest.raises(EdgeOmniError, match="is for cuda"):
        quantize_cache(cuda, tmp_path / "out")
    assert not (tmp_path / "out").exists()
