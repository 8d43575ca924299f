"""How instruction data reaches the model: rows, tokens, their order, and the batches they are put in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn

from sppctl import console, distributed
from sppctl.config.settings import Config
from sppctl.data import batches, instructions, prompts, vocabulary
from sppctl.errors import UserError

CHECKED_TOKENS = 16  # of each of two examples that must not see each other


def load_rows(config: Config) -> instructions.Instructions:
    """Training and validation rows as configured.

    Raises:
        UserError: they cannot be had.
    """
    section = config.train.data
    weights = {section.dataset: 1.0} if isinstance(section.dataset, str) else section.dataset
    return instructions.load_instructions(
        weights, section.split, val_size=section.val_size, max_rows=section.max_rows, seed=config.run.seed
    )


class Feed:
    """The tokenised examples of a training, with all that turns them into batches; what had to be cut is said.

    Attributes:
        train: examples to train on.
        held_out: examples for the validation loss.
        order: sampler of the training examples; None: the Trainer's own, a new random order in every epoch.
        collator: makes the training batches.
        padded: makes the validation batches.
        padding_share: share of the positions of padded batches that padding fills, in the order of the first epoch if
            examples are grouped by length, otherwise in a random one. Packing avoids it.

    Raises:
        UserError: the data cannot be had, or leaves nothing to learn from.
    """

    def __init__(self, config: Config, tokenizer: Any, vocab_size: int, today: datetime | None = None) -> None:
        """Loads and tokenises the rows.

        Args:
            config: the configuration.
            tokenizer: of the model.
            vocab_size: tokens that the model embeds.
            today: as of :func:`sppctl.data.prompts.style`.
        """
        train = config.train
        if tokenizer.eos_token_id is None:
            raise UserError(
                "train: the tokenizer has no end-of-text token, which every response needs; "
                "name it in the model's tokenizer_config.json (eos_token)"
            )
        self.rows, self.style = load_rows(config), prompts.style(train.data.prompt, tokenizer, today)
        tokenised = partial(
            instructions.examples,
            tokenizer,
            style=self.style,
            seq_len=train.data.seq_len,
            train_on_inputs=train.data.train_on_inputs,
        )
        with distributed.first_process_first():
            every = tokenised(self.rows.train), tokenised(self.rows.held_out)
        distils = train.distill.teacher is not None
        # a step or a validation of others alone would be 0/0
        self.train, self.held_out = every[0].having("response" if distils else "labelled"), every[1].having("labelled")
        self.unlabelled = len(every[0]) - len(self.train), len(every[1]) - len(self.held_out)
        if not self.train:
            raise UserError(
                f"train.data.seq_len: {train.data.seq_len} leaves no response token to learn from in any of the "
                f"{len(every[0])} examples; raise it"
            )
        for part in (self.train, self.held_out):
            vocabulary.check(part.tensors["tokens"], tokenizer, vocab_size, "train.data")
        self.padded = batches.PadCollator(vocabulary.pad_token_id(tokenizer, vocab_size), distils)
        self.packing = self.unchecked = train.data.packing
        self.collator = batches.PackCollator(distils) if self.packing else self.padded
        self.filler = instructions.Example([tokenizer.eos_token_id], [instructions.IGNORED], False, -1, [False])
        self.multiple = train.micro_batch_size * distributed.world_size()
        self.order = None
        if train.data.group_by_length:
            self.order = batches.LengthGrouped(self.train.lengths, train.batch_size, config.run.seed)
        order = list(self.order or random.Random(config.run.seed).sample(range(len(self.train)), len(self.train)))
        self.padding_share = batches.padding_share(self.train.lengths, order, train.micro_batch_size)

    def tell(self, seq_len: int) -> None:
        """Prints where the examples are from, what was cut, and what had to be left out."""
        if len(self.rows.taken) > 1:
            taken = ", ".join(f"{count} of {name}" for name, count in self.rows.taken.items())
            console.note(f"{len(self.train)} examples: {taken}")
        if self.rows.left_out:
            console.note(f"{self.rows.left_out} rows have the text of a held-out row and are not trained on")
        for count, kind in zip(self.unlabelled, ("training", "validation"), strict=True):
            if count:
                console.note(
                    f"{count} {kind} examples have no response within {seq_len} tokens (train.data.seq_len) and are "
                    "left out"
                )
        if not self.style.ends:
            console.warn(
                "train.data.prompt: the chat template writes nothing after a response, so no end of it is learned"
            )
        if self.train.truncated:
            share = self.train.truncated / len(self.train)
            console.note(
                f"{self.train.truncated} of {len(self.train)} examples ({share:.1%}) are longer than {seq_len} tokens "
                "and were cut"
            )
        if self.packing:
            console.note(f"packing: {self.padding_share:.1%} of the positions of padded batches would be padding")

    def filled(self, examples: Sequence[instructions.Example]) -> Sequence[instructions.Example]:
        """Examples, and so many without anything to learn that several processes can share them evenly.

        accelerate would repeat examples from the start of the epoch instead, and the last step would not be that of
        one process.
        """
        if distributed.world_size() == 1:
            return examples
        return [*examples, *[self.filler] * (-len(examples) % self.multiple)]

    def sampler(self, seed: int) -> Any:
        """The order of the filled training examples, fillers last; None: what the Trainer makes by itself."""
        total = len(self.filled(self.train))
        if total == len(self.train):
            return self.order
        # what accelerate makes of the Trainer's own sampler
        order = self.order or SeedableRandomSampler(range(len(self.train)), generator=torch.Generator(), data_seed=seed)
        return batches.FilledOrder(order, total)

    def check(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """Before the first packed batch: the model, and its teacher if there is one, must keep packed examples apart.

        Raises:
            UserError: one of them does not.
        """
        if not self.unchecked:
            return
        self.unchecked = False
        training = model.training
        model.eval()
        # one from its start, one to its end: instructions begin alike
        first, second = self.train[0].input_ids[:CHECKED_TOKENS], self.train[len(self.train) - 1].input_ids
        asked = {"model": model} | ({} if teacher is None else {"teacher": teacher})
        errors = {who: batches.packing_error(it, first, second[-CHECKED_TOKENS:]) for who, it in asked.items()}
        model.train(training)
        for who, error in errors.items():
            if error <= batches.EXACT:
                continue
            raise UserError(
                f"train.data.packing: this {who} does not keep packed examples apart (one changes the other by "
                f"{error:.0%} of what it does without borders); set train.data.packing to false, and "
                "train.data.group_by_length to true to save padding"
            )

    def metrics(self) -> dict[str, Any]:
        """What the record of the training says about its data."""
        return {
            "examples": len(self.train),
            "validation_examples": len(self.held_out),
            "datasets": self.rows.taken,
            "duplicates_of_held_out": self.rows.left_out,
            "versions": self.rows.versions,
            "data_hash": self.rows.hash,
            "examples_without_labels": self.unlabelled[0],
            "validation_examples_without_labels": self.unlabelled[1],
            "truncated_examples": self.train.truncated,
            "padding_share": self.padding_share,
        }
