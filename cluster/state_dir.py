"""What this machine remembers of its deployments: a folder each, below $ECHELON_STATE_DIR.

<name>/record.json       where it runs; readable by its owner only, since it may hold the token of a private Ray
<name>/deployment.yaml   the desired state, as given
<name>/logs/             standard error of each process that runs on this machine
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import DeploymentNotFoundError, StartError
from cluster.private_ray import PrivateRay
from cluster.processes.status import DeploymentStatus, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Where a deployment runs. Written before anything starts, removed when everything is gone."""

    name: str
    ray_address: str = ""  # empty: not connected yet
    private_ray: PrivateRay | None = None

    @property
    def token(self) -> str:
        """What its Ray asks of those who connect; empty where Ray's own configuration says."""
        return "" if self.private_ray is None else self.private_ray.token

    def complete(self, status: DeploymentStatus) -> DeploymentStatus:
        """A controller's answer with what only this machine knows."""
        return replace(status, ray_address=self.ray_address, private_ray=self.private_ray is not None)

    def lost(self, reason: str) -> DeploymentStatus:
        return self.complete(DeploymentStatus(name=self.name, state=State.FAILED, reason=reason))


def state_root() -> Path:
    given = os.environ.get("ECHELON_STATE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".local" / "state" / "echelon"


def folder_of(name: str) -> Path:
    return state_root() / name


def claim(name: str, deployment_file: Path) -> Record:
    """Take the name; logs of an earlier deployment of that name go.

    Raises StartError where the name is taken or the folder cannot be written; the name is free then.
    """
    folder = folder_of(name)
    record = Record(name=name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "record.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as err:
        raise StartError(
            f"deployment {name!r} exists; look at: echelon status {name}, end it: echelon down {name}"
        ) from err
    except OSError as err:
        raise StartError(f"{folder} cannot be written: {err}; set ECHELON_STATE_DIR to a folder that can be") from err
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(_to_json(record))
        shutil.rmtree(folder / "logs", ignore_errors=True)
        shutil.copyfile(deployment_file, folder / "deployment.yaml")
    except OSError as err:
        forget(name)
        raise StartError(f"{deployment_file} cannot be copied to {folder}: {err}; give a regular file") from err
    return record


def note_file(name: str, deployment_file: Path) -> None:
    """The desired state has changed to this."""
    shutil.copyfile(deployment_file, folder_of(name) / "deployment.yaml")


def save(record: Record) -> None:
    """Replace the record in one step: a reader sees the old one or the new one."""
    path = folder_of(record.name) / "record.json"
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(_to_json(record))
    temporary.replace(path)


def load(name: str) -> Record:
    """Raises DeploymentNotFoundError, or StartError where the record cannot be read."""
    path = folder_of(name) / "record.json"
    try:
        text = path.read_text()
        # Empty: the process that claimed the name died before it started anything.
        return _from_json(text) if text else Record(name=name)
    except FileNotFoundError as err:
        known = ", ".join(names()) or "none"
        raise DeploymentNotFoundError(f"no deployment {name!r} was started from here; known: {known}") from err
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as err:
        raise StartError(
            f"{path} is damaged: {err}; end what may still run of it (echelon, ray), then remove the file"
        ) from err


def forget(name: str) -> None:
    """The deployment is gone; its logs stay until the next one of that name."""
    (folder_of(name) / "record.json").unlink(missing_ok=True)
    (folder_of(name) / "deployment.yaml").unlink(missing_ok=True)


def names() -> list[str]:
    return sorted(path.parent.name for path in state_root().glob("*/record.json"))


def _from_json(text: str) -> Record:
    fields = json.loads(text)
    private = fields.pop("private_ray")
    return Record(**fields, private_ray=None if private is None else PrivateRay(**private))


def _to_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))
