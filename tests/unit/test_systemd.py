"""The systemd unit: systemd reads it, it runs a command that exists, and it waits as long as that may take."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from echelon.cli.app import main

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "echelon@.service"
LONGEST_STOP_S = 30 + 10 * 3 + 30  # running requests, three graces of `down`, Ray's own end


class Unit(configparser.RawConfigParser):
    optionxform = staticmethod(str)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = Unit(strict=True, interpolation=None)
    unit.read_string(UNIT.read_text())
    return unit["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    unit = tmp_path / "echelon@demo.service"
    unit.write_text(UNIT.read_text().replace("/opt/echelon/bin/echelon", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "echelon" in line]) == (0, [])


def test_it_runs_a_command_that_exists(service: configparser.SectionProxy, capsys: pytest.CaptureFixture[str]) -> None:
    program, command, file = shlex.split(service["ExecStart"])
    assert (program, file) == ("/opt/echelon/bin/echelon", "/etc/echelon/%i.yaml")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code in (0, None)
    assert "until it fails" in capsys.readouterr().out


def test_a_failure_starts_it_again_and_a_stop_has_time(service: configparser.SectionProxy) -> None:
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "mixed")
    assert int(service["TimeoutStopSec"]) > LONGEST_STOP_S


def test_state_is_kept_where_it_may_write(service: configparser.SectionProxy) -> None:
    assert service["StateDirectory"] == "echelon"
    environment = dict(entry.split("=", 1) for entry in service["Environment"].split())
    assert environment["ECHELON_STATE_DIR"].startswith("/var/lib/echelon/")
    assert (service["User"], service["ProtectSystem"], service["CapabilityBoundingSet"]) == ("echelon", "strict", "")
