"""Hidden states between blocks: where they wait, in which micro-batches, and that they are the model's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCAB, stored_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppctl import machine
from sppctl.errors import StageError
from sppctl.model.blocks import BlockStack
from sppctl.prune.activations import Activations
from sppctl.prune.choose import windows_at_a_time

Open = Callable[[Path], BlockStack]
Keep = Callable[..., Activations]


def windows(samples: int = 5) -> Tensor:
    return torch.randint(0, VOCAB - 4, (samples, 24), generator=torch.Generator().manual_seed(0))


def opened(directory: Path) -> BlockStack:
    stack = BlockStack(directory, torch.device("cpu"), stored_dtype(directory))
    stack.load_embeddings()
    stack.check_replay(windows(1), lambda _: None)
    return stack


@pytest.fixture
def stack(llama: Path) -> BlockStack:
    return opened(llama)


@pytest.fixture
def keep(stack: BlockStack, tmp_path: Path) -> Keep:
    """keep(size, memory) -> the embedded windows; their bytes are 5 x 24 x width x 4."""
    return lambda size=2, memory="ram", of=stack, samples=5: Activations(
        of, windows(samples), size, memory, tmp_path / "hidden"
    )


@torch.no_grad()
def hidden_states(directory: Path, tokens: Tensor) -> list[Tensor]:
    """Of a plain forward: the input of each block."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return list(model(tokens, output_hidden_states=True, use_cache=False).hidden_states)


def hand_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def everything(kept: Activations) -> Tensor:
    """The hidden states as they are, by blocks that only hand them on."""
    return torch.cat([kept.output(0, rows, hand_on) for rows in kept.batches])


# --- the model's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "size", "memory"),
    [
        *((family, torch.float32, 5, "ram") for family in FAMILIES),
        *(("llama", torch.float32, size, "ram") for size in (1, 2, "auto")),
        *(("llama", torch.float32, 2, memory) for memory in ("disk", "device", "auto")),
        ("llama", torch.bfloat16, 5, "disk"),
        ("gemma2", torch.float32, 2, "ram"),  # each block has its mask; the last micro-batch is smaller
    ],
)
@torch.no_grad()
def test_advancing_gives_a_plain_forwards_hidden_states(
    family: str,
    dtype: torch.dtype,
    size: int | str,
    memory: str,
    make_checkpoint: Callable[..., Path],
    keep: Keep,
) -> None:
    directory = make_checkpoint(family, dtype)
    expected, stack = hidden_states(directory, windows()), opened(directory)
    kept = keep(size, memory, of=stack)
    # bit for bit in one batch; others round differently
    tolerance = {"rtol": 0.0, "atol": 0.0} if size == 5 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(everything(kept), expected[0], **tolerance)
    stack.load_block(0)
    kept.run(0)
    torch.testing.assert_close(everything(kept), expected[1], **tolerance)


@torch.no_grad()
def test_advancing_or_storing_some_windows_leaves_the_others(keep: Keep, stack: BlockStack) -> None:
    kept, whole = keep(), keep()
    before = everything(kept)
    stack.load_block(0)
    whole.run(0)
    kept.advance(0, kept.batches[1])
    assert torch.equal(everything(kept)[2:4], everything(whole)[2:4])
    kept.store(kept.batches[1], torch.ones(2, 24, stack.width))
    assert (everything(kept)[2:4] == 1).all()
    assert torch.equal(everything(kept)[[0, 1, 4]], before[[0, 1, 4]])


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ends"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (9, [5])])
def test_the_last_micro_batch_may_be_smaller(size: int, ends: list[int], keep: Keep) -> None:
    assert [(rows.start, rows.stop) for rows in keep(size).batches] == list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize(
    ("samples", "length", "expected"), [(5, 24, 5), (500, 24, 170), (8, 2048, 2), (8, 4096, 1), (8, 9000, 1)]
)
def test_windows_at_a_time_on_a_cpu(samples: int, length: int, expected: int) -> None:
    assert windows_at_a_time("auto", samples, length) == expected


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "place"), [("ram", "ram"), ("disk", "disk"), ("device", "ram"), ("auto", "ram")])
def test_places_on_a_cpu(memory: str, place: str, keep: Keep, tmp_path: Path) -> None:
    assert keep(memory=memory).place == place
    assert (tmp_path / "hidden").exists() == (place == "disk")


def test_the_mapped_file_is_written_over_and_holds_the_hidden_states(
    keep: Keep, stack: BlockStack, tmp_path: Path
) -> None:
    path = tmp_path / "hidden"
    path.write_bytes(b"\xff" * 1000)  # of an earlier attempt
    on_disk, in_memory = (everything(keep(memory=memory)) for memory in ("disk", "ram"))
    assert torch.equal(on_disk, in_memory)
    assert path.stat().st_size == 5 * 24 * stack.width * 4
    stored = torch.from_file(str(path), shared=False, size=5 * 24 * stack.width).view(5, 24, -1)
    assert torch.equal(stored, on_disk)


def test_what_does_not_fit_into_memory_goes_to_the_disk(
    keep: Keep, stack: BlockStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 5 * 24 * stack.width * 4
    for free, place in ((2 * needed + 2, "ram"), (2 * needed - 2, "disk")):
        monkeypatch.setattr(machine, "free_memory", lambda _, free=free: free)
        assert keep(memory="auto").place == place
    # processes of one machine share its memory
    monkeypatch.setattr(machine, "free_memory", lambda _: 4 * needed)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local, place in (("1", "ram"), ("2", "disk"), (None, "disk")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv("LOCAL_WORLD_SIZE")
        assert keep(memory="auto").place == place


def test_a_full_disk_is_reported_before_anything_is_written_to_it(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StageError, match=r"prune\.memory: no room .* 0 MiB, in .*/hidden \(No space left on device\)"):
        keep(memory="disk")


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_another_point_of_the_model_waits_in_the_same_place(memory: str, keep: Keep, tmp_path: Path) -> None:
    kept = keep(memory=memory)
    before = everything(kept)
    kept.buffer("second").fill_(7)
    kept.buffer("third").fill_(8)
    assert kept.buffer("second").shape == before.shape
    assert (kept.buffer("second") == 7).all()
    assert torch.equal(everything(kept), before)
    names = {"hidden", "hidden.second", "hidden.third"} if memory == "disk" else set()
    assert {path.name for path in tmp_path.iterdir()} == names


@torch.no_grad()
def test_the_dense_models_hidden_states_advance_by_themselves(keep: Keep, stack: BlockStack, llama: Path) -> None:
    expected = hidden_states(llama, windows())
    kept = keep(size=5)
    stack.load_block(0)
    kept.run_dense(0)  # nothing is kept yet
    kept.keep_dense()
    assert kept.dense is not None
    assert torch.equal(kept.dense, expected[0])
    kept.run_dense(0)
    assert torch.equal(kept.dense, expected[1])
    assert torch.equal(everything(kept), expected[0])
