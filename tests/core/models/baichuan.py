"""Baichuan in plain torch, written from its papers for comparison: transformers has no such model of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

SECOND = 125_696  # tokens of Baichuan2, which norms the rows of its output layer


class BaichuanConfig(PretrainedConfig):
    """Sizes as keywords; `max_position_embeddings` of None means linear biases, as in the models of 13B."""

    model_type = "baichuan"


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.rotary = config.num_attention_heads, config.max_position_embeddings is not None
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.W_pack(x).chunk(3, -1))
        seen = torch.ones(s, s, dtype=torch.bool).tril()
        bias = torch.zeros(self.heads, 1, s)
        if self.rotary:
            q, k = _turned(q), _turned(k)
        else:
            bias = _get_alibi_slopes(self.heads, x.device)[:, None, None] * torch.arange(s)  # of the key alone
        scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~seen, float("-inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _turned(x: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of a head [b, n, s, d] as a complex number."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


class _FeedForward(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class BaichuanForCausalLM(PreTrainedModel):
    """Tokens [b, s] to logits [b, s, v]."""

    config_class = BaichuanConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def forward(self, tokens: Tensor) -> Any:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        rows = self.lm_head.weight
        if len(rows) == SECOND:
            rows = rows / rows.square().sum(1, keepdim=True).sqrt()
        return SimpleNamespace(logits=self.model.norm(x) @ rows.T)
