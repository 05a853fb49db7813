"""The deployment file: its keys, their defaults and their limits.

Every key of the file is here, also those whose feature is not built yet: these are refused with a message when they
are set, never ignored. Unknown keys are errors that name the nearest known one (`cluster.deployment.deployment_file`).
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from cluster.deployment.settings import DEFAULT_COLLECTIVE_TIMEOUT_S, DEFAULT_STARTUP_TIMEOUT_S, Method, Pipeline
from cluster.layer_parallel import Mlps, Weights

_SIZE_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def parse_size(value: Any) -> Any:
    """Bytes from an integer or text such as "512MiB", "64GiB" or "2GB" (decimal); anything else is refused."""
    if not isinstance(value, str):
        return value  # pydantic checks that it is an integer
    match = _SIZE_PATTERN.match(value)
    if match is None:
        raise ValueError("is no size; write bytes, or a number with a unit, like 512MiB or 64GiB")
    number, unit = match.groups(default="")
    base = 1024 if unit.lower().endswith("i") else 1000
    return int(float(number) * base ** _PREFIXES[unit.lower().removesuffix("i")])


def _check_path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("is no path; give a folder")
    return value


def _refuse(value: Any) -> Any:
    if value is not None:
        raise ValueError("is not built yet; leave the key out")
    return value


def _built(*, use: str, later: tuple[str, ...]) -> BeforeValidator:
    """Refuse values that the schema knows and this version cannot do yet."""

    def check(value: Any) -> Any:
        if value in later:
            raise ValueError(f"is not built yet; use {use}")
        return value

    return BeforeValidator(check)


def _one_only(what: str) -> AfterValidator:
    def check(value: int) -> int:
        if value > 1:
            raise ValueError(f"{what} is not built yet; use 1")
        return value

    return AfterValidator(check)


def _count_or(word: str, *, most: int, off: bool = False) -> BeforeValidator:
    """An integer from 1 to `most`, `word`, or, if allowed, off (which YAML reads as false)."""

    def check(value: Any) -> Any:
        if off and (value is False or value == "off"):
            return "off"
        if value != word and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise ValueError(f"must be {word}{', off' if off else ''} or an integer from 1 to {most}")
        return value

    return BeforeValidator(check)


Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=1)]
NotBuilt = Annotated[Any, AfterValidator(_refuse), Field(description="not built yet")]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what every message and operating system can carry
Seconds = Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]
Dtype = Literal["bfloat16", "float16", "float32"]


class Section(BaseModel):
    """What all sections have in common: unknown keys are errors, "8" is no integer, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Replicas(Section):
    min: Annotated[Positive, _one_only("more than one replica")] = 1
    max: Annotated[Positive, _one_only("more than one replica")] = 1
    target_ongoing_requests: NotBuilt = None


class Target(Section):
    model: str = Field(description="folder in Hugging Face layout (relative to this file), or a hub id in the cache")
    tensor_parallel_size: Positive = 1
    dtype: Dtype | None = Field(default=None, description="default: the checkpoint's own")


class Draft(Section):
    model: str = Field(description="folder in Hugging Face layout (relative to this file), or a hub id in the cache")
    tensor_parallel_size: Positive = 1
    layer_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="layers whose attention runs at once, each on a device of its own"
    )
    layer_groups: list[list[Annotated[int, Field(ge=0)]]] | Literal["auto"] = Field(
        default="auto", description="which layers: all, in order, like [[0], [1, 2], [3]]; auto: alike ones"
    )
    layer_parallel_weights: Weights = Field(
        default="replicated", description="sharded: a device holds the attention of its own layers only"
    )
    layer_parallel_mlp: Mlps = Field(default="auto", description="auto: what is measured to be faster at start")
    dtype: Dtype | None = Field(default=None, description="default: the checkpoint's own")
    placement: Literal["separate", "colocated"] = Field(
        default="separate", description="separate: on devices that the target does not use"
    )


class Speculation(Section):
    method: Method | None = Field(default=None, description="default: draft_model if a draft is given, else none")
    num_speculative_tokens: Annotated[int | Literal["auto"], _count_or("auto", most=16)] = Field(
        default="auto", description="auto: chosen for each seq and round; or a fixed number, 1 to 16"
    )
    pipeline: Pipeline | None = Field(default=None, description="serial: the target waits while the draft drafts")
    window: Annotated[int | Literal["auto"], _count_or("auto", most=64)] = Field(
        default="auto", description="continuous: drafts ahead of the last commit, 1 to 64"
    )
    verdict_cache: Annotated[int | Literal["auto", "off"], _count_or("auto", most=16, off=True)] = Field(
        default="auto", description="continuous: branches of a seq drafted for the likeliest verdicts, 1 to 16"
    )


class Disk(Section):
    path: Annotated[str, AfterValidator(_check_path)] = Field(
        description="a folder on each node (relative to this file)"
    )
    bytes: Size = Field(description="that the folder may take on one node")
    write: Literal["reused", "all"] = Field(
        default="reused", description="reused: blocks that were used again, or that host memory evicts"
    )
    read_only: bool = Field(default=False, description="read what another deployment writes")


class KvCache(Section):
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1, description="cuda only")] = 0.9
    device_bytes: Size | None = Field(default=None, description="cpu only: KV cache of one device; default 1GiB")
    cpu_bytes: Size | None = Field(
        default=None, description="host memory of one node for blocks that leave its devices; default: none"
    )
    disk: Disk | None = Field(default=None, description="where blocks go that host memory has no room for")
    load_timeout_s: Seconds = Field(
        default=2.0, description="for which a sequence waits for blocks from host memory or disk"
    )


class Scheduler(Section):
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 256
    max_num_batched_tokens: Positive = 8192
    max_model_len: Positive | None = Field(
        default=None, description="default: the target's own limit, at most 32768 and at most what device_bytes holds"
    )
    max_queue: Positive = 1024
    enable_prefix_caching: bool = True


class Cpu(Section):
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = 1
    compile: Literal["auto", "off"] = Field(
        default="auto", description="C++ kernels for the CPU, if there is a compiler"
    )


class Server(Section):
    insecure: bool = Field(default=False, description="listen beyond loopback without TLS and tokens")
    host: str = "127.0.0.1"  # after `insecure`, which its check needs
    grpc_port: Port = 50051
    http_port: Port | None = Field(default=None, description="where /metrics is served; default: nowhere")
    tls: NotBuilt = None
    auth: NotBuilt = None

    @field_validator("host")
    @classmethod
    def _loopback_unless_insisted(cls, host: str, info: ValidationInfo) -> str:
        if host not in _LOOPBACK_HOSTS and not info.data.get("insecure"):
            raise ValueError(
                "is reachable by others and TLS and tokens are not built yet; "
                "use 127.0.0.1, or set server.insecure: true to insist"
            )
        return host

    @field_validator("http_port")
    @classmethod
    def _is_another_port(cls, port: int | None, info: ValidationInfo) -> int | None:
        if port is not None and port == info.data.get("grpc_port"):
            raise ValueError("is server.grpc_port too; choose another")
        return port


class DeploymentFile(Section):
    """Everything that a deployment file may say."""

    apiVersion: Literal["echelon/v1"]
    kind: Literal["Deployment"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="as Kubernetes names")]
    replicas: Replicas = Replicas()
    target: Target
    draft: Draft | None = None
    speculation: Speculation = Speculation()
    kv_cache: KvCache = KvCache()
    scheduler: Scheduler = Scheduler()
    attention: Annotated[Literal["full"], _built(use="full", later=("budgeted",))] = "full"
    batch_invariant: bool = False
    device: Literal["cpu", "cuda"] = "cuda"
    cpu: Cpu = Cpu()
    server: Server = Server()
    startup_timeout_s: Seconds = DEFAULT_STARTUP_TIMEOUT_S
    collective_timeout_s: Seconds = DEFAULT_COLLECTIVE_TIMEOUT_S


def json_schema() -> dict[str, Any]:
    """JSON Schema of the deployment file, for editors."""
    return DeploymentFile.model_json_schema()
