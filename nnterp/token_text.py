"""How one token reads, apart from the text around it."""

from __future__ import annotations

import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token's own text, space and bytes included; its number where there is no such token, or no tokenizer."""
    if tokenizer is None:
        return f"#{token}"
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token)
    # Some models have more rows in their unembedding than there are tokens.
    if not isinstance(piece, str):
        return text or f"#{token}"
    # Tokenizers after SentencePiece drop the space that begins a text, and a token alone is a text.
    if piece.startswith("\u2581"):
        return " " * (len(piece) - len(piece.lstrip("\u2581"))) + text.lstrip(" ")
    if "\ufffd" not in text:
        return text or f"#{token}"
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return piece
    table = _bytes_by_letter()
    if not all(letter in table for letter in piece):
        return text
    # What is no text comes out as single letters from U+DC80 to U+DCFF, one for each byte.
    decoded = bytes(table[letter] for letter in piece).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", decoded)


@lru_cache(maxsize=1)
def _bytes_by_letter() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable ones as they are, the others as letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
