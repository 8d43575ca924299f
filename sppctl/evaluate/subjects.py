"""What is measured: a checkpoint, or a checkpoint with an adapter that is not merged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from sppctl import console, distributed, machine
from sppctl.config.settings import ModelConfig
from sppctl.errors import UserError
from sppctl.files import integrity
from sppctl.files.safe_files import TensorFile, adapter_file, adapter_settings, is_adapter
from sppctl.model import checkpoint, find
from sppctl.model.packed_model import is_quantised
from sppctl.model.refreshed import REFRESHED
from sppctl.model.weights import empty_model
from sppctl.packed.linear import write_weight

REMEDY = "download the adapter again, or correct its adapter_config.json"
CONFIG = "config.json"
PACKED_ADAPTERS = ("SPP", "MASKED_LORA")  # PEFT types that read a packed weight


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
            UserError: the adapter has no safetensors weights; or its base checkpoint is missing, or has other weights
            than the adapter was trained on; or files differ from the record in their directory.
        """
        record = _verified(path)
        if not is_adapter(path):
            return cls(label, path)
        adapter_file(path)
        base_name = str(adapter_settings(path).get("base_model_name_or_path") or "pruned")
        trained_on = record["inputs"]["pruned"] if record else None
        # first the pruned checkpoint of the same run: after a copy, the adapter still names that of the original run
        bases = [base for base in (path.resolve().parent / "pruned", Path(base_name)) if (base / CONFIG).is_file()]
        for base in bases or [_from_the_hub(path, base_name)]:
            if trained_on in (None, fingerprint(base)):
                _verified(base)
                return cls(label, base, path)
        raise UserError(
            f"{path} was trained on other weights than {bases[0] if bases else base_name} holds now; "
            f"train again ({console.command('train', '--force', run=path.parent)})"
        )

    @property
    def place(self) -> Path:
        """The path of the adapter, or else of the checkpoint."""
        return self.adapter or self.directory

    @property
    def can_be_packed(self) -> bool:
        """Whether its adapter, if it has one, reads packed weights."""
        return self.adapter is None or adapter_settings(self.adapter).get("peft_type") in PACKED_ADAPTERS

    def is_packed(self, model: ModelConfig, dtype: str) -> bool:
        """Whether its weights are to be packed in memory; those of a run's dense model never are.

        As configured; ``auto``: if they do not fit into memory and can be packed. To be decided by one process for all.
        """
        if self.label == "base" or model.weights == "dense":
            return False
        if model.weights == "packed":
            return True
        lacking = shortage(model, checkpoint.weight_bytes(self.directory, dtype))
        if lacking is None or not self.can_be_packed:
            return False
        if is_quantised(checkpoint.load_config(self.directory, model.trust_remote_code)):
            return False
        console.note(f"{self.label}: with dense weights the model {lacking}, so its weights are packed (model.weights)")
        return True

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights."""
        weights = fingerprint(self.directory)
        return weights if self.adapter is None else f"{weights}+{fingerprint(self.adapter)}"

    def check(self, trust_remote_code: bool) -> None:
        """Checks, without the model's weights, that the adapter's file holds exactly the tensors of its configuration.

        PEFT loads it here, so its renames apply. It initialises missing tensors and ignores surplus ones silently.

        Raises:
            UserError: the tensors differ, or PEFT cannot attach the adapter to the checkpoint.
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
                    config.init_lora_weights = True  # other values initialise from the base weights
                adapted = PeftModel.from_pretrained(model, str(self.adapter), config=config, torch_device="cpu")
                loaded = adapted.load_adapter(str(self.adapter), "default", torch_device="cpu", key_mapping=renames)
        except Exception as error:  # a wrong value raises wherever PEFT first uses it
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            problem = f"{self.adapter} cannot be attached to {self.directory}: {reason.rstrip('.')}"
            raise UserError(f"{problem}; {REMEDY}") from error
        problems = [f"holds no {name}" for name in loaded.missing_keys]
        problems += [f"holds {name}, which is not part of it" for name in loaded.unexpected_keys]
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise UserError(
                f"{adapter_file(self.adapter)} is not the adapter that adapter_config.json describes: it "
                f"{problems[0]}{more}; {REMEDY}"
            )

    @torch.no_grad()
    def load(self, device: torch.device, dtype: str, trust_remote_code: bool, *, packed: bool = False) -> Any:
        """The model in evaluation mode, perhaps packed, with the adapter attached if there is one.

        Raises:
            UserError: it should be packed, but its adapter needs dense weights.
        """
        if packed and not self.can_be_packed:
            problem = f"the adapter in {self.adapter} needs dense weights"
            raise UserError("model.weights", problem, "set it to dense, or measure merged/")
        model = checkpoint.load_model(self.directory, device, dtype, trust_remote_code, spread=True, packed=packed)
        if self.adapter is None:
            return model
        from peft import PeftModel

        if (self.adapter / REFRESHED).is_file():
            # training changed the masks and wrote these base weights; the adapter is trained on them
            layers, file = dict(model.named_modules()), TensorFile(self.adapter / REFRESHED)
            for tensor in file.specs:
                name = tensor.removesuffix(".weight")
                # a checkpoint of the base model has names without the prefix
                layer = layers[name if name in layers else f"{model.base_model_prefix}.{name}"]
                write_weight(layer, file.read(tensor))
        return PeftModel.from_pretrained(model, str(self.adapter)).get_base_model().eval()


def shortage(model: ModelConfig, needed: int) -> str | None:
    """What dense weights of so many bytes need and what is free for them, for a message; None if they fit."""
    device, where = checkpoint.pick_device(model.device), ""
    devices = [device]
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        if distributed.world_size() == 1:
            devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        else:
            where = " on a GPU (launch.num_processes=1 spreads it over all GPUs)"
    room = sum(map(machine.free_memory, devices))
    return None if needed <= room else f"needs {needed / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free{where}"


def fingerprint(directory: Path) -> str:
    """The fingerprint of weights; one process reads them for all, so all must call this."""
    with console.working(f"hashing the weights in {directory}"):
        return distributed.decide(partial(checkpoint.fingerprint, directory))


def _verified(directory: Path) -> dict[str, Any] | None:
    """The record of a directory that a stage has published, after checking its files; None without a record."""
    with console.working(f"checking the files of {directory}"):
        return distributed.decide(partial(integrity.check_record, directory))


def _from_the_hub(adapter: Path, name: str) -> Path:
    try:
        return find.locate(name)
    except UserError as error:
        problem = f"{adapter} was trained on {name}, which was not found"
        raise UserError(f"{problem}; put the pruned checkpoint next to it as pruned/") from error
