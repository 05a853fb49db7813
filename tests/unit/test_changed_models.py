"""While a deployment changes its target: a request is read for one model, and stays with the replicas of that model."""

import asyncio
import urllib.error
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from echelon.errors import InvalidRequestError, UnavailableError
from echelon.pb import inference_pb2 as pb
from echelon.pb.process_pb2 import GatewayModel
from echelon.pb.reading_pb2 import Reading
from echelon.resuming import ResumableRequest
from gateway import models as models_module
from gateway.models import Models
from gateway.requests.forms import Form
from gateway.requests.refusal import Refusal
from gateway.requests.validation import build_validator
from tests.helpers.fake_scheduler import FakeScheduler
from tests.helpers.model_folders import write_model_folder
from tests.helpers.replica_house import ReplicaHouse, gateway_spec, replica_house
from tests.helpers.scrape import fetch, free_port


@pytest_asyncio.fixture
async def house() -> AsyncIterator[ReplicaHouse]:
    async with replica_house() as house:
        yield house


def model(folder: Path) -> GatewayModel:
    return GatewayModel(
        model_id=f"id of {folder.name}", model_name=folder.name, model_dir=str(folder), max_model_len=8, vocab_size=16
    )


async def serves(house: ReplicaHouse, name: str) -> None:
    """Until new requests are for this model."""
    async with asyncio.timeout(30):
        while (await house.client.model_info()).model != name:
            pass


async def test_new_requests_are_read_for_the_new_model_and_old_ones_stay(house: ReplicaHouse, tmp_path: Path) -> None:
    old = asyncio.ensure_future(house.client.generate("x", request_id="old"))
    assert (await house.scheduler.next_submit()).model_id == ""
    second = await house.add(model=model(write_model_folder(tmp_path / "another")))
    await serves(house, "another")
    new = [asyncio.ensure_future(house.client.generate([3, 4], request_id=f"new-{number}")) for number in range(4)]
    async with asyncio.timeout(30):
        submits = [await second.next_submit() for _ in new]
    assert {(submit.model_id, submit.sampling.max_tokens) for submit in submits} == {("id of another", 6)}
    with pytest.raises(InvalidRequestError, match="max_model_len is 8"):
        await house.client.generate([3] * 8)

    house.tell(0, retiring=True)
    house.scheduler.send_chunk("old", [9], "o")
    house.scheduler.send_complete("old")
    assert (await old).token_ids == (9,)
    house.tell(0, removed=True)
    for number in range(len(new)):
        second.send_complete(f"new-{number}")
    await asyncio.gather(*new)
    assert second.received.empty()


async def test_no_model_goes_on_with_the_tokens_of_another(house: ReplicaHouse, tmp_path: Path) -> None:
    stream = house.client.stream("x", request_id="old")
    first = asyncio.ensure_future(anext(stream))
    await house.scheduler.next_submit()
    house.scheduler.send_chunk("old", [9], "o")
    await first
    second = await house.add(model=model(write_model_folder(tmp_path / "another")))
    await serves(house, "another")
    house.tell(0, removed=True)
    with pytest.raises(UnavailableError, match="no other accepts requests"):
        await stream.result()
    assert second.received.empty()


async def test_a_link_that_gets_the_scheduler_of_another_model_keeps_no_request(
    house: ReplicaHouse, tmp_path: Path
) -> None:
    """As after a controller that was lost between the removal of a replica and writing that down."""
    another = model(write_model_folder(tmp_path / "another"))
    second = await house.add(model=another)
    await serves(house, "another")
    new = asyncio.ensure_future(house.client.generate([3, 4], request_id="new"))
    await second.next_submit()
    third = await house.add(model=another)
    first_model = GatewayModel(model_id="", model_name="demo")
    house.tell(1, address=house.scheduler_addresses[0], model=first_model)
    async with asyncio.timeout(30):
        moved = await third.next_submit()
    assert (moved.request_id, moved.model_id) == ("new", "id of another")
    third.send_complete("new")
    await new
    assert house.scheduler.received.empty()


async def test_health_is_that_of_the_model_that_new_requests_are_for(tmp_path: Path) -> None:
    """Over HTTP as over gRPC: a replica of the old model serves nothing new."""
    port = free_port()
    async with replica_house(http_port=port) as house:
        second = await house.add(model=model(write_model_folder(tmp_path / "another")))
        await serves(house, "another")
        await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/health")
        second.ready, second.not_ready_reason = False, "its target is lost"
        async with asyncio.timeout(30):
            while (await house.client.server_info()).num_ready_replicas == 2:
                pass
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/health")
        assert refused.value.code == 503
        assert "its target is lost" in refused.value.read().decode()


class SlowReader:
    """Reads nothing before it is told to."""

    def __init__(self, *_: object) -> None:
        self.may_read, self.has_closed = asyncio.Event(), asyncio.Event()

    def open(self) -> None: ...

    async def read(self, form: Form, data: bytes) -> Reading:
        await self.may_read.wait()
        return Reading()

    async def close(self) -> None:
        self.has_closed.set()


async def test_a_model_is_forgotten_once_its_last_request_was_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its processes would hold memory for as long as nothing else changes."""
    old = SlowReader()
    monkeypatch.setattr(models_module, "RequestReader", lambda *_: old)
    models = Models(gateway_spec("127.0.0.1:1"))
    monkeypatch.setattr(models_module, "RequestReader", SlowReader)
    loaded = asyncio.Event()
    models.learn(model(write_model_folder(tmp_path / "another")), loaded.set)
    await loaded.wait()
    asked = asyncio.create_task(models.read(Form.GENERATE, b""))
    await asyncio.sleep(0)
    models.choose(["id of another"], ["id of another"])
    await asyncio.sleep(0)
    assert not old.has_closed.is_set()
    old.may_read.set()
    await asked
    async with asyncio.timeout(30):
        await old.has_closed.wait()


async def test_the_way_back_is_a_change_like_any_other(house: ReplicaHouse, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "another")
    await house.add(model=model(folder))
    await serves(house, "another")
    third = await house.add()
    await serves(house, "demo")
    house.tell(1, removed=True)
    asked = [asyncio.ensure_future(house.client.generate("x", request_id=f"{number}")) for number in range(2)]
    assert {(await each.next_submit()).model_id for each in (house.scheduler, third)} == {""}
    house.scheduler.send_complete("0")
    third.send_complete("0")
    for scheduler in (house.scheduler, third):
        scheduler.send_complete("1")
    await asyncio.gather(*asked)


async def test_a_model_that_cannot_be_read_takes_no_requests(house: ReplicaHouse, tmp_path: Path) -> None:
    broken = write_model_folder(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    second: FakeScheduler = await house.add(model=model(broken))
    async with asyncio.timeout(30):
        while (await house.client.server_info()).num_ready_replicas < 2:
            pass
    asked = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.scheduler.next_submit()
    house.scheduler.send_complete("r")
    await asked
    assert (await house.client.model_info()).model == "demo"
    assert second.received.empty()


def test_a_client_that_resumes_tells_which_model_began() -> None:
    request = ResumableRequest(pb.GenerateRequest(text="x"), timeout_s=None, resume_within_s=1.0, now=lambda: 0.0)
    started = pb.GenerateStarted(seed=3, model_id="the one that began")
    request.on_message(pb.GenerateResponse(request_id="r", started=started))
    again = request.message()
    assert again.resume_from.model_id == "the one that began"
    spec = gateway_spec("127.0.0.1:1")
    spec.model_id = "the one that is served now"
    with pytest.raises(Refusal, match="resume_from: the output was begun by another model") as caught:
        build_validator(spec).validate(again)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    spec.model_id = "the one that began"
    assert build_validator(spec).validate(again).resume_from.samples
