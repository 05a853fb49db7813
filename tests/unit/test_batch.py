"""What the host knows about a batch agrees with what the device receives."""

from echelon.pb.worker_pb2 import SeqInit
from workers.engine.seq_state import Limits, SeqTable


def test_lengths_on_the_host_are_those_of_the_tensors() -> None:
    limits = Limits(
        num_slots=2, max_model_len=64, vocab_size=100, block_size=4, num_blocks=32, max_num_batched_tokens=64
    )
    table = SeqTable(limits)
    table.init(SeqInit(slot=1, token_ids=range(9), block_table=[3, 1, 2], num_prompt_tokens=9, num_computed_tokens=4))
    table.init(SeqInit(slot=0, token_ids=[5, 6], block_table=[7], num_prompt_tokens=2))
    batch = table.pack([1, 0], [3, 2])
    assert batch.lengths is not None
    assert batch.lengths.seq_lens.tolist() == batch.seq_lens.tolist() == [7, 2]
    assert batch.lengths.cu_seqlens_q.tolist() == batch.cu_seqlens_q.tolist() == [0, 3, 5]
