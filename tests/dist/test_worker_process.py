"""Worker groups as deployed: processes, gloo, gRPC."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from childproc.edge import EXIT_PARENT_DIED
from childproc.wires import open_blocking_channel
from echelon import __version__
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import EngineRole, GetWorkerInfoRequest, Row, WorkerInfo
from echelon.pb.worker_pb2_grpc import WorkerStub
from tests.helpers.engines import DRAFT, TARGET, engine_spec, interleave
from tests.helpers.listening import listening_sockets
from tests.helpers.rounds import INCARNATION, Driver, greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.worker_client import RoundStream, WorkerGroup

PROMPTS = [[5, 99, 3, 14, 15, 92, 6, 53, 58, 9, 79], [31, 41], [7] * 17, [1, 2, 3]]
SAMPLINGS = [
    greedy(logprobs=2),
    seeded(1, top_k=20, presence_penalty=1.5),
    seeded(2, top_p=0.8, repetition_penalty=1.3, logit_bias={4: 3.0}),
    seeded(3, min_p=0.05, logprobs=1),
]
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture(scope="module")
def solo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    """Target and draft in one process, which SIGTERM ends."""
    engines = [engine_spec(tiny, TARGET), engine_spec(tiny, DRAFT)]
    with WorkerGroup(tmp_path_factory.mktemp("solo"), 1, engines) as group:
        yield group.spawn().wait_ready()
        group.ranks[0].popen.terminate()
        assert group.ranks[0].popen.wait() == 0


def streams(group: WorkerGroup) -> list[list[int]]:
    """What the group generates for all prompts: by plain decoding, and in a mix of chunks and drafts."""
    with RoundStream(group.ready.address, TARGET) as stream:
        driver = Driver(group.ready.worker.engines[0], stream.call)
        plain = []
        for slot, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
            plain.append(driver.generate(driver.start(slot, prompt, sampling), NUM_TOKENS))
        seqs = [driver.start(slot + 4, prompt, SAMPLINGS[slot]) for slot, prompt in enumerate(PROMPTS)]
        interleave(driver, list(zip(seqs, plain, strict=True)), random.Random(5), NUM_TOKENS)
        assert [seq.output[:NUM_TOKENS] for seq in seqs] == plain
    return plain


def in_flight_stream(group: WorkerGroup, sampling: SeqSampling, depth: int) -> list[int]:
    """Plain decoding with `depth` rounds in flight; each round is built before any answer."""
    with RoundStream(group.ready.address, TARGET) as stream:
        driver = Driver(group.ready.worker.engines[0], stream.call)
        seq = driver.start(0, PROMPTS[0], sampling)
        rounds = [driver.round([driver.target_row(seq)])]
        for n in range(1, NUM_TOKENS):
            blocks = driver.blocks_for(seq, len(PROMPTS[0]) + n)
            rounds.append(driver.round([Row(slot=0, chunk_len=1, new_block_ids=blocks)]))
        for round_ in rounds[:depth]:
            stream.send(round_)
        output: list[int] = []
        for index in range(NUM_TOKENS):
            result = stream.receive()
            assert result.round_id == rounds[index].round_id
            output += result.rows[0].token_ids
            if index + depth < NUM_TOKENS:
                stream.send(rounds[index + depth])
    return output


@pytest.mark.parametrize("tp_size", [2, 4])
def test_the_stream_does_not_depend_on_tp_size(tiny: Path, tmp_path: Path, solo: WorkerGroup, tp_size: int) -> None:
    with WorkerGroup(tmp_path, tp_size, [engine_spec(tiny, TARGET, tp_size=tp_size)]) as group:
        group.spawn().wait_ready()
        assert streams(group) == streams(solo)
        # The leader listens for its store and its server; the others stop listening once the ranks have met.
        doors = [len(listening_sockets([rank.popen.pid])) for rank in group.ranks]
        assert doors == [2, *[0] * (tp_size - 1)]
        expected = in_flight_stream(group, seeded(8), depth=1)
        assert in_flight_stream(group, seeded(8), depth=2) == expected
        for rank in group.ranks:
            rank.popen.terminate()
        assert [rank.popen.wait() for rank in group.ranks] == [0] * tp_size


@pytest.fixture(scope="module")
def duo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    with WorkerGroup(tmp_path_factory.mktemp("duo"), 2, [engine_spec(tiny, TARGET, tp_size=2)]) as group:
        yield group.spawn().wait_ready()


def test_a_trace_shows_all_ranks(duo: WorkerGroup) -> None:
    """Both ranks wait for each other in the collectives of the step. The rounds before and after are not traced."""
    with RoundStream(duo.ready.address, TARGET) as stream:
        driver = Driver(duo.ready.worker.engines[0], stream.call)
        seq = driver.start(0, PROMPTS[0], greedy())
        for trace in (False, True, False):
            row = driver.target_row(seq)
            result = stream.call(driver.round([row], trace=trace))
            driver.book(seq, row, result.rows[0])
            names = [{span.name for span in result.spans if span.rank == rank} for rank in (0, 1)]
            common = {"decode", "sample", "wait"} if trace else set()
            assert names == [common | {"transfer"} if trace else common, common]
            assert all(span.start_ns + span.run_ns <= result.run_ns for span in result.spans if span.rank == 0)


def test_an_idle_group_tells_which_rank_does_not_answer(duo: WorkerGroup) -> None:
    with open_blocking_channel(duo.ready.address) as channel:

        def wait_until_silent(is_silent: bool) -> WorkerInfo:
            """Fails by the test's own time limit."""
            while True:
                info = WorkerStub(channel).GetWorkerInfo(GetWorkerInfoRequest())
                if (info.silent_s > 1.5) == is_silent:
                    return info

        assert wait_until_silent(False).engines
        duo.ranks[1].popen.send_signal(signal.SIGSTOP)
        assert wait_until_silent(True).silent_rank == 1
        duo.ranks[1].popen.send_signal(signal.SIGCONT)
        wait_until_silent(False)


def test_target_and_draft_take_turns_in_one_process(solo: WorkerGroup) -> None:
    """Draft, verify, crop, as a scheduler does. The draft is the target itself, so every draft is accepted."""
    address, (target_info, draft_info) = solo.ready.address, solo.ready.worker.engines
    with RoundStream(address, TARGET) as target_stream, RoundStream(address, DRAFT) as draft_stream:
        target, draft = Driver(target_info, target_stream.call), Driver(draft_info, draft_stream.call)
        expected = target.generate(target.start(1, PROMPTS[0], SAMPLINGS[2]), NUM_TOKENS)
        seq, chain = target.start(0, PROMPTS[0], SAMPLINGS[2]), draft.start(0, PROMPTS[0], SAMPLINGS[2])
        target.run((seq, target.target_row(seq)))
        while len(seq.output) < NUM_TOKENS:
            known = len(chain.token_ids)
            draft.run((chain, draft.draft_row(chain, 3, append=seq.token_ids[known:])))
            drafts = chain.token_ids[len(seq.token_ids) :]
            (result,) = target.run((seq, target.target_row(seq, drafts=drafts)))
            assert result.num_accepted_tokens == len(drafts)
        assert seq.output[:NUM_TOKENS] == expected


def test_info_and_health(solo: WorkerGroup) -> None:
    with open_blocking_channel(solo.ready.address) as channel:
        info = WorkerStub(channel).GetWorkerInfo(GetWorkerInfoRequest())
        assert info == solo.ready.worker
        assert (info.version, info.incarnation, info.world_size) == (__version__, INCARNATION, 1)
        assert [engine.role for engine in info.engines] == [TARGET, DRAFT]
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "echelon.v1.Worker", "target", "draft"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        (TARGET, {"incarnation": 6}, ["6", str(INCARNATION)]),
        (TARGET, {"version": "9.9"}, ["9.9", __version__]),
        (5, {}, ["5", "ENGINE_ROLE_TARGET"]),
    ],
)
def test_a_hello_to_another_group_is_refused(
    solo: WorkerGroup, role: EngineRole.ValueType, changes: dict[str, object], words: list[str]
) -> None:
    with RoundStream(solo.ready.address, role, **changes) as stream:
        code, details = stream.ending()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert all(word in details for word in words)


def test_a_bad_round_ends_only_its_stream(solo: WorkerGroup) -> None:
    with RoundStream(solo.ready.address, TARGET) as stream, RoundStream(solo.ready.address, DRAFT) as other:
        target, draft = (
            Driver(info, s.call) for info, s in zip(solo.ready.worker.engines, (stream, other), strict=True)
        )
        chain = draft.start(0, PROMPTS[0], greedy())
        draft.run((chain, draft.draft_row(chain, 2)))
        stream.send(target.round([Row(slot=3, chunk_len=1)]))
        code, details = stream.ending()
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "round 1: rows[0] (slot 3): slot: holds no seq",
        )
        (result,) = draft.run((chain, draft.draft_row(chain, 2)))
        assert len(result.token_ids) == 2
    with RoundStream(solo.ready.address, TARGET) as stream:
        target = Driver(solo.ready.worker.engines[0], stream.call)
        assert target.generate(target.start(0, PROMPTS[0], greedy()), 2)


def test_a_new_scheduler_replaces_the_old_one(solo: WorkerGroup) -> None:
    info = solo.ready.worker.engines[0]
    with RoundStream(solo.ready.address, TARGET) as old:
        driver = Driver(info, old.call)
        driver.generate(driver.start(0, PROMPTS[0], greedy()), 1)
        with RoundStream(solo.ready.address, TARGET) as new:
            driver = Driver(info, new.call)
            driver.generate(driver.start(0, PROMPTS[0], greedy()), 1)
        assert old.ending()[0] == grpc.StatusCode.ABORTED


def test_a_half_closed_stream_gets_its_last_answers(solo: WorkerGroup) -> None:
    with RoundStream(solo.ready.address, TARGET) as stream:
        driver = Driver(solo.ready.worker.engines[0], stream.call)
        seq = driver.start(0, PROMPTS[0], greedy())
        stream.send(driver.round([driver.target_row(seq)]))
        stream.half_close()
        assert [len(result.rows[0].token_ids) for result in stream.rest()] == [1]


# -- failures -------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors"


def widen(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 88', '"intermediate_size": 96'))
    return "gate_proj"


@pytest.mark.parametrize("corrupt", [truncate, widen])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, corrupt: Callable[[Path], str]) -> None:
    folder = make_tiny_model("llama", tmp_path / "model").folder
    word = corrupt(folder)
    with WorkerGroup(tmp_path / "logs", 1, [engine_spec(folder, TARGET)]) as group:
        error = group.spawn().ranks[0].next_failed()
    assert word in error
    assert "Traceback" not in error


def test_another_version_is_refused(tiny: Path, tmp_path: Path) -> None:
    with WorkerGroup(tmp_path, 1, [engine_spec(tiny, TARGET)], version="0.0.1") as group:
        error = group.spawn().ranks[0].next_failed()
    assert "0.0.1" in error
    assert __version__ in error


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_incarnation(tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Whether it is dead or frozen, stream, health check and parent notice within collective_timeout_s."""
    engines = [engine_spec(tiny, TARGET, tp_size=2)]
    with WorkerGroup(tmp_path, 2, engines, collective_timeout_s=3.0) as group:
        group.spawn().wait_ready()
        address = group.ready.address
        with RoundStream(address, TARGET) as stream, open_blocking_channel(address) as channel:
            driver = Driver(group.ready.worker.engines[0], stream.call)
            driver.generate(driver.start(0, PROMPTS[0], greedy()), 1)
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="target"))
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            group.ranks[1].popen.send_signal(how)
            code, _ = stream.ending()
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "rank 1" in group.ranks[0].next_failed()


def test_a_lost_leader_ends_the_others(tiny: Path, tmp_path: Path) -> None:
    with WorkerGroup(tmp_path, 2, [engine_spec(tiny, TARGET, tp_size=2)]) as group:
        group.spawn().wait_ready()
        group.ranks[0].popen.kill()
        assert "rank 0" in group.ranks[1].next_failed()


def test_no_rank_outlives_its_parent(tiny: Path, tmp_path: Path) -> None:
    with WorkerGroup(tmp_path, 2, [engine_spec(tiny, TARGET, tp_size=2)]) as group:
        group.spawn().wait_ready()
        for rank in group.ranks:
            rank.close_stdin()
        assert [rank.popen.wait() for rank in group.ranks] == [EXIT_PARENT_DIED] * 2
