"""When `batch_invariant: auto` cannot mean true on CPUs, for `plan` and for the workers.

Whether it does is for workers to find out: it takes a C++ compiler, the instructions of their CPUs, and a probe.
"""

_MOST_RANKS = 2  # a sum of more costs more in a fixed order


def why_not_free(*, num_ranks: int, dtype: str, compiles: bool, keeps_bits: bool = False) -> str | None:
    """Why the results of a model on CPUs would depend on the batch, unless that is ruled out at some cost; None if
    nothing that is known before the start speaks against it. `keeps_bits`: matrices stay in the few bits in which they
    are stored."""
    if not compiles:
        return "cpu.compile is off, and torch's products round a row by its batch"
    if dtype == "float16":
        return "float16 is computed by torch, whose products round a row by its batch"
    if keeps_bits and dtype != "float32":
        return f"prompts would take up to twice as long in {dtype} with weights that keep their few bits"
    if num_ranks > _MOST_RANKS:
        return f"sums over {num_ranks} ranks in a fixed order cost more than others"
    return None
