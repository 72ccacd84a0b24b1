"""All kinds of storage behave the same: complete or absent objects, create-only writes, listings, bounded retries."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator import storage


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an empty folder on each kind of storage."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket")) + "/run"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return str(tmp_path / "run") if request.param == "local" else f"file://{tmp_path}/run"


def test_objects_are_written_read_listed_and_deleted(root: str) -> None:
    names = ["a.json", "deep/er/c.bin", "deep/b.bin"]
    assert storage.list_names(root) == [] and storage.list_names(root, recursive=True) == []
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.list_names(root) == ["a.json", "deep/"]
    assert storage.list_names(root, recursive=True) == sorted(names)
    assert storage.list_names(storage.join(root, "deep")) == ["b.bin", "er/"]
    assert storage.read_bytes(storage.join(root, "deep", "b.bin")) == b"deep/b.bin"
    storage.write_bytes(storage.join(root, "a.json"), b"again")
    assert storage.read_bytes(storage.join(root, "a.json")) == b"again"
    storage.delete(storage.join(root, "a.json"))
    storage.delete(storage.join(root, "a.json"))
    assert not storage.exists(storage.join(root, "a.json")) and storage.exists(storage.join(root, "deep/b.bin"))
    storage.delete(storage.join(root, "deep") + "/")
    storage.delete(storage.join(root, "deep") + "/")
    assert storage.list_names(root, recursive=True) == []


SPECIAL_NAMES = ("lr[12]", "lr*", "lr?", "[a-z]", "a#b", "a b%20", "x::y", "{a,b}")


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_names_are_literal(name: str, root: str) -> None:
    if root.startswith("memory://") and "::" in name:
        pytest.skip("fsspec uses :: to chain filesystems")
    other_names = ["lr1", "lr2", "a", "ab", "xy", "{a"]
    for run in (name, *other_names):
        storage.write_bytes(storage.join(root, run, "deep/x"), run.encode())
    uri = storage.join(root, name)
    assert storage.read_bytes(f"{uri}/deep/x") == name.encode() and storage.exists(uri)
    assert storage.list_names(uri) == ["deep/"] and storage.list_names(uri, recursive=True) == ["deep/x"]
    assert [path for files in storage.list_tree(uri) for path, _ in files] == ["deep/x"]
    assert storage.size_of(f"{uri}/deep/x") == len(name) and storage.open_input(f"{uri}/deep/x").read() == name.encode()
    assert not storage.put_if_absent(f"{uri}/deep/x", b"") and storage.put_if_absent(f"{uri}/deep/y", b"")
    with storage.open_output(f"{uri}/deep/z") as file:
        file.write(b"z")
    storage.delete(f"{uri}/deep/z")
    assert storage.list_names(f"{uri}/deep") == ["x", "y"]
    storage.delete(uri + "/")
    assert not storage.exists(uri)
    remaining = [run for run in other_names if storage.exists(storage.join(root, run, "deep/x"))]
    assert remaining == other_names, "other runs lost objects"


def test_a_listing_contains_objects_written_after_an_earlier_listing(root: str) -> None:
    for count in range(1, 4):
        storage.write_bytes(storage.join(root, f"{count}.bin"), b"x")
        assert len(storage.list_names(root)) == count


def test_put_if_absent_never_replaces_an_object(root: str) -> None:
    uri = storage.join(root, "deep", "commit.json")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert not storage.put_if_absent(uri, b"first"), "equal bytes of another writer do not count as written"
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_names(storage.join(root, "deep")) == ["commit.json"]


@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)
def test_one_of_many_creators_wins(root: str) -> None:
    uri = storage.join(root, "commit")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.put_if_absent(uri, bytes([i])), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == bytes([won.index(True)])


@pytest.mark.parametrize("root", ["local", "file", "s3"], indirect=True)  # fsspec's memory:// commits at once
def test_streamed_output_is_complete_or_absent(root: str) -> None:
    uri = storage.join(root, "shard.bin")
    data = bytes(range(256)) * (1 << 17)  # 32 MiB: more than one part
    with pytest.raises(RuntimeError, match="half way"), storage.open_output(uri) as file:
        file.write(data)
        raise RuntimeError("half way")
    assert not storage.exists(uri) and storage.list_names(root, recursive=True) == []
    with storage.open_output(uri) as file:
        for start in range(0, len(data), 3 << 20):
            file.write(data[start : start + (3 << 20)])
    assert storage.read_bytes(uri) == data
    with storage.open_output(uri) as file:
        file.write(b"small")
    assert storage.read_bytes(uri) == b"small"


def test_input_is_seekable(root: str) -> None:
    data = bytes(range(256)) * 10_000
    storage.write_bytes(storage.join(root, "x"), data)
    with storage.open_input(storage.join(root, "x")) as file:
        assert file.seek(-4, 2) == len(data) - 4 and file.read() == data[-4:]
        assert file.seek(100) == 100 and file.read(6) == data[100:106] and file.tell() == 106
        assert file.seek(0) == 0 and file.read() == data and file.read() == b""


def test_trees_are_listed_with_their_sizes(root: str) -> None:
    sizes = {"a.bin": 0, **{f"deep/{i}/{j}.bin": 10 * i + j for i in range(5) for j in range(3)}, "deep/x/y/z": 7}
    for name, size in sizes.items():
        storage.write_bytes(storage.join(root, name), bytes(size))
    assert dict(entry for folder in storage.list_tree(root) for entry in folder) == sizes
    assert storage.size_of(storage.join(root, "deep/4/2.bin")) == 42 and storage.size_of(root) is None
    with pytest.raises(FileNotFoundError, match="none"):
        storage.size_of(storage.join(root, "none"))


def test_many_ranges_are_read_in_their_order(root: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    for name in ("a", "deep/b"):
        storage.write_bytes(storage.join(root, name), data)
    rng = np.random.default_rng(1)
    ranges = [
        storage.Range(["a", "deep/b"][rng.integers(2)], int(start), int(rng.integers(3)) * 5_000)
        for start in rng.integers(0, len(data) - 10_000, 60)
    ]
    ranges += [ranges[3], storage.Range("a", 0, len(data)), storage.Range("a", len(data) - 1, 1)]
    assert storage.read_ranges(root, ranges) == [data[r.start : r.start + r.size] for r in ranges]
    assert storage.read_ranges(root, []) == []
    with pytest.raises(ValueError, match=r"deep/b ends at byte 3145728; expected 20 bytes at 3145720"):
        storage.read_ranges(root, [*ranges, storage.Range("deep/b", len(data) - 8, 20)])
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read_ranges(root, [*ranges, storage.Range("none", 0, 1)])


def test_missing_objects_are_named_at_once(root: str) -> None:
    uri = storage.join(root, "nothing.bin")
    start = time.monotonic()
    for read in (storage.read_bytes, storage.open_input, storage.read_json):
        with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
            read(uri)
    assert not storage.exists(uri)
    assert time.monotonic() - start < 10, "not retried"


def test_json_is_written_and_read_and_errors_name_the_object(root: str) -> None:
    uri = storage.join(root, "x.json")
    storage.write_json(uri, {"a": [1, 2.5, None], "ü": "ok"})
    assert storage.read_json(uri) == {"a": [1, 2.5, None], "ü": "ok"}
    storage.write_bytes(uri, b"{broken")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        storage.read_json(uri)
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(uri, float("nan"))


def test_names_are_joined_and_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.join("s3://bucket/run/", "a", "b/") == "s3://bucket/run/a/b"
    with pytest.raises(ValueError, match="expected a relative name"):
        storage.join("s3://bucket", "/etc")
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("runs/x") == str(tmp_path / "runs/x")
    assert storage.is_absolute("s3://bucket/x") and storage.is_absolute("/x") and not storage.is_absolute("x")
    assert storage.resolve("s3://bucket/x/") == "s3://bucket/x"
    with pytest.raises(ValueError, match="nosuch://x"):
        storage.read_bytes("nosuch://x")
