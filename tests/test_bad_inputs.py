"""Whatever is wrong with the input: a message that names it and the way out, the right exit code, and nothing left."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl.config.load import load_config
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN

WEIGHT, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


@dataclass
class Workplace:
    """A folder to run commands in, with all inputs; nothing else may appear in it.

    Attributes:
        root: the current directory of the commands.
        model: a copy of the tiny Llama, to be damaged.
        run: function that runs ``sppctl ...``.
    """

    root: Path
    config: Path
    model: Path
    run: Command

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    def files(self) -> dict[str, bytes]:
        """Every file and folder with its content."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            found[str(path.relative_to(self.root))] = path.read_bytes() if path.is_file() else b""
        return found


@pytest.fixture
def work(
    tmp_path: Path, config_file: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> Workplace:
    (tmp_path / "tmp").mkdir()
    shutil.copytree(llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return Workplace(tmp_path, config_file, tmp_path / "model", command)


# --- damage -----------------------------------------------------------------------------------------------------------


def keep(work: Workplace) -> None:
    """No damage: the command itself is wrong."""


def remove(*names: str) -> Callable[[Workplace], None]:
    def damage(work: Workplace) -> None:
        for name in names:
            (work.root / name).unlink()

    return damage


def write(name: str, text: str) -> Callable[[Workplace], None]:
    def damage(work: Workplace) -> None:
        work.write(name, text)

    return damage


def truncate(work: Workplace) -> None:
    weights = work.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lose_a_shard(work: Workplace) -> None:
    (work.model / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_shape(intermediate_size=48)))
    model.save_pretrained(work.model, max_shard_size="50KB")
    next(iter(sorted(work.model.glob("model-*.safetensors")))).unlink()


def pickle_weights(work: Workplace) -> None:
    (work.model / "model.safetensors").unlink()
    torch.save({}, work.model / "pytorch_model.bin")


def put_nan_in_head(work: Workplace) -> None:
    edit_weight(work.model, lambda weight: weight[3, 5].fill_(float("inf")), HEAD)


def put_nan(work: Workplace) -> None:
    edit_weight(work.model, lambda weight: weight[3, 5].fill_(float("nan")))


def claim_another_shape(work: Workplace) -> None:
    config = json.loads((work.model / "config.json").read_text())
    (work.model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def edit_weight(directory: Path, change: Callable[[torch.Tensor], object], name: str = WEIGHT) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def prune_all_but_one_group(work: Workplace) -> None:
    """2:4 in every layer, then one zero too few."""

    def prune(weight: torch.Tensor) -> None:
        weight.view(-1, 4)[:, :2] = 0

    for name in load_file(work.model / "model.safetensors"):
        if "_proj" in name:
            edit_weight(work.model, prune, name)
    edit_weight(work.model, lambda weight: weight[0, 0].fill_(1.0))


def narrow_model(work: Workplace) -> None:
    """down_proj has 38 input features, which is no multiple of 4."""
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_shape(intermediate_size=38))).save_pretrained(
        work.model
    )


def half_of_another_model(work: Workplace) -> None:
    """Half of every matrix is zero, but k_proj has 32 output features where the configured model has 16."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_shape(intermediate_size=48)))
    for parameter in model.model.layers.parameters():
        parameter.data.view(-1, 2)[:, 0] = 0
    model.save_pretrained(work.model)


def edit_config(**values: Any) -> Callable[[Workplace], None]:
    def damage(work: Workplace) -> None:
        path = work.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def edit_tokenizer(change: Callable[[Any], object], **texts: str) -> Callable[[Workplace], None]:
    """Another tokenizer beside the same weights, which embed 260 tokens; and files in the workplace."""

    def damage(work: Workplace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        change(tokenizer)
        tokenizer.save_pretrained(work.model)
        for name, text in texts.items():
            work.write(name.replace("_", "."), text)

    return damage


def add_two_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<more>", "<image>"])  # 259, which is embedded, and 260


def forget_the_end(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def future_tokenizer(work: Workplace) -> None:
    path = work.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Telepathy"}
    path.write_text(json.dumps(tokenizer))


def _shape(intermediate_size: int) -> dict[str, int]:
    return {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A wrong command.

    Attributes:
        name: of the test.
        command: after ``sppctl``; ``{config}`` is a configuration that works.
        words: that stderr must hold: what is wrong, and what to do.
        damage: makes the inputs wrong.
        code: 2: wrong usage or input; 1: only running could tell.
    """

    name: str
    command: str
    words: tuple[str, ...]
    damage: Callable[[Workplace], None] = keep
    code: int = 2


ROWS = '{"instruction": "a", "input": "", "output": "b"}\n'
USAGE = [
    Case("unknown key", "run {config} prune.patern=2:4", ("prune.patern: unknown key", "did you mean prune.pattern?")),
    Case("wrong type", "run {config} train.rank=big", ("train.rank", "expected an integer", "'big'")),
    Case(
        "several problems at once",
        "run {config} train.rank=big prune.metod=wanda",
        ("command line: train.rank", "command line: prune.metod"),
    ),
    Case("bad YAML", "run bad.yaml", ("bad.yaml", "not valid YAML", "line 1"), write("bad.yaml", "prune: {pattern: [")),
    Case("tab in YAML", "run bad.yaml", ("bad.yaml", "not valid YAML", "line 2"), write("bad.yaml", "prune:\n\tx: 1")),
    Case("binary CONFIG", "run model/model.safetensors", ("model.safetensors", "cannot be read")),
    Case("ratio 1.5", "prune {config} --pattern 1.5", ("prune.pattern", "1.5", "between 0 and 1")),
    Case("pattern 4:2", "prune {config} --pattern 4:2", ("prune.pattern", "'4:2'", "0 < N < M", "2:4")),
    Case("unknown method", "prune {config} --method wnda", ("prune.method", "'wnda'", "did you mean wanda?")),
    Case("two CONFIGs", "run {config} other.yaml", ("expected one CONFIG", "other.yaml", "KEY=VALUE")),
    Case("CONFIG missing", "run nowhere.yaml", ("nowhere.yaml does not exist", "quickstart")),
    Case("CONFIG is a directory", "run model", ("config model is a directory", "name the YAML file in it")),
    Case("no model", "run empty.yaml", ("model.path: not set", "--model"), write("empty.yaml", "run: {seed: 1}")),
    Case(
        "batch size not a multiple of the micro batch",
        "train {config} train.batch_size=10 train.micro_batch_size=4",
        ("micro_batch_size", "batch_size", "10", "4"),
    ),
    Case("limit 0", "eval {config} --limit 0", ("eval.limit", "0 must be at least 1")),
    Case("infinite learning rate", "train {config} train.lr=.inf", ("train.lr", "inf")),
    Case("unknown command", "prun {config}", ("No such command 'prun'",)),
    Case("unknown option", "prune {config} --patern 2:4", ("No such option", "--patern")),
    Case("device that does not exist", "prune {config} model.device=cuda:99", ("model.device", "cuda:99", "try auto")),
    Case("device of no kind", "prune {config} model.device=gpu", ("model.device", "gpu", "try auto")),
    Case("run.dir is a file", "run {config} --output note.txt", ("run.dir", "note.txt"), write("note.txt", "x")),
    Case("run.dir is the model's", "run {config} --model model --output model", ("run.dir: model holds a checkpoint",)),
    Case("run.dir below a file", "run {config} --output note.txt/run", ("run.dir", "note.txt"), write("note.txt", "x")),
]
MODELS = [
    Case("model path missing", "run {config} --model ./nowhere", ("model.path", "./nowhere", "does not exist")),
    Case("model path is a file", "run {config} --model model/config.json", ("model.path", "is a file")),
    Case(
        "model path is a GGUF file",
        "run {config} --model model/a.gguf",
        ("model.path", "a.gguf", "model.gguf_file"),
        write("model/a.gguf", "GGUF"),
    ),
    Case("no config.json", "run {config} --model model", ("model.path", "no config.json"), remove("model/config.json")),
    Case(
        "only a GGUF file",
        "run {config} --model model",
        ("no config.json", "model.gguf_file", "a.gguf"),
        lambda work: (remove("model/config.json")(work), write("model/a.gguf", "GGUF")(work))[0],
    ),
    Case(
        "damaged config.json",
        "run {config} --model model",
        ("model", "config.json cannot be used"),
        write("model/config.json", "{"),
    ),
    Case(
        "unknown architecture",
        "run {config} --model model",
        ("config.json cannot be used", "nonesuch"),
        write("model/config.json", '{"model_type": "nonesuch"}'),
    ),
    Case("package not installed", "run {config} --model package:nonesuch_pkg", ("nonesuch_pkg", "pip install")),
    Case(
        "hub id offline", "run {config} --model nobody/nothing-here", ("model.path", "nobody/nothing-here", "network")
    ),
    Case(
        "GGUF file missing",
        "run {config} --model model model.gguf_file=b.gguf",
        ("model.gguf_file", "b.gguf is not in", "a.gguf"),
        write("model/a.gguf", "GGUF"),
    ),
    Case(
        "damaged GGUF file",
        "run {config} --model model model.gguf_file=a.gguf",
        ("model.gguf_file", "a.gguf cannot be read"),
        write("model/a.gguf", "GGUF"),
    ),
    Case("truncated weights", "run {config} --model model", ("model.safetensors is truncated", "again"), truncate),
    Case(
        "weights that are no safetensors",
        "run {config} --model model",
        ("model.safetensors is truncated or damaged, or not a safetensors file", "again"),
        write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1"),
    ),
    Case("missing shard", "run {config} --model model", ("shard model-00001-of-", "is missing"), lose_a_shard),
    Case(
        "only pickle", "run {config} --model model", ("pytorch_model.bin", "convert it to safetensors"), pickle_weights
    ),
    Case("no weights", "run {config} --model model", ("holds no safetensors"), remove("model/model.safetensors")),
    Case(
        "no tokenizer",
        "run {config} --model model",
        ("model has no usable tokenizer",),
        remove("model/tokenizer.json", "model/tokenizer_config.json"),
    ),
    Case(
        "a tokenizer of a later version",
        "run {config} --model model",
        ("model has no usable tokenizer", "tokenizer.json has a form that tokenizers", "pip install -U tokenizers"),
        future_tokenizer,
    ),
    Case(
        "a tokenizer with code of its own",
        "run {config} --model model",
        ("model has no usable tokenizer", "model.trust_remote_code=true"),
        write(
            "model/tokenizer_config.json",
            '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
        ),
    ),
    Case(
        "a tokenizer without an end of text",
        "run {config} --model model",
        ("train: the tokenizer has no end-of-text token", "tokenizer_config.json (eos_token)"),
        edit_tokenizer(forget_the_end),
    ),
    Case(
        "weights that are no floating-point numbers",
        "prune {config} --model model",
        ("model holds no floating-point weights", "before it was quantised"),
        lambda work: save_file(
            {name: tensor.to(torch.int8) for name, tensor in load_file(work.model / "model.safetensors").items()},
            work.model / "model.safetensors",
        ),
    ),
    Case(
        "a config from which no model can be built",
        "run {config} --model model",
        ("model.path: no causal language model can be built from its config",),
        edit_config(pad_token_id=260),
    ),
    Case("NaN weights", "prune {config} --model model", (WEIGHT, "NaN"), put_nan, code=1),
    Case(
        "NaN weights, magnitude",
        "prune {config} --model model --method magnitude",
        (WEIGHT.removesuffix(".weight"), "NaN"),
        put_nan,
        code=1,
    ),
    Case(
        "NaN in the head, which pruning only copies",
        "prune {config} --model model",
        (HEAD, "NaN"),
        put_nan_in_head,
        code=1,
    ),
    Case("NaN weights, new folders", "prune {config} --model model --output a/b/c", (WEIGHT, "NaN"), put_nan, code=1),
    Case(
        "weights of another shape",
        "prune {config} --model model",
        ("mlp.", "shape (32, 48)", "(32, 64)", "(and 5 more)", "correct its config.json"),
        claim_another_shape,
    ),
    Case(
        "3:7 does not fit",
        "prune {config} --pattern 3:7",
        ("prune.pattern", "3:7", "32 input features, not a multiple of 7", "prune.targets"),
    ),
    Case(
        "2:4 does not fit one layer",
        "prune {config} --model model --pattern 2:4",
        ("prune.pattern", "down_proj", "38 input features, not a multiple of 4", "leave the layer out"),
        narrow_model,
    ),
    Case(
        "target that matches nothing",
        "prune {config} prune.targets=[q_proj,query]",
        ("prune.targets", "'query' matches no linear layer", "q_proj", "down_proj"),
    ),
    Case(
        "training target that matches nothing",
        "run {config} train.targets=[query]",
        ("train.targets", "'query' matches no linear layer", "q_proj"),
    ),
    Case("rank above out_features", "run {config} train.rank=33", ("train.rank", "33", "output features")),
    Case(
        "lora over the zeros",
        "run {config} train.method=lora",
        ("merge.mask: keep", "fills the zeros", "merge.mask=reapply", "merge.mask=dense"),
    ),
    Case("lora over the zeros, too late", "merge {config} train.method=lora", ("merge.mask: keep", "fills the zeros")),
    Case(
        "an old mask over chosen ones",
        "run {config} train.method=ste merge.mask=reapply",
        ("merge.mask: reapply", "would undo the masks", "merge.mask=keep"),
    ),
    Case(
        "dynamic masks of shared out matrices",
        "run {config} train.method=ste launch.strategy=fsdp",
        ("train.method: ste", "launch.strategy fsdp", "use ddp"),
    ),
    Case("unknown method of training", "run {config} train.method=maskedlora", ("train.method", "masked_lora")),
    Case("negative decay of masks", "run {config} train.mask_decay=-1", ("train.mask_decay", "at least 0")),
    Case("no steps between masks", "run {config} train.mask_steps=0", ("train.mask_steps", "at least 1")),
]
PRUNING = [
    Case(
        "skip that matches nothing",
        "prune {config} prune.skip=[lm_head]",
        ("prune.skip: 'lm_head' matches no linear layer", "q_proj", "down_proj"),
    ),
    Case(
        "skip that leaves nothing",
        "prune {config} prune.skip=[model.layers.*]",
        ("prune.targets: nothing is left to prune", "prune.skip"),
    ),
    Case("skip that is no list", "prune {config} prune.skip=3", ("prune.skip", "expected a list of names", "3")),
    Case(
        "overrides that match nothing",
        "prune {config} 'prune.overrides={{fc1: 0.4}}'",
        ("prune.overrides: 'fc1' matches none of the 14 targets",),
    ),
    Case(
        "overrides of a layer that is skipped",
        "prune {config} prune.skip=[down_proj] 'prune.overrides={{down_proj: 0.4}}'",
        ("prune.overrides: 'down_proj' matches none of the 12 targets",),
    ),
    Case(
        "overrides with a pattern that is none",
        "prune {config} 'prune.overrides={{down_proj: 4:2}}'",
        ("command line: prune.overrides", "'4:2'", "0 < N < M"),
    ),
    Case(
        "overrides without a pattern",
        "prune {config} prune.overrides=[down_proj]",
        ("prune.overrides", "expected a mapping of name to N:M or a ratio", "['down_proj']"),
    ),
    Case(
        "overrides 2:5 do not divide",
        "prune {config} 'prune.overrides={{down_proj: 2:5}}'",
        ("prune.overrides: pattern 2:5", "down_proj has 48 input features, not a multiple of 5"),
    ),
    Case(
        "OWL with N:M",
        "prune {config} prune.allocation=owl",
        ("prune.allocation: splits a ratio over the blocks, but prune.pattern is 2:4",),
    ),
    Case(
        "a ratio per block with N:M",
        "prune {config} prune.allocation=[0.5,0.6]",
        ("prune.allocation: splits a ratio over the blocks, but prune.pattern is 2:4",),
    ),
    Case(
        "ratios for another number of blocks",
        "prune {config} prune.pattern=0.5 prune.allocation=[0.5,0.5,0.5]",
        ("prune.allocation: 3 ratios for 2 blocks", "give one for each"),
    ),
    Case(
        "a block's ratio 1.5",
        "prune {config} prune.pattern=0.5 prune.allocation=[0.5,1.5]",
        ("prune.allocation: pattern 1.5", "between 0 and 1"),
    ),
    Case(
        "unknown allocation",
        "prune {config} prune.pattern=0.5 prune.allocation=owll",
        ("prune.allocation", "expected uniform | owl or a list of numbers", "'owll'"),
    ),
    Case(
        "OWL beyond 0 and 1",
        "prune {config} prune.pattern=0.5 prune.allocation=owl prune.owl_lambda=0.99",
        ("prune.allocation: OWL with a spread of 0.99 around 0.5", "lower the spread"),
    ),
    Case(
        "a mask and ratios",
        "prune {config} prune.pattern=0.5 prune.allocation=owl prune.mask_from=model",
        ("prune.allocation: the mask of prune.mask_from says where the zeros are",),
    ),
    Case(
        "mask_from missing",
        "prune {config} --method sparsegpt prune.mask_from=./nowhere",
        ("prune.mask_from: ./nowhere does not exist",),
    ),
    Case(
        "mask_from a file",
        "prune {config} --method sparsegpt prune.mask_from=model/config.json",
        ("prune.mask_from", "model/config.json is a file"),
    ),
    Case(
        "mask_from without weights",
        "prune {config} --method sparsegpt prune.mask_from=model",
        ("prune.mask_from", "model holds no safetensors"),
        remove("model/model.safetensors"),
    ),
    Case(
        "mask_from a dense checkpoint",
        "prune {config} --method sparsegpt prune.mask_from=model",
        ("model.layers.0.self_attn.q_proj", "the mask of prune.mask_from is not 2:4"),
    ),
    Case(
        "mask_from a dense checkpoint, ratio",
        "prune {config} --method sparsegpt prune.pattern=0.5 prune.mask_from=model",
        ("model.layers.0.self_attn.q_proj", "the mask of prune.mask_from is not 0.5"),
    ),
    Case(
        "mask_from a model of other shapes",
        "prune {config} --method sparsegpt prune.pattern=0.5 prune.mask_from=model",
        ("prune.mask_from: model: model.layers.0.self_attn.k_proj.weight", "(32, 32)", "(16, 32)"),
        half_of_another_model,
    ),
    Case(
        "tuning blocks that are never run dense",
        "prune {config} prune.order=module prune.reconstruct_epochs=1",
        ("prune.reconstruct_epochs", "prune.order module"),
    ),
    Case("unknown order", "prune {config} prune.order=modul", ("prune.order", "'modul'", "did you mean module?")),
    Case(
        "unknown place for hidden states",
        "prune {config} prune.memory=tape",
        ("prune.memory", "'tape' is not one of auto, device, ram, disk"),
    ),
    Case("no process", "prune {config} launch.num_processes=0", ("launch.num_processes", "0 must be at least 1")),
    Case(
        "epochs below 0",
        "prune {config} prune.reconstruct_epochs=-1",
        ("prune.reconstruct_epochs", "-1 must be at least 0"),
    ),
    Case(
        "no calibration windows at a time",
        "prune {config} prune.batch_size=0",
        ("prune.batch_size", "0 must be at least 1"),
    ),
]
TEXTS = [
    Case(
        "calibration file missing",
        "prune {config} prune.calibration.dataset=lost.txt",
        ("prune.calibration.dataset", "lost.txt is not a file", "wikitext2"),
    ),
    Case(
        "empty calibration file",
        "prune {config} prune.calibration.dataset=empty.txt",
        ("prune.calibration.dataset", "empty.txt holds no text"),
        write("empty.txt", " \n"),
    ),
    Case(
        "calibration rows without text",
        "prune {config} prune.calibration.dataset=rows.jsonl",
        ("rows.jsonl", "column text", "its columns: question"),
        write("rows.jsonl", '{"question": "a"}\n'),
    ),
    Case(
        "calibration that is no text",
        "prune {config} prune.calibration.dataset=model/model.safetensors",
        ("prune.calibration.dataset", "model.safetensors is not UTF-8 text"),
    ),
    Case(
        "too little calibration text",
        "prune {config} prune.calibration.dataset=short.txt",
        ("prune.calibration", "short.txt has ", "4 windows of 64 need 256", "fewer samples"),
        write("short.txt", "Too little."),
    ),
    Case(
        "random documents that are too short",
        "prune {config} prune.calibration.dataset=rows.jsonl prune.calibration.windows=random-document",
        ("prune.calibration.windows", "rows.jsonl has 1 documents longer than 64", "needs 4", "concatenate or auto"),
        write("rows.jsonl", f'{{"text": "{80 * "long "}"}}\n' + 20 * '{"text": "Short."}\n'),
    ),
    Case(
        "unknown kind of windows",
        "prune {config} prune.calibration.windows=random",
        ("prune.calibration.windows", "'random' is not one of auto, random-document, concatenate"),
    ),
    Case(
        "calibration column missing",
        "prune {config} prune.calibration.dataset=rows.jsonl prune.calibration.column=body",
        ("prune.calibration.dataset", "rows.jsonl lacks a column body", "its columns: text, title"),
        write("rows.jsonl", '{"text": "a", "title": "b"}\n'),
    ),
    Case(
        "a column of plain text",
        "prune {config} prune.calibration.dataset=plain.txt prune.calibration.column=body",
        ("prune.calibration", "plain.txt has no columns", "leave out column body"),
        write("plain.txt", "Text."),
    ),
    Case(
        "windows beyond the model's positions",
        "run {config} prune.calibration.seq_len=129 train.data.seq_len=130 eval.seq_len=131",
        (
            "prune.calibration.seq_len: 129 exceeds the model's 128 positions",
            "train.data.seq_len: 130 exceeds",
            "eval.seq_len: 131 exceeds",
        ),
    ),
    Case(
        "training data missing",
        "run {config} train.data.dataset=lost.jsonl",
        ("train.data.dataset", "lost.jsonl is no"),
    ),
    Case(
        "training data without the columns",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "lacks instruction and output", "its columns: question, answer"),
        write("rows.jsonl", '{"question": "a", "answer": "b"}\n'),
    ),
    Case(
        "a later row without output",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "rows.jsonl", "row 7", "output"),
        write("rows.jsonl", 6 * ROWS + '{"instruction": "a"}\n'),
    ),
    Case(
        "a row that holds null",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "rows.jsonl", "row 7", "output"),
        write("rows.jsonl", 6 * ROWS + '{"instruction": "a", "output": null}\n'),
    ),
    Case(
        "empty training data",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "rows.jsonl holds no rows"),
        write("rows.jsonl", "\n"),
    ),
    Case(
        "broken jsonl",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "rows.jsonl", "cannot be read as JSON", "line 3"),
        write("rows.jsonl", 2 * ROWS + '{"instruction": "a", \n'),
    ),
    Case(
        "rows that are no objects",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "one JSON object per row"),
        write("rows.jsonl", '"text"\n'),
    ),
    Case(
        "training data of conversations",
        "run {config} train.data.dataset=rows.jsonl",
        ("train.data.dataset", "lacks instruction and output", "its columns: messages, id"),
        write("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}], "id": 1}\n'),
    ),
    Case(
        "one of several data sets missing",
        "run {config} 'train.data.dataset={{instructions: 1, lost.jsonl: 2}}'",
        ("train.data.dataset", "lost.jsonl is not a file", "alpaca-gpt4"),
    ),
    Case(
        "a weight of zero",
        "run {config} 'train.data.dataset={{instructions: 0}}'",
        ("train.data.dataset", "the weight of instructions is 0", "above 0"),
    ),
    Case(
        "a prompt without the instruction",
        "run {config} train.data.prompt=Alpaka",
        ("train.data.prompt", "'Alpaka' is neither alpaca nor chat", "lacks {instruction}"),
    ),
    Case(
        "a prompt with an unknown field",
        "run {config} \"train.data.prompt='{{instruction}} {{context}}'\"",
        ("train.data.prompt", "{context}", "neither {instruction} nor {input}"),
    ),
    Case(
        "chat without a chat template",
        "run {config} train.data.prompt=chat",
        ("train.data.prompt", "no chat template", "use alpaca"),
    ),
    Case("val_size above the rows", "run {config} train.data.val_size=100", ("train.data.val_size: 100", "24 rows")),
    Case(
        "unknown task",
        "eval {config} --tasks boolqq",
        ("eval.tasks", "boolqq is neither zeroshot", "did you mean boolq"),
    ),
    Case(
        "evaluation text missing",
        "run {config} eval.perplexity=[lost.txt]",
        ("eval.perplexity", "lost.txt is not a file", "wikitext2"),
    ),
    Case(
        "evaluation text shorter than a window",
        "run {config} eval.perplexity=[short.txt]",
        ("eval.perplexity", "short.txt has ", "one window of 64", "shorter eval.seq_len"),
        write("short.txt", "Too little."),
    ),
    Case(
        "calibration with a token that the model does not embed",
        "prune {config} --model model prune.calibration.dataset=it.txt",
        ("prune.calibration.dataset: it.txt: token id 260 ('<image>')", "beyond the model's 260 embeddings"),
        edit_tokenizer(add_two_tokens, it_txt="<more> <image>" * 200),
    ),
    Case(
        "training with a token that the model does not embed",
        "run {config} --model model train.data.dataset=rows.jsonl train.data.val_size=0 "
        "\"train.data.prompt='{{instruction}}:'\"",
        ("train.data: token id 260 ('<image>')", "beyond the model's 260 embeddings"),
        edit_tokenizer(add_two_tokens, rows_jsonl=5 * ROWS + ROWS.replace('"b"', '"<image>"')),
    ),
    Case(
        "evaluation with a token that the model does not embed, at the end",
        "eval {config} --model model eval.perplexity=[it.txt] eval.max_tokens=null",
        ("eval.perplexity: it.txt: token id 260 ('<image>')", "beyond the model's 260 embeddings"),
        edit_tokenizer(add_two_tokens, it_txt="Nothing. " * 900 + "<image>" + "." * 63),
    ),
    Case(
        "half a character to calibrate with",
        "prune {config} prune.calibration.dataset=rows.jsonl",
        ("rows.jsonl: row 2: text has half of a surrogate pair ('\\ud83d')",),
        write("rows.jsonl", '{"text": "a", "title": "\\ud83d"}\n{"text": "a \\ud83d b"}\n'),
    ),
    Case(
        "half a character in an instruction",
        "run {config} train.data.dataset=rows.jsonl",
        ("rows.jsonl: row 3: input has half of a surrogate pair ('\\ude00')",),
        write("rows.jsonl", 2 * ROWS + '{"instruction": "a", "input": "\\ude00", "output": "b"}\n'),
    ),
    Case(
        "half a character in an evaluation text",
        "eval {config} eval.perplexity=[rows.json]",
        ("rows.json: row 1: text has half of a surrogate pair",),
        write("rows.json", '[{"text": "\\ud83d"}]'),
    ),
    Case(
        "rows of brackets",
        "run {config} train.data.dataset=rows.jsonl",
        ("rows.jsonl", "cannot be read as JSON", "recursion"),
        write("rows.jsonl", "[" * 100_000),
    ),
    Case(
        "perplexity while training on a text that is not there",
        "train {config} train.perplexity_steps=1 eval.perplexity=[lost.txt]",
        ("eval.perplexity: lost.txt",),
    ),
    Case(
        "a reference without weights",
        "run {config} eval.divergence=model",
        ("model holds no safetensors weights",),
        remove("model/model.safetensors"),
    ),
    Case(
        "a teacher without weights",
        "run {config} train.distill.teacher=model",
        ("model holds no safetensors weights",),
        remove("model/model.safetensors"),
    ),
    Case("nothing to evaluate", "eval {config} --tasks ,", ("eval.perplexity", "eval.tasks")),
]
CHECKPOINTS = [
    Case("merge before anything", "merge {config}", ("pruned does not exist", "sppctl prune")),
    Case("train before prune", "train {config}", ("pruned does not exist", "sppctl prune")),
    Case("inspect nothing", "inspect ./nowhere", ("CHECKPOINT: ./nowhere does not exist",)),
    Case("bench nothing", "bench ./nowhere", ("CHECKPOINT: ./nowhere does not exist",)),
    Case("inspect truncated weights", "inspect model", ("model.safetensors is truncated", "again"), truncate),
    Case("inspect with a bad pattern", "inspect model --expect 4:2", ("--expect", "'4:2'", "0 < N < M")),
    Case(
        "a dense model is not 2:4",
        "inspect model --expect 2:4",
        ("model is not 2:4", "no matrix is sparse at all"),
        code=1,
    ),
    Case(
        "one weight too many",
        "inspect model --expect 2:4",
        ("model is not 2:4", "1 violation", f"{WEIGHT}: not 2:4"),
        prune_all_but_one_group,
        code=1,
    ),
    Case("report on no run", "report model", ("model is not a run directory", "run.dir")),
    Case("report on nothing", "report nowhere", ("nowhere is not a run directory",)),
    Case("inspect what no file can be called", f"inspect {300 * 'n'}", ("... is longer than", "a file name (255)")),
    Case("report on what no file can be called", f"report {300 * 'n'}", ("... is longer than", "a file name (255)")),
    Case("evaluate what no file can be called", f"eval {{config}} --model {300 * 'n'}", ("... is longer than",)),
    Case("evaluate nothing", "eval {config} --model ./nowhere", ("./nowhere", "does not exist")),
]


def check(case: Case, work: Workplace) -> None:
    case.damage(work)
    before = work.files()
    outcome = work.run(*shlex.split(case.command.format(config=work.config)))
    said = " ".join(outcome.err.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    for word in case.words:
        assert word in said
    assert "Traceback" not in outcome.err
    assert "(--debug shows where)" not in outcome.err, "an exception that nobody expected"
    assert outcome.code == case.code
    assert work.files().keys() == before.keys(), "something was left behind"
    assert work.files() == before, "an input was changed"


@pytest.mark.parametrize("case", USAGE + MODELS + PRUNING + TEXTS + CHECKPOINTS, ids=lambda case: case.name)
def test_a_wrong_command_says_so_and_leaves_nothing(case: Case, work: Workplace) -> None:
    check(case, work)


# --- in a run that is finished ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with tiny.yaml and a run of it up to the adapter, and with the adapter of a model of other shapes."""
    root = tmp_path_factory.mktemp("finished")
    wide = root / "wide"
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_shape(intermediate_size=64))).save_pretrained(wide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, wide / name)
    options = "run.dir=run", "prune.method=magnitude", "train.data.seq_len=32", "train.max_steps=1", "train.lr=4e-3"
    write_config(root / "tiny.yaml", *options, "train.batch_size=1", "train.micro_batch_size=1", "eval.max_tokens=128")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, model in (("run", llama), ("wide-run", wide)):
            work = Run(load_config("tiny.yaml", [f"run.dir={name}", f"model.path={model}"]))
            with work.lock():
                work.do(PRUNE)
                work.do(TRAIN)
    return root


def lose_the_adapter(work: Workplace) -> None:
    shutil.rmtree(work.root / "run/adapter")


def flip_a_bit(work: Workplace) -> None:
    path = work.root / "run/pruned/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


MEASURE = "eval tiny.yaml --output other --model wide"


def take_the_other_adapter(work: Workplace) -> None:
    shutil.rmtree(work.root / "run/adapter")
    shutil.copytree(work.root / "wide-run/adapter", work.root / "run/adapter")


def take_the_other_adapter_s_files(work: Workplace) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(work.root / "wide-run/adapter" / name, work.root / "run/adapter" / name)


def make_it_a_vera(work: Workplace) -> None:
    path = work.root / "run/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "VERA"}))


def put_nan_into_the_adapter(work: Workplace) -> None:
    path = work.root / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith("spp_beta")).fill_(float("nan"))
    save_file(tensors, path)


IN_A_RUN = [
    Case(
        "merge before train",
        "merge tiny.yaml",
        ("adapter does not exist", "sppctl train"),
        lose_the_adapter,
    ),
    Case(
        "another run's adapter",
        "merge tiny.yaml",
        ("trained on other weights", "sppctl train --force"),
        take_the_other_adapter,
    ),
    Case(
        "another model's adapter",
        "merge tiny.yaml",
        ("adapter_config.json is damaged", "adapter_model.safetensors is damaged", "sppctl train --force"),
        take_the_other_adapter_s_files,
    ),
    Case("adapter of another kind", "merge tiny.yaml", ("adapter_config.json is damaged", "--force"), make_it_a_vera),
    Case(
        "adapter without weights",
        "merge tiny.yaml",
        ("adapter_model.safetensors is missing", "sppctl train --force"),
        remove("run/adapter/adapter_model.safetensors"),
    ),
    Case(
        "NaN in the adapter",
        "merge tiny.yaml",
        ("adapter_model.safetensors is damaged", "sppctl train --force"),
        put_nan_into_the_adapter,
    ),
    Case(
        "prune again, otherwise",
        "prune tiny.yaml --pattern 4:8",
        ("prune.pattern = 2:4, now 4:8", "--force", "run.dir"),
    ),
    Case(
        "train after another prune",
        "train tiny.yaml prune.pattern=4:8",
        ("prune.pattern = 2:4, now 4:8", "sppctl prune --force"),
    ),
    Case(
        "train again, otherwise",
        "train tiny.yaml train.lr=1e-2",
        ("train.lr = 0.004, now 0.01", "--force", "run.dir"),
    ),
    *(
        Case(name, command, ("run/pruned/model.safetensors is damaged", "restore it"), flip_a_bit)
        for name, command in (
            ("damaged weights of another run to inspect", "inspect run/pruned --expect 2:4"),
            ("damaged weights of another run to time", "bench run/pruned --batch 1 --prompt 4 --new 1 --repeats 1"),
            ("damaged weights of another run to prune", "prune tiny.yaml --output other --model run/pruned"),
            ("damaged weights of another run as mask", "prune tiny.yaml --output other prune.mask_from=run/pruned"),
            ("damaged weights of another run to compare with", f"{MEASURE} eval.divergence=run/pruned"),
        )
    ),
    Case(
        "its own pruned weights as model",
        "prune tiny.yaml --force --model run/pruned",
        ("model.path: run/pruned is made by this run itself",),
    ),
    Case(
        "its own adapter as model to measure",
        "eval tiny.yaml --model base model.path=run/../linked/adapter",
        ("model.path: run/../linked/adapter is made by this run itself",),
        lambda work: (work.root / "linked").symlink_to("run"),
    ),
    Case(
        "its own pruned weights as mask",
        "prune tiny.yaml --force prune.method=sparsegpt prune.mask_from=run/pruned",
        ("prune.mask_from: run/pruned is made by this run itself",),
    ),
    Case(
        "its own result as teacher",
        "train tiny.yaml --force train.distill.teacher=run/merged",
        ("train.distill.teacher: run/merged is made by this run itself",),
    ),
    Case(
        "a revision of a folder",
        "eval tiny.yaml --model base --output other model.path=wide model.revision=main",
        ("model.revision: wide is a local directory, which has no revision main",),
    ),
    Case(
        "run again, otherwise",
        "run tiny.yaml prune.method=wanda prune.calibration.seq_len=32",
        ("prune.method = magnitude, now wanda", "--force"),
    ),
    Case(
        "damaged record",
        "train tiny.yaml",
        ("pruned/stage.json is damaged", "--force"),
        write("run/pruned/stage.json", "{"),
    ),
    Case(
        "report on a damaged record",
        "report run",
        ("pruned/stage.json", "damaged"),
        write("run/pruned/stage.json", "{"),
    ),
    Case("report on a good and a bad run", "report run model", ("model is not a run directory",)),
]


@pytest.mark.parametrize("case", IN_A_RUN, ids=lambda case: case.name)
def test_a_wrong_command_leaves_a_run_as_it_was(case: Case, work: Workplace, finished: Path) -> None:
    shutil.copytree(finished, work.root, dirs_exist_ok=True)
    check(case, work)
