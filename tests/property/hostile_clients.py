"""A gateway under attack: what a stream, a health check and the gateway's event loop notice.

    python -m tests.property.hostile_clients --count 100 --seed 1 --max-model-len 131072

The attackers run in another process: they send large requests and senseless ones in turn, with noise at both ports
between them. Prints the longest times without and under attack, and how the calls ended. The exit status is 1 if the
event loop once computed for 20 ms longer in one go than when idle, or if a call had no status. The pauses include waits
for a core, so run it on three cores or more.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import random
import sys
from collections import Counter

import grpc

from childproc.wires import open_channel
from tests.helpers.attacked_gateway import AttackedGateway, Report
from tests.helpers.hostile import knock
from tests.helpers.hostile_clients import HTTP_ATTACKS, hostile_bodies, large_requests, odd_request

_IDLE_S = 5.0
_ALLOWED_ABOVE_IDLE_S = 0.02
_CALL_S = 120.0
_SIDE_BY_SIDE = 8


async def attack(address: str, http_port: int, count: int, seed: int, max_bytes: int) -> Counter[str]:
    """How many of `count` calls, and half as many over HTTP, ended with each status."""
    rng = random.Random(seed)
    large, bodies = large_requests(max_bytes), hostile_bodies(max_bytes)
    turns = asyncio.Semaphore(_SIDE_BY_SIDE)
    host, _, port = address.rpartition(":")
    async with open_channel(address, ("grpc.max_send_message_length", -1)) as channel:
        calls = []
        for number in range(count):
            data = large[number // 2 % len(large)] if number % 2 else odd_request(rng)
            calls.append(asyncio.create_task(_call(channel, data, turns)))
            path, body = bodies[number // 2 % len(bodies)]
            if number % 2:
                calls.append(asyncio.create_task(_post(http_port, path, body, turns)))
            attacked = HTTP_ATTACKS[number % len(HTTP_ATTACKS)]
            noisy = await asyncio.to_thread(knock, (host, int(port)), rng)
            _, writer = await asyncio.open_connection(host, http_port)
            writer.write(attacked)
            with contextlib.suppress(OSError):
                await writer.drain()
            noisy.close()
            writer.close()
        return Counter(await asyncio.gather(*calls))


async def _call(channel: grpc.aio.Channel, data: bytes, turns: asyncio.Semaphore) -> str:
    async with turns:
        call = channel.unary_stream("/echelon.v1.Inference/Generate")(data, timeout=_CALL_S)
        # An accepted request runs until somebody cancels it: the scheduler receives it and does not answer.
        waiting = asyncio.create_task(call.code())
        done, _ = await asyncio.wait([waiting], timeout=None if len(data) > 65536 else 1.0)
        if not done:
            call.cancel()
        return (await waiting).name


async def _post(port: int, path: str, body: bytes, turns: asyncio.Semaphore) -> str:
    """The status, as "HTTP 400"."""
    async with turns:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(), _CALL_S)
        writer.close()
        return f"HTTP {answer[9:12].decode()}"


async def run(count: int, seed: int, max_model_len: int) -> bool:
    max_bytes = max(32 * max_model_len, 1 << 20)  # what the gateway accepts
    async with AttackedGateway(max_model_len=max_model_len) as gateway:
        gc.freeze()  # as gateway/__main__.py does
        idle = await gateway.observe(asyncio.sleep(_IDLE_S))
        attacked = await gateway.observe(gateway.attack(count=count, seed=seed, max_bytes=max_bytes))
    for name, report in (("idle", idle), ("under attack", attacked)):
        print(_line(name, report))
    print("calls:", ", ".join(f"{number} {code}" for code, number in sorted(attacked.codes.items())))
    answered = "DEADLINE_EXCEEDED" not in attacked.codes and sum(attacked.codes.values()) == count + count // 2
    return answered and attacked.busy_s <= idle.busy_s + _ALLOWED_ABOVE_IDLE_S


def _line(name: str, report: Report) -> str:
    pause_ms, busy_ms, health_ms, chunk_ms = (
        f"{seconds * 1e3:.1f} ms" for seconds in (report.pause_s, report.busy_s, report.health_s, report.chunk_s)
    )
    return (
        f"{name:>12}: longest pause {pause_ms}, most computing {busy_ms}, slowest of {report.num_checks} health checks "
        f"{health_ms}, slowest of {report.num_chunks} chunks {chunk_ms}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=131_072)
    parser.add_argument("--attack", nargs=5, metavar=("ADDRESS", "HTTP_PORT", "COUNT", "SEED", "BYTES"))
    options = parser.parse_args()
    if options.attack:
        address, *numbers = options.attack
        print(json.dumps(asyncio.run(attack(address, *map(int, numbers)))))
        return
    sys.exit(0 if asyncio.run(run(options.count, options.seed, options.max_model_len)) else 1)


if __name__ == "__main__":
    main()
