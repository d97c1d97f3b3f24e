"""A bundle's text decoder as a model folder for onnxruntime-genai: our three graphs in one, with that program's ports.

The nodes and the weights are ours, so that what differs is the loop around them. The head sees the last row alone, as
ours does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from quant.rewrite import open_graph, weights
from runtime.bundle import Manifest, read_bundle

INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32


def write_genai(bundle: Path, folder: Path) -> None:
    """Write model.onnx, its weights and genai_config.json into `folder`, which exists."""
    manifest = read_bundle(bundle)
    parts = {name: open_part(bundle, manifest, name) for name in ("embed_tokens", "decoder", "lm_head")}
    heads = next(node for node in parts["decoder"] if node.op_type == "GroupQueryAttention").attributes["num_heads"]
    ir.save(join(parts, manifest), folder / "model.onnx", external_data="model.data")
    config = genai_config(manifest, heads.as_int())
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def open_part(bundle: Path, manifest: Manifest, name: str) -> ir.Graph:
    """A graph with its weights in memory."""
    model = open_graph(bundle / manifest.graphs[name].file)
    for weight in weights(model):
        if weight.shape:
            weight.value.const_value = ir.tensor(weight.rows(0, weight.shape[0]), name=weight.name)
    return model.graph


def join(parts: dict[str, ir.Graph], manifest: Manifest) -> ir.Model:
    """input_ids [1, S], attention_mask [1, T] and caches -> logits [1, 1, vocab] of the last row, and caches."""
    ids = port("input_ids", INT64, [1, "sequence"])
    mask = port("attention_mask", INT64, [1, "total"])
    embed, decoder, head = parts["embed_tokens"], parts["decoder"], parts["lm_head"]
    between, lengths = lengths_of(mask)
    cut, last = last_row(decoder.outputs[0])
    connect(embed.inputs[0], ids)
    for value in list(decoder.inputs)[:3]:
        connect(value, {"inputs_embeds": embed.outputs[0], **lengths}[str(value.name)])
    connect(head.inputs[0], last)
    caches = list(decoder.inputs)[3:]
    for value in (*caches, *list(decoder.outputs)[1:]):
        value.name = genai_name(str(value.name))
    logits = head.outputs[0]
    logits.name, logits.shape = "logits", ir.Shape([1, 1, manifest.vocab_size])  # one row, which the loop asks for
    nodes, initializers = [*between], {}
    for graph, more in ((embed, []), (decoder, cut), (head, [])):
        nodes += [*taken(graph), *more]
        initializers |= dict(graph.initializers)
    outputs = [logits, *list(decoder.outputs)[1:]]
    for graph in (embed, decoder, head):
        graph.inputs.clear()
        graph.outputs.clear()
        graph.initializers.clear()
    whole = ir.Graph(
        [ids, mask, *caches], outputs, nodes=nodes, initializers=list(initializers.values()),
        opset_imports={"": 21, "com.microsoft": 1}, name="model",
    )  # fmt: skip
    return ir.Model(whole, ir_version=10)


def port(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def connect(old: ir.Value, new: ir.Value) -> None:
    """Let every node that reads `old` read `new`."""
    for node, place in tuple(old.uses()):
        node.replace_input_with(place, new)


def taken(graph: ir.Graph) -> list[ir.Node]:
    nodes = list(graph)
    graph.remove(nodes)
    return nodes


def genai_name(name: str) -> str:
    return name.replace("past.", "past_key_values.", 1) if name.startswith("past.") else name


def constant(name: str, values: list[int]) -> ir.Node:
    return named("Constant", [], name, {"value": ir.tensor(np.array(values, np.int64))})


def named(kind: str, inputs: list[ir.Value], output: str, attributes: dict[str, Any] | None = None) -> ir.Node:
    node = ir.node(kind, inputs, attributes or {})
    node.outputs[0].name = output
    return node


def lengths_of(mask: ir.Value) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """The two lengths that our attention takes, from the mask: of all positions, and of all but one."""
    one, axis, first = constant("one", [1]), constant("axis", [1]), constant("first", [1])
    shape = named("Shape", [mask], "mask_shape")
    total = named("Gather", [shape.outputs[0], first.outputs[0]], "total_1", {"axis": 0})
    scalar = named("Squeeze", [total.outputs[0]], "total_0")
    whole = named("Cast", [scalar.outputs[0]], "total_sequence_length", {"to": INT32.value})
    counted = named("ReduceSum", [mask, axis.outputs[0]], "counted", {"keepdims": 0})
    less = named("Sub", [counted.outputs[0], one.outputs[0]], "less")
    seqlens = named("Cast", [less.outputs[0]], "seqlens_k", {"to": INT32.value})
    nodes = [one, axis, first, shape, total, scalar, whole, counted, less, seqlens]
    return nodes, {"total_sequence_length": whole.outputs[0], "seqlens_k": seqlens.outputs[0]}


def last_row(hidden: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """hidden [1, S, width] -> [1, 1, width]."""
    bounds = [constant(name, values) for name, values in (("from", [-1]), ("to", [2**31]), ("along", [1]))]
    cut = named("Slice", [hidden, *(bound.outputs[0] for bound in bounds)], "last_row")
    return [*bounds, cut], cut.outputs[0]


def genai_config(manifest: Manifest, heads: int) -> dict[str, Any]:
    cache = manifest.cache
    sides = {side: f"past_key_values.%d.{side}" for side in ("key", "value")}
    return {
        "model": {
            "type": "llama",
            "vocab_size": manifest.vocab_size,
            "context_length": cache.max_positions,
            "bos_token_id": 0,
            "eos_token_id": manifest.vocab_size - 1,  # it must be one, and this is seldom chosen
            "pad_token_id": 0,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "hidden_size": manifest.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": cache.kv_heads,
                "num_hidden_layers": cache.layers,
                "head_size": cache.head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": sides["key"],
                    "past_value_names": sides["value"],
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": cache.max_positions, "do_sample": False, "past_present_share_buffer": True},
    }
