"""What the ranks of a group answer to moves becomes one answer; and how many may be awaited."""

import asyncio

from echelon.pb.worker_pb2 import DiskContents, EngineRole, Hello, MoveOrder, MoveResult, RoundReply
from workers.process.move_answers import MoveAnswers
from workers.process.server import Ending, RoundStream


class Scheduler:
    role = EngineRole.ENGINE_ROLE_TARGET

    def __init__(self) -> None:
        self.moved: list[MoveResult] = []
        self.disk: list[DiskContents] = []

    def deliver_move(self, result: MoveResult) -> None:
        self.moved.append(result)

    def deliver_disk(self, contents: DiskContents) -> None:
        self.disk.append(contents)


def moved(**fields: object) -> RoundReply:
    return RoundReply(move=MoveResult(move_id=7, incarnation=3, **fields))  # type: ignore[arg-type]


def on_disk(*digests: bytes) -> RoundReply:
    return RoundReply(disk=DiskContents(digests=digests))


def test_a_move_is_answered_when_the_last_rank_has_done_it() -> None:
    answers, scheduler = MoveAnswers(), Scheduler()
    ticket = answers.expect(scheduler, 3)
    answers.add(ticket, 2, moved(failed=[4], error="rank 2", run_ns=5, evicted=[b"a", b"b"]))
    answers.add(ticket, 0, moved(failed=[1, 4], run_ns=9, evicted=[b"b", b"c"]))
    assert not scheduler.moved
    answers.add(ticket, 1, moved(error="rank 1", run_ns=7, num_damaged=2))
    (result,) = scheduler.moved
    assert (result.move_id, result.incarnation) == (7, 3)
    assert list(result.failed) == [1, 4]
    assert result.error == "rank 1"
    assert (result.run_ns, list(result.rank_run_ns), result.num_damaged) == (9, [9, 7, 5], 2)
    assert sorted(result.evicted) == [b"a", b"b", b"c"]


def test_unexpected_answers_are_dropped() -> None:
    answers, scheduler = MoveAnswers(), Scheduler()
    ticket = answers.expect(scheduler, 1)
    answers.forget(EngineRole.ENGINE_ROLE_DRAFT)
    answers.add(ticket + 1, 0, moved())
    answers.add(ticket, 0, moved())
    answers.add(ticket, 0, moved())
    assert len(scheduler.moved) == 1
    ticket = answers.expect(scheduler, 1)
    answers.forget(EngineRole.ENGINE_ROLE_TARGET)
    answers.add(ticket, 0, moved())
    assert len(scheduler.moved) == 1


def test_the_disk_holds_what_every_rank_holds_in_the_order_of_the_first() -> None:
    answers, scheduler = MoveAnswers(), Scheduler()
    ticket = answers.expect(scheduler, 2)
    answers.add(ticket, 1, on_disk(b"a", b"b", b"c"))
    answers.add(ticket, 0, on_disk(b"c", b"x", b"a"))
    assert [(list(contents.digests), contents.is_last) for contents in scheduler.disk] == [([b"c", b"a"], True)]


def test_large_disks_are_listed_in_messages_of_a_mebibyte() -> None:
    answers, scheduler = MoveAnswers(), Scheduler()
    digests = [number.to_bytes(16, "little") for number in range(120_000)]
    answers.add(answers.expect(scheduler, 1), 0, on_disk(*digests))
    assert [digest for contents in scheduler.disk for digest in contents.digests] == digests
    assert [contents.is_last for contents in scheduler.disk] == [False, False, True]
    assert max(contents.ByteSize() for contents in scheduler.disk) <= 1 << 20


def test_an_empty_disk_is_listed_too() -> None:
    answers, scheduler = MoveAnswers(), Scheduler()
    answers.add(answers.expect(scheduler, 1), 0, on_disk())
    assert scheduler.disk == [DiskContents(is_last=True)]


async def test_a_stream_with_too_many_moves_ends_with_a_message() -> None:
    stream = RoundStream(Hello(role=EngineRole.ENGINE_ROLE_TARGET, incarnation=3))
    limit = 1024
    assert all(stream.accept_move(MoveOrder(move_id=number, incarnation=3)) for number in range(limit))
    stream.deliver_move(MoveResult(move_id=0))
    assert (await stream.next_answer()) == RoundReply(move=MoveResult(move_id=0))
    assert stream.accept_move(MoveOrder(move_id=limit, incarnation=3))
    assert not stream.accept_move(MoveOrder(move_id=limit + 1, incarnation=3))
    ending = await stream.next_answer()
    assert isinstance(ending, Ending)
    assert ending.message == "move 1025: 1024 moves of this stream are waiting already"


async def test_a_half_closed_stream_waits_for_its_moves() -> None:
    stream = RoundStream(Hello(role=EngineRole.ENGINE_ROLE_TARGET, incarnation=3))
    assert stream.accept_move(MoveOrder(move_id=1, incarnation=3))
    stream.half_close()
    stream.deliver_move(MoveResult(move_id=1))
    assert (await asyncio.wait_for(stream.next_answer(), 20)) == RoundReply(move=MoveResult(move_id=1))
    assert (await asyncio.wait_for(stream.next_answer(), 20)) is None
