"""The deployment file: its keys, their defaults and their limits.

Unknown keys are errors that name the nearest known one (`cluster.deployment.deployment_file`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from checkpoint.quantization import WeightFormat
from childproc.tier_block import TierDtype
from cluster.deployment.field_types import (
    WEEK_S,
    Dtype,
    FilePath,
    OptionalSize,
    Patience,
    Port,
    Positive,
    Seconds,
    Size,
    count_or,
    flag_or_auto,
    path_of,
    yaml_off,
)
from cluster.deployment.settings import (
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_DRAIN_TIMEOUT_S,
    DEFAULT_JOBS_BYTES,
    DEFAULT_MAX_LIVE_SLOWDOWN,
    DEFAULT_RETENTION_S,
    DEFAULT_STARTUP_TIMEOUT_S,
    KvDtype,
    Method,
    Pipeline,
)
from cluster.deployment.stored_weights import StoredWeights
from cluster.layer_parallel import Mlps, Weights

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class Section(BaseModel):
    """What all sections have in common: unknown keys are errors, "8" is not an integer, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Replicas(Section):
    min: Annotated[int, Field(ge=1, le=64, description="copies of both models, each on devices of its own")] = 1
    max: Annotated[int | None, Field(ge=1, le=64)] = Field(
        default=None, description="default: min; for so many, host memory and disk of a node are divided"
    )
    target_ongoing_requests: Annotated[int | None, Field(ge=1)] = Field(
        default=None, description="replicas come and go so that each has so many requests, waiting or running"
    )
    upscale_delay_s: Annotated[float, Field(ge=0, le=86400, description="more are needed for so long first")] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0, le=86400, description="fewer would do for so long first")] = 300.0
    rollout: Annotated[Literal["surge", "in_place"], Field(description="new ones beside or after old ones")] = "surge"

    @field_validator("max")
    @classmethod
    def _is_no_less(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min")
        if most is not None and least is not None and most < least:
            raise ValueError(f"is less than replicas.min, {least}; raise it, or leave it out")
        return most

    @field_validator("target_ongoing_requests")
    @classmethod
    def _has_a_range(cls, target: int | None, info: ValidationInfo) -> int | None:
        if target is not None and "max" in info.data and info.data["max"] is None:
            raise ValueError("needs replicas.max, the most that the load may ask for; add it")
        return target


class Target(Section):
    model: str = Field(description="folder in Hugging Face layout (relative to this file), or a hub id in the cache")
    tensor_parallel_size: Positive = 1
    dtype: Dtype | None = Field(default=None, description="default: the checkpoint's own")
    weights: StoredWeights = Field(
        default="auto", description="of a quantised checkpoint: stored, as it is; auto: stored where there are products"
    )


class LowerDraft(Section):
    method: Literal["suffix"] | None = Field(default=None, description="suffix: earlier text of the sequence")
    model: str | None = Field(default=None, description="a small model, named like draft.model, in the draft's dtype")


class Draft(Section):
    model: str = Field(
        description="folder in Hugging Face layout (relative to this file), hub id in the cache, or self: the target's"
    )
    quantization: WeightFormat | None = Field(
        default=None, description="to which the weights are rounded at load; default: not"
    )
    layers: Annotated[int | Literal["all"], count_or("all", most=4096)] = Field(
        default="all", description="of the model, the first ones"
    )
    kv_dtype: KvDtype = Field(default="auto", description="fp8: KV of the draft in half the bytes")
    draft: LowerDraft | None = Field(default=None, description="a draft of the draft, which verifies its proposals")
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
    num_speculative_tokens: Annotated[int | Literal["auto"], count_or("auto", most=16)] = Field(
        default="auto", description="auto: chosen for each seq and round; or a fixed number, 1 to 16"
    )
    pipeline: Pipeline | None = Field(default=None, description="serial: the target waits while the draft drafts")
    window: Annotated[int | Literal["auto"], count_or("auto", most=64)] = Field(
        default="auto", description="continuous: drafts ahead of the last commit, 1 to 64"
    )
    verdict_cache: Annotated[int | Literal["auto", "off"], count_or("auto", most=16, off=True)] = Field(
        default="auto", description="continuous: branches of a seq drafted for the likeliest verdicts, 1 to 16"
    )


class Disk(Section):
    path: Annotated[str, path_of("folder")] = Field(description="a folder on each node (relative to this file)")
    bytes: Size = Field(description="that the folder may take on one node")
    write: Literal["reused", "all"] = Field(
        default="reused", description="reused: blocks that were used again, or that host memory evicts"
    )
    read_only: bool = Field(default=False, description="read what another deployment has written when this one starts")


class KvCache(Section):
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1, description="cuda only")] = 0.9
    device_bytes: OptionalSize | None = Field(
        default=None, description="cpu only: KV cache of one device; default 1GiB"
    )
    cpu_bytes: OptionalSize | None = Field(
        default=None, description="host memory of one node for blocks that leave its devices; default: none"
    )
    store: Literal["on_complete", "on_evict"] = Field(
        default="on_complete",
        description="when a block goes to host memory: at once, or as its device evicts it",
    )
    disk: Disk | None = Field(default=None, description="where blocks go that host memory has no room for")
    load_timeout_s: Seconds = Field(
        default=2.0, description="for which a sequence waits for blocks from host memory or disk"
    )
    dtype: KvDtype = Field(default="auto", description="fp8: KV of the target in half the bytes, and not exact")
    tier_dtype: TierDtype = Field(
        default="same",
        description="int8, int4: the tiers hold more tokens, and what comes back is not exact",
    )


class Scheduler(Section):
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 256
    max_num_batched_tokens: Positive = 8192
    max_model_len: Positive | None = Field(
        default=None, description="default: the target's own limit, at most 32768 and at most what device_bytes holds"
    )
    max_queue: Positive = 1024
    enable_prefix_caching: bool = True


class Cuda(Section):
    graphs: Annotated[Literal["auto", "off"], BeforeValidator(yaml_off)] = Field(
        default="auto", description="auto: small steps are captured at start, and each is one launch"
    )


class Cpu(Section):
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = 1
    compile: Annotated[Literal["auto", "off"], BeforeValidator(yaml_off)] = Field(
        default="auto", description="C++ kernels for the CPU, if there is a compiler"
    )


class Tls(Section):
    cert: FilePath = Field(description="PEM, with its chain")
    key: FilePath = Field(description="PEM, not encrypted")
    client_ca: FilePath | None = Field(default=None, description="PEM; clients must have a certificate that it signed")


class Auth(Section):
    tokens_file: FilePath = Field(description="made and changed by `echelon token`")


class Server(Section):
    insecure: bool = Field(default=False, description="listen beyond loopback without TLS or without tokens")
    tls: Tls | None = Field(default=None, description="of both ports; files are read again when they change")
    auth: Auth | None = Field(default=None, description="callers need a token")
    gateways: int = Field(
        default=1, ge=1, le=16, description="each on a node of its own if host is 0.0.0.0, else on the next ports"
    )
    audit_file: FilePath | None = Field(default=None, description="who has asked for what, without prompts")
    host: str = "127.0.0.1"  # after those that its check needs
    grpc_port: Port = 50051
    http_port: Port | None = Field(
        default=8000, validate_default=True, description="OpenAI's API and /metrics; null: no HTTP"
    )

    @field_validator("host")
    @classmethod
    def _loopback_unless_insisted(cls, host: str, info: ValidationInfo) -> str:
        is_safe = info.data.get("tls") is not None and info.data.get("auth") is not None
        if host not in _LOOPBACK_HOSTS and not is_safe and not info.data.get("insecure"):
            raise ValueError(
                "is reachable by others, so it needs server.tls and server.auth; "
                "set them, use 127.0.0.1, or set server.insecure: true to insist"
            )
        return host

    @field_validator("http_port")
    @classmethod
    def _is_another_port(cls, port: int | None, info: ValidationInfo) -> int:
        grpc_port, gateways = info.data.get("grpc_port"), info.data.get("gateways", 1)
        if port is not None and grpc_port is not None and abs(port - grpc_port) < gateways:
            apart = f"; with {gateways} gateways they must be {gateways} apart" if gateways > 1 else ""
            raise ValueError(f"is server.grpc_port too; choose another{apart}")
        return port or 0  # as in settings: null, unlike a key that is not there, asks for none


class Jobs(Section):
    enabled: bool = Field(default=True, description="false: the deployment takes no jobs")
    path: Annotated[str, path_of("folder")] | None = Field(default=None, description="default: in the state directory")
    max_bytes: Size = Field(default=DEFAULT_JOBS_BYTES, description="of all uploads together")
    max_running: Positive | None = Field(default=None, description="items at once; default: max_num_seqs a replica")
    retention_s: Annotated[float, Field(gt=0, le=520 * WEEK_S, allow_inf_nan=False)] = Field(
        default=DEFAULT_RETENTION_S, description="for which jobs that have ended and unused files are kept"
    )
    max_live_slowdown: Annotated[float, Field(ge=0, le=10)] = Field(
        default=DEFAULT_MAX_LIVE_SLOWDOWN, description="of rounds of other requests, a share"
    )


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
    attention: Literal["full", "budgeted"] = Field(
        default="full",
        description="budgeted: requests may ask for contexts of which a part stays in host memory",
    )
    batch_invariant: Annotated[bool | Literal["auto"], BeforeValidator(flag_or_auto)] = Field(
        default="auto", description="results do not depend on the batch; auto: where that costs nothing"
    )
    device: Literal["cpu", "cuda"] = "cuda"
    cpu: Cpu = Cpu()
    cuda: Cuda = Cuda()
    server: Server = Server()
    jobs: Jobs = Jobs()
    startup_timeout_s: Seconds = DEFAULT_STARTUP_TIMEOUT_S
    drain_timeout_s: Annotated[float, Field(ge=0, le=WEEK_S, allow_inf_nan=False)] = Field(
        default=DEFAULT_DRAIN_TIMEOUT_S,
        description="for which requests may finish on a replica that is removed; then they go on at another",
    )
    collective_timeout_s: Patience = DEFAULT_COLLECTIVE_TIMEOUT_S
    rebuild: bool = Field(default=True, description="start again what is lost while the deployment serves")
    spares: Annotated[int | Literal["auto"], count_or("auto", most=64, least=0)] = Field(
        default="auto",
        description="worker processes that a node keeps ready for ranks that are lost; auto: one for each target rank",
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of the deployment file, for editors."""
    return DeploymentFile.model_json_schema()
