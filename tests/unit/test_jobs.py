"""Jobs from submission to their files, with a worker that the test plays; and what another process makes of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from gateway.jobs.jobs import Jobs, JobView, Limits
from gateway.jobs.lines import answered, item_seed
from gateway.jobs.records import Item, Job, JobOrder, JobStatus, Result
from gateway.jobs.store import Page
from gateway.jobs.worker import FoundLine
from gateway.requests.refusal import Refusal

pytestmark = pytest.mark.asyncio
UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE, "no scheduler is ready")
LIMITS = Limits(max_running=3, max_line_bytes=300, max_bytes=100_000, retention_s=1e6)


@dataclass
class FakeWorker:
    """A line is the custom_id. Answers at once, or when `gate` is open."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    refuses: Callable[[str], Refusal | None] = lambda line: None
    ran: list[str] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    async def find(self, job: Job, lines: bytes) -> list[FoundLine]:
        found, start = [], 0
        for number, line in enumerate(lines.splitlines(keepends=True)):
            text = line.strip().decode()
            if text:
                problem = "custom_id: is bad" if text == "bad" else ""
                found.append(FoundLine(item=Item(number, start, len(line), text), problem=problem))
            start += len(line)
        return found

    async def run(self, job: Job, item: Item, line: bytes) -> Result:
        assert line.strip().decode() == item.custom_id
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.gate.wait()
        finally:
            self.num_running -= 1
        if (refusal := self.refuses(item.custom_id)) is not None:
            raise refusal
        self.ran.append(item.custom_id)
        return answered(job, item, 200, str(item_seed(job, item.number)))

    def failed(self, job: Job, item: Item, refusal: Refusal) -> Result:
        return answered(job, item, 500, json.dumps(refusal.message))


@asynccontextmanager
async def opened(
    folder: Path, worker: FakeWorker, limits: Limits = LIMITS, now: Callable[[], float] | None = None
) -> AsyncIterator[Jobs]:
    jobs = Jobs(folder, worker, limits, **({} if now is None else {"now": now}))
    await jobs.open()
    try:
        yield jobs
    finally:
        await jobs.close()


async def pieces(text: str) -> AsyncIterator[bytes]:
    for start in range(0, len(text), 7):
        yield text[start : start + 7].encode()


async def submit(jobs: Jobs, text: str, *, window_s: float = 1e5, **fields: object) -> JobView:
    record = await jobs.upload(pieces(text), owner="ann", name="in.jsonl")
    order = JobOrder(
        owner="ann",
        input_file=record.id,
        input_sha256=record.sha256,
        endpoint="",
        window_s=window_s,
        window=f"{window_s}s",
        seed=5,
        **fields,  # type: ignore[arg-type]
    )
    return await jobs.submit(order)


async def lines_of(jobs: Jobs, view: JobView) -> list[dict[str, object]]:
    """Of all results, once the job has ended."""
    results = jobs.results(view.job.id, "ann", after=-1, follow=True)
    return [json.loads(result.line) async for result in results]


async def ended(jobs: Jobs, view: JobView) -> Job:
    await lines_of(jobs, view)
    return (await jobs.job(view.job.id, "ann")).job


async def test_items_run_some_at_a_time_and_results_come_in_their_order(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.gate.set()
    names = [f"item-{i}" for i in range(200)]
    async with opened(tmp_path, worker) as jobs:
        view = await submit(jobs, "\n\n".join(names))
        lines = await lines_of(jobs, view)
        job = await ended(jobs, view)
        output = await jobs.file(job.output_file, "ann")
        content = b"".join([piece async for piece in jobs.content(output)])
    assert [line["custom_id"] for line in lines] == names
    assert worker.most_running <= 3
    assert (job.status, job.total, job.completed, job.failed) == (JobStatus.COMPLETED, 200, 200, 0)
    assert [json.loads(line) for line in content.splitlines()] == lines
    assert len(content) == output.num_bytes


async def test_another_process_goes_on_where_one_was_lost_with_the_same_results(tmp_path: Path) -> None:
    names = "\n".join(f"item-{i}" for i in range(40))
    undisturbed, first, second = FakeWorker(), FakeWorker(), FakeWorker()
    for worker in (undisturbed, first, second):
        worker.gate.set()
    stuck = asyncio.Event()

    def hold(line: str) -> Refusal | None:
        if len(first.ran) < 17:
            return None
        stuck.set()
        return UNAVAILABLE

    first.refuses = hold
    async with opened(tmp_path / "a", first) as jobs:
        view = await submit(jobs, names)
        await stuck.wait()
        while (await jobs.job(view.job.id, "ann")).job.completed < 17:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    async with opened(tmp_path / "a", second) as jobs:
        lines = await lines_of(jobs, view)
    assert len(first.ran) + len(second.ran) == 40
    assert not set(first.ran) & set(second.ran)
    async with opened(tmp_path / "b", undisturbed) as jobs:
        expected = await lines_of(jobs, await submit(jobs, names))
    assert [line["response"]["body"] for line in lines] == [line["response"]["body"] for line in expected]  # type: ignore[index]


async def test_a_job_is_refused_as_a_whole_for_a_bad_line(tmp_path: Path) -> None:
    worker = FakeWorker()
    inputs = {
        "a\n\nbad\nb": (3, "custom_id: is bad"),
        "a\nb\na\n": (3, "custom_id: 'a' is the custom_id of an earlier line; each needs its own"),
        "\n \n": (None, "the file has no line"),
        "a\n" + "x" * 200_000: None,
    }
    async with opened(
        tmp_path, worker, Limits(max_running=1, max_line_bytes=100, max_bytes=10**6, retention_s=1)
    ) as jobs:
        for text, expected in inputs.items():
            job = await ended(jobs, await submit(jobs, text))
            assert job.status is JobStatus.FAILED
            [problem] = json.loads(job.problems)
            if expected is None:
                assert problem["message"] == "request: must have at most 100 bytes"
            else:
                assert (problem["line"], problem["message"]) == expected
            assert job.total == 0
    assert worker.ran == []


async def test_an_item_is_tried_again_while_its_job_has_time(tmp_path: Path) -> None:
    tries = {"a": 0, "b": 0}

    def refuse(line: str) -> Refusal | None:
        tries[line] += 1
        if line == "b":
            return Refusal(grpc.StatusCode.ABORTED, "nobody knows why")
        return UNAVAILABLE if tries["a"] < 3 else None

    worker = FakeWorker(refuses=refuse)
    worker.gate.set()
    async with opened(tmp_path, worker) as jobs:
        lines = await lines_of(jobs, await submit(jobs, "a\nb"))
    assert [line["response"]["status_code"] for line in lines] == [200, 500]  # type: ignore[index]
    assert tries == {"a": 3, "b": 5}


async def test_an_item_that_breaks_the_worker_fails_alone(tmp_path: Path) -> None:
    class Breaking(FakeWorker):
        async def run(self, job: Job, item: Item, line: bytes) -> Result:
            if item.custom_id == "b":
                raise ValueError("nobody thought of this")
            return await super().run(job, item, line)

    worker = Breaking()
    worker.gate.set()
    async with opened(tmp_path, worker) as jobs:
        job = await ended(jobs, await submit(jobs, "a\nb\nc"))
        assert (job.status, job.completed, job.failed) == (JobStatus.COMPLETED, 2, 1)
    assert sorted(worker.ran) == ["a", "c"], "and once each"


async def test_numbers_of_all_jobs_together(tmp_path: Path) -> None:
    worker, now = FakeWorker(), [1000.0]
    worker.refuses = lambda line: Refusal(grpc.StatusCode.ABORTED, "no") if line == "b" else None
    async with opened(tmp_path, worker, now=lambda: now[0]) as jobs:
        idle = await jobs.numbers()
        assert (idle.by_status, idle.num_left, idle.oldest_age_s) == ({}, 0, 0.0)
        view = await submit(jobs, "a\nb\nc\nd")
        now[0] += 50
        while (numbers := await jobs.numbers()).num_left != 4:  # noqa: ASYNC110  # they are read
            await asyncio.sleep(0)
        assert numbers.oldest_age_s == 50.0
        worker.gate.set()
        await ended(jobs, view)
        numbers = await jobs.numbers()
        assert (numbers.num_completed, numbers.num_failed) == (3, 1)
        assert (numbers.by_status, numbers.num_left, numbers.oldest_age_s) == ({"completed": 1}, 0, 0.0)


async def test_a_cancelled_job_keeps_what_it_has(tmp_path: Path) -> None:
    worker = FakeWorker(refuses=lambda line: None if line == "a" else UNAVAILABLE)
    worker.gate.set()
    async with opened(tmp_path, worker) as jobs:
        view = await submit(jobs, "a\nb\nc\nd\ne")
        results = jobs.results(view.job.id, "ann", after=-1, follow=True)
        assert json.loads((await anext(results)).line)["custom_id"] == "a"
        await jobs.cancel(view.job.id, "ann")
        job = await ended(jobs, view)
        again = await jobs.cancel(view.job.id, "ann")
    assert (job.status, job.completed, job.failed) == (JobStatus.CANCELLED, 1, 4)
    assert again.job == job


async def test_a_job_whose_time_is_over_expires(tmp_path: Path) -> None:
    worker = FakeWorker()
    clock = [1e9]
    async with opened(tmp_path, worker, now=lambda: clock[0]) as jobs:
        view = await submit(jobs, "a\nb\nc\nd", window_s=0.0)
        lines = await lines_of(jobs, view)
        job = await ended(jobs, view)
        assert job.status is JobStatus.EXPIRED
        assert {line["error"]["code"] for line in lines} <= {"batch_expired"}  # type: ignore[index]
        late = await submit(jobs, "a\nb", window_s=50.0)
    clock[0] += 60  # while nobody runs it
    async with opened(tmp_path, worker, now=lambda: clock[0]) as jobs:
        assert (await ended(jobs, late)).status is JobStatus.EXPIRED


async def test_jobs_take_turns(tmp_path: Path) -> None:
    worker = FakeWorker()
    async with opened(tmp_path, worker) as jobs:
        views = [await submit(jobs, "\n".join(f"{name}{i}" for i in range(30))) for name in "ab"]
        while any([(await jobs.job(view.job.id, None)).job.status is JobStatus.VALIDATING for view in views]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        worker.gate.set()
        for view in views:
            await ended(jobs, view)
    firsts = [line[0] for line in worker.ran[:30]]
    assert 10 <= firsts.count("b") <= 20


async def test_uploads_have_a_limit_and_leave_nothing_when_they_fail(tmp_path: Path) -> None:
    async with opened(
        tmp_path, FakeWorker(), Limits(max_running=1, max_line_bytes=9, max_bytes=100, retention_s=1)
    ) as jobs:
        await jobs.upload(pieces("x" * 60), owner="ann", name="a")
        with pytest.raises(Refusal, match=r"at most 100 bytes|100 bytes \(jobs.max_bytes\)"):
            await jobs.upload(pieces("x" * 60), owner="ann", name="b")
        assert len(await jobs.files("ann", Page(limit=9))) == 1
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_the_name_of_a_file_has_a_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, FakeWorker()) as jobs:
        with pytest.raises(Refusal, match="file: its name may have at most 255 characters, got 256"):
            await jobs.upload(pieces("a"), owner="ann", name="n" * 256)
        assert (await jobs.upload(pieces("a"), owner="ann", name="n" * 255)).name == "n" * 255


async def test_uploads_at_once_share_the_limit(tmp_path: Path) -> None:
    limits = Limits(max_running=1, max_line_bytes=9, max_bytes=100, retention_s=1)
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 60
        has_begun.set()
        await may_end.wait()

    async with opened(tmp_path, FakeWorker(), limits) as jobs:
        first = asyncio.create_task(jobs.upload(slow(), owner="ann", name="a"))
        await has_begun.wait()
        with pytest.raises(Refusal, match=r"jobs\.max_bytes"):
            await jobs.upload(pieces("x" * 60), owner="ann", name="b")
        first.cancel()
        await asyncio.wait([first])
        await jobs.upload(pieces("x" * 60), owner="ann", name="c")
        await jobs.upload(pieces("x" * 40), owner="ann", name="d")


async def test_a_submission_that_is_refused_leaves_no_file(tmp_path: Path) -> None:
    order = JobOrder(
        owner="ann", input_file="", input_sha256="", endpoint="", window_s=9.0, window="9s", seed=5, idempotency_key="k"
    )
    async with opened(tmp_path, FakeWorker()) as jobs:
        view = await jobs.submit_upload(pieces("a"), order, name="in.jsonl")
        with pytest.raises(Refusal, match="was used for another job"):
            await jobs.submit_upload(pieces("b"), order, name="in.jsonl")
        assert [record.id for record in await jobs.files("ann", Page(limit=9))] == [view.job.order.input_file]


async def test_who_follows_results_hears_that_the_process_ends(tmp_path: Path) -> None:
    async with opened(tmp_path, FakeWorker()) as jobs:
        view = await submit(jobs, "a")
        following = asyncio.create_task(lines_of(jobs, view))
        await asyncio.wait([following], timeout=0.1)  # it would wait for ever
        await jobs.close()
        async with asyncio.timeout(60):
            with pytest.raises(Refusal, match="is shutting down"):
                await following


async def test_an_input_in_use_cannot_be_deleted(tmp_path: Path) -> None:
    worker = FakeWorker()
    async with opened(tmp_path, worker) as jobs:
        view = await submit(jobs, "a")
        input_file = view.job.order.input_file
        with pytest.raises(Refusal, match="is the input of a job that has not ended"):
            await jobs.delete_file(input_file, "ann")
        with pytest.raises(Refusal, match="is not known here"):
            await jobs.delete_file(input_file, "bob")
        worker.gate.set()
        job = await ended(jobs, view)
        await jobs.delete_file(input_file, "ann")
        await jobs.delete_file(job.output_file, "ann")
        assert await jobs.files("ann", Page(limit=9)) == []


async def test_what_is_old_goes(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.gate.set()
    clock = [1e9]
    async with opened(tmp_path, worker, now=lambda: clock[0]) as jobs:
        view = await submit(jobs, "a\nb")
        await ended(jobs, view)
        await jobs.upload(pieces("unused"), owner="ann", name="in.jsonl")
    clock[0] += LIMITS.retention_s + 1
    async with opened(tmp_path, worker, now=lambda: clock[0]) as jobs:
        async with asyncio.timeout(60):
            while await jobs.jobs("ann", Page(limit=9)) or await jobs.files("ann", Page(limit=9)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert list((tmp_path / "files").iterdir()) == []


async def test_content_of_which_the_store_knows_nothing_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, FakeWorker()) as jobs:
        record = await jobs.upload(pieces("a"), owner="ann", name="in.jsonl")
    (tmp_path / "files" / "file-lost").write_text("its process ended before it was in the store")
    async with opened(tmp_path, FakeWorker()):
        assert [path.name for path in (tmp_path / "files").iterdir()] == [record.id]


async def test_a_second_process_waits_for_the_folder(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.gate.set()
    async with opened(tmp_path, FakeWorker()) as first, opened(tmp_path, worker) as second:
        view = await submit(first, "a")
        with pytest.raises(Refusal, match="does not own"):
            await second.job(view.job.id, "ann")
        await first.close()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert (await ended(second, view)).status is JobStatus.COMPLETED
                    return
                except Refusal:
                    await asyncio.sleep(0.05)
