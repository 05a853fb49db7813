"""The parts of bench.peers that decide what its numbers mean: pairs, intervals, turns, journal, the pipe to a peer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers.journal import Journal, JournalError
from bench.peers.machine import busy_ticks, tree_ticks
from bench.peers.results import Measurement, Results, Side, median_interval, token_s, tokens_per_round, tokens_per_s
from bench.peers.runs import Models, Run, Stream
from bench.peers.sides import PeerError, PeerSide
from bench.peers.tables import ratio_cell, ratio_table
from bench.peers.turns import Schedule, Turn

OURS, THEIRS = Side("Echelon", "plain"), Side("vLLM", "plain")
SCHEDULE = Schedule(
    systems=("Echelon", "transformers"),
    loads=(1, 2),
    num_turns=2,
    least_prompts=2,
    num_tokens=96,
    pool=[[1], [2], [3], [4]],
)
MODELS = Models(target="t", draft=None, dtype="bfloat16", threads=2, max_num_seqs=1, num_drafts=5)


def measured(
    side: Side = OURS,
    *,
    turn: int = 0,
    seconds: float = 1.0,
    tokens: tuple[int, ...] = (5, 6, 7),
    others: float | None = 0.0,
) -> Measurement:
    stream = Stream(token_ids=list(tokens), first_token_s=0.5, last_token_s=1.5, num_rounds=2)
    return Measurement(load=1, turn=turn, side=side, run=Run(streams=[stream], seconds=seconds), other_cores=others)


def test_metrics_of_a_run() -> None:
    run = measured(seconds=1.5, tokens=(1, 2, 3, 4, 5)).run
    assert tokens_per_s(run) == pytest.approx(5 / 1.5)
    assert token_s(run) == 0.25  # the four after the first
    assert tokens_per_round(run) == 2.5


def test_ratios_are_those_of_turns_that_both_sides_have() -> None:
    results = Results([measured(turn=0), measured(turn=1), measured(turn=2, seconds=4.0)])
    results.add(measured(THEIRS, turn=2, seconds=2.0))
    results.add(measured(THEIRS, turn=0, seconds=3.0))
    assert results.ratios(1, OURS, THEIRS, tokens_per_s) == [3.0, 0.5]


def test_a_repeated_run_replaces_the_earlier_one() -> None:
    results = Results([measured(seconds=1.0), measured(seconds=2.0)])
    assert results.values(1, OURS, tokens_per_s) == [1.5]


def test_a_busy_run_takes_its_whole_turn_with_it() -> None:
    measurements = [measured(), measured(THEIRS, others=0.6), measured(turn=1), measured(THEIRS, turn=1, others=None)]
    quiet = Results(measurements).quiet(0.5)
    assert not quiet.has(1, 0, [OURS])
    assert quiet.has(1, 1, [OURS, THEIRS])
    assert Results(measurements).quiet(None).num_turns == 2


def test_equal_streams_are_counted_against_the_same_turn() -> None:
    results = Results([measured(), measured(turn=1), measured(THEIRS), measured(THEIRS, turn=1, tokens=(5, 6, 8))])
    assert results.equal_share(1, THEIRS, OURS) == 0.5
    assert results.equal_share(1, OURS, Side("transformers", "plain")) is None


@pytest.mark.parametrize(
    ("count", "ranks"),
    [(5, None), (6, (1, 6)), (15, (4, 12)), (20, (6, 15))],  # as in tables of the sign test
)
def test_the_interval_of_the_median(count: int, ranks: tuple[float, float] | None) -> None:
    values = [float(rank) for rank in range(count, 0, -1)]
    assert median_interval(values) == ranks


def test_a_ratio_comes_with_its_interval_or_says_that_there_are_too_few() -> None:
    assert ratio_cell([0.9, 1.0, 1.1, 1.2, 1.3, 1.4]) == "1.15 (0.90 to 1.40)"
    assert ratio_cell([0.9, 1.1, 1.0]) == "1.00 [0.90 to 1.10]"
    assert ratio_cell([]) == ""


def test_the_policy_is_compared_with_the_peers_fastest_mode() -> None:
    slow, fast = measured(THEIRS, seconds=3.0), measured(Side("vLLM", "fixed"), seconds=2.0)
    text = ratio_table(Results([measured(), measured(Side("Echelon", "policy"), seconds=1.0), slow, fast]), "vLLM")
    assert text.splitlines()[2].rstrip(" |").endswith("| 2.00 [2.00 to 2.00]")


def test_turns_go_to_and_fro_and_transformers_assists_one_request_at_a_time() -> None:
    there, back = SCHEDULE.sides(Turn(0, 1)), SCHEDULE.sides(Turn(1, 1))
    assert back == there[::-1] != there == SCHEDULE.sides(Turn(2, 1))
    assert Side("transformers", "fixed") in there
    assert Side("transformers", "fixed") not in SCHEDULE.sides(Turn(0, 2))
    assert {side.system for side in there} == {"Echelon", "transformers"}


def test_every_turn_has_other_prompts_and_its_warm_up_those_of_the_next() -> None:
    assert SCHEDULE.task(Turn(0, 1)).prompts == [[1], [2]]
    assert SCHEDULE.warm_up(Turn(0, 1)).prompts == [[3]]
    assert SCHEDULE.task(Turn(1, 1)).prompts == [[3], [4]]


def test_a_journal_is_continued_where_it_ended(tmp_path: Path) -> None:
    settings = {"tokens": 96, "threads": 2}
    journal = Journal(tmp_path / "runs.jsonl", settings)
    for side in SCHEDULE.sides(Turn(0, 1)):
        journal.add(measured(side))
    journal.introduce(OURS, "Echelon 1")
    again = Journal(tmp_path / "runs.jsonl", settings)
    assert list(SCHEDULE.missing(again.results)) == [Turn(0, 2), Turn(1, 1), Turn(1, 2)]
    assert again.results.measurements(1, OURS) == [measured()]
    assert again.about == {"Echelon, plain": "Echelon 1"}


def test_runs_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    Journal(tmp_path / "runs.jsonl", {"tokens": 96, "threads": 2})
    with pytest.raises(JournalError, match="tokens 96 instead of 48"):
        Journal(tmp_path / "runs.jsonl", {"tokens": 48, "threads": 2})


def test_cpu_time_of_others() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice
    assert busy_ticks("cpu  10 1 5 900 70 2 3 4 6 7\ncpu0 1 2 3") == 25
    stats = [
        "10 (python) S 1 10 10 0 -1 0 0 0 0 0 100 20 3 4 20 0",
        "11 (a (b) c) S 10 10 10 0 -1 0 0 0 0 0 1000 200 0 0 20 0",
        "12 (other) S 1 12 12 0 -1 0 0 0 0 0 5000 0 0 0 20 0",
    ]
    assert tree_ticks(stats, 10) == 1327


def test_a_peer_answers_tasks_and_its_prints_stay_out_of_the_answers() -> None:
    program = """if True:
        from bench.peers.child import serve
        from bench.peers.runs import Run, Stream
        class Echo:
            def __init__(self, models):
                self.about = models.target
            def run(self, task):
                print("noise")
                streams = [Stream(token_ids=p, first_token_s=0, last_token_s=0, num_rounds=1) for p in task.prompts]
                return Run(streams=streams, seconds=2.0)
        serve(Echo)"""
    task = {"prompts": [[1, 2]], "concurrency": 1, "num_tokens": 2}
    spec = {"target": "t", "draft": None, "dtype": "d", "threads": 1, "max_num_seqs": 1, "num_drafts": 5}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],  # -S: without any installed package
        input=f"{json.dumps(spec)}\n{json.dumps(task)}\n{json.dumps(task)}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    about, *runs = map(json.loads, done.stdout.splitlines())
    assert about == {"about": "t"}
    assert [run["streams"][0]["token_ids"] for run in runs] == [[1, 2], [1, 2]]
    assert "noise" in done.stderr


def test_a_peer_that_cannot_start_shows_the_end_of_its_log() -> None:
    with pytest.raises(PeerError, match=r"No module named bench\.peers\.nobody_child"):
        PeerSide("nobody", Path(sys.executable), MODELS, {})
