"""The pages of the report in a real browser, at the widths of a telephone and of a screen, in both themes."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnist_dist.cli import main
from tests.conftest import run_ranks, skip

# What of the page lies outside of the window, or of its own picture. Tables scroll in boxes of their own.
OUTSIDE = """(() => {
  const outside = [];
  for (const element of document.querySelectorAll("main *")) {
    if (element.closest(".scroll table")) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.left < 0 || box.right > innerWidth)) outside.push(element.outerHTML.slice(0, 200));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), picture = text.closest("svg").getBoundingClientRect();
    if (box.left < picture.left || box.right > picture.right || box.top < picture.top || box.bottom > picture.bottom)
      outside.push(text.outerHTML.slice(-200));
  }
  return outside;
})()"""
OVERLAPS = """(() => {
  const overlaps = [];
  for (const picture of document.querySelectorAll("svg")) {
    const texts = [...picture.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width > 0 && height > 3) overlaps.push([one, other]);  // the boxes of lines have some air
    }));
  }
  return overlaps;
})()"""


class Browser:
    """A headless Chromium that is told what to do through two pipes."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if not program:
            skip("chromium", "chromium is not installed")
        command_reader, self.writer = os.pipe()
        self.reader, answer_writer = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        # The browser's own ends have to be its descriptors 3 and 4.
        shell = f'exec "$@" 3<&{command_reader} 4>&{answer_writer}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *options, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(command_reader, answer_writer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_reader)
        os.close(answer_writer)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for what comes of it; events are collected."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.writer, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]  # type: ignore[no-any-return]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, path: Path, width: int, theme: str) -> None:
        """Show a page at a width, in a theme, and wait until it is there."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.do("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        self.do("Runtime.evaluate", expression="0")  # what the page had to say before has come by now

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.reader)
        os.close(self.writer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.reader, 1 << 16)
            assert data, "the browser has ended"
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that was resumed at another world size, with a long name; a run of which little is left; a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    name = "a-run-with-a-name-that-is-longer-than-a-telephone-is-wide-" + "x" * 60
    arguments = ["model=mlp", "dataset=synthetic", f"data_dir={data_dir}", "log_every_steps=1", "evaluate_train=true"]
    arguments += ["timeout_s=60"]
    for epochs, world_size in ((2, 2), (6, 1)):
        result = run_ranks([*arguments, f"epochs={epochs}", f"run_dir={name}"], folder, world_size=world_size)
        assert result.code == 0, result.output
    (folder / "little/checkpoints").mkdir(parents=True)
    assert main(["report", str(folder / "little")]) == 0
    shutil.copytree(folder / name, folder / "other")
    assert (
        main(["report", *(str(folder / run) for run in (name, "little", "other")), "-o", str(folder / "c.html")]) == 0
    )
    whole, little = folder / name / "report.html", folder / "little/report.html"
    return {"run": whole, "little": little, "comparison": folder / "c.html"}


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("page", ["run", "little", "comparison"])
def test_a_page_fits_its_window_and_asks_for_nothing(
    page: str, width: int, pages: dict[str, Path], browser: Browser
) -> None:
    colours = set()
    for theme in ("light", "dark"):
        browser.open(pages[page], width, theme)
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
        assert browser.evaluate(OUTSIDE) == []
        assert browser.evaluate(OVERLAPS) == []
        colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        said = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
        assert [e for e in said if e["method"] != "Log.entryAdded" or e["params"]["entry"]["level"] != "verbose"] == []
        assert [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"] == []
        requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert requests[0] == pages[page].as_uri()
        assert [url for url in requests[1:] if not url.startswith("data:")] == []
    assert len(colours) == 2  # each theme has its own


def test_charts_have_the_colours_of_the_theme(pages: dict[str, Path], browser: Browser) -> None:
    """A line that is there in one theme alone would be black, matplotlib's own, in the other."""
    strokes = """[...new Set([...document.querySelectorAll("figure.card svg *")].flatMap(element =>
        [getComputedStyle(element).stroke, element.localName === "text" ? getComputedStyle(element).fill : "none"]))]"""
    seen = []
    for theme in ("light", "dark"):
        browser.open(pages["run"], 1280, theme)
        seen.append(set(browser.evaluate(strokes)) - {"none"})
    light, dark = seen
    assert len(light) == len(dark) >= 4
    assert not light & dark
