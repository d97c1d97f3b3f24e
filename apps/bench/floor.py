"""The floor of a decoder: a bundle with the same nodes and vocabulary whose every other width is that of one group.

What a token takes on it is what ONNX Runtime and Python spend around the arithmetic, and a little arithmetic.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from export.config import DecoderConfig
from export.decoder import decoder, embed_tokens, lm_head
from export.parity.full_audio_head import RandomWeights
from quant.quantize import quantize
from quant.scheme import parse_recipe
from runtime.bundle import GenerationDefaults, Graph, Manifest, describe_file, read_bundle, write_manifest
from runtime.errors import EdgeOmniError
from runtime.session import Options

WIDTH = 32
HEAD_DIM = 16


def write_floor(bundle: Path, out: Path) -> Path:
    """Write the floor of `bundle` below the folder `out`, quantized by the same recipe, and return its folder.

    EdgeOmniError if its decoder would not have the same kinds and numbers of nodes.
    """
    manifest = read_bundle(bundle)
    config = floor_config(bundle, manifest)
    folder = out / "float"
    folder.mkdir(parents=True)
    shutil.copyfile(bundle / manifest.tokenizer, folder / manifest.tokenizer)
    write_float(manifest, config, folder)
    if manifest.quantization is not None:
        recipe = parse_recipe(manifest.quantization.recipe, manifest.quantization.recipe_toml)
        quantize(folder, out / "quantized", recipe)
        folder = out / "quantized"
    found, expected = (node_kinds(at / manifest.graphs["decoder"].file) for at in (folder, bundle))
    if found != expected:
        raise EdgeOmniError(f"the floor's decoder has the nodes {found}, that of {bundle} {expected}")
    return folder


def floor_config(bundle: Path, manifest: Manifest) -> DecoderConfig:
    """The decoder's shape with narrow matrices; what the manifest does not tell is read from the graph."""
    graph = ir.load(bundle / manifest.graphs["decoder"].file).graph
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    quantized = manifest.quantization.quantized if manifest.quantization else ()
    width = max([WIDTH, *(weight.group_size for weight in quantized)])
    return DecoderConfig(
        vocab_size=manifest.vocab_size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=manifest.cache.layers,
        num_attention_heads=attention.attributes["num_heads"].as_int(),
        num_key_value_heads=manifest.cache.kv_heads,
        head_dim=HEAD_DIM,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=manifest.cache.max_positions,
        attention_qkv_bias=any(name.endswith("W_pack.bias") for name in graph.initializers),
    )


def write_float(manifest: Manifest, config: DecoderConfig, folder: Path) -> None:
    weights, graphs = RandomWeights(0), {}
    for author in (embed_tokens, decoder, lm_head):
        subgraph = author(config, "cpu")
        graphs[subgraph.name] = weights.open(subgraph, folder, Options(threads=1)).graph
    write_manifest(folder, narrowed(manifest, config, graphs, folder))


def narrowed(manifest: Manifest, config: DecoderConfig, graphs: dict[str, Graph], folder: Path) -> Manifest:
    """The manifest of a text decoder with the graphs given; their files lie in `folder`."""
    return replace(
        manifest,
        hidden_size=config.hidden_size,
        files=tuple(describe_file(folder, name) for name in sorted(path.name for path in folder.iterdir())),
        graphs=graphs,
        cache=replace(manifest.cache, head_dim=config.head_dim, dtype="float32"),
        generation=GenerationDefaults(text=manifest.generation.text),
        audio=None,
        image=None,
        video_frames=None,
        video=None,
        speech=None,
        quantization=None,
    )


def node_kinds(path: Path) -> dict[str, int]:
    """How many nodes of each kind a graph has."""
    kinds: dict[str, int] = {}
    for node in ir.load(path).graph:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return dict(sorted(kinds.items()))
