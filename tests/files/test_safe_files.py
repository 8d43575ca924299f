from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sppctl.errors import UserError
from sppctl.files.names import INDEX_NAME
from sppctl.files.safe_files import (
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


def raw(header: object, data: bytes) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_the_library_reads_and_the_other_way_round(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"matrix": values(dtype, 3, 5), "scalar": values(dtype, 2)[1], "none": values(dtype, 0, 4)}
    tensors["fused"] = values(dtype, 4, 3, 5)
    create(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"made": "here"})
    read_by_library, file = load_file(tmp_path / "ours"), TensorFile(tmp_path / "theirs")
    assert read_by_library.keys() == file.specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(read_by_library[name], tensor)
        assert same(file.read(name), tensor)
    assert all(same(file.read("fused", entry), tensors["fused"][entry]) for entry in range(4))
    assert file.metadata == {"made": "here"}
    assert TensorFile(tmp_path / "ours").metadata == {"format": "pt"}


def test_spec_says_where_the_bytes_lie(tmp_path: Path) -> None:
    file = create(tmp_path / "a.safetensors", {"a": values(torch.int16, 3), "b": values(torch.uint8, 2, 2)})
    start = file.specs["a"].start
    assert file.specs["a"].stop == file.specs["b"].start == start + 6
    assert file.specs["b"].stop == start + 10 == file.path.stat().st_size
    assert file.path.read_bytes()[start:] == struct.pack("<3h", 0, 1, 2) + bytes([0, 1, 2, 3])


@pytest.mark.parametrize("length", range(1, 10))
def test_data_is_aligned_and_any_alignment_is_read_and_written(tmp_path: Path, length: int) -> None:
    path, name, tensor = tmp_path / "a.safetensors", "a" * length, torch.tensor([1.5, -2.25, 3.0], dtype=torch.float64)
    file = create(path, {name: tensor})
    assert file.specs[name].start % 8 == 0
    assert same(load_file(path)[name], tensor)
    header = {name: {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}
    path.write_bytes(raw(header, tensor.numpy().tobytes()))
    file = OwnFile(path)
    assert same(file.read(name), tensor)
    file.write(name, -tensor)
    assert same(file.read(name), -tensor)
    assert same(load_file(path)[name], -tensor)


def test_a_new_file_is_zero_until_written_and_converts_what_is(tmp_path: Path) -> None:
    file = OwnFile.create(tmp_path / "a.safetensors", {"a": (torch.bfloat16, (2,)), "b": (torch.float32, (4, 3))}, {})
    assert same(file.read("a"), torch.zeros(2, dtype=torch.bfloat16))
    file.write("a", torch.tensor([1.0, 1.0 + 2**-8 + 2**-9]))  # rounds up: a bfloat16 has 7 bits after the point
    assert file.read("a").tolist() == [1.0, 1.0 + 2**-7]
    view = values(torch.float32, 3, 4).t()
    file.write("b", view.requires_grad_())
    assert same(file.read("b"), view)
    with pytest.raises(AssertionError, match="b: "):
        file.write("b", torch.zeros(3, 4))
    assert load_file(OwnFile.create(tmp_path / "none.safetensors", {}, {"format": "pt"}).path) == {}


def test_overwriting_one_tensor_leaves_every_other_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.randn(5, 3) for name in "abc"}, path, {"format": "pt"})
    content, file = path.read_bytes(), OwnFile(path)
    before = file.read("b")
    file.write("b", torch.full((5, 3), 7.0))
    spec, after = file.specs["b"], path.read_bytes()
    assert after[: spec.start] == content[: spec.start]
    assert after[spec.start : spec.stop] == struct.pack("<15f", *[7.0] * 15)
    assert after[spec.stop :] == content[spec.stop :]
    assert not (before == 7).any()  # what was read does not change with the file
    before.fill_(5)
    assert path.read_bytes() == after


SAVED = save({"a": torch.zeros(100)})
ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'


DAMAGED = {
    "cut": SAVED[:-1],
    "cut header": SAVED[:30],
    "longer": SAVED + b"more",
    "empty": b"",
    "short": b"abc",
    "text": b"this is no tensor file",
    "huge header": struct.pack("<Q", 1 << 62),
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "list": raw([1], b"1234"),
    "string": raw('"text"', b"1234"),
    "number": raw({"a": 1}, b"1234"),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "one offset": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
    "unknown dtype": raw({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "size": raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    "overlap": raw(f'{{"a": {ENTRY % (0, 8)}, "b": {ENTRY % (4, 8)}}}', bytes(12)),
    "gap": raw(f'{{"a": {ENTRY % (0, 4)}, "b": {ENTRY % (8, 12)}}}', bytes(12)),
    "negative": raw(f'{{"a": {ENTRY % (-4, 4)}}}', bytes(12)),
    "twice": raw(f'{{"a": {ENTRY % (0, 4)}, "a": {ENTRY % (0, 4)}}}', bytes(4)),
    "nested": raw('{"a": {"x": ' + "[" * 1000 + "]" * 1000 + "}}", bytes(12)),
    "huge number": raw('{"a": {"dtype": "F32", "shape": [' + "9" * 6000 + '], "data_offsets": [0, 4]}}', bytes(12)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_whole_file_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[damage])
    with pytest.raises(UserError, match=r"a\.safetensors is truncated or damaged, or not a safetensors file \("):
        read_header(tmp_path / "a.safetensors")


def test_names_and_dtypes_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"00"))
    with pytest.raises(UserError, match=r"a\.safetensors: a has dtype F4, which sppctl cannot read; use a checkpoint"):
        read_header(path)
    save_file({"a\nb": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"a\.safetensors: 'a\\nb' is not the name of a tensor"):
        read_header(path)


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            (INDEX_NAME, content, r"index\.json is not a readable index")
            for content in ("{", "[]", "{}", "[" * 100_000)
        ),
        (INDEX_NAME, '{"weight_map": 3}', "is not a readable index"),
        (INDEX_NAME, '{"weight_map": {"a": "x.safetensors"}}', "is not a readable index"),  # as transformers has it
        ("pytorch_model.bin", "pickle", r"only pytorch_model\.bin, which is pickle"),
        ("notes.txt", "", r"holds no safetensors weights$"),
    ],
)
def test_a_directory_without_weights(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
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
    refused(lambda index: index.update(extra=first), rf"extra is in no shard, but {INDEX_NAME} says {first}")
    refused(lambda index: index.pop(name), rf"{name} is in model-0000\d-of-00006\.safetensors, but .* says no shard")
    refused(lambda index: index.update({name: first if index[name] != first else last}), rf"{name} is in model-")
    unnamed = r"model\.safetensors\.index\.json does not list model-00006-of-00006\.safetensors; download both"
    refused(lambda index: [index.pop(key) for key in list(index) if index[key] == last], unnamed)


def test_a_missing_shard_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = shards_of(make_checkpoint, tmp_path / "m", len)
    second = sorted(out.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(UserError, match=f"shard {second.name} is missing"):
        TensorFiles(out)


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
    with pytest.raises(UserError, match="is a link, and sppctl only writes to its own files"):
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
