"""The teacher of a distillation: its sizes, and what it adds to the memory of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sppctl.config.settings import Config
from sppctl.errors import UserError, first_line
from sppctl.model import architecture
from sppctl.model.blocks import Skeleton
from sppctl.plan.footprint import FLOAT, Batch, num_parameters
from sppctl.train.distill import BASE


@dataclass(frozen=True)
class Teacher:
    """Sizes of the teacher: its own, or those of the model if it is ``base`` or its own are unknown."""

    path: str
    source: str | None  # of its own sizes
    problem: str | None  # why these are unknown
    parameters: int
    blocks: int
    hidden_size: int
    vocab_size: int

    def memory(self, student: Any, batch: Batch, hidden: bool) -> int:
        """Bytes on each device, in the dtype of the student: its weights, which are dense, and those of a batch.

        These are its and the student's distributions over the vocabulary in float32; if hidden states are compared,
        its own behind each block, and in float32 the student's difference from them.

        Args:
            student: the text configuration of the model.
            batch: what is on a device at a time.
            hidden: whether hidden states are compared.
        """
        size = self.parameters * batch.itemsize + FLOAT * batch.tokens * (self.vocab_size + student.vocab_size)
        if hidden:
            size += batch.itemsize * batch.tokens * self.blocks * self.hidden_size
            size += FLOAT * batch.tokens * student.num_hidden_layers * student.hidden_size
        return size


def find(config: Config, skeleton: Skeleton) -> Teacher | None:
    """The configured teacher of a model; None if there is none.

    A teacher whose config.json cannot be found or used is no error: a plan may be made before it exists, or offline.
    """
    path, trust = config.train.distill.teacher, config.model.trust_remote_code
    if path is None:
        return None
    its_own, source, problem = skeleton, None, None
    if path != BASE:
        try:
            shapes, source = architecture.load(path, trust_remote_code=trust)
            its_own = Skeleton(shapes, trust_remote_code=trust)
        except UserError as error:
            source, problem = None, first_line(error.problem)
    text = its_own.config.get_text_config()
    sizes = num_parameters(its_own), text.num_hidden_layers, text.hidden_size, text.vocab_size
    return Teacher(path, source, problem, *sizes)
