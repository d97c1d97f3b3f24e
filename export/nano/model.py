"""Baichuan-Omni-1.5 in torch, module and parameter names equal to the official state dict, every size from config.json.

This is the model that the training stages train, and the full-precision reference for quantization. It is not the
runtime: nothing is streamed, and generation recomputes no more than it must but aims at clarity.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export.nano.audio_tokenizer import AudioBridge, AudioDecoder, AudioEncoder, RMSNorm
from export.nano.config import ModelConfig, read_config
from export.nano.flow_matching import FlowMatchingDecoder
from export.nano.language import AudioHead, Cache, DecoderLayer, rotary
from export.nano.vision import VisionModel, VisualBridge
from export.nano.vocoder import HiFT


class AudioTokenizer(nn.Module):
    """Everything between log-mel, codes and output mel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pool = config.audio.avg_pooler
        self.audio_model = AudioEncoder(config.audio)
        self.audio_bridge_model = AudioBridge(config.audio)
        self.audio_decoder = AudioDecoder(config)
        self.audio_flow_matching_decoder = FlowMatchingDecoder(config.flow, config.prenet_positions)

    @torch.no_grad()
    def encode(self, mel: Tensor) -> Tensor:
        """Log-mel [bins, F] of one segment -> codes [F / 2 / pool rounded down, levels]."""
        frames = (mel.shape[1] - 1) // 2 + 1
        hidden = self.audio_model(mel[None], torch.tensor([frames]))
        return self.audio_bridge_model.encode(self.audio_bridge_model.pooled(hidden)[0, : frames // self.pool])

    def hidden(self, codes: Tensor) -> Tensor:
        """Codes [batch, L, levels] -> the audio decoder's hidden states [batch, 4 L - 1, d_model]."""
        bridge = self.audio_bridge_model
        return self.audio_decoder(bridge.proj_decoder(bridge.decode(codes)))

    def condition(self, codes: Tensor) -> Tensor:
        """Codes -> mu [batch, mel bins, T], the mel that flow matching is conditioned on."""
        return self.audio_flow_matching_decoder.prenet(self.hidden(codes)).transpose(1, 2)

    @torch.no_grad()
    def mel(self, codes: Tensor, noise: Tensor) -> Tensor:
        """Codes [batch, L, levels] and noise [batch, mel bins, T] -> mel like the noise."""
        return self.audio_flow_matching_decoder.sample(self.condition(codes), noise)


class OmniDecoder(nn.Module):
    """Embeddings of all kinds, the vision tower and the text decoder (official prefix `model.`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.decoder
        self.config = config
        self.visual_model = VisionModel(config.vision)
        self.visual_bridge_model = VisualBridge(config.vision)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.audio_embed_layers = nn.ModuleList(nn.Embedding(n + 1, c.hidden_size) for n in config.codebook_sizes)

    def embed_audio(self, codes: Tensor) -> Tensor:
        """Codes [..., levels] -> the sum of their embeddings [..., hidden]."""
        rows = [layer(codes[..., i]) for i, layer in enumerate(self.audio_embed_layers)]
        return torch.stack(rows).sum(0)

    def embed_images(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Patches -> token embeddings [..., patches / merge^2, hidden]."""
        return self.visual_bridge_model(self.visual_model(patches, grids))

    def embed(self, ids: Tensor, codes: Tensor | None = None, pictures: Tensor | None = None) -> Tensor:
        """Token ids [batch, T] -> rows [batch, T, hidden]; rows at audio pads come from `codes` [n, levels], at image
        and video pads from `pictures` [m, hidden], both in order of appearance."""
        rows = self.embed_tokens(ids)
        if codes is not None:
            heard = ids == self.config.audio.audio_pad_token_id
            rows = rows.masked_scatter(heard[..., None], self.embed_audio(codes))
        if pictures is not None:
            seen = torch.isin(ids, torch.tensor(self.config.picture_tokens))
            rows = rows.masked_scatter(seen[..., None], pictures)
        return rows

    def forward(
        self,
        rows: Tensor,
        positions: Tensor,
        past: Cache | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Rows [batch, T, hidden] at positions [T] or [batch, T] -> normalised hidden states, keys and values.

        `bias` [batch, 1, T, T] is added to all attention scores where several sequences share a row (without a past).
        """
        c = self.config.decoder
        cos, sin = rotary(positions, c.head_dim, c.rope_theta)
        kept: Cache = []
        for i, layer in enumerate(self.layers):
            rows, pair = layer(rows, cos, sin, past[i] if past else None, bias)
            kept.append(pair)
        return self.norm(rows), kept


class Omni(nn.Module):
    """The whole checkpoint; the vocoder has a file of its own, officially hift.pt."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.decoder
        self.config = config
        self.model = OmniDecoder(config)
        self.audio_tokenizer = AudioTokenizer(config)
        self.audio_head = AudioHead(c.hidden_size, config.audio.audio_head_transformer_layers, config.codebook_sizes)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def depth_inputs(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Hidden [n, dim] and the codes before each depth [n, levels - 1 or fewer] -> inputs [n, 1 + those, dim]."""
        rows = [layer(codes[:, i]) for i, layer in enumerate(self.model.audio_embed_layers[: codes.shape[1]])]
        earlier = torch.stack(rows, 1).cumsum(1) if rows else hidden.new_zeros(len(hidden), 0, hidden.shape[1])
        return torch.cat([hidden[:, None], earlier], 1)

    def frame_logits(self, hidden: Tensor, codes: Tensor) -> list[Tensor]:
        """Teacher-forced logits of all levels for frames with these codes [n, levels]."""
        return self.audio_head.logits(self.audio_head(self.depth_inputs(hidden, codes[:, :-1])))

    @torch.no_grad()
    def greedy_frame(self, hidden: Tensor) -> Tensor:
        """Codes [levels] of one frame from a hidden state [dim]; code 0 equal to its codebook's size ends the audio."""
        codes = torch.zeros(1, 0, dtype=torch.long)
        for level in range(len(self.config.codebook_sizes)):
            logits = self.audio_head.logits(self.audio_head(self.depth_inputs(hidden[None], codes)))[level]
            choice = (logits if level == 0 else logits[:, :-1]).argmax(-1)
            codes = torch.cat([codes, choice[:, None]], 1)
        return codes[0]


# Running statistics of the codebooks: in every official file, used by no computation, left out of small ones.
STATISTICS = ("codebook.embed_avg", "codebook.cluster_size")


def load_checkpoint(folder: Path) -> tuple[Omni, HiFT]:
    """Load a checkpoint folder of the official layout in float32.

    Raises:
        RuntimeError: tensors are left over, or others than `STATISTICS` are missing; all are named.
    """
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(path).items()}
    model, vocoder = Omni(config), HiFT(config.vocoder)
    absent = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(STATISTICS)}
    model.load_state_dict(absent | tensors)
    vocoder.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "hift.safetensors").items()})
    return model.eval(), vocoder.eval()
