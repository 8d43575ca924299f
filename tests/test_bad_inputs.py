"""Whatever is wrong with the input: a message that names it and the way out, the right exit code, and nothing left."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, Command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl.files.names import LOG

ROWS = '{"instruction": "a", "input": "", "output": "b"}\n'


@dataclass
class Workplace:
    """A folder to run commands in, with all inputs; nothing else may appear in it."""

    root: Path  # the current directory of the commands
    config: Path
    run: Command

    @property
    def model(self) -> Path:
        """A copy of the tiny Llama, to be damaged."""
        return self.root / "model"

    def files(self) -> dict[str, bytes]:
        """Every file and folder with its content; of the log, which has the refusal, only that it is there."""
        paths = sorted(self.root.rglob("*"))
        kept = {path for path in paths if path.is_file() and path.name != LOG}
        return {str(path.relative_to(self.root)): path.read_bytes() if path in kept else b"" for path in paths}


Damage = Callable[[Workplace], object]


@pytest.fixture
def work(
    tmp_path: Path, config_file: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> Workplace:
    (tmp_path / "tmp").mkdir()
    shutil.copytree(llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return Workplace(tmp_path, config_file, command)


# --- damage -----------------------------------------------------------------------------------------------------------


def remove(*names: str) -> Damage:
    def damage(work: Workplace) -> None:
        for path in (work.root / name for name in names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, text: str) -> Damage:
    return lambda work: (work.root / name).write_text(text)


def edit(name: str, **values: Any) -> Damage:
    """Changes keys of a JSON file."""
    return lambda work: (work.root / name).write_text(json.dumps(json.loads((work.root / name).read_text()) | values))


def truncate(work: Workplace) -> None:
    weights = work.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def flip_a_bit(work: Workplace) -> None:
    path = work.root / "run/pruned/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lose_a_shard(work: Workplace) -> None:
    model = AutoModelForCausalLM.from_pretrained(work.model)
    (work.model / "model.safetensors").unlink()
    model.save_pretrained(work.model, max_shard_size="50KB")
    min(work.model.glob("model-*.safetensors")).unlink()


def pickle_weights(work: Workplace) -> None:
    (work.model / "model.safetensors").unlink()
    torch.save({}, work.model / "pytorch_model.bin")


def edit_weight(change: Callable[[torch.Tensor], object], name: str = "model.layers.1.mlp.up_proj.weight") -> Damage:
    def damage(work: Workplace) -> None:
        tensors = load_file(work.model / "model.safetensors")
        change(tensors[name])
        save_file(tensors, work.model / "model.safetensors", metadata={"format": "pt"})

    return damage


def set_one(value: float) -> Callable[[torch.Tensor], object]:
    return lambda weight: weight[0, 0].fill_(value)


def quantise(work: Workplace) -> None:
    tensors = load_file(work.model / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, work.model / "model.safetensors")


def prune_all_but_one_group(work: Workplace) -> None:
    """2:4 in every layer, then one zero too few."""
    for name in load_file(work.model / "model.safetensors"):
        if "_proj" in name:
            edit_weight(lambda weight: weight.view(-1, 4)[:, :2].zero_(), name)(work)
    edit_weight(set_one(1.0))(work)


def narrow_model(work: Workplace) -> None:
    """down_proj has 38 input features, which is not a multiple of 4."""
    config = transformers.LlamaConfig(**SMALL | {"intermediate_size": 38})
    AutoModelForCausalLM.from_config(config).save_pretrained(work.model)


def half_of_another_model(work: Workplace) -> None:
    """Half of every matrix is zero, but k_proj has 32 output features where the configured model has 16."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    for parameter in model.model.layers.parameters():
        parameter.data.view(-1, 2)[:, 0] = 0
    model.save_pretrained(work.model)


def edit_tokenizer(change: Callable[[Any], object]) -> Damage:
    """Another tokenizer beside the same weights, which embed 260 tokens."""

    def damage(work: Workplace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        change(tokenizer)
        tokenizer.save_pretrained(work.model)

    return damage


def add_two_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<more>", "<image>"])  # 259, which is embedded, and 260


def forget_the_end(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def take_another_adapter(work: Workplace) -> None:
    """Of a run that pruned otherwise."""
    for stage in ("prune", "train"):
        assert work.run(stage, "tiny.yaml", "prune.pattern=4:8", "--output=other").code == 0
    remove("run/adapter")(work)
    shutil.move(work.root / "other/adapter", work.root / "run/adapter")


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A wrong command, what stderr must say (what is wrong, and what to do), and damage to its inputs."""

    command: str
    parts: list[str]
    damages: list[Damage]


def cases(text: str) -> Iterator[Case]:
    """Commands after ``sppctl``, below each the parts of what stderr must say; ``exit 1`` where the code is not 2.

    The parts are in order, and of one error each up to a part that starts with ``error:``, which begins another one.
    ``{config}`` is a configuration that works, and ``{long}`` a name that is too long for a file. Lines with @ are the
    damage to the inputs of the commands below them.
    """
    for damages, commands in re.findall(r"((?:@ .*\n)*)((?:[^@\n].*\n)+)", text):
        lines = commands.splitlines()
        for command, parts in zip(lines[::2], lines[1::2], strict=True):
            yield Case(command, parts.strip().split(" ... "), [eval(line[2:]) for line in damages.splitlines()])


USAGE = r"""
run {config} prune.patern=2:4
    prune.patern: unknown key ... did you mean prune.pattern?
run {config} train.rank=big prune.metod=wanda
    command line: prune.metod ... error: command line: train.rank
run model/model.safetensors
    model.safetensors ... cannot be read
prune {config} --pattern 4:2
    prune.pattern ... '4:2' ... 0 < N < M ... 2:4
run {config} other.yaml
    expected one CONFIG ... other.yaml ... KEY=VALUE
run ''
    an empty argument is neither CONFIG nor KEY=VALUE
prun {config}
    No such command 'prun'
prune {config} --patern 2:4
    No such option ... --patern
prune {config} model.device=cuda:99
    model.device ... cuda:99 ... try auto
prune {config} model.device=gpu
    model.device ... gpu ... try auto
run {config} --model model --output model
    run.dir: model holds a checkpoint
@ write("bad.yaml", "prune: {pattern: [")
run bad.yaml
    bad.yaml ... not valid YAML ... line 1
@ write("bad.yaml", "prune:\n\tx: 1")
run bad.yaml
    bad.yaml ... not valid YAML ... line 2
@ write("note.txt", "x")
run {config} --output note.txt
    run.dir ... note.txt
run {config} --output note.txt/run
    run.dir ... note.txt
"""
MODELS = r"""
run {config} --model ./nowhere
    model.path ... ./nowhere ... does not exist
run {config} --model model/config.json
    model.path ... is a file
run {config} --model package:nonesuch_pkg
    nonesuch_pkg ... pip install
run {config} --model nobody/nothing-here
    model.path ... nobody/nothing-here ... network
prune {config} --pattern 3:7
    prune.pattern ... 3:7 ... 32 input features, not a multiple of 7 ... prune.targets
prune {config} prune.targets=[q_proj,query]
    prune.targets ... 'query' matches no linear layer ... down_proj ... q_proj
run {config} train.targets=[query]
    train.targets ... 'query' matches no linear layer ... q_proj
run {config} prune.targets=[k_proj] train.targets=[q_proj] train.refresh.steps=2
    train.refresh.steps ... none of the layers that train.targets selects is pruned ... train.targets=pruned
run {config} train.rank=33
    train.rank ... 33 ... output features
run {config} train.method=lora
    merge.mask: keep ... fills the zeros ... merge.mask=reapply ... merge.mask=dense
merge {config} train.method=lora
    merge.mask: keep ... fills the zeros
run {config} train.method=ste merge.mask=reapply
    merge.mask: reapply ... would undo the masks ... merge.mask=keep
run {config} train.method=ste launch.strategy=fsdp
    train.method: ste ... launch.strategy=fsdp ... use ddp
@ write("model/a.gguf", "GGUF")
run {config} --model model/a.gguf
    model.path ... a.gguf ... model.gguf_file
run {config} --model model model.gguf_file=b.gguf
    model.gguf_file ... b.gguf is not in ... a.gguf
run {config} --model model model.gguf_file=a.gguf
    model.gguf_file: model/a.gguf is incomplete or damaged ... download it again
@ remove("model/config.json")
run {config} --model model
    model.path ... no config.json
@ remove("model/config.json")
@ write("model/a.gguf", "GGUF")
run {config} --model model
    no config.json ... model.gguf_file ... a.gguf
@ write("model/config.json", "{")
run {config} --model model
    model ... config.json cannot be used
@ write("model/config.json", '{"model_type": "nonesuch"}')
run {config} --model model
    config.json cannot be used ... nonesuch
@ truncate
run {config} --model model
    model.safetensors is truncated ... again
@ write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1")
run {config} --model model
    model.safetensors is truncated or damaged, or not a safetensors file ... again
@ lose_a_shard
run {config} --model model
    shard model-00001-of- ... is missing
@ pickle_weights
run {config} --model model
    pytorch_model.bin ... convert it to safetensors
@ remove("model/model.safetensors")
run {config} --model model
    holds no safetensors
@ remove("model/tokenizer.json", "model/tokenizer_config.json")
run {config} --model model
    model has no usable tokenizer
@ edit("model/tokenizer.json", pre_tokenizer={"type": "Telepathy"})
run {config} --model model
    model has no usable tokenizer ... tokenizer.json has a format that tokenizers ... pip install -U tokenizers
@ edit("model/tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
run {config} --model model
    model has no usable tokenizer ... model.trust_remote_code=true
@ edit_tokenizer(forget_the_end)
run {config} --model model
    train: the tokenizer has no end-of-text token ... set eos_token in the model's tokenizer_config.json
@ quantise
prune {config} --model model
    model holds no floating-point weights ... before it was quantised
@ edit("model/config.json", pad_token_id=260)
run {config} --model model
    model.path: no causal language model can be built from its config
@ edit_weight(set_one(float("nan")))
prune {config} --model model
    exit 1 ... model.layers.1.mlp.up_proj.weight ... NaN
prune {config} --model model --output a/b/c
    exit 1 ... model.layers.1.mlp.up_proj.weight ... NaN
@ edit_weight(set_one(float("nan")), "model.layers.0.mlp.up_proj.weight")
prune {config} --model model --method magnitude
    exit 1 ... model.layers.0.mlp.up_proj ... NaN
@ edit_weight(set_one(float("inf")), "lm_head.weight")
prune {config} --model model
    exit 1 ... lm_head.weight ... NaN
@ edit("model/config.json", intermediate_size=64)
prune {config} --model model
    mlp. ... shape (32, 48) ... (32, 64) ... (and 5 more) ... correct its config.json
@ narrow_model
prune {config} --model model --pattern 2:4
    prune.pattern ... down_proj ... 38 input features, not a multiple of 4 ... leave the layer out
"""
PRUNING = r"""
prune {config} prune.skip=[lm_head]
    prune.skip: 'lm_head' matches no linear layer ... down_proj ... q_proj
prune {config} prune.skip=[model.layers.*]
    prune.targets: nothing is left to prune ... prune.skip
prune {config} 'prune.overrides={{fc1: 0.4}}'
    prune.overrides: 'fc1' matches none of the 14 targets
prune {config} prune.skip=[down_proj] 'prune.overrides={{down_proj: 0.4}}'
    prune.overrides: 'down_proj' matches none of the 12 targets
prune {config} 'prune.overrides={{down_proj: 4:2}}'
    command line: prune.overrides ... '4:2' ... 0 < N < M
prune {config} 'prune.overrides={{down_proj: 2:5}}'
    prune.overrides: pattern 2:5 ... down_proj has 48 input features, not a multiple of 5
prune {config} prune.allocation=owl
    prune.allocation: splits a ratio over the blocks, but prune.pattern is 2:4
prune {config} prune.allocation=[0.5,0.6]
    prune.allocation: splits a ratio over the blocks, but prune.pattern is 2:4
prune {config} prune.pattern=0.5 prune.allocation=[0.5,0.5,0.5]
    prune.allocation: 3 ratios for 2 blocks ... give one per block
prune {config} prune.pattern=0.5 prune.allocation=[0.5,1.5]
    prune.allocation: pattern 1.5 ... between 0 and 1
prune {config} prune.pattern=0.5 prune.allocation=owl prune.owl_lambda=0.99
    prune.allocation: OWL with a spread of 0.99 around 0.5 ... lower the spread
prune {config} --method sparsegpt prune.mask_from=./nowhere
    prune.mask_from: ./nowhere does not exist
prune {config} --method sparsegpt prune.mask_from=model/config.json
    prune.mask_from ... model/config.json is a file
prune {config} --method sparsegpt prune.mask_from=model
    model.layers.0.self_attn.q_proj ... the mask of prune.mask_from is not 2:4
prune {config} --method sparsegpt prune.pattern=0.5 prune.mask_from=model
    model.layers.0.self_attn.q_proj ... the mask of prune.mask_from is not 0.5
@ remove("model/model.safetensors")
prune {config} --method sparsegpt prune.mask_from=model
    prune.mask_from ... model holds no safetensors
@ half_of_another_model
prune {config} --method sparsegpt prune.pattern=0.5 prune.mask_from=model
    prune.mask_from: model: model.layers.0.self_attn.k_proj.weight ... (32, 32) ... (16, 32)
"""
TEXTS = r"""
prune {config} prune.calibration.dataset=lost.txt
    prune.calibration.dataset ... lost.txt is not a file ... wikitext2
prune {config} prune.calibration.dataset=model/model.safetensors
    prune.calibration.dataset ... model.safetensors is not UTF-8 text
run {config} prune.calibration.seq_len=129 train.data.seq_len=130 eval.seq_len=131
    seq_len: 129 exceeds the model's 128 positions; set at most ... error: train.data.seq_len ... error: eval.seq_len
run {config} train.data.dataset=lost.jsonl
    train.data.dataset ... lost.jsonl is no
run {config} 'train.data.dataset={{instructions: 1, lost.jsonl: 2}}'
    train.data.dataset ... lost.jsonl is not a file ... alpaca-gpt4
run {config} 'train.data.dataset={{instructions: 0}}'
    train.data.dataset ... the weight of instructions is 0 ... above 0
run {config} train.data.prompt=Alpaka
    train.data.prompt ... 'Alpaka' is neither alpaca nor chat ... lacks {instruction}
run {config} "train.data.prompt='{{instruction}} {{context}}'"
    train.data.prompt ... {context} ... neither {instruction} nor {input}
run {config} train.data.prompt=chat
    train.data.prompt ... no chat template ... use alpaca
run {config} train.data.val_size=100
    train.data.val_size: 100 ... 24 rows
eval {config} --tasks boolqq
    eval.tasks ... boolqq is neither zeroshot ... did you mean boolq
run {config} eval.perplexity=[lost.txt]
    eval.perplexity ... lost.txt is not a file ... wikitext2
train {config} train.perplexity_steps=1 eval.perplexity=[lost.txt]
    eval.perplexity: lost.txt
eval {config} --tasks ,
    eval.perplexity ... eval.tasks
@ write("empty.txt", " \n")
prune {config} prune.calibration.dataset=empty.txt
    prune.calibration.dataset ... empty.txt holds no text
@ write("rows.jsonl", '{"question": "a"}\n')
prune {config} prune.calibration.dataset=rows.jsonl
    rows.jsonl ... column text ... its columns: question
@ write("short.txt", "Too little.")
prune {config} prune.calibration.dataset=short.txt
    prune.calibration ... short.txt has ... 4 windows of 64 need 256 ... fewer samples
run {config} eval.perplexity=[short.txt]
    eval.perplexity ... short.txt has ... one window of 64 ... smaller eval.seq_len
run {config} "eval.prompts=[Why, ' ']"
    eval.prompts: expected text
@ write("rows.jsonl", f'{{"text": "{80 * "long "}"}}\n' + 20 * '{"text": "Short."}\n')
prune {config} prune.calibration.dataset=rows.jsonl prune.calibration.windows=random-document
    prune.calibration.windows ... rows.jsonl has 1 documents longer than 64 ... needs 4 ... concatenate or auto
@ write("rows.jsonl", '{"text": "a", "title": "b"}\n')
prune {config} prune.calibration.dataset=rows.jsonl prune.calibration.column=body
    prune.calibration.dataset ... rows.jsonl lacks a column body ... its columns: text, title
@ write("plain.txt", "Text.")
prune {config} prune.calibration.dataset=plain.txt prune.calibration.column=body
    prune.calibration ... plain.txt has no columns ... leave out column body
@ write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
run {config} train.data.dataset=rows.jsonl
    columns of rows.jsonl are question, answer ... train.data.columns={instruction: question, output: answer}
@ write("rows.jsonl", 6 * ROWS + '{"instruction": "a"}\n')
run {config} train.data.dataset=rows.jsonl
    train.data.dataset ... rows.jsonl ... row 7 ... output
@ write("rows.jsonl", 6 * ROWS + '{"instruction": "a", "output": null}\n')
run {config} train.data.dataset=rows.jsonl
    train.data.dataset ... rows.jsonl ... row 7 ... output
@ write("rows.jsonl", "\n")
run {config} train.data.dataset=rows.jsonl
    train.data.dataset ... rows.jsonl holds no rows
@ write("rows.jsonl", 2 * ROWS + '{"instruction": "a", \n')
run {config} train.data.dataset=rows.jsonl
    train.data.dataset ... rows.jsonl, line 3, cannot be read as JSON
@ write("rows.md", "# Text\n")
run {config} train.data.dataset=rows.md
    train.data.dataset ... rows.md, line 1, cannot be read as JSON ... files may be .txt, .jsonl
@ write("rows.jsonl", '"text"\n')
run {config} train.data.dataset=rows.jsonl
    train.data.dataset ... one JSON object per row
@ write("rows.jsonl", '{"messages": [{"role": "narrator", "content": "a"}], "id": 1}\n')
run {config} train.data.dataset=rows.jsonl
    train.data.dataset: rows.jsonl: row 1, message 1, has the role 'narrator', which is not one of system, developer
@ edit_tokenizer(add_two_tokens)
@ write("it.txt", "<more> <image>" * 200)
prune {config} --model model prune.calibration.dataset=it.txt
    prune.calibration.dataset: it.txt: token id 260 ('<image>') ... beyond the model's 260 embeddings
@ edit_tokenizer(add_two_tokens)
@ write("rows.jsonl", 5 * ROWS + ROWS.replace('"b"', '"<image>"'))
run {config} --model model train.data.dataset=rows.jsonl train.data.val_size=0 "train.data.prompt='{{instruction}}:'"
    train.data: token id 260 ('<image>') ... beyond the model's 260 embeddings
@ edit_tokenizer(add_two_tokens)
@ write("it.txt", "Nothing. " * 900 + "<image>" + "." * 63)
eval {config} --model model eval.perplexity=[it.txt] eval.max_tokens=null
    eval.perplexity: it.txt: token id 260 ('<image>') ... beyond the model's 260 embeddings
@ write("rows.jsonl", '{"text": "a", "title": "\\ud83d"}\n{"text": "a \\ud83d b"}\n')
prune {config} prune.calibration.dataset=rows.jsonl
    rows.jsonl: row 2: text has half of a surrogate pair ('\ud83d')
@ write("rows.jsonl", 2 * ROWS + '{"instruction": "a", "input": "\\ude00", "output": "b"}\n')
run {config} train.data.dataset=rows.jsonl
    rows.jsonl: row 3: input has half of a surrogate pair ('\ude00')
@ write("rows.json", '[{"text": "\\ud83d"}]')
eval {config} eval.perplexity=[rows.json]
    rows.json: row 1: text has half of a surrogate pair
@ write("rows.jsonl", "[" * 100_000)
run {config} train.data.dataset=rows.jsonl
    rows.jsonl ... cannot be read as JSON ... recursion
@ remove("model/model.safetensors")
run {config} eval.divergence=model
    model holds no safetensors weights
run {config} train.distill.teacher=model train.distill.tokens=all
    model holds no safetensors weights
"""
CHECKPOINTS = r"""
merge {config}
    pruned does not exist ... sppctl prune
train {config}
    pruned does not exist ... sppctl prune
inspect ./nowhere
    CHECKPOINT: ./nowhere does not exist
bench ./nowhere
    CHECKPOINT: ./nowhere does not exist
inspect model --expect 4:2
    --expect ... '4:2' ... 0 < N < M
inspect model --expect 2:4
    exit 1 ... model is not 2:4 ... error: no matrix is sparse at all
report model
    model is not a run directory ... run.dir
verify model
    model is not a run directory
quickstrat
    there is no command quickstrat; did you mean sppctl run quickstart?
sweep-example --dry-run
    there is no command sweep-example; did you mean sppctl sweep sweep-example?
run sweep-example
    sweep-example is a sweep; sppctl sweep sweep-example runs it
sweep quickstart
    quickstart is the configuration of a single run; sppctl run quickstart runs it
inspect runs/none
    runs/none is not a local directory
report nowhere
    nowhere does not exist
inspect {long}
    is longer than ... a file name (255)
report {long}
    is longer than ... a file name (255)
eval {config} --model {long}
    is longer than
eval {config} --model ./nowhere
    ./nowhere ... does not exist
@ truncate
inspect model
    model.safetensors is truncated ... again
@ prune_all_but_one_group
inspect model --expect 2:4
    exit 1 ... model is not 2:4 ... 1 violation ... error: model.layers.1.mlp.up_proj.weight: not 2:4
"""
IN_A_RUN = r"""
prune tiny.yaml --pattern 4:8
    run/pruned was made with prune.pattern = 2:4, now 4:8 ... --force redoes it, another run.dir keeps it
run tiny.yaml train.lr=1e-3
    run/adapter was made with train.lr = 0.01, now 0.001 ... --force redoes it ... and needs pruned/ of its own
run tiny.yaml model.compute_dtype=bfloat16
    run/pruned was made with model.compute_dtype = float32, now bfloat16 ... --force redoes it
run tiny.yaml merge.dtype=bfloat16
    run/merged was made with merge.dtype = auto, now bfloat16 ... --force redoes it
run tiny.yaml run.seed=5
    run/pruned was made with seed = 0, now 5 ... --force redoes it
train tiny.yaml prune.pattern=4:8
    prune.pattern = 2:4, now 4:8 ... sppctl prune tiny.yaml prune.pattern=4:8 --force
prune tiny.yaml --force --model run/pruned
    model.path: run/pruned is an output of this run
prune tiny.yaml --force prune.method=sparsegpt prune.mask_from=run/pruned
    prune.mask_from: run/pruned is an output of this run
train tiny.yaml --force train.distill.teacher=run/merged
    train.distill.teacher: run/merged is an output of this run
eval tiny.yaml --model base --output other model.path=base model.revision=main
    model.revision: base is a local directory, which has no revision main
report run model
    model is not a run directory
@ flip_a_bit
inspect run/pruned --expect 2:4
    run/pruned/model.safetensors is damaged ... restore it
bench run/pruned --batch 1 --prompt 4 --new 1 --repeats 1
    run/pruned/model.safetensors is damaged ... restore it
prune tiny.yaml --output other --model run/pruned
    run/pruned/model.safetensors is damaged ... restore it
prune tiny.yaml --output other prune.mask_from=run/pruned
    run/pruned/model.safetensors is damaged ... restore it
eval tiny.yaml --output other --model base eval.divergence=run/pruned
    run/pruned/model.safetensors is damaged ... restore it
@ lambda work: (work.root / "linked").symlink_to("run")
eval tiny.yaml --model base model.path=run/../linked/adapter
    model.path: run/../linked/adapter is an output of this run
@ write("run/pruned/stage.json", "{")
train tiny.yaml
    pruned/stage.json is damaged ... sppctl prune tiny.yaml --force
report run
    pruned/stage.json ... damaged
@ remove("run/adapter")
merge tiny.yaml
    adapter does not exist ... sppctl train tiny.yaml first
@ take_another_adapter
merge tiny.yaml
    trained on other weights ... sppctl train tiny.yaml --force
"""


def check(case: Case, work: Workplace) -> None:
    for damage in case.damages:
        damage(work)
    before = work.files()
    outcome = work.run(*shlex.split(case.command.format(config=work.config, long=300 * "n")))
    said = " ".join(outcome.err.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert re.search(".*".join(re.escape(part) for part in case.parts if part != "exit 1"), said), said
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    of_usage = outcome.err.startswith("Usage:")  # Typer's own, in a box
    assert len(errors) == (0 if of_usage else 1 + sum(part.startswith("error:") for part in case.parts)), errors
    assert "Traceback" not in outcome.err
    assert "(--debug shows where)" not in outcome.err, "an exception that nobody expected"
    assert outcome.code == (1 if "exit 1" in case.parts else 2)
    assert work.files().keys() == before.keys(), "something was left behind"
    assert work.files() == before, "an input was changed"


def named(case: Case) -> str:
    return f"{case.command}: {case.parts[-1]}"


@pytest.mark.parametrize("case", cases(USAGE + MODELS + PRUNING + TEXTS + CHECKPOINTS), ids=named)
def test_a_wrong_command_says_so_and_leaves_nothing(case: Case, work: Workplace) -> None:
    check(case, work)


@pytest.mark.parametrize("case", cases(IN_A_RUN), ids=named)
def test_a_wrong_command_leaves_a_run_as_it_was(case: Case, work: Workplace, finished: Path) -> None:
    shutil.copytree(finished, work.root, dirs_exist_ok=True)
    check(case, work)
