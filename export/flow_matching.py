"""Flow matching: decoder states -> prenet -> condition mu, and one Euler step of the flow from noise to mel."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import FlowMatchingConfig
from export.graph import (
    FLOAT,
    Subgraph,
    author,
    carried,
    cast,
    compute_dtype,
    constant,
    ints,
    port_dtype,
    scalar,
    tap,
)
from export.layers import Linear, RMSNorm, Stage, TransformerLayer, silu
from export.unet import PREFIX, TAIL, ConditionalDecoder, Context, derivations, tail_widths, time_steps
from runtime.bundle import Port, Profile
from runtime.errors import CheckpointError

PRENET_EPS = 1e-6
IN_MLP_RATIO = 4  # of the prenet's first MLP to its width
CHUNK_FRAMES = 100  # attention looks ahead to the end of its own chunk; counted from the segment's start
BRANCHES = 2  # with the condition and without, side by side in one batch
MASKED = -1e4  # added to a score: exp() of it is 0 in fp32, and fp16 can hold it


class Prenet(nn.Module):
    """A causal transformer without positions: states [1, T, prenet_in_dim] -> mu [1, T, prenet_out_dim]."""

    def __init__(self, config: FlowMatchingConfig, dtype: ir.DataType):
        super().__init__()
        width, wide = config.prenet_d_model, IN_MLP_RATIO * config.prenet_d_model
        self.dtype = dtype
        self.in_mlp = nn.Sequential(
            Linear(config.prenet_in_dim, wide, dtype=dtype), Stage(silu), Linear(wide, width, dtype=dtype)
        )
        self.transformer_layers = nn.ModuleList([_prenet_layer(config, dtype) for _ in range(config.prenet_nlayers)])
        self.final_norm = RMSNorm(width, PRENET_EPS, dtype)
        self.out_proj = Linear(width, config.prenet_out_dim, bias=False, dtype=dtype)

    def forward(self, op: Any, hidden: ir.Value, *pasts: ir.Value) -> list[ir.Value]:
        x, present = self.in_mlp(op, cast(op, hidden, self.dtype)), []
        for index, layer in enumerate(self.transformer_layers):
            x, key, value = layer(op, x, pasts[2 * index : 2 * index + 2])
            tap(x, f"{PREFIX}.prenet.transformer_layers.{index}.out")
            present += [key, value]
        return [cast(op, self.out_proj(op, self.final_norm(op, x)), FLOAT), *present]


def _prenet_layer(config: FlowMatchingConfig, dtype: ir.DataType) -> nn.Module:
    def norm() -> RMSNorm:
        return RMSNorm(config.prenet_d_model, PRENET_EPS, dtype)

    return TransformerLayer(
        config.prenet_d_model, config.prenet_attention_heads, config.prenet_ffn_dim, norm, causal=True, dtype=dtype
    )


def flow_prenet(config: FlowMatchingConfig, profile: Profile) -> Subgraph:
    """hidden [1, T, prenet_in_dim] -> mu [1, T, prenet_out_dim]; causal, keys and values carried.

    Raises CheckpointError for the older arrangement, whose prenet takes a mel spectrogram.
    """
    if not config.use_hidden_states_before_dconv2:
        raise CheckpointError(
            "flow_matching_config.use_hidden_states_before_dconv2 is false, expected true: "
            "a prenet on the refined mel of the audio decoder's second half is not supported"
        )
    dtype = compute_dtype(profile)
    cache = (1, config.prenet_attention_heads, "past", config.prenet_d_model // config.prenet_attention_heads)
    states = [
        Port(f"{i}.{side}", port_dtype(dtype), cache) for i in range(config.prenet_nlayers) for side in ("key", "value")
    ]
    inputs = [Port("hidden", "float32", (1, "frames", config.prenet_in_dim)), *carried("past", states)]
    outputs = [Port("mu", "float32", (1, "frames", config.prenet_out_dim)), *carried("present", states)]
    return author("flow_prenet", Prenet(config, dtype), inputs, outputs, prefix=f"{PREFIX}.prenet")


class EulerStep(nn.Module):
    """x + dt * ((1 + rate) * v(x, mu) - rate * v(x, 0)), both velocities in one batch."""

    def __init__(self, config: FlowMatchingConfig, dtype: ir.DataType):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.conditional_decoder = ConditionalDecoder(config, dtype)

    def forward(self, op: Any, x: ir.Value, mu: ir.Value, step: ir.Value, *states: ir.Value) -> list[ir.Value]:
        n_tails = len(tail_widths(self.config))
        tails, pasts = states[:n_tails], states[n_tails:]
        frames = op.Transpose(x, perm=[0, 2, 1])  # [1, T, mel bins]
        context = Context(step, chunk_mask(op, frames, pasts[0], self.dtype), tails, pasts)
        v = self.conditional_decoder(op, cast(op, self.branches(op, frames, mu), self.dtype), context)
        v = op.Transpose(self.guided(op, cast(op, v, FLOAT)), perm=[0, 2, 1])
        dt = op.Gather(constant(op, np.diff(time_steps(self.config)), "flow_estimator.dt"), step, axis=0)
        return [op.Add(x, op.Mul(v, dt)), *context.tails, *context.presents]

    def branches(self, op: Any, frames: ir.Value, mu: ir.Value) -> ir.Value:
        """[x, mu] and [x, 0]: [2, T, mel bins + mu]."""
        nothing = op.Expand(scalar(op, 0.0), op.Shape(mu))
        return op.Concat(op.Concat(frames, mu, axis=-1), op.Concat(frames, nothing, axis=-1), axis=0)

    def guided(self, op: Any, v: ir.Value) -> ir.Value:
        """Classifier-free guidance (Ho and Salimans, 2022): [2, T, mel bins] -> [1, T, mel bins]."""
        rate = self.config.cfm_params.inference_cfg_rate
        conditional, unconditional = op.Split(v, axis=0, num_outputs=BRANCHES, _outputs=BRANCHES)
        return op.Sub(op.Mul(conditional, scalar(op, 1 + rate)), op.Mul(unconditional, scalar(op, rate)))


def chunk_mask(op: Any, x: ir.Value, past: ir.Value, dtype: ir.DataType) -> ir.Value:
    """[1, 1, T, P + T] to add to the scores: a frame sees all before it and the rest of its own chunk of 100.

    Frames count from the segment's start, of which `past` [.., P, ..] has been run; x [1, T, ..]. What later runs will
    bring cannot be seen: the result is that of one whole run only if runs end where chunks end, else it is near it.
    """
    sizes = ((past, 2), (x, 1))
    before, own = (op.Gather(op.Shape(value), op.Constant(value_int=axis), axis=0) for value, axis in sizes)
    total, one, chunk = op.Add(before, own), op.Constant(value_int=1), op.Constant(value_int=CHUNK_FRAMES)
    keys = op.Range(op.Constant(value_int=0), total, one)
    queries = op.Unsqueeze(op.Range(before, total, one), ints(op, 1))
    chunk_ends = op.Mul(op.Add(op.Div(queries, chunk), one), chunk)
    mask = op.Where(op.Less(keys, chunk_ends), scalar(op, 0.0, dtype), scalar(op, MASKED, dtype))
    return op.Unsqueeze(mask, ints(op, 0, 1))


def flow_estimator(config: FlowMatchingConfig, profile: Profile) -> Subgraph:
    """One Euler step: x [1, mel bins, T], mu [1, T, mel bins], step [] -> x_next [1, mel bins, T].

    Carried, for each step apart: the tails of the convolutions, and keys and values of both branches in one batch.
    State costs 0.46 MB a frame and step at full size. Leaving it out of the graph would save a run over 400 frames
    170 MB of its 250 MB, but a second graph would cost 284 MB of weights: segments are run in chunks of 100 frames.
    Raises CheckpointError where the config asks for another solver or schedule of times.
    """
    dtype = compute_dtype(profile)
    _check(config)
    states = _estimator_states(config, dtype)
    mel, root = (1, config.in_channels, "frames"), EulerStep(config, dtype)
    mu, step = Port("mu", "float32", (1, "frames", config.prenet_out_dim)), Port("step", "int64", ())
    inputs = [Port("x", "float32", mel), mu, step, *carried("past", states)]
    outputs = [Port("x_next", "float32", mel), *carried("present", states)]
    return author("flow_estimator", root, inputs, outputs, prefix=PREFIX, derived=derivations(root))


def _estimator_states(config: FlowMatchingConfig, dtype: ir.DataType) -> list[Port]:
    kind, blocks = port_dtype(dtype), config.n_blocks * (2 + config.num_mid_blocks)
    cache = (BRANCHES, config.num_heads, "past", config.attention_head_dim)
    tails = [Port(f"tail.{j}", kind, (BRANCHES, TAIL, width)) for j, width in enumerate(tail_widths(config))]
    return [*tails, *(Port(f"{i}.{side}", kind, cache) for i in range(blocks) for side in ("key", "value"))]


def _check(config: FlowMatchingConfig) -> None:
    problems: list[str] = []
    if config.cfm_params.solver != "euler":
        problems.append(f"solver {config.cfm_params.solver!r}, expected 'euler'")
    if config.cfm_params.t_scheduler not in ("cosine", "linear"):
        problems.append(f"t_scheduler {config.cfm_params.t_scheduler!r}, expected 'cosine' or 'linear'")
    if problems:
        raise CheckpointError("flow_matching_config.cfm_params cannot be exported: " + "; ".join(problems))
