"""Tokens beyond the model's embeddings are named, and never pad."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer

from sppctl.data import vocabulary
from sppctl.errors import UserError


def test_a_token_beyond_the_embeddings_is_named() -> None:
    tokenizer = byte_tokenizer()  # 0 to 258
    tokenizer.add_tokens(["<image>"])
    assert tokenizer("a<image>").input_ids[-1] == 259
    for tokens in (torch.tensor([[5, 259], [1, 2]]), [5, 259]):
        vocabulary.check(tokens, tokenizer, 260, "here")
        with pytest.raises(UserError, match=r"^here: token id 259 \('<image>'\) .* the model's 259 embeddings; use"):
            vocabulary.check(tokens, tokenizer, 259, "here")
    vocabulary.check([], tokenizer, 1, "here")
    vocabulary.check(torch.tensor([], dtype=torch.int64), tokenizer, 1, "here")


def test_only_a_tokenizer_that_may_exceed_the_embeddings_costs_a_look_at_all_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert not vocabulary.may_exceed(tokenizer, 259)
    assert vocabulary.may_exceed(tokenizer, 258)
    assert vocabulary.may_exceed(SimpleNamespace(), 258)


@pytest.mark.parametrize(
    ("pad", "eos", "unk", "expected"), [(7, 3, 1, 7), (10, 3, 1, 3), (None, 10, 1, 1), (None, None, None, 0)]
)
def test_padding_is_what_the_model_embeds(pad: int | None, eos: int | None, unk: int | None, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos, unk_token_id=unk)
    assert vocabulary.pad_token_id(tokenizer, 10) == expected
