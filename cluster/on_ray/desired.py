"""What a controller has to keep up, and the file that outlives it."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.planning.plan import Plan, ReplicaPlan
from echelon import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    settings: Settings
    plan: Plan
    log_dir: Path  # on each node
    timeout_s: float  # for the start
    is_drained: bool = False  # by `echelon drain`
    others: dict[int, Settings] = field(default_factory=dict)  # of replicas, by number, that have other settings
    version: str = __version__

    def settings_of(self, replica: int) -> Settings:
        """With which it was started."""
        return self.others.get(replica, self.settings)

    def with_replicas(
        self, replicas: Iterable[ReplicaPlan], others: Mapping[int, Settings] = MappingProxyType({})
    ) -> "DesiredState":
        """`others`: the settings of those that were started with others than the deployment's."""
        plan = replace(self.plan, replicas=tuple(replicas))
        known = {**self.others, **others}
        kept = {each.number: known[each.number] for each in plan.replicas if each.number in known}
        return replace(self, plan=plan, others=kept)

    def with_plan(self, plan: Plan) -> "DesiredState":
        """The same parts in other places."""
        return replace(self, plan=plan)

    def with_settings(self, settings: Settings) -> "DesiredState":
        """All replicas have them now."""
        plan = replace(self.plan, eos=settings.target.folder.eos)
        return replace(self, settings=settings, plan=plan, others={})

    @property
    def unfinished(self) -> str:
        """What is left of a change that failed or lost its controller, and what to do; empty: nothing."""
        number, wanted = len(self.plan.replicas), self.settings.num_replicas
        if self.others:
            names = ", ".join(map(str, sorted(self.others)))
            return f"a change has not ended: of {number} replicas, {names} has it; run echelon apply to go on or back"
        if number < wanted:
            return f"a change has not ended: there are {number} of {wanted} replicas; run echelon apply to go on"
        return ""

    @property
    def path(self) -> Path:
        """Of the file, on the controller's node."""
        return self.log_dir.parent / "desired.json"

    @property
    def authority_path(self) -> Path:
        """Of the deployment's CA, on the controller's node."""
        return self.log_dir.parent / "authority.pem"


def save(desired: DesiredState) -> None:
    """Replace the file in one step; it is on disk when this returns. Raises OSError."""
    data = _adapter().dump_json(desired)
    temporary = desired.path.with_suffix(".new")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(desired.path)
    folder = os.open(desired.path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> DesiredState | None:
    """None: the deployment has never served. Raises StartError for a file that cannot be read."""
    try:
        desired = _adapter().validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as err:
        first = err.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise StartError(f"{path} cannot be read: {what}; run echelon down and up") from err
    except OSError as err:
        raise StartError(f"{path} cannot be read: {err}; run echelon down and up") from err
    if desired.version != __version__:
        raise StartError(f"{path} is of Echelon {desired.version}, this is {__version__}; run echelon down and up")
    return desired


def _adapter() -> TypeAdapter[DesiredState]:
    """Made when needed: that takes some 50 ms."""
    return TypeAdapter(DesiredState)
