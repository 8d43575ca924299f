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

ADAPTER, CONFIG, RECORD = "adapter_config.json", "config.json", "stage.json"


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
            UserError: the adapter's base checkpoint is not beside it, nor where it says, or holds other weights now.
        """
        settings = path / ADAPTER
        if not settings.is_file():
            return cls(label, path)
        named = json.loads(settings.read_text()).get("base_model_name_or_path") or "pruned"
        record = path / RECORD
        trained_on = json.loads(record.read_text())["inputs"]["pruned"] if record.is_file() else None
        # in a run directory that was moved or copied, what the adapter names is another run's
        places = [place for place in (path.resolve().parent / "pruned", Path(named)) if (place / CONFIG).is_file()]
        for base in places or [_from_the_hub(path, named)]:
            if trained_on in (None, checkpoint.fingerprint(base)):
                return cls(label, base, path)
        raise UserError(
            f"{path} was trained on other weights than {places[0] if places else named} holds now; "
            "train again (sppctl train --force)"
        )

    @property
    def place(self) -> Path:
        """Where it lies, for people."""
        return self.adapter or self.directory

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights."""
        own = checkpoint.fingerprint(self.directory)
        return own if self.adapter is None else f"{own}+{checkpoint.fingerprint(self.adapter)}"

    def load(self, device: torch.device, dtype: str, trust_remote_code: bool) -> Any:
        """The model, in evaluation mode; adapted layers in place of plain ones if there is an adapter."""
        model = checkpoint.load_model(self.directory, device, dtype, trust_remote_code, spread=True)
        if self.adapter is None:
            return model
        from peft import PeftModel

        _refresh(model, self.adapter)
        return PeftModel.from_pretrained(model, str(self.adapter)).get_base_model().eval()


def _from_the_hub(adapter: Path, name: str) -> Path:
    try:
        return checkpoint.locate(name)
    except UserError as error:
        raise UserError(
            f"{adapter} adapts {name}, which is not there; put the pruned checkpoint beside it as pruned/"
        ) from error


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
