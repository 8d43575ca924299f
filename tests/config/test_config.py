"""The configuration: YAML 1.2, overrides, every problem in one message, and what is written is read back the same."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppctl.config.load import (
    config_keys,
    find_file,
    flatten,
    load_config,
    parse_yaml,
    quoted,
    result_keys,
    schema,
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


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------


def test_unquoted_pattern_and_learning_rate_mean_what_they_say(load: Load) -> None:
    config = load("prune: {pattern: 2:4}\ntrain: {lr: 4e-3}")
    assert config.prune.pattern == Pattern(keep=2, group=4)
    assert config.train.lr == 0.004


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("1:30:00", "1:30:00"),
        ("4e-3", 0.004),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("12.", 12.0),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("0x10", 16),
        ("0o17", 15),
        ("017", 17),
        ("-7", -7),
        ("1_000", "1_000"),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("null", None),
        ("~", None),
        ("", None),
        ("'2'", "2"),
        ("2024-01-31", "2024-01-31"),
        ("[2:4, no, 1e-3]", ["2:4", "no", 0.001]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "test")
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan", "test"))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "outer:\n  a: 1\n  a: 1", "{a: 1, a: 2}"])
def test_a_key_that_stands_twice_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"^test: not valid YAML: .*key 'a' appears twice, again in line \d"):
        parse_yaml(text, "test")


def test_a_text_that_is_no_yaml_is_named_with_its_place(load: Load, tmp_path: Path) -> None:
    (problem,) = problems_of(load, "prune: {pattern: 2:4")
    assert problem.startswith(f"{tmp_path / 'config.yaml'}: not valid YAML: ")
    assert "line 2" in problem


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "42"])
def test_a_file_without_sections_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.yaml: expected sections such as 'model:' and 'prune:', found "):
        load_config(str(path))


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    config = load_config(str(path), ["model.path=some/model"])
    assert config == Config(model=dataclasses.replace(Config().model, path="some/model"))


def test_an_empty_section_means_its_defaults(load: Load) -> None:
    assert load("prune:\ntrain: {}") == load()


# --- files and overrides ----------------------------------------------------------------------------------------------


def test_the_default_is_quickstart() -> None:
    assert find_file(None) == shipped_configs()["quickstart"]
    assert load_config(None) == load_config("quickstart")


# --- files that are not trusted ---------------------------------------------------------------------------------------

LEVELS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} {[f'*{m}'] * 8}\n" for m, n in itertools.pairwise("abcdef")
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LEVELS.replace("'", ""), "more than 10,000 values"),
        ("[" * 70_000, "more than 32 levels"),
        ("- " * 70_000, "more than 32 levels"),
        ("a: &x [1, *x]", "*x inside what it stands for"),
        ("&x {run: *x}", "*x inside what it stands for"),
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
    ids=range(19),
)
def test_yaml_that_would_keep_a_command_busy_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "it")
    assert str(caught.value).startswith("it: not valid YAML: ")
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_alias_stands_for_what_it_names(load: Load) -> None:
    config = load("prune: {targets: &names [q_proj, up_proj], skip: [down_proj]}\ntrain: {targets: *names}")
    assert config.train.targets == config.prune.targets == ["q_proj", "up_proj"]


@pytest.mark.parametrize("kind", ["fifo", "device", "large", "latin-1"])
def test_a_configuration_that_cannot_be_one_is_refused_by_what_it_is(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "odd.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        path.write_text("# " + "long " * 60_000)
    elif kind == "latin-1":
        path.write_bytes("run: {dir: h\xe9}".encode("latin-1"))
    expected = {"large": "has 300,002 bytes, more than the 262,144", "latin-1": "cannot be read: 'utf-8'"}
    with pytest.raises(UserError, match=expected.get(kind, "is not a regular file; give a YAML file")):
        load_config(str(path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=4294967296", "run.seed: 4294967296 must be at most 4294967295"),
        (f"train.rank={10**25}", f"train.rank: {10**25} is larger than any number"),
        (
            f"model.path={'m' * 256}",
            f"model.path: {'m' * 60}... is longer than a path (2,048 bytes) or a file name (255) can be",
        ),
        (f"run.dir={'r/' * 1025}", "run.dir: r/r/"),
        (f"eval.perplexity=[prose,{'é' * 128}]", "eval.perplexity: éé"),
        (f"train.data.dataset={{{'d' * 300}: 1}}", "train.data.dataset: ddd"),
        (f"{'run.' * 5000}seed=1", "unknown key; see"),
        (f"{'x' * 300}", "is not KEY=VALUE"),
    ],
)
def test_values_beyond_all_measure_are_refused(load: Load, override: str, expected: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert expected in problem
    assert len(problem) < 500


def test_prose_may_be_long(load: Load) -> None:
    prompt = f"{'Think. ' * 500}{{instruction}}"
    assert load("", f"train.data.prompt={quoted(prompt)}").train.data.prompt == prompt


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_shipped_configuration_is_found_by_name_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file(name) == shipped_configs()["quickstart"]


def test_a_configuration_that_does_not_exist_lists_the_shipped_ones() -> None:
    with pytest.raises(
        UserError, match=r"config nowhere\.yaml does not exist; give a YAML file, or one of: .*quicksta"
    ):
        load_config("nowhere.yaml")


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory; name the YAML file in it"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_configuration_fits_the_schema(name: str) -> None:
    config = load_config(name)
    assert config.model.path
    assert config.train.batch_size % config.train.micro_batch_size == 0


def test_quickstart_is_shipped() -> None:
    assert "quickstart" in shipped_configs()


def test_command_line_wins_over_file_wins_over_defaults(load: Load) -> None:
    config = load("train: {rank: 8, epochs: 2}", "train.rank=4")
    assert (config.train.rank, config.train.epochs, config.train.scale) == (4, 2.0, 2.0)


def test_the_last_override_of_a_key_wins(load: Load) -> None:
    assert load("", "run.seed=1", "run.seed=2").run.seed == 2


def test_overrides_are_yaml_too(load: Load) -> None:
    config = load("", "prune.pattern=4:8", "train.lr=1e-4", "eval.limit=null", "run.dir=runs/a=b")
    assert config.prune.pattern == Pattern(keep=4, group=8)
    assert config.train.lr == 1e-4
    assert config.eval.limit is None
    assert config.run.dir == "runs/a=b"


@pytest.mark.parametrize("value", ["[q_proj, v_proj]", "q_proj,v_proj", "q_proj, v_proj"])
def test_a_list_may_be_written_with_or_without_brackets(load: Load, value: str) -> None:
    assert load("", f"prune.targets={value}").prune.targets == ["q_proj", "v_proj"]


def test_a_list_of_one_and_an_empty_list(load: Load) -> None:
    config = load("", "eval.tasks=boolq", "eval.perplexity=[]")
    assert config.eval.tasks == ["boolq"]
    assert config.eval.perplexity == []


def test_a_whole_section_may_be_overridden(load: Load) -> None:
    config = load("", "prune.calibration={dataset: c4, samples: 4}")
    assert (config.prune.calibration.dataset, config.prune.calibration.samples) == ("c4", 4)


def test_an_override_fills_a_section_that_the_file_leaves_out(load: Load) -> None:
    assert load("", "prune.calibration.samples=3").prune.calibration.samples == 3


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


def test_weights_of_one_path_under_two_names(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UserError, match=r"train\.data\.dataset: two of ~/a\.json, /home/me/a\.json are the same path"):
        load("train: {data: {dataset: {~/a.json: 3, /home/me/a.json: 1}}}")


@pytest.mark.parametrize(
    ("path", "reason"), [("~/m", "HOME is not set"), ("~nobody-at-all/m", "there is no such user")]
)
def test_a_home_that_is_not_known(load: Load, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match=rf"model\.path: {path}: the home directory is not known \({reason}\)"):
        load("", f"model.path={path}")


def test_another_model_path_drops_what_belongs_to_the_old_one(load: Load) -> None:
    text = "model: {path: a/b, gguf_file: a.gguf, revision: main, dtype: bfloat16}"
    config = load(text, "model.path=c/d")
    assert (config.model.path, config.model.gguf_file, config.model.revision) == ("c/d", None, None)
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize("overrides", [("model.path=c/d", "model.gguf_file=c.gguf"), ("model.gguf_file=c.gguf",)])
def test_a_gguf_file_of_the_command_line_stays(load: Load, overrides: tuple[str, ...]) -> None:
    assert load("model: {path: a/b, gguf_file: a.gguf}", *overrides).model.gguf_file == "c.gguf"


# --- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ['model.path="a\\nb"', 'eval.perplexity="a\\nb"', 'train.data.dataset={"a\\nb": 1}'])
def test_a_path_has_no_control_characters(value: str) -> None:
    key = value.partition("=")[0]
    with pytest.raises(UserError, match=rf"^command line: {key}: the path .* contains a control character$"):
        load_config(None, [value])


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


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.learning_rate", "see `sppctl config --schema`, section train"),
        ("prune.zzz", "see `sppctl config --schema`, section prune"),
        ("rank", "did you mean train.rank?"),
        ("trian.lr", "did you mean train?"),
        ("patern", "did you mean prune.pattern?"),
        ("prune.calibration.sample", "did you mean prune.calibration.samples?"),
        ("eval.task", "did you mean eval.tasks?"),
        ("zzz", "see `sppctl config --schema`"),
    ],
)
def test_an_unknown_key_points_to_a_known_one(load: Load, key: str, suggestion: str) -> None:
    (problem,) = problems_of(load, "", f"{key}=1")
    assert problem.startswith(f"command line: {key.removesuffix('.lr')}: unknown key")
    assert suggestion in problem


def test_an_override_below_a_plain_key_is_blamed_on_the_command_line(load: Load) -> None:
    (problem,) = problems_of(load, "run: {seed: 3}", "run.seed.more=1")
    assert problem.startswith("command line: run.seed")


def test_a_problem_inside_an_overridden_section_is_blamed_on_the_command_line(load: Load) -> None:
    (problem,) = problems_of(load, "", "prune.calibration={samples: 0}")
    assert problem == "command line: prune.calibration.samples: 0 must be at least 1"


@pytest.mark.parametrize("override", ["=2:4", " = 1"])
def test_an_override_without_a_key_is_named(load: Load, override: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert problem == f"command line: {override!r} is not KEY=VALUE"


def test_an_override_that_is_no_yaml_is_named(load: Load) -> None:
    (problem,) = problems_of(load, "", "prune.targets=[q_proj")
    assert problem.startswith("command line: prune.targets: not valid YAML: ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.rank=4.5", "expected an integer, found 4.5"),
        ("train.rank=true", "expected an integer, found True"),
        ("train.lr=high", "expected a number, found the text 'high'"),
        ("train.lr=", "expected a number, found null"),
        ("model.trust_remote_code=yes", "expected true or false, found the text 'yes'"),
        ("model.path=[a]", "expected text or null, found the list ['a']"),
        ("prune.calibration=c4", "expected a section with keys, found the text 'c4'"),
        ("eval.limit=few", "expected an integer or null, found the text 'few'"),
        ("eval.batch_size=big", "expected an integer or auto, found the text 'big'"),
        ("prune.targets=7", "expected a list of names or all-linear, found 7"),
        ("eval.tasks=[1]", "expected text, found 1"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_found(load: Load, override: str, expected: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert problem == f"command line: {override.partition('=')[0]}: {expected}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=-1", "-1 must be at least 0"),
        ("train.rank=0", "0 must be at least 1"),
        ("train.lr=0", "0.0 must be more than 0"),
        ("train.lr=.nan", "nan must be more than 0"),
        ("train.dropout=1", "1.0 must be less than 1"),
        ("train.dropout=-0.1", "-0.1 must be at least 0"),
        ("prune.calibration.seq_len=1", "1 must be at least 2"),
        ("eval.limit=0", "0 must be at least 1"),
        ("eval.batch_size=0", "0 must be at least 1"),
    ],
)
def test_a_number_out_of_bounds_names_the_bound(load: Load, override: str, expected: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert problem == f"command line: {override.partition('=')[0]}: {expected}"


@pytest.mark.parametrize("key", ["train.lr", "train.epochs", "train.scale", "prune.damp", "train.weight_decay"])
def test_an_infinite_number_is_refused(load: Load, key: str) -> None:
    (problem,) = problems_of(load, "", f"{key}=.inf")
    assert problem.startswith(f"command line: {key}: inf ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.method=wnda", "the text 'wnda' is not one of magnitude, wanda, sparsegpt"),
        ("model.dtype=bfloat", "the text 'bfloat' is not one of auto, float32, bfloat16, float16"),
        ("model.dtype=16", "16 is not one of auto, float32, bfloat16, float16"),
    ],
)
def test_a_choice_lists_what_there_is(load: Load, override: str, expected: str) -> None:
    (problem,) = problems_of(load, "", override)
    assert expected in problem


def test_a_choice_suggests_the_nearest(load: Load) -> None:
    assert problems_of(load, "", "prune.method=wnda")[0].endswith("; did you mean wanda?")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("eval.batch_size=auto", "auto"),
        ("eval.batch_size=4", 4),
        ("eval.limit=null", None),
        ("eval.limit=10", 10),
        ("model.compute_dtype=auto", "auto"),
        ("model.compute_dtype=bfloat16", "bfloat16"),
        ("prune.targets=all-linear", "all-linear"),
        ("train.targets=pruned", "pruned"),
        ("train.targets=[q_proj]", ["q_proj"]),
        ("train.epochs=2", 2.0),
    ],
)
def test_a_key_with_several_types_takes_each(load: Load, override: str, value: Any) -> None:
    found = flatten(to_dict(load("", override)))[override.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


def test_a_model_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("run: {dir: x}")
    with pytest.raises(UserError, match=r"^model\.path: not set; name a hub id, a local directory or package:NAME"):
        load_config(str(path))


def test_combinations_that_cannot_work_are_found(load: Load) -> None:
    found = problems_of(load, "train: {batch_size: 10, micro_batch_size: 4}\nprune: {targets: []}")
    assert found == [
        "train.micro_batch_size: 4 does not divide train.batch_size 10",
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


def test_a_yaml_1_1_reader_understands_it_too(load: Load) -> None:
    config = load("", "prune.pattern=2:4", "train.lr=4e-3")
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_keys_that_cannot_change_a_result_are_left_out(load: Load) -> None:
    config = load()
    every, kept = set(flatten(to_dict(config))), set(flatten(result_keys(config)))
    without_effect = {
        "run.dir",
        "model.device",
        "train.micro_batch_size",
        "train.gradient_checkpointing",
        "train.save_steps",
        "train.keep_checkpoints",
        "train.log_steps",
        "eval.batch_size",
    }
    assert without_effect <= every
    assert not without_effect & kept
    assert {"run.seed", "model.path", "prune.pattern", "train.lr", "train.batch_size", "eval.limit"} <= kept
    assert kept < every


def test_the_schema_gives_every_key_a_type_a_default_and_a_meaning() -> None:
    entries = schema()
    assert [entry["key"] for entry in entries] == list(config_keys()) == list(flatten(to_dict(Config())))
    for entry in entries:
        assert set(entry) == {"key", "type", "default", "meaning"}
        assert entry["meaning"].strip(), entry["key"]
        assert "<class" not in entry["type"], entry["key"]
