"""From a model folder to a model that runs."""

import logging
import time
from pathlib import Path

import torch

from workers.groups import Group
from workers.layers.context import BuildContext
from workers.layers.vocab import ParallelLMHead
from workers.models.checkpoint import Checkpoint, Progress
from workers.models.decoder import CausalLM
from workers.models.errors import LoadError
from workers.models.hf_config import load_model_config

logger = logging.getLogger(__name__)

_HEAD = "lm_head.weight"


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    max_model_len: int,
    batch_invariant: bool = False,
    progress: Progress | None = None,
) -> CausalLM:
    """This rank's part of the model in `folder`, in `dtype`, whatever the checkpoint's. Reads only the slices that
    the rank needs; calls nobody, so ranks may load at different speeds. `progress(done, total)` counts bytes in
    memory. `batch_invariant`: a row's result does not depend on the batch around it (give a group with ordered sums).
    Raises LoadError."""
    started_s = time.monotonic()
    config = load_model_config(folder)
    config.check_tp_size(group.size)
    config.check_max_model_len(max_model_len)
    checkpoint = Checkpoint(folder)
    ctx = BuildContext(group, dtype=dtype, device=device, batch_invariant=batch_invariant)
    model = CausalLM(config, max_model_len=max_model_len, ctx=ctx)
    checkpoint.check(ctx.slices, unused=lambda name: _is_unused(name, tied=config.tie_word_embeddings))
    checkpoint.read(ctx.slices, progress or _ignore)
    if config.tie_word_embeddings and _HEAD in checkpoint.tensors:
        _check_head_is_tied(model, checkpoint, group)
    with torch.inference_mode():
        ctx.pack()
    took_s = time.monotonic() - started_s
    logger.info("loaded %s: %d MiB on rank %d in %.1f s", folder, model.weight_bytes >> 20, group.rank, took_s)
    return model


def _is_unused(name: str, *, tied: bool) -> bool:
    """Tensors without effect: frequencies that older versions of transformers saved, and a copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == _HEAD)


def _check_head_is_tied(model: CausalLM, checkpoint: Checkpoint, group: Group) -> None:
    """A saved head beside `tie_word_embeddings: true` must equal the embedding, else one of the two is wrong."""
    embedding = model.embedding.weight
    ctx = BuildContext(group, dtype=embedding.dtype, device=embedding.device, batch_invariant=False)
    head = ParallelLMHead("lm_head", model.config.vocab_size, model.config.hidden_size, tied_to=None, ctx=ctx)
    checkpoint.check(ctx.slices, unused=lambda name: True)
    checkpoint.read(ctx.slices, _ignore)
    if not torch.equal(head.weight, embedding):
        raise LoadError(
            f"{checkpoint.folder}: config.json says tie_word_embeddings, but {_HEAD} differs from the embedding: "
            f"set it to false if the head is meant, or remove the tensor"
        )


def _ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""
