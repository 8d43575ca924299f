"""What is measured: a checkpoint, or a checkpoint under an adapter that is not merged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from sppctl import console, distributed
from sppctl.errors import UserError
from sppctl.files import integrity
from sppctl.files.safe_files import TensorFile, adapter_file, adapter_settings, is_adapter
from sppctl.model import checkpoint
from sppctl.model.refreshed import REFRESHED
from sppctl.model.weights import empty_model

AGAIN = "download the adapter again, or correct its adapter_config.json"
CONFIG = "config.json"


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
            UserError: the adapter has no weights as safetensors, or its base checkpoint is not beside it, nor where it
            says, or holds other weights now; or files are not those that a record beside them says.
        """
        record = _verified(path)
        if not is_adapter(path):
            return cls(label, path)
        adapter_file(path)
        named = str(adapter_settings(path).get("base_model_name_or_path") or "pruned")
        trained_on = record["inputs"]["pruned"] if record else None
        # in a run directory that was moved or copied, what the adapter names is another run's
        places = [place for place in (path.resolve().parent / "pruned", Path(named)) if (place / CONFIG).is_file()]
        for base in places or [_from_the_hub(path, named)]:
            if trained_on in (None, fingerprint(base)):
                _verified(base)
                return cls(label, base, path)
        raise UserError(
            f"{path} was trained on other weights than {places[0] if places else named} holds now; "
            "train again (sppctl train --force)"
        )

    @property
    def place(self) -> Path:
        """Where it is, for people."""
        return self.adapter or self.directory

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights."""
        own = fingerprint(self.directory)
        return own if self.adapter is None else f"{own}+{fingerprint(self.adapter)}"

    def check(self, trust_remote_code: bool) -> None:
        """Shows on empty weights that the adapter's file holds what its configuration describes, and nothing else.

        PEFT itself loads it, so its renames hold. What is missing it would make up, and what is surplus leave out.

        Raises:
            UserError: it does not, or PEFT cannot attach the adapter to the checkpoint.
        """
        if self.adapter is None:
            return
        from peft import PeftConfig, PeftModel

        model = empty_model(checkpoint.load_config(self.directory, trust_remote_code), None, trust_remote_code)
        renames = getattr(model, "_checkpoint_conversion_mapping", {})
        try:
            with checkpoint.quiet_libraries():
                config = PeftConfig.from_pretrained(str(self.adapter))
                if hasattr(config, "init_lora_weights"):
                    config.init_lora_weights = True  # others compute with the base weights
                adapted = PeftModel.from_pretrained(model, str(self.adapter), config=config, torch_device="cpu")
                found = adapted.load_adapter(str(self.adapter), "default", torch_device="cpu", key_mapping=renames)
        except Exception as error:  # a wrong value raises wherever PEFT first uses it
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            problem = f"{self.adapter} cannot be attached to {self.directory}: {reason.rstrip('.')}"
            raise UserError(f"{problem}; {AGAIN}") from error
        wrong = [f"holds no {name}" for name in found.missing_keys]
        wrong += [f"holds {name}, which is not part of it" for name in found.unexpected_keys]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
            raise UserError(
                f"{adapter_file(self.adapter)} is not the adapter that adapter_config.json describes: it "
                f"{wrong[0]}{more}; {AGAIN}"
            )

    @torch.no_grad()
    def load(self, device: torch.device, dtype: str, trust_remote_code: bool) -> Any:
        """The model, in evaluation mode; adapted layers in place of plain ones if there is an adapter."""
        model = checkpoint.load_model(self.directory, device, dtype, trust_remote_code, spread=True)
        if self.adapter is None:
            return model
        from peft import PeftModel

        if (self.adapter / REFRESHED).is_file():
            # masks that changed in training left these base weights behind, and the adapter belongs to them
            parameters, file = dict(model.named_parameters()), TensorFile(self.adapter / REFRESHED)
            for name in file.specs:
                # a checkpoint of the bare model leaves out the prefix
                full = name if name in parameters else f"{model.base_model_prefix}.{name}"
                parameters[full].copy_(file.read(name))
        return PeftModel.from_pretrained(model, str(self.adapter)).get_base_model().eval()


def fingerprint(directory: Path) -> str:
    """Of weights that one process reads for all, which must all ask."""
    with console.working(f"hashing the weights in {directory}"):
        return distributed.decide(partial(checkpoint.fingerprint, directory))


def _verified(directory: Path) -> dict[str, Any] | None:
    """The record in a directory that a stage has published, whose files are as it says; None without a record."""
    with console.working(f"checking the files of {directory}"):
        return distributed.decide(partial(integrity.check_record, directory))


def _from_the_hub(adapter: Path, name: str) -> Path:
    try:
        return checkpoint.locate(name)
    except UserError as error:
        problem = f"{adapter} adapts {name}, which is not there"
        raise UserError(f"{problem}; put the pruned checkpoint beside it as pruned/") from error
