"""The store of jobs: what is recorded once, what survives, and who sees what."""

import json
import sqlite3
from pathlib import Path

import pytest

from gateway.jobs.errors import DuplicateError, KeyTakenError, NoInputError
from gateway.jobs.folder import JobsFolder
from gateway.jobs.lines import answered, item_seed, not_run
from gateway.jobs.records import FileRecord, Item, Job, JobOrder, JobStatus, Purpose, Result
from gateway.jobs.schema import StoreError
from gateway.jobs.store import JobStore, Page

NOW = 1_700_000_000
ALL = 1 << 20  # characters: all results
ITEMS = [Item(number=i, start=100 * i, num_bytes=99, custom_id=f"c{i}") for i in range(5)]


def opened(folder: Path) -> JobStore:
    return JobStore(folder / "jobs.sqlite", lambda: NOW)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    store = opened(tmp_path)
    store.add_file(upload("input", owner="carol"))
    return store


def order(**fields: object) -> JobOrder:
    values = {"owner": "ann", "input_file": "input", "input_sha256": "abc", "endpoint": "", "seed": 2**64 - 1}
    return JobOrder(**values | {"window_s": 60.0, "window": "60s"} | fields)  # type: ignore[arg-type]


def running_job(store: JobStore, **fields: object) -> Job:
    job, _ = store.add_job(order(**fields))
    store.add_items(job.id, ITEMS, num_lines=5, num_bytes=500)
    return store.start(job.id)


def upload(name: str, owner: str = "ann") -> FileRecord:
    return FileRecord(id=name, owner=owner, purpose=Purpose.BATCH, name="in.jsonl", num_bytes=500, created_at=NOW)


def test_a_job_comes_back_as_it_was_submitted(store: JobStore, tmp_path: Path) -> None:
    wanted = order(metadata='{"a": "b"}', salt="s", endpoint="/v1/completions")
    job, is_new = store.add_job(wanted)
    assert is_new
    assert (job.order, job.status, job.created_at, job.expires_at) == (wanted, JobStatus.VALIDATING, NOW, NOW + 60)
    store.close()
    assert opened(tmp_path).job(job.id, "ann") == job


def test_a_result_is_recorded_once_whatever_is_repeated(store: JobStore) -> None:
    job = running_job(store)
    result = answered(job, ITEMS[1], 200, '{"x": 1}', prompt_tokens=3, completion_tokens=4)
    store.record([result])
    store.record([result, Result(job=job.id, number=1, line="another", is_error=True)])
    found = store.job(job.id, None)
    assert found is not None
    assert (found.completed, found.failed, found.prompt_tokens, found.completion_tokens) == (1, 0, 3, 4)
    assert [kept.line for kept in store.results(job.id, -1, ALL)] == [result.line]
    assert [item.number for item in store.items_left(job.id, -1, ALL)] == [0, 2, 3, 4]
    store.record([Result(job="batch_gone", number=0, line="x")])


def test_results_come_in_the_order_of_the_items_up_to_the_first_that_is_missing(store: JobStore) -> None:
    job = running_job(store)
    store.record([answered(job, ITEMS[i], 200 if i else 400, "{}") for i in (3, 1, 0)])
    assert [result.number for result in store.results(job.id, -1, ALL)] == [0, 1, 3]
    assert [result.number for result in store.results_in_turn(job.id, -1, ALL)] == [0, 1]
    assert [result.number for result in store.results_in_turn(job.id, 0, ALL)] == [1]
    assert [result.number for result in store.results(job.id, -1, ALL, is_error=True)] == [0]
    store.record([answered(job, ITEMS[i], 200, "{}") for i in (2, 4)])
    assert [result.number for result in store.results_in_turn(job.id, 0, ALL)] == [1, 2, 3, 4]


def test_results_are_read_a_bounded_part_at_a_time_whatever_their_length(store: JobStore) -> None:
    job = running_job(store)
    short, long = answered(job, ITEMS[1], 200, "1"), answered(job, ITEMS[2], 200, f'"{"x" * 5000}"')
    store.record([answered(job, ITEMS[0], 200, "0"), short, long, answered(job, ITEMS[3], 200, "3")])
    for read in (store.results, store.results_in_turn):
        parts, last = [], -1
        while part := read(job.id, last, 2000):
            parts.append([result.number for result in part])
            last = part[-1].number
        assert parts == [[0, 1, 2], [3]]
        assert [result.number for result in read(job.id, 1, 1)] == [2], "one that is longer than that comes alone"


def test_a_job_ends_with_a_file_of_answers_and_one_of_errors(store: JobStore) -> None:
    job = running_job(store)
    store.record([answered(job, item, 400 if item.number == 2 else 200, '{"é": 1}') for item in ITEMS])
    ended = store.end(job.id)
    assert (ended.status, ended.completed, ended.failed, ended.ended_at) == (JobStatus.COMPLETED, 4, 1, NOW)
    output, errors = store.file(ended.output_file, "ann"), store.file(ended.error_file, "ann")
    assert output is not None
    assert errors is not None
    lines = [result.line for result in store.results(job.id, -1, ALL, is_error=False)]
    assert output.num_bytes == sum(len(line.encode()) + 1 for line in lines)
    assert json.loads(lines[0])["response"]["body"] == {"é": 1}
    assert store.end(job.id) == ended
    assert store.stop(job.id, JobStatus.CANCELLING) == ended


def test_a_job_that_stops_gives_the_items_left_an_error(store: JobStore) -> None:
    job = running_job(store)
    store.record([answered(job, ITEMS[0], 200, "{}")])
    job = store.stop(job.id, JobStatus.CANCELLING)
    store.record([not_run(job, item) for item in store.items_left(job.id, -1, ALL)])
    ended = store.end(job.id)
    assert (ended.status, ended.completed, ended.failed) == (JobStatus.CANCELLED, 1, 4)
    line = json.loads(store.results(job.id, 3, 1)[0].line)
    assert (line["custom_id"], line["response"], line["error"]["code"]) == ("c4", None, "batch_cancelled")


def test_the_same_key_and_words_are_the_same_job(store: JobStore) -> None:
    first, _ = store.add_job(order(idempotency_key="k"))
    again, is_new = store.add_job(order(idempotency_key="k", seed=7, input_file="another"))
    assert (again, is_new) == (first, False)
    other, is_new = store.add_job(order(idempotency_key="k", owner="bob"))
    assert is_new
    assert other.id != first.id
    with pytest.raises(KeyTakenError):
        store.add_job(order(idempotency_key="k", input_sha256="other"))


def test_a_job_needs_a_file_that_is_still_there(store: JobStore) -> None:
    assert store.delete_file(upload("input"))
    with pytest.raises(NoInputError):
        store.add_job(order())
    assert store.jobs(None, Page(limit=9)) == []


def test_two_lines_with_one_custom_id_are_refused_as_a_whole(store: JobStore) -> None:
    job, _ = store.add_job(order())
    with pytest.raises(DuplicateError) as caught:
        store.add_items(job.id, [ITEMS[0], Item(1, 100, 99, "c0")], num_lines=2, num_bytes=200)
    assert caught.value.item.number == 1
    found = store.job(job.id, None)
    assert found is not None
    assert found.scanned_lines == 0
    assert store.items_left(job.id, -1, ALL) == []


def test_an_owner_sees_its_own_alone(store: JobStore) -> None:
    mine, his = store.add_job(order())[0], store.add_job(order(owner="bob"))[0]
    assert store.job(mine.id, "bob") is None
    assert store.jobs("bob", Page(limit=9)) == [his]
    assert store.jobs(None, Page(limit=9)) == [his, mine]
    store.add_file(upload("file-a"))
    assert store.file("file-a", "bob") is None
    assert store.files("bob", Page(limit=9)) == []


def test_lists_come_in_pages(store: JobStore) -> None:
    for i in range(5):
        store.add_file(upload(f"file-{i}"))
    first = store.files("ann", Page(limit=2))
    assert [record.id for record in first] == ["file-4", "file-3"]
    second = store.files("ann", Page(limit=2, after=first[-1].id))
    assert [record.id for record in second] == ["file-2", "file-1"]
    oldest = store.files("ann", Page(limit=2, newest_first=False), purpose="batch")
    assert [record.id for record in oldest] == ["file-0", "file-1"]
    assert store.files("ann", Page(limit=2), purpose="batch_output") == []


def test_those_that_watch_see_what_has_not_ended_first(store: JobStore) -> None:
    jobs = [running_job(store) for _ in range(4)]
    for job in (jobs[0], jobs[3]):
        store.fail(job.id, [])
    wanted = [jobs[2].id, jobs[1].id, jobs[3].id]
    assert [job.id for job in store.watched_jobs(3)] == wanted


def test_a_deleted_job_leaves_nothing_but_an_input_that_others_read(store: JobStore) -> None:
    store.add_file(upload("file-1"))
    jobs = [running_job(store, input_file="file-1") for _ in range(2)]
    assert not store.delete_file(upload("file-1")), "a job reads it"
    for job in jobs:
        store.record([answered(job, item, 200, "{}") for item in ITEMS])
        store.end(job.id)
    assert store.old_jobs(NOW) == []
    assert [job.id for job in store.old_jobs(NOW + 1)] == [job.id for job in jobs]
    removed = []
    for job in jobs:
        while store.delete_some(job):
            pass
        removed.append([record.id for record in store.delete_job(job)])
    assert removed == [[], ["file-1"]]
    assert [record.id for record in store.files(None, Page(limit=9))] == ["input"]
    assert store.jobs(None, Page(limit=9)) == []


def test_a_deleted_file_of_results_takes_them_along(store: JobStore) -> None:
    job = running_job(store)
    store.record([answered(job, item, 400 if item.number == 2 else 200, "{}") for item in ITEMS])
    job = store.end(job.id)
    output = store.file(job.output_file, None)
    assert output is not None
    store.delete_file(output)
    assert [result.number for result in store.results(job.id, -1, ALL)] == [2]


def test_seeds_follow_from_the_job_and_the_number(store: JobStore) -> None:
    job, _ = store.add_job(order())
    seeds = {item_seed(job, number) for number in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seeds == {item_seed(job, number) for number in range(100)}


def test_a_store_of_another_version_is_refused(store: JobStore, tmp_path: Path) -> None:
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match=r"jobs\.sqlite was written by another version .*format 99"):
        opened(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "jobs.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match=r"cannot be opened .*move it away"):
        opened(tmp_path / "other")


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first, second = JobsFolder(tmp_path / "jobs"), JobsFolder(tmp_path / "jobs")
    assert first.take()
    assert not second.take()
    unfinished = first.upload()
    unfinished.write(b"half")
    upload = first.upload()
    upload.write(b"one\ntwo\n")
    record = upload.finish("ann", "in.jsonl", NOW)
    assert (record.num_bytes, record.owner, record.purpose) == (8, "ann", Purpose.BATCH)
    first.release()
    assert second.take()
    assert second.read(record.id, 4, 100) == b"two\n"
    assert list((tmp_path / "jobs" / "uploads").iterdir()) == [], "what a lost process left is gone"
    second.remove(record.id)
    with pytest.raises(FileNotFoundError):
        second.read(record.id, 0, 1)
