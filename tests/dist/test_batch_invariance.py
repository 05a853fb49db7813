"""`batch_invariant` in bf16: a row has the same bits however its seq is fed and whatever is batched with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import LlamaForCausalLM

from tests.helpers.invariance import Case, Count, count_alone, count_on_rank
from tests.helpers.ranks import run_on_ranks

SIZES: dict[int, dict[str, Any]] = {
    256: {"intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 4},
    1536: {"intermediate_size": 4096, "num_attention_heads": 12, "head_dim": 128, "num_key_value_heads": 4},
}
LENGTHS = (700, 300, 530, 40)  # of the seqs
CHUNKS = ("7", "16", "64", "300")
PREFILLED = 500  # tokens computed in one piece; the rest comes in single tokens and crosses position 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def get(hidden_size: int) -> Path:
        if hidden_size not in made:
            made[hidden_size] = tmp_path_factory.mktemp(str(hidden_size))
            torch.manual_seed(hidden_size)
            config = LlamaConfig(vocab_size=500, hidden_size=hidden_size, num_hidden_layers=2, **SIZES[hidden_size])
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made[hidden_size])
        return made[hidden_size]

    return get


def seqs(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]


def cases(folder: Path) -> list[Case]:
    return [
        Case(folder=folder, token_ids=seqs(LENGTHS[0]), feeds=CHUNKS),
        Case(folder=folder, token_ids=seqs(*LENGTHS), feeds=("company",)),
        Case(folder=folder, token_ids=seqs(560, 540), feeds=("1", "verify"), num_prefilled=PREFILLED),
    ]


def assert_no_row_differs(counts: list[dict[str, Count]]) -> None:
    found = {name: count for each in counts for name, count in each.items()}
    assert found.keys() == {*CHUNKS, "company", "1", "verify"}
    assert sum(count.num_rows for count in found.values()) > 4000
    assert {name: count for name, count in found.items() if count.num_differing} == {}


def without(folder: Path, **flag: bool) -> Case:
    """The control: the same model without one of the measures that make it invariant."""
    return Case(folder=folder, token_ids=seqs(600), feeds=("64", "verify"), num_prefilled=PREFILLED, **flag)


def num_differing(counts: dict[str, Count]) -> int:
    return sum(count.num_differing for count in counts.values())


@pytest.mark.parametrize(("compile_", "hidden_size"), [("auto", 256), ("off", 256), ("off", 1536)])
def test_every_row_on_one_rank(
    folder: Callable[[int], Path], hidden_size: int, compile_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compile_ == "off" and hidden_size > 256 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch takes minutes for products of this size on a CPU without bf16 instructions")
    monkeypatch.setenv("ECHELON_COMPILE", compile_)
    assert_no_row_differs([count_alone(case) for case in cases(folder(hidden_size))])
    if compile_ == "auto":
        return  # here the bits are the same with and without the flag
    assert num_differing(count_alone(without(folder(hidden_size), batch_invariant=False))) > 0, "the flag does nothing"


def test_every_row_on_four_ranks(folder: Callable[[int], Path], tmp_path: Path) -> None:
    """The order in which a backend adds would not be enough."""
    size = 256  # four ranks of the larger model take a minute on two cores, and sum in the same way
    work = {size: [*cases(folder(size)), without(folder(size), ordered_sum=False)]}
    for rank in run_on_ranks(count_on_rank, 4, tmp_path, work):
        for *found, control in rank.values():
            assert_no_row_differs(found)
            assert num_differing(control) > 0, "the order of sums does not matter"
