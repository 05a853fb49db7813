"""Models: from a Hugging Face folder to a forward pass. The operators are those of kernels/."""

from checkpoint.config import ModelConfig
from checkpoint.config_json import load_model_config
from checkpoint.errors import LoadError
from workers.models.decoder import CausalLM
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
