"""From training data to batches: rows, tokens, their order, and collation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from sppctl import console, distributed, launch
from sppctl.config.settings import Config
from sppctl.data import batches, formats, instructions, prompts, vocabulary
from sppctl.data.batches import Batch
from sppctl.data.instructions import Example, Examples
from sppctl.errors import UserError
from sppctl.train import scope

Collator = Callable[[list[Example]], Batch]

CHECKED_TOKENS, CHECKED_PAIRS = 16, 4  # of packed examples, which must not attend to each other


def _unanswered(examples: Examples, seq_len: int) -> UserError:
    """The error for examples without any label."""
    count = len(examples)
    if examples.truncated:
        problem = f"{seq_len} leaves no response token to learn from in any of the {count} examples"
        return UserError("train.data.seq_len", problem, "raise it")
    problem = f"none of the {count} examples has an answer of the assistant to learn from"
    return UserError(formats.KEY, problem, "add answers, or use other data")


class Feed:
    """The tokenised examples of a training, and how they become batches.

    Attributes:
        train, held_out: examples to train on, and for the validation loss.
        collator, padded: collators of the training and of the validation batches.
        padding_share: share of padding in padded batches, in the order of the first epoch if examples are grouped by
            length, otherwise in a random one. Packing avoids it.

    Raises:
        UserError: the data could not be loaded, or leaves nothing to learn from.
    """

    def __init__(self, config: Config, tokenizer: Any, vocab_size: int, today: datetime | None = None) -> None:
        """Loads and tokenises the rows, for a model that embeds ``vocab_size`` tokens.

        ``today`` is passed on to :func:`sppctl.data.prompts.style`.
        """
        train, self.seed = config.train, config.run.seed
        self.settings = train
        if tokenizer.eos_token_id is None:
            raise UserError(
                "train",
                "the tokenizer has no end-of-text token, which every response needs",
                "set eos_token in the model's tokenizer_config.json",
            )
        with distributed.first_process_first():
            self.rows = self._load(tokenizer)
            kinds = dict.fromkeys(map(formats.kind_of, self.rows.train + self.rows.held_out))
            self.styles: dict[prompts.Kind, prompts.Style] = {
                kind: prompts.style(train.data.prompt, tokenizer, today, kind) for kind in kinds if kind != "window"
            }
            tokenised = partial(
                instructions.examples,
                tokenizer,
                styles=self.styles,
                seq_len=train.data.seq_len,
                train_on_inputs=train.data.train_on_inputs,
            )
            examples = tokenised(self.rows.train), tokenised(self.rows.held_out)
        distilled = None if train.distill.teacher is None else train.distill.tokens
        if distilled == "text" and "window" not in kinds:
            raise UserError(
                "train.distill.tokens",
                "text, but train.data.dataset has no plain text",
                "add some, such as c4, or set responses",
            )
        # a step or a validation without any such example would divide 0 by 0
        self.train = examples[0].having("response" if distilled == "responses" else "labelled")
        self.held_out = examples[1].having("labelled")
        self.unlabelled = len(examples[0]) - len(self.train), len(examples[1]) - len(self.held_out)
        if not self.train:
            raise _unanswered(examples[0], train.data.seq_len)
        for part in (self.train, self.held_out):
            vocabulary.check(part.tensors["tokens"], tokenizer, vocab_size, "train.data")
        self.is_dated = prompts.is_dated(tokenizer) and any(style.is_chat for style in self.styles.values())
        self.padded = batches.PadCollator(vocabulary.pad_token_id(tokenizer, vocab_size), distilled)
        self.packing = train.data.packing
        self.collator: Collator = batches.PackCollator(distilled) if self.packing else self.padded
        self.filler = Example([tokenizer.eos_token_id], [instructions.IGNORED], False, batches.FILLER, [False])
        shuffled = random.Random(self.seed).sample(range(len(self.train)), len(self.train))
        order = self.order(0) if train.data.group_by_length else shuffled
        self.padding_share = batches.padding_share(self.train.lengths, order, train.micro_batch_size)

    def _load(self, tokenizer: Any) -> instructions.Instructions:
        data = self.settings.data
        return instructions.load_instructions(
            {data.dataset: 1.0} if isinstance(data.dataset, str) else data.dataset,
            data.split,
            columns=data.columns,
            cut=partial(instructions.cut_windows, tokenizer, data.seq_len),
            val_size=data.val_size,
            max_rows=data.max_rows,
            seed=self.seed,
        )

    def report(self) -> None:
        """Prints where the examples come from, and how many were truncated or left out."""
        seq_len = self.settings.data.seq_len
        if len(self.rows.taken) > 1:
            taken = ", ".join(f"{count} of {name}" for name, count in self.rows.taken.items())
            console.note(f"{len(self.train)} examples: {taken}")
        if self.rows.left_out:
            console.note(f"{self.rows.left_out} rows repeat the text of a held-out row and are left out")
        for count, kind in zip(self.unlabelled, ("training", "validation"), strict=True):
            if count:
                reason = f"no response within {seq_len} tokens (train.data.seq_len)"
                console.note(f"{count} {kind} examples have {reason} and are left out")
        if "conversation" in self.styles and not self.styles["conversation"].is_chat:
            console.note(
                "the tokenizer has no chat template: each message of a user is written in train.data.prompt, and each "
                "answer ends with the end-of-text token"
            )
        if not all(style.ends for style in self.styles.values()):
            console.warn(
                "train.data.prompt: the chat template writes nothing after a response; the model cannot learn to end it"
            )
        if self.train.truncated:
            cut, count = self.train.truncated, len(self.train)
            console.note(f"{cut} of {count} examples ({cut / count:.1%}) are truncated to {seq_len} tokens")
        if self.packing:
            console.note(f"packing: padded batches would be {self.padding_share:.1%} padding")

    def order(self, epoch: int) -> list[int]:
        """The indices of the training examples in the order of an epoch, the same for any number of processes."""
        if self.settings.data.group_by_length:
            return batches.grouped_order(self.train.lengths, self.settings.batch_size, self.seed, epoch)
        return batches.random_order(len(self.train), self.seed, epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer examples."""
        return math.ceil(len(self.train) / self.settings.batch_size)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return scope.num_steps(self.settings, len(self.train))

    @property
    def _accumulation(self) -> int:
        return launch.accumulation(self.settings, distributed.world_size())

    def epochs(self, step: int) -> float:
        """Epochs completed after an optimizer step, counted in micro-batches of all processes."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        size = self.settings.micro_batch_size * distributed.world_size()
        return epoch + steps * self._accumulation / math.ceil(len(self.train) / size)

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches, a list per optimizer step, endlessly, from step ``start`` on."""
        first_epoch, skipped = divmod(start, self.steps_per_epoch)
        for epoch in itertools.count(first_epoch):
            order = self.order(epoch)[skipped * self.settings.batch_size :]
            micro_batches = iter(self._loader(self.train, order, self.collator))
            while step := list(itertools.islice(micro_batches, self._accumulation)):
                yield step
            skipped = 0

    def validation(self) -> Iterable[Batch]:
        """The batches of this process for the validation loss, always padded."""
        return self._loader(self.held_out, range(len(self.held_out)), self.padded)

    def _loader(self, examples: Sequence[Example], order: Sequence[int], collator: Collator) -> Iterable[Batch]:
        """This process's share of the examples, in micro-batches: of P processes, every P-th.

        If they cannot be split evenly, fillers without labels are added, so that all processes have as many
        micro-batches. accelerate would repeat examples, and the last step would differ from that of one process.
        """
        size, processes = self.settings.micro_batch_size, distributed.world_size()
        missing = -len(order) % (size * processes) if processes > 1 else 0
        share = batches.slices([*order, *[None] * missing], size)[distributed.rank() :: processes]

        def collate(numbers: list[int | None]) -> Batch:
            return collator([self.filler if number is None else examples[number] for number in numbers])

        # the list of micro-batches is the data set
        return DataLoader(share, batch_size=None, collate_fn=collate, pin_memory=torch.cuda.is_initialized())  # type: ignore[arg-type]

    def check_packing(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """Raises UserError, before the first packed batch, if the model or its teacher mixes packed examples."""
        if not self.packing:
            return
        model.eval()
        # the start of one and the end of another, because instructions begin alike; several, because in 16 bits a small
        # leakage can be rounded away
        last = len(self.train) - 1
        pairs = [
            (self.train[place].input_ids[:CHECKED_TOKENS], self.train[last - place].input_ids[-CHECKED_TOKENS:])
            for place in range(min(CHECKED_PAIRS, len(self.train)))
        ]
        for role, module in {"model": model, "teacher": teacher}.items():
            error = 0.0 if module is None else batches.packing_error(module, pairs)
            if not error <= batches.EXACT:  # NaN is no proof
                raise UserError(
                    "train.data.packing",
                    f"packed examples attend to each other in this {role} (leakage {error:.2%})",
                    "set train.data.packing to false, and train.data.group_by_length to true to reduce padding",
                )
