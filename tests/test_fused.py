"""Modules of GPU kernels: used where their test passes, else replaced with a warning that says why."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from sppctl.fused import FusedKernels

CPU = torch.device("cpu")


def made(check: Any, module: str = "types") -> FusedKernels:
    return FusedKernels(module, check, "Slower")


def test_they_are_used_where_the_test_passes_which_runs_once(recwarn: pytest.WarningsRecorder) -> None:
    devices: list[torch.device] = []
    kernels = made(lambda module, device: devices.append(device))
    assert kernels.on(CPU) is kernels.on(CPU) is types
    assert devices == [CPU]
    assert not recwarn


def test_where_they_do_not_run_a_warning_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    kernels = made(fails)
    assert kernels.on(CPU) is kernels.on(CPU) is None
    assert [str(warning.message) for warning in recwarn] == ["Slower: Failed to find C compiler."]


def test_without_triton_the_warning_names_it() -> None:
    with pytest.warns(UserWarning, match=r"^Slower: No module named 'nowhere'$"):
        assert made(lambda *_: None, "nowhere.kernels").on(CPU) is None


def test_a_tensor_of_a_cpu_never_needs_them() -> None:
    assert made(pytest.fail).usable(torch.zeros(4, 4)) is None
