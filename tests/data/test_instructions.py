"""Instruction data: shapes, shares and held-out rows, tokens and labels, and the cache."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ALPACA, byte_tokenizer
from test_prompts import CHAT, TEMPLATES, WITHOUT_INPUT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sppctl.data import instructions, texts
from sppctl.data.instructions import IGNORED, Example, Examples, Instructions
from sppctl.data.prompts import style
from sppctl.errors import UserError

EOS = 257
ROW = {"instruction": "Add.", "input": "", "output": "No."}


def load(*names: Path | str, weights: list[float] | None = None, **options: Any) -> Instructions:
    wanted = dict(zip(map(str, names), weights or [1.0] * len(names), strict=True))
    defaults: dict[str, Any] = {"split": "train", "columns": {}, "val_size": 0, "max_rows": None, "seed": 0}
    defaults["cut"] = partial(instructions.cut_windows, byte_tokenizer(), 16)
    return instructions.load_instructions(wanted, **(defaults | options))


def asked(rows: list[dict[str, Any]]) -> list[str]:
    return [row["instruction"] for row in rows]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(path: Path, name: str, count: int) -> Path:
    return write_rows(path / f"{name}.jsonl", [{"instruction": f"{name} {i}", "output": "x"} for i in range(count)])


def write_as(form: str, path: Path, rows: list[dict[str, Any]]) -> None:
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return
    if form.startswith(("csv", "tsv")):
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form.startswith("csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
        path.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
        return
    text = json.dumps(rows) if "jsonl" not in form else "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "json.gz", "jsonl.gz", "csv", "tsv", "csv.gz"])
def test_files_of_all_forms(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    write_as(form, path, [row | {"text": "all of it"} for row in ALPACA])
    found = load(path)
    assert sorted(asked(found.train)) == sorted(asked(ALPACA))
    assert found.taken == {str(path): 24}
    assert found.hash == load(write_rows(tmp_path / "same.jsonl", ALPACA)).hash


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the hub, whose data sets have two more columns."""
    calls: list[tuple[str, str]] = []

    def load_hub(*arguments: str) -> Any:
        calls.append(arguments)
        rows = [{"question": "Add.", "id": 1}] if arguments[0] == "other/columns" else ALPACA
        return datasets.Dataset.from_list([row | {"text": "all of it"} for row in rows])

    monkeypatch.setattr(texts, "load_hub", load_hub)
    return calls


@pytest.mark.parametrize(
    ("name", "repository"),
    [("alpaca", "tatsu-lab/alpaca"), ("alpaca-gpt4", "vicgalle/alpaca-gpt4"), ("owner/name", "owner/name")],
)
def test_hub_rows(name: str, repository: str, hub: list[tuple[str, str]]) -> None:
    found = load(name, split="train[:24]", val_size=4)
    assert (len(found.train), len(found.held_out)) == (20, 4)
    assert found.train[0].keys() == {"instruction", "input", "output"}
    assert hub == [(repository, "train[:24]")]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("c4", 24 * "all of it</s>"), ("wikitext2", "\n\n".join(24 * ["all of it"]) + "</s>")],
    ids=["documents", "paragraphs of one text"],
)
def test_known_texts_are_cut_into_windows(name: str, expected: str) -> None:
    assert windows(load(name, cut=partial(instructions.cut_windows, byte_tokenizer(), 10_000))) == [expected]


def test_the_split_is_that_of_hub_data_sets(hub: list[tuple[str, str]]) -> None:
    """Beside them known texts have the documents that they have alone."""
    cut = partial(instructions.cut_windows, byte_tokenizer(), 10_000)
    load("alpaca", "c4", "wikitext2", split="train[:24]", cut=cut)
    assert [call[:2] for call in hub] == [
        ("tatsu-lab/alpaca", "train[:24]"),
        ("allenai/c4", "train"),
        ("Salesforce/wikitext", "train"),
    ]


@pytest.mark.usefixtures("hub")
def test_columns_of_a_hub_data_set_are_listed() -> None:
    """One of them is that of another format, plain text."""
    with pytest.raises(UserError, match=r"no data set has the columns answer: other/columns has question, id, text$"):
        load("other/columns", columns={"output": "answer"})


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_columns_that_change_the_prompt_are_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    write_as(form, path, [ROW | {"system": "Be short."}])
    assert load(path).train[0]["messages"][0] == {"role": "system", "content": "Be short."}
    write_as(form, path, [ROW | {"tools": ["search"]}])
    with pytest.raises(UserError, match=rf"^train\.data\.dataset: {path}: row 1 has tools, which is not supported"):
        load(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", [{"question": "1 + 1?", "answer": "2"}, {"speech": ["Hello"], "id": 1}])
def test_columns_of_a_file_are_listed(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    path = tmp_path / f"rows.{form}"
    write_as(form, path, [row])
    with pytest.raises(
        UserError, match=rf"the columns of {path} are {', '.join(row)}; needed are .*; map them, such as "
    ):
        load(path)


@pytest.mark.parametrize(
    ("rows", "message"), [([ALPACA[0], {"instruction": "Add."}], "row 2 has no text in output"), ([], "holds no rows")]
)
def test_rows_that_are_missing_are_found_before_training(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(write_rows(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("name", ["nothing", "missing.jsonl", "a/b/c", "missing.parquet"])
def test_an_unknown_data_set(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^train\.data\.dataset: {name} is not a file, not one of .*gpt4, c4, .*, and"
    ):
        load(name)


def test_what_is_neither_file_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("own/rows", "tatsu-lab/alpaca"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own" / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^train\.data\.dataset: own/rows holds no data file \(\.txt, "):
        load("own/rows")
    with pytest.raises(UserError, match=r"^train\.data\.dataset: own/link is neither a file nor a link to one$"):
        load("own/link")
    with pytest.raises(UserError, match=rf"^dataset tatsu-lab/alpaca: {tmp_path}/tatsu-lab/alpaca has the same name"):
        load("alpaca")


def test_rows_are_held_out_and_at_most_so_many_trained_on(alpaca_file: Path) -> None:
    whole = load(alpaca_file, val_size=5)
    assert (len(whole.train), len(whole.held_out)) == (19, 5)
    assert sorted(asked(whole.train) + asked(whole.held_out)) == sorted(asked(ALPACA))
    some = load(alpaca_file, val_size=5, max_rows=7)
    assert len(some.train) == some.taken[str(alpaca_file)] == 7
    assert some.held_out == whole.held_out
    assert set(asked(some.train)) <= set(asked(whole.train))
    assert len(load(alpaca_file, max_rows=100).train) == 24
    assert load(alpaca_file, val_size=5) == whole
    other = load(alpaca_file, val_size=5, seed=1)
    assert asked(other.held_out) != asked(whole.held_out)
    assert other.hash != whole.hash


def test_the_built_in_rows_hold_out_their_own(tmp_path: Path) -> None:
    found = load("instructions", val_size=3)
    assert found.held_out == texts.built_in_rows("heldout")
    assert found.train == texts.built_in_rows("train")
    some = load("instructions", max_rows=10).train
    assert len(some) == 10
    assert asked(some) != asked(found.train[:10])
    mixed = load("instructions", numbered(tmp_path, "a", 50), weights=[2, 1], val_size=10)
    assert mixed.taken["instructions"] == 2 * mixed.taken[str(tmp_path / "a.jsonl")] == 80
    assert mixed.held_out[:64] == found.held_out
    assert len(mixed.held_out) == 74


def said(rows: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {(row["instruction"], (row.get("input") or "").strip(), row["output"]) for row in rows}


def test_no_row_stands_on_both_sides(tmp_path: Path) -> None:
    """One with another input is another row; one without a column is one with an empty input."""
    rows = [{"instruction": f"Say {n % 5}.", "input": "", "output": "Yes."} for n in range(10)]
    rows += [{"instruction": "Say 0.", "input": "Loud.", "output": "Yes."}, {"instruction": "Say 1.", "output": "Yes."}]
    found = load(write_rows(tmp_path / "twice.jsonl", rows), val_size=2, seed=3)
    assert not said(found.train) & said(found.held_out)
    assert len(found.held_out) == 2
    assert len(found.train) + found.left_out == 10
    again = [row for row in rows if said([row]) <= said(found.held_out)]
    assert found.left_out == len(again) - 2 > 0


def test_data_under_two_names_is_held_out_under_both(alpaca_file: Path, tmp_path: Path) -> None:
    """Hold out 4 and 2 rows of the shuffled file; 2 of them are the same."""
    other = tmp_path / "other.jsonl"
    other.write_text(alpaca_file.read_text() + "\n")
    found = load(alpaca_file, other, weights=[2, 1], val_size=6)
    assert not said(found.train) & said(found.held_out)
    assert (found.left_out, found.taken) == (2, {str(alpaca_file): 20, str(other): 10})
    own = write_rows(tmp_path / "own.jsonl", texts.built_in_rows("heldout")[:5])
    with pytest.raises(UserError, match=rf"^train\.data\.dataset: every row of {own} is held out too"):
        load("instructions", own, weights=[1, 1])


@pytest.mark.parametrize(
    ("weights", "options", "taken"),
    [
        # 40, 30 and 8 rows. k = min(40 / 1, 30 / 1, 8 / 1) = 8
        ([1, 1, 1], {}, [8, 8, 8]),
        # k = min(40 / 5, 30 / 3, 8 / 1) = 8: the first and the last are used whole
        ([5, 3, 1], {}, [40, 24, 8]),
        # k = min(40 / 2.5, 30 / 3, 8 / 0.7) = 10
        ([2.5, 3, 0.7], {}, [25, 30, 7]),
        # the weights are shares: a factor changes nothing
        ([0.25, 0.3, 0.07], {}, [25, 30, 7]),
        # 20 / (5 + 3 + 1) = 2.22: 11.1, 6.7 and 2.2
        ([5, 3, 1], {"max_rows": 20}, [11, 6, 2]),
        # held out 9 * (5, 3, 1) / 9 = 5, 3, 1; k = min(35 / 5, 27 / 3, 7 / 1) = 7
        ([5, 3, 1], {"val_size": 9}, [35, 21, 7]),
    ],
)
def test_shares_are_those_of_the_weights(
    tmp_path: Path, weights: list[float], options: dict[str, Any], taken: list[int]
) -> None:
    files = [numbered(tmp_path, name, count) for name, count in (("a", 40), ("b", 30), ("c", 8))]
    found = load(*files, weights=weights, **options)
    assert list(found.taken.values()) == taken
    assert [sum(name.startswith(letter) for name in asked(found.train)) for letter in "abc"] == taken
    assert len(set(asked(found.train) + asked(found.held_out))) == sum(taken) + len(found.held_out)  # none twice
    assert found == load(*files, weights=weights, **options)


def test_held_out_rows_are_shared_out_by_weight(tmp_path: Path) -> None:
    files = [numbered(tmp_path, name, 40) for name in "abc"]
    held_out = asked(load(*files, weights=[5, 3, 1], val_size=10).held_out)
    # 5.56, 3.33 and 1.11: the largest remainder is rounded up
    assert [sum(name.startswith(letter) for name in held_out) for letter in "abc"] == [6, 3, 1]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        *(
            (["ALPACA", "instructions"], {"weights": [bad, 1.0]}, "dataset: the weight of .* must be a number above 0$")
            for bad in (0.0, -1.0, float("inf"), float("nan"))
        ),
        (
            ["ALPACA", "instructions"],
            {"weights": [0.001, 1.0]},
            r"dataset: the weight 0\.001 of .* gives none of its row",
        ),
        ([], {}, "dataset: names no data set"),
        (["ALPACA"], {"val_size": 24}, "val_size: 24 leaves nothing of the 24 rows"),
        (["ALPACA"], {"val_size": 100}, "val_size: 100 leaves nothing of the 24 rows"),
        (["instructions"], {"split": "test"}, "split: instructions has no split test; only hub data sets"),
        (["ALPACA"], {"split": "test"}, "split: .*rows.jsonl has no split test; only hub data sets"),
        (["instructions", "ALPACA"], {"split": "test"}, "split: instructions has no split test"),
    ],
)
def test_settings_that_no_data_has(names: list[str], options: dict[str, Any], message: str, alpaca_file: Path) -> None:
    with pytest.raises(UserError, match=rf"^train\.data\.{message}"):
        load(*(alpaca_file if name == "ALPACA" else name for name in names), **options)


def test_own_columns(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "input": "unused"} for n in range(6)]
    path = write_rows(tmp_path / "own.jsonl", rows)
    found = load(path, columns={"instruction": "question", "output": "answer"})
    assert said(found.train) == {(row["question"], "unused", row["answer"]) for row in rows}


def test_a_folder_is_the_rows_of_its_files(tmp_path: Path) -> None:
    """Files are of several forms; those of another split are left out, and so is what is not data."""
    (tmp_path / "data").mkdir()
    for number, form in enumerate(("jsonl", "csv", "parquet")):
        write_as(form, tmp_path / "data" / f"train-{number}.{form}", ALPACA[8 * number : 8 * number + 8])
    write_as("json", tmp_path / "data" / "test-0.json", ALPACA[:5])
    (tmp_path / "README.md").write_text("not data")
    assert sorted(asked(load(tmp_path).train)) == sorted(asked(ALPACA))
    assert sorted(asked(load(tmp_path, split="test").train)) == sorted(asked(ALPACA[:5]))
    with pytest.raises(
        UserError, match=rf"^train\.data\.dataset: {tmp_path} has no split dev; its splits: train, test$"
    ):
        load(tmp_path, split="dev")


def test_the_hash_of_a_folder_covers_its_data_files(tmp_path: Path) -> None:
    first, other = numbered(tmp_path, "a", 3), tmp_path / "notes.pdf"
    before = texts.file_hash(str(tmp_path))
    other.write_text("no data")
    assert texts.file_hash(str(tmp_path)) == before
    numbered(tmp_path, "a", 4)
    changed = texts.file_hash(str(tmp_path))
    first.rename(tmp_path / "b.jsonl")
    assert len({before, changed, texts.file_hash(str(tmp_path))}) == 3


def windows(found: Instructions) -> list[str]:
    return [byte_tokenizer().decode(list(row["tokens"])) for row in found.train if "tokens" in row]


def test_text_is_cut_into_windows_in_its_order(tmp_path: Path) -> None:
    """21 characters, and an end after each document, make 24 tokens: windows of 16 and 8."""
    path = write_rows(
        tmp_path / "own.jsonl", [{"text": text, "url": "x"} for text in ("0123456789", " ", "abcdefgh", "xyz")]
    )
    found = load(path)
    assert sorted(windows(found)) == ["0123456789</s>abcde", "fgh</s>xyz</s>"]
    assert found.taken == {str(path): 2}
    assert len(load(path, val_size=1).held_out) == 1
    with pytest.raises(UserError, match=rf"^train\.data\.val_size: 2 leaves nothing of the 2 windows of {path} to "):
        load(path, val_size=2)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("One.\n\nTwo.\n")
    assert windows(load(path)) == ["One.\n\nTwo.\n</s>"]
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        load(path)


def test_text_is_mixed_with_rows_by_weight(tmp_path: Path) -> None:
    """10 windows of text and 8 rows in the ratio 1 to 2: 4 windows; the windows come last, in whatever order named."""
    text = tmp_path / "own.txt"
    text.write_text("".join(map(chr, range(97, 97 + 26))) * 6)  # 156 and the end: 10 windows
    rows = numbered(tmp_path, "a", 8)
    found = load(text, rows, weights=[1, 2])
    assert found.taken == {str(text): 4, str(rows): 8}
    assert ["tokens" in row for row in found.train] == [False] * 8 + [True] * 4
    assert found == load(text, rows, weights=[1, 2])
    assert found.hash != load(text, rows, weights=[1, 2], seed=1).hash


def test_windows_are_learned_whole_and_conversations_in_their_answers(tmp_path: Path) -> None:
    """The kinds of rows become examples side by side; train_on_inputs is about instructions."""
    chatting = byte_tokenizer()
    chatting.chat_template = CHAT
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"}]
    rows: list[dict[str, Any]] = [
        ROW,
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"messages": [*talk, {"role": "assistant", "content": "d"}]},
        *instructions.cut_windows(chatting, 8, "own", ["0123456789"]),
    ]
    kinds: list[Any] = ["instruction", "completion", "conversation"]
    styles = {kind: style("alpaca", chatting, kind=kind) for kind in kinds}
    found = instructions.examples(chatting, rows, styles, seq_len=512, train_on_inputs=True)

    def learned(example: Example) -> str:
        return chatting.decode([label for label in example.labels if label != IGNORED])

    assert learned(found[0]) == WITHOUT_INPUT + "No.</s>"
    assert chatting.decode(found[1].input_ids) == "1 + 1 = 2</s>"
    assert learned(found[1]) == " 2</s>"
    assert learned(found[2]) == "b<|end|>\nd<|end|>\n"
    assert [learned(example) for example in list(found)[3:]] == ["01234567", "89</s>"]
    assert all(all(example.response) for example in list(found)[3:])
    assert [example.number for example in found] == list(range(5))
    assert len(instructions.examples(chatting, [], {}, seq_len=8, train_on_inputs=True)) == 0


@pytest.mark.usefixtures("cache")
def test_only_windows_are_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neither are responses without a prompt, in the cache or not; numbers and kinds stay together."""
    rows: list[dict[str, Any]] = [
        {"instruction": "a" * 40, "input": "", "output": "No response within 8 tokens."},
        {"prompt": "", "completion": "Four."},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        *instructions.cut_windows(tokenizer, 8, "own", ["0123456789"]),
    ]
    kinds: list[Any] = ["instruction", "completion", "conversation"]
    styles = {kind: style("{instruction}", tokenizer, kind=kind) for kind in kinds}
    for _ in range(2):
        found = instructions.examples(tokenizer, rows, styles, seq_len=8, train_on_inputs=False)
        assert [all(example.response) for example in found] == [False, True, True, True, True]
        assert [example.is_plain for example in found] == [False, False, False, True, True]
        kept = [(example.number, example.is_plain) for example in found.having("response")]
        assert kept == [(1, False), (2, False), (3, True), (4, True)]


def test_without_a_chat_template_a_conversation_is_a_sequence_of_instructions(tokenizer: Any) -> None:
    def made(*contents: str, system: str = "") -> Example:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "assistant" if number % 2 else "user", "content": content}
            for number, content in enumerate(contents)
        ]
        own = style("Q: {instruction} A:", tokenizer, kind="conversation")
        return instructions.tokenize(tokenizer, [{"messages": messages}], own, seq_len=512, train_on_inputs=False)[0]

    single = made("Add.", "No.")
    assert single == replace(tokenize(tokenizer, prompt="Q: {instruction} A:"), number=0)
    several = made("Add.", "No.", "Why?", "So.", "Oh?", system="Be short.")
    assert tokenizer.decode(several.input_ids) == "Be short.\n\nQ: Add. A:No.</s>Q: Why? A:So.</s>Q: Oh? A:</s>"
    assert tokenizer.decode([label for label in several.labels if label != IGNORED]) == "No.</s>So.</s>"


def test_each_of_two_answers_in_a_row_ends_with_a_learned_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "A"), ("assistant", "B"))
    ]
    for own in (tokenizer, WithEnd(tokenizer)):
        found = instructions.tokenize(
            own,
            [{"messages": messages}],
            style("{instruction}:", tokenizer, kind="conversation"),
            seq_len=512,
            train_on_inputs=False,
        )[0]
        assert tokenizer.decode(found.input_ids) == "q:A</s>B</s>"
        assert found.labels == [IGNORED] * 2 + found.input_ids[2:]


def test_documents_are_tokenised_once(counting: Counting, cache: Path) -> None:
    first = instructions.cut_windows(counting, 8, "own", ["0123456789", "abc"])
    assert counting.texts == 2
    assert instructions.cut_windows(counting, 8, "own", ["0123456789", "abc"]) == first
    assert len(instructions.cut_windows(counting, 4, "own", ["0123456789", "abc"])) == 4
    assert counting.texts == 2
    assert len(list(cache.iterdir())) == 1


def tokenize(tokenizer: Any, row: dict[str, Any] = ROW, prompt: str = "alpaca", **options: Any) -> Example:
    defaults: dict[str, Any] = {"seq_len": 512, "train_on_inputs": False}
    return instructions.tokenize(tokenizer, [ALPACA[0], row], style(prompt, tokenizer), **(defaults | options))[1]


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_tokens_and_labels_and_what_is_cut(tokenizer: PreTrainedTokenizerFast, train_on_inputs: bool) -> None:
    whole = tokenize(tokenizer, train_on_inputs=train_on_inputs)
    length = len(WITHOUT_INPUT)  # one token per byte
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.decode(whole.input_ids) == WITHOUT_INPUT + "No.</s>"
    response = [ord(letter) - 33 for letter in "No."] + [EOS]
    assert whole.input_ids[length:] == response
    assert whole.labels == (whole.input_ids if train_on_inputs else [IGNORED] * length + response)
    assert (whole.truncated, whole.number) == (False, 1)
    assert whole.response == [False] * length + [True] * 4
    for seq_len in (length + 4, length + 3, length + 1, length, length - 10):
        assert tokenize(tokenizer, seq_len=seq_len, train_on_inputs=train_on_inputs) == Example(
            whole.input_ids[:seq_len], whole.labels[:seq_len], seq_len < length + 4, 1, whole.response[:seq_len]
        )


class WithEnd:
    """A tokenizer that ends every text with end-of-text by itself, as some do."""

    eos_token_id = EOS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: Any) -> Any:
        encoding = self.tokenizer(texts, **options)
        encoding["input_ids"] = [[*tokens, EOS] for tokens in encoding["input_ids"]]
        return encoding


def test_a_tokenizer_that_adds_the_end_itself_or_was_saved_cutting_and_padding(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    cutting = byte_tokenizer()
    cutting.backend_tokenizer.enable_truncation(8)
    cutting.backend_tokenizer.enable_padding(length=600)
    assert tokenize(WithEnd(tokenizer)) == tokenize(cutting) == tokenize(tokenizer)
    assert tokenize(WithEnd(tokenizer), train_on_inputs=True) == tokenize(tokenizer, train_on_inputs=True)


def test_an_own_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    example = tokenize(tokenizer, prompt="Q: {instruction} A:")
    assert tokenizer.decode(example.input_ids) == "Q: Add. A:No.</s>"
    assert [label == IGNORED for label in example.labels] == [True] * 10 + [False] * 4


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_chat_trains_the_text_of_the_template(name: str, train_on_inputs: bool) -> None:
    template, said = TEMPLATES[name]
    chatting = byte_tokenizer()
    chatting.chat_template = template
    row = {"instruction": " Add. ", "input": "1", "output": " No. "}
    example = tokenize(chatting, row, prompt="chat", train_on_inputs=train_on_inputs)
    messages = [{"role": "user", "content": " Add. \n\n1"}, {"role": "assistant", "content": " No. "}]
    assert example.input_ids == chatting.apply_chat_template(messages)["input_ids"]
    learned = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    response = [token for token, said in zip(example.input_ids, example.response, strict=True) if said]
    assert chatting.decode(response) == said
    assert learned == (example.input_ids if train_on_inputs else response)


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    """The prompt ends with a blank, which becomes part of the first word's token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "ĠN"])}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "N")]))
    merging.pre_tokenizer, merging.decoder = byte_tokenizer().backend_tokenizer.pre_tokenizer, decoders.ByteLevel()
    chatting = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    chatting.chat_template = (
        "{{ messages[0].content }} A: {% if messages[1:] %}{{ messages[1].content }}{{ eos_token }}{% endif %}"
    )
    example = tokenize(chatting, prompt="chat")
    assert chatting.convert_ids_to_tokens(example.input_ids)[-6:] == ["A", ":", "ĠN", "o", ".", "</s>"]
    assert example.response == [False] * (len(example.input_ids) - 4) + [True] * 4


def test_examples_are_a_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    found = instructions.tokenize(tokenizer, ALPACA, style("alpaca", None), seq_len=180, train_on_inputs=False)
    assert [example.number for example in found] == list(range(len(found))) == list(range(24))
    assert [len(example.input_ids) for example in found] == found.lengths
    assert sum(example.truncated for example in found) == found.truncated > 0
    assert len(found.having("labelled")) == len(found.having("response")) > 0
    cut = instructions.tokenize(tokenizer, ALPACA, style("alpaca", None), seq_len=96, train_on_inputs=True)
    assert cut.having("labelled") is cut
    assert len(cut.having("response")) == 0
    with pytest.raises(IndexError):
        found[24]
    assert list(instructions.tokenize(tokenizer, [], style("alpaca", None), seq_len=8, train_on_inputs=True)) == []


def test_examples_without_anything_to_learn_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Their numbers stay; nothing predicts the first token of an example, so that one does not count."""
    rows = [{"instruction": "a" * count, "output": "xy"} for count in (3, 9, 0, 5, 6)]

    def made(prompt: str, **options: Any) -> Examples:
        return instructions.tokenize(tokenizer, rows, style(prompt, None), seq_len=6, **options)

    every = made("{instruction}", train_on_inputs=False)
    kept = every.having("labelled")
    assert [(example.number, len(example.input_ids)) for example in kept] == [(0, 6), (2, 3), (3, 6)]
    assert list(kept) == [every[0], every[2], every[3]]
    assert kept.lengths == [6, 3, 6]
    assert kept.truncated == 1
    of_inputs = made("{instruction}", train_on_inputs=True)
    assert of_inputs.having("labelled") is of_inputs
    assert [example.number for example in of_inputs.having("response")] == [0, 2, 3]
    single = instructions.tokenize(tokenizer, rows, style("{instruction}", None), seq_len=1, train_on_inputs=True)
    assert len(single.having("labelled")) == 0


class Counting:
    """A tokenizer that counts the texts it is given."""

    eos_token_id = EOS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend_tokenizer, self.tokenizer, self.texts = tokenizer.backend_tokenizer, tokenizer, 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.tokenizer(texts, **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "examples"


@pytest.fixture
def counting(tokenizer: PreTrainedTokenizerFast) -> Counting:
    return Counting(tokenizer)


def examples(tokenizer: Any, rows: list[dict[str, Any]] = ALPACA, prompt: str = "alpaca", **options: Any) -> list[Any]:
    defaults: dict[str, Any] = {"seq_len": 200, "train_on_inputs": False}
    return list(instructions.tokenize(tokenizer, rows, style(prompt, None), **(defaults | options)))


def test_the_second_time_nothing_is_tokenised(counting: Counting, cache: Path) -> None:
    first = examples(counting)
    assert counting.texts == 49  # prompts, whole texts, and one that shows whether the tokenizer adds the end
    assert examples(counting) == first
    assert counting.texts == 49
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert examples(counting) == first
    assert counting.texts == 2 * 49


def test_whatever_matters_is_tokenised_again(counting: Counting, cache: Path) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"rows": ALPACA[::-1]},
        {"rows": [ALPACA[0] | {"output": "x"}, *ALPACA[1:]]},
        {"prompt": "{instruction}"},
        {"prompt": "{instruction} "},
        {"seq_len": 201},
        {"train_on_inputs": True},
    ]
    for number, options in enumerate(others, start=1):
        before = counting.texts
        examples(counting, **options)
        assert counting.texts > before
        assert len(list(cache.iterdir())) == number
    counting.eos_token_id = 258
    examples(counting)
    assert len(list(cache.iterdir())) == len(others) + 1


def test_templates_that_print_the_date_share_no_entry_between_days(cache: Path) -> None:
    chatting = byte_tokenizer()
    chatting.chat_template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATES["a blank in front"][0]

    def said(day: int) -> str:
        today = style("chat", chatting, datetime(2024, 7, day))
        found = instructions.tokenize(chatting, ALPACA[:2], today, seq_len=200, train_on_inputs=True)
        return chatting.decode(found[0].input_ids)[:11]

    assert [said(day) for day in (1, 2, 1)] == ["01 Jul 2024", "02 Jul 2024", "01 Jul 2024"]
    assert len(list(cache.iterdir())) == 2
    assert datetime.now().strftime("%d %b %Y") in style("chat", chatting).text(ROW)[0]


@pytest.mark.slow
@pytest.mark.shared
def test_alpaca_of_the_mirror(from_mirror: Callable[[str], Any]) -> None:
    expression = (
        "vars(instructions.load_instructions({'alpaca': 3, 'instructions': 1}, 'train[:2000]', "
        "columns={}, cut=None, val_size=20, max_rows=100, seed=0))"
    )
    found = from_mirror(expression)
    assert found["taken"] == {"alpaca": 75, "instructions": 25}
    assert (len(found["train"]), len(found["held_out"])) == (100, 20 + 64)
    assert all({"instruction", "input", "output"} <= row.keys() for row in found["train"] + found["held_out"])
