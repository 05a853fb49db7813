"""What is to be served, with every default and every "auto" resolved: what planner, controller and benchmarks share.

Plain dataclasses: the YAML file is one way to make them (`cluster.deployment.schema`), keyword arguments another
(`cluster.local`), and neither pydantic nor Ray is needed to use them.
"""

from dataclasses import dataclass, replace
from typing import Literal

from checkpoint.folder import ModelFolder
from checkpoint.weights import EMBEDDING, HEAD
from childproc.ports import reachable_host
from childproc.tier_block import LEAST_BUDGETED_BLOCKS, TierBlock, TierDtype, tier_block
from cluster.layer_parallel import LayerParallel

Role = Literal["target", "draft"]
Method = Literal["none", "draft_model", "suffix", "hybrid"]
LowerDraft = Literal["suffix"]
Pipeline = Literal["serial", "continuous"]
KvDtype = Literal["auto", "fp8"]
_MAX_BRANCHES = 64  # of all seqs together: rows of a draft step that are not free any more
_DEFAULT_DEVICE_BYTES = 1 << 30
DEFAULT_DRAIN_TIMEOUT_S = 30.0
DEFAULT_JOBS_BYTES = 32 << 30
DEFAULT_MAX_LIVE_SLOWDOWN = 0.05
DEFAULT_RETENTION_S = 30 * 86_400.0
DEFAULT_STARTUP_TIMEOUT_S, DEFAULT_COLLECTIVE_TIMEOUT_S = 120.0, 60.0
_MIN_ROUND_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One model and how it is cut."""

    role: Role
    folder: ModelFolder
    tp_size: int
    layer_parallel: LayerParallel | None = None  # draft only; tp_size is 1 then
    lower_draft: LowerDraft | Literal[""] = ""  # draft only: what drafts for it; empty: nothing, or a model
    lower: "ModelSettings | None" = None  # draft only: a model that drafts for it, on the same ranks
    kv_dtype: KvDtype = "auto"  # auto: that of the weights

    @property
    def dtype(self) -> str:
        return self.folder.dtype

    @property
    def num_ranks(self) -> int:
        return self.tp_size if self.layer_parallel is None else self.layer_parallel.num_ranks

    @property
    def weight_bytes(self) -> int:
        """Bytes on one rank."""
        if self.layer_parallel is not None:
            return self.layer_parallel.weight_bytes(self.folder)
        return self.folder.weight_bytes(self.tp_size)

    @property
    def step_bytes(self) -> int:
        """Of the weights on one rank, those that a step reads: all but the embedding, of which it takes a few rows."""
        embedding = self.folder.weights[EMBEDDING]
        is_whole = self.layer_parallel is not None and self.layer_parallel.weights == "replicated"
        num_elements = embedding.num_elements if is_whole else embedding.elements_of_rows(self.num_ranks)
        is_head_too = HEAD not in self.folder.weights
        return self.weight_bytes - (0 if is_head_too else self.folder.bytes_of(EMBEDDING, num_elements))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes on one rank."""
        if self.layer_parallel is not None:
            return self.layer_parallel.kv_bytes_per_token(self.folder)
        return self.folder.kv_bytes_per_token(self.tp_size) // self.folder.value_bytes * self.kv_value_bytes

    @property
    def held_kv_bytes_per_token(self) -> int:
        """On the device of one rank, with those of the model beneath."""
        return self.kv_bytes_per_token + (self.lower.kv_bytes_per_token if self.lower else 0)

    @property
    def kv_value_bytes(self) -> int:
        """Of a number in the KV cache."""
        return 1 if self.kv_dtype == "fp8" else self.folder.value_bytes

    @property
    def num_kv_layers(self) -> int:
        """Layers whose keys and values one rank holds."""
        if self.layer_parallel is not None:
            return self.layer_parallel.most_layers(self.folder)
        return self.folder.config.num_layers

    def block_in_tiers(self, kv_cache: "KvCacheSettings") -> TierBlock:
        """Bytes on one rank, below the device."""
        head_dim, value_bytes = self.folder.config.head_dim, self.kv_value_bytes
        return tier_block(
            kv_cache.tier_dtype,
            num_layers=self.num_kv_layers,
            block_size=kv_cache.block_size,
            num_kv_heads=self.kv_bytes_per_token // (2 * self.num_kv_layers * head_dim * value_bytes),
            head_dim=head_dim,
            value_bytes=value_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Where drafts come from, how many, and who waits for whom."""

    method: Method = "none"
    pipeline: Pipeline = "serial"
    num_speculative_tokens: int = 0  # most drafts of a seq in a round
    adaptive: bool = False  # the policy chooses how many, up to that; else always that many
    window: int = 0  # continuous: most drafts ahead of the last commit; 0: chosen
    verdict_cache_rows: int = 0  # continuous: most branches of a seq that are drafted ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationSettings:
    """The section `speculation`, as written."""

    method: Method | None = None  # None: draft_model if there is a draft, else none
    num_speculative_tokens: int | Literal["auto"] = "auto"
    pipeline: Pipeline | None = None
    window: int | Literal["auto"] = "auto"
    verdict_cache: int | Literal["auto", "off"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """The section `kv_cache.disk`."""

    path: str  # of a folder on each node
    bytes: int  # of one node
    write: Literal["reused", "all"] = "reused"  # reused: blocks that were used again, or that host memory evicts
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheSettings:
    block_size: int = 16
    device_bytes: int = _DEFAULT_DEVICE_BYTES  # cpu: of one device, shared by the engines on it
    gpu_memory_utilization: float = 0.9  # cuda
    cpu_bytes: int = 0  # host memory of one node for blocks that leave its devices; 0: none
    store: Literal["on_complete", "on_evict"] = "on_complete"  # when a block goes to host memory
    disk: DiskSettings | None = None
    load_timeout_s: float = 2.0  # for which a seq waits for blocks from host memory or disk
    dtype: KvDtype = "auto"  # of the target's cache on its devices; target.kv_dtype is the same
    tier_dtype: TierDtype = "same"  # what a block becomes on its way to host memory and disk


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None  # None: not resolved yet
    max_queue: int = 1024
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSettings:
    threads_per_worker: int = 1
    compile: Literal["auto", "off"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaSettings:
    graphs: Literal["auto", "off"] = "auto"  # auto: steps of few tokens are captured at start


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """The section `server.tls`: files in PEM on the gateway's node."""

    cert: str
    key: str
    client_ca: str = ""  # empty: clients need no certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """The section `server.auth`."""

    tokens_file: str  # on the gateway's node


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    host: str = "127.0.0.1"
    grpc_port: int = 50051  # 0: any free one
    http_port: int = 8000  # 0: no HTTP server
    tls: TlsSettings | None = None
    auth: AuthSettings | None = None
    gateways: int = 1
    audit_file: str = ""  # on the gateway's node; empty: none

    def at(self, port_offset: int) -> "ServerSettings":
        """Of a gateway whose ports are so many further."""
        grpc_port = self.grpc_port + port_offset if self.grpc_port else 0
        return replace(self, grpc_port=grpc_port, http_port=self.http_port + port_offset if self.http_port else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsSettings:
    """The section `jobs`."""

    path: str = ""  # of a folder on the gateway's node; empty: the deployment takes no jobs
    max_bytes: int = DEFAULT_JOBS_BYTES  # of all uploads together
    max_running: int = 0  # items at once; 0: as many as there are slots
    retention_s: float = DEFAULT_RETENTION_S
    max_live_slowdown: float = DEFAULT_MAX_LIVE_SLOWDOWN  # of live requests, a share


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """Replicas come and go with the load."""

    target_ongoing_requests: int  # that wait or run, for each replica
    upscale_delay_s: float
    downscale_delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A deployment, resolved. Its sections are those of the deployment file and travel whole (protos/process.proto)."""

    name: str
    model_name: str  # as clients see it
    target: ModelSettings
    draft: ModelSettings | None = None  # None: no draft model is started
    speculation: Speculation = Speculation()
    num_replicas: int = 1  # copies of both models, each with a scheduler of its own; with `scaling` the fewest
    scaling: ScalingSettings | None = None
    rollout: Literal["surge", "in_place"] = "surge"  # whether a changed replica starts before or after the old one ends
    drain_timeout_s: float = DEFAULT_DRAIN_TIMEOUT_S
    max_replicas: int = 1  # for which host memory and disk of a node are divided; no less than num_replicas
    colocated: bool = False  # the draft's ranks live in the target's processes
    device: Literal["cpu", "cuda"] = "cpu"
    cpu: CpuSettings = CpuSettings()
    cuda: CudaSettings = CudaSettings()
    kv_cache: KvCacheSettings = KvCacheSettings()
    scheduler: SchedulerSettings
    server: ServerSettings = ServerSettings()
    jobs: JobsSettings = JobsSettings()
    forced_acceptance: float = 0.0  # benchmarks only: the share of drafts that count as right; 0: drafts are checked
    attention: Literal["full", "budgeted"] = "full"  # budgeted: a request may have more blocks than its devices
    batch_invariant: bool | None = None  # None: where it costs nothing, which the workers find out
    startup_timeout_s: float = DEFAULT_STARTUP_TIMEOUT_S
    collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S
    rebuild: bool = True  # start again what is lost while the deployment serves
    spares: int | Literal["auto"] = "auto"  # processes that a node keeps ready; auto: one for each target rank
    notes: tuple[str, ...] = ()  # what a person should know of the models

    def num_replicas_from(self, number: int) -> int:
        """How many there should be, if there are `number` now."""
        return self.num_replicas if self.scaling is None else min(max(number, self.num_replicas), self.max_replicas)

    @property
    def max_model_len(self) -> int:
        assert self.scheduler.max_model_len is not None, "settings are resolved"
        return self.scheduler.max_model_len

    def max_model_len_of(self, role: Role) -> int:
        """Tokens of a seq that an engine can hold: a draft ends at its model's own limit, and the seq goes on alone."""
        return min(self.max_model_len, self.model(role).folder.config.max_len)

    def num_tokens_on_device(self, role: Role) -> int:
        """Tokens that a device of the engine must have room for."""
        if self.attention == "budgeted":
            return min(self.max_model_len_of(role), LEAST_BUDGETED_BLOCKS * self.kv_cache.block_size)
        return self.max_model_len_of(role)

    @property
    def round_timeout_s(self) -> float:
        """How long the scheduler waits for a round: no less than the ranks wait for one another inside it."""
        return max(_MIN_ROUND_TIMEOUT_S, self.collective_timeout_s)

    def http_url(self, node: str) -> str:
        """Where a gateway on a node of this address serves HTTP; empty: nowhere."""
        host, port = reachable_host(self.server.host, node), self.server.http_port
        host = f"[{host}]" if ":" in host else host
        scheme = "http" if self.server.tls is None else "https"
        return f"{scheme}://{host}:{port}" if port else ""

    @property
    def method(self) -> Method:
        return self.speculation.method

    @property
    def pipeline(self) -> Pipeline:
        return self.speculation.pipeline

    @property
    def num_speculative_tokens(self) -> int:
        return self.speculation.num_speculative_tokens

    def max_seqs_of(self, role: Role) -> int:
        """Slots of an engine: the draft's also hold the branches of the verdict cache."""
        if role == "target":
            return self.scheduler.max_num_seqs
        branches = self.speculation.verdict_cache_rows * self.scheduler.max_num_seqs
        return self.scheduler.max_num_seqs + min(_MAX_BRANCHES, branches)

    def captured_new_tokens_of(self, role: Role) -> int:
        """Most new tokens of a seq in steps that an engine captures; 0: it captures none."""
        if self.device != "cuda" or self.cuda.graphs == "off" or self.model(role).layer_parallel is not None:
            return 0
        # A draft computes the target's own token after an accepted draft, then one token at a time.
        return 1 + self.num_speculative_tokens if role == "target" else 2

    @property
    def max_rounds_in_flight(self) -> int:
        return 2  # a device never idles while tokens travel

    def model(self, role: Role) -> ModelSettings:
        model = self.target if role == "target" else self.draft
        assert model is not None, "asked for the draft of a deployment without one"
        return model

    def kv_cache_bytes(self, role: Role) -> int:
        """KV cache of one rank of `role` on cpu; 0 on cuda, where the worker takes what the weights leave.

        The draft gets no more tokens than the target can hold, since they hold the same seqs; on a shared device
        both get the same number.
        """
        if self.device == "cuda":
            return 0
        target = self.target.kv_bytes_per_token
        draft = 0 if self.draft is None else self.draft.held_kv_bytes_per_token
        per_token = target + draft if self.colocated else target
        num_tokens = self.kv_cache.device_bytes // (per_token * self.kv_cache.block_size) * self.kv_cache.block_size
        if role == "target":
            return num_tokens * target
        return num_tokens * draft if self.colocated else min(self.kv_cache.device_bytes, num_tokens * draft)
