"""What planner and decoder need to know of a model, whatever family it is from."""

from dataclasses import dataclass, replace

from checkpoint.errors import LoadError
from checkpoint.rope import Rope
from checkpoint.stored_format import StoredFormat

_MAX_TP_SIZE = 64  # of those that an error message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder: pre-norm RMSNorm, rotary attention with grouped KV heads, gated SiLU MLP."""

    architecture: str  # as in config.json: "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]  # of each layer: tokens that it sees, itself included; None: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each query and key head
    tie_word_embeddings: bool
    stored_as: StoredFormat | None = None  # how files hold the matrices of the layers, if in few bits

    def __post_init__(self) -> None:
        assert len(self.sliding_windows) == self.num_layers, "one sliding window entry a layer"

    def first_layers(self, num_layers: int) -> "ModelConfig":
        """The model without the layers after the first `num_layers`; 0: all. Raises LoadError if it has fewer."""
        if num_layers > self.num_layers:
            raise LoadError(f"{num_layers} layers are more than the model's {self.num_layers}", "use fewer, or all")
        if num_layers == 0:
            return self
        return replace(self, num_layers=num_layers, sliding_windows=self.sliding_windows[:num_layers])

    @property
    def max_len(self) -> int:
        """Longest seq that the model is meant for, its RoPE scaling included."""
        return self.rope.max_len(self.max_position_embeddings)

    def check_max_model_len(self, max_model_len: int) -> None:
        """Raises LoadError where positions would leave the range that the model was made for."""
        if max_model_len > self.max_len:
            raise LoadError(
                f"max_model_len {max_model_len} exceeds the {self.max_len} positions that this model's "
                f"{type(self.rope).__name__} supports (max_position_embeddings {self.max_position_embeddings})",
                "lower scheduler.max_model_len, or configure a RoPE scaling that reaches further (linear, yarn)",
            )

    def kv_heads_per_rank(self, tp_size: int) -> int:
        return max(1, self.num_kv_heads // tp_size)  # replicated if there are fewer heads than ranks

    def tensor_parallel_problem(self, tp_size: int) -> str | None:
        """Why heads, MLP or vocabulary cannot be cut into `tp_size` ranks, or None."""
        if self.num_q_heads % tp_size:
            return f"does not divide the model's {self.num_q_heads} attention heads"
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            return f"neither divides the model's {self.num_kv_heads} key-value heads nor is a multiple of them"
        if self.intermediate_size % tp_size:
            return f"does not divide the model's intermediate size {self.intermediate_size}"
        if (tp_size - 1) * -(-self.vocab_size // tp_size) >= self.vocab_size:
            return f"leaves a rank without any of the model's vocabulary of {self.vocab_size}"
        return None

    def tensor_parallel_remedy(self) -> str:
        sizes = [size for size in range(1, _MAX_TP_SIZE + 1) if self.tensor_parallel_problem(size) is None]
        return f"use one of {', '.join(map(str, sizes))}"

    def check_tp_size(self, tp_size: int) -> None:
        """Raises LoadError where the model cannot be cut into that many ranks."""
        problem = self.tensor_parallel_problem(tp_size)
        if problem is not None:
            raise LoadError(f"tensor_parallel_size: {tp_size}: {problem}", self.tensor_parallel_remedy())
