"""English to learn from without a download: the sentences of Python's manual, as `pydoc_data.topics` holds them."""

import re

PLAIN = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
    }
)
PARAGRAPH_END = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"*(])")
LIST_MARKER = re.compile(r"^(\*|\d+\.)\s+")
MIN_LENGTH = 20
MIN_SHARE_OF_LETTERS = 0.8


def sentences_by_topic() -> dict[str, list[str]]:
    """Topics in alphabetical order with the sentences of each in reading order; no sentence comes twice.

    Many topics repeat parts of others: a sentence belongs to the longest topic that has it. The text differs between
    versions of Python.
    """
    from pydoc_data.topics import topics  # not in every slimmed-down Python, and half a megabyte

    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        found[topic] = list(dict.fromkeys(sentence for sentence in sentences(topics[topic]) if sentence not in seen))
        seen.update(found[topic])
    return {topic: found[topic] for topic in sorted(found)}


def sentences(text: str) -> list[str]:
    """The English sentences of a text, each on one line and in plain quotation marks, without code, tables, headings."""
    found = []
    for paragraph in PARAGRAPH_END.split(text.translate(PLAIN)):
        plain = LIST_MARKER.sub("", " ".join(paragraph.split()))
        found += [sentence for sentence in SENTENCE_END.split(plain) if _is_english(sentence)]
    return found


def _is_english(text: str) -> bool:
    if len(text) < MIN_LENGTH or text[-1] not in ".!?:" or "|" in text:
        return False
    return sum(character.isalpha() or character == " " for character in text) >= MIN_SHARE_OF_LETTERS * len(text)
