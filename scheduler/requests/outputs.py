"""What the scheduler delivers for a request."""

from dataclasses import dataclass
from typing import Self

from grpc import StatusCode

from echelon.pb import inference_pb2, sampling_pb2


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens of one sample, and the text that became certain with them."""

    request_id: str
    index: int
    offset: int  # number of output tokens before this chunk
    token_ids: list[int]
    text: str
    logprobs: list[sampling_pb2.PositionLogprobs]
    drafted: list[bool]  # for each token


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    request_id: str
    message: inference_pb2.GenerateComplete


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    request_id: str
    code: int  # canonical gRPC status code
    message: str

    @classmethod
    def of(cls, request_id: str, code: StatusCode, message: str) -> Self:
        return cls(request_id=request_id, code=code.value[0], message=message)


Output = Chunk | Completed | Failed
