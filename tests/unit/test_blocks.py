"""Which seq holds which block, and which prefixes can be found again."""

import random

import pytest

from childproc.block_digests import DigestChain, root_digest
from scheduler.kv_cache.blocks import BlockManager, FreeRuns


def chain(token_ids: list[int], block_size: int = 4, model: str = "m") -> list[bytes]:
    return (
        DigestChain(root_digest(model, block_size), block_size).extend(token_ids, len(token_ids) // block_size).copy()
    )


def test_a_seq_grows_into_neighbouring_ids() -> None:
    blocks = BlockManager(64, 4)
    first, second = blocks.allocate(3), blocks.allocate(3)
    assert first == list(range(first[0], first[0] + 3))
    for _ in range(8):  # both grow in turn, and the blocks of each stay consecutive
        first += blocks.allocate(1, first[-1])
        second += blocks.allocate(1, second[-1])
    assert first == list(range(first[0], first[0] + 11))
    assert second == list(range(second[0], second[0] + 11))


def test_every_block_is_allocated_once() -> None:
    blocks = BlockManager(17, 4)
    taken = [block for _ in range(17) for block in blocks.allocate(1)]
    assert sorted(taken) == list(range(17))
    assert blocks.num_free == 0


@pytest.mark.parametrize("seed", range(20))
def test_free_runs_agree_with_a_plain_set(seed: int) -> None:
    rng = random.Random(seed)
    runs, free, held = FreeRuns(40), set(range(40)), list[int]()
    for _ in range(400):
        if free and rng.random() < 0.55:
            after = rng.choice(held) if held and rng.random() < 0.7 else None
            taken = runs.take(after)
            assert taken in free
            if after is not None and after + 1 in free:
                assert taken == after + 1
            free.remove(taken)
            held.append(taken)
        elif held:
            rng.shuffle(held)
            count = rng.randint(1, len(held))
            runs.give(held[:count])
            free |= set(held[:count])
            del held[:count]
        assert runs.num_free == len(free)


def test_a_published_prefix_is_found_after_its_holder_left() -> None:
    blocks = BlockManager(8, 4)
    digests = chain(list(range(12)))
    held = blocks.allocate(3)
    for block, digest in zip(held, digests, strict=True):
        blocks.publish(block, digest)
    blocks.release(held)
    assert blocks.num_free == 8
    assert blocks.match(digests) == held
    assert blocks.match(chain([*range(8), 99, 9, 10, 11])) == held[:2]
    assert blocks.match(chain([99, *range(1, 12)])) == []


def test_shared_blocks_stay_until_the_last_holder_leaves() -> None:
    blocks = BlockManager(8, 4)
    held = blocks.allocate(1)
    blocks.publish(held[0], chain([1, 2, 3, 4])[0])
    blocks.hold(held)
    blocks.release(held)
    assert blocks.num_free == 7
    blocks.release(held)
    assert blocks.num_free == 8


def test_the_longest_idle_block_is_given_up_first_and_ends_before_starts() -> None:
    blocks = BlockManager(4, 4)
    old, new = chain([1] * 8), chain([2] * 8)
    for digests in (old, new):
        held = blocks.allocate(2)
        for block, digest in zip(held, digests, strict=True):
            blocks.publish(block, digest)
        blocks.release(held)
    blocks.allocate(1)
    assert len(blocks.match(old)) == 1
    assert len(blocks.match(new)) == 2
    blocks.allocate(1)
    assert blocks.match(old) == []
    assert len(blocks.match(new)) == 2


def test_forgotten_blocks_are_not_found() -> None:
    blocks = BlockManager(4, 4)
    digests = chain([1] * 4)
    held = blocks.allocate(1)
    blocks.publish(held[0], digests[0])
    blocks.forget(held)
    assert blocks.match(digests) == []
    blocks.release(held)
    assert blocks.num_free == 4


def test_the_second_copy_of_a_prefix_does_not_replace_the_first() -> None:
    blocks = BlockManager(4, 4)
    digests = chain([1] * 4)
    first, second = blocks.allocate(1), blocks.allocate(1)
    blocks.publish(first[0], digests[0])
    blocks.publish(second[0], digests[0])
    assert blocks.match(digests) == first
    blocks.release(second)
    blocks.release(first)
    assert blocks.num_free == 4
    assert blocks.match(digests) == first


def test_without_caching_nothing_is_found() -> None:
    blocks = BlockManager(4, 4, enable_prefix_caching=False)
    held = blocks.allocate(1)
    blocks.publish(held[0], chain([1] * 4)[0])
    assert blocks.match(chain([1] * 4)) == []


def test_releasing_too_often_is_an_error() -> None:
    blocks = BlockManager(4, 4)
    held = blocks.allocate(1)
    blocks.release(held)
    with pytest.raises(AssertionError, match="released more often"):
        blocks.release(held)


def test_digests_depend_on_all_that_came_before() -> None:
    plain = chain([1, 2, 3, 4, 5, 6, 7, 8])
    assert chain([1, 2, 3, 4, 5, 6, 7, 9])[0] == plain[0]
    assert chain([0, 2, 3, 4, 5, 6, 7, 8])[1] != plain[1]
    assert chain([1, 2, 3, 4, 5, 6, 7, 8], model="other")[1] != plain[1]
    assert chain([1, 2, 3, 4], block_size=2)[0] != chain([1, 2, 3, 4], block_size=4)[0]


def test_a_chain_grows_with_the_history() -> None:
    tokens = list(range(20))
    digests = DigestChain(root_digest("m", 4), 4)
    assert len(digests.extend(tokens[:9], 2)) == 2
    assert digests.extend(tokens, 5) == chain(tokens)
