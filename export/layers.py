"""The small parts that every component is made of; an attribute's name is the checkpoint's name."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from export.graph import FLOAT, FLOAT16, cast, contrib, ints, scalar

Value = ir.Value
MISH_LIMIT = {FLOAT: 20.0, FLOAT16: 5.0}


class Linear(nn.Module):
    """y = x W^T + b with the weight as checkpoints store it, [out, in]: it may stay in the checkpoint's own bytes.

    FusedMatMul reads a transposed second factor at the speed of MatMul (measured: equal within 2 % at 1 to 512 rows).
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = True, dtype: ir.DataType = FLOAT):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter([n_out, n_in], dtype)
        self.bias = nn.Parameter([n_out], dtype) if bias else None

    def forward(self, op: Any, x: Value) -> Value:
        y = contrib(op, "FusedMatMul", x, self.weight, transB=1, dtype=self.dtype)
        return y if self.bias is None else op.Add(y, self.bias)


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int, dtype: ir.DataType = FLOAT):
        super().__init__()
        self.weight = nn.Parameter([rows, width], dtype)

    def forward(self, op: Any, ids: Value) -> Value:
        return op.Gather(self.weight, ids, axis=0)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * w; the statistics are fp32 in every profile (stash_type 1)."""

    def __init__(self, width: int, eps: float, dtype: ir.DataType = FLOAT):
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.weight = nn.Parameter([width], dtype)

    def forward(self, op: Any, x: Value) -> Value:
        y = op.SimplifiedLayerNormalization(x, self.weight, axis=-1, epsilon=self.eps, stash_type=1)
        y.type = ir.TensorType(self.dtype)
        return y


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5, dtype: ir.DataType = FLOAT):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter([width], dtype)
        self.bias = nn.Parameter([width], dtype)

    def forward(self, op: Any, x: Value) -> Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.eps, stash_type=1)


class NarrowingNorm(LayerNorm):
    """LayerNorm of an fp32 residual stream, in fp32; its result has the type in which the next matrix multiplies."""

    def __init__(self, width: int, eps: float = 1e-5, dtype: ir.DataType = FLOAT):
        super().__init__(width, eps)
        self.narrow = dtype

    def forward(self, op: Any, x: Value) -> Value:
        return cast(op, super().forward(op, x), self.narrow)


class Conv1d(nn.Module):
    """[1, in, T] -> [1, out, T']; `padding` zeros on the left and on the right."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        dilation: int = 1,
        bias: bool = True,
        dtype: ir.DataType = FLOAT,
    ):
        super().__init__()
        self.attributes = {"strides": [stride], "pads": list(padding), "dilations": [dilation]}
        self.weight = nn.Parameter([n_out, n_in, kernel], dtype)
        self.bias = nn.Parameter([n_out], dtype) if bias else None

    def forward(self, op: Any, x: Value) -> Value:
        return op.Conv(x, self.weight, *([] if self.bias is None else [self.bias]), **self.attributes)


class SelfAttention(nn.Module):
    """Whisper's attention: q, v and out have a bias, k has none; causal with carried keys and values when asked.

    x [1, T, width]; past_key, past_value [1, heads, P, head_dim]. Returns y, or (y, present_key, present_value).
    """

    def __init__(self, width: int, heads: int, causal: bool = False, dtype: ir.DataType = FLOAT):
        super().__init__()
        self.heads, self.causal, self.dtype = heads, causal, dtype
        self.k_proj = Linear(width, width, bias=False, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.q_proj = Linear(width, width, dtype=dtype)
        self.out_proj = Linear(width, width, dtype=dtype)

    def forward(self, op: Any, x: Value, past: tuple[Value, Value] | None = None) -> Any:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        attend: dict[str, Any] = {"num_heads": self.heads, "unidirectional": int(self.causal), "dtype": self.dtype}
        if past is None:
            return self.out_proj(op, contrib(op, "MultiHeadAttention", q, k, v, **attend))
        y, key, value = contrib(op, "MultiHeadAttention", q, k, v, None, None, None, *past, _outputs=3, **attend)
        return self.out_proj(op, y), key, value


class TransformerLayer(nn.Module):
    """Whisper's pre-norm layer: x += attention(norm(x)); x += fc2(gelu(fc1(norm(x)))). `norm()` makes each norm.

    Returns x, and with a past also the layer's present key and value.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_dim: int,
        norm: Callable[[], nn.Module],
        causal: bool = False,
        dtype: ir.DataType = FLOAT,
    ):
        super().__init__()
        self.self_attn_layer_norm = norm()
        self.self_attn = SelfAttention(width, heads, causal, dtype)
        self.final_layer_norm = norm()
        self.fc1 = Linear(width, ffn_dim, dtype=dtype)
        self.fc2 = Linear(ffn_dim, width, dtype=dtype)

    def forward(self, op: Any, x: Value, past: tuple[Value, Value] | None = None) -> Any:
        y = self.self_attn(op, self.self_attn_layer_norm(op, x), past)
        y, *present = y if past is not None else (y,)
        x = residual(op, x, y)
        x = residual(op, x, self.fc2(op, gelu(op, self.fc1(op, self.final_layer_norm(op, x)))))
        return (x, *present) if present else x


def residual(op: Any, x: Value, y: Value) -> Value:
    """x + y in the type of x, which may be wider than y's."""
    return op.Add(x, y if x.type is None else cast(op, y, x.type.dtype))


class Stage(nn.Module):
    """A function as a module, for a place in nn.Sequential that has no parameters."""

    def __init__(self, function: Callable[[Any, Value], Value]):
        super().__init__()
        self.function = function

    def forward(self, op: Any, x: Value) -> Value:
        return self.function(op, x)


def gelu(op: Any, x: Value) -> Value:
    """Exact (erf) GELU."""
    return op.Gelu(x, approximate="none")


def silu(op: Any, x: Value) -> Value:
    return op.Mul(x, op.Sigmoid(x))


def quick_gelu(op: Any, x: Value, dtype: ir.DataType = FLOAT) -> Value:
    """x * sigmoid(1.702 x)."""
    return contrib(op, "QuickGelu", x, alpha=1.702, dtype=dtype)


def mish(op: Any, x: Value, dtype: ir.DataType = FLOAT) -> Value:
    """x * tanh(softplus(x)) = x * n / (n + 2) with n = e^x (e^x + 2); the ONNX operator of that name has no kernel.

    Softplus is three times as slow as this. Above the limit the factor is 1 in its type and e^2x might be too large.
    """
    e = op.Exp(op.Min(x, scalar(op, MISH_LIMIT[dtype], dtype)))
    n = op.Mul(e, op.Add(e, scalar(op, 2.0, dtype)))
    return op.Mul(x, op.Div(n, op.Add(n, scalar(op, 2.0, dtype))))


def split_last(op: Any, x: Value, *sizes: int) -> tuple[Value, ...]:
    """Split the last axis into pieces of the given sizes."""
    return op.Split(x, ints(op, *sizes), axis=-1, _outputs=len(sizes))
