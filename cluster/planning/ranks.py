"""The ranks of a deployment, and how much memory each needs. Pure."""

from dataclasses import dataclass

from checkpoint.captured_sizes import captured_bytes
from checkpoint.memory import num_sampled_rows, rope_table_bytes, sampling_bytes
from checkpoint.weights import EMBEDDING, HEAD
from cluster.deployment.settings import ModelSettings, Role, Settings
from cluster.planning.plan import MemoryEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A worker process that wants a device."""

    replica: int
    group: Role
    rank: int
    engines: tuple[Role, ...]
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        return f"{self.group} rank {self.rank}" + (f" of replica {self.replica}" if self.replica else "")


def ranks_of(settings: Settings, replica: int) -> list[Rank]:
    target, draft = settings.target, settings.draft
    ranks = []
    for rank in range(target.tp_size):
        with_draft = draft is not None and settings.colocated and rank < draft.num_ranks
        models = [target, draft] if with_draft and draft is not None else [target]
        ranks.append(_rank(replica, "target", rank, models, settings))
    if draft is not None and not settings.colocated:
        ranks += [_rank(replica, "draft", rank, [draft], settings) for rank in range(draft.num_ranks)]
    return ranks


def _rank(replica: int, group: Role, rank: int, models: list[ModelSettings], settings: Settings) -> Rank:
    loaded = [*models, *(model.lower for model in models if model.lower is not None)]
    memory = MemoryEstimate(
        weight_bytes=sum(model.weight_bytes + _packed_head_bytes(model, settings) for model in loaded),
        kv_cache_bytes=sum(_kv_cache_bytes(model, settings) for model in models),
        # Engines of one device take turns, so only the larger working set counts. Tables and captured steps stay.
        activation_bytes=max(_activation_bytes(model, settings) for model in loaded)
        + sum(_rope_table_bytes(model, settings) for model in loaded)
        + sum(expected_captured_bytes(model, settings) for model in models),
    )
    engines = tuple(model.role for model in models)
    return Rank(replica=replica, group=group, rank=rank, engines=engines, memory=memory)


def _packed_head_bytes(model: ModelSettings, settings: Settings) -> int:
    """On a CPU, a head that is tied to the embedding is packed for its product, which makes a copy."""
    is_tied = HEAD not in model.folder.weights
    if settings.device != "cpu" or not is_tied or model.dtype == "float16":  # torch multiplies float16 as it is
        return 0
    return model.folder.bytes_of(EMBEDDING, model.folder.weights[EMBEDDING].elements_of_rows(model.num_ranks))


def _kv_cache_bytes(model: ModelSettings, settings: Settings) -> int:
    """On cpu what the settings give; on cuda the least that works, one longest seq."""
    if settings.device == "cpu":
        return settings.kv_cache_bytes(model.role)
    # Engines that share a device get blocks for equally many tokens.
    num_tokens = settings.num_tokens_on_device("target" if settings.colocated else model.role)
    num_blocks = -(-num_tokens // settings.kv_cache.block_size)
    return num_blocks * settings.kv_cache.block_size * model.held_kv_bytes_per_token


def _activation_bytes(model: ModelSettings, settings: Settings) -> int:
    forward = model.folder.activation_bytes(model.tp_size, num_tokens=settings.scheduler.max_num_batched_tokens)
    return forward + expected_sampling_bytes(model, settings)


def _rope_table_bytes(model: ModelSettings, settings: Settings) -> int:
    num_positions = settings.max_model_len_of(model.role)
    return rope_table_bytes(head_dim=model.folder.config.head_dim, num_positions=num_positions)


def expected_sampling_bytes(model: ModelSettings, settings: Settings) -> int:
    """What a rank of the model reserves for choosing tokens."""
    num_rows = num_sampled_rows(
        verifies=model.role == "target",
        max_num_seqs=settings.max_seqs_of(model.role),
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
    )
    vocab_size = model.folder.config.vocab_size
    return sampling_bytes(vocab_size=vocab_size, num_ranks=model.num_ranks, num_rows=num_rows)


def expected_captured_bytes(model: ModelSettings, settings: Settings) -> int:
    """What a rank of the model reserves for captured steps."""
    return captured_bytes(
        model.folder.config,
        num_ranks=model.num_ranks,
        max_num_seqs=settings.max_seqs_of(model.role),
        most_new=settings.captured_new_tokens_of(model.role),
        max_model_len=settings.max_model_len_of(model.role),
        block_size=settings.kv_cache.block_size,
        value_bytes=model.folder.value_bytes,
        drafts=model.role == "draft",
    )
