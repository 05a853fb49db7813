"""Whether a folder can be the disk tier of a KV cache, for the process that plans it and the one that opens it."""

import os
import re
from pathlib import Path

_OURS = re.compile(r"lock|[0-9a-f]{32}")  # what workers/tiers makes there


def folder_problem(folder: Path, *, read_only: bool) -> str:
    """What is wrong with it on this machine and what to do; empty if nothing is, as far as can be seen."""
    try:
        return _problem(folder, read_only)
    except OSError as err:
        return f"{folder} cannot be used ({err.strerror}); give another folder"


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there, if only as a link. Raises OSError."""
    return next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())


def _problem(folder: Path, read_only: bool) -> str:
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        what = "a file" if nearest.exists() else "a link that leads nowhere"
        return f"{nearest} is {what}; give a folder"
    if read_only and nearest != folder:
        return (
            f"{folder} does not exist, and read_only reads what another deployment writes; "
            "start that one first, correct the path, or leave read_only out"
        )
    if not os.access(nearest, (os.R_OK if read_only else os.W_OK) | os.X_OK):
        what = "read" if read_only else "written"
        return f"{nearest} cannot be {what} by this user; give another folder, or change its owner or mode"
    return "" if read_only or nearest != folder else _sharing_problem(folder)


def _sharing_problem(folder: Path) -> str:
    """Its owner alone may read it from now on, which would lock others out of what is theirs."""
    others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if not others or folder.stat().st_mode & 0o077 == 0:
        return ""
    remedy = f"give a folder of its own, like {folder}/kv"
    return f"{folder} holds other files, like {others[0]}, and would become private to this user; {remedy}"
