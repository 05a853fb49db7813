"""`make demo`: deploy the bundled pair on this machine, show what speculation and the KV cache's tiers do and that
a stream survives the loss of a rank, clean up.

It uses the public interfaces: `cluster.lifecycle` (as `echelon up` and `echelon down` do) and `echelon.Client`. Ray
and the deployment keep their state in a temporary folder, so the demo touches no other Ray or deployment.
"""

import argparse
import inspect
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from cluster import lifecycle
from cluster.errors import ConfigError, PlanError, StartError
from echelon.cli.deploy import StartupDisplay
from echelon.client import Client
from echelon.errors import EchelonError
from echelon.results import Completion

DEPLOYMENT = Path(__file__).with_name("demo.yaml")
PROMPT = '''import argparse


def main():
    parser = argparse.ArgumentParser(description="Count the words of a file.")
    parser.add_argument("filename", help="'''
MAX_TOKENS = 96
SEED = 7
NUM_TIMED_RUNS = 3  # of each kind, in turns
LONG_PROMPT_CHARS = 6400
KILLED = "target-0.1"
SHOWN_PAUSE_S = 0.5
NUM_TOKENS_AFTER = 16  # that are asked for after a long prompt


def main() -> int:
    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="echelon-demo-") as folder:
            file = own_copy(Path(folder))
            with deployed(file, console) as address:
                show_speculation(console, address)
                survive(console, address)
                asked = ask_again(console, address)  # a rank that is killed loses what it was writing to disk
            with deployed(file, console) as address:
                asked |= ask_after_restart(console, address)
            report_prefix(console, asked)
        console.print("\neverything is stopped; no process is left")
    except KeyboardInterrupt:
        console.print("\ninterrupted", style="bold")
        return 130
    except (ConfigError, PlanError, StartError, EchelonError) as err:
        console.print("error:", style="bold red", end=" ")
        console.print(str(err), markup=False)
        return 1
    return 0


@contextmanager
def deployed(file: Path, console: Console) -> Iterator[str]:
    """Brings the pair up with a Ray of its own; yields the gateway's address; takes everything down again."""
    os.environ["ECHELON_STATE_DIR"] = str(file.parent / "state")
    os.environ.pop("RAY_ADDRESS", None)
    with StartupDisplay(console) as display:
        status = lifecycle.up(file, on_event=display.on_event)  # cleans up itself when it fails
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # now: Ray had installed, and removed, its own
        console.print(
            f"{status.model} is served at {status.endpoint}, to clients of OpenAI's API at {status.http_url}/v1\n"
        )
        yield status.endpoint
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
        with console.status("stopping everything"):
            lifecycle.down(status.name)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def own_copy(folder: Path) -> Path:
    """demo.yaml with its disk tier in this folder, and with other ports where those in demo.yaml are in use."""
    content = yaml.safe_load(DEPLOYMENT.read_text())
    content["kv_cache"]["disk"]["path"] = str(folder / "kv")
    for key, port in content["server"].items():
        content["server"][key] = free_port(port)
    for model in (content["target"], content["draft"]):
        model["model"] = str((DEPLOYMENT.parent / model["model"]).resolve())
    copy = folder / "demo.yaml"
    copy.write_text(yaml.safe_dump(content))
    return copy


def free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- speculation ------------------------------------------------------------------------------------------------------


def show_speculation(console: Console, address: str) -> None:
    with Client(address) as client:
        for enabled in (True, False):
            complete(client, speculation=enabled, max_tokens=16)  # the first request warms everything up
        console.print(PROMPT, style="dim", end="", markup=False, soft_wrap=True)
        with client.stream(PROMPT, max_tokens=MAX_TOKENS, temperature=0.8, seed=SEED) as stream:
            for chunk in stream:
                console.print(chunk.text, end="", markup=False, soft_wrap=True)
            shown = stream.result()
        console.print("\n")
        runs = [
            (complete(client, speculation=True), complete(client, speculation=False)) for _ in range(NUM_TIMED_RUNS)
        ]
    report(console, [shown, *(run for run, _ in runs)], [run for _, run in runs])


def complete(client: Client, *, speculation: bool, max_tokens: int = MAX_TOKENS) -> Completion:
    return client.generate(
        PROMPT, max_tokens=max_tokens, temperature=0.8, seed=SEED, speculation={"enabled": speculation}
    )


def report(console: Console, with_draft: list[Completion], without: list[Completion]) -> None:
    """Show what speculation did, and whether it changed the output."""
    table = Table("", "with the draft", "target alone", box=box.SIMPLE_HEAD)
    sides = (with_draft[-1], without[-1])
    speeds = [statistics.median(tokens_per_s(run) for run in runs) for runs in (with_draft[1:], without)]
    table.add_row("tokens", *(str(run.usage.completion_tokens) for run in sides))
    table.add_row("target steps", *(str(run.speculation.num_rounds) for run in sides))
    table.add_row("tokens per target step", *(f"{run.tokens_per_target_step or 0:.2f}" for run in sides))
    table.add_row("drafts accepted per round", *(accepted_per_round(run) for run in sides))
    table.add_row(f"tokens/s (median of {NUM_TIMED_RUNS})", *(f"{speed:.0f}" for speed in speeds))
    console.print(table)
    reference = without[0].token_ids
    if all(run.token_ids == reference for run in (*with_draft, *without)):
        console.print("The output is identical with and without the draft.", style="bold green")
    else:
        first = min(first_difference(run.token_ids, reference) for run in (*with_draft, *without))
        console.print(
            f"The outputs differ from token {first} on: two candidates are too close there for bfloat16. "
            "Set batch_invariant: true in deploy/demo.yaml to exclude that.",
            style="yellow",
        )
    console.print(
        f"With the draft, decoding ran at {speeds[0] / speeds[1]:.2f} times the speed of the target alone, on "
        f"{os.cpu_count()} cores for two target ranks and one draft rank."
    )


def tokens_per_s(run: Completion) -> float:
    """Decoding speed, without the queue and the prompt."""
    return (run.usage.completion_tokens - 1) / (run.timings.total_s - run.timings.first_token_s)


def accepted_per_round(run: Completion) -> str:
    stats = run.speculation
    if not stats.num_drafts:
        return "none drafted"
    return f"{stats.num_accepted_tokens / stats.num_drafts:.2f} of {stats.num_draft_tokens / stats.num_drafts:.2f}"


def first_difference(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


# -- a rank that dies -------------------------------------------------------------------------------------------------


def survive(console: Console, address: str) -> None:
    """Kill a rank of the target in the middle of a stream; the stream goes on."""
    (name,) = lifecycle.list_deployments()
    pid = next(process.pid for process in lifecycle.status(name).processes if process.name == KILLED)
    assert pid is not None, "a deployment that serves has all its processes"
    with Client(address) as client:
        undisturbed = complete(client, speculation=True)
        console.print("The same prompt again; half way, a rank of the target is killed.\n")
        text = stream_and_kill(console, client, pid, len(undisturbed.text) // 2)
    if text == undisturbed.text:
        console.print("\n\nThe text is the same as without the loss.", style="bold green")
    else:
        console.print("\n\nThe texts differ: two candidates are too close for bfloat16.", style="yellow")
    for event in lifecycle.status(name).events:
        console.print(f"{event.part} {event.text}", style="dim", markup=False, soft_wrap=True)


def stream_and_kill(console: Console, client: Client, pid: int, num_chars: int) -> str:
    """Show a stream; end the process once so much text has come. Returns the whole text."""
    text, is_killed, last_s = "", False, time.monotonic()
    with client.stream(PROMPT, max_tokens=MAX_TOKENS, temperature=0.8, seed=SEED) as stream:
        for chunk in stream:
            now = time.monotonic()
            if now - last_s > SHOWN_PAUSE_S:
                console.print(f"[{now - last_s:.1f} s later]", style="bold", markup=False, end="")
            last_s = now
            text += chunk.text
            console.print(chunk.text, end="", markup=False, soft_wrap=True)
            if not is_killed and len(text) >= num_chars:
                os.kill(pid, signal.SIGKILL)
                is_killed = True
                console.print(f"[{KILLED}, pid {pid}, is killed]", style="bold red", markup=False, end="")
    return text


# -- the KV cache -----------------------------------------------------------------------------------------------------


def long_prompts() -> list[str]:
    """Texts of about 1,800 tokens, no two alike from the first word on: pieces of the standard library."""
    source = inspect.getsource(argparse)
    return [source[start : start + LONG_PROMPT_CHARS] for start in range(0, 4 * LONG_PROMPT_CHARS, LONG_PROMPT_CHARS)]


def ask(client: Client, prompt: str) -> Completion:
    return client.generate(prompt, max_tokens=NUM_TOKENS_AFTER, temperature=0)


def ask_again(console: Console, address: str) -> dict[str, Completion]:
    """A long prompt, and the same one after others have pushed its KV out of the devices."""
    prompt, *others = long_prompts()
    with Client(address) as client, console.status("asking a long prompt, then others, then the first again"):
        first = ask(client, prompt)
        for other in others:
            ask(client, other)
        return {"first": first, "after others": ask(client, prompt)}


def ask_after_restart(console: Console, address: str) -> dict[str, Completion]:
    with Client(address) as client, console.status("asking the long prompt after the restart"):
        complete(client, speculation=True, max_tokens=16)
        return {"after a restart": ask(client, long_prompts()[0])}


def report_prefix(console: Console, asked: dict[str, Completion]) -> None:
    """Show where the KV of the prompt came from, and how long the first token took."""
    table = Table("a prompt asked", "tokens", "computed", "host memory", "disk", "first token", box=box.SIMPLE_HEAD)
    for when, run in asked.items():
        usage = run.usage
        counts = (
            usage.prompt_tokens,
            usage.prompt_tokens - usage.cached_prompt_tokens,
            usage.cached_prompt_tokens_from_host,
            usage.cached_prompt_tokens_from_disk,
        )
        table.add_row(when, *map(str, counts), f"{1e3 * run.timings.first_token_s:.0f} ms")
    console.print(table)
    if len({run.token_ids for run in asked.values()}) == 1:
        console.print("The output is identical each time.", style="bold green")
    else:
        console.print("The outputs differ: two candidates are too close for bfloat16.", style="yellow")


if __name__ == "__main__":
    sys.exit(main())
