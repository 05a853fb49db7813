"""The outcome of a deployment: the plan's answer, and whether its processes can then load what they are told."""

import re
import traceback
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from checkpoint.token_table import TokenTable
from checkpoint.tokenizer import load_tokenizer
from childproc.spec import SpecError
from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.settings import Settings
from cluster.errors import ConfigError, PlanError
from cluster.planning.plan import Inventory, Node, Plan
from cluster.planning.planner import make_plan
from cluster.processes.specs import gateway_spec, scheduler_spec, worker_specs
from echelon.pb.inference_pb2 import ModelInfo
from echelon.pb.process_pb2 import GroupEndpoint, WorkerSpec
from gateway.requests.sampling import load_sampling_defaults
from gateway.requests.tokenization import PromptTokenizer
from scheduler.config import SchedulerConfig
from workers.collectives import Group, SoloGroup
from workers.process.cohort import Cohort
from workers.process.draft_layout import num_ranks
from workers.process.load import load_engines

MACHINE = Inventory(
    nodes=(
        Node(node_id="n", address="127.0.0.1", num_cpus=8, num_gpus=0, cores=tuple(range(8)), memory_bytes=1 << 30),
    ),
    head_node_id="n",
)
_MODELS = ("target.model", "draft.model")
# A problem names a file, or what is wrong with the path itself.
_WHERE = re.compile(r"\.(json|jinja|safetensors)\b|folder|path|opened|user|circle|must be|is missing|its tokeniser")
_MOST_CHARS = 1500  # the longest problem that a person would read


class Kind(StrEnum):
    SERVED = "served"
    REFUSED = "refused"  # the file or a model is wrong: exit code 2
    NO_PLACE = "no place"  # this machine is too small: exit code 1
    FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Kind
    text: str = ""
    settings: Settings | None = None


class _Rank(SoloGroup):
    """One of several ranks that never compute together."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class _Alone(Cohort):
    """A rank that loads alone what it would load among others; `board` takes what they publish."""

    def __init__(self, rank: int, world_size: int, board: dict[str, str]) -> None:
        super().__init__(rank, world_size, None)
        self._board = board

    def publish(self, key: str, value: str) -> None:
        self._board[key] = value

    def read(self, key: str) -> str:
        return self._board[key]

    def gather(self, key: str, value: str) -> list[str]:
        """The values of this rank and of those that were loaded before it."""
        self._board[f"{key}/{self.rank}"] = value
        return [self._board[f"{key}/{rank}"] for rank in range(self.rank + 1)]

    def group(self, size: int, *, ordered_sum: bool) -> Group | None:
        return _Rank(self.rank, size) if self.rank < size else None


def outcome_of(file: Path) -> Outcome:
    """The outcome. FAULT, with the reason, stands for what a user must never see."""
    try:
        settings = load_deployment(file)
        plan = make_plan(settings, MACHINE)
    except ConfigError as err:
        return _judge(err)
    except PlanError as err:
        return Outcome(Kind.NO_PLACE, str(err))
    except Exception:  # noqa: BLE001 (what is looked for)
        return Outcome(Kind.FAULT, "the plan ends with a traceback:\n" + traceback.format_exc())
    try:
        _load(settings, plan)
    except SpecError as err:
        if str(err).startswith("batch_invariant: "):  # no file says what a machine can do
            return Outcome(Kind.NO_PLACE, str(err))
        return Outcome(Kind.FAULT, f"the plan accepts what a process refuses: {err}")
    except Exception:  # noqa: BLE001
        return Outcome(Kind.FAULT, "the plan accepts what a process cannot load:\n" + traceback.format_exc())
    return Outcome(Kind.SERVED, " ".join(plan.notes), settings)


def _judge(error: ConfigError) -> Outcome:
    text = str(error)
    for problem in error.problems:
        line = str(problem)
        if not problem.message or not problem.path:
            return Outcome(Kind.FAULT, f"a problem without key or reason: {text}")
        if problem.path in _MODELS and not problem.remedy:
            return Outcome(Kind.FAULT, f"a problem without remedy: {text}")
        if problem.path in _MODELS and not _WHERE.search(problem.message):
            return Outcome(Kind.FAULT, f"a problem of a model that names no file: {text}")
        if len(line) > _MOST_CHARS:
            return Outcome(Kind.FAULT, f"a message of {len(line)} characters: {text[:_MOST_CHARS]}")
    return Outcome(Kind.REFUSED, text)


def _load(settings: Settings, plan: Plan) -> None:
    """Loads everything that the processes of a deployment read before they are ready."""
    for bundles in (plan.replicas[0].group("target"), plan.replicas[0].group("draft")):
        board: dict[str, str] = {}
        for spec in worker_specs(settings, bundles, 1):
            _load_rank(spec, _Alone(spec.rank, spec.world_size, board))
    nowhere = GroupEndpoint()
    scheduler = scheduler_spec(settings, process=plan.replicas[0].scheduler, target=nowhere, draft=nowhere)
    SchedulerConfig.from_spec(scheduler)
    TokenTable(load_tokenizer(Path(scheduler.tokenizer_dir)))
    gateway = gateway_spec(settings, plan.gateways[0], scheduler_addresses=["127.0.0.1:1"], processes=())
    load_sampling_defaults(Path(gateway.model_dir))
    eos_token_ids = PromptTokenizer(Path(gateway.model_dir)).eos_token_ids(gateway.vocab_size)
    ModelInfo(model=gateway.model_name, max_model_len=gateway.max_model_len, eos_token_ids=eos_token_ids)


def _load_rank(spec: WorkerSpec, cohort: Cohort) -> None:
    engines = load_engines(spec, cohort, lambda stage, done, total: None)
    expected = [each for each in spec.engines if spec.rank < num_ranks(each, spec.world_size)]
    assert len(engines) == len(expected), "a rank has not the engines that it was told of"
