"""`python -m scheduler` as its parent sees it: a line in, lines out, and it always ends."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from tokenizers import Tokenizer, decoders, models

from childproc.edge import EXIT_PARENT_DIED
from echelon import __version__
from echelon.pb import process_pb2
from tests.helpers.fake_group import FakeEngine
from tests.helpers.fake_group_server import FakeGroupServer
from tests.helpers.scheduler_sim import letters

ROOT = Path(__file__).parents[2]


async def start(line: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scheduler",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")
    return process


async def next_event(process: asyncio.subprocess.Process) -> process_pb2.ProcessEvent:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    return json_format.Parse(line, process_pb2.ProcessEvent())


@pytest.fixture
def spec(tmp_path: Path) -> process_pb2.SchedulerSpec:
    tokenizer = Tokenizer(models.BPE(vocab={letters([i]): i for i in range(40)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return process_pb2.SchedulerSpec(
        host="127.0.0.1",
        version=__version__,
        model_name="fake",
        tokenizer_dir=str(tmp_path),
        scheduler=process_pb2.SchedulerSection(
            max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, max_queue=4
        ),
        max_rounds_in_flight=2,
    )


@pytest.mark.parametrize("end", ["terminated", "orphaned"])
async def test_a_scheduler_reports_its_address_and_ends_with_its_parent(
    spec: process_pb2.SchedulerSpec, end: str
) -> None:
    group = FakeGroupServer(FakeEngine(), version=__version__)
    spec.target.address = await group.start()
    process = await start(json_format.MessageToJson(spec, indent=None))
    event = await next_event(process)
    assert event.ready.address.startswith("127.0.0.1:")
    if end == "terminated":
        process.send_signal(signal.SIGTERM)
    else:
        assert process.stdin is not None
        process.stdin.close()
    assert await asyncio.wait_for(process.wait(), 60) == (0 if end == "terminated" else EXIT_PARENT_DIED)
    await group.stop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"speculation": {"method": "suffix"}}, "speculation.num_speculative_tokens must be >= 1 with method 'suffix'"),
        ({"max_rounds_in_flight": 3}, "max_rounds_in_flight must be 1 or 2, got 3"),
        ({"tokenizer_dir": "/nowhere"}, "/nowhere/tokenizer.json"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
async def test_the_last_event_says_what_is_wrong(
    spec: process_pb2.SchedulerSpec, change: dict[str, object], words: str
) -> None:
    fields = json_format.MessageToDict(spec, preserving_proto_field_name=True) | change
    process = await start(json.dumps(fields))
    event = await next_event(process)
    assert words in event.failed.error
    assert await asyncio.wait_for(process.wait(), 60) == 1
