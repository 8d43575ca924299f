"""The border between attention and MLP: found in every family that has one, and what a plain forward has there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, SMALL
from transformers import AutoModelForCausalLM

from sppctl.model.blocks import Decoder

READERS = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",  # norms before and after both
    "opt": "final_layer_norm",
    "mistral": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "phi3": "post_attention_layernorm",
    "gpt2": "ln_2",
    "mixtral": "post_attention_layernorm",
    "qwen3_moe": "post_attention_layernorm",
    "gpt_neox": None,  # in parallel
}
MORE = {
    "gpt_neox in turn": (lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=False), READERS["llama"]),
    "olmo2": (lambda: transformers.Olmo2Config(**SMALL), "mlp"),  # no norm before it
    "granite": (lambda: transformers.GraniteConfig(**SMALL, residual_multiplier=0.3), READERS["llama"]),
    "cohere2": (lambda: transformers.Cohere2Config(**GROUPED), None),
    # the residual is added inside of attention
    "bloom": (lambda: transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4), None),
}
CASES = {name: (config, READERS[name]) for name, config in FAMILIES.items()} | MORE


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_the_border_is_where_an_mlp_of_zeros_leaves_the_hidden_states(family: str) -> None:
    make, reader = CASES[family]
    torch.manual_seed(0)
    stack = Decoder(AutoModelForCausalLM.from_config(make()).eval())
    windows = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    stack.check_replay(windows[:1], lambda _: None)
    assert {index: border.reader for index, border in stack.borders.items()} == (
        {} if reader is None else {0: reader, 1: reader}
    )
    if reader is None:
        return
    hidden, calls = stack.record(windows)
    for index, block in enumerate(stack.blocks):
        border, prefix = stack.borders[index], f"{stack.blocks_name}.{index}."
        found = calls[index](partial(border.output, block, block), hidden)
        output = calls[index](block, hidden)
        matrices = {name.removeprefix(prefix): target for name, target in stack.targets("all-linear").items()}
        ours = {name for name in matrices if matrices[name].name.startswith(prefix)}
        attention = {name for name in ours if border.is_attention(name)}
        assert attention
        assert attention < ours
        for name in ours - attention:
            matrices[name].view(stack.model).zero_()
        assert torch.equal(calls[index](block, hidden), found)
        assert not torch.equal(output, found)
        hidden = output
