"""Strict decoding of requests.

protobuf drops two mistakes on the floor: a field that this server does not know (a misspelt or newer sampling field
would silently change nothing), and the name of the string that is not UTF-8 (the client would see UNKNOWN). The walk
below looks at the bytes before protobuf does and names the field. It skips over payloads, so its cost is one step a
field, not one a byte. Fields are limited, because two bytes can make one that takes 100 in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)

MAX_FIELDS = 1 << 18  # a number of token_ids that does not come packed is one each

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_WIRE_TYPES = {
    FieldDescriptor.TYPE_STRING: _LEN,
    FieldDescriptor.TYPE_BYTES: _LEN,
    FieldDescriptor.TYPE_MESSAGE: _LEN,
    FieldDescriptor.TYPE_DOUBLE: _I64,
    FieldDescriptor.TYPE_FIXED64: _I64,
    FieldDescriptor.TYPE_SFIXED64: _I64,
    FieldDescriptor.TYPE_FLOAT: _I32,
    FieldDescriptor.TYPE_FIXED32: _I32,
    FieldDescriptor.TYPE_SFIXED32: _I32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """What a handler receives in place of a request that could not be decoded."""

    error: str


def strict_decoder(message_class: type[M], *, max_fields: int = MAX_FIELDS) -> Callable[[bytes], M | Malformed]:
    """A deserializer for grpc that never raises: an exception in it would reach the client as UNKNOWN.

    Fields count with those of all messages inside."""

    descriptor = cast(Descriptor, message_class.DESCRIPTOR)

    def decode(data: bytes) -> M | Malformed:
        try:
            fault = _find_fault(memoryview(data), descriptor, iter(range(max_fields)), path="")
            return Malformed(error=fault) if fault else message_class.FromString(data)
        except StopIteration:
            return Malformed(error=f"request: has more than {max_fields} fields")
        except (DecodeError, IndexError):
            return Malformed(error=f"the request is not a {descriptor.full_name} message")

    return decode


def _find_fault(data: memoryview, message: Descriptor, allowed: Iterator[int], *, path: str) -> str | None:
    """The first unknown field or string that is not UTF-8. Raises IndexError where the bytes end too early, and
    StopIteration at a field for which `allowed` has no item."""
    position = 0
    seen: Counter[int] = Counter()
    while position < len(data):
        next(allowed)
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        field = message.fields_by_number.get(number)
        if field is None or not _fits(field, wire_type):
            return _unknown_field(message, number, path)
        payload, position = _read_payload(data, position, wire_type)
        name = path + field.name
        if field.message_type is not None:
            # Only a repeated field of messages lacks presence.
            name += "" if field.has_presence else f"[{seen[number]}]"
            fault = _find_fault(payload, field.message_type, allowed, path=f"{name}.")
        else:
            fault = _find_bad_utf8(payload, name) if field.type == FieldDescriptor.TYPE_STRING else None
        if fault:
            return fault
        seen[number] += 1
    return None


def _fits(field: FieldDescriptor, wire_type: int) -> bool:
    expected = _WIRE_TYPES.get(field.type, _VARINT)
    return wire_type in (expected, _LEN)  # numbers may come packed


def _unknown_field(message: Descriptor, number: int, path: str) -> str:
    where = path.rstrip(".") or "request"
    known = ", ".join(f"{field.name}={field.number}" for field in message.fields)
    return f"{where}: unknown field number {number}; {message.full_name} of this server has {known}"


def _find_bad_utf8(payload: memoryview, name: str) -> str | None:
    try:
        str(payload, "utf-8")
    except UnicodeDecodeError as err:
        return f"{name}: invalid UTF-8 at byte {err.start} ({err.reason})"
    return None


def _read_payload(data: memoryview, position: int, wire_type: int) -> tuple[memoryview, int]:
    if wire_type == _VARINT:
        _, end = _read_varint(data, position)
    elif wire_type == _LEN:
        size, position = _read_varint(data, position)
        end = position + size
    else:
        end = position + (8 if wire_type == _I64 else 4)
    if end > len(data):
        raise IndexError("a field ends beyond the message")
    return data[position:end], end


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("a varint is longer than ten bytes")
