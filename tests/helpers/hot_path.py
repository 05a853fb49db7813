"""The rounds of a target that must be fast: a prompt, a decoding step, a verification."""

from collections.abc import Callable, Sequence

from tests.helpers.rounds import Driver, greedy, seeded

# One seq of each kind, without penalties, bias and logprobs: a request that asks for those may cost more.
KINDS = (greedy(), seeded(), seeded(top_k=40, top_p=0.9, min_p=0.01))


def hot_rounds(driver: Driver, prompt: Sequence[int], *, first_slot: int = 0) -> dict[str, Callable[[], object]]:
    """The rounds, in the order in which to run them."""
    seqs = [driver.start(first_slot + number, prompt, sampling) for number, sampling in enumerate(KINDS)]

    def round_of(drafts: Sequence[int]) -> Callable[[], object]:
        return lambda: driver.run(*((seq, driver.target_row(seq, drafts=drafts)) for seq in seqs))

    return {"prefill": round_of([]), "decode": round_of([]), "verify": round_of([5, 6, 7])}
