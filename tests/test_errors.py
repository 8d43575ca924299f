"""Errors of users: key, problem and fix, and many of them at once."""

from __future__ import annotations

import pickle

import pytest

from sppctl.errors import Problems, StageError, UserError, first_line, with_argument_names


def test_the_three_parts_are_one_line_and_survive_the_way_to_another_process() -> None:
    error = UserError("train.rank", "17 is too large", "lower it")
    error.shared = True
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == "train.rank: 17 is too large; lower it"
        assert (one.key, one.problem, one.fix, one.shared) == ("train.rank", "17 is too large", "lower it", True)
    assert str(error.under("--rank")) == "--rank: 17 is too large; lower it"
    whole = UserError("run holds no run; give another")
    assert (str(whole), whole.key) == ("run holds no run; give another", None)


def test_problems_of_several_checks_are_one_error_each_named_once() -> None:
    problems = Problems()
    problems.raise_all()
    for text in ("b", "a", "b"):
        with problems:
            raise UserError(text, "wrong")
    problems.add("c", "wrong", "correct it")
    with pytest.raises(UserError) as caught:
        problems.raise_all()
    assert caught.value.lines == ["b: wrong", "a: wrong", "c: wrong; correct it"]
    with pytest.raises(StageError), problems:
        raise StageError("not of a user")


def test_errors_name_the_argument_in_the_place_of_the_key() -> None:
    match = r"^--device: tpu is not usable; try auto$"
    with pytest.raises(UserError, match=match), with_argument_names({"model.device": "--device"}):
        raise UserError("model.device", "tpu is not usable", "try auto")


def test_the_first_line() -> None:
    assert first_line(ValueError("\n a\nb")) == "a"
    assert first_line(KeyError()) == "KeyError"
