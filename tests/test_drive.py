"""Experts read from files: byte for byte what the safetensors library reads, and every way a file can be broken."""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from engine_cases import SMALL, small_network
from safetensors.torch import load_file, save_file
from test_checkpoint import HF_CONFIG, merge, shard

from tidesim.engine.checkpoint import save_network
from tidesim.engine.drive import BLOCK, DirectFile, Drive
from tidesim.engine.model import LLaDA2
from tidesim.errors import ModelError

Tensors = dict[str, torch.Tensor]
MATRICES = ("gate_proj", "up_proj", "down_proj")
FIRST = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.fixture(scope="module")
def network() -> LLaDA2:
    return small_network(seed=21)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def folder(request: pytest.FixtureRequest, network: LLaDA2, tmp_path: Path) -> Path:
    save_network(network, HF_CONFIG, tmp_path / "small", request.param)
    return tmp_path / "small"


def loaded(folder: Path) -> Tensors:
    """What the safetensors library reads, in memory of its own: tests write over the file."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def keep(folder: Path, tensors: Tensors) -> None:
    """Leave the folder as it was saved: split, in one file."""


def shift(folder: Path, tensors: Tensors) -> None:
    """Put an odd number of bytes in front of all others, so that no tensor is aligned to anything."""
    pad_header(folder, 13)


def pad_header(folder: Path, num_bytes: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * num_bytes
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def expected(tensors: Tensors, layer: int, expert: int) -> np.ndarray[Any, Any]:
    prefix = f"model.layers.{layer + SMALL.first_k_dense_replace}.mlp.experts.{expert}"
    parts = [tensors[f"{prefix}.{matrix}.weight"].contiguous().view(torch.uint8).flatten() for matrix in MATRICES]
    return torch.cat(parts).numpy()


def read(drive: Drive, layer: int, expert: int) -> np.ndarray[Any, Any]:
    out = np.zeros(drive.expert_bytes, np.uint8)
    drive.read_expert(layer, expert, out)
    return out


@pytest.mark.parametrize("layout", [keep, merge, shard, shift])
def test_every_expert_is_read_byte_for_byte(folder: Path, layout: Callable[[Path, Tensors], None]) -> None:
    tensors = loaded(folder)
    layout(folder, tensors)
    with Drive(folder, SMALL, depth=2) as drive:
        assert drive.dtype == tensors[FIRST].dtype
        for layer in range(2):
            for expert in range(SMALL.num_experts):
                np.testing.assert_array_equal(read(drive, layer, expert), expected(tensors, layer, expert))


def test_threads_may_read_at_once(folder: Path) -> None:
    tensors = loaded(folder)
    pairs = [(layer, expert) for layer in range(2) for expert in range(SMALL.num_experts)] * 4
    with Drive(folder, SMALL, depth=3) as drive, ThreadPoolExecutor(6) as threads:
        outs = list(threads.map(lambda pair: read(drive, *pair), pairs))
    for pair, out in zip(pairs, outs, strict=True):
        np.testing.assert_array_equal(out, expected(tensors, *pair))


def test_a_read_that_was_begun_is_finished_by_close(folder: Path) -> None:
    tensors = loaded(folder)
    with Drive(folder, SMALL, depth=1) as drive:
        outs = [np.zeros(drive.expert_bytes, np.uint8) for _ in range(SMALL.num_experts)]
        for expert, out in enumerate(outs):
            drive.start_read(1, expert, out)
    for expert, out in enumerate(outs):
        np.testing.assert_array_equal(out, expected(tensors, 1, expert))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Begin and length of every read that experts ask their files for."""
    reads: list[tuple[int, int]] = []
    plain = DirectFile.read

    def counted(self: DirectFile, begin: int, length: int) -> Any:
        reads.append((begin, length))
        return plain(self, begin, length)

    monkeypatch.setattr(DirectFile, "read", counted)
    return reads


def test_neighbouring_matrices_are_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Drive(folder, SMALL) as drive:
        reads = count_reads(monkeypatch)
        read(drive, 0, 5)
        assert [length for _, length in reads] == [drive.expert_bytes]


@pytest.mark.parametrize(("gap", "num_reads"), [(BLOCK, 1), (BLOCK + 8, 3)])
def test_a_gap_of_up_to_a_block_is_read_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, num_reads: int
) -> None:
    write_with_gaps(tmp_path / "model.safetensors", gap)
    with Drive(tmp_path, SMALL) as drive:
        reads = count_reads(monkeypatch)
        out = read(drive, 1, 31)
        assert len(reads) == num_reads
    size = drive.expert_bytes // 3
    number = 3 * (SMALL.num_experts + 31)
    np.testing.assert_array_equal(out.reshape(3, size), [[(number + i) % 251] * size for i in range(3)])


def write_with_gaps(file: Path, gap: int) -> None:
    """Expert matrices in order with `gap` bytes between each and the next, each filled with its own number."""
    size = 2 * SMALL.hidden_size * SMALL.moe_intermediate_size
    entries, data = {}, b""
    for layer in (1, 2):
        for expert in range(SMALL.num_experts):
            for matrix in MATRICES:
                shape = [SMALL.moe_intermediate_size, SMALL.hidden_size]
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                offsets = [len(data), len(data) + size]
                entries[name] = {
                    "dtype": "BF16",
                    "shape": shape[::-1] if matrix == "down_proj" else shape,
                    "data_offsets": offsets,
                }
                data += bytes([(len(entries) - 1) % 251]) * size + b"\xff" * gap
    write_file(file, entries, data)


def write_file(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- file systems that refuse direct reads ---


def refuse_flag(path: Any, flags: int, *rest: Any) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return PLAIN_OPEN(path, flags, *rest)


PLAIN_OPEN = os.open
PLAIN_PREADV = os.preadv


def test_where_direct_reads_are_refused_they_are_buffered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = loaded(folder)
    dropped: list[int] = []
    monkeypatch.setattr(os, "open", refuse_flag)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: dropped.append(size))
    with Drive(folder, SMALL) as drive:
        assert not drive.is_direct
        np.testing.assert_array_equal(read(drive, 0, 3), expected(tensors, 0, 3))
    assert dropped
    assert all(size % BLOCK == 0 for size in dropped)


def test_where_the_flag_is_taken_and_reads_are_refused_they_are_buffered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse_first(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return PLAIN_PREADV(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_first)
    with Drive(folder, SMALL) as drive:
        assert not drive.is_direct


def test_reads_that_are_cut_short_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = loaded(folder)

    def cut(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        assert offset % BLOCK == 0
        return min(PLAIN_PREADV(descriptor, buffers, offset), BLOCK + 100)

    monkeypatch.setattr(os, "preadv", cut)
    with Drive(folder, SMALL) as drive:
        np.testing.assert_array_equal(read(drive, 1, 7), expected(tensors, 1, 7))


# --- what goes wrong ---


def test_an_error_of_the_drive_names_file_and_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Drive(folder, SMALL) as drive:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ModelError, match=r"model\.safetensors: reading \d+ bytes at offset \d+ failed \(Input"):
            read(drive, 0, 0)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder: Path) -> None:
    with Drive(folder, SMALL) as drive:
        os.truncate(folder / "model.safetensors", 10_000)
        with pytest.raises(ModelError, match=r"model\.safetensors: ends at byte 10000, expected at least \d+"):
            read(drive, 1, 31)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of the file, the data stays."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        write_file(file, header if changed is None else changed, content[8 + length :])

    return apply


def entry(**changes: object) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        header[FIRST].update(changes)

    return edit(change)


def write_raw(content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return apply


def write_index(index: Mapping[str, object] | str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return apply


def cut_in_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def drop_up_of_7(header: dict[str, Any]) -> None:
    del header[FIRST.replace(".0.gate", ".7.up")]


def mix_dtypes(folder: Path) -> None:
    tensors = loaded(folder)
    other = torch.float32 if tensors[FIRST].dtype == torch.bfloat16 else torch.bfloat16
    tensors[FIRST] = tensors[FIRST].to(other)
    save_file(tensors, folder / "model.safetensors")


SIZE = SMALL.hidden_size * SMALL.moe_intermediate_size


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (write_raw(b""), "not a readable safetensors file .it has 0 bytes"),
        (write_raw(b"\xff" * 8 + b"{}"), "not a readable safetensors file .a header of 18446744073709551615 bytes"),
        (write_raw(b"\x02" + b"\0" * 7 + b"{"), "a header of 2 bytes in a file of 9"),
        (write_raw(b"\x02" + b"\0" * 7 + b"\xff\xff"), "its header is not JSON"),
        (edit(lambda header: b"[" * 100_000), "its header is not JSON"),
        (edit(lambda header: [1]), "its header is a list"),
        (edit(drop_up_of_7), r"tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight is missing"),
        (entry(shape=[24, 47], data_offsets=[0, 24 * 47 * 4], dtype="F32"), r"shape \[24, 47\], expected \[24, 48\]"),
        (entry(shape=[-24, -48]), "must give a dtype, a shape and two data_offsets"),
        (entry(shape=[24.0, 48]), "must give a dtype"),
        (entry(data_offsets=[0]), "must give a dtype"),
        (entry(data_offsets=[True, 4]), "must give a dtype"),
        (entry(dtype=None), "must give a dtype"),
        (edit(lambda header: header.update({FIRST: 3})), r"gate_proj\.weight: its header entry must"),
        (entry(dtype="F16"), "stored as F16; experts are read as BF16 or F32"),
        (entry(data_offsets=[8, 4]), r"data_offsets \[8, 4\] hold -4 bytes, its shape takes"),
        (entry(data_offsets=[0, 10]), "hold 10 bytes, its shape takes"),
        (entry(dtype="F32", data_offsets=[2**70, 2**70 + 4 * SIZE]), "ends at byte 118.*, yet the file has"),
        (cut_in_half, r"model\.safetensors: tensor model\.\S+ ends at byte \d+, yet the file has \d+"),
        (mix_dtypes, r"tensor model\.\S+ is torch\.\S+, the expert's others are torch"),
        (write_index("{"), "an object with a weight_map is expected"),
        (write_index({"weight_map": {"a": 3, "b": "c"}}), "an object with a weight_map is expected"),
        (write_index({"weight_map": {"a": "../x.safetensors"}}), "is not the name of a file in this folder"),
        (write_index({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors: cannot be opened .No such file"),
    ],
)
def test_a_broken_file_is_refused_by_name(folder: Path, change: Callable[[Path], None], said: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=said):
        Drive(folder, SMALL)


def test_experts_of_two_dtypes_are_refused(folder: Path) -> None:
    tensors = loaded(folder)
    other = torch.float32 if tensors[FIRST].dtype == torch.bfloat16 else torch.bfloat16
    tensors.update((name, tensor.to(other)) for name, tensor in tensors.items() if ".layers.2.mlp.experts." in name)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"stored as torch\.bfloat16 and torch\.float32; one is expected"):
        Drive(folder, SMALL)


def test_bad_arguments_are_value_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"depth\(=0\)"):
        Drive(folder, SMALL, depth=0)
    with Drive(folder, SMALL) as drive:
        out = np.zeros(drive.expert_bytes, np.uint8)
        with pytest.raises(ValueError, match="must be contiguous uint8"):
            drive.read_expert(0, 0, out[:-1])
        with pytest.raises(ValueError, match="must be contiguous uint8"):
            drive.read_expert(0, 0, np.zeros(2 * drive.expert_bytes, np.uint8)[::2])
        for layer, expert in ((2, 0), (-1, 0), (0, 32)):
            with pytest.raises(ValueError, match="there is no expert"):
                drive.read_expert(layer, expert, out)
