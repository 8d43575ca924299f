"""Checkpoints: identifying, loading and copying them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sppctl import console, distributed, machine
from sppctl.errors import UserError, first_line
from sppctl.files import integrity
from sppctl.files.disk import FULL, writing
from sppctl.files.names import INDEX_NAME, RECORD, WORKING
from sppctl.files.safe_files import (
    ADAPTER_CONFIG,
    OwnFile,
    OwnFiles,
    TensorFiles,
    TensorSpec,
    is_plain,
)
from sppctl.model.find import POSITIONS, SIDE_FILES, TERMS

NOT_SIDE_FILES = {INDEX_NAME, RECORD, "adapter_config.json", "trainer_state.json", *WORKING}
# the files that identify a model: weights, index, configuration, and code of its own
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "adapter_config.json", "*.py")
GENERATION = "generation_config.json"
MOST_BLOCKS = 10_000  # the largest models have about 100
_NOT_TOKENIZER = {"config.json", GENERATION}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences progress bars and warnings of the libraries; errors are still raised."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.captureWarnings(False)
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint; raises UserError if it is missing or unusable."""
    from transformers import AutoConfig

    try:
        settings = _json(directory / "config.json")
        _check_names(settings, "configuration_files", "config.json")
        for part in (settings, settings.get("text_config")):
            for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
                value = part.get(key) if isinstance(part, dict) else None
                if isinstance(value, int) and value > MOST_BLOCKS:  # too many to build, even without weights
                    raise ValueError(f"{key} is {value}, more than {MOST_BLOCKS:,}")
        try:
            _json(directory / GENERATION)  # it is copied into the output
        except (ValueError, RecursionError) as error:
            message = f"generation_config.json beside it is damaged ({error}); download it again, or remove it"
            raise ValueError(message) from error
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a wrong value raises wherever transformers first uses it
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        raise UserError(str(directory), f"config.json cannot be used: {reason}") from error


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _check_names(settings: dict[str, Any], key: str, file: str) -> None:
    """Raises ValueError if a configuration names files outside its own directory."""
    names = settings.get(key, [])
    if not isinstance(names, list) or not all(map(is_plain, names)):
        raise ValueError(f"{key} in {file} must be names of files in the same directory")


def max_window(config: Any) -> int | None:
    """The longest input of a model in tokens; None if its configuration does not say."""
    text = config.get_text_config()
    return next((limit for key in POSITIONS if (limit := getattr(text, key, None)) is not None), None)


def check_window(key: str, tokens: int | None, config: Any) -> None:
    """Raises UserError if the value of a key is longer than the longest input of a model."""
    limit = max_window(config)
    if limit is not None and tokens is not None and tokens > limit:
        raise UserError(key, f"{tokens} exceeds the model's {limit} positions", f"set at most {limit}")


def convert_gguf(directory: Path, gguf_file: str, dtype: torch.dtype | None, out: Path) -> None:
    """Unpacks a GGUF file into an ordinary safetensors checkpoint in ``out`` (bfloat16 by default)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sppctl.model import weights

    # unpacking prints its own progress bar to stderr
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
        model: Any
        info: Any
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=gguf_file,
            dtype=dtype or torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        weights.refuse_random(gguf_file, info)
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file)
        # transformers still treats the unpacked model as quantised, and would refuse to save it; the other key is the
        # title in the GGUF file, which no loader reads
        for key in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, key):
                delattr(model.config, key)
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def fingerprint(directory: Path) -> str:
    """A short hash of the content of a checkpoint's (or adapter's) weights and configuration.

    Raises UserError if the files differ from the record in their directory, or cannot be read.
    """
    record = integrity.check_record(directory)
    if record is not None:
        return identity_of(record["files"])
    names = [path.name for path in directory.iterdir() if _is_weights(path.name)]
    return integrity.identity(integrity.hashes(directory, names))


def identity_of(files: Mapping[str, str]) -> str:
    """The fingerprint of a directory, computed from the hashes of its files."""
    return integrity.identity({name: digest for name, digest in files.items() if _is_weights(name)})


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)


def tokenizer_fingerprint(directory: Path) -> str:
    """A hash of the tokenizer's files and chat templates: all side files except the model's configuration."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SIDE_FILES for path in directory.glob(pattern)}):
        if path.name not in {*NOT_SIDE_FILES, *_NOT_TOKENIZER} and not path.name.endswith(".index.json"):
            digest.update(f"{path.relative_to(directory)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def generation_fingerprint(directory: Path) -> str:
    """A hash of how the model generates text by default (``generation_config.json``)."""
    path = directory / GENERATION
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    """The device of that name, or UserError; ``auto`` and ``cuda``: a GPU, a different one for each process."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        # modulo, because Slurm may show each process only its own GPU
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # only the first sentence of torch's message is about the device
        reason = first_line(error).split(". ")[0]
        raise UserError("model.device", f"{name} is not usable here ({reason})", "try auto") from error
    if device.type == "cuda" and distributed.world_size() > 1 and torch.cuda.device_count() > 1:
        raise UserError("model.device", f"all {distributed.world_size()} processes would use {name}", "set it to cuda")
    return device


def stored_dtype(files: TensorFiles, config: Any) -> torch.dtype:
    """The dtype of a checkpoint's weights: the configured one if a tensor has it, else that of most tensors."""
    dtypes = [files.spec(name).dtype for name in files]
    dtypes = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    configured = getattr(config, "dtype", None)
    if configured in dtypes:
        return configured
    return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32


def dtype_of(configured: str, stored: torch.dtype | None) -> str:
    """The dtype name of a pruned checkpoint, from model.dtype and the dense model's dtype (None for a GGUF file)."""
    # GGUF files are unpacked to bfloat16
    return configured if configured != "auto" else machine.dtype_name(stored or torch.bfloat16)


def choose_dtype(
    directory: Path,
    device: torch.device,
    configured: str,
    trust_remote_code: bool = False,
    *,
    stored: str = "auto",
    training: bool = False,
) -> machine.Compute:
    """The dtype to compute a checkpoint in: :func:`sppctl.machine.choose_dtype` for the dtype of its files.

    ``configured`` is model.compute_dtype; ``stored`` overrides the dtype of the files, if the weights are converted.
    """
    if stored == "auto":
        dtype = stored_dtype(TensorFiles(directory), load_config(directory, trust_remote_code))
        stored = machine.dtype_name(dtype)
    return machine.choose_dtype(configured, stored, device, training=training)


def load_model(
    directory: Path,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool = False,
    *,
    spread: bool = False,
    packed: bool = False,
) -> Any:
    """A causal language model in evaluation mode, loaded by transformers in the dtype of :func:`choose_dtype`.

    Args:
        directory, device, dtype: the checkpoint, where to put it, and what to compute in.
        trust_remote_code: run code that comes with the model.
        spread: spread a model that is too large for one GPU over all; its device is that of its embedding.
        packed: pack its sparse matrices, see :mod:`sppctl.model.packed_model`; it is on one device.
    """
    from sppctl.model import packed_model, weights

    weights.check_directory(directory, trust_remote_code)
    model: Any
    info: Any
    if packed:
        model, info = packed_model.load(directory, device, dtype, trust_remote_code)
        weights.refuse_random(str(directory), info)
        model.name_or_path = model.config._name_or_path = str(directory)
        return model
    placed = {"device_map": "auto"} if spread and must_be_spread(directory, device, dtype) else {}
    with console.working(f"loading {directory}"):
        model, info = _from_pretrained(directory, machine.torch_dtype(dtype), trust_remote_code, placed)
    weights.refuse_random(str(directory), info)
    model.name_or_path = model.config._name_or_path = str(directory)
    return (model if placed else model.to(device)).eval()


def _from_pretrained(directory: Path, dtype: torch.dtype, trust: bool, placed: Mapping[str, str]) -> Any:
    """The model and transformers' loading info; raises UserError if a library that the model needs is missing."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries(), _without_adapter(directory) as folder:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=True,
                output_loading_info=True,
                **placed,
            )
    except ImportError as error:  # most often the library of a quantisation
        problem = f"{directory} cannot be loaded by what is installed here ({first_line(error)})"
        fix = "install what is missing, or use a checkpoint that is not quantised"
        raise UserError("model.path", problem, fix) from error


@contextlib.contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """The directory, or links to its files without a PEFT adapter, which transformers would otherwise attach."""
    if not (directory / ADAPTER_CONFIG).exists():
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.resolve().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file)
        yield Path(folder)


def weight_bytes(directory: Path, dtype: str) -> int:
    """Bytes of all tensors of a checkpoint with its floating-point tensors in a dtype; auto: as stored."""
    files, target_dtype = TensorFiles(directory), None if dtype == "auto" else machine.torch_dtype(dtype)
    return sum(math.prod(spec.shape) * _dtype_in(spec, target_dtype).itemsize for spec in map(files.spec, files))


def _dtype_in(spec: TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor after converting floating-point tensors to ``dtype``; None: no conversion."""
    return dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype


def exceeds(directory: Path, device: torch.device, dtype: str) -> bool:
    """Whether the weights in a dtype exceed what is free on a GPU, and there are several."""
    is_one_of_several = device.type == "cuda" and torch.cuda.device_count() > 1
    return is_one_of_several and weight_bytes(directory, dtype) > machine.free_memory(device)


def must_be_spread(directory: Path, device: torch.device, dtype: str) -> bool:
    """Whether the weights in a dtype need more than one GPU; raises UserError if they do and each GPU has a process."""
    if not exceeds(directory, device, dtype):
        return False
    if distributed.world_size() > 1:
        size, free = (each / 2**30 for each in (weight_bytes(directory, dtype), machine.free_memory(device)))
        raise UserError(
            f"{directory} has {size:.1f} GiB of weights, more than the {free:.1f} GiB that are free on a GPU; "
            "launch.num_processes=1 spreads it over all GPUs"
        )
    return True


def load_tokenizer(directory: Path, trust_remote_code: bool = False, gguf_file: str | None = None) -> Any:
    """The tokenizer of a checkpoint; raises UserError if the installed libraries cannot read one."""
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            options = {"gguf_file": gguf_file} if gguf_file else {}
            _check_names(_json(directory / "tokenizer_config.json"), "fast_tokenizer_files", "tokenizer_config.json")
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the readers of the many formats raise errors of all kinds
        raise UserError(f"{directory} has no usable tokenizer: {_tokenizer_problem(error)}") from error


def _tokenizer_problem(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "untagged enum" in reason or "Unknown tokenizer version" in reason:
        return (
            f"tokenizer.json has a format that tokenizers {version('tokenizers')} cannot read ({reason}); "
            "pip install -U tokenizers transformers, or use the file of an older release of the model"
        )
    if "custom code" in reason:
        return "it needs Python code that comes with the model; model.trust_remote_code=true runs it"
    if "instantiate the backend tokenizer" in reason:
        return "no tokenizer.json, tokenizer.model or vocab.json with merges.txt can be read; copy the model's own"
    return f"{reason[:300]}; download its tokenizer files again"


def copy_side_files(source: Path, out: Path) -> None:
    """Copies configuration, tokenizer, chat templates and licence: not weights, cards and sppctl's own records.

    Raises:
        UserError: a file is a link to another directory, whose files might be published with the copy.
    """
    for pattern in (*SIDE_FILES, *TERMS, "*.py"):
        for path in source.glob(pattern):
            if path.name not in NOT_SIDE_FILES and not path.name.endswith(".index.json"):
                _check_inside(path, source.resolve())
                target = out / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _check_inside(path: Path, directory: Path) -> None:
    """Raises UserError if a file is outside of a directory and is no blob to which this snapshot of the hub links."""
    file = path.resolve()
    repository = file.parents[1] if file.parent.name == "blobs" else None
    is_blob = repository is not None and directory.is_relative_to(repository / "snapshots")
    if not is_blob and not file.is_relative_to(directory):
        raise UserError(f"{path} is a link to a file elsewhere ({file}); replace it by the file, or remove it")


def copy_for_rewriting(
    source: Path,
    out: Path,
    dtype: str = "auto",
    convert: Callable[[str, torch.Tensor, torch.dtype], torch.Tensor] = lambda name, tensor, dtype: tensor.to(dtype),
) -> OwnFiles:
    """Copies a checkpoint so that tensors can be overwritten in place: same files, same order of tensors.

    Args:
        source: checkpoint directory.
        out: existing, empty directory.
        dtype: the dtype to convert all floating-point tensors to; auto: no conversion.
        convert: converts a tensor, given its name, the tensor and the dtype.
    """
    copy_side_files(source, out)
    files, target_dtype = TensorFiles(source), None if dtype == "auto" else machine.torch_dtype(dtype)
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, out / INDEX_NAME)
    for name, file in files.files.items():
        layout = {key: (_dtype_in(spec, target_dtype), spec.shape) for key, spec in file.specs.items()}
        if all(layout[key][0] == spec.dtype for key, spec in file.specs.items()):
            (out / name).unlink(missing_ok=True)  # writing to a link would change the file behind it
            with writing(out / name, file.path.stat().st_size, FULL):
                shutil.copyfile(file.path, out / name)
            continue
        target = OwnFile.create(out / name, layout, file.metadata or {"format": "pt"})
        for key in file.specs:
            tensor, (new_dtype, _) = file.read(key), layout[key]
            target.write(key, tensor if tensor.dtype == new_dtype else convert(key, tensor, new_dtype))
    if target_dtype is None:
        return OwnFiles(out)
    config = _json(out / "config.json")
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
    if (out / INDEX_NAME).is_file():
        index = _json(out / INDEX_NAME)
        index.setdefault("metadata", {})["total_size"] = weight_bytes(out, "auto")
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return OwnFiles(out)


def load_gguf_config(directory: Path, gguf_file: str) -> Any:
    """The configuration that a GGUF file describes; raises UserError if transformers cannot read it."""
    from transformers import AutoConfig

    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(directory, gguf_file=gguf_file, local_files_only=True)
    except Exception as error:  # the gguf reader raises errors of all kinds on a damaged file
        raise UserError("model.gguf_file", *_gguf_problem(directory / gguf_file, error)) from error


def _gguf_problem(path: Path, error: Exception) -> tuple[str, str]:
    """Why a GGUF file cannot be read, and what to do."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return f"{path} is not a GGUF file", "download it again, or name another one"
    reason = first_line(error)
    if isinstance(error, ValueError) and "architecture" in reason:
        return f"{path} cannot be read: {reason}", "use the model's safetensors weights"
    return f"{path} is incomplete or damaged ({reason})", "download it again"
