"""The feed: every step has the same examples, in however many processes and after whatever interruption."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from fitting import Configure

from sppctl.config.load import load_config
from sppctl.data.batches import num_tokens
from sppctl.data.instructions import IGNORED
from sppctl.errors import UserError
from sppctl.model import checkpoint
from sppctl.train.feed import Feed

STEPS = ["train.batch_size=8", "train.micro_batch_size=2", "train.epochs=2.5", "train.data.val_size=3"]


@pytest.fixture
def configure(config_file: Path) -> Configure:
    """21 examples in steps of 8: the last step of an epoch is not whole, and not divisible by 2 or 4 processes."""
    return lambda *overrides: load_config(str(config_file), [*STEPS, *overrides])


def numbers(batches: list[dict[str, Any]]) -> list[int]:
    return [number for batch in batches for number in batch["examples"]]


@pytest.mark.parametrize("key", ["group_by_length", "packing"])
def test_each_step_has_the_same_examples_in_all_processes(
    key: str, configure: Configure, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed(configure(f"train.data.{key}=true"), checkpoint.load_tokenizer(llama), 260)
    assert (feed.steps_per_epoch, feed.max_steps) == (3, 8)
    whole = [numbers(step) for step in itertools.islice(feed.steps(0), 8)]
    assert [len(step) for step in whole] == [8, 8, 5, 8, 8, 5, 8, 8]
    assert sorted(whole[0] + whole[1] + whole[2]) == sorted(whole[3] + whole[4] + whole[5]) == list(range(21))
    assert whole[:3] != whole[3:6]
    for processes, done in itertools.product((1, 2, 4), (0, 2, 3, 7)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        shares = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            shares.append(list(itertools.islice(feed.steps(done), 8 - done)))
        for step, parts in enumerate(zip(*shares, strict=True), done):
            assert len({len(part) for part in parts}) == 1, "all have as many micro-batches"
            seen = [number for part in parts for number in numbers(part)]
            assert sorted(number for number in seen if number >= 0) == sorted(whole[step])
            fillers = [batch for part in parts for batch in part if set(batch["examples"]) == {-1}]
            assert all((batch["labels"] == IGNORED).all() for batch in fillers)
            tokens = sum(num_tokens(batch) for part in parts for batch in part)
            assert tokens == sum(feed.train.lengths[number] for number in whole[step])
        held_out = [number for rank in range(processes) for number in share_of_validation(feed, rank, monkeypatch)]
        assert sorted(number for number in held_out if number >= 0) == [0, 1, 2]


def share_of_validation(feed: Feed, rank: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv("RANK", str(rank))
    return numbers(list(feed.validation()))


def test_the_epochs_are_counted_in_micro_batches(configure: Configure, llama: Path) -> None:
    feed = Feed(configure(), checkpoint.load_tokenizer(llama), 260)
    assert [feed.epochs(step) for step in (0, 1, 2, 3, 8)] == pytest.approx([0, 4 / 11, 8 / 11, 1, 2 + 8 / 11])


def test_text_and_rows_resume_after_any_step(
    configure: Configure, llama: Path, text_file: Path, alpaca_file: Path
) -> None:
    """Windows of 64 tokens and rows, as many of each: the batches after an interruption are those without one."""
    options = [f"train.data.dataset={{{text_file}: 1, {alpaca_file}: 1}}", "train.data.seq_len=64"]
    feeds = [Feed(configure(*options), checkpoint.load_tokenizer(llama), 260) for _ in range(2)]
    feed = feeds[0]
    assert len(set(feed.rows.taken.values())) == 1
    windows = [row for row in feed.rows.train if "tokens" in row]
    assert len(windows) == len(feed.train) / 2
    assert all(len(window["tokens"]) == 64 for window in windows)
    whole = [step_tokens(step) for step in itertools.islice(feed.steps(0), 12)]
    for done in (1, 5, 6, 11):
        assert [step_tokens(step) for step in itertools.islice(feeds[1].steps(done), 12 - done)] == whole[done:]


def step_tokens(step: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in step]


def test_conversations_without_a_chat_template_are_reported(
    configure: Configure, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(
        "".join(
            f'{{"conversations": [{{"from": "human", "value": "Add {n}."}}, {{"from": "gpt", "value": "{n}"}}]}}\n'
            for n in range(8)
        )
    )
    feed = Feed(
        configure(f"train.data.dataset={path}", "train.data.seq_len=256"), checkpoint.load_tokenizer(llama), 260
    )
    feed.report()
    printed = "".join(capsys.readouterr())
    assert "no chat template: each message of a user is written in train.data.prompt" in " ".join(printed.split())


def test_conversations_without_an_answer_are_refused_as_such(configure: Configure, llama: Path, tmp_path: Path) -> None:
    """Even if all of them are short enough for train.data.seq_len."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"messages": [{{"role": "user", "content": "{n}?"}}]}}\n' for n in range(8)))
    tokenizer = checkpoint.load_tokenizer(llama)
    whole = r"^train\.data\.dataset: none of the 5 examples has an answer of the assistant to learn from; add answers"
    for seq_len, message in ((256, whole), (8, r"^train\.data\.seq_len: 8 leaves no response token .*; raise it$")):
        with pytest.raises(UserError, match=message):
            Feed(configure(f"train.data.dataset={path}", f"train.data.seq_len={seq_len}"), tokenizer, 260)
