"""Causal transformer language model. Axes in names: B samples, T positions, C width, H heads, V vocabulary."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.optimizers import leave_to_adam
from layerwise.sections import TransformerLm

INITIAL_DEVIATION = 0.02


class LmEmbedding(nn.Module):
    """Tokens ``[B, T]`` (any integer dtype) to ``[B, T, C]``: token and position embeddings, dropout."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        leave_to_adam(self.tokens.weight, self.positions.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """See the class."""
        length = tokens_BT.shape[1]
        hidden_BTC = self.tokens(tokens_BT.long()) + self.positions.weight[:length]
        outputs: Tensor = self.dropout(hidden_BTC)
        return outputs


class LmBlock(nn.Module):
    """Causal self-attention and a feed-forward part with GELU, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        hidden_BTC = hidden_BTC + self.dropout(self._attention(self.attention_norm(hidden_BTC)))
        expanded = functional.gelu(self.expand(self.feed_forward_norm(hidden_BTC)))
        outputs: Tensor = hidden_BTC + self.dropout(self.contract(expanded))
        return outputs

    def _attention(self, hidden_BTC: Tensor) -> Tensor:
        samples, length, width = hidden_BTC.shape
        split = self.query_key_value(hidden_BTC).view(samples, length, 3, self.heads, width // self.heads)
        query_BHTD, key_BHTD, value_BHTD = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTD = functional.scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, is_causal=True)
        outputs: Tensor = self.attention_output(mixed_BHTD.transpose(1, 2).reshape(samples, length, width))
        return outputs


class LmHead(nn.Module):
    """``[B, T, C] -> [B, T, V]``: LayerNorm and a linear map to logits."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary, bias=False)
        leave_to_adam(self.linear.weight)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        """See the class."""
        logits_BTV: Tensor = self.linear(self.norm(hidden_BTC))
        return logits_BTV


def build_transformer_lm(spec: TransformerLm, vocabulary: int) -> list[nn.Module]:
    """Embedding, ``spec.layers`` blocks, head; what adds to the residual stream starts smaller the more there is."""
    layers: list[nn.Module] = [LmEmbedding(vocabulary, spec.context, spec.width, spec.dropout)]
    blocks = [LmBlock(spec.width, spec.heads, spec.expansion, spec.dropout) for _ in range(spec.layers)]
    layers.extend(blocks)
    layers.append(LmHead(spec.width, vocabulary))
    with torch.no_grad():
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, INITIAL_DEVIATION)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        for block in blocks:
            for linear in (block.attention_output, block.contract):
                linear.weight.div_(sqrt(2 * spec.layers))
    return layers
