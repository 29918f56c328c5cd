"""Convert a language model's texts to tokens and back: begin token, prompt with the text, end token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from saffe_cache.core.features import CausalTextSpec


class CausalTokens:
    """Made from a cache's tokenizer, so that extraction and training tokenize texts in the same way."""

    def __init__(self, tokenizer: str, spec: CausalTextSpec) -> None:
        """`tokenizer`: its JSON, as the library `tokenizers` writes it."""
        self._tokenizer, self._spec = Tokenizer.from_str(tokenizer), spec
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; a long text is truncated before its end token.

        Lone surrogates, which tokenizers do not accept, become U+FFFD.
        """
        prompted = [without_surrogates(self._spec.prompt.replace("{}", text)) for text in texts]
        most, ends = self._spec.max_length - 2, (self._spec.begin_token, self._spec.end_token)
        encoded = self._tokenizer.encode_batch(prompted, add_special_tokens=False)
        return [[ends[0], *one.ids[:most], ends[1]] for one in encoded]

    @cached_property
    def start(self) -> list[int]:
        """The tokens at the start of every text: the begin token and the part of the prompt before the text."""
        prefix = self._spec.prompt.split("{}")[0].rstrip()
        return [self._spec.begin_token, *self._tokenizer.encode(prefix, add_special_tokens=False).ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens up to the first end token, without the begin token."""
        ids = list(token_ids)[1:] if token_ids and token_ids[0] == self._spec.begin_token else list(token_ids)
        if self._spec.end_token in ids:
            ids = ids[: ids.index(self._spec.end_token)]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
