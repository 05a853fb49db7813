"""Checks a move order before anything is moved."""

from collections.abc import Sequence

from childproc.segment_shape import DIGEST_BYTES
from echelon.pb.worker_pb2 import EngineInfo, MoveOrder
from workers.engine.rounds import ProtocolError

_FIELDS = {  # that an order of each kind has, all of one length
    MoveOrder.STORE: ("block_ids", "host_slots"),
    MoveOrder.LOAD: ("block_ids", "host_slots"),
    MoveOrder.WRITE: ("host_slots", "digests"),
    MoveOrder.READ: ("host_slots", "digests"),
    MoveOrder.DROP: ("digests",),
}
_ON_DISK = (MoveOrder.WRITE, MoveOrder.READ, MoveOrder.DROP)


def check_order(order: MoveOrder, info: EngineInfo) -> None:
    """Raises ProtocolError if the engine has no such tier, or if blocks, slots or digests cannot be meant.

    Whether other moves or rounds use them is for the scheduler to know."""
    where = f"move {order.move_id}:"
    fields = _FIELDS.get(order.kind)
    if fields is None:
        raise ProtocolError(f"{where} kind: {order.kind} is none")
    tier, size = ("disk", info.num_disk_blocks) if order.kind in _ON_DISK else ("host", info.num_host_slots)
    if not size:
        raise ProtocolError(f"{where} kind: {MoveOrder.Kind.Name(order.kind)}, but the engine has no {tier} tier")
    _check_lengths(order, fields, where)
    _check_ids(order.block_ids, info.num_blocks, f"{where} block_ids: block")
    _check_ids(order.host_slots, info.num_host_slots, f"{where} host_slots: slot")
    for digest in order.digests:
        if len(digest) != DIGEST_BYTES:
            raise ProtocolError(f"{where} digests: one of {len(digest)} bytes, must have {DIGEST_BYTES}")
    if len(set(order.digests)) < len(order.digests):
        raise ProtocolError(f"{where} digests: one is named twice")


def _check_lengths(order: MoveOrder, fields: Sequence[str], where: str) -> None:
    num_blocks = len(getattr(order, fields[0]))
    if not num_blocks:
        raise ProtocolError(f"{where} {fields[0]}: is empty")
    for field in ("block_ids", "host_slots", "digests"):
        length, expected = len(getattr(order, field)), num_blocks if field in fields else 0
        if length != expected:
            raise ProtocolError(f"{where} {field}: has {length} entries, must have {expected}")


def _check_ids(ids: Sequence[int], end: int, where: str) -> None:
    if ids and max(ids) >= end:
        raise ProtocolError(f"{where} {max(ids)}, must be below {end}")
    if len(set(ids)) < len(ids):
        raise ProtocolError(f"{where} named twice")
