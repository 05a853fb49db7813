"""`echelon logs` shows what processes wrote, as it comes."""

import threading
from itertools import islice
from pathlib import Path

import pytest

from cluster.errors import StartError
from cluster.logs import LogLine, read_logs
from echelon.cli.app import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    logs = tmp_path / "d" / "logs"
    logs.mkdir(parents=True)
    (logs / "scheduler-0.log").write_text("one\ntwo\nthree\n")
    (logs / "scheduler-0.2.log").write_text("again\n")
    (logs / "scheduler-01.log").write_text("another\n")
    (logs / "target-0.0.log").write_bytes(b"caf\xe9\n")
    return logs


def read(process: str | None, num_lines: int) -> set[tuple[str, str]]:
    return {(line.log, line.text) for line in read_logs("d", process, num_lines=num_lines, follow=False)}


def test_the_last_lines_of_a_process_and_of_its_later_starts(folder: Path) -> None:
    assert read("scheduler-0", 2) == {("scheduler-0", "two"), ("scheduler-0", "three"), ("scheduler-0.2", "again")}
    assert read("target-0.0", 9) == {("target-0.0", "caf\ufffd")}
    assert {log for log, _ in read(None, 1)} == {"scheduler-0", "scheduler-0.2", "scheduler-01", "target-0.0"}
    assert read(None, 0) == set()


def test_what_is_added_follows_line_by_line_also_in_new_logs(folder: Path) -> None:
    writes = iter(["fo", "ur\nfi", "ve\n"])

    def write(_: float) -> None:
        with (folder / "scheduler-0.log").open("a") as stream:
            stream.write(next(writes, ""))
        (folder / "scheduler-0.3.log").write_text("third\n")

    lines = list(islice(read_logs("d", "scheduler-0", num_lines=1, follow=True, sleep=write), 5))
    assert sorted(lines[:2], key=lambda line: line.log) == [
        LogLine("scheduler-0", "three"),
        LogLine("scheduler-0.2", "again"),
    ]
    assert set(lines[2:]) == {
        LogLine("scheduler-0.3", "third"),
        LogLine("scheduler-0", "four"),
        LogLine("scheduler-0", "five"),
    }


def test_following_ends_with_the_deployment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = folder.parent / "record.json"
    record.touch()

    def take_down(_: float) -> None:
        record.unlink()
        with (folder / "scheduler-0.log").open("a") as stream:
            stream.write("bye\n")

    lines = list(read_logs("d", "scheduler-0", num_lines=0, follow=True, sleep=take_down))
    assert lines == [LogLine("scheduler-0", "bye")]
    record.touch()
    threading.Timer(0.5, record.unlink).start()
    with pytest.raises(SystemExit):
        main(["logs", "d", "scheduler-0", "--follow"])
    assert "d was taken down" in capsys.readouterr().err


def test_a_log_that_is_not_here_is_named_with_those_that_are(folder: Path) -> None:
    with pytest.raises(StartError, match=r"no log of target-9\.0 in .*: logs here: scheduler-0, scheduler-0\.2, "):
        list(read_logs("d", "target-9.0", num_lines=1, follow=False))


def test_the_command_names_each_process_unless_it_was_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in ((["d"], "scheduler-01: another\n"), (["d", "scheduler-01"], "another\n")):
        with pytest.raises(SystemExit) as ended:
            main(["logs", *arguments])
        assert not ended.value.code
        out = capsys.readouterr().out
        assert expected in out
        assert ("scheduler-01:" in out) is (len(arguments) == 1)
