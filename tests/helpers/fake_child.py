"""A process that speaks the child protocol and does nothing: `python -m tests.helpers.fake_child`.

Its spec is a WorkerSpec. `FAKE_BEHAVIOUR` says what it does: ready, fail (says why), die (exits with 3 after a line on
stderr), silent (never says anything), stubborn (ignores SIGTERM), noisy (prints lines that are no events), orphan
(starts a grandchild that would outlive it), importing (never says that it waits for its spec).
"""

import json
import os
import signal
import subprocess
import sys
import threading

from google.protobuf import json_format

from echelon.pb.process_pb2 import WorkerSpec


def main() -> None:
    if os.environ.get("FAKE_BEHAVIOUR") != "importing":
        say(waiting={})
    spec = json_format.Parse(sys.stdin.readline(), WorkerSpec())
    parent_died = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), parent_died.set()), daemon=True).start()
    behaviour = os.environ.get("FAKE_BEHAVIOUR", "ready")
    say(progress={"stage": f"rank {spec.rank} joins {spec.store_address or 'nobody'}", "done": 1, "total": 2})
    if behaviour == "fail":
        say(failed={"error": "the weights are made of cheese; use other weights", "detail": "Traceback: cheese"})
        sys.exit(1)
    if behaviour == "die":
        sys.stderr.write("first line\nout of cheese\n")
        sys.exit(3)
    if behaviour == "noisy":
        sys.stdout.write("hello from a library\n")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "orphan":
        subprocess.Popen(["sleep", "600"])
    if behaviour != "silent":
        serve(spec)
    parent_died.wait()


def serve(spec: WorkerSpec) -> None:
    if spec.rank == 0 and spec.world_size > 1:
        say(storeOpened={"address": "127.0.0.1:1234"})
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    threads = f"omp={os.environ.get('OMP_NUM_THREADS', '')} {os.environ.get('OMP_WAIT_POLICY', 'default')}"
    info = {"device": f"gpus={devices} {threads}", "worldSize": spec.world_size}
    say(ready={"address": "127.0.0.1:5678" if spec.rank == 0 else "", "worker": info})


def say(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
