from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sppctl.errors import UserError
from sppctl.files.safe_files import (
    INDEX_NAME,
    OwnFile,
    OwnFiles,
    TensorFile,
    TensorFiles,
    adapter_file,
    adapter_settings,
    is_adapter,
    read_header,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(7).reshape(shape).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def create(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> OwnFile:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = OwnFile.create(path, layout, metadata or {})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return file


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"matrix": values(dtype, 3, 5), "scalar": values(dtype, 2)[1], "none": values(dtype, 0, 4)}
    create(path, tensors, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_library_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"matrix": values(dtype, 3, 5), "scalar": values(dtype, 2)[1], "none": values(dtype, 0, 4)}
    save_file(tensors, path, {"made": "here"})
    file = TensorFile(path)
    assert all(same(file.read(name), tensors[name]) for name in tensors)
    assert read_header(path)[1] == {"made": "here"}


def test_spec_says_where_the_bytes_lie(tmp_path: Path) -> None:
    file = create(tmp_path / "a.safetensors", {"a": values(torch.int16, 3), "b": values(torch.uint8, 2, 2)})
    start = file.specs["a"].start
    assert file.specs["a"].stop == file.specs["b"].start == start + 6
    assert file.specs["b"].stop == start + 10 == file.path.stat().st_size
    assert file.path.read_bytes()[start:] == struct.pack("<3h", 0, 1, 2) + bytes([0, 1, 2, 3])


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 10)])
def test_header_is_padded_so_that_data_is_aligned(tmp_path: Path, name: str) -> None:
    file = create(tmp_path / "a.safetensors", {name: values(torch.float64, 3)})
    assert file.specs[name].start % 8 == 0
    assert same(load_file(file.path)[name], values(torch.float64, 3))


@pytest.mark.parametrize("pad", range(8))
def test_any_alignment_of_the_data_is_read_and_written(tmp_path: Path, pad: int) -> None:
    tensor = torch.tensor([1.5, -2.25, 3.0], dtype=torch.float64)
    header = {"a" * (pad + 1): {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}
    path = write_raw(tmp_path / "a.safetensors", header, tensor.numpy().tobytes())
    file = OwnFile(path)
    (name,) = header
    assert same(file.read(name), tensor)
    file.write(name, -tensor)
    assert same(file.read(name), -tensor)
    assert same(load_file(path)[name], -tensor)


def test_a_new_file_is_zero_until_written(tmp_path: Path) -> None:
    file = OwnFile.create(tmp_path / "a.safetensors", {"a": (torch.bfloat16, (2, 3))}, {})
    assert same(file.read("a"), torch.zeros(2, 3, dtype=torch.bfloat16))


def test_no_tensors_at_all(tmp_path: Path) -> None:
    file = OwnFile.create(tmp_path / "a.safetensors", {}, {"format": "pt"})
    assert load_file(file.path) == {}
    assert read_header(file.path) == ({}, {"format": "pt"})


def test_writing_converts_to_the_dtype_laid_out(tmp_path: Path) -> None:
    file = OwnFile.create(tmp_path / "a.safetensors", {"a": (torch.bfloat16, (2,))}, {})
    file.write("a", torch.tensor([1.0, 1.0 + 2**-8 + 2**-9]))  # rounds up: a bfloat16 has 7 bits after the point
    assert file.read("a").tolist() == [1.0, 1.0 + 2**-7]


def test_writing_a_view_writes_its_values(tmp_path: Path) -> None:
    tensor = values(torch.float32, 3, 4).t()
    file = OwnFile.create(tmp_path / "a.safetensors", {"a": (torch.float32, (4, 3))}, {})
    file.write("a", tensor.requires_grad_())
    assert same(file.read("a"), tensor)


def test_writing_another_shape_is_refused(tmp_path: Path) -> None:
    file = OwnFile.create(tmp_path / "a.safetensors", {"a": (torch.float32, (4, 3))}, {})
    with pytest.raises(AssertionError, match="a: "):
        file.write("a", torch.zeros(3, 4))


def test_overwriting_one_tensor_leaves_every_other_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.randn(5, 3) for name in "abc"}, path, {"format": "pt"})
    before = path.read_bytes()
    file = OwnFile(path)
    file.write("b", torch.full((5, 3), 7.0))
    spec, after = file.specs["b"], path.read_bytes()
    assert after[: spec.start] == before[: spec.start]
    assert after[spec.start : spec.stop] == struct.pack("<15f", *[7.0] * 15)
    assert after[spec.stop :] == before[spec.stop :]


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    path = write_raw(tmp_path / "a.safetensors", header, b"00")
    with pytest.raises(UserError, match=r"a\.safetensors: a has dtype F4, which sppctl cannot read; use a checkpoint"):
        read_header(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_entry_is_read_as_from_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    file = create(tmp_path / "a.safetensors", {"before": values(dtype, 3), "fused": values(dtype, 4, 3, 5)})
    assert all(same(file.read("fused", entry), file.read("fused")[entry]) for entry in range(4))


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    file = create(tmp_path / "a.safetensors", {"a": torch.ones(4)})
    before = file.read("a")
    file.write("a", torch.zeros(4))
    assert before.tolist() == [1.0] * 4
    before += 5
    assert file.read("a").tolist() == [0.0] * 4


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 60])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"a\.safetensors is truncated or damaged"):
        read_header(path)


def test_a_file_cut_within_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError, match=r"a\.safetensors is truncated or damaged"):
        read_header(path)


def test_bytes_after_the_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match="truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"this is no tensor file", struct.pack("<Q", 1 << 62), struct.pack("<Q", 4) + b"\xff\xfe{}"],
    ids=["empty", "short", "text", "huge header", "no JSON"],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        [1],
        "text",
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=["list", "string", "number", "no offsets", "one offset", "unknown dtype"],
)
def test_a_header_of_another_form_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(UserError, match="not a safetensors file"):
        read_header(write_raw(tmp_path / "a.safetensors", header, b"1234"))


@pytest.mark.parametrize(
    "entries",
    [
        '"a": E(0, 8), "b": E(4, 8)',
        '"a": E(0, 4), "b": E(8, 12)',
        '"a": E(-4, 4)',
        '"a": E(0, 4), "a": E(0, 4)',
        '"a": {"x": ' + "[" * 1000 + "]" * 1000 + "}",
        '"a": {"dtype": "F32", "shape": [' + "9" * 6000 + '], "data_offsets": [0, 4]}',
    ],
    ids=["overlap", "gap", "negative", "twice", "nested", "huge number"],
)
def test_offsets_and_names_are_those_of_a_real_file(tmp_path: Path, entries: str) -> None:
    entry = r'{"dtype": "F32", "shape": [1], "data_offsets": [\1, \2]}'
    text = ("{" + re.sub(r"E\((-?\d+), (\d+)\)", entry, entries) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(UserError, match=r"a\.safetensors is truncated or damaged, or not a safetensors file"):
        read_header(tmp_path / "a.safetensors")


def test_a_name_is_one_line(tmp_path: Path) -> None:
    save_file({"a\nb": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: 'a\\nb' is not the name of a tensor"):
        read_header(tmp_path / "a.safetensors")


def test_a_size_that_does_not_fit_the_shape_is_refused(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    with pytest.raises(UserError, match="truncated or damaged, or not a safetensors file"):
        read_header(write_raw(tmp_path / "a.safetensors", header, b"1234"))


# --- several files ----------------------------------------------------------------------------------------------------


def test_shards_read_as_one_mapping(make_checkpoint: Callable[..., Path]) -> None:
    whole, shards = make_checkpoint("llama"), make_checkpoint("llama", max_shard_size="20KB")
    files, expected = TensorFiles(shards), load_file(whole / "model.safetensors")
    assert len(files.files) > 1
    assert set(files) == expected.keys()
    assert all(same(files.read(name), tensor) for name, tensor in expected.items())
    assert all(files.spec(name).shape == tuple(tensor.shape) for name, tensor in expected.items())
    assert "model.norm.weight" in files
    assert "nothing" not in files
    assert files.num_bytes == sum(path.stat().st_size for path in shards.glob("*.safetensors"))


def test_writing_reaches_the_right_shard(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", max_shard_size="20KB")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.mlp.down_proj.weight"
    files = OwnFiles(tmp_path)
    files.write(name, torch.zeros(32, 48))
    changed = [path.name for path in source.iterdir() if path.read_bytes() != (tmp_path / path.name).read_bytes()]
    assert changed == [json.loads((source / INDEX_NAME).read_text())["weight_map"][name]]
    assert not TensorFiles(tmp_path).read(name).any()


def test_a_file_of_any_name_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert list(TensorFiles(tmp_path)) == ["a"]


def test_a_missing_shard_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", max_shard_size="20KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    for path in source.iterdir():
        if path.name != shards[1]:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"shard {shards[1]} is missing"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(UserError, match=r"index\.json is not a readable index"):
        TensorFiles(tmp_path)


def test_pickle_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, which is pickle"):
        TensorFiles(tmp_path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no safetensors weights$"):
        TensorFiles(tmp_path)


def shards_of(make_checkpoint: Callable[..., Path], out: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A copy of a checkpoint in shards, with another map from tensors to shards in its index."""
    shutil.copytree(make_checkpoint("llama", max_shard_size="20KB"), out)
    content = json.loads((out / INDEX_NAME).read_text())
    change(content["weight_map"])
    (out / INDEX_NAME).write_text(json.dumps(content))
    return out


def test_an_index_that_does_not_describe_its_shards(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    name, changes = "model.norm.weight", itertools.count()

    def refused(change: Callable[[dict[str, object]], object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            TensorFiles(shards_of(make_checkpoint, tmp_path / str(next(changes)), change))

    first, last = "model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"
    refused(lambda index: index.update(extra=first), rf"extra is in no shard, but in {first} by {INDEX_NAME}")
    refused(lambda index: index.pop(name), rf"{name} is in model-0000\d-of-00006\.safetensors, but in no shard by")
    refused(lambda index: index.update({name: first if index[name] != first else last}), rf"{name} is in model-")
    unnamed = r"model\.safetensors\.index\.json does not name model-00006-of-00006\.safetensors; download both"
    refused(lambda index: [index.pop(key) for key in list(index) if index[key] == last], unnamed)


def test_a_tensor_in_two_files(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = shards_of(make_checkpoint, tmp_path / "m", len)
    first, second = sorted(out.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.ones(1)}, second)
    for _ in range(2):  # with the index, and without
        with pytest.raises(UserError, match=rf"{name} is in {first.name} and in {second.name}"):
            TensorFiles(out)
        (out / INDEX_NAME).unlink(missing_ok=True)


def test_leftover_shards_beside_one_file(llama: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "shard-00000-model-00001-of-00001.safetensors"):
        out = Path(shutil.copytree(llama, tmp_path / name))
        shutil.copy(llama / "model.safetensors", out / name)
        with pytest.raises(UserError, match=rf"{name} is a shard beside model\.safetensors; remove one"):
            TensorFiles(out)


@pytest.mark.parametrize(
    "shard",
    [f"{name}.safetensors" for name in ("../m/x", "/x", "a/x", "..\\x", "x\0", "\ud800")]
    + ["", "..", None, 3, "config.json", ["x.safetensors"]],
)
def test_a_shard_is_a_plain_name(shard: object, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = shards_of(make_checkpoint, tmp_path / "m", lambda index: index.update({"model.norm.weight": shard}))
    with pytest.raises(UserError, match=r"is not the name of a safetensors file in|is not a readable index"):
        TensorFiles(out)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"weight_map": {"a": "x.safetensors"}}'])
def test_an_index_that_no_library_reads(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(UserError, match="is not a readable index"):
        TensorFiles(tmp_path)


# --- what belongs to others -------------------------------------------------------------------------------------------


def test_links_are_read_and_never_written(llama: Path, tmp_path: Path) -> None:
    """A hub's cache consists of links; none of them may be a way to somebody else's file."""
    store = tmp_path / "blob"
    shutil.copy(llama / "model.safetensors", store)
    before = store.read_bytes()
    link = tmp_path / "m" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to("../blob")
    assert TensorFiles(link.parent).read("model.norm.weight").shape == (32,)
    assert not hasattr(TensorFiles, "write")
    assert not hasattr(TensorFile, "write")
    with pytest.raises(UserError, match="is a link, and sppctl writes into files of its own only"):
        OwnFiles(link.parent)
    OwnFile.create(link, {"a": (torch.uint8, (1,))}, {}).write("a", torch.ones(1))
    assert store.read_bytes() == before
    assert not link.is_symlink()


def test_what_is_an_adapter(llama: Path, tmp_path: Path) -> None:
    assert not is_adapter(llama)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        alone, beside = tmp_path / "alone" / name, tmp_path / name / name
        shutil.copytree(llama, beside.parent)
        alone.parent.mkdir(exist_ok=True)
        for path in (alone, beside):
            path.write_text("[]")
        assert is_adapter(alone.parent)
        assert not is_adapter(beside.parent)
        with pytest.raises(UserError, match=r"this is a PEFT adapter; model\.path takes a full model"):
            TensorFiles(alone.parent)
        with pytest.raises(UserError, match=r"is not a PEFT adapter, or its adapter_config\.json is damaged"):
            adapter_settings(alone.parent)
    (tmp_path / "alone" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors \(only adapter_model\.bin, which is pickle"):
        adapter_file(tmp_path / "alone")
