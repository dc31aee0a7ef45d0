"""Checkpoints: complete at any moment, and without code."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emu_kernels.trainer import checkpoint
from emu_kernels.trainer.config import Config
from emu_kernels.trainer.data import SPLITS, Graph
from emu_kernels.trainer.errors import RunError
from emu_kernels.trainer.run import RunFolder, new_model
from tests.trainer.support import embeddings


@pytest.mark.parametrize("mapped", [False, True])
def test_round_trip_is_exact(tmp_path, mapped):
    tensors = {"a.b": torch.randn(3, 4), "transposed": torch.randn(5, 2).T, "n": torch.tensor(7)}
    state = {"step": 3, "loss_sum": 0.1 + 0.2, "best": None}
    checkpoint.save(tmp_path / "x.safetensors", tensors, state)
    loaded, loaded_state = checkpoint.load(tmp_path / "x.safetensors", mapped=mapped)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_mapped_tensors_outlive_their_file_and_never_change_it(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"x": torch.ones(1000)}, {"step": 1})
    tensors, _ = checkpoint.load(path, mapped=True)
    tensors["x"][0] = 5.0
    assert torch.equal(checkpoint.load(path)[0]["x"], torch.ones(1000))
    checkpoint.save(path, {"x": torch.zeros(1000)}, {"step": 2})
    assert tensors["x"].sum() == 5.0 + 999.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_mapped_tensors_take_no_memory(tmp_path):
    def taken() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))  # KiB

    checkpoint.save(tmp_path / "x.safetensors", {"x": torch.ones(1000, 4000)}, {})
    before = taken()
    tensors, _ = checkpoint.load(tmp_path / "x.safetensors", mapped=True)
    assert tensors["x"].sum() == 4e6
    assert taken() - before < 8_000  # of 16,000


def grown(step: Callable[[], object]) -> int:
    """MiB of memory that a call adds at its peak."""

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) >> 10

    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_tables_are_written_from_where_they_are(tmp_path):
    tensors = {"x": torch.ones(1000, 16_000)}  # 61 MiB
    assert grown(lambda: checkpoint.save(tmp_path / "x.safetensors", tensors, {})) < 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_text_is_written_by_rows(tmp_path):
    """As Python objects, the table's 1.5 million numbers would take 46 MiB."""
    graph = Graph(
        [f"entity {i}" for i in range(15_000)],
        ["r"],
        {split: torch.zeros((1, 3), dtype=torch.int64) for split in SPLITS},
    )
    model = embeddings(new_model(Config(data="-", dim=100), graph))
    run = RunFolder(tmp_path)
    run.export_embeddings(model, graph)
    assert grown(lambda: run.export_embeddings(model, graph, tsv=True)) < 25
    with (tmp_path / "entities.tsv").open() as lines:
        assert sum(1 for _ in lines) == 15_000


def test_the_umask_says_who_may_read(tmp_path):
    path = tmp_path / "x.safetensors"
    before = os.umask(0o027)
    try:
        checkpoint.save(path, {"x": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_failed_write_keeps_the_previous_one(tmp_path, size):
    """A limit on file sizes makes the system refuse the write, as a full disk does."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, {"x": torch.ones(10)}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(RunError, match=r"last\.safetensors could not be written.*is intact"):
            checkpoint.save(path, {"x": torch.ones(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, state = checkpoint.load(path)
    assert state == {"step": 1}
    assert torch.equal(tensors["x"], torch.ones(10))
    assert list(tmp_path.iterdir()) == [path]  # no litter


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("previous")

    def full(file: Path) -> None:
        file.write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left on device; the previous one is intact"):
        checkpoint.write_atomically(path, full)
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from the file was run')",))


@pytest.mark.parametrize("content", [pickle.dumps(Exploit()), b"", b"\xff" * 64])
def test_other_files_are_refused_and_run_no_code(tmp_path, content):
    path = tmp_path / "last.safetensors"
    path.write_bytes(content)
    for mapped in (False, True):
        with pytest.raises(RunError, match="cannot be read as a checkpoint"):
            checkpoint.load(path, mapped=mapped)


def test_safetensors_of_another_program(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    for mapped in (False, True):
        with pytest.raises(RunError, match="cannot be read as a checkpoint"):
            checkpoint.load(tmp_path / "other.safetensors", mapped=mapped)


def test_missing_file(tmp_path):
    with pytest.raises(RunError, match="No such file"):
        checkpoint.load(tmp_path / "last.safetensors")


WRITE_FOREVER = """
import sys, itertools, pathlib, torch
from emu_kernels.trainer import checkpoint
from tests.trainer.support import embeddings
for step in itertools.count(1):
    checkpoint.save(pathlib.Path(sys.argv[1]), {"x": torch.full((300_000,), step)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.safetensors"
    command = [sys.executable, "-c", WRITE_FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        for _ in range(20):  # a reader finds a whole file between any two writes
            for mapped in (False, True):
                tensors, state = checkpoint.load(path, mapped=mapped)
                assert (tensors["x"] == state["step"]).all()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    tensors, state = checkpoint.load(path)
    assert state["step"] > 1
    assert (tensors["x"] == state["step"]).all()


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_checkpoint_may_be_read_by_whom_other_files_may(tmp_path):
    checkpoint.save(tmp_path / "saved", {"x": torch.zeros(2)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "other").stat().st_mode
