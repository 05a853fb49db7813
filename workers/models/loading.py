"""From a model folder to a model that runs."""

import logging
import time
from pathlib import Path

import torch

from checkpoint.config_json import load_model_config
from checkpoint.errors import LoadError
from checkpoint.layer_parallel import layer_parallel_problems
from checkpoint.quantization import WeightFormat
from workers.collectives import Group
from workers.layers.context import BuildContext
from workers.models.checkpoint import Checkpoint, Progress
from workers.models.decoder import CausalLM
from workers.models.layer_groups import LayerParallelPlan, MLPs
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.native_decoder import native_decoder

logger = logging.getLogger(__name__)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    max_model_len: int,
    batch_invariant: bool = False,
    quantization: WeightFormat | None = None,
    num_layers: int = 0,
    keeps_bits: bool = False,
    progress: Progress | None = None,
) -> CausalLM:
    """This rank's part of the model in `folder`, in `dtype`, whatever the checkpoint's dtype is. Reads only the slices
    that the rank needs. Needs no other rank, so ranks may load at different speeds. `progress(done, total)` counts
    bytes in memory. `batch_invariant`: a row's result does not depend on the batch around it (give a group with ordered
    sums). `quantization`: round the matrices to it, one at a time. `num_layers`: use so many layers, the first ones; 0:
    all. `keeps_bits`: matrices stay in the few bits in which the checkpoint stores them. Raises LoadError."""
    whole = load_model_config(folder)
    config = whole.first_layers(num_layers)
    config.check_tp_size(group.size)
    config.check_max_model_len(max_model_len)
    checkpoint = Checkpoint(folder, whole)
    ctx = BuildContext(
        group,
        dtype=dtype,
        device=device,
        batch_invariant=batch_invariant,
        quantization=quantization,
        kept=checkpoint.stored_names if keeps_bits else (),
    )
    model = CausalLM(config, max_model_len=max_model_len, ctx=ctx)
    _fill(model, checkpoint, ctx, progress or _ignore)
    model.native = native_decoder(model)
    return model


def load_layer_parallel_model(
    folder: Path,
    plan: LayerParallelPlan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    max_model_len: int,
    batch_invariant: bool = False,
    quantization: WeightFormat | None = None,
    num_layers: int = 0,
    progress: Progress | None = None,
) -> LayerParallelLM:
    """As load_model, for a draft whose ranks share it by layers. Raises LoadError."""
    whole = load_model_config(folder)
    config = whole.first_layers(num_layers)
    splits_mlps = plan.mlps is MLPs.TENSOR_PARALLEL
    for problem in layer_parallel_problems(config, size=group.size, splits_mlps=splits_mlps):
        raise LoadError(problem.finding, problem.remedy)
    config.check_max_model_len(max_model_len)
    checkpoint = Checkpoint(folder, whole)
    ctx = BuildContext(group, dtype=dtype, device=device, batch_invariant=batch_invariant, quantization=quantization)
    model = LayerParallelLM(config, plan, max_model_len=max_model_len, ctx=ctx)
    _fill(model, checkpoint, ctx, progress or _ignore)
    # A CPU gains nothing from fewer calls, and the rounding of joint products of several layers depends on the batch.
    if plan.num_ranks == 1 and device.type == "cuda" and not batch_invariant and quantization is None:
        model.stack_weights()
    return model


def _fill(model: CausalLM | LayerParallelLM, checkpoint: Checkpoint, ctx: BuildContext, progress: Progress) -> None:
    """Read what the layers of a model have asked `ctx` for."""
    started_s = time.monotonic()
    counted = _Counted(progress, total=sum(part.target.nbytes for part in ctx.slices))
    with torch.inference_mode():
        ctx.fill(
            lambda slices: checkpoint.read(slices, counted.add), lambda part: checkpoint.read_bits(part, counted.add)
        )
    model.weight_bytes = ctx.num_bytes
    took_s = time.monotonic() - started_s
    rank, mebibytes = ctx.group.rank, model.weight_bytes >> 20
    logger.info("loaded %s: %d MiB on rank %d in %.1f s", checkpoint.folder, mebibytes, rank, took_s)


class _Counted:
    """Sums up the bytes that were read."""

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.add(0)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self._total)


def _ignore(done: int, total: int) -> None:
    """Ignores progress."""
