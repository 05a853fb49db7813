"""What clients may do to a gateway, in addition to what `tests/helpers/hostile.py` does to any port. Everything is
seeded."""

import random
from collections.abc import Callable

from echelon.pb import inference_pb2 as pb
from tests.helpers.scrambled import scramble

_LARGE: tuple[Callable[[int], bytes], ...] = (
    lambda size: pb.GenerateRequest(text="def f(x): return x + 1\n" * (size // 23)).SerializeToString(),
    lambda size: pb.GenerateRequest(text=" " * size).SerializeToString(),
    lambda size: pb.GenerateRequest(text="x" * size).SerializeToString(),
    lambda size: pb.GenerateRequest(text="\ufdfa" * (size // 3)).SerializeToString(),  # normalised to 18 characters
    lambda size: pb.GenerateRequest(token_ids=pb.TokenIds(ids=bytes(size))).SerializeToString(),
    lambda size: pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x " * (size // 2))])
    ).SerializeToString(),
    lambda size: _field(4, b"\x0a\x00" * (size // 2)),  # empty messages of a conversation
    lambda size: _field(5, b"\x08\x01" * (size // 2)),  # token ids that are not packed
    lambda size: _field(6, b"\x52\x00" * (size // 2)),  # empty stop strings
    lambda size: _field(6, b"\x42\x00" * (size // 2)),  # empty entries of logit_bias
    lambda size: b"\x0a\x00" * (size // 2),  # request ids
    bytes,
)
HTTP_ATTACKS = (
    b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 100_000 + b"\r\n",
    b"GET /metrics HTTP/1.1\r\nA: " + b"b" * 1_000_000 + b"\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 1000,
    b"GET /metrics HTTP/1.1\r\n",  # and nothing more
    b"GET /metrics HTTP/1.1\r\n\r\n" * 50,
    b"\r\n" * 1000,
)


_COMPLETION, _CHAT = "/v1/completions", "/v1/chat/completions"
_WRONG = b'"top_p": 7'  # found last
_BODIES: tuple[tuple[str, Callable[[int], bytes]], ...] = (
    (_COMPLETION, lambda size: b'{"prompt": "%s", %s}' % (b"x = 1\\n" * (size // 7), _WRONG)),
    (_COMPLETION, lambda size: b'{"prompt": "%s", %s}' % (b"\\u0041" * (size // 6), _WRONG)),
    (_COMPLETION, lambda size: b'{"prompt": [1%s], %s}' % (b",1" * (size // 2), _WRONG)),
    (_COMPLETION, lambda size: b'{"prompt": ["a"%s], %s}' % (b',"a"' * (size // 4), _WRONG)),
    (_COMPLETION, lambda size: b'{"prompt": [[1]%s], %s}' % (b",[1]" * (size // 4), _WRONG)),
    (_COMPLETION, lambda size: b'{"prompt": "a", "stop": [""%s]}' % (b',""' * (size // 3))),
    (
        _COMPLETION,
        lambda size: b'{"prompt": "a", %s, "a": %s}' % (_WRONG, b"[" * 100 + b"1" * (size - 200) + b"]" * 100),
    ),
    (_CHAT, lambda size: b"[" * size),
    (_CHAT, lambda size: b'{"messages": [{"role":"a"}%s], %s}' % (b',{"role":"a"}' * (size // 13), _WRONG)),
    (
        _CHAT,
        lambda size: b'{"messages": [{"role":"a","content":[%s{}]}]}' % (b'{"type":"text","text":""},' * (size // 26)),
    ),
    (_CHAT, lambda size: b'{"messages": [], %s}' % b",".join(b'"%d": 1' % i for i in range(size // 12))),
    ("/tokenize", lambda size: b'{"prompt": "%s"}' % (b"y" * size)),
    ("/detokenize", lambda size: b'{"tokens": [1%s]}' % (b",1" * (size // 2))),
)


def hostile_bodies(max_bytes: int) -> list[tuple[str, bytes]]:
    """Paths of the HTTP API with bodies of about the most that one may hold; all but two are refused."""
    return [(path, make(max_bytes - 300)) for path, make in _BODIES]


def large_requests(max_bytes: int) -> list[bytes]:
    """Requests with about the most that a message may hold, one for each of its forms."""
    return [make(max_bytes - 64) for make in _LARGE]


def odd_request(rng: random.Random) -> bytes:
    """A message that is well-formed but makes no sense, or is damaged, or is not a message at all."""
    request = pb.GenerateRequest()
    scramble(rng, request, rng.choice([0.1, 0.5, 0.9]))
    data = bytearray(request.SerializeToString())
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.choice([1, 10, 300, 3000]))
        case 1:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 2 if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _field(number: int, payload: bytes) -> bytes:
    size, length = len(payload), []
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + payload
