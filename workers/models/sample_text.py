"""A short text on which a model is measured at load, as one seq."""

from pathlib import Path

import torch
from torch import Tensor

from checkpoint.tokenizer import TOKENIZER_FILE, load_tokenizer
from kernels.attention.paged_kv import SeqLengths
from workers.models.batch import Batch

MAX_TOKENS = 256  # of the text below, which has about 250; a longer one would only cost time at start

# Prose, dialogue and code, because layers differ more on some texts than on others.
_TEXT = '''The harbour was quiet before sunrise. Two fishing boats lay side by side at the wooden pier, and between them
a heron stood in the shallow water without moving. "If the wind turns," said the older man, "we shall be back by noon.
If it does not, keep some soup for us." His daughter laughed, because he said the same thing every Friday, and because
the wind had turned only once in all those years.

def merge_intervals(intervals):
    """Join overlapping (start, end) pairs and return them in order."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged

Water boils at 100 degrees Celsius at sea level, but at about 93 degrees on a mountain of 2000 metres, since the air
presses less on its surface. That is why potatoes need longer there: 25 minutes instead of 20. Which of the following
statements follows from this? (a) Cooking time depends on pressure. (b) Potatoes grow better in valleys. (c) Water is
lighter on mountains. The answer is (a); neither of the others says anything about temperature.
'''


def sample_token_ids(folder: Path, max_tokens: int, vocab_size: int) -> Tensor | None:  # int64 [num_tokens]
    """Its first tokens; None if the folder of the model has no tokenizer."""
    if not (folder / TOKENIZER_FILE).exists():
        return None
    token_ids = load_tokenizer(folder).encode(_TEXT).ids[:max_tokens]
    return torch.tensor([token_id for token_id in token_ids if token_id < vocab_size] or [0])


def one_seq(token_ids: Tensor) -> Batch:
    """A prefill of one block."""
    num_tokens, device = token_ids.shape[0], token_ids.device
    positions = torch.arange(num_tokens, device=device)
    seq_lens, cu_seqlens_q = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([num_tokens], [0, num_tokens]))
    return Batch(
        input_ids=token_ids,
        positions=positions,
        slot_mapping=positions,
        block_table=torch.zeros((1, 1), dtype=torch.int32, device=device),
        seq_lens=seq_lens.to(device),
        cu_seqlens_q=cu_seqlens_q.to(device),
        lengths=SeqLengths.read(seq_lens, cu_seqlens_q),
    )
