#!/usr/bin/env python3
"""Tries the page of the control listener in headless Chromium, as a person would.

    python .ci/page.py                 with the demo of proxai.py
    python .ci/page.py COMMAND ...     with another program that prints the demo's first lines

Needs Debian's packages chromium and chromium-driver; speaks WebDriver itself. Screenshots go to
.ci/artifacts.
"""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / ".ci" / "artifacts"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1280,1000"]
TAB, ENTER, ESCAPE, RIGHT, DOWN = "\ue004", "\ue007", "\ue00c", "\ue014", "\ue015"
MARKUP = "<img src=x onerror=alert(1)>"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what WebDriver calls a reference to an element

# The texts of a page whose contrast is below WCAG AA, as [text, ratio].
CONTRAST = """
const rgb = color => {
  const c = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  c.fillStyle = color;
  c.fillRect(0, 0, 1, 1);
  return [...c.getImageData(0, 0, 1, 1).data];
};
const light = color => rgb(color).slice(0, 3).map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = node => {
  while (node && rgb(getComputedStyle(node).backgroundColor)[3] < 255) node = node.parentElement;
  return node ? getComputedStyle(node).backgroundColor : 'Canvas';
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
  if (!text || !node.checkVisibility() || node.closest('script, title')) continue;
  const style = getComputedStyle(node), svg = node.closest('svg');
  const pair = [light(svg ? style.fill : style.color), light(ground(node))];
  const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  if (ratio < 4.5) found.push([text, ratio.toFixed(2)]);
}
return found;
"""


def fetch(url: str, body: Any = None, method: str | None = None) -> Any:
    """The JSON answer of a server on this machine."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read()[:500]!r}") from None


def until(what: str, test: Callable[[], Any], seconds: float = 5) -> Any:
    """What `test` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := test()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def running(command: list[str], *patterns: str, home: str) -> Iterator[list[str]]:
    """A program, and the first group of each pattern in what it prints first."""
    env = {**os.environ, "HOME": home, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        found = []
        for pattern in patterns:
            match = None
            while not match:
                line = process.stdout.readline()
                assert line, f"{command[0]} ended without a line like {pattern}"
                match = re.search(pattern, line)
            found.append(match[1])
        yield found
    finally:
        process.terminate()
        process.communicate(timeout=20)


class Browser:
    """A session of Chromium behind ChromeDriver."""

    def __init__(self, driver: str, profile: str) -> None:
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}
        made = fetch(f"{driver}/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"{driver}/session/{made['value']['sessionId']}"

    def tell(self, path: str, **body: Any) -> Any:
        """What a command answers."""
        return fetch(f"{self.session}/{path}", body)["value"]

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns."""
        return self.tell("execute/sync", script=script, args=arguments)

    def keys(self, *keys: str) -> None:
        """Press keys, one after the other."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.tell("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def cdp(self, command: str, **params: Any) -> Any:
        """What a command of the DevTools protocol answers."""
        return self.tell("goog/cdp/execute", cmd=command, params=params)

    def faults(self) -> list[str]:
        """What the console has complained about since the last call."""
        return [entry["message"] for entry in self.tell("se/log", type="browser") if entry["level"] != "INFO"]

    def text(self, selector: str) -> str:
        """The text of the first element of a selector."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def unnamed(self, place: str) -> list[str]:
        """The controls of a place that have no accessible name."""
        selector = f":is({place}) :is(a, button, input, svg, table, [role=tablist], [role=tabpanel])"
        found = self.tell("elements", **{"using": "css selector", "value": selector})
        named = [(e[ELEMENT], fetch(f"{self.session}/element/{e[ELEMENT]}/computedlabel")["value"]) for e in found]
        visible = "return arguments[0].checkVisibility() ? arguments[0].outerHTML.slice(0, 120) : ''"
        return [html for ref, name in named if not name and (html := self.run(visible, {ELEMENT: ref}))]

    def look(self, name: str, width: int, scheme: str) -> None:
        """Check contrast and width in a colour scheme, and keep a screenshot."""
        scheme_is = [{"name": "prefers-color-scheme", "value": scheme}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme_is)
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=1000,
                 deviceScaleFactor=1, mobile=width < 600)
        time.sleep(0.5)  # the charts are drawn anew, transitions end
        assert (wide := self.run("return document.documentElement.scrollWidth")) <= width, f"{name}: {wide} wide"
        assert not (faint := self.run(CONTRAST)), f"{name}: too little contrast: {faint}"
        if not self.run("return document.querySelector('dialog').open"):
            self.cdp("Emulation.setDeviceMetricsOverride", width=width, deviceScaleFactor=1, mobile=width < 600,
                     height=min(self.run("return document.body.scrollHeight"), 2600))
            self.run("scrollTo(0, 0)")
        shot = self.cdp("Page.captureScreenshot")
        ARTIFACTS.mkdir(exist_ok=True)
        (ARTIFACTS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def ask(listen: str, model: str) -> Any:
    """One Chat request through the proxy."""
    said = [{"role": "user", "content": "Hello"}]
    return fetch(f"{listen}/v1/chat/completions", {"model": model, "messages": said})


SHOWN = "return document.querySelectorAll('#rows tr:not([hidden])').length"


def try_requests(browser: Browser, listen: str) -> None:
    """A request shows up without a reload, its model name is text; the filter and its absence hold."""
    browser.run("window.sameDocument = true")
    ask(listen, MARKUP)
    found = "return [...document.querySelectorAll('td.model span')].some(s => s.textContent === arguments[0])"
    until("the request in the table", lambda: browser.run(found, MARKUP))
    assert browser.run("return window.sameDocument"), "the page was loaded again"
    assert not browser.run("return document.querySelector('img')"), "a model name became an element"


def try_captures(browser: Browser, control: str) -> None:
    """A switch changes what the proxy does; the way back to the configuration too."""
    def phases() -> dict[str, Any]:
        return fetch(f"{control}/status")["captures"]["phases"]

    browser.run("document.querySelector('#switch-outbound_response').focus()")
    before = phases()["outbound_response"]["effective"]
    browser.keys(" ")
    until("the override", lambda: phases()["outbound_response"]["override"] is (not before))
    until("the switch", lambda: browser.run(
        "return document.activeElement.getAttribute('aria-checked') === arguments[0]", str(not before).lower()))
    browser.run("document.activeElement.previousElementSibling.click()")
    until("no override", lambda: phases()["outbound_response"]["override"] is None)
    if browser.run("return document.querySelector('#switch-all').ariaChecked !== 'true'"):
        browser.run("document.querySelector('#switch-all').click()")
    until("all captured", lambda: all(p["effective"] for p in phases().values()))


def try_detail(browser: Browser, listen: str) -> None:
    """The detail of an exchange, with the keyboard only."""
    ask(listen, "seen-in-detail")
    browser.run("document.querySelector('#filter').value = ''; document.querySelector('#filter').focus()")
    browser.keys(*"seen-in-detail")
    until("the filtered row", lambda: browser.run(SHOWN) == 1)
    browser.keys(TAB)
    focus = "return document.activeElement.closest('tr')?.dataset.id"
    row = browser.run(focus)
    assert row, "Tab does not lead to a row"
    browser.keys(ENTER)
    until("the detail", lambda: browser.run("return document.querySelector('dialog').open"))
    assert row in browser.text("#h-detail") and browser.run("return location.hash") == f"#{row}"
    until("the captured exchange", lambda: "seen-in-detail" in browser.text("#panel"))
    browser.run("document.querySelector('[role=tab][tabindex=\"0\"]').focus()")
    browser.keys(*[RIGHT] * 4)
    assert browser.text("[role=tab][aria-selected=true]") == "Request diff" and browser.text("#panel")
    for scheme in ("light", "dark"):
        browser.look(f"detail-{scheme}", 1280, scheme)
    browser.look("detail-phone", 390, "light")
    assert not (nameless := browser.unnamed("dialog")), f"without an accessible name: {nameless}"
    browser.keys(ESCAPE)
    until("the detail closed", lambda: not browser.run("return document.querySelector('dialog').open"))
    assert browser.run(focus) == row, "the focus did not return to the row"
    browser.run("const f = document.querySelector('#filter'); f.value = ''; f.dispatchEvent(new Event('input'))")
    until("more rows", lambda: browser.run(SHOWN) > 1)
    browser.keys(DOWN)
    assert browser.run(focus) not in (None, row), "the arrow keys do not move between rows"


def main() -> None:
    """Run all of it; an AssertionError says what does not hold."""
    command = sys.argv[1:] or [sys.executable, str(ROOT / "proxai.py"), "--demo"]
    lines = r"^  listen: (http://\S+)", r"^  control: (http://\S+)"
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
          running(["chromedriver", "--port=0"], r"started successfully on port (\d+)", home=home) as (port,),
          contextlib.ExitStack() as program):
        listen, control = program.enter_context(running(
            command if sys.argv[1:] else [*command, "--port", "0", "--mcp-port", "0"], *lines, home=home))
        browser = Browser(f"http://127.0.0.1:{port}", f"{home}/profile")
        try:
            browser.tell("url", url=f"{control}/")
            until("the page is live", lambda: browser.text("#state") == "live", 15)
            browser.look("first", 1280, "light")
            try_requests(browser, listen)
            try_captures(browser, control)
            try_detail(browser, listen)
            assert not (nameless := browser.unnamed("main, header")), f"without an accessible name: {nameless}"
            for scheme in ("light", "dark"):
                browser.look(f"page-{scheme}", 1280, scheme)
                browser.look(f"phone-{scheme}", 390, scheme)
            assert not (faults := browser.faults()), f"the console says: {faults}"
            program.close()
            until("the loss is told", lambda: "disconnected" in browser.text("#state"), 10)
            if not sys.argv[1:]:  # another process at the same place
                ports = ["--port", listen.rpartition(":")[2], "--mcp-port", control.rpartition(":")[2]]
                program.enter_context(running([*command, *ports], *lines, home=home))
                until("the page is live again", lambda: browser.text("#state") == "live", 20)
                until("the old requests gone", lambda: MARKUP not in browser.text("#rows"))
        finally:
            fetch(browser.session, method="DELETE")
    print(f"the page holds; screenshots are in {ARTIFACTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
