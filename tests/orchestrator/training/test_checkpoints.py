"""Test that a checkpoint counts only if it is committed and complete."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from orchestrator import storage
from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint, UnusableCheckpoints, prune_checkpoints, save_checkpoint
from tests.orchestrator.training.runs import newest_checkpoint


def checkpoint(position: int) -> Checkpoint:
    return Checkpoint(position, {"model.weight": torch.full((2, 3), float(position))}, {"bad_steps": 1})


@pytest.mark.parametrize("damage", ["nothing", "truncated", "flipped", "missing", "uncommitted"])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path, damage: str) -> None:
    assert newest_checkpoint(str(tmp_path)) is None
    save_checkpoint(str(tmp_path), checkpoint(64))
    commit = Path(save_checkpoint(str(tmp_path), checkpoint(128)))
    (state,) = commit.parent.glob("state-*.safetensors")
    data = state.read_bytes()
    if damage == "truncated":
        state.write_bytes(data[:-1])
    elif damage == "flipped":
        state.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        state.unlink()
    elif damage == "uncommitted":
        commit.unlink()
    newest, position = newest_checkpoint(str(tmp_path)), 128 if damage == "nothing" else 64
    assert newest is not None and newest.position == position and newest.facts == {"bad_steps": 1}
    assert torch.equal(newest.tensors["model.weight"], torch.full((2, 3), float(position)))


@pytest.mark.parametrize("damage", ["truncated", "newer"])
def test_only_unusable_checkpoints_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 2 if damage == "newer" else 1)
    for position in (64, 128):
        save_checkpoint(str(tmp_path), checkpoint(position))
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 1)
    if damage == "truncated":
        for path in tmp_path.rglob("state-*"):
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusableCheckpoints, match=r"images-000000000128.*images-000000000064.*--restart-from-scratch"):
        newest_checkpoint(str(tmp_path))


def test_checkpoints_that_cannot_be_listed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(save_checkpoint(str(tmp_path), checkpoint(64))).parent)
    real = LocalFileSystem.ls

    def ls(self: LocalFileSystem, path: str, *arguments: object, **options: object) -> list:
        if path.rstrip("/") == folder:
            raise PermissionError(path)
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(PermissionError):
        newest_checkpoint(str(tmp_path))


def test_a_late_writer_of_an_earlier_attempt_changes_nothing(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_checkpoint(run, checkpoint(64))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    save_checkpoint(run, checkpoint(64))
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_checkpoint(run, checkpoint(64))
    damaged = Path(save_checkpoint(run, checkpoint(128), attempt="zzz"))  # readers try this attempt first
    (damaged.parent / "state-zzz-000.safetensors").unlink()
    save_checkpoint(run, checkpoint(128), attempt="aaa")
    newest = newest_checkpoint(run)
    assert newest is not None and newest.position == 128


def test_large_states_lie_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.training.checkpoints.FILE_BYTES", 100)
    tensors = {
        "a": torch.arange(30.0), "b": torch.tensor(1.5), "c": torch.zeros(2, 3, dtype=torch.float64),
        "d": torch.arange(5), "e": torch.ones(3, 2, dtype=torch.bfloat16), "f": torch.zeros(0),
    }  # fmt: skip
    folder = Path(save_checkpoint(str(tmp_path), Checkpoint(7, tensors, {}))).parent
    assert len(list(folder.glob("state-*.safetensors"))) == 3
    for path in folder.glob("state-*.safetensors"):
        safetensors.torch.load_file(path)  # the library itself can read the streamed file
    newest = newest_checkpoint(str(tmp_path))
    assert newest is not None and newest.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert newest.tensors[name].dtype == tensor.dtype and torch.equal(newest.tensors[name], tensor)


def test_pruning_keeps_the_newest_and_every_interval_and_removes_incomplete_uploads(tmp_path: Path) -> None:
    run = str(tmp_path)
    for position in (64, 128, 192, 256, 320):
        save_checkpoint(run, checkpoint(position), attempt="old")
        prune_checkpoints(run, position, keep=1, keep_every=100)  # the first ones past 100, 200 and 300 images stay
    for position in (256, 300):  # uploads that a kill interrupted
        (tmp_path / f"checkpoints/images-{position:012d}").mkdir(exist_ok=True)
        (tmp_path / f"checkpoints/images-{position:012d}/state-dead-000.safetensors").write_bytes(b"half")
    save_checkpoint(run, checkpoint(384), attempt="new")
    foreign = tmp_path / "checkpoints" / "README.txt"
    foreign.write_bytes(b"not ours")
    prune_checkpoints(run, newest=320, keep=1, keep_every=100)
    remaining = sorted(str(path.relative_to(tmp_path / "checkpoints")) for path in tmp_path.rglob("*.*"))
    expected = [
        f"images-{position:012d}/{name}"
        for position, attempt in ((128, "old"), (256, "old"), (320, "old"), (384, "new"))
        for name in (f"commit-{attempt}.json", f"state-{attempt}-000.safetensors")
    ]
    assert remaining == ["README.txt", *expected]
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert folders == {name.split("/")[0] for name in expected}, "empty folders are removed too"
    newest = newest_checkpoint(run)
    assert newest is not None and newest.position == 384


def test_pruning_removes_only_literal_names_of_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(storage, "delete", deleted.append)
    run, foreign = str(tmp_path / "lr[12]"), "images-000000000064/notes-of-mine.txt"
    for position in (64, 128):
        save_checkpoint(run, checkpoint(position), attempt="a")
    (tmp_path / "lr[12]/checkpoints" / foreign).write_bytes(b"not ours")
    prune_checkpoints(run, newest=128, keep=1)
    folder = f"{run}/checkpoints/images-000000000064"
    assert deleted == [f"{folder}/commit-a.json", f"{folder}/state-a-000.safetensors"]
