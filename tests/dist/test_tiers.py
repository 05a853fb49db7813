"""Tiers of the KV cache as they are deployed: worker processes, gloo, gRPC, files. A target with one and two ranks, and
a layer-parallel draft on the same ranks."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import grpc
import pytest

from echelon.pb.process_pb2 import TierSpec
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import EngineInfo, LayerGroup, MoveOrder, MoveResult, Row
from tests.helpers.engines import DRAFT, TARGET, engine_spec
from tests.helpers.layer_parallel_cases import GROUPS, write_deep_model
from tests.helpers.rounds import INCARNATION, Driver, Seq, greedy, seeded
from tests.helpers.worker_client import RoundStream, WorkerGroup
from workers.tiers.files import aligned_buffer
from workers.tiers.segment_store import SegmentStore

BLOCK_SIZE = 4
PROMPT = [5, 99, 3, 14, 15, 92, 6, 53, 58, 9, 79, 31, 41, 7, 7, 7, 80, 2, 71]
NUM_STORED = len(PROMPT) // BLOCK_SIZE
NUM_TOKENS = 12
NUM_FULL = (len(PROMPT) + NUM_TOKENS - 1) // BLOCK_SIZE  # blocks of a seq that has generated them, all with KV
OTHER = 7  # the slot of another seq
NUM_HOST_SLOTS = 24
SLOTS, OTHER_SLOTS = [5, 2, 7, 0], [1, 3, 4, 6]
SAMPLING = seeded(3)
VALID: dict[str, object] = {
    "move_id": 1,
    "incarnation": INCARNATION,
    "kind": MoveOrder.STORE,
    "block_ids": [0],
    "host_slots": [0],
}
DISK_BYTES = 4 << 20


class House:
    """A worker group with tiers, which can be stopped and started again over the same disk."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.disk = folder / "disk"
        self.world_size = world_size
        self._folder = folder
        self._lives = count()
        model = write_deep_model(folder / "model", "llama-tied")
        tiers = TierSpec(
            num_host_slots=NUM_HOST_SLOTS,
            disk_path=str(self.disk),
            disk_bytes=DISK_BYTES,
            disk_node_bytes=2 * world_size * DISK_BYTES,
        )
        groups = [LayerGroup(layers=group) for group in GROUPS[2]]
        shared = {"tiers": tiers, "batch_invariant": True, "block_size": BLOCK_SIZE, "attention": "budgeted"}
        self._engines = [
            engine_spec(model, TARGET, tp_size=world_size, **shared),
            engine_spec(model, DRAFT, lp_size=2, layer_groups=groups, **shared),
        ]
        self.start()

    def start(self) -> None:
        logs = self._folder / f"life{next(self._lives)}"
        self.group = WorkerGroup(logs, self.world_size, self._engines).spawn().wait_ready()
        target, draft = self.group.ready.worker.engines
        self.engines = {"target": target, "draft": draft}

    def stop(self) -> None:
        for rank in self.group.ranks:
            rank.popen.terminate()
        assert [rank.popen.wait() for rank in self.group.ranks] == [0] * self.world_size

    def open(self, info: EngineInfo) -> "Client":
        return Client(info, self.group.ready.address)

    def shards(self) -> Iterator[tuple[str, int, EngineInfo]]:
        """Role and rank of each part of an engine, and the engine."""
        for role, info in self.engines.items():
            yield from ((role, rank, info) for rank in range(self.world_size))

    def rank_folder(self, role: str, rank: int) -> Path:
        (folder,) = self.disk.glob(f"*/{role}-rank{rank}of{self.world_size}")
        return folder


class Client(Driver):
    """A scheduler that knows which blocks it gave to whom, and moves them."""

    def __init__(self, info: EngineInfo, address: str) -> None:
        self.stream = RoundStream(address, info.role)
        super().__init__(info, self.stream.call)
        self.blocks: dict[int, list[int]] = {}  # by slot
        self._move_ids = count(1)

    def blocks_for(self, seq: Seq, num_tokens: int) -> list[int]:
        new = super().blocks_for(seq, num_tokens)
        self.blocks.setdefault(seq.slot, []).extend(new)
        return new

    def resume(self, slot: int, prompt: Sequence[int], sampling: SeqSampling, block_ids: Sequence[int]) -> Seq:
        """Start a seq whose first blocks are there already."""
        seq = self.start(slot, prompt, sampling)
        seq.num_blocks, seq.num_computed = len(block_ids), len(block_ids) * BLOCK_SIZE
        self.inits[-1].block_table.extend(block_ids)
        self.inits[-1].num_computed_tokens = seq.num_computed
        self.blocks[slot] = list(block_ids)
        return seq

    def resume_in_host(self, slot: int, prompt: Sequence[int], sampling: SeqSampling, host_slots: Sequence[int]) -> Seq:
        """Start a seq whose first blocks are in host memory, and stay there."""
        seq = self.resume(slot, prompt, sampling, host_slots)
        self.inits[-1].num_in_host = len(host_slots)
        return seq

    def take(self, num_blocks: int) -> list[int]:
        return [self.free_blocks.pop() for _ in range(num_blocks)]

    def order(self, kind: MoveOrder.Kind.ValueType, **fields: Sequence[int] | Sequence[bytes]) -> int:
        move_id = next(self._move_ids)
        order = MoveOrder(move_id=move_id, incarnation=INCARNATION, kind=kind, **fields)  # type: ignore[arg-type]
        self.stream.send_move(order)
        return move_id

    def move(self, kind: MoveOrder.Kind.ValueType, **fields: Sequence[int] | Sequence[bytes]) -> MoveResult:
        result = self.stream.receive_move(self.order(kind, **fields))
        assert result.incarnation == INCARNATION
        return result

    def move_all(self, kind: MoveOrder.Kind.ValueType, **fields: Sequence[int] | Sequence[bytes]) -> None:
        result = self.move(kind, **fields)
        assert (list(result.failed), result.error) == ([], "")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.__exit__()


@pytest.fixture(scope="module", params=[1, 2], ids=lambda size: f"ranks{size}")
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("tiers"), request.param)
    try:
        yield made
    finally:
        made.group.__exit__()


def digests(name: str, number: int = NUM_STORED) -> list[bytes]:
    return [f"{name} {index}".encode().ljust(16, b".") for index in range(number)]


def generated(client: Client, seq: Seq) -> list[int]:
    """What an engine makes of a seq: the target's tokens, or a draft's chain."""
    if client.info.role == TARGET:
        return client.generate(seq, NUM_TOKENS)
    client.run((seq, client.draft_row(seq, NUM_TOKENS)))
    return seq.output


def overwrite(client: Client, block_ids: list[int]) -> None:
    """Another seq computes into these blocks."""
    client.free_blocks += block_ids
    generated(client, client.start(OTHER, [17] * len(PROMPT), greedy()))
    assert set(block_ids) <= set(client.blocks[OTHER])
    client.run(free_slots=[OTHER])


def keep_whole(client: Client, slot: int, name: str) -> None:
    """Write all blocks of a seq to the disk that are full of KV."""
    block_ids = client.blocks[slot][:NUM_FULL]
    client.move_all(MoveOrder.STORE, block_ids=block_ids, host_slots=range(NUM_FULL))
    client.move_all(MoveOrder.WRITE, host_slots=range(NUM_FULL), digests=digests(name, NUM_FULL))


def first_life(client: Client, role: str) -> list[int]:
    """Returns what the engine generates for PROMPT."""
    expected = generated(client, client.start(0, PROMPT, SAMPLING))
    keep_whole(client, 0, f"{role} whole")
    stored = client.blocks[0][:NUM_STORED]
    client.move_all(MoveOrder.STORE, block_ids=stored, host_slots=SLOTS)
    overwrite(client, stored)
    loaded = client.take(NUM_STORED)
    client.move_all(MoveOrder.LOAD, block_ids=loaded, host_slots=SLOTS)
    assert generated(client, client.resume(1, PROMPT, SAMPLING, loaded)) == expected

    client.move_all(MoveOrder.WRITE, host_slots=SLOTS, digests=digests(role))
    client.move_all(MoveOrder.STORE, block_ids=client.blocks[OTHER][:NUM_STORED], host_slots=SLOTS)
    client.move_all(MoveOrder.WRITE, host_slots=SLOTS, digests=digests(f"{role} other"))
    client.move_all(MoveOrder.READ, host_slots=OTHER_SLOTS, digests=digests(role))
    overwrite(client, loaded)
    client.move_all(MoveOrder.LOAD, block_ids=loaded[::-1], host_slots=OTHER_SLOTS)
    assert generated(client, client.resume(2, PROMPT, SAMPLING, loaded[::-1])) == expected
    keep_whole(client, 2, f"{role} resumed")
    return expected


def second_life(client: Client, role: str, expected: list[int]) -> None:
    kept = {name: digests(f"{role} {name}", NUM_FULL) for name in ("whole", "resumed")}
    assert set(client.stream.disk()) == {*digests(role), *digests(f"{role} other"), *chain(*kept.values())}
    client.move_all(MoveOrder.READ, host_slots=SLOTS, digests=digests(role))
    loaded = client.take(NUM_STORED)
    client.move_all(MoveOrder.LOAD, block_ids=loaded, host_slots=SLOTS)
    assert generated(client, client.resume(0, PROMPT, SAMPLING, loaded)) == expected
    client.move_all(MoveOrder.DROP, digests=digests(role)[:1])
    result = client.move(MoveOrder.READ, host_slots=[0, 1], digests=digests(role)[:2])
    assert (list(result.failed), result.error) == ([0], "")


def opened(folder: Path, block_bytes: int) -> SegmentStore:
    """A rank's disk, while no worker runs."""
    facts = json.loads((folder / "layout.json").read_text())
    num_parts = facts.pop("num_parts")
    del facts["format"], facts["block_bytes"]
    return SegmentStore.open(
        folder, block_bytes=block_bytes, num_parts=num_parts, max_bytes=DISK_BYTES, layout=facts, read_only=True
    )


def read(store: SegmentStore, digest: bytes, block_bytes: int) -> bytes:
    buffer = aligned_buffer(block_bytes)
    assert store.read(digest, buffer)
    return bytes(buffer)


def damage(folder: Path, block: bytes) -> None:
    """Flip a bit of a block wherever it lies."""
    for file in folder.iterdir():
        contents = file.read_bytes()
        if block in contents:
            file.write_bytes(contents.replace(block, bytes([block[0] ^ 1]) + block[1:]))


def test_a_seq_continues_from_blocks_of_other_tiers(house: House) -> None:
    """From host and disk, in this life of the group and the next: the tokens and the KV of the run that was never
    interrupted, bit for bit. A block that one rank's disk has spoiled is a miss, and the group lives on."""
    expected = {}
    for role, info in house.engines.items():
        with house.open(info) as client:
            assert client.stream.disk() == []
            expected[role] = first_life(client, role)
    house.stop()
    for role, rank, info in house.shards():
        folder, size = house.rank_folder(role, rank), info.block_bytes
        store = opened(folder, size)
        for whole, resumed in zip(
            digests(f"{role} whole", NUM_FULL), digests(f"{role} resumed", NUM_FULL), strict=True
        ):
            assert read(store, whole, size) == read(store, resumed, size)
        if rank == house.world_size - 1:
            damage(folder, read(store, digests(f"{role} other")[1], size))
    house.start()
    for role, info in house.engines.items():
        with house.open(info) as client:
            second_life(client, role, expected[role])
            result = client.move(MoveOrder.READ, host_slots=SLOTS, digests=digests(f"{role} other"))
            assert (list(result.failed), result.error) == ([1], "")
            result = client.move(MoveOrder.READ, host_slots=SLOTS, digests=digests(f"{role} other"))
            assert list(result.failed) == [1]


def test_moves_during_rounds_of_others_change_no_token(house: House) -> None:
    """All rounds and moves are under way at once; the moves that end are those of blocks that no round touches."""
    with house.open(house.engines["target"]) as client:
        expected = client.generate(client.start(0, PROMPT, SAMPLING), NUM_TOKENS)
        stored = client.blocks[0][:NUM_STORED]
        client.move_all(MoveOrder.STORE, block_ids=stored, host_slots=SLOTS)
        seq = client.start(1, PROMPT[::-1], SAMPLING)
        plain = client.generate(client.start(2, PROMPT[::-1], SAMPLING), NUM_TOKENS)
        loaded = client.take(NUM_STORED)
        moves = [client.order(MoveOrder.WRITE, host_slots=SLOTS, digests=digests("beside"))]
        client.stream.send(client.round([client.target_row(seq)]))
        for number in range(1, NUM_TOKENS):
            slot, index = NUM_HOST_SLOTS - number, number % NUM_STORED
            moves.append(client.order(MoveOrder.STORE, block_ids=[stored[index]], host_slots=[slot]))
            if number < NUM_STORED + 1:
                moves.append(client.order(MoveOrder.LOAD, block_ids=[loaded[index]], host_slots=[SLOTS[index]]))
            blocks = client.blocks_for(seq, len(PROMPT) + number)
            client.stream.send(client.round([Row(slot=1, chunk_len=1, new_block_ids=blocks)]))
        results = [client.stream.receive() for _ in range(NUM_TOKENS)]
        assert [token for result in results for token in result.rows[0].token_ids] == plain
        assert [list(client.stream.receive_move(move).failed) for move in moves] == [[]] * len(moves)
        assert client.generate(client.resume(3, PROMPT, SAMPLING, loaded), NUM_TOKENS) == expected


def test_attention_reads_blocks_in_host_memory(house: House) -> None:
    """Blocks of a seq leave the device in the middle of its prompt and of its output, and another seq takes their
    places; or they were never on the device. Tokens and their log-probabilities are those of a seq on the device, with
    and without drafts, beside others and alone."""
    sampling = seeded(3, logprobs=2)

    def answers(client: Client, *rows: tuple[Seq, Row]) -> list[tuple[list[int], list[object]]]:
        return [(list(result.token_ids), list(result.logprobs)) for result in client.run(*rows)]

    with house.open(house.engines["target"]) as client:
        seq = client.start(0, PROMPT, sampling)
        expected = [answers(client, (seq, client.target_row(seq))) for _ in range(NUM_TOKENS)]
        output = seq.output
        seq = client.start(1, PROMPT, sampling)
        client.run((seq, client.target_row(seq, chunk_len=10)))
        first, rest = client.blocks[1][:2], client.blocks[1][2:]
        client.move_all(MoveOrder.STORE, block_ids=first, host_slots=[9, 4])
        row = client.target_row(seq)
        row.host_slots.extend([9, 4])
        assert [answers(client, (seq, row))] == expected[:1]
        overwrite(client, first)
        other = client.start(2, PROMPT, sampling)
        client.run((other, client.target_row(other)))
        both = answers(client, (other, client.target_row(other)), (seq, client.target_row(seq)))
        assert both == expected[1] * 2
        rest = client.blocks[1][2:4]
        client.move_all(MoveOrder.STORE, block_ids=rest, host_slots=[0, 1])
        row = client.target_row(seq, drafts=[*output[2:4], output[4] ^ 1])
        row.host_slots.extend([0, 1])
        assert answers(client, (seq, row)) == [
            (output[2:5], [entry for ((_, logprobs),) in expected[2:5] for entry in logprobs])
        ]
        client.free_blocks += rest
        seq = client.resume_in_host(3, PROMPT, sampling, [9, 4, 0, 1])
        assert [answers(client, (seq, client.target_row(seq))) for _ in range(NUM_TOKENS)] == expected


def test_a_new_scheduler_finds_all_slots_and_blocks_free(house: House) -> None:
    """Its moves are answered, although those of its predecessor had the same ids, and the same slots and blocks."""
    with house.open(house.engines["target"]) as old:
        expected = old.generate(old.start(0, PROMPT, SAMPLING), NUM_TOKENS)
        old.move_all(MoveOrder.STORE, block_ids=old.blocks[0][:NUM_STORED], host_slots=SLOTS)
        old.move_all(MoveOrder.WRITE, host_slots=SLOTS, digests=digests("reset"))
        blocks = old.take(NUM_STORED)
        for _ in range(100):
            old.order(MoveOrder.LOAD, block_ids=blocks, host_slots=OTHER_SLOTS)
            old.order(MoveOrder.READ, host_slots=SLOTS, digests=digests("nowhere"))
        with house.open(house.engines["target"]) as new:
            assert set(digests("reset")) <= set(new.stream.disk())
            new.move_all(MoveOrder.READ, host_slots=SLOTS, digests=digests("reset"))
            new.move_all(MoveOrder.LOAD, block_ids=blocks, host_slots=SLOTS)
            new.free_blocks = [block for block in new.free_blocks if block not in blocks]
            assert new.generate(new.resume(0, PROMPT, SAMPLING, blocks), NUM_TOKENS) == expected
        assert old.stream.ending()[0] == grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_ids": [1 << 20], "host_slots": [0]}, "move 1: block_ids: block 1048576, must be below {num_blocks}"),
        (
            {"block_ids": [0], "host_slots": [0], "incarnation": 6},
            "move 1: incarnation: 6, but the stream's hello said 7",
        ),
        ({"block_ids": [0], "host_slots": [0], "move_id": 0}, "move 0: move_id: must be above 0"),
    ],
)
def test_an_impossible_move_ends_only_its_stream(house: House, fields: dict[str, object], message: str) -> None:
    info = house.engines["target"]
    with house.open(info) as client, house.open(house.engines["draft"]) as other:
        client.stream.send_move(MoveOrder(**VALID | {"move_id": 0}))  # type: ignore[arg-type]
        client.stream.send_move(MoveOrder(**VALID | fields))  # type: ignore[arg-type]
        code, details = client.stream.ending()
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, message.format(num_blocks=info.num_blocks))
        other.move_all(MoveOrder.STORE, block_ids=[0], host_slots=[0])
    with house.open(info) as client:
        client.move_all(MoveOrder.STORE, block_ids=[0], host_slots=[0])
