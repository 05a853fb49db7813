"""Forwards and chains of drafts in one native call: they have the bits of the operators for every family, and stay
within their arrays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.quantization import WeightFormat
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import RowResult
from kernels.native.linear import DTYPES, why_not
from tests.helpers.engines import assemble_draft, drive
from tests.helpers.paged import BLOCK_SIZE, PagedRunner, run_seqs
from tests.helpers.rounds import greedy, seeded
from tests.helpers.tiny_models import FAMILIES, MAX_MODEL_LEN, make_tiny_model
from workers.collectives import SoloGroup
from workers.models.batch import Batch
from workers.models.decoder import CausalLM
from workers.models.loading import load_model

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")

NATIVE_HEAD_DIM = 48
PROMPTS = {0: list(range(1, 40)), 2: list(range(5, 45))}
MIXED = {0: [3], 2: [4, 5, 6], 1: list(range(9))}  # a decode row, drafts to verify and a prompt
MANY = {seq: [seq + 1] * 3 for seq in (2, 0, 3)} | {4: list(range(60))}  # more tokens than keep their scratch memory


def load(folder: Path, dtype: torch.dtype, quantization: WeightFormat | None = None) -> CausalLM:
    return load_model(
        folder,
        dtype=dtype,
        device=torch.device("cpu"),
        group=SoloGroup(),
        max_model_len=MAX_MODEL_LEN,
        batch_invariant=quantization is None,  # else some CPUs multiply by bf16 weights through torch
        quantization=quantization,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), head_dim=NATIVE_HEAD_DIM).folder


def results(model: CausalLM, forward: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Hidden states of three forwards, and the caches after them."""
    runner = PagedRunner(model, num_seqs=5, max_len=MAX_MODEL_LEN, dtype=dtype)
    with torch.inference_mode():
        hidden = [forward(runner.batch(chunks), runner.kv_caches) for chunks in (PROMPTS, MIXED, MANY)]
    caches = [torch.stack(cache).nan_to_num(torch.finfo(dtype).max) for cache in runner.kv_caches]
    return hidden + caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_has_the_bits_of_the_operators(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = make_tiny_model(family, tmp_path, head_dim=NATIVE_HEAD_DIM)
    model = load(tiny.folder, dtype)
    assert model.native is not None
    for ours, theirs in zip(
        results(model, model.forward, dtype), results(model, model.forward_by_operators, dtype), strict=True
    ):
        assert torch.equal(ours, theirs)
    if dtype == torch.float32:
        for logits, expected in zip(run_seqs(model, tiny.token_ids, "chunks"), tiny.logits, strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4"])
def test_so_has_one_call_with_rounded_weights(format: WeightFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_tiny_model("llama-biases-tied", tmp_path, head_dim=NATIVE_HEAD_DIM, intermediate_size=96).folder
    model = load(folder, dtype, quantization=format)
    assert model.native is not None
    for ours, theirs in zip(
        results(model, model.forward, dtype), results(model, model.forward_by_operators, dtype), strict=True
    ):
        assert torch.equal(ours, theirs)


SAMPLINGS = [greedy(), seeded(3), seeded(2**63 + 5, sample_index=2), seeded(4, top_k=5), greedy(min_tokens=2)]


@pytest.mark.parametrize("num_alternatives", [0, 3])
def test_chains_have_the_tokens_that_the_operators_draft(folder: Path, num_alternatives: int) -> None:
    """Chains of different lengths, of which the operators draft those whose choice takes more than noise."""

    def drafted(*, natively: bool, samplings: list[SeqSampling]) -> list[RowResult]:
        parts = assemble_draft(folder)
        assert isinstance(parts.runner.model, CausalLM)
        if not natively:
            parts.runner.model.native = None
        driver = drive(parts.engine)
        seqs = [driver.start(slot, list(range(9 + slot)), sampling) for slot, sampling in enumerate(samplings)]
        work = [(seq, driver.draft_row(seq, 2 + 3 * seq.slot)) for seq in seqs]
        return driver.run(*work, num_alternatives=num_alternatives, confidences=True)

    for samplings in (SAMPLINGS[:1], SAMPLINGS[:3], SAMPLINGS[2:]):
        for ours, theirs in zip(
            drafted(natively=True, samplings=samplings), drafted(natively=False, samplings=samplings), strict=True
        ):
            assert ours.token_ids == theirs.token_ids
            assert ours.alternative_token_ids == theirs.alternative_token_ids
            assert list(ours.confidences) == pytest.approx(list(theirs.confidences), rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_ids", 131),
        ("input_ids", -1),
        ("positions", MAX_MODEL_LEN),
        ("slot_mapping", 100 * BLOCK_SIZE),
        ("slot_mapping", -2),
        ("block_table", 100),
        ("block_table", -1),
        ("seq_lens", 2),
        ("cu_seqlens_q", 4),
    ],
)
def test_no_forward_leaves_its_arrays(folder: Path, field: str, value: int) -> None:
    model = load(folder, torch.float32)
    runner = PagedRunner(model, num_seqs=2, max_len=MAX_MODEL_LEN, dtype=torch.float32)
    batch = runner.batch({0: [1, 2, 3]})
    getattr(batch, field).view(-1)[-1 if field != "block_table" else 0] = value
    with pytest.raises(ValueError, match=field), torch.inference_mode():
        model.forward(batch, runner.kv_caches)
    assert all(cache.isnan().all() for caches in runner.kv_caches for cache in caches), "the caches are untouched"


def test_a_seq_needs_blocks_for_all_its_tokens(folder: Path) -> None:
    model = load(folder, torch.float32)
    runner = PagedRunner(model, num_seqs=1, max_len=2 * BLOCK_SIZE, dtype=torch.float32)
    batch = runner.batch({0: [1, 2, 3]})
    batch.seq_lens[0] = 2 * BLOCK_SIZE + 1
    with pytest.raises(ValueError, match="block_table"), torch.inference_mode():
        model.forward(batch, runner.kv_caches)


def test_what_is_not_contiguous_is_refused(folder: Path) -> None:
    model = load(folder, torch.float32)
    runner = PagedRunner(model, num_seqs=1, max_len=MAX_MODEL_LEN, dtype=torch.float32)
    batch: Batch = runner.batch({0: [1, 2, 3]})
    with pytest.raises(ValueError, match="input_ids"), torch.inference_mode():
        model.forward(replace(batch, input_ids=torch.arange(6)[::2]), runner.kv_caches)


def test_a_model_that_torch_computes_has_no_such_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(folder, torch.float16).native is None
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    assert load(folder, torch.float32).native is None
