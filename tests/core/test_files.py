"""Folders that one process writes to, and what killed processes leave."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cenote.core import InputError, files


def test_two_do_not_write_to_one_folder(tmp_path: Path) -> None:
    told = rf"out: another comparison is writing to {tmp_path} \(process {os.getpid()} on .*\); wait for it, stop it, or name"
    for _ in range(2):
        with files.alone(tmp_path, "comparison"):
            for _ in range(2):
                with pytest.raises(InputError, match=told), files.alone(tmp_path, "comparison"):
                    pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_told_and_used(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuses)
    with pytest.warns(UserWarning, match="has no locks; let no other comparison"), files.alone(tmp_path, "comparison"):
        files.write_whole(tmp_path / "whole", "text")
    error = OSError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError), files.alone(tmp_path, "comparison"):
        pass


def test_what_was_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "whole", "text")
    (tmp_path / f".whole.x7{files.UNFINISHED}").touch()
    (tmp_path / ".other").touch()
    files.remove_unfinished(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".other", "whole"]


KILLED = """
import os, signal
from cenote.core.files import temporary_folder
with temporary_folder() as folder:
    (folder / "data").write_text("large")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folders_of_killed_processes_are_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    orphan = Path(run.stdout.strip())
    assert (orphan / "data").exists()
    (tmp_path / "cenote-another").mkdir()
    (tmp_path / "cenote-link").symlink_to(orphan)
    with files.temporary_folder() as first, files.temporary_folder() as second:
        assert first.is_dir()
        assert second.is_dir()
        assert not orphan.exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cenote-another", "cenote-link"]
