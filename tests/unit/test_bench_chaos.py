"""What the benchmark of losses counts as damage."""

from bench.chaos import Damage, Seen

EXPECTED = Seen(samples=((1, 2, 3), (4, 5, 6)), texts=("abc", "def"))


def damage_of(**got: object) -> Damage:
    damage = Damage()
    damage.add(EXPECTED, Seen(**{"samples": EXPECTED.samples, "texts": EXPECTED.texts} | got))  # type: ignore[arg-type]
    return damage


def test_a_stream_like_the_undisturbed_one_is_whole() -> None:
    assert damage_of(pause_s=9.0) == Damage(compared=6)
    assert not damage_of().is_any


def test_each_kind_of_damage_is_counted() -> None:
    assert damage_of(samples=((1, 2, 3), (4,))).lost == 2
    assert damage_of(samples=((1, 2, 3, 3), (4, 5, 6))).repeated == 1
    assert damage_of(samples=((1, 2, 2), (5, 5, 6))).changed == 2
    assert damage_of(texts=("abc", "de")).texts == 1
    failed = damage_of(error="UNAVAILABLE: gone")
    assert (failed.failed, failed.compared, failed.error) == (1, 0, "UNAVAILABLE: gone")
    assert failed.is_any
