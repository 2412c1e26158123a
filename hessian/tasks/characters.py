"""A fixed vocabulary of characters: what the language model reads and writes, whatever the text holds."""

import torch

OTHER = "\N{REPLACEMENT CHARACTER}"
CHARACTERS = OTHER + "\n abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

_SYMBOLS = {character: symbol for symbol, character in enumerate(CHARACTERS)}


def encode(text: str) -> torch.Tensor:
    """The text as (len(text),) int64 symbols, indices into CHARACTERS; 0 where a character is not in it."""
    return torch.tensor([_SYMBOLS.get(character, 0) for character in text], dtype=torch.int64)


def decode(symbols: torch.Tensor) -> str:
    """The text of (T,) symbols; OTHER stands for what `encode` did not know."""
    return "".join(CHARACTERS[symbol] for symbol in symbols.tolist())
