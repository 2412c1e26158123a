"""A classifier of sentences: any encoder of tokens, its outputs averaged over the sentence, and a linear head."""

import torch
from torch import nn

PADDING = 0


class SentenceClassifier(nn.Module):
    """An encoder of the `transformers` package with mean pooling and a linear head.

    Input (N, T) int64 tokens, PADDING after each sentence; output (N, num_classes) logits. Padding changes nothing.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean of the encoder's outputs over each sentence's tokens: (N, T) int64 to (N, width)."""
        mask = (tokens != PADDING).long()
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
