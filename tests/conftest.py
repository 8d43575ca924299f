"""Tiny random models of several families, a byte-level tokenizer, and small texts: everything offline, in seconds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which transformers does

import stage_calls
import transformers
from checkpoints import weights_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sppctl import cli, console, machine, prune_linear
from sppctl.config.load import load_config, to_yaml
from sppctl.config.settings import PROJECTIONS, Config
from sppctl.prune.walk import Journal
from sppctl.records import BlockRecord, PruneRecord
from sppctl.run import pipeline
from sppctl.run.directory import Run

VOCAB = 260
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    # one block with a sliding window, one without: each block has its own mask
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, sliding_window=16, query_pre_attn_scalar=8),
    "opt": lambda: transformers.OPTConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL | {"num_key_value_heads": 2}),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED, sliding_window=16, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL | {"num_key_value_heads": 2}),
    # stored (in, out)
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257
    ),
    # experts fused into 3-D parameters, one matrix each in the checkpoint
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}
ALPACA = [
    {
        "instruction": f"Add {i} and {i + 1}.",
        "input": "" if i % 2 else f"Numbers {i}",
        "output": f"The sum is {2 * i + 1}.",
    }
    for i in range(24)
]
AVX2 = "fpu sse4_1 avx avx2 fma"  # flags of a CPU without bfloat16 units
BF16 = f"{AVX2} avx512f avx512bw avx512vl avx512_vnni avx512_bf16"  # and of one with them
Cpu = Callable[..., None]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model, then files with the most slow tests: no worker is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name != "test_real_model.py", -slow[item.path]))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that token counts can be worked out by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    return fast


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test caches outlives the session, and nothing cached before changes a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPPCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cpu:
    """cpu(flags, NAME=value): as far as dtypes are chosen, the test goes on on such a CPU, with these switches."""

    def use(flags: str | None, **switches: str) -> None:
        information = tmp_path / "cpuinfo"
        if flags is not None:
            first = f"processor\t: 0\nmodel name\t: Some CPU @ 2: 3 GHz\nflags\t\t: {flags}\n"
            information.write_text(f"{first}\nprocessor\t: 1\nflags\t\t: something else\n")
        monkeypatch.setattr(machine, "CPU_INFORMATION", information)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in switches.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint("llama", dtype=...) -> directory of a tiny random checkpoint; the same one for the same call."""
    made: dict[tuple[str, torch.dtype, str], Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
        key = (family, dtype, max_shard_size)
        if key not in made:
            directory = tmp_path_factory.mktemp(family) / family
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype)
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            byte_tokenizer().save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random Llama checkpoint; never write into it."""
    return make_checkpoint("llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text, some 4,000 tokens of the byte tokenizer."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text("\n\n".join(f"Sentence number {i} says that {i * 7} follows {i * 7 - 1}." for i in range(90)))
    return path


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 instruction rows in Alpaca's columns."""
    path = tmp_path_factory.mktemp("alpaca") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    return path


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own for lm-eval: sums of 9 and 4 questions in a group, a text, and answers in words."""
    folder = tmp_path_factory.mktemp("own_tasks")
    rows = [{"a": a, "b": 7 * a % 5, "choices": ["even", "odd", f"{a} or so"]} for a in range(13)]
    for name, part in (("small_sums", rows[:9]), ("large_sums", rows[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    question = "{{a}} plus {{b}} is" + " a number, and that number is" * 2
    common = """
test_split: test
metadata: {version: 1.5}
"""
    for name in ("small_sums", "large_sums"):
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}"
        choice = f"""{data}{common}
task: {name}
output_type: multiple_choice
doc_to_text: "{question}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{(a + b) % 2}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
        (folder / f"{name}.yaml").write_text(choice)
    (folder / "said.yaml").write_text(f"""{data}{common}
task: said
output_type: generate_until
doc_to_text: "{question}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["."], do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    said = (folder / "said.yaml").read_text()
    drawn = said.replace("task: said", "task: drawn").replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (folder / "drawn.yaml").write_text(drawn)
    (folder / "read.yaml").write_text(f"""{data}{common}
task: read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{question} {question} {question}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""")
    (folder / "sums.yaml").write_text("""
group: sums
task: [small_sums, large_sums]
aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: acc_norm, weight_by_size: false}]
metadata: {version: 2}
""")
    return folder


TINY = """
run: {{dir: {run}, seed: 1}}
model: {{path: {model}, device: cpu}}
prune:
  method: wanda
  pattern: 2:4
  calibration: {{dataset: {text}, samples: 4, seq_len: 64}}
train:
  rank: 4
  data: {{dataset: {rows}, seq_len: 128, val_size: 4}}
  epochs: 1
  batch_size: 4
  micro_batch_size: 2
  lr: 1e-2
eval:
  perplexity: [{text}]
  seq_len: 64
  max_tokens: 512
  prompts: []
"""
# of a run that takes two seconds
SHORT = (
    *("run.seed=0", "prune.calibration.samples=2", "train.data.seq_len=96", "train.data.val_size=2"),
    *("train.max_steps=2", "train.batch_size=2", "train.micro_batch_size=1", "eval.max_tokens=256"),
)


@pytest.fixture(scope="session")
def write_config(llama: Path, text_file: Path, alpaca_file: Path) -> Callable[..., Path]:
    """write_config(path, KEY=VALUE, ...) writes a configuration of the whole pipeline on the tiny Llama."""

    def write(path: Path, *overrides: str) -> Path:
        path.write_text(TINY.format(run=path.parent / "run", model=llama, text=text_file, rows=alpaca_file))
        if overrides:
            path.write_text(to_yaml(load_config(str(path), overrides)))
        return path

    return write


@pytest.fixture
def config_file(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A configuration that runs the whole pipeline on the tiny Llama in some seconds."""
    return write_config(tmp_path / "tiny.yaml")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], llama: Path) -> Path:
    """A folder with tiny.yaml, the dense model in base/, and a finished run in run/; tests work in copies."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama, root / "base")
    write_config(root / "tiny.yaml", *SHORT, "run.dir=run", "model.path=base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pipeline.run_all(Run(load_config("tiny.yaml")))
    return root


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a copy of the finished run, its configuration, and its dense model."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with golden files and the data mirror beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def from_mirror(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Evaluates an expression in a process of its own whose hub datasets come from the mirror."""
    setup = shared_data / "hf-env.sh"
    if not setup.is_file():
        pytest.skip("no data mirror beside the checkout")
    environment = os.environ | {"SPPCTL_HF_SCRATCH": str(tmp_path_factory.mktemp("hf") / "hf")}

    def evaluate(expression: str) -> Any:
        code = f"import json; from sppctl.data import instructions, texts; print(json.dumps({expression}))"
        done = subprocess.run(
            ["bash", "-c", f'source "{setup}" && exec "$0" -c "$1"', sys.executable, code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return evaluate


@pytest.fixture
def configure(config_file: Path) -> Callable[..., Config]:
    """configure(KEY=VALUE, ...) -> that configuration, changed."""

    def configured(*overrides: str) -> Config:
        return load_config(str(config_file), overrides)

    return configured


class Pruned(NamedTuple):
    """A pruned checkpoint: its directory, all its tensors, and what is recorded of them."""

    directory: Path
    weights: dict[str, Tensor]
    record: PruneRecord


Prune = Callable[..., Pruned]


@pytest.fixture
def prune(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> Prune:
    """prune(KEY=VALUE, ..., base=, windows=) prunes the tiny Llama, or another checkpoint, into a new directory."""
    numbers = itertools.count()

    def pruned(*overrides: str, base: Path = llama, windows: Tensor | None = None, out: Path | None = None) -> Pruned:
        directory = out or tmp_path / f"pruned-{next(numbers)}"
        record = stage_calls.prune(configure(*overrides), base, directory, windows=windows)
        return Pruned(directory, weights_of(directory), record)

    return pruned


@pytest.fixture
def interrupt(prune: Prune, tmp_path: Path) -> Callable[..., Path]:
    """interrupt(KEY=VALUE, ..., base=, blocks=) -> the directory of a pruning that ended after so many blocks."""

    def interrupted(*overrides: str, base: Path, blocks: int = 2) -> Path:
        append = Journal.append

        def then_stop(self: Journal, entry: BlockRecord) -> None:
            append(self, entry)
            if len(self.blocks) == blocks:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "append", then_stop)
            with pytest.raises(KeyboardInterrupt):
                prune(*overrides, base=base, out=tmp_path / "interrupted")
        return tmp_path / "interrupted"

    return interrupted


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama of four blocks in several shards, with other outliers in each; never write into it."""
    directory = tmp_path_factory.mktemp("deep") / "deep"
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for index, block in enumerate(model.model.layers):
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.weight.data.view(-1)[:: 200 // (index + 1)] *= 40
    model.save_pretrained(directory, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("prune", ...) runs ``sppctl prune ...`` in this process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sppctl", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture
def pruned(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> tuple[Path, PruneRecord]:
    """The tiny Llama, pruned as the module's own ``configure`` says, and the record of that."""
    return tmp_path / "pruned", stage_calls.prune(configure(), llama, tmp_path / "pruned")


def stored_dtype(directory: Path) -> str:
    """The name of the dtype of a tiny checkpoint, which computes in it on any machine."""
    return str(json.loads((directory / "config.json").read_text())["dtype"])


def trained_dtype(directory: Path) -> str:
    """The dtype that a tiny checkpoint is trained in where bfloat16 is native: never float16."""
    return {"float16": "bfloat16"}.get(stored_dtype(directory), stored_dtype(directory))


def pruned_llama(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny Llama, loaded, its projections pruned 2:4."""
    model = AutoModelForCausalLM.from_pretrained(directory).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in PROJECTIONS:
            module.weight.data = prune_linear(module.weight.data, method="magnitude", pattern="2:4")
    return model.eval()


def kept_for_backward(call: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors that a computation keeps for its backward pass: those that autograd was told of, and those on a ctx."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = call()
    nodes = [result.grad_fn]
    for node in nodes:
        kept += [value for value in getattr(node, "__dict__", {}).values() if isinstance(value, Tensor)]
        nodes += [after for after, _ in node.next_functions if after is not None]
    return kept


@contextlib.contextmanager
def cut_after(step: int) -> Iterator[None]:
    """The training inside has to end with an error after an optimizer step, before anything is logged or saved."""

    class CutError(Exception):
        pass

    original = console.Progress.advance

    def stop(self: console.Progress, text: str = "", steps: int = 1) -> None:
        original(self, text, steps)
        if (self.label, self.done) == ("training", step):
            raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.Progress, "advance", stop)
        with pytest.raises(CutError):
            yield
