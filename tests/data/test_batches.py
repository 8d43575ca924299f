"""Batches: packed ones give the loss and gradient of padded ones, exactly where the model heeds borders."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppctl.data import batches
from sppctl.data.batches import PackCollator, PadCollator, grouped_order, packing_error, padding_share, random_order
from sppctl.data.instructions import IGNORED, Example

# OPT takes the positions of its learned embedding from the attention mask
HEEDING = [family for family in FAMILIES if family != "opt"]
DEAF = {
    "opt": FAMILIES["opt"],
    "bloom": lambda: transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),  # ALiBi
    "mamba2": lambda: transformers.Mamba2Config(  # a state runs on
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2
    ),
    "lfm2": lambda: transformers.Lfm2Config(  # a short convolution
        **SMALL | {"num_key_value_heads": 2}, layer_types=["conv", "full_attention"]
    ),
}


def behind(prompt: int, length: int) -> list[bool]:
    """Which tokens are the response behind so many of a prompt."""
    return [place >= prompt for place in range(length)]


def example(number: int, length: int, start: int = 0) -> Example:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
    return Example(tokens, [IGNORED] * start + tokens[start:], False, number, behind(start, length))


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    make = FAMILIES.get(family) or DEAF[family]
    return AutoModelForCausalLM.from_config(make()).to(dtype).eval()


TWO = [Example([1, 2, 3], [IGNORED, 2, 3], False, 7, behind(1, 3)), Example([4] * 5, [4] * 5, False, 2, [True] * 5)]


def test_padding_and_fillers_are_not_counted() -> None:
    filler = Example([9], [IGNORED], False, batches.FILLER, [False])
    for collator in (PadCollator(pad_token_id=9), PackCollator()):
        assert batches.num_tokens(collator(TWO)) == batches.num_tokens(collator([*TWO, filler, filler])) == 8
        assert batches.num_tokens(collator([filler])) == 0
        for examples, places in (([*TWO, filler, filler], 8), ([filler, *TWO], 8), ([filler, filler], 0)):
            inputs = {name: value for name, value in collator(examples).items() if name != "examples"}
            of_data = batches.of_examples(inputs)
            assert of_data is not None
            assert int(of_data.sum()) == places
            assert 9 not in inputs["input_ids"].flatten()[of_data]


def test_padding_on_the_right_to_a_multiple_of_eight() -> None:
    batch = PadCollator(pad_token_id=9)(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [4, 4, 4, 4, 4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, *[IGNORED] * 5], [4, 4, 4, 4, 4, *[IGNORED] * 3]]
    assert batch["examples"] == [7, 2]


def test_packing_into_one_row() -> None:
    batch = PackCollator()(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 4, 4, 4, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 4, 4, 4, 4]]
    assert batch["examples"] == [7, 2]
    assert "attention_mask" not in batch


def test_distilled_tokens_are_those_of_the_responses_or_all_or_plain_text() -> None:
    """Whatever the labels: these have some for prompts, too."""
    rows = [Example([1] * 4, [1] * 4, False, 0, behind(3, 4)), *TWO, Example([5] * 2, [5] * 2, True, 3, [False] * 2)]
    padded = PadCollator(pad_token_id=9, distilled="responses")(rows)["distilled"]
    wanted = [[0, 0, 0, 1], [0, 1, 1], [1] * 5, [0, 0]]
    assert padded.int().tolist() == [row + [0] * (8 - len(row)) for row in wanted]
    packed = PackCollator(distilled="responses")(rows)["distilled"]
    # nothing predicts the first token of the third, which has no prompt
    assert packed.int().tolist() == [[*wanted[0], *wanted[1], 0, *wanted[2][1:], *wanted[3]]]
    assert "distilled" not in PackCollator()(rows)
    lengths = [4, 3, 5, 2]
    padded = PadCollator(pad_token_id=9, distilled="all")(rows)["distilled"]
    assert padded.int().tolist() == [[1] * length + [0] * (8 - length) for length in lengths]
    packed = PackCollator(distilled="all")(rows)["distilled"]
    assert packed.int().tolist() == [[place > 0 for length in lengths for place in range(length)]]
    rows.append(replace(TWO[1], is_plain=True))  # the same tokens, but not a response without a prompt
    padded = PadCollator(pad_token_id=9, distilled="text")(rows)["distilled"]
    assert padded.int().tolist() == [*[[0] * 8] * 4, [1] * 5 + [0] * 3]
    packed = PackCollator(distilled="text")(rows)["distilled"]
    assert packed.int().tolist() == [[0] * (4 + 3 + 5 + 2) + [0, 1, 1, 1, 1]]


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**{name: value for name, value in batch.items() if name != "examples"}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, None) for family in HEEDING), ("llama", "eager"), ("gemma3", "eager")]
)
def test_packed_batches_give_loss_and_gradient_of_padded_ones(family: str, attention: str | None) -> None:
    model = tiny(family)
    model.set_attn_implementation(attention or model.config._attn_implementation)
    model.config.use_cache = False
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, adapter)
    # longer than the sliding windows of 16, and one of a single token
    rows = [example(0, 21, 6), example(1, 40), example(2, 1), example(3, 17, 12)]
    padded, padded_gradients = loss_and_gradients(peft_model, PadCollator(0)(rows))
    packed, packed_gradients = loss_and_gradients(peft_model, PackCollator()(rows))
    assert abs(packed - padded) < 1e-5
    assert packed_gradients.keys() == padded_gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*HEEDING, *DEAF])
def test_models_that_do_not_heed_borders_are_seen(family: str, dtype: torch.dtype) -> None:
    pairs = [(example(place, 16).input_ids, example(place + 1, 16).input_ids) for place in range(0, 8, 2)]
    error = packing_error(tiny(family, dtype), pairs)
    assert error > 10 * batches.EXACT if family in DEAF else error < batches.EXACT / 10


def test_padding_share_by_hand() -> None:
    lengths = [3, 8, 9, 16, 1]
    # (3, 8) are 16 positions, (9, 16) 32, (1) 8: 37 tokens in 56
    assert padding_share(lengths, [0, 1, 2, 3, 4], 2) == pytest.approx(1 - 37 / 56)
    # (16, 9) are 32, (3, 1) 16, (8) 8: the same 56
    assert padding_share(lengths, [3, 2, 0, 4, 1], 2) == pytest.approx(1 - 37 / 56)
    # (3, 16) and (8, 9) are 32 each, (1) 8
    assert padding_share(lengths, [0, 3, 1, 2, 4], 2) == pytest.approx(1 - 37 / 72)
    assert padding_share([8, 16], [0, 1], 1) == 0


LENGTHS = torch.randint(20, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def test_grouped_batches_hold_similar_lengths() -> None:
    numbers = grouped_order(LENGTHS, 8, seed=0, epoch=0)
    assert padding_share(LENGTHS, range(1003), 8) > 0.3
    assert padding_share(LENGTHS, numbers, 8) < 0.06
    assert LENGTHS[numbers[0]] == max(LENGTHS)
    widths = [max(LENGTHS[i] for i in numbers[start : start + 8]) for start in range(8, 1000, 8)]
    rises = sum(a < b for a, b in itertools.pairwise(widths))
    assert 0.3 < rises / len(widths) < 0.7  # batches are in random order
    assert {frozenset(numbers[i : i + 8]) for i in range(0, 1000, 8)} != {
        frozenset(grouped_order(LENGTHS, 8, seed=0, epoch=1)[i : i + 8]) for i in range(0, 1000, 8)
    }


def test_examples_of_the_greatest_length_are_spread_over_the_epoch() -> None:
    """As are windows of plain text in a mixture; only one batch of them is moved to the front."""
    lengths = [300 if number % 2 else 50 + number % 97 for number in range(1600)]
    numbers = grouped_order(lengths, 8, seed=0, epoch=0)
    assert lengths[numbers[0]] == 300
    quarters = [numbers[start : start + 400] for start in range(0, 1600, 400)]
    shares = [sum(lengths[number] == 300 for number in quarter) / 400 for quarter in quarters]
    assert all(0.3 < share < 0.7 for share in shares)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 1003])
@pytest.mark.parametrize("kind", ["random", "grouped"])
def test_orders_hold_all_examples_and_depend_on_seed_and_epoch_alone(kind: str, count: int) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        if kind == "random":
            return tuple(random_order(count, seed, epoch))
        return tuple(grouped_order(LENGTHS[:count], 8, seed, epoch))

    orders = [order(seed, epoch) for seed in (0, 10) for epoch in (0, 1)]
    assert {tuple(sorted(one)) for one in orders} == {tuple(range(count))}
    assert orders[1] == order(0, 1)
    assert count < 9 or len(set(orders)) == 4
