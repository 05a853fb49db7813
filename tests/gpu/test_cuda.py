"""What a GPU must agree on with the CPU: bits of noise, and tokens; and what runs there. Needs no Ray, no pydantic."""

import random
import warnings
from pathlib import Path

import pytest
import torch

from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.sampling_pb2 import SeqSampling
from kernels.sampling.gumbel import gumbel_noise_range
from tests.helpers.engines import DRAFT, TARGET, drive, engine_spec, interleave
from tests.helpers.hot_path import KINDS, hot_rounds
from tests.helpers.launched import foreign_kernels, launched_by, our_kernels, replaced_operators
from tests.helpers.rounds import Driver, greedy, seeded
from workers.engine.engine import Engine
from workers.process.cohort import Cohort
from workers.process.load import load_engines

pytestmark = pytest.mark.gpu

MODELS = Path(__file__).parents[2] / "models"
DEMO_TARGET, DEMO_DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
DEVICES = ("cpu", "cuda")
NUM_TOKENS = 64
SETTINGS = {
    "greedy": greedy(),
    "sampled": seeded(),
    "truncated": seeded(top_k=40, top_p=0.9, min_p=0.01),
    "penalised": seeded(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
}

# Of each of these, one kernel at least is launched in every round.
EXPECTED = [
    ("attention.split", "attention.whole"),
    ("layers.rms_norm",),
    ("layers.silu_and_mul",),
    ("kv.reshape_and_cache",),
    ("sampling.sample",),
    ("sampling.verify_chain",),
]


def demo_driver(device: str, **changes: object) -> Driver:
    engine = engine_spec(DEMO_TARGET, TARGET, kv_cache_bytes=32 << 20, max_model_len=512, block_size=16, **changes)
    return drive(load(device, engine))


def load(device: str, spec: EngineSpec) -> Engine:
    """The engine, which has captured steps if these are asked for: without them, tests would compare plain steps."""
    worker = WorkerSpec(rank=0, world_size=1, device=device, engines=[spec])
    engine = load_engines(worker, Cohort(0, 1, None), lambda stage, done, total: None)[spec.role]
    assert engine.captures_steps == bool(spec.captured_new_tokens), "the log says what CUDA refused"
    return engine


def plain_outputs(device: str, prompts: list[list[int]], sampling: SeqSampling, **changes: object) -> list[list[int]]:
    driver = demo_driver(device, **changes)
    seqs = [driver.start(slot, prompt, sampling) for slot, prompt in enumerate(prompts)]
    return [driver.generate(seq, NUM_TOKENS) for seq in seqs]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 4096) for _ in range(length)] for length in (1, 17, 100)]


def test_noise_has_the_same_bits() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, -1])
    positions = torch.tensor([0, 5, 1000, 131071])
    cpu, cuda = (
        gumbel_noise_range(
            seeds.to(device), (seeds * 0).to(device), positions.to(device), first_token_id=3, num_tokens=100_000
        )
        for device in DEVICES
    )
    assert torch.equal(cpu, cuda.cpu())


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_those_of_the_cpu(name: str, prompts: list[list[int]]) -> None:
    """In fp32 logits differ by about 1e-5, so all but a rare near-tie agrees: most of each output must."""
    expected, found = (plain_outputs(device, prompts, SETTINGS[name]) for device in DEVICES)
    assert sum(a == b for a, b in zip(expected, found, strict=True)) >= len(prompts) - 1


@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_and_chunks_change_no_token(name: str, prompts: list[list[int]]) -> None:
    expected = plain_outputs("cuda", prompts, SETTINGS[name])
    driver = demo_driver("cuda")
    seqs = [driver.start(slot, prompt, SETTINGS[name]) for slot, prompt in enumerate(prompts)]
    interleave(driver, list(zip(seqs, expected, strict=True)), random.Random(1), NUM_TOKENS)
    same = [seq.output[:NUM_TOKENS] == tokens for seq, tokens in zip(seqs, expected, strict=True)]
    assert sum(same) >= len(prompts) - 1


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_invariance_makes_bf16_exact(name: str, prompts: list[list[int]]) -> None:
    """The start probes products and attention; then drafts, chunks and company change no token at all."""
    options = {"dtype": "bfloat16", "batch_invariant": True}
    expected = plain_outputs("cuda", prompts, SETTINGS[name], **options)
    driver = demo_driver("cuda", **options)
    seqs = [driver.start(slot, prompt, SETTINGS[name]) for slot, prompt in enumerate(prompts)]
    interleave(driver, list(zip(seqs, expected, strict=True)), random.Random(1), NUM_TOKENS)
    assert [seq.output[:NUM_TOKENS] for seq in seqs] == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_captured_steps_change_no_token(name: str, prompts: list[list[int]]) -> None:
    expected = plain_outputs("cuda", prompts, SETTINGS[name])
    driver = demo_driver("cuda", captured_new_tokens=5)
    seqs = [driver.start(slot, prompt, SETTINGS[name]) for slot, prompt in enumerate(prompts)]
    interleave(driver, list(zip(seqs, expected, strict=True)), random.Random(1), NUM_TOKENS)
    same = [seq.output[:NUM_TOKENS] == tokens for seq, tokens in zip(seqs, expected, strict=True)]
    assert sum(same) >= len(prompts) - 1


def test_captured_chains_are_those_of_single_steps(prompts: list[list[int]]) -> None:
    chains = []
    for captured_new_tokens in (0, 2):
        engine = engine_spec(DEMO_DRAFT, DRAFT, max_model_len=256, captured_new_tokens=captured_new_tokens)
        driver = drive(load("cuda", engine))
        seqs = [driver.start(slot, prompt, seeded(slot)) for slot, prompt in enumerate(prompts)]
        for asked in ({}, {"num_alternatives": 3, "confidences": True}):
            driver.run(*((seq, driver.draft_row(seq, 8)) for seq in seqs), **asked)
        chains.append([seq.output for seq in seqs])
    assert sum(a == b for a, b in zip(*chains, strict=True)) >= len(prompts) - 1


def test_a_layer_parallel_draft_projects_its_layers_at_once(prompts: list[list[int]]) -> None:
    drafts = {}
    for device in DEVICES:
        engine = engine_spec(DEMO_DRAFT, DRAFT, lp_size=3, layer_parallel_weights="replicated", max_model_len=128)
        driver = drive(load(device, engine))
        seq = driver.start(0, prompts[1], greedy())
        launched = launched_by(lambda driver=driver, seq=seq: driver.run((seq, driver.draft_row(seq, 4))))
        assert (device == "cpu") == (not launched.kernels & our_kernels("layers.layer_parallel_qkv"))
        drafts[device] = seq.output
    assert drafts["cuda"] == drafts["cpu"]


@pytest.mark.parametrize("captured_new_tokens", [0, 4])
def test_a_round_waits_for_the_device_once(prompts: list[list[int]], captured_new_tokens: int) -> None:
    """For the verdicts. Any other wait would leave the device idle while the next kernels are launched."""
    driver = demo_driver("cuda", captured_new_tokens=captured_new_tokens)
    for step in hot_rounds(driver, prompts[2]).values():
        step()
    for name, step in hot_rounds(driver, prompts[2], first_slot=len(KINDS)).items():
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == 1, f"{name}: {[str(wait.message) for wait in waits]}"


@pytest.mark.parametrize("part", ["prefill", "decode", "verify"])
def test_no_torch_operator_is_left_that_has_a_kernel(part: str, prompts: list[list[int]]) -> None:
    """Attention, norms, gates and sampling are kernels of ours; products are cuBLAS's, copies and indexing torch's."""
    driver = demo_driver("cuda")
    for step in hot_rounds(driver, prompts[2]).values():
        step()  # compiles, and lets libraries choose
    steps = hot_rounds(driver, prompts[2], first_slot=len(KINDS))
    launched = {name: launched_by(step) for name, step in steps.items()}[part]

    assert foreign_kernels(launched.kernels) == []
    assert replaced_operators(launched.operators, vocab_size=driver.info.vocab_size) == []
    for modules in EXPECTED:
        assert launched.kernels & our_kernels(*modules), f"no kernel of {modules} in {sorted(launched.kernels)}"
