"""What the drills count as damage, and when they call health right."""

from bench.crowd import Damage, Seen
from bench.health_watch import right_after_s

EXPECTED = Seen(samples=((1, 2, 3), (4, 5, 6)), texts=("abc", "def"), logprobs=((-1.0, -2.0, -3.0), ()))


def damage_of(**got: object) -> Damage:
    same = {"samples": EXPECTED.samples, "texts": EXPECTED.texts, "logprobs": EXPECTED.logprobs}
    damage = Damage()
    damage.add(EXPECTED, Seen(**same | got))  # type: ignore[arg-type]
    return damage


def test_a_stream_like_the_undisturbed_one_is_whole() -> None:
    assert damage_of(pause_s=9.0) == Damage(compared=6)
    assert damage_of(logprobs=((-1.0, -2.00001, -3.0), ())) == Damage(compared=6), "rounding"
    assert not damage_of().is_any


def test_each_kind_of_damage_is_counted() -> None:
    assert damage_of(samples=((1, 2, 3), (4,))).lost == 2
    assert damage_of(samples=((1, 2, 3, 3), (4, 5, 6))).repeated == 1
    assert damage_of(samples=((1, 2, 2), (5, 5, 6))).changed == 2
    assert damage_of(texts=("abc", "de")).texts == 1
    assert damage_of(logprobs=((-1.0, -2.5), ())).logprobs == 2
    assert damage_of(logprobs=((-1.0, -2.0), ())).is_any
    failed = damage_of(error="UNAVAILABLE: gone")
    assert (failed.failed, failed.compared, failed.error) == (1, 0, "UNAVAILABLE: gone")
    assert failed.is_any
    refused = damage_of(error="UNAVAILABLE: nobody there", is_refused=True)
    assert (refused.refused, refused.failed, refused.is_any) == (1, 0, False)


def test_health_is_wrong_until_it_says_that_nothing_is_served() -> None:
    silence = (10.0, 16.0)
    told = [(9.9, True), (10.1, True), (12.0, True), (12.1, False), (15.0, True), (16.1, True)]
    assert right_after_s(10.0, silence, told) == 2.0, "SERVING shortly before the first token is true"
    never = [(10.1, True), (15.9, True), (16.1, True)]
    assert 5.8 < right_after_s(10.0, silence, never) < 6.0
    at_once = [(10.1, False), (15.0, True)]
    assert right_after_s(10.0, silence, at_once) == 0.0


def test_health_is_wrong_while_it_denies_what_is_served() -> None:
    late = [(10.1, False), (15.0, False), (18.0, False), (18.1, True)]
    assert right_after_s(10.0, (10.0, 16.0), late) == 8.0
    assert right_after_s(10.0, (10.0, 10.2), [(10.1, True), (11.0, True)]) == 0.0, "as when a draft is lost"
    assert right_after_s(10.0, (10.0, 10.2), [(10.1, True), (11.0, False), (11.1, True)]) == 1.0
