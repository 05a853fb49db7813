"""A real deployment with tokens, and a real browser that looks at it. `make test-ui` installs what these need."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.deployment.settings import (
    AuthSettings,
    JobsSettings,
    KvCacheSettings,
    ServerSettings,
    SpeculationSettings,
)
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon.cli.token import token_app
from tests.helpers.scrape import free_port

pytest.importorskip("selenium", reason="make test-ui installs it")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[2]
_PATIENCE_S = 180  # a busy machine
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@dataclass(frozen=True)
class House:
    deployment: LocalDeployment
    url: str
    tokens_file: Path
    operator: str  # tokens
    user: str

    def pid_of(self, name: str) -> int:
        pid = self.deployment.processes.read(lambda board: board.process(name).pid)
        assert pid is not None
        return pid


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The bundled pair; the draft works beside the target."""
    folder = tmp_path_factory.mktemp("ui")
    tokens = folder / "tokens.json"
    operator = token(tokens, "operator", "--scope", "admin", "--scope", "generate")
    user = token(tokens, "user")
    http_port = free_port()
    settings = local_settings(
        ROOT / "models" / "demo-target",
        tp_size=2,
        draft=LocalDraft(folder=ROOT / "models" / "demo-draft"),
        kv_cache=KvCacheSettings(device_bytes=9 << 20, cpu_bytes=64 << 20),
        # Always some drafts: on a busy machine the policy may find that none pay.
        speculation=SpeculationSettings(pipeline="continuous", num_speculative_tokens=4),
        server=ServerSettings(grpc_port=0, http_port=http_port, auth=AuthSettings(tokens_file=str(tokens))),
        jobs=JobsSettings(path=str(folder / "jobs")),
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        yield House(deployment, f"http://127.0.0.1:{http_port}/ui/", tokens, operator, user)


def token(file: Path, name: str, *options: str) -> str:
    arguments = ["create", name, "--file", str(file), *options]
    return CliRunner().invoke(token_app(), arguments, catch_exceptions=False).stdout.strip()


class Page:
    """The page in a browser of its own."""

    def __init__(self, driver: webdriver.Chrome, house: House) -> None:
        self.driver = driver
        self.house = house

    def open(self, token: str | None = None) -> None:
        """With a token as if the person had given it, or without one."""
        if token is not None:
            source = f"sessionStorage.setItem('echelon-token', {json.dumps(token)})"
            self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.driver.get(self.house.url)

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self[name].get_property("textContent"))

    def wait_for(self, name: str, words: str) -> None:
        """Until the element says so."""
        self.wait(lambda: words in self.text(name), lambda: f"{name} says {self.text(name)!r}, not {words!r}")

    def wait(self, condition: Any, problem: Any = lambda: "") -> None:
        with contextlib.suppress(Exception):
            WebDriverWait(self.driver, _PATIENCE_S, 0.1).until(lambda _: condition())
            return
        pytest.fail(f"after {_PATIENCE_S} s: {problem()}")

    def run(self, *, speculates: bool = True, num_tokens: int = 96) -> None:
        """In the playground, to its end."""
        if self["speculate"].is_selected() != speculates:
            self.driver.execute_script("arguments[0].click()", self["speculate"])
        self.driver.execute_script("arguments[0].value = arguments[1]", self["max-tokens"], num_tokens)
        self.driver.execute_script("arguments[0].click()", self["run"])
        self.wait_for("play-state", "Done.")

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """Of the browser: errors of the page, and what its policy forbids."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses that the browser has asked since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = (message for message in messages if message["method"] == "Network.requestWillBeSent")
        return [message["params"]["request"]["url"] for message in sent]


@pytest.fixture
def page(house: House, tmp_path: Path) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        shown = Page(driver, house)
        shown.resize(1600)
        yield shown
    finally:
        driver.quit()
