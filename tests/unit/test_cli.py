"""The command line: what goes to which stream, and which exit code scripts see."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from checkpoint.eos import EosToken
from cluster import lifecycle
from cluster.errors import ConfigError, DeploymentNotFoundError, PlanError, Problem, StartError
from cluster.lifecycle import PlanMade, ProcessChanged, RayConnected
from cluster.planning.drafters import DrafterEstimate
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan, MemoryEstimate, Plan, ReplicaPlan
from cluster.process_id import ProcessId
from cluster.processes.status import DeploymentStatus, ProcessStatus, State, TierUse
from echelon import __version__
from echelon.cli import watch
from echelon.cli.app import main
from echelon.cli.watching import ReplicaView, TierView
from echelon.pb import control_pb2, inference_pb2, scheduler_pb2, worker_pb2
from tests.helpers.fake_gateway import FakeGateway, refuse, serving

RANK_0 = ProcessId(role="target", rank=0)
PLAN = Plan(
    deployment="demo",
    device="cpu",
    replicas=(
        ReplicaPlan(
            bundles=(
                Bundle(
                    group="target",
                    rank=0,
                    engines=("target",),
                    node_id="n",
                    address="127.0.0.1",
                    num_gpus=0,
                    num_cpus=1.0,
                    cpu_ids=(0, 1),
                    memory=MemoryEstimate(weight_bytes=3 << 30, kv_cache_bytes=5 << 20, activation_bytes=1 << 20),
                ),
            ),
            scheduler=ControlProcess(id=ProcessId(role="scheduler"), node_id="n", address="127.0.0.1"),
        ),
    ),
    gateways=(GatewayPlan(process=ControlProcess(id=ProcessId(role="gateway"), node_id="n", address="127.0.0.1")),),
    http_url="http://127.0.0.1:8000",
    eos=(EosToken(token_id=2, text="[/s]", files=("config.json", "tokenizer_config.json")),),
    notes=("cores are shared",),
)


def with_bundles(plan: Plan, bundles: tuple[Bundle, ...]) -> Plan:
    (replica,) = plan.replicas
    return dataclasses.replace(plan, replicas=(dataclasses.replace(replica, bundles=bundles),))


STATUS = DeploymentStatus(
    name="demo",
    state=State.READY,
    endpoint="127.0.0.1:50051",
    http_url="http://127.0.0.1:8000",
    model="demo-target",
    ray_address="127.0.0.1:6379",
    private_ray=True,
    processes=(ProcessStatus(id=RANK_0, state=State.READY, pid=7, address="127.0.0.1:9"),),
    settings={"batch_invariant": True},
)
BAD_KEY = ConfigError("d.yaml", [Problem(path="targt", message="is unknown", remedy="did you mean target?", line=3)])

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; returns exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as fake:
        yield fake


def stub(monkeypatch: pytest.MonkeyPatch, name: str, result: Any) -> list[tuple[Any, ...]]:
    """Replaces a function of cluster.lifecycle; returns the list of its calls' positional arguments."""
    calls: list[tuple[Any, ...]] = []

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if isinstance(result, BaseException):
            raise result
        return result(**kwargs) if callable(result) else result

    monkeypatch.setattr(lifecycle, name, replacement)
    return calls


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"echelon {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("plan", "up", "status", "down", "generate", "chat", "trace", "schema"):
        assert command in out
    assert "Exit codes: 0 success" in out


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("generate", "--max-token", "3", "x"), ("plan",), ("up", "a", "b")]
)
def test_misuse_exits_with_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err


def test_an_unknown_option_names_the_nearest(run: Run) -> None:
    assert "--temperature" in run("generate", "--temperatur", "1", "x")[2]


# generate


def test_generate_streams_the_text_only(run: Run, gateway: FakeGateway) -> None:
    assert run("generate", "Hi", "--address", gateway.address) == (0, "Hello\n", "")
    assert gateway.requests[0].text == "Hi"


def test_generate_passes_its_options_on(run: Run, gateway: FakeGateway) -> None:
    options = "-t 0.5 --max-tokens 4 --top-p 0.9 --top-k 3 --min-p 0.1 --seed 5 --stop a --stop b --ignore-eos "
    options += "--min-tokens 1 --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty -0.2 "
    options += (
        "--logprobs 2 --num-speculative-tokens 3 --model demo --timeout 60 --cache-salt tenant --attention budgeted"
    )
    assert run("generate", "Hi", "--address", gateway.address, *options.split())[0] == 0
    request = gateway.requests[0]
    sampling = {field.name: value for field, value in request.sampling.ListFields()}
    assert {name: value for name, value in sampling.items() if isinstance(value, int)} == {
        "max_tokens": 4, "top_k": 3, "seed": 5, "ignore_eos": True, "min_tokens": 1, "logprobs": 2,
    }  # fmt: skip
    assert list(sampling["stop"]) == ["a", "b"]
    assert sampling["frequency_penalty"] == pytest.approx(-0.2)
    assert request.speculation.num_speculative_tokens == 3
    assert request.cache_salt == "tenant"
    assert request.attention.mode == "budgeted"
    assert not request.speculation.HasField("enabled")
    assert 0 < gateway.time_remaining_s[0] < 61  # gRPC rounds deadlines


def test_no_speculation(run: Run, gateway: FakeGateway) -> None:
    run("generate", "Hi", "--address", gateway.address, "--no-speculation")
    assert gateway.requests[0].speculation.HasField("enabled")
    assert gateway.requests[0].speculation.enabled is False
    code, _, err = run("generate", "Hi", "--no-speculation", "--num-speculative-tokens", "2")
    assert code == 2
    assert "cannot be combined" in err


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_generate_reads_standard_input(run: Run, gateway: FakeGateway, arguments: tuple[str, ...]) -> None:
    code, out, _ = run("generate", "--address", gateway.address, *arguments, stdin="h\u00e9\n".encode())
    assert (code, out) == (0, "Hello\n")
    assert gateway.requests[0].text == "h\u00e9\n"


def test_invalid_utf8_on_standard_input(run: Run) -> None:
    code, _, err = run("generate", stdin=b"ab\xff")
    assert code == 2
    assert "standard input: invalid UTF-8 at byte 2" in err


def test_an_argument_that_is_not_unicode(run: Run) -> None:
    code, _, err = run("generate", "a\udcff")  # how Python represents a byte 0xff of the command line
    assert code == 2
    assert "prompt: is not valid Unicode" in err


def test_generate_json_is_one_document(run: Run, gateway: FakeGateway) -> None:
    code, out, err = run("generate", "Hi", "--address", gateway.address, "--json")
    completion = json.loads(out)
    assert (code, err) == (0, "")
    assert completion["samples"][0]["text"] == "Hello"
    assert completion["samples"][0]["finish_reason"] == "length"
    assert completion["speculation"]["num_accepted_tokens"] == 2
    assert completion["seed"] == 99
    usage = completion["usage"]
    assert [usage[f"cached_prompt_tokens{tier}"] for tier in ("", "_from_host", "_from_disk")] == [40, 36, 3]


def test_stats_go_to_standard_error(run: Run, gateway: FakeGateway) -> None:
    code, out, err = run("generate", "Hi", "--address", gateway.address, "--stats", "--no-stream")
    assert (code, out) == (0, "Hello\n")
    rows = [" ".join(line.split()) for line in err.splitlines()]
    assert "prompt tokens 44" in rows
    assert "from the prefix cache 40 (36 from host memory, 3 from disk)" in rows
    assert "tokens per target step 2.00" in rows
    assert "drafts accepted 2 of 4 (50%)" in rows
    assert "tokens/s 4.0" in rows
    assert "seed 99" in rows


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.UNAVAILABLE, 1),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_errors_of_the_server(run: Run, gateway: FakeGateway, status: grpc.StatusCode, code: int) -> None:
    gateway.script = refuse(status, "sampling.top_p: must be in (0, 1], got 7 [not markup]")
    assert run("generate", "Hi", "--address", gateway.address, "--top-p", "7") == (
        code,
        "",
        f"error: {status.name}: sampling.top_p: must be in (0, 1], got 7 [not markup]\n",
    )


def test_a_gateway_that_goes_away_leaves_one_line() -> None:
    """gRPC's core would write another one, by itself."""
    settings, goaway = bytes.fromhex("000000 04 00 00000000"), bytes.fromhex("000008 07 00 00000000 00000000 00000002")
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"

    def go_away() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            connection.recv(4096)
            connection.sendall(settings + goaway)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    threading.Thread(target=go_away, daemon=True).start()
    command = [sys.executable, "-m", "echelon.cli.app", "generate", "Hi", "--address", address]
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ended = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: UNAVAILABLE: ")
    assert "goaway" not in ended.stderr.lower()


@pytest.mark.parametrize("command", [("generate", "Hi"), ("chat",), ("status", "--watch"), ("trace", "-o", os.devnull)])
def test_an_unreachable_server_exits_with_status_1(run: Run, command: tuple[str, ...]) -> None:
    assert run(*command, "--address", "127.0.0.1:1") == (
        1,
        "",
        "error: UNAVAILABLE: no deployment answers at 127.0.0.1:1 (Connection refused); start one with `echelon up`, "
        "or give the address that `echelon status` shows\n",
    )


def test_an_interrupt_exits_with_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "plan", KeyboardInterrupt())
    code, _, err = run("plan", "d.yaml")
    assert (code, err) == (130, "error: interrupted\n")


# chat


def test_chat_keeps_the_history(run: Run, gateway: FakeGateway) -> None:
    lines = b"first\n\nsecond\n/reset\nthird\n/nonsense\n/quit\nnever\n"
    code, out, err = run("chat", "--address", gateway.address, "--system", "Be brief.", stdin=lines)
    assert (code, out) == (0, "Hello\nHello\nHello\n")
    conversations = [[(m.role, m.content) for m in request.chat.messages] for request in gateway.requests]
    system = ("system", "Be brief.")
    assert conversations == [
        [system, ("user", "first")],
        [system, ("user", "first"), ("assistant", "Hello"), ("user", "second")],
        [system, ("user", "third")],
    ]
    assert "unknown command /nonsense" in err


def test_chat_survives_an_error_and_forgets_its_message(run: Run, gateway: FakeGateway) -> None:
    hello = gateway.script
    failing = refuse(grpc.StatusCode.INVALID_ARGUMENT, "too long")
    gateway.script = lambda request, context: (
        failing(request, context) if request.chat.messages[-1].content == "bad" else hello(request, context)
    )
    code, out, err = run("chat", "--address", gateway.address, stdin=b"bad\ngood\n")
    assert (code, out) == (0, "Hello\n")
    assert "INVALID_ARGUMENT: too long" in err
    assert [m.content for m in gateway.requests[-1].chat.messages] == ["good"]


def test_chat_gives_variables_to_the_template(run: Run, gateway: FakeGateway) -> None:
    arguments = ("chat", "--address", gateway.address, "--chat-template-kwargs")
    code, _, _ = run(*arguments, '{"enable_thinking": false}', stdin=b"Hi\n")
    assert (code, gateway.requests[-1].chat.chat_template_kwargs) == (0, '{"enable_thinking": false}')
    for wrong, words in (("{", "is not JSON"), ("[]", "must be a JSON object, got []")):
        code, _, err = run(*arguments, wrong)
        assert code == 2
        assert f"--chat-template-kwargs: {words}" in err


def test_generate_adds_no_second_bos(run: Run, gateway: FakeGateway) -> None:
    code, _, _ = run("generate", "<s>Hi", "--address", gateway.address, "--no-special-tokens")
    assert code == 0
    assert gateway.requests[-1].HasField("add_special_tokens")
    assert not gateway.requests[-1].add_special_tokens


def test_chat_needs_a_template(run: Run, gateway: FakeGateway) -> None:
    gateway.has_chat_template = False
    code, _, err = run("chat", "--address", gateway.address)
    assert code == 2
    assert "'demo' has no chat template" in err


# trace


def test_trace_writes_what_it_receives(run: Run, gateway: FakeGateway, tmp_path: Path) -> None:
    span = worker_pb2.Span(name="verify", start_ns=5_000, run_ns=10_000)
    traced = scheduler_pb2.TracedRound(
        engine=worker_pb2.ENGINE_ROLE_TARGET, group="target", received_ns=90_000, run_ns=50_000, spans=[span]
    )
    gateway.control.events = [scheduler_pb2.TraceEvent(round=traced)] * 2
    out = tmp_path / "trace.json"
    code, stdout, err = run("trace", "--out", str(out), "--rounds", "2", "--address", gateway.address)
    assert (code, stdout) == (0, "")
    assert err.endswith(f"{out}: 2 rounds of the target group\n")
    assert "verify" in {event["name"] for event in json.loads(out.read_text())["traceEvents"]}
    run("trace", "--out", str(out), "--address", gateway.address)
    run("trace", "--out", str(out), "--seconds", "2", "--rounds", "9", "--replica", "1", "--address", gateway.address)
    limits = [(r.trace.num_rounds, r.trace.duration_s, r.replica) for r in gateway.control.traces]
    assert limits == [(2, 0.0, 0), (0, 5.0, 0), (9, 2.0, 1)]


def test_an_empty_trace_exits_with_status_1(run: Run, gateway: FakeGateway, tmp_path: Path) -> None:
    code, _, err = run("trace", "--out", str(tmp_path / "trace.json"), "--address", gateway.address)
    assert (code, "no round ran" in err) == (1, True)


def test_a_trace_that_breaks_off_is_kept(run: Run, gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.control.events = [scheduler_pb2.TraceEvent(round=scheduler_pb2.TracedRound(group="draft"))]
    gateway.control.lost = True
    out = tmp_path / "trace.json"
    code, _, err = run("trace", "--out", str(out), "--address", gateway.address)
    assert (code, "ended early: UNAVAILABLE: lost" in err) == (0, True)
    assert json.loads(out.read_text())["traceEvents"]
    gateway.control.events = []
    assert run("trace", "--out", str(out), "--address", gateway.address)[0] == 1


def test_a_trace_needs_a_file_that_can_be_written(run: Run, gateway: FakeGateway, tmp_path: Path) -> None:
    code, _, err = run("trace", "--out", str(tmp_path / "no" / "trace.json"), "--address", gateway.address)
    assert (code, gateway.control.traces) == (2, [])
    assert "trace.json cannot be written: No such file" in err


# status --watch


def replicas(**counters: Any) -> control_pb2.GetReplicasResponse:
    status = scheduler_pb2.SchedulerStatus(**{"ready": True, "num_blocks": 4, "num_free_blocks": 3, **counters})
    return control_pb2.GetReplicasResponse(replicas=[control_pb2.ReplicaStatus(status=status)])


def test_watch_prints_a_line_of_json_each_time(run: Run, gateway: FakeGateway) -> None:
    gateway.control.statuses = [replicas(), replicas(generation_tokens_total=8), replicas(num_requests_running=2)]
    options = ("--json", "--interval", "0.1", "--count", "2", "--address", gateway.address)
    code, out, err = run("status", "--watch", *options)
    first, second = [json.loads(line)["replicas"][0] for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert 0 < first["tokens_per_s"] <= 80
    assert (first["ready"], first["kv_cache_usage"], first["acceptance_rate"]) == (True, 0.25, None)
    assert (second["num_requests_running"], second["replica"]) == (2, 0)


def test_watch_ends_cleanly_at_ctrl_c(run: Run, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", nap)
    stub(monkeypatch, "status", dataclasses.replace(STATUS, endpoint=gateway.address))
    speculation = inference_pb2.SpeculationStats(num_drafts=2)
    gateway.control.statuses = [
        replicas(speculation_total=speculation, acceptance_rate=0.9, drafts_per_verification=3.25)
    ]
    code, out, err = run("status", "demo", "--watch")
    assert (code, err, naps) == (0, "", [1.0, 1.0, 1.0])
    line = (
        "replica 0: tokens/s=0.0 running=0 waiting=0 acceptance=90% k=3.2 draft_idle=0% verify_wait=0% "
        "verdict_cache_hits=- window=- kv=25%\n"
    )
    assert out == 2 * line


def test_watch_prints_a_line_for_each_tier(run: Run, gateway: FakeGateway) -> None:
    def tier(num_fetched: int, **fields: Any) -> control_pb2.GetReplicasResponse:
        disk = scheduler_pb2.TierStatus(
            engine=worker_pb2.ENGINE_ROLE_TARGET,
            tier="disk",
            num_blocks=2048,
            num_used_blocks=256,
            block_bytes=1 << 20,
            fetched_blocks_total=num_fetched,
            **fields,
        )
        return replicas(tiers=[disk])

    gateway.control.statuses = [tier(3), tier(3), tier(3, paused=True, last_error="no space left on device")]
    code, out, _ = run("status", "--watch", "--interval", "0.1", "--count", "2", "--address", gateway.address)
    assert code == 0
    lines = [line for line in out.splitlines() if "disk" in line]
    line = "replica 0 target disk: used=256.0MiB of=2.0GiB hits=0 fetched/s=0.0MiB stored/s=0.0MiB"
    assert lines == [line, f"{line} (paused after errors, the last one: no space left on device)"]


def test_watch_shows_a_table_on_a_terminal(gateway: FakeGateway) -> None:
    console = Console(file=io.StringIO(), width=80)
    busy = ReplicaView(
        replica=0, ready=True, reason="", tokens_per_s=123.4, draft_idle_share=0.25, verdict_cache_hit_rate=0.5
    )
    lost = ReplicaView(replica=1, ready=False, reason="UNAVAILABLE: gone")
    console.print(watch.views_table([busy, lost]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in (" replica ", " tok/s ", "cache", "123.4", "25%", "50%", "replica 1 is not ready: UNAVAILABLE: gone"):
        assert word in text


def test_watch_shows_a_table_of_tiers_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    disk = TierView(
        engine="target",
        tier="disk",
        used_bytes=256 << 20,
        capacity_bytes=2 << 30,
        num_hits=7,
        fetched_bytes_per_s=float(3 << 20),
        paused=True,
        last_error="full",
    )
    bare = ReplicaView(replica=0, ready=True, reason="")
    assert len(watch.tables([bare])) == 1
    for table in watch.tables([dataclasses.replace(bare, tiers=(disk,))]):
        console.print(table)
    rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert "0 target disk 256.0 MiB 2.0 GiB 7 3.0 MiB - paused" in rows
    assert "replica 0 target disk: paused after errors, the last one: full" in rows


def test_watch_needs_a_deployment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "status", dataclasses.replace(STATUS, state=State.STARTING, endpoint=""))
    code, _, err = run("status", "demo", "--watch")
    assert (code, "demo is STARTING and has no gateway yet" in err) == (1, True)
    code, _, err = run("status", "demo", "--address", "127.0.0.1:1")
    assert (code, "need --watch" in err) == (2, True)


# plan, up, status, down, schema


def test_plan_shows_every_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, "plan", PLAN)
    code, out, _ = run("plan", "d.yaml")
    assert code == 0
    assert calls == [(Path("d.yaml"),)]
    for text in ("target-0.0", "scheduler-0", "gateway-0", "cores 0, 1", "3.0 GiB", "note: cores are shared"):
        assert text in out
    assert "a stream stops at token 2 '[/s]' (config.json, tokenizer_config.json)" in " ".join(out.split())


def test_plan_shows_what_drafters_would_gain_if_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drafters = tuple(
        DrafterEstimate(
            name="self, int4, colocated",
            acceptance=acceptance,
            step_bytes=5 << 30,
            step_s=0.25,
            num_drafts=num_drafts,
            speedup=1.5,
        )
        for acceptance, num_drafts in ((0.7, 2), (0.9, 6))
    )
    stub(monkeypatch, "plan", dataclasses.replace(PLAN, drafters=drafters))
    code, out, _ = run("plan", "d.yaml", "--acceptance", "0.7", "--acceptance", "0.9", "--bandwidth", "20")
    assert code == 0
    for text in ("self, int4, colocated", "5.0 GiB", "250.0 ms", "0.7 accepted", "1.5 (2)", "1.5 (6)", "are assumed"):
        assert text in out


def test_plan_shows_host_memory_for_kv_where_there_is_any(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle,) = PLAN.bundles
    tiered = dataclasses.replace(bundle, memory=dataclasses.replace(bundle.memory, host_bytes=7 << 30))
    for bundles, is_shown in (((bundle,), False), ((tiered,), True)):
        stub(monkeypatch, "plan", with_bundles(PLAN, bundles))
        _, out, _ = run("plan", "d.yaml")
        assert ("host KV" in out, "7.0 GiB" in out) == (is_shown, is_shown)


def test_a_plan_names_each_node_once_and_fits_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryEstimate(
        weight_bytes=3 << 30, kv_cache_bytes=500 << 20, activation_bytes=1 << 20, host_bytes=7 << 30
    )
    (bundle,) = PLAN.bundles
    plan = dataclasses.replace(PLAN, http_url="")
    stub(monkeypatch, "plan", with_bundles(plan, (dataclasses.replace(bundle, memory=memory),)))
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("plan", "d.yaml")
    assert "…" not in out
    assert out.count("127.0.0.1") == 1
    elsewhere = dataclasses.replace(bundle, address="10.0.0.2")
    stub(monkeypatch, "plan", with_bundles(plan, (elsewhere,)))
    _, out, _ = run("plan", "d.yaml")
    assert "…" not in out
    lines = [line.split()[:2] for line in out.splitlines() if line.strip()]
    places = [lines.index(["node", "10.0.0.2"]), lines.index(["target-0.0", "cores"])]
    places += [lines.index(["node", "127.0.0.1"]), lines.index(["scheduler-0"]), lines.index(["gateway-0"])]
    assert places == sorted(places)
    assert out.count("10.0.0.2") == 1


def test_plan_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "plan", PLAN)
    code, out, _ = run("plan", "d.yaml", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["replicas"][0]["bundles"][0]["memory"]["weight_bytes"] == 3 << 30
    assert shown["replicas"][0]["scheduler"]["name"] == "scheduler-0"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BAD_KEY, 2, "d.yaml: line 3: targt: is unknown; did you mean target?"),
        (PlanError("no place for target rank 0"), 1, "no place for target rank 0"),
        (StartError("target-0.0: no weights", "traceback"), 1, "target-0.0: no weights"),
        (DeploymentNotFoundError("there is no deployment 'x'"), 1, "there is no deployment 'x'"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "up", "down", "status"])
def test_errors_of_the_cluster(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception, code: int, message: str
) -> None:
    stub(monkeypatch, command, error)
    got, out, err = run(command, "x")
    assert (got, out) == (code, "")
    assert err.endswith(f"error: {message}\n")


def test_up_reports_progress_and_the_endpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def up(*, on_event: Callable[[Any], None], timeout_s: float, ray_address: str | None) -> DeploymentStatus:
        assert (timeout_s, ray_address) == (90, "10.0.0.1:6379")
        on_event(RayConnected(address="10.0.0.1:6379", private=False))
        on_event(PlanMade(plan=PLAN))
        loading = ProcessStatus(id=RANK_0, state=State.STARTING, stage="loading", done=1, total=4)
        on_event(ProcessChanged(process=ProcessStatus(id=RANK_0)))
        for done in (1, 2, 3):
            on_event(ProcessChanged(process=dataclasses.replace(loading, done=done)))
        on_event(ProcessChanged(process=STATUS.processes[0]))
        return STATUS

    stub(monkeypatch, "up", up)
    code, out, err = run("up", "d.yaml", "--timeout", "90", "--ray-address", "10.0.0.1:6379")
    assert code == 0
    assert "demo serves demo-target at 127.0.0.1:50051" in out
    assert "OpenAI API: http://127.0.0.1:8000/v1, metrics: http://127.0.0.1:8000/metrics" in out
    assert "OpenAI's API will be at http://127.0.0.1:8000/v1" in err
    assert "connected to Ray at 10.0.0.1:6379" in err
    assert err.count("target-0.0 STARTING loading\n") == 1  # one line per change of state, not per step
    assert "target-0.0 READY 127.0.0.1:9\n" in err
    code, out, _ = run("up", "d.yaml", "--timeout", "90", "--ray-address", "10.0.0.1:6379", "--json")
    assert code == 0
    assert json.loads(out)["endpoint"] == "127.0.0.1:50051"


def test_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, "status", STATUS)
    stub(monkeypatch, "list_deployments", ["demo"])
    code, out, _ = run("status")
    assert code == 0
    assert calls == [("demo",)]
    assert "demo is READY" in out
    assert "target-0.0" in out
    assert "batch_invariant true" in out
    shown = json.loads(run("status", "demo", "--json")[1])
    assert shown["state"] == "READY"
    assert shown["processes"][0]["name"] == "target-0.0"
    assert shown["processes"][0]["id"] == {"role": "target", "replica": 0, "rank": 0}


def test_the_status_of_what_cannot_be_asked_has_no_empty_fields(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = DeploymentStatus(name="demo", state=State.FAILED, reason="its Ray is gone", ray_address="10.0.0.1:6379")
    stub(monkeypatch, "status", lost)
    assert run("status", "demo")[1] == "demo is FAILED: its Ray is gone\nRay 10.0.0.1:6379\n"


def test_status_shows_spares(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> list[str]:
        out = run("status", "demo")[1]
        return next(line for line in out.splitlines() if line.lstrip().startswith("target-0.0")).split()

    stub(monkeypatch, "status", STATUS)
    assert "ready" not in row()
    (rank,) = STATUS.processes
    stub(monkeypatch, "status", dataclasses.replace(STATUS, processes=(dataclasses.replace(rank, spare="ready"),)))
    assert row()[-2:] == ["ready", "127.0.0.1:9"]


def test_status_shows_the_tiers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = TierUse(
        engine="draft",
        tier="disk",
        used_bytes=512 << 20,
        capacity_bytes=8 << 30,
        num_stored=30,
        num_fetched=20,
        num_failed=3,
        num_damaged=2,
        num_evicted=1,
        saved_s=7.25,
        paused=True,
        last_error="no space left on device",
    )
    stub(monkeypatch, "status", dataclasses.replace(STATUS, tiers=(disk,)))
    _, out, _ = run("status", "demo")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "draft disk 512.0 MiB 8.0 GiB 30 20 3 (2) 1 7.2 s paused" in rows
    assert "draft disk: paused after errors, the last one: no space left on device" in " ".join(rows)
    assert json.loads(run("status", "demo", "--json")[1])["tiers"][0]["capacity_bytes"] == 8 << 30


@pytest.mark.parametrize(
    ("state", "code"), [(State.READY, 0), (State.DEGRADED, 0), (State.STARTING, 1), (State.FAILED, 1)]
)
def test_status_exits_with_0_only_if_the_deployment_serves(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: State, code: int
) -> None:
    stub(monkeypatch, "status", dataclasses.replace(STATUS, state=state, reason="because"))
    got, out, _ = run("status", "demo")
    assert got == code
    assert f"demo is {state}: because" in out


def test_down(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, "down", None)
    stub(monkeypatch, "list_deployments", ["demo"])
    code, out, err = run("down")
    assert (code, out) == (0, "")
    assert "demo is down" in err
    assert calls == [("demo",)]


@pytest.mark.parametrize("command", ["status", "down"])
def test_commands_find_the_deployment(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    stub(monkeypatch, "list_deployments", ["a", "b"])
    code, _, err = run(command)
    assert code == 2
    assert "name one of them: a, b" in err
    stub(monkeypatch, "list_deployments", [])
    code, _, err = run(command)
    assert code == 1
    assert "no deployment was started from this machine" in err


def test_restart_of_a_part_without_its_deployment_says_how(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, "restart", STATUS)
    stub(monkeypatch, "list_deployments", ["demo"])
    code, _, err = run("restart", "target-0.1")
    assert code == 2
    assert "'target-0.1' is no deployment; known: demo." in err
    assert "echelon restart demo --rank target-0.1" in err
    assert not calls
    assert run("restart", "demo", "--rank", "target-0.1")[0] == 0
    assert calls == [("demo", ["target-0.1"])]


def test_schema_is_json(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert "target" in json.loads(out)["properties"]


def test_a_missing_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cluster.deployment.schema", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)  # as if it were not installed
    code, _, err = run("schema")
    assert code == 2
    assert "needs the package 'pydantic'" in err
    assert "pip install 'echelon[cluster]'" in err
