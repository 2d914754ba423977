"""Control tokens: strings that no text can spell. They come first, so their ids do not move with the vocabulary size."""

from __future__ import annotations

DOCUMENT = "<|endoftext|>"  # starts and ends a document
PAD = "<|pad|>"  # never the end token: a masked end would never be learned
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIALS = (DOCUMENT, PAD, TURN_START, TURN_END)
