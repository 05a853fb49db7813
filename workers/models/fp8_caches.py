"""A model whose KV cache is in FP8 (kv_cache.dtype, draft.kv_dtype): the scales of its heads, found at load."""

import hashlib
from pathlib import Path

import torch

from checkpoint.errors import LoadError
from kernels.kv.fp8 import KVScales
from workers.models.decoder import CausalLM, KVCache
from workers.models.sample_text import MAX_TOKENS, one_seq, sample_token_ids


def use_fp8_caches(model: CausalLM, folder: Path, *, max_model_len: int, dtype: torch.dtype) -> str:
    """From now on the model's caches are uint8, the bits of E4M3. All its ranks call it, since they compute a text with
    exact caches first, to see how large keys and values get. Returns a digest of the rank's scales, which decide the
    bits of the caches. Raises LoadError if the folder has no tokenizer.json."""
    token_ids = sample_token_ids(folder, min(MAX_TOKENS, max_model_len), model.config.vocab_size)
    if token_ids is None:
        problem = f"KV in fp8: {folder} has no tokenizer.json, so no text can show how large keys and values get"
        raise LoadError(problem, "leave kv_cache.dtype or draft.kv_dtype out")
    device = model.cos_sin.device
    batch = one_seq(token_ids.to(device))
    shape = (1, len(token_ids), model.kv_heads_per_rank, model.config.head_dim)
    caches: list[KVCache] = [
        (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in model.layers
    ]
    with torch.inference_mode():
        model.forward(batch, caches)
    model.native = None  # it has caches in the model's dtype
    digest = hashlib.blake2b(digest_size=16)
    for layer, (k, v) in zip(model.layers, caches, strict=True):
        scales = layer.attention.kv_scales = KVScales.of(k, v)
        digest.update(torch.cat([scales.k, scales.v]).cpu().numpy().tobytes())
    return digest.hexdigest()
