"""Writing files: whole or not at all, on the disk, open to whom the umask lets in."""

import errno
import os
import socket
from pathlib import Path

import pytest
import torch
from kills import killed_at
from safetensors.torch import load_file

from sendvae_fast.errors import UserError
from sendvae_fast.files import (
    remove_unfinished,
    save_tensors,
    staged,
    staged_directory,
    staged_output,
    unfinished_files,
    write_atomic,
)

NEW = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
# Calls that change what a crash leaves; a kill comes before each of them.
DISK_CALLS = ("fsync", "replace", "chmod", "unlink")


def write_bytes(path, *, durable=True):
    with staged(path, durable=durable) as unfinished:
        unfinished.write_bytes(b"new")


WRITERS = {
    "text": lambda path: write_atomic(path, "new"),
    "tensors": lambda path: save_tensors(path, NEW),
    "bytes": write_bytes,
    "not durable": lambda path: write_bytes(path, durable=False),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_new_file_stands_under_the_name_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomic(path, "naïve")
    assert path.read_text(encoding="utf-8") == "naïve"
    save_tensors(path, NEW, {"key": "value"})
    assert all(torch.equal(value, NEW[name]) for name, value in load_file(path).items())
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_permissions_are_those_of_any_new_file(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        write(tmp_path / "file")  # in place of another
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_file_is_flushed_before_it_is_renamed_and_its_name_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path == tmp_path or unfinished_files(tmp_path) == [path]
        calls.append("folder" if path == tmp_path else f"file of {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def recorded_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    for name in ("text", "bytes"):
        WRITERS[name](tmp_path / "file")
        assert calls == ["file of 3 bytes", "replace", "folder"]
        calls.clear()
    save_tensors(tmp_path / "tensors", NEW)
    assert calls == [f"file of {(tmp_path / 'tensors').stat().st_size} bytes", "replace", "folder"]
    calls.clear()
    WRITERS["not durable"](tmp_path / "file")
    assert calls == ["replace"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    for before in ([], ["file"]):
        with pytest.raises(error), staged(path) as unfinished:
            unfinished.write_text("half")
            raise error
        assert names(tmp_path) == before
        path.write_text("old")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (name, call)
        for name in WRITERS
        for call in ("fsync", "replace", "stat")
        if (name, call) != ("not durable", "fsync")
    ],
)
def test_a_failing_disk_is_heard_and_leaves_the_old_file_alone(tmp_path, monkeypatch, name, call):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            WRITERS[name](path)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_at_any_point_leaves_old_or_new_and_what_it_left_goes(tmp_path, name):
    WRITERS[name](tmp_path / "truth")
    new, found, killed, event = (tmp_path / "truth").read_bytes(), set(), True, 0
    while killed:
        event += 1
        folder = tmp_path / str(event)
        folder.mkdir()
        (folder / "file").write_text("old")
        killed = killed_at(event, lambda folder=folder: WRITERS[name](folder / "file"), DISK_CALLS)
        content = (folder / "file").read_bytes()
        assert content in (b"old", new)
        if killed:
            found.add(content)
        left_over = unfinished_files(folder)
        assert names(folder) == sorted(["file", *(path.name for path in left_over)])
        assert len(left_over) == (killed and content == b"old")
        WRITERS[name](folder / "file")
        if name == "not durable":
            remove_unfinished(folder)
        assert (folder / "file").read_bytes() == new and names(folder) == ["file"]
    assert found == ({b"old"} if name == "not durable" else {b"old", new})  # where nothing follows the renaming


def test_what_others_are_writing_stays(tmp_path):
    """A process that is alive, another machine's, and files that only look alike."""
    kept = [
        f".file.tmp-{socket.gethostname()}-{os.getppid()}",
        f".file.tmp-another-{2**22 + 1}",
        f".file2.tmp-{socket.gethostname()}-{2**22 + 1}",  # above Linux's largest process id
        ".file.tmp-mine",
        "file.tmp",
    ]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / f".file.tmp-{socket.gethostname()}-{2**22 + 1}").touch()
    write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == sorted([*kept, "file"])


def test_unfinished_files_are_told_from_others(tmp_path):
    for name in (".000001.png.tmp-host.domain-17", ".tmpa1B2c3", "000001.png", ".tmp", "a.tmp-host-17", ".gitignore"):
        (tmp_path / name).touch()
    (tmp_path / ".tmpfolder").mkdir()
    assert [path.name for path in unfinished_files(tmp_path)] == [".000001.png.tmp-host.domain-17", ".tmpa1B2c3"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".gitignore", ".tmp", ".tmpfolder", "000001.png", "a.tmp-host-17"]


def test_two_processes_may_write_one_file(tmp_path):
    """Each its own unfinished file; the last to end wins."""
    with staged(tmp_path / "file") as ours:
        ours.write_text("ours")
        child = os.fork()
        if child == 0:
            write_atomic(tmp_path / "file", "theirs")
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "file").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours" and names(tmp_path) == ["file"]


def test_output_makes_its_folder_and_says_what_is_wrong_in_one_line(tmp_path):
    with staged_output(tmp_path / "new" / "file") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "new" / "file").read_text() == "new"
    with pytest.raises(UserError, match=r"cannot write .*file/a/b \(Not a directory\); mend that and run"):
        with staged_output(tmp_path / "new" / "file" / "a" / "b"):
            pytest.fail("there is nowhere to write to")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("half")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []
    with staged_directory(tmp_path / "folder") as unfinished:
        save_tensors(unfinished / "file", NEW)
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["file"]
    with pytest.raises(UserError, match="exists already"), staged_directory(tmp_path / "folder"):
        pytest.fail("it would have been overwritten")
