"""The systems that are compared, each behind the same call: Echelon as a deployment, its peers as child processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.load import run_side_by_side
from bench.peers.results import Side
from bench.peers.runs import Models, Run, Stream, Task
from bench.variants import PLAIN, Pair, Variant, VariantDeployment
from echelon import __version__
from echelon.requests import GenerateOptions

REPOSITORY = Path(__file__).parents[2]
STOP_GRACE_S = 10.0
LAST_LINES = 20  # of a peer's log, when it has failed


class PeerError(RuntimeError):
    """A peer ended or could not be started. The message ends with the last lines of its log."""


class RunningSide(Protocol):
    about: str  # version and settings

    def run(self, task: Task) -> Run: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every side gets."""

    pair: Pair
    num_drafts: int
    vllm_python: Path | None

    def models(self, *, speculate: bool) -> Models:
        return Models(
            target=str(self.pair.target.resolve()),
            draft=str(self.pair.draft.resolve()) if speculate else None,
            dtype=self.pair.dtype,
            threads=self.pair.threads,
            max_num_seqs=self.pair.max_num_seqs,
            num_drafts=self.num_drafts,
        )


def start_side(setup: Setup, side: Side) -> RunningSide:
    """Blocks until it is loaded. Raises PeerError, and NotAvailableError for a refused deployment."""
    if side.system == "Echelon":
        return EchelonSide(setup.pair, _variant(side.mode, setup.num_drafts))
    models = setup.models(speculate=side.mode != "plain")
    if side.system == "vLLM":
        assert setup.vllm_python is not None, "vLLM has no part without its Python"
        return PeerSide("vLLM", setup.vllm_python, models, vllm_environment(setup.vllm_python, models.threads))
    return PeerSide("transformers", Path(sys.executable), models, {})


def _variant(mode: str, num_drafts: int) -> Variant:
    return {"plain": PLAIN, "fixed": Variant(source="draft", num_drafts=num_drafts), "policy": Variant(source="draft")}[
        mode
    ]


def vllm_environment(python: Path, threads: int) -> dict[str, str]:
    """What vLLM's guide to CPUs advises: Intel's OpenMP, if it is installed beside vLLM, with the settings that vLLM
    gives its own workers. They come from here because the engine runs in the peer's process, without such a worker."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
    library = python.absolute().parents[1] / "lib" / "libiomp5.so"
    if library.exists():
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        environment |= {
            "LD_PRELOAD": ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)])),
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
            "KMP_BLOCKTIME": "5",  # ms that a thread spins before it sleeps
            "KMP_TPAUSE": "0",
        }
    return environment


class EchelonSide:
    """Through the gateway, with the Python client in this process."""

    def __init__(self, pair: Pair, variant: Variant) -> None:
        self._deployment = VariantDeployment(pair, variant)
        self._deployment.__enter__()
        self.about = f"Echelon {__version__}"

    def run(self, task: Task) -> Run:
        options: GenerateOptions = {"max_tokens": task.num_tokens, "temperature": 0.0, "ignore_eos": True}
        address = self._deployment.running.gateway_address
        timed = run_side_by_side(address, task.prompts, options, concurrency=task.concurrency)
        streams = [
            Stream(
                token_ids=completion.token_ids,
                first_token_s=arrivals_s[0],
                last_token_s=arrivals_s[-1],
                num_rounds=completion.speculation.num_rounds,
            )
            for completion, arrivals_s in zip(timed.completions, timed.arrivals_s, strict=True)
        ]
        return Run(streams=streams, seconds=timed.seconds)

    def close(self) -> None:
        self._deployment.stop()


class PeerSide:
    """A child that runs `bench/peers/<system>_child.py` with a Python of its own (`bench/peers/child.py`)."""

    def __init__(self, system: str, python: Path, models: Models, environment: Mapping[str, str]) -> None:
        self._name = system
        log = tempfile.NamedTemporaryFile(prefix=f"bench-peers-{system}-", suffix=".log", delete=False)  # noqa: SIM115
        with log:
            self._log = Path(log.name)
            self._process = subprocess.Popen(
                [str(python), "-m", f"bench.peers.{system.lower()}_child"],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        settings = "".join(f", {name}={value}" for name, value in environment.items())
        self.about = self._ask(asdict(models))["about"] + settings

    def run(self, task: Task) -> Run:
        answer = self._ask(asdict(task))
        return Run(streams=[Stream(**stream) for stream in answer["streams"]], seconds=answer["seconds"])

    def close(self) -> None:
        """Ends the child. Its log stays only if it failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            if self._process.wait(STOP_GRACE_S) == 0:
                self._log.unlink()
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it has ended
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise PeerError(f"{self._name} ended. The end of {self._log}:\n{last}") from None
        return answer
