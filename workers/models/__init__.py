"""Models: from a Hugging Face folder to a forward pass. The operators are those of kernels/."""

from workers.models.config import ModelConfig
from workers.models.decoder import CausalLM
from workers.models.errors import LoadError
from workers.models.hf_config import load_model_config
from workers.models.layer_groups import LayerParallelPlan
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.loading import load_layer_parallel_model, load_model

__all__ = [
    "CausalLM",
    "LayerParallelLM",
    "LayerParallelPlan",
    "LoadError",
    "ModelConfig",
    "load_layer_parallel_model",
    "load_model",
    "load_model_config",
]
