"""A changed deployment: which replicas come and go, in which order, and what is known if that ends half-way."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.local import local_settings
from cluster.on_ray.changing import Changer
from cluster.on_ray.desired import DesiredState, load, save
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.plan import Plan, ReplicaPlan
from cluster.planning.planner import make_plan, plan_changed, plan_more

TARGET = Path(__file__).parents[2] / "models" / "demo-target"
INVENTORY = inventory_of(machine_facts())


class ControllerLostError(Exception):
    pass


@dataclass
class Cluster:
    """Notes what is started and ended; each step is saved as a controller saves it."""

    desired: DesiredState
    steps: list[str] = field(default_factory=list)
    failing: int | None = None  # the step that raises StartError
    lost_before: int | None = None  # the step before which the controller is lost

    def changer(self) -> Changer:
        return Changer(
            desired=lambda: self.desired,
            add=self.add,
            remove=self.remove,
            plan_more=lambda plan, settings, number: plan_more(plan, settings, INVENTORY, number),
            plan_changed=lambda plan, settings: plan_changed(plan, settings, INVENTORY),
        )

    def add(self, settings: Settings, replicas: Sequence[ReplicaPlan]) -> None:
        for replica in replicas:
            self._step(f"+{replica.number} with {settings.scheduler.max_num_seqs}")
        others = {each.number: settings for each in replicas if settings != self.desired.settings}
        self._save(self.desired.with_replicas((*self.desired.plan.replicas, *replicas), others))

    def remove(self, replica: ReplicaPlan, _: float) -> None:
        self._step(f"-{replica.number}")
        self._save(self.desired.with_replicas(each for each in self.desired.plan.replicas if each != replica))

    def _step(self, step: str) -> None:
        if len(self.steps) == self.lost_before:
            raise ControllerLostError
        self.steps.append(step)
        if len(self.steps) - 1 == self.failing:
            raise StartError("no")

    def _save(self, desired: DesiredState) -> None:
        save(desired)
        self.desired = desired

    def next_controller(self) -> "Cluster":
        desired = load(self.desired.path)
        assert desired is not None
        return Cluster(desired)


def cluster(folder: Path, num_replicas: int) -> Cluster:
    settings = with_seqs(local_settings(TARGET, num_replicas=num_replicas), 4)
    plan: Plan = make_plan(settings, INVENTORY)
    desired = DesiredState(settings=settings, plan=plan, log_dir=folder / "logs", timeout_s=5.0)
    save(desired)
    return Cluster(desired)


def with_seqs(settings: Settings, number: int) -> Settings:
    return replace(settings, scheduler=replace(settings.scheduler, max_num_seqs=number))


def changed(settings: Settings, *, in_place: bool = False) -> Settings:
    return replace(with_seqs(settings, 5), rollout="in_place" if in_place else "surge")


def test_a_surge_starts_each_new_replica_before_an_old_one_ends(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 2)
    seen.changer().roll(changed(seen.desired.settings), 2)
    assert seen.steps == ["+2 with 5", "-0", "+0 with 5", "-1"]
    assert [replica.number for replica in seen.desired.plan.replicas] == [2, 0], "as gateways count them"


def test_in_place_ends_the_old_replica_first_and_brings_it_back_if_the_new_one_fails(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 2)
    seen.changer().roll(changed(seen.desired.settings, in_place=True), 2)
    assert seen.steps == ["-0", "+0 with 5", "-1", "+1 with 5"]

    seen = cluster(tmp_path, 2)
    seen.failing = 3
    with pytest.raises(StartError):
        seen.changer().roll(changed(seen.desired.settings, in_place=True), 2)
    assert seen.steps[3:] == ["+1 with 5", "+1 with 4"]
    assert "of 2 replicas, 0 has it; run echelon apply" in seen.desired.unfinished


def test_in_place_a_second_replica_comes_before_the_only_one_goes(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 1)
    seen.changer().roll(replace(changed(seen.desired.settings, in_place=True), num_replicas=2), 2)
    assert seen.steps == ["+1 with 5", "-0", "+0 with 5"]


def test_of_replicas_that_are_too_many_none_is_changed(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 3)
    seen.changer().roll(changed(seen.desired.settings), 1)
    assert seen.steps == ["-0", "-1", "+0 with 5", "-2"]


def test_a_change_of_other_keys_replaces_nothing(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 2)
    seen.changer().roll(replace(seen.desired.settings, drain_timeout_s=1.0), 2)
    assert seen.steps == []


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("lost_before", range(4))
def test_the_next_controller_knows_what_each_replica_has_and_goes_on_where_the_lost_one_was(
    tmp_path: Path, lost_before: int, in_place: bool
) -> None:
    seen = cluster(tmp_path, 2)
    before = seen.desired.settings
    after = changed(before, in_place=in_place)
    seen.lost_before = lost_before
    with pytest.raises(ControllerLostError):
        seen.changer().roll(after, 2)

    successor = seen.next_controller()
    running: dict[int, Settings] = {0: before, 1: before}
    for step in seen.steps:
        number = int(step[1])
        if step[0] == "+":
            running[number] = after
        else:
            del running[number]
    known = {each.number: successor.desired.settings_of(each.number) for each in successor.desired.plan.replicas}
    assert known == running
    assert bool(successor.desired.unfinished) == bool(seen.steps)

    successor.changer().roll(after, 2)
    assert all(successor.desired.settings_of(each.number) == after for each in successor.desired.plan.replicas)
    successor.desired = replace(successor.desired, settings=after, others={})
    successor.changer().resize(2)
    assert sum(step.endswith("with 5") for step in seen.steps + successor.steps) == 2, "none is changed twice"


def test_going_back_replaces_what_was_changed_alone(tmp_path: Path) -> None:
    seen = cluster(tmp_path, 2)
    before = seen.desired.settings
    seen.lost_before = 2
    with pytest.raises(ControllerLostError):
        seen.changer().roll(changed(before), 2)
    successor = seen.next_controller()
    successor.changer().roll(before, 2)
    assert successor.steps == ["+0 with 4", "-2"]
    assert successor.desired.unfinished == ""
