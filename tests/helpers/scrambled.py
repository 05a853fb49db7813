"""Messages that are well-formed but make no sense."""

import math
import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def scramble(rng: random.Random, message: Message, share: float) -> None:
    """Gives some fields of a message, and of messages in it, any value. The last field set in a oneof stays."""
    for field in message.DESCRIPTOR.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        value = getattr(message, field.name)
        if isinstance(value, Message):
            if field.containing_oneof is None or rng.random() < share:
                value.SetInParent()
                scramble(rng, value, share)
        elif rng.random() >= share:
            continue
        elif is_map:
            key, item = field.message_type.fields
            value[_any_value(rng, key)] = _any_value(rng, item)
        elif isinstance(value, str | bytes | int | float | bool):
            setattr(message, field.name, _any_value(rng, field))
        elif field.message_type is not None:
            for _ in range(rng.randint(0, 3)):
                scramble(rng, value.add(), share)
        else:
            value.extend(_any_value(rng, field) for _ in range(rng.randint(0, 3)))


def _any_value(rng: random.Random, field: FieldDescriptor) -> Any:
    """Often a bad value: the ends of the range, not a number; sometimes an ordinary one."""
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice([0.0, 0.5, 1.0, -1.0, 3.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
    if field.cpp_type == FieldDescriptor.CPPTYPE_INT32:
        return rng.choice([0, 1, 2, 5, 39, 40, -1, 2**31 - 1, -(2**31)])
    if field.cpp_type == FieldDescriptor.CPPTYPE_UINT32:
        return rng.choice([0, 1, 2, 5, 39, 40, 2**32 - 1])
    if field.cpp_type == FieldDescriptor.CPPTYPE_UINT64:
        return rng.choice([0, 1, 2**63, 2**64 - 1])
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([0, 1, 2, 7])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    text: str = rng.choice(["", "a", "abc", "\x00", "z" * 2000])
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
