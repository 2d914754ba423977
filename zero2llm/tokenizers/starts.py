"""What stands before a text: in ours the document's token; elsewhere what the file's post-processor puts there, often nothing.

A conversation is another matter: its template writes all that it begins with.
"""

from __future__ import annotations

from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing


def text_start(library: Library) -> list[int]:
    """The ids that stand in front of any text, as other programs would have them."""
    asked = library.encode("a", add_special_tokens=True)
    first = next((i for i, control in enumerate(asked.special_tokens_mask) if not control), 0)
    return asked.ids[:first]


def begin_with(library: Library, token: str) -> None:
    """From now on a text begins with ``token``, which transformers and llama.cpp then put there too."""
    library.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, library.token_to_id(token))])
