"""Whether a tokenizer's tokens are within the model's embeddings, and the token to pad with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sppctl.errors import UserError


def embeddings(model: Any) -> int:
    """Number of rows of a model's embedding: valid token ids are below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def may_exceed(tokenizer: Any, rows: int) -> bool:
    """Whether any token id of a tokenizer is beyond that many embeddings; also true if its vocabulary is unknown."""
    try:
        return max(tokenizer.get_vocab().values(), default=-1) >= rows
    except (AttributeError, NotImplementedError):
        return True


def check(tokens: Tensor | Iterable[int], tokenizer: Any, rows: int, where: str) -> None:
    """Raises UserError if a token id is beyond the ``rows`` of the model's embedding.

    ``where``: configuration key and name of the tokens' source, for the error.
    """
    largest = int(tokens.max()) if isinstance(tokens, Tensor) and tokens.numel() else max(tokens, default=-1)
    if largest >= rows:
        raise UserError(
            where,
            f"token id {largest:,} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the tokenizer is beyond the "
            f"model's {rows:,} embeddings",
            "use the tokenizer that the model was trained with, or resize the model's embeddings",
        )


def pad_token_id(tokenizer: Any, rows: int) -> int:
    """A token to pad with: the tokenizer's own if the model embeds it, else any; padding is masked anyway."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((token for token in candidates if token is not None and token < rows), 0)
