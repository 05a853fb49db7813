"""The page in a real browser, before a real deployment."""

import os
import signal
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from typer.testing import CliRunner

from echelon import Client
from echelon.cli.token import token_app
from tests.ui.conftest import ROOT, Page, token

pytestmark = pytest.mark.timeout(600)
_COLOURS = {"draft": (224, 138, 18), "target": (47, 111, 220)}  # of style.css, light
_COUNT_PIXELS = """
const [canvas, wanted] = arguments;
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let i = 0; i < data.length; i += 4)
  if (data[i + 3] === 255 && wanted.every((value, j) => Math.abs(data[i + j] - value) < 3)) count += 1;
return count;
"""


def marks(page: Page) -> int:
    return int(page.driver.execute_script("return document.querySelectorAll('#output mark').length"))


def test_it_asks_for_a_token_and_keeps_it_in_the_tab(page: Page) -> None:
    page.open()
    page.wait(lambda: page["token-dialog"].get_property("open"))
    page["token"].send_keys("wrong", Keys.ENTER)
    page.wait_for("token-why", "This token is not known here.")
    page.wait(lambda: page["token-dialog"].get_property("open"))
    page["token"].clear()
    page["token"].send_keys(page.house.operator, Keys.ENTER)
    page.wait_for("state", "Live")
    page.driver.refresh()
    page.wait_for("state", "Live")
    page.driver.switch_to.new_window("tab")
    page.open()
    page.wait(lambda: page["token-dialog"].get_property("open"))
    stored = page.driver.execute_script("return JSON.stringify({ ...localStorage }) + document.cookie")
    assert page.house.operator not in stored


def test_a_token_for_generating_alone_has_the_playground(page: Page) -> None:
    page.open(page.house.user)
    page.wait_for("state", "The token has not the scope that this needs")
    page.run(num_tokens=8)
    assert page.text("output").startswith("def quicksort(items):")


def test_it_shows_what_the_deployment_does(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    page.prefer("light")
    page.wait_for("topology", "target · rank 1")
    assert "draft · rank 0" in page.text("topology")
    assert "demo-target, bfloat16, tensor-parallel on 2 ranks" in page.text("topology")
    assert "node 127.0.0.1" in page.text("topology")
    page.driver.execute_script("arguments[0].value = 400", page["max-tokens"])
    page.driver.execute_script("arguments[0].click()", page["run"])
    page.wait_for("requests", "streams")
    page.wait(lambda: float(page.text("tile-tokensPerS")) > 0)
    for engine, colour in _COLOURS.items():
        page.wait(lambda colour=colour: page.driver.execute_script(_COUNT_PIXELS, page["lanes"], colour) > 100)
        page.wait_for("lanes-text", engine)
    assert "both at once" in page["lanes"].get_attribute("aria-label")
    page.wait_for("accept", "draft 1")
    page.wait_for("kv", "target, host")
    page.wait_for("play-state", "Done.")
    page.wait_for("requests", "None runs now.")
    page.wait(lambda: float(page.text("tile-tokensPerS")) == 0)
    assert page.complaints() == []


def test_the_browser_asks_this_gateway_alone(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    page.run(num_tokens=4)
    hosts = {urllib.parse.urlsplit(url).netloc for url in page.requests() if url.startswith("http")}
    assert hosts == {urllib.parse.urlsplit(page.house.url).netloc}


def test_the_playground_marks_drafted_tokens_and_compares(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    page.run(speculates=True)
    assert marks(page) > 0
    text = page.text("output")
    page.run(speculates=False)
    assert marks(page) == 0
    assert page.text("output") == text
    assert page.text("same") == "Both runs gave the same 96 tokens."
    assert page.driver.execute_script("return document.getElementById('runs').tBodies[0].rows.length") == 2


def test_a_run_can_be_stopped(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    page.driver.execute_script("arguments[0].value = 900", page["max-tokens"])
    page.driver.execute_script("arguments[0].click()", page["run"])
    page.wait_for("play-state", "Streaming.")
    page.driver.execute_script("arguments[0].click()", page["stop"])
    page.wait_for("play-state", "Stopped.")
    page.wait_for("requests", "None runs now.")


def test_it_survives_a_gateway_that_dies(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    os.kill(page.house.pid_of("gateway-0"), signal.SIGKILL)
    page.wait_for("state", "The gateway does not answer")
    page.wait_for("state", "Live")
    page.run()
    page.wait_for("lanes-text", "both at once")


def test_a_draft_that_dies_is_an_event(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    os.kill(page.house.pid_of("draft-0.0"), signal.SIGKILL)
    page.wait_for("events", "its draft is lost")
    page.wait_for("events", "its draft is back")


def test_it_shows_jobs_and_takes_their_words_for_text(page: Page) -> None:
    trap = "<img src=x onerror=document.title='caught'>"
    with Client(page.house.deployment.running.gateway_address, token=page.house.user) as client:
        bodies = [{"prompt": "def add(", "max_tokens": 200, "ignore_eos": True}] * 40
        running = client.jobs.submit(bodies, metadata={"note": trap})
        page.open(page.house.operator)
        page.wait_for("jobs", "in progress")
        page.wait_for("jobs", " left")
        page.wait_for("jobs-note", "1 not ended")
        assert trap in page.text("jobs")
        label = page.driver.execute_script("return document.querySelector('#jobs [role=img]').ariaLabel")
        assert label.startswith(f"Job {running.job_id}: ")
        assert label.endswith(" of 40")
        client.jobs.cancel(running.job_id)
        page.wait_for("jobs", "cancelled")
        page.wait_for("jobs-note", "all ended")
        client.jobs.submit([{"custom_id": "a", "method": "POST", "url": trap, "body": {}}])
        page.wait_for("jobs", "line 1: url: must be")
    assert page.driver.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert "caught" not in page.driver.title
    assert page.complaints() == []


def test_a_revoked_token_is_asked_for_again(page: Page) -> None:
    file = page.house.tokens_file
    page.open(token(file, "passing", "--scope", "admin"))
    page.wait_for("state", "Live")
    page.wait_for("lanes-text", "No rounds in this time.")
    CliRunner().invoke(token_app(), ["revoke", "passing", "--file", str(file)], catch_exceptions=False)
    page.wait_for("state", "A token is needed")
    page.wait_for("lanes-text", "No rounds: ")
    page.wait(lambda: page["token-dialog"].get_property("open"))
    page["token"].clear()
    page["token"].send_keys(page.house.operator, Keys.ENTER)
    page.wait_for("state", "Live")
    page.wait_for("lanes-text", "No rounds in this time.")


def test_a_gateway_that_hangs_is_not_taken_for_live(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    pid = page.house.pid_of("gateway-0")
    os.kill(pid, signal.SIGSTOP)  # the controller starts it again after a while
    page.wait_for("state", "The gateway does not answer")
    page.wait_for("state", "Live")
    page.wait_for("lanes-text", "No rounds in this time.")


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    reached: list[str] = []
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        focused = page.driver.execute_script("return document.activeElement.id || document.activeElement.className")
        if focused in reached:
            break
        reached.append(str(focused))
    wanted = [
        "skip",
        "theme",
        "token-open",
        "span",
        "pause",
        "prompt",
        "mode",
        "max-tokens",
        "speculate",
        "run",
        "output",
    ]
    assert [name for name in reached if name in wanted] == wanted
    page["speculate"].send_keys(Keys.SPACE)
    assert not page["speculate"].is_selected()
    page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait_for("play-state", "Done.")
    page["pause"].send_keys(Keys.SPACE)
    assert page["pause"].get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_can_be_read(page: Page, width: int, scheme: str, tmp_path: Path) -> None:
    """No sideways scrolling, and axe finds nothing: contrast, names, roles, headings."""
    page.resize(width)
    page.prefer(scheme)
    page.open(page.house.operator)
    page.wait_for("state", "Live")
    page.run(speculates=False)
    page.run(speculates=True)
    page.wait_for("accept", "draft 1")
    inner = page.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner[0] <= inner[1]
    violations: list[dict[str, Any]] = Axe().run(page.driver)["violations"]
    assert [(each["id"], [node["target"] for node in each["nodes"]]) for each in violations] == []
    save_screenshot(page, width, scheme, Path(os.environ.get("ECHELON_UI_SHOTS", tmp_path)))


def save_screenshot(page: Page, width: int, scheme: str, folder: Path) -> None:
    """Of the whole page while it streams. With ECHELON_UI_SHOTS=docs/images they are those of the documents."""
    page.driver.execute_script("arguments[0].value = 400; arguments[1].click()", page["max-tokens"], page["run"])
    page.wait_for("lanes-text", "both at once")
    page.wait(lambda: float(page.text("tile-tokensPerS")) > 0)
    height = int(page.driver.execute_script("return document.documentElement.scrollHeight"))
    page.resize(width, height)
    page.wait(lambda: page.driver.execute_script("return innerHeight") == height)
    page.driver.save_screenshot(str(ROOT / folder / f"ui-{width}-{scheme}.png"))
