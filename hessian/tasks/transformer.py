"""A small decoder-only transformer (Vaswani et al. 2017; pre-norm as in Radford et al. 2019) for sequences of symbols."""

import torch
from torch import nn


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it: (N, T, width) to (N, T, width)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, H, T, width / H)
        query, key, value = heads.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention between positions, then a GELU network within each; both read normalised inputs and add to them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Predicts each next symbol from those before it, with learned positions and no dropout.

    Input (N, T) int64 symbols, T at most `context`; output (N, num_symbols, T) logits, the layout that
    `nn.CrossEntropyLoss` takes with (N, T) targets.
    """

    def __init__(self, num_symbols: int, context: int, width: int = 128, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_symbols)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # Radford et al. 2019, section 2.3: the residual stream keeps its scale in depth
                into_the_stream = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if into_the_stream else 0.02)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.blocks(self.symbols(symbols) + self.positions(positions))
        return self.head(self.norm(x)).transpose(1, 2)
