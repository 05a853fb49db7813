"""Durable jobs in a real deployment: through every door, and through the death of what serves them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.deployment.settings import JobsSettings, KvCacheSettings, SchedulerSettings
from cluster.local import LOCAL_SERVER, LocalDeployment, local_settings
from echelon import AsyncClient, Client
from echelon.errors import InvalidRequestError, NotFoundError, UnavailableError
from echelon.jobs import line_of
from tests.helpers.scrape import free_port

MODELS = Path(__file__).parents[2] / "models"


def bodies(number: int, max_tokens: int = 12) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [
        {"prompt": "def quicksort(items):\n", "temperature": 1.0},
        {"messages": [{"role": "user", "content": "import os"}], "temperature": 1.0},
        {"prompt": "class Stack:\n", "temperature": 0, "n": 2, "logprobs": 1},
    ]
    common = {"max_tokens": max_tokens, "ignore_eos": True}
    return [{**kinds[i % len(kinds)], **common} for i in range(number)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployment]:
    settings = local_settings(
        MODELS / "demo-target",
        dtype="float32",  # what runs beside a request must not change a token
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=512),
        server=replace(LOCAL_SERVER, http_port=free_port()),
        jobs=JobsSettings(path=str(tmp_path_factory.mktemp("jobs"))),
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        yield deployment


@pytest.fixture
def client(deployment: LocalDeployment) -> Iterator[Client]:
    with Client(deployment.running.gateway_address) as client:
        yield client


def test_a_job_runs_and_repeats_itself(client: Client) -> None:
    lines = [list(client.jobs.results(client.jobs.submit(bodies(9), seed=5).job_id)) for _ in range(2)]
    assert [result.custom_id for result in lines[0]] == [str(i) for i in range(9)]
    for first, second in zip(*lines, strict=True):
        assert not first.is_error, first.line
        assert first.body["choices"] == second.body["choices"]
        assert first.body["usage"]["completion_tokens"] == 12 * len(first.body["choices"])
    texts = {str(result.body["choices"]) for result in lines[0]}
    assert len(texts) > 6, "items without seeds get different ones"


def test_a_jobs_state_is_told(client: Client) -> None:
    job = client.jobs.submit(bodies(3), metadata={"for": "tests"}, completion_window_s=600)
    assert job.expires_at == job.created_at + 600
    list(client.jobs.results(job.job_id))
    ended = client.jobs.get(job.job_id)
    assert (ended.state, ended.num_items, ended.num_completed, ended.num_failed) == ("completed", 3, 3, 0)
    assert ended.metadata == {"for": "tests"}
    assert ended.completion_tokens == 48
    assert next(client.jobs.list()).job_id == job.job_id
    with pytest.raises(NotFoundError, match="job: 'nothing' is not known here"):
        client.jobs.get("nothing")


def test_items_fail_alone_and_bad_lines_together(client: Client) -> None:
    requests: list[dict[str, Any]] = [{"prompt": "x", "temperature": -1}, {"prompt": "x", "max_tokens": 1}]
    bad, good = client.jobs.results(client.jobs.submit(requests).job_id)
    assert bad.is_error
    assert bad.body["error"]["param"] == "temperature"
    assert json.loads(bad.line)["response"]["status_code"] == 400
    assert not good.is_error
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}
    job = client.jobs.submit([line])
    assert list(client.jobs.results(job.job_id)) == []
    assert "line 1: url: must be /v1/completions or" in client.jobs.get(job.job_id).problems[0]
    with pytest.raises(InvalidRequestError, match="completion_window: must be more than 0"):
        client.jobs.submit(requests, completion_window_s=-1)


async def use_the_async_client(address: str, missing: Path) -> None:
    async with AsyncClient(address) as client:
        jobs = client.jobs
        job = await jobs.submit((body for body in bodies(4)), seed=5, metadata={"for": "async"})
        results = [result async for result in jobs.results(job.job_id)]
        assert [(result.number, result.is_error) for result in results] == [(i, False) for i in range(4)]
        assert (await jobs.get(job.job_id)).state == "completed"
        assert (await anext(jobs.list())).metadata == {"for": "async"}
        assert (await jobs.cancel(job.job_id)).state == "completed"
        rest = [result.number async for result in jobs.results(job.job_id, after=1, follow=False)]
        assert rest == [2, 3]
        with pytest.raises(FileNotFoundError):
            await jobs.submit(missing)
        with pytest.raises(NotFoundError, match="job: 'nothing' is not known here"):
            await anext(jobs.results("nothing"))
        with pytest.raises(InvalidRequestError, match="completion_window: must be more than 0"):
            await jobs.submit(bodies(1), completion_window_s=-1)


def test_the_async_client_has_the_same_calls(deployment: LocalDeployment, tmp_path: Path) -> None:
    asyncio.run(use_the_async_client(deployment.running.gateway_address, tmp_path / "missing"))


def test_a_repeated_submission_is_the_same_job(client: Client) -> None:
    first, again = (client.jobs.submit(bodies(2), idempotency_key="k1") for _ in range(2))
    assert first.job_id == again.job_id
    with pytest.raises(InvalidRequestError, match="idempotency_key: 'k1' was used for another job"):
        client.jobs.submit(bodies(3), idempotency_key="k1")


def test_a_job_survives_the_gateway_and_the_scheduler(deployment: LocalDeployment, client: Client) -> None:
    expected = [result.body["choices"] for result in client.jobs.results(client.jobs.submit(bodies(24), seed=1).job_id)]
    job = client.jobs.submit(bodies(24), seed=1)
    seen: list[Any] = []
    for name in ("gateway-0", "scheduler-0", "target-0.0", "gateway-0"):
        take_some(client, job.job_id, seen, len(seen) + 4)
        pid = deployment.processes.read(lambda board, name=name: board.process(name).pid)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
    take_some(client, job.job_id, seen, 24)
    assert [result.body["choices"] for result in seen] == expected
    assert [result.number for result in seen] == list(range(24))


def echelon(deployment: LocalDeployment, *arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "echelon.cli.app", *arguments]
    environment = {**os.environ, "ECHELON_ADDRESS": deployment.running.gateway_address, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_the_commands(deployment: LocalDeployment, tmp_path: Path) -> None:
    lines = [line_of(i, body) for i, body in enumerate(bodies(5))]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    submitted = echelon(deployment, "jobs", "submit", str(source), "--watch", "--seed", "3", "--window", "10m")
    job_id = submitted.stdout.strip()
    assert "completed" in submitted.stderr
    assert json.loads(echelon(deployment, "jobs", "show", job_id, "--json").stdout)["num_completed"] == 5
    assert job_id in echelon(deployment, "jobs", "list").stdout
    results = echelon(deployment, "jobs", "results", job_id).stdout.splitlines()
    echelon(deployment, "run-batch", "-i", str(source), "-o", str(target), "--seed", "3")
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["custom_id"] for line in written] == [str(i) for i in range(5)]
    for first, second in zip(map(json.loads, results), written, strict=True):
        assert first["response"]["body"]["choices"] == second["response"]["body"]["choices"]
    source.write_text("nonsense\n")
    failed = echelon(deployment, "run-batch", "-i", str(source), "-o", str(target), status=2)
    assert "line 1: request: is not JSON" in failed.stderr
    missing = echelon(deployment, "jobs", "submit", str(tmp_path / "nothing"), status=2)
    assert "nothing cannot be read (No such file or directory)" in missing.stderr
    assert "batch_nothing' is not known here" in echelon(deployment, "jobs", "cancel", "batch_nothing", status=2).stderr
    assert job_id + " is completed" in echelon(deployment, "jobs", "cancel", job_id).stderr


@pytest.fixture(scope="module")
def openai_client(deployment: LocalDeployment) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{deployment.settings.server.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def test_batches_work_with_openais_client(openai_client: openai.OpenAI, client: Client) -> None:
    lines = [line_of(i, body) for i, body in enumerate(bodies(6)) if "prompt" in body]
    lines.append(line_of(99, {"prompt": "x", "temperature": -1}))
    file_id = upload(openai_client, lines)
    assert openai_client.files.content(file_id).read() == "".join(json.dumps(line) + "\n" for line in lines).encode()
    batch = openai_client.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
    )
    assert batch.object == "batch"
    list(client.jobs.results(batch.id))
    batch = openai_client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 4, 1)
    assert batch.metadata == {"a": "b"}
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    output = openai_client.files.content(batch.output_file_id).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == [line["custom_id"] for line in lines[:-1]]
    assert openai_client.files.retrieve(batch.output_file_id).bytes == sum(len(line.encode()) + 1 for line in output)
    (error,) = openai_client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(error)["response"]["body"]["error"]["param"] == "temperature"
    assert batch.id in [other.id for other in openai_client.batches.list(limit=2)]
    assert file_id in [file.id for file in openai_client.files.list(purpose="batch", limit=1)]
    assert openai_client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        openai_client.files.retrieve(file_id)


def test_the_openapi_document_has_the_paths_of_jobs(deployment: LocalDeployment) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{deployment.settings.server.http_port}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    assert set(paths["/v1/files"]) == {"get", "post"}
    assert set(paths["/v1/files/{id}"]) == {"get", "delete"}
    assert set(paths["/v1/batches"]) == {"get", "post"}
    assert set(paths["/v1/batches/{id}/cancel"]) == {"post"}


def test_mistakes_over_http_are_named(openai_client: openai.OpenAI, client: Client) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose: must be"):
        openai_client.files.create(file=("a", b"x"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="input_file_id: 'file-x' is not the id of a file"):
        openai_client.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
    file_id = upload(openai_client, [line_of(0, bodies(1)[0])])
    wrong: Any = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match="endpoint: must be /v1/completions or"):
        openai_client.batches.create(**wrong)
    with pytest.raises(openai.BadRequestError, match="completion_window: must be a number and"):
        openai_client.batches.create(**wrong | {"endpoint": "/v1/completions", "completion_window": "soon"})
    batch = openai_client.batches.create(**wrong | {"endpoint": "/v1/chat/completions"})
    list(client.jobs.results(batch.id))
    batch = openai_client.batches.retrieve(batch.id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].line == 1
    with pytest.raises(openai.PermissionDeniedError, match="another site"):
        openai_client.files.create(file=("a", b"x"), purpose="batch", extra_headers={"origin": "http://evil.example"})


def test_a_batch_is_cancelled_over_http(openai_client: openai.OpenAI, client: Client) -> None:
    lines = [line_of(i, {"prompt": "x", "max_tokens": 400, "ignore_eos": True}) for i in range(40)]
    batch = openai_client.batches.create(
        input_file_id=upload(openai_client, lines), endpoint="/v1/completions", completion_window="1h"
    )
    openai_client.batches.cancel(batch.id)
    results = list(client.jobs.results(batch.id))
    batch = openai_client.batches.retrieve(batch.id)
    assert batch.status == "cancelled"
    assert any("batch_cancelled" in result.line for result in results) or not results


def take_some(client: Client, job_id: str, seen: list[Any], number: int) -> None:
    """Until there are so many results; a connection that is lost is made again."""
    while len(seen) < number:
        after = seen[-1].number if seen else None
        try:
            for result in client.jobs.results(job_id, after=after):
                seen.append(result)
                if len(seen) == number:
                    return
        except UnavailableError:
            continue
