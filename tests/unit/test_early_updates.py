"""A process hears what its parent says before it has read its spec."""

import subprocess
import sys
from pathlib import Path

from google.protobuf import json_format

from echelon import __version__
from echelon.pb.process_pb2 import GatewaySpec, ProcessUpdate, SchedulerUpdate

PROGRAM = """
import queue
from childproc import edge
from childproc.updates import Updates
from echelon.pb.process_pb2 import GatewaySpec

def serve(spec, events):
    heard = queue.SimpleQueue()
    updates.subscribe(heard.put)
    events.progress(" ".join(heard.get(timeout=30).scheduler.address for _ in range(2)))

updates = Updates()
edge.run(GatewaySpec, serve, updates)
"""


def test_updates_that_come_with_the_spec_are_heard() -> None:
    updates = [ProcessUpdate(scheduler=SchedulerUpdate(address=address)) for address in ("first", "second")]
    messages = [GatewaySpec(version=__version__), *updates]
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("".join(json_format.MessageToJson(each, indent=None) + "\n" for each in messages))
        child.stdin.flush()
        assert "first second" in child.stdout.read()
