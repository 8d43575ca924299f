"""lm-eval's transformers model with batches sized by memory, whose work several processes share.

lm-eval itself gives each process its own documents. The batches then differ from those of a single process, and scores
differ in the last bits. Here every process prepares all requests and makes the same batches; they compute these in
turn, so the numbers do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from sppctl import console, distributed, machine
from sppctl.data import vocabulary
from sppctl.errors import StageError

ALL = 1 << 30
MEMORY_SHARE = 0.5  # of the free memory, for a batch
LARGEST = {"cpu": 32, "cuda": 256}  # requests in a batch; larger ones are not faster
CPU_TOKENS = 2048  # in a batch; larger ones are not faster

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the prompt, tokens of the answer


class Scorer(HFLM):
    """Scores requests and generates answers, longest first, like :class:`HFLM`.

    Attributes:
        truncated: prompts that were too long for the model and were truncated on the left, as in lm-eval.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None, *, seed: int = 0, label: str = "") -> None:
        """Wraps a loaded model of transformers.

        ``batch_size``: requests at a time, None: as many as fit; ``seed``: for sampled generation; ``label``: prefix of
        progress messages.
        """
        num_embeddings = vocabulary.embeddings(model)
        exceeds = vocabulary.may_exceed(tokenizer, num_embeddings)
        self._num_embeddings = num_embeddings if exceeds else None
        if exceeds or (tokenizer.pad_token_id is None and tokenizer.eos_token_id is None):
            # lm-eval would pad with a token that the model does not embed, or add one
            tokenizer.pad_token_id = vocabulary.pad_token_id(tokenizer, num_embeddings)
        # with "auto" lm-eval calls _detect_batch_size, and so passes all requests at once
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size="auto")
        self.requests_at_a_time, self.seed, self._label = batch_size, seed, label
        self._stderr = sys.stderr  # for progress, while the output of lm-eval is suppressed
        self.truncated: set[str] = set()
        torch.cuda.empty_cache()
        processes = distributed.world_size() if self.device.type == "cpu" else 1  # that share this memory
        free = torch.tensor([-machine.free_memory(self.device) / processes], device=self.device)
        distributed.all_reduce_max(free)  # the process with the least decides for all
        self._room = -free.item() * MEMORY_SHARE

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        return ALL

    def _batch_size_for(self, length: int) -> int:
        """The number of requests of a length in tokens that fit into memory together."""
        if self.requests_at_a_time is not None:
            return self.requests_at_a_time
        config = self.model.config.get_text_config()
        # logits and their log-softmax, with room for one copy; a block's activations at their widest
        width = 3 * config.vocab_size + 20 * config.hidden_size
        size = int(self._room // (length * width * self.model.dtype.itemsize))
        if self.device.type == "cpu":
            size = min(size, CPU_TOKENS // length)
        return max(1, min(size, LARGEST.get(self.device.type, LARGEST["cpu"])))

    def _of_this_process(self, batches: list[list[int]], title: str) -> Iterator[list[int]]:
        """The batches that this process computes."""
        batches = batches[distributed.rank() :: distributed.world_size()]
        with contextlib.redirect_stderr(self._stderr), console.Progress(f"{self._label}{title}", len(batches)) as bar:
            for batch in batches:
                yield batch
                bar.advance()

    def _check_tokens(self, tokens: list[int]) -> None:
        if self._num_embeddings is not None:
            vocabulary.check(tokens, self.tokenizer, self._num_embeddings, "eval.tasks")

    # --- log-likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer, and whether greedy decoding gives it."""
        longest = self.max_length + 1  # the last token is only predicted
        for texts, context, answer in requests:
            if texts is not None and len(context) + len(answer) > longest:
                self.truncated.add(texts[0])
            self._check_tokens(context + answer)

        def score(batch: list[Request]) -> list[tuple[float, bool]]:
            return HFLM._loglikelihood_tokens(self, batch, disable_tqdm=True, override_bs=len(batch))

        scores = torch.zeros(len(requests), 2, dtype=torch.float64)
        for batch in self._of_this_process(self._batches(requests), "batches of requests"):
            pairs = machine.in_halves(score, [requests[index] for index in batch])
            scores[batch] = torch.tensor(pairs, dtype=torch.float64)
        scores = distributed.summed(scores, self.device)
        if scores.isnan().any():
            raise StageError(f"logits are not finite (dtype {machine.dtype_name(self.model.dtype)})")
        return [(likelihood, bool(greedy)) for likelihood, greedy in scores.tolist()]

    def _batches(self, requests: list[Request]) -> list[list[int]]:
        """Indices of requests, batch by batch, longest first; answers of one token to one prompt share a row."""
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, answer) in enumerate(requests):
            rows[tuple(context + answer[:-1])].append(index)

        def order(row: list[int]) -> tuple[int, list[int]]:
            _, context, answer = requests[max(row, key=lambda index: len(requests[index][2]))]
            return -len(context + answer), context + answer

        batches: list[list[int]] = []
        size = filled = 0
        for row in sorted(rows.values(), key=order):
            if filled == size:
                _, context, answer = requests[row[0]]
                size, filled = self._batch_size_for(min(len(context + answer), self.max_length)), 0
                batches.append([])
            batches[-1] += row
            filled += 1
        return batches

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates the text that follows each prompt."""
        lengths, by_options = [], defaultdict(list)
        for index, request in enumerate(requests):
            prompt, options = request.args
            tokens = self.tok_encode(prompt)
            self._check_tokens(tokens)
            lengths.append(len(tokens))
            if len(tokens) > self.max_length - options.get("max_gen_toks", self.max_gen_toks):
                self.truncated.add(prompt)
            by_options[repr(options)].append(index)
        batches = []
        for indices in by_options.values():
            indices.sort(key=lambda index: (-lengths[index], requests[index].args[0]))
            answer = requests[indices[0]].args[1].get("max_gen_toks", self.max_gen_toks)
            while indices:
                size = self._batch_size_for(min(lengths[indices[0]] + answer, self.max_length))
                batches.append(indices[:size])
                indices = indices[size:]
        texts: dict[int, str] = {}
        for batch in self._of_this_process(batches, "batches of texts"):
            # sampling depends on the batch, not on the number of processes or on earlier batches
            torch.manual_seed(self.seed + batch[0])
            generate = partial(HFLM.generate_until, self, disable_tqdm=True)
            answers = machine.in_halves(generate, [requests[index] for index in batch])
            texts |= dict(zip(batch, answers, strict=True))
        for process_texts in distributed.gather_objects(texts):
            texts |= process_texts
        return [texts[index] for index in range(len(requests))]
