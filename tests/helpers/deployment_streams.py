"""Streams of many requests with all sampling settings and numbers of drafts, served at once by one deployment."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, SpeculationSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon.pb import inference_pb2, sampling_pb2, scheduler_pb2_grpc
from tests.helpers.scheduler_client import SchedulerClient
from tests.helpers.structured import source_of

MODELS = Path(__file__).parents[2] / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
PROMPTS = ["def fibonacci(n):\n    ", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self"]
NUM_TOKENS = 24
MAX_OBJECT_TOKENS = 60  # more than any object of the schema has
MAX_MODEL_LEN = 640
NUM_DRAFTS = (0, 1, 2, 3, 4)
_MOST_WAVES = 4  # of requests

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "logprobs": {"logprobs": 3},
    "everything": {
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logprobs": 2,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    prompt: list[int]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    token_ids: list[int]
    logprobs: list[sampling_pb2.PositionLogprobs]
    speculation: inference_pb2.SpeculationStats


Streams = dict[tuple[str, int], Stream]  # by case and number of drafts


def make_structured_cases() -> dict[str, Case]:
    """Outputs that keep to a schema, and end where it does, at temperature 0 and 1."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    settings = {"grammar": source_of(), "ignore_eos": False, "max_tokens": MAX_OBJECT_TOKENS, "logprobs": 1}
    return {
        f"schema, temperature {temperature:g}": Case(
            prompt=tokenizer.encode(PROMPTS[seed]).ids, settings={**settings, "temperature": temperature, "seed": seed}
        )
        for seed, temperature in enumerate((0.0, 0.7, 1.0))
    }


def make_cases() -> dict[str, Case]:
    """Each setting at temperature 0 and 1, and a long prompt whose output crosses position 512."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    cases = {}
    for index, (name, settings) in enumerate(SETTINGS.items()):
        for temperature in (0.0, 1.0):
            chosen = {**settings, "temperature": temperature, "seed": 2**62 + index}
            cases[f"{name}, temperature {temperature:g}"] = Case(prompt=prompts[index % 3], settings=chosen)
    long = list(itertools.islice(itertools.cycle(itertools.chain(*prompts)), 500))
    return cases | {"long": Case(prompt=long, settings={"temperature": 1.0, "seed": 5, "logprobs": 1})}


def generate(
    cases: dict[str, Case],
    num_drafts: Iterable[int],
    *,
    draft: LocalDraft | None,
    speculation: SpeculationSettings,
    **settings: Any,
) -> Streams:
    """Runs one deployment and sends it all requests at once; again if the target was too fast to verify a draft.
    After that the draft has read the prompts."""
    streams = list(itertools.product(cases, num_drafts))
    wanted = local_settings(
        draft=draft,
        kv_cache=KvCacheSettings(device_bytes=128 << 20),
        scheduler=SchedulerSettings(max_num_seqs=len(streams), max_num_batched_tokens=192, max_model_len=MAX_MODEL_LEN),
        speculation=replace(speculation, num_speculative_tokens=max(NUM_DRAFTS)),
        **settings,
    )
    deployment = LocalDeployment(wanted)
    with deployment, open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        for _ in range(_MOST_WAVES):
            client = SchedulerClient(stub, max_tokens=NUM_TOKENS, ignore_eos=True)
            for name, k in streams:
                client.submit(f"{name}/{k}", cases[name].prompt, num_drafts=k, **cases[name].settings)
            client.finish(len(streams))
            if any(client.ends[f"{name}/{k}"].speculation.num_draft_tokens for name, k in streams if k):
                break
    return {
        (name, k): Stream(
            token_ids=client.tokens[f"{name}/{k}", 0],
            logprobs=client.logprobs[f"{name}/{k}", 0],
            speculation=client.ends[f"{name}/{k}"].speculation,
        )
        for name, k in streams
    }
