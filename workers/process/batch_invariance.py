"""Whether the results of an engine depend on the batch: as its spec says, or never where that costs nothing."""

import logging
from pathlib import Path

import torch

from checkpoint.config_json import load_model_config
from childproc.batch_invariance import why_not_free
from childproc.spec import SpecError
from echelon.pb.process_pb2 import EngineSpec
from kernels.attention.native import can_attend_heads
from kernels.attention.probe import probe_paged_attention
from kernels.layers.linear import probe_linear_batch_invariant, runs_natively
from kernels.layers.quantized import QuantizedWeight
from workers.collectives import Group
from workers.models.decoder import MLP, Attention, CausalLM
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.process.cohort import Cohort

logger = logging.getLogger(__name__)


def choose_batch_invariance(
    spec: EngineSpec, cohort: Cohort, *, num_members: int, dtype: torch.dtype, device: torch.device
) -> EngineSpec:
    """The spec with `batch_invariant` set, alike on all ranks, which all call it. A draft with rounded weights does
    without: the output does not depend on it. Raises LoadError."""
    if spec.HasField("batch_invariant") and not spec.quantization:
        return spec
    is_free = (
        not spec.quantization
        and why_not_free(num_ranks=num_members, dtype=spec.dtype, compiles=True, keeps_bits=spec.keeps_bits) is None
        and device.type == "cpu"
        and _runs_natively(Path(spec.model), dtype)
    )
    chosen = EngineSpec()
    chosen.CopyFrom(spec)
    chosen.batch_invariant = all(cohort.gather(f"batch_invariant/{spec.role}", "yes" if is_free else ""))
    return chosen


def _runs_natively(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the native kernels compute the model anyway; they keep a row's bits apart from its batch."""
    config = load_model_config(folder)
    group = config.num_q_heads // config.num_kv_heads
    return runs_natively(dtype) and can_attend_heads(dtype, config.head_dim, group=group)


def keeps_batch_invariance(
    model: CausalLM | LayerParallelLM, group: Group, *, is_asked_for: bool, dtype: torch.dtype, device: torch.device
) -> bool:
    """Probe the machine with the model's own weights. The members of `group` call it and get the same answer.

    Raises SpecError if the spec asks for what this rank cannot keep.
    """
    finding = _probe(model, dtype=dtype, device=device)
    if finding is not None and is_asked_for:
        raise SpecError(f"batch_invariant: {finding}; set batch_invariant: false")
    if finding is not None:
        logger.warning("batch_invariant is off: %s", finding)
    num_findings = torch.tensor([int(finding is not None)], dtype=torch.int32, device=device)
    return group.all_reduce(num_findings).item() == 0


def _probe(model: CausalLM | LayerParallelLM, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """Batch invariance depends on the machine's matrix products, so try one weight of each shape, and attention."""
    attention, mlp = _sublayers(model)
    with torch.inference_mode():
        for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj, model.head):
            if isinstance(linear.weight, QuantizedWeight):
                return "only the C++ kernels multiply by weights of few bits so, and they cannot be used here"
            if finding := probe_linear_batch_invariant(linear.weight, dtype=dtype):
                return finding
        heads = (attention.qkv_proj.num_q_heads, attention.qkv_proj.num_kv_heads, model.config.head_dim)
        return probe_paged_attention(*heads, dtype=dtype, device=device)


def _sublayers(model: CausalLM | LayerParallelLM) -> tuple[Attention, MLP]:
    """One weight of each shape on this rank: all layers have the same shapes."""
    if isinstance(model, LayerParallelLM):
        return next(iter(model.attention_layers.values())).attention, model.mlp_layers[0].mlp
    return model.layers[0].attention, model.layers[0].mlp
