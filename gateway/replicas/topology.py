"""What runs where, as the parent of this gateway says."""

from collections.abc import Iterable

from echelon.pb.process_pb2 import GatewaySpec, PlacedProcess, SchedulerUpdate, ServedModel


class Topology:
    """The processes of the deployment and its models."""

    def __init__(self, spec: GatewaySpec) -> None:
        self.models: tuple[ServedModel, ...] = tuple(spec.models)
        self._processes = list(spec.processes)

    @property
    def processes(self) -> Iterable[PlacedProcess]:
        return self._processes

    def on_update(self, update: SchedulerUpdate) -> None:
        """A replica that has come brings its processes; one that has gone takes them along."""
        if update.processes or update.removed:
            others = (each for each in self._processes if each.role == "gateway" or each.replica != update.replica)
            self._processes = [*others, *update.processes]
        if update.model.models:
            self.models = tuple(update.model.models)
