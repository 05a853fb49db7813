"""A peer's end of the pipe: it loads once, then answers tasks one at a time. Standard library only.

Standard input takes a line of JSON with the models, then a line for each task. Standard output gives a line that says
what was loaded, then a line for each run. The end of standard input ends the process.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from bench.peers.runs import Models, Run, Task


class Engine(Protocol):
    about: str  # version and settings, for the report

    def run(self, task: Task) -> Run: ...


def serve(load: Callable[[Models], Engine]) -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print stays out of the answers
        engine = load(Models(**json.loads(sys.stdin.readline())))
        print(json.dumps({"about": engine.about}), file=answers)
        for line in sys.stdin:
            print(json.dumps(asdict(engine.run(Task(**json.loads(line))))), file=answers)
