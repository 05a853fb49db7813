"""The board and the alerts ask for what a gateway exports, and fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from gateway.metrics import RequestMetrics
from gateway.replicas.metrics import ReplicaCollector

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "echelon.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]
PARTS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
LABELS = {"model_name", "replica", "engine", "tier", "position", "code", "finished_reason", "le", "job", "instance"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")


def exported() -> set[str]:
    """Names of all series."""
    replicas = CollectorRegistry()
    replicas.register(ReplicaCollector())
    families = [*RequestMetrics("demo").registry.collect(), *replicas.collect()]
    return {family.name + part for family in families for part in PARTS[family.type]}


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in BOARD["panels"] if panel["type"] != "row")


def board_expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def names_in(expressions: list[str]) -> set[str]:
    return {name for expression in expressions for name in re.findall(r"echelon:\w+", expression)}


def labels_in(text: str) -> set[str]:
    """Those that are matched, grouped by, or shown."""
    matched = re.findall(r"[{,]\s*(\w+)=~?\"", text)
    grouped = [name.strip() for names in re.findall(r"\bby \(([^)]*)\)", text) for name in names.split(",")]
    return {*matched, *grouped, *re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text)}


def test_the_board_asks_for_series_that_exist() -> None:
    asked = names_in(board_expressions())
    assert len(asked) > 30
    assert asked - exported() == set()


def test_the_alerts_ask_for_series_that_exist() -> None:
    asked = names_in([alert["expr"] for alert in ALERTS])
    assert len(asked) > 10
    assert asked - exported() == set()


def test_labels_exist() -> None:
    texts = [*board_expressions(), *(target["legendFormat"] for panel in panels() for target in panel["targets"])]
    texts += [text for alert in ALERTS for text in (alert["expr"], *alert["annotations"].values())]
    assert {label for text in texts for label in labels_in(text)} - LABELS == set()


def test_an_alert_says_how_bad_it_is_and_what_to_do() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description"}


def test_every_condition_of_the_documents_has_an_alert() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    table = page[page.index("## Metrics to alarm on") : page.index("## Logs and state")]
    assert names_in([table]) - names_in([alert["expr"] for alert in ALERTS]) == set()


def test_panels_do_not_overlap_and_use_the_variables() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "model", "replica"}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all("$model" in target["expr"] for target in panel["targets"])


@needs_promtool
def test_prometheus_accepts_every_expression_and_the_alerts_fire(tmp_path: Path) -> None:
    asked = [expression.replace("$__rate_interval", "1m") for expression in board_expressions()]
    rules = [{"record": f"board:number_{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    folder = DEPLOY / "prometheus"
    for command in (
        ["check", "rules", tmp_path / "board.yaml", folder / "alerts.yaml"],
        ["check", "config", "--syntax-only", folder / "prometheus.yaml"],
        ["test", "rules", folder / "alerts_test.yaml"],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
