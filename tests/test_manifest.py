"""A manifest that somebody changed is refused in words, or the bundle answers: nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import MANIFEST, read_bundle
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import BundleError, EdgeOmniError
from runtime.prompt import Text
from runtime.session import Options
from tests import tiny_llama

Place = tuple[str | int, ...]
ABSURD = (True, None, -1, 0, 1.5, 2**31, 2**63, 1e308, "", "x", "12", [], {}, [[]], {"a": 1}, "a" * 300)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama.bundle(), tmp_path / "bundle")


def change(bundle: Path, document: Any, place: Place, value: Any) -> None:
    """Write the document with `value` at one place."""
    document = json.loads(json.dumps(document))
    *way, last = place
    found = document
    for key in way:
        found = found[key]
    found[last] = value
    (bundle / MANIFEST).write_text(json.dumps(document))


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every key and the first two items of every list, each kind of port once."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("hidden_size",), 2**31, r"its sizes ask \[any, 2147483648\] of embed_tokens's rows, and the graph has \[any"),
        (("vocab_size",), 2**63, r"of lm_head's logits, and the graph has \[any, 260\]"),
        (("cache", "kv_heads"), 7, r"ask \[1, 7, any, 16\] of decoder's past\.0\.key, and the graph has \[1, 2, any"),
        (("cache", "head_dim"), 2**31, r"past\.0\.value, and the graph has \[1, 2, any, 16\]"),
        (("cache", "layers"), 2**31, "its cache has 2147483648 layers, the decoder 2"),
        (("hidden_size",), "32", "hidden_size: Input should be a valid integer"),
        (("known_tokens",), True, "known_tokens: Input should be a valid integer"),
        (("graphs", "decoder", "outputs"), [], "of decoder's hidden, and the graph has no such port"),
    ],
)
def test_sizes_that_the_graphs_do_not_have_are_refused_before_memory_is_taken_by_them(bundle, place, value, said):
    change(bundle, json.loads((bundle / MANIFEST).read_text()), place, value)
    with pytest.raises(BundleError, match=said):
        read_bundle(bundle)


@pytest.mark.slow
def test_every_place_with_every_absurd_value_is_refused_or_answers(bundle: Path) -> None:
    document = json.loads((bundle / MANIFEST).read_text())
    tried = 0
    for place in places(document):
        for value in ABSURD:
            change(bundle, document, place, value)
            try:
                engine = Engine(bundle, Options(threads=1))
                list(Conversation.open(engine, seed=0).reply([Text("hi")], Choices(max_new=2)))
            except EdgeOmniError as error:
                assert str(error), (place, value)
            tried += 1
    assert tried > 1000
