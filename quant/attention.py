"""One graph: attention that remembers keys and values as floats becomes attention that remembers them in 8 bits."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant.rewrite import CONTRIB, Model

ATTENTION = "GroupQueryAttention"
PAST_KEY, PAST_VALUE = 3, 4  # places of its inputs
KEY_SCALE, VALUE_SCALE = 12, 13
INT8 = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}


def remember_in_8_bits(model: Model, scales: Mapping[str, NDArray[np.float32]]) -> None:
    """Let each attention of a decoder store what is new divided by `scales`, rounded, as int8.

    `scales` are named as the cache's ports without "past.", "LAYER.key" and "LAYER.value": what one step is worth,
    [1, kv_heads, 1, head_dim].
    """
    for node in list(model.graph):
        if node.domain == CONTRIB and node.op_type == ATTENTION:
            _remember(model, node, scales)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past.", "present.")):
            value.type = ir.TensorType(ir.DataType.INT8)


def _remember(model: Model, node: ir.Node, scales: Mapping[str, NDArray[np.float32]]) -> None:
    past = [node.inputs[place] for place in (PAST_KEY, PAST_VALUE)]
    names = [str(value.name).removeprefix("past.") for value in past if value is not None]
    key, value = (_initializer(model, f"cache.{name}.scale", scales[name]) for name in names)
    node.resize_inputs(VALUE_SCALE + 1)
    node.replace_input_with(KEY_SCALE, key)
    node.replace_input_with(VALUE_SCALE, value)
    for attribute in ir.convenience.convert_attributes(INT8):
        node.attributes.add(attribute)


def _initializer(model: Model, name: str, array: NDArray[np.float32]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value
