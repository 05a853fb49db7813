"""Both public ports under generated requests: no call may end with a failure of the gateway.

    python -m tests.property.fuzzed_doors --cases 10000 --seed 1 [--door http | grpc]

HTTP: schemathesis makes requests of the gateway's own OpenAPI document, half of them as the document allows and half as
it does not. gRPC: messages of every method of every service, well-formed without sense, damaged, or no messages at all.
The gateway is real, with its processes that read requests; its scheduler answers everything that reaches it.

Prints how the calls ended, and each failure: over HTTP a status of 500 or more or a closed connection, over gRPC
INTERNAL, UNKNOWN or DATA_LOSS; at the end the gateway must still serve. The exit status is 1 if there was one.
`pip install schemathesis` first.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from echelon import Client, __version__
from echelon.channel import open_channel
from echelon.pb import control_pb2, inference_pb2, process_pb2
from gateway.server import Gateway
from tests.helpers.answering_scheduler import AnsweringScheduler
from tests.helpers.fake_scheduler import serve
from tests.helpers.scrambled import scramble
from tests.helpers.scrape import free_port

_ROOT = Path(__file__).parents[2]
_ENDLESS = {"/control/rounds"}  # of the document: paths whose answer has no end
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
_FAILURES = {"INTERNAL", "UNKNOWN", "DATA_LOSS"}
_CALL_S = 60.0
# The document gives no ranges, so few bodies with many fields are served. Of this share most fields are left out.
_THINNED = 0.6
_PROMPTS = {"prompt", "messages", "input", "tokens"}
_WATCH_S = 0.2  # for streams that end only with their client


class FuzzedGateway:
    """Runs in a thread of its own, inside `with`."""

    def __init__(self) -> None:
        self.address = ""
        self.http_port = free_port()
        self.scheduler = AnsweringScheduler()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FuzzedGateway":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(120)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        self._server, scheduler_address = await serve(self.scheduler)
        spec = process_pb2.GatewaySpec(
            name="fuzzed",
            version=__version__,
            server=process_pb2.ServerSection(host="127.0.0.1", http_port=self.http_port),
            model_name="demo",
            model_dir=str(_ROOT / "models" / "demo-target"),
            scheduler_addresses=[scheduler_address],
            max_model_len=256,
            vocab_size=4096,
        )
        self._gateway = Gateway(spec)
        self.address = await self._gateway.start()
        self._gateway.open_reader()
        await self._gateway.wait_until_ready()

    async def _stop(self) -> None:
        await self._gateway.drain(grace_s=0)
        await self._server.stop(grace=0)


@contextlib.contextmanager
def checked(gateway: FuzzedGateway) -> Iterator[None]:
    """Raises if the gateway does not serve afterwards."""
    yield
    with Client(gateway.address) as client:
        assert client.generate([5, 6, 7], max_tokens=3).token_ids == (5, 6, 7)


def fuzz_http(gateway: FuzzedGateway, num_cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How the calls ended, and the failures."""
    import requests
    import schemathesis.openapi
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    base = f"http://127.0.0.1:{gateway.http_port}"
    document = requests.get(f"{base}/openapi.json", timeout=_CALL_S).json()
    schema = schemathesis.openapi.from_dict(document)
    found = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in found if operation.path not in _ENDLESS]
    # A path without a body or parameters has one case.
    rich = [operation for operation in operations if operation.body or operation.path_parameters or operation.query]
    ends: Counter[str] = Counter()
    failures: list[str] = []
    rng = random.Random(seed)

    def call(case: Any) -> None:
        if rng.random() < _THINNED and isinstance(case.body, dict):
            case.body = {key: value for key, value in case.body.items() if key in _PROMPTS or rng.random() < 0.1}
        try:
            status = case.call(base_url=base, timeout=_CALL_S).status_code
        except requests.RequestException as err:
            status = 599
            failures.append(f"{case.operation.label}: {type(err).__name__}: {err}")
        ends[f"HTTP {status}"] += 1
        if 500 <= status < 599:
            failures.append(f"{status} {case.as_curl_command()}")

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if operation not in rich and mode is GenerationMode.NEGATIVE:
                continue
            share = -(-num_cases // (2 * len(rich))) if operation in rich else 1
            quiet = settings(
                max_examples=share,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            with contextlib.suppress(Unsatisfiable):  # nothing that the document forbids can be sent
                seeded(seed)(quiet(given(operation.as_strategy(generation_mode=mode))(call)))()
    return ends, failures


def fuzz_grpc(gateway: FuzzedGateway, num_cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """The same over gRPC. Methods take turns."""
    rng = random.Random(seed)
    # A newer grpc.health.v1 has a method that the gateway does not.
    methods = [method for service in _SERVICES for method in service.methods if method.name != "List"]
    ends: Counter[str] = Counter()
    failures: list[str] = []
    with open_channel(gateway.address, None) as channel:
        for number in range(num_cases):
            method = methods[number % len(methods)]
            data = odd_message(rng, method)
            code = call_method(channel, method, data)
            ends[code] += 1
            if code in _FAILURES:
                failures.append(f"{code} {method.full_name} {data.hex()}")
    return ends, failures


def odd_message(rng: random.Random, method: MethodDescriptor) -> bytes:
    """Well-formed without sense, damaged, or no message at all."""
    message = GetMessageClass(method.input_type)()
    scramble(rng, message, rng.choice([0.02, 0.1, 0.5, 0.9]))
    if isinstance(message, inference_pb2.GenerateRequest) and rng.random() < 0.7:  # often one that is served
        for name in rng.sample([field.name for field in message.DESCRIPTOR.fields], k=rng.randint(7, 11)):
            message.ClearField(name)
        message.text = "def f"
    data = bytearray(message.SerializeToString())
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.choice([1, 10, 300, 3000]))
        case 1:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 2 if data:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 3:
            return bytes(data + data[: rng.randrange(len(data) + 1)])
    return bytes(data)


def call_method(channel: grpc.Channel, method: MethodDescriptor, data: bytes) -> str:
    """The name of the status. A stream that ends only with its client is left."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            channel.unary_unary(path)(data, timeout=_CALL_S)
            return "OK"
        timeout_s = _WATCH_S if method.name == "Watch" else _CALL_S
        if method.client_streaming:
            replies = channel.stream_stream(path)(iter([data]), timeout=timeout_s)
        else:
            replies = channel.unary_stream(path)(data, timeout=timeout_s)
        for _ in replies:
            pass
    except grpc.RpcError as err:
        return str(err.code().name)
    return "OK"


_DOORS: dict[str, Callable[[FuzzedGateway, int, int], tuple[Counter[str], list[str]]]] = {
    "http": fuzz_http,
    "grpc": fuzz_grpc,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="at each door")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--door", choices=sorted(_DOORS))
    arguments = parser.parse_args()
    num_failures = 0
    for door in [arguments.door] if arguments.door else sorted(_DOORS):
        with FuzzedGateway() as gateway, checked(gateway):
            ends, failures = _DOORS[door](gateway, arguments.cases, arguments.seed)
            print(f"{door}: {sum(ends.values())} calls, {gateway.scheduler.num_answered} reached the scheduler")
        print("  " + ", ".join(f"{end} {count}" for end, count in ends.most_common()))
        for failure in failures[:20]:
            print(f"  failed: {failure[:1000]}")
        num_failures += len(failures)
    print(f"{num_failures} failures")
    return int(num_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
