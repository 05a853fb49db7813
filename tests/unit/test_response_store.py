"""Responses that are kept for those who continue them."""

from gateway.doors.openai.response_store import KEPT_S, ResponseStore


def store(now: list[float], max_bytes: int = 1000) -> ResponseStore:
    return ResponseStore(lambda: now[0], max_bytes=max_bytes)


def test_a_caller_sees_its_own_alone_and_for_a_limited_time() -> None:
    now = [0.0]
    kept = store(now)
    kept.put("me", "resp_1", response="{}", items="[1]")
    body = b'{"input": "x", "previous_response_id" : "resp_1", "user": "u"}'
    assert kept.earlier("me", body) == {"resp_1": "[1]"}
    assert kept.earlier("you", body) == {}
    assert kept.get("you", "resp_1") is None
    now[0] = KEPT_S - 1
    assert kept.get("me", "resp_1") is not None
    now[0] = KEPT_S + 1
    assert kept.get("me", "resp_1") is None
    assert kept.earlier("me", body) == {}


def test_old_ones_make_room() -> None:
    kept = store([0.0], max_bytes=100)
    for number in range(9):
        kept.put("me", str(number), response="x" * 20, items="y" * 20)
    assert [number for number in range(9) if kept.get("me", str(number))] == [7, 8]
    assert kept.drop("me", "7")
    assert not kept.drop("me", "7")
    kept.put("me", "9", response="x" * 20, items="y" * 20)
    assert kept.get("me", "8") is not None
