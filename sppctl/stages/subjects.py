"""What is measured: a checkpoint, or a checkpoint under an adapter that is not merged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sppctl.errors import UserError
from sppctl.lm import checkpoint
from sppctl.lm.safe_files import TensorFile
from sppctl.stages.refreshed import REFRESHED


@dataclass(frozen=True)
class Subject:
    """Weights, tokenizer and configuration in ``directory``, perhaps changed by the PEFT adapter in ``adapter``."""

    label: str
    directory: Path
    adapter: Path | None = None

    @classmethod
    def at(cls, label: str, path: Path) -> Subject:
        """The checkpoint or the adapter at ``path``.

        Raises:
            UserError: the adapter's base checkpoint is not where it says, nor beside it.
        """
        settings = path / "adapter_config.json"
        if not settings.is_file():
            return cls(label, path)
        named = Path(json.loads(settings.read_text()).get("base_model_name_or_path") or "pruned")
        # a run directory that was moved has its pruned checkpoint beside the adapter still
        for base in (named, path.resolve().parent / "pruned"):
            if (base / "config.json").is_file():
                return cls(label, base, path)
        raise UserError(f"{path} adapts {named}, which is not there; put the pruned checkpoint beside it as pruned/")

    @property
    def place(self) -> Path:
        """Where it lies, for people."""
        return self.adapter or self.directory

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights."""
        own = checkpoint.fingerprint(self.directory)
        return own if self.adapter is None else f"{own}+{checkpoint.fingerprint(self.adapter)}"

    def load(self, device: torch.device, trust_remote_code: bool) -> Any:
        """The model, in evaluation mode; adapted layers in place of plain ones if there is an adapter."""
        model = checkpoint.load_model(self.directory, device, trust_remote_code=trust_remote_code)
        if self.adapter is None:
            return model
        from peft import PeftModel

        _refresh(model, self.adapter)
        return PeftModel.from_pretrained(model, str(self.adapter)).get_base_model().eval()


@torch.no_grad()
def _refresh(model: Any, adapter: Path) -> None:
    """Puts in the base weights that masks changing in training left behind: the adapter belongs to those."""
    path = adapter / REFRESHED
    if not path.is_file():
        return
    own, file = dict(model.named_parameters()), TensorFile.open(path)
    for name in file.specs:
        # a checkpoint of the bare model leaves out the prefix
        parameter = own[name] if name in own else own[f"{model.base_model_prefix}.{name}"]
        parameter.copy_(file.read(name))
