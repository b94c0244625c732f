"""Run folders: where a local run keeps its files, and how another command finds a run that is going on.

Layout: shell.pid, shell.log, face.sock (LocalFace), objects/<Kind>/*.yaml (ObjectStore), p/<pod>/log, and t<n>/, which
is a pod's /tmp.
"""

import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "mr-"
PID_FILE, LOG_FILE, FACE_SOCKET, KEEP_FILE = "shell.pid", "shell.log", "face.sock", "keep"


def temp_folder() -> Path:
    """Where run folders lie: the machine's temp folder, unless its name is long.

    A socket's path has 107 bytes (AF_UNIX), of which /mr-12345678/t10/moe-<12 hex>, Ray's session of 42 and its
    /sockets/plasma_store take 98.
    """
    usual = tempfile.gettempdir()
    return Path(usual if len(usual) <= 9 else "/tmp")


def make_run_folder() -> Path:
    """A new private folder that names this process as its shell."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temp_folder()))
    (folder / PID_FILE).write_text(str(os.getpid()))
    return folder


def living_runs() -> list[Path]:
    """Folders of the runs of this user that go on now, newest first."""
    return sorted(filter(is_living, _run_folders()), key=lambda path: path.stat().st_mtime, reverse=True)


def remove_dead_runs() -> None:
    """Remove what shells left that were killed before they could, but what a person asked to keep."""
    for folder in _run_folders():
        if not is_living(folder) and not (folder / KEEP_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def is_living(folder: Path) -> bool:
    """Whether the shell of this folder still runs. A folder without a pid is being made or removed: then it does."""
    try:
        pid = int((folder / PID_FILE).read_text())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError):
        return folder.exists()
    except (ProcessLookupError, PermissionError):  # nobody, or by now a process of somebody else
        return False
    return True


def _run_folders() -> list[Path]:
    folders = temp_folder().glob(f"{PREFIX}*")
    return [folder for folder in folders if folder.is_dir() and folder.stat().st_uid == os.getuid()]
