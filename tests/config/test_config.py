"""The configuration: YAML 1.2, overrides, every problem in one message, and what is written is read back the same."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppctl.config.hints import HINTS
from sppctl.config.load import (
    config_keys,
    find_file,
    flatten,
    load_config,
    parse_yaml,
    quoted,
    result_keys,
    schema,
    schema_yaml,
    shipped_configs,
    to_dict,
    to_yaml,
)
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.pattern import Pattern

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(yaml text, *overrides) -> Config; model.path is filled in unless the text has a model section."""

    def load_text(text: str = "", *overrides: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text if "model:" in text else f"model: {{path: some/model}}\n{text}")
        return load_config(str(path), overrides)

    return load_text


def problems_of(load: Load, text: str = "", *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def value_of(config: Config, key: str) -> Any:
    return flatten(to_dict(config))[key]


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------

SCALARS: dict[str, Any] = {
    **{text: text for text in ("2:4", "1:30:00", "no", "on", "Yes", "1_000", "2024-01-31")},
    "4e-3": 0.004,
    "1e3": 1000.0,
    "-.5": -0.5,
    "12.": 12.0,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "0x10": 16,
    "0o17": 15,
    "017": 17,
    "-7": -7,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "'2'": "2",
    "[2:4, no, 1e-3]": ["2:4", "no", 0.001],
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_follow_yaml_1_2(text: str) -> None:
    found = parse_yaml(text, "test")
    assert found == SCALARS[text]
    assert type(found) is type(SCALARS[text])


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan", "test"))


def test_a_file_that_is_not_yaml_is_named_with_the_place(load: Load, tmp_path: Path) -> None:
    (problem,) = problems_of(load, "prune: {pattern: 2:4")
    assert problem.startswith(f"{tmp_path / 'config.yaml'}: not valid YAML: ")
    assert "line 2" in problem


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_default_is_quickstart() -> None:
    assert load_config(None) == load_config("quickstart")
    assert load_config(None, ["run.seed=7"]) == load_config("quickstart", ["run.seed=7"])


@pytest.mark.parametrize(
    ("overrides", "directory"),
    [
        (["model.path=owner/Some-3.1-8B"], "runs/Some-3.1-8B-wanda-2of4"),
        (["model.path=/a/b c/", "prune.method=sparsegpt", "prune.pattern=0.5"], "runs/b-c-sparsegpt-0.5"),
        (["model.path=package:of_a_model", "model.gguf_file=m.Q4.gguf"], "runs/m.Q4-wanda-2of4"),
        (["model.path=x", "run.dir=mine"], "mine"),
    ],
)
def test_a_model_without_a_configuration_has_the_defaults(overrides: list[str], directory: str) -> None:
    config = load_config(None, overrides)
    assert config.run.dir == directory
    calibration, train = config.prune.calibration, config.train
    assert (calibration.dataset, calibration.samples, calibration.seq_len) == ("c4", 128, 2048)
    assert (train.data.dataset, train.lr, train.epochs, train.batch_size) == ("alpaca", 4e-3, 3.0, 128)


def test_the_directory_of_a_model_in_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert load_config(None, ["model.path=."]).run.dir == "runs/my-model-wanda-2of4"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("own.yml", "did you mean own.yaml?"),
        ("runs", "is a directory without a run; name a run directory or a YAML file; --model is for models"),
        ("zzz", "does not exist; give a YAML file, a run directory, or one of: llama13b, "),
        ("owner/Some-8B", "; or, for a model, --model owner/Some-8B"),
    ],
)
def test_a_configuration_that_is_not_there(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "own.yaml").touch()
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert f"config {name} " in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_shipped_configuration_is_found_by_name_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file(name) == shipped_configs()["quickstart"]


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_configuration_fits_the_schema(name: str) -> None:
    config = load_config(name)
    assert config.model.path
    assert config.train.batch_size % config.train.micro_batch_size == 0


@pytest.mark.parametrize("text", ["# nothing\n", "prune:\ntrain: {}"])
def test_what_a_file_leaves_out_is_the_default(text: str, load: Load, tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    assert load_config(str(path), ["model.path=some/model"]) == load()
    changed = {key for key, value in flatten(to_dict(load())).items() if value != value_of(Config(), key)}
    assert changed == {"model.path", "run.dir"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"- a\n- b", "expected sections such as 'model:' and 'prune:', found the list"),
        (b"just text", "expected sections such as 'model:' and 'prune:', found the text"),
        (b"[]", "expected sections such as 'model:' and 'prune:', found the list []"),
        (b"0", "expected sections such as 'model:' and 'prune:', found 0"),
        (b"# " + b"long " * 60_000, "has 300,002 bytes, more than the 262,144"),
        ("run: {dir: h\xe9}".encode("latin-1"), "cannot be read: 'utf-8'"),
        ("fifo", "is not a regular file; give a YAML file"),
        ("directory", "is a directory without a run; name a run directory or a YAML file; --model is for models"),
        ("nothing", "does not exist; give a YAML file, a run directory, or one of: "),
    ],
    ids=str,
)
def test_what_is_not_a_configuration_is_refused(content: bytes | str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "nothing":
        (os.mkfifo if content == "fifo" else os.mkdir)(path)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


LEVELS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} {[f'*{m}'] * 8}\n" for m, n in itertools.pairwise("abcdef")
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "key 'a' appears twice, again in line 3"),
        ("outer:\n  a: 1\n  a: 1", "key 'a' appears twice, again in line 3"),
        ("{a: 1, a: 2}", "key 'a' appears twice, again in line 1"),
        (LEVELS.replace("'", ""), "more than 10,000 values"),
        ("[" * 70_000, "more than 32 levels"),
        ("- " * 70_000, "more than 32 levels"),
        ("a: &x [1, *x]", "*x refers to a node that contains it"),
        ("&x {run: *x}", "*x refers to a node that contains it"),
        ("? [run, seed]\n: 1", "a list or section as a key"),
        ("{{a: 1}: 1}", "a list or section as a key"),
        (f"a: {'7' * 5000}", "a number of 5,000 characters, more than 40"),
        (f"a: 0x{'f' * 50}", "a number of 52 characters, more than 40"),
        (f"a: 1.{'0' * 5000}", "a number of 5,002 characters, more than 40"),
        ("a: x\0y", "special characters are not allowed"),
        (r'a: "x\0y"', r"'x\x00y' is not text"),
        (r'a: "\ud83d"', r"'\ud83d' is not text"),
        ("a: !!int word", "invalid literal"),
        ("a: !!bool word", "'word'"),
        ("a: !!map [1]", "expected a mapping node"),
        ("a: !!timestamp word", "could not determine a constructor for the tag"),
        ("# " + "long " * 60_000, "more than 262,144 characters"),
        ("\n".join(f"k{n}: 0" for n in range(5500)), "more than 10,000 values"),
    ],
    ids=range(22),
)
def test_yaml_that_is_ambiguous_or_would_keep_a_command_busy_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "it")
    assert str(caught.value).startswith("it: not valid YAML: ")
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_alias_stands_for_what_it_names(load: Load) -> None:
    config = load("prune: {targets: &names [q_proj, up_proj], skip: [down_proj]}\ntrain: {targets: *names}")
    assert config.train.targets == config.prune.targets == ["q_proj", "up_proj"]


# --- overrides --------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_file_wins_over_defaults(load: Load) -> None:
    config = load("train: {rank: 8, epochs: 2}", "train.rank=5", "train.rank=4")
    assert (config.train.rank, config.train.epochs, config.train.scale) == (4, 2.0, 2.0)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prune.pattern=4:8", "4:8"),
        ("prune.pattern=0.6", 0.6),
        ("train.lr=1e-4", 1e-4),
        ("train.epochs=2", 2.0),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("prune.calibration={dataset: c4, samples: 4}", 4),
        ("prune.calibration.samples=3", 3),
        ("eval.batch_size=auto", "auto"),
        ("eval.batch_size=4", 4),
        ("eval.limit=null", None),
        ("eval.limit=10", 10),
        ("model.compute_dtype=auto", "auto"),
        ("model.compute_dtype=bfloat16", "bfloat16"),
        ("prune.targets=all-linear", "all-linear"),
        ("train.targets=pruned", "pruned"),
        ("train.targets=[q_proj]", ["q_proj"]),
        ("prune.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("prune.targets=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("prune.targets=q_proj, v_proj", ["q_proj", "v_proj"]),
        ("eval.tasks=boolq", ["boolq"]),
        ("eval.perplexity=[]", []),
        (f"train.data.prompt={quoted('Think. ' * 500 + '{instruction}')}", "Think. " * 500 + "{instruction}"),
    ],
)
def test_an_override_is_yaml_and_takes_each_type_of_its_key(load: Load, override: str, value: Any) -> None:
    key = override.partition("=")[0]
    found = value_of(load("", override), key if key != "prune.calibration" else f"{key}.samples")
    assert found == value
    assert type(found) is type(value)


def test_unquoted_pattern_and_learning_rate_mean_what_they_say(load: Load) -> None:
    config = load("prune: {pattern: 2:4}\ntrain: {lr: 4e-3}")
    assert (config.prune.pattern, config.train.lr) == (Pattern(keep=2, group=4), 0.004)


def test_home_is_replaced_in_every_key_that_may_be_a_path(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = [
        *("run.dir", "model.path", "prune.calibration.dataset", "prune.mask_from", "train.data.dataset"),
        *("train.distill.teacher", "eval.divergence", "eval.include_path"),
    ]
    config = to_dict(load("", *(f"{key}=~/a b/x" for key in keys), "eval.perplexity=[~/t.txt,c4,./~/t.txt]"))
    assert [flatten(config)[key] for key in keys] == ["/home/me/a b/x"] * len(keys)
    assert config["eval"]["perplexity"] == ["/home/me/t.txt", "c4", "./~/t.txt"]
    mixed = load("train: {data: {dataset: {~/a.jsonl: 3, alpaca: 1}}}")
    assert mixed.train.data.dataset == {"/home/me/a.jsonl": 3.0, "alpaca": 1.0}
    twice = "train.data.dataset={~/a.json: 3, /home/me/a.json: 1}"
    assert "two of ~/a.json, /home/me/a.json are the same path" in problems_of(load, "", twice)[0]


@pytest.mark.parametrize(
    ("path", "reason"), [("~/m", "HOME is not set"), ("~nobody-at-all/m", "there is no such user")]
)
def test_a_home_that_is_not_known(load: Load, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setenv("HOME", "")
    (problem,) = problems_of(load, "", f"model.path={path}")
    assert f"model.path: {path}: the home directory is not known ({reason})" in problem


@pytest.mark.parametrize("path", ["$SCRATCH/runs", "/data/${SCRATCH}"])
def test_a_variable_in_a_path_is_no_name_of_a_folder(load: Load, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    assert load("", f"run.dir={path}").run.dir == path
    monkeypatch.setenv("SCRATCH", "secret")
    (problem,) = problems_of(load, f"run: {{dir: '{path}'}}")
    assert f"run.dir: {path}: $SCRATCH is not replaced; write the full path" in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("overrides", "path", "gguf_file"),
    [
        (["model.path=c/d"], "c/d", None),  # the file belonged to the old path
        (["model.path=c/d", "model.gguf_file=c.gguf"], "c/d", "c.gguf"),
        (["model.gguf_file=c.gguf"], "a/b", "c.gguf"),
    ],
)
def test_another_model_path_drops_what_belongs_to_the_old_one(
    load: Load, overrides: list[str], path: str, gguf_file: str | None
) -> None:
    model = load("model: {path: a/b, gguf_file: a.gguf, revision: main, dtype: bfloat16}", *overrides).model
    assert (model.path, model.gguf_file, model.dtype) == (path, gguf_file, "bfloat16")
    assert (model.revision is None) == (path == "c/d")


# --- problems ---------------------------------------------------------------------------------------------------------


def test_all_problems_come_in_one_message_with_their_source(load: Load, tmp_path: Path) -> None:
    text = "prune: {metod: wanda, pattern: 4:2}\ntrain: {rank: 0, scale: two}\nevall: {}"
    found = problems_of(load, text, "train.lr=-1", "merge.dtyp=auto")
    file = tmp_path / "config.yaml"
    assert len(found) == 7
    assert f"{file}: prune.metod: unknown key; did you mean prune.method?" in found
    assert any(line.startswith(f"{file}: prune.pattern: pattern '4:2': N:M keeps") for line in found)
    assert f"{file}: train.rank: 0 must be at least 1" in found
    assert f"{file}: train.scale: expected a number, found the text 'two'" in found
    assert any(line.startswith(f"{file}: evall: unknown key") for line in found)
    assert "command line: train.lr: -1.0 must be more than 0" in found
    assert "command line: merge.dtyp: unknown key; did you mean merge.dtype?" in found


LONG = "... is longer than a path (2,048 bytes) or a file name (255) can be"
WRONG = {
    # unknown keys point to a known one
    # names of other programs
    "train.learning_rate=1": "unknown key; did you mean train.lr?",
    "r=8": "unknown key; did you mean train.rank?",
    "train.num_train_epochs=1": "unknown key; did you mean train.epochs?",
    "train.gradient_accumulation_steps=4": "derived: train.batch_size / (train.micro_batch_size x processes)",
    "prune.sparsity=0.5": "unknown key; a ratio of zeros is a prune.pattern: prune.pattern=0.5",
    "prune.target_modules=[q_proj]": "unknown key; did you mean prune.targets?",
    "train.report_to=none": "the text 'none' is not one of tensorboard, wandb; write [] for none of them",
    "train.zzz=1": "unknown key; see `sppctl config --schema`, section train",
    "prune.zzz=1": "unknown key; see `sppctl config --schema`, section prune",
    "rank=1": "unknown key; did you mean train.rank?",
    "trian=1": "unknown key; did you mean train?",
    "patern=1": "unknown key; did you mean prune.pattern?",
    "prune.calibration.sample=1": "unknown key; did you mean prune.calibration.samples?",
    "eval.task=1": "unknown key; did you mean eval.tasks?",
    "zzz=1": "unknown key; see `sppctl config --schema`",
    # types
    "train.rank=4.5": "expected an integer, found 4.5",
    "train.rank=true": "expected an integer, found True",
    "train.lr=high": "expected a number, found the text 'high'",
    "train.lr=": "expected a number, found null",
    "model.trust_remote_code=yes": "expected true or false, found the text 'yes'",
    "model.path=[a]": "expected text or null, found the list ['a']",
    "prune.calibration=c4": "expected a section with keys, found the text 'c4'",
    "eval.limit=few": "expected an integer or null, found the text 'few'",
    "eval.batch_size=big": "expected an integer or auto, found the text 'big'",
    "prune.targets=7": "expected a list of names or all-linear, found 7",
    "prune.skip=3": "expected a list of names, found 3",
    "prune.overrides=[down_proj]": "expected a mapping of name to N:M or a ratio, found the list ['down_proj']",
    "prune.allocation=owll": "found the text 'owll'; for one of your own, --import its module",
    "eval.tasks=[1]": "expected text, found 1",
    # bounds
    "run.seed=-1": "-1 must be at least 0",
    "run.seed=4294967296": "4294967296 must be at most 4294967295",
    "train.rank=0": "0 must be at least 1",
    "train.lr=0": "0.0 must be more than 0",
    "train.lr=.nan": "nan must be more than 0",
    "train.dropout=1": "1.0 must be less than 1",
    "train.dropout=-0.1": "-0.1 must be at least 0",
    "train.mask_decay=-1": "-1.0 must be at least 0",
    "train.mask_steps=0": "0 must be at least 1",
    "prune.calibration.seq_len=1": "1 must be at least 2",
    "prune.reconstruct_epochs=-1": "-1 must be at least 0",
    "prune.batch_size=0": "0 must be at least 1",
    "launch.num_processes=0": "0 must be at least 1",
    "eval.limit=0": "0 must be at least 1",
    "eval.batch_size=0": "0 must be at least 1",
    "prune.pattern=1.5": "pattern 1.5: a ratio is the share of zeros, between 0 and 1 (0.5 = half of them)",
    **{f"train.{key}=.inf": "inf is not a finite number" for key in ("lr", "epochs", "scale", "weight_decay")},
    "prune.damp=.inf": "inf is not a finite number",
    # choices
    "prune.method=wnda": "the text 'wnda' is not one of magnitude, wanda, sparsegpt, dsnot; did you mean wanda?",
    "model.dtype=bfloat": "the text 'bfloat' is not one of auto, float32, bfloat16, float16; did you mean bfloat16?",
    "model.dtype=16": "16 is not one of auto, float32, bfloat16, float16",
    "prune.order=modul": "the text 'modul' is not one of block, module; did you mean module?",
    "prune.memory=tape": "the text 'tape' is not one of auto, device, ram, disk",
    "prune.calibration.windows=random": "'random' is not one of auto, random-document, concatenate",
    "train.method=maskedlora": "did you mean masked_lora?",
    # paths, and values beyond all measure
    'model.path="a\\nb"': r"the path 'a\nb' contains a control character",
    'eval.perplexity="a\\nb"': r"the path 'a\nb' contains a control character",
    'train.data.dataset={"a\\nb": 1}': r"the path 'a\nb' contains a control character",
    f"model.path={'m' * 256}": f"{'m' * 60}{LONG}",
    f"run.dir={'r/' * 1025}": LONG,
    f"eval.perplexity=[prose,{'é' * 128}]": LONG,
    f"train.data.dataset={{{'d' * 300}: 1}}": LONG,
    f"train.rank={10**25}": f"{10**25} is too large (64 bits)",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_says_what_was_expected_and_found(load: Load, override: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert problem.startswith(f"command line: {override.partition('=')[0]}: ")
    assert problem.endswith(WRONG[override])
    assert len(problem) < 500


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("=2:4", "command line: '=2:4' is not KEY=VALUE"),
        (" = 1", "command line: ' = 1' is not KEY=VALUE"),
        (f"{'x' * 300}", "is not KEY=VALUE"),
        (f"{'run.' * 5000}seed=1", "...: unknown key; see `sppctl config --schema`"),
        ("prune.targets=[q_proj", "command line: prune.targets: not valid YAML: "),
        # below a plain key, and inside an overridden section
        ("run.seed.more=1", "command line: run.seed: "),
        ("prune.calibration={samples: 0}", "command line: prune.calibration.samples: 0 must be at least 1"),
        ("trian.lr=1", "command line: trian: unknown key; did you mean train?"),
    ],
    ids=range(8),
)
def test_what_is_wrong_with_an_override_is_blamed_on_the_command_line(load: Load, override: str, problem: str) -> None:
    (found,) = problems_of(load, "run: {seed: 3}", override)
    assert problem in found
    assert len(found) < 500


@pytest.mark.parametrize(
    "text", ["Use style #2 only", "# be brief", "Task\nAnswer\n", "A task.\n\nAn answer", "Be brief #"], ids=range(5)
)
def test_a_text_that_yaml_would_change_without_an_error_must_be_quoted(load: Load, text: str) -> None:
    key = "eval.system_prompt"
    (problem,) = problems_of(load, "", f"{key}={text}")
    assert problem.startswith(f"command line: {key}: YAML reads only ")
    assert problem.endswith(f"""; quote it: '{key}="..."'""")
    assert load("", f"{key}={json.dumps(text)}").eval.system_prompt == text


@pytest.mark.parametrize("text", ["null", "~", "", " null ", "null  # none"])
def test_null_stays_null(load: Load, text: str) -> None:
    assert load("", f"eval.system_prompt={text}").eval.system_prompt is None


def test_a_single_prompt_may_have_commas(load: Load) -> None:
    assert load("", "eval.prompts=Name three fruits, then stop.").eval.prompts == ["Name three fruits, then stop."]
    assert load("eval: {prompts: One.}").eval.prompts == ["One."]
    assert load("", "eval.prompts=[One., 'Two, too.']").eval.prompts == ["One.", "Two, too."]


def test_hints_for_names_of_other_programs_point_to_keys() -> None:
    keys = config_keys()
    for name, hint in HINTS.items():
        mentioned = re.findall(r"\b(?:run|launch|model|prune|train|eval)\.[a-z_.]*[a-z]", hint)
        assert set(mentioned) <= set(keys), name
        assert mentioned, name
        assert name not in keys, f"{name} is a key of its own"


def test_combinations_that_cannot_work_are_found(load: Load) -> None:
    text = "model: {path: null}\ntrain: {batch_size: 10, micro_batch_size: 4}\nprune: {targets: [], order: module}"
    assert problems_of(load, text, "prune.reconstruct_epochs=1", "prune.mask_from=x", "prune.allocation=owl") == [
        "model.path: not set; name a hub id, a local directory or package:NAME (--model)",
        "train.micro_batch_size: 4 does not divide train.batch_size 10",
        "prune.reconstruct_epochs: needs the dense block's output, which prune.order module never computes",
        "prune.allocation: the mask of prune.mask_from already determines the zeros; leave out one of the two",
        "prune.targets: an empty list; name at least one layer",
    ]


# --- describing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("prune.pattern=4:8", "train.lr=1e-05", "eval.limit=3"),
        ("prune.pattern=0.5", "prune.targets=all-linear", "train.targets=[q_proj]", "model.gguf_file=a b.gguf"),
        ("run.dir='no'", "model.path='2:4'", "eval.perplexity=['on', '0.5', 'null']"),
        ("model.revision='1e10'", "run.dir='0o17'", "eval.tasks=['.5e1']"),
    ],
    ids=["defaults", "numbers", "unions", "yaml 1.1 words", "yaml 1.2 numbers"],
)
def test_the_written_configuration_is_read_back_the_same(
    load: Load, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = load("", *overrides)
    written = tmp_path / "resolved.yaml"
    written.write_text(to_yaml(config))
    assert load_config(str(written)) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)  # a reader of YAML 1.1 understands it too


def test_keys_that_cannot_change_a_result_are_left_out(load: Load) -> None:
    every, kept = set(config_keys()), set(flatten(result_keys(load())))
    without_effect = {
        *("run.dir", "model.device", "train.micro_batch_size", "train.gradient_checkpointing", "train.save_steps"),
        *("train.keep_checkpoints", "train.log_steps", "eval.batch_size"),
    }
    assert without_effect <= every
    assert not without_effect & kept
    assert {"run.seed", "model.path", "prune.pattern", "train.lr", "train.batch_size", "eval.limit"} <= kept
    assert kept < every


@pytest.mark.parametrize("section", ["train", "train.data", "train.lr"])
def test_the_schema_of_a_section_is_that_part_of_a_configuration(section: str, load: Load) -> None:
    keys = [key for key in config_keys() if f"{key}.".startswith(f"{section}.")]
    assert [entry["key"] for entry in schema(section)] == keys
    assert list(flatten(yaml.safe_load(schema_yaml(section)))) == keys


def test_a_schema_of_no_section() -> None:
    with pytest.raises(UserError, match=r"--schema: train.dat is not a section or key; did you mean train.data\?"):
        schema("train.dat")


def test_the_schema_gives_every_key_a_type_a_default_and_a_meaning() -> None:
    entries = schema()
    assert [entry["key"] for entry in entries] == list(config_keys()) == list(flatten(to_dict(Config())))
    for entry in entries:
        assert set(entry) == {"key", "type", "default", "meaning"}
        assert entry["meaning"].strip(), entry["key"]
        assert "<class" not in entry["type"], entry["key"]
