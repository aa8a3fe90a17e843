#!/usr/bin/env python3
"""Opens pages in headless Chromium, without a network, and says what is wrong with them.

    browser.py CHROMIUM SCREENSHOTS PAGE...

Every page is opened from its file at two widths, light and dark. It fails if it writes an error or a
warning to the console, asks for anything but itself, is wider than the window, leaves a picture or a
table that scrolls without a name, or has text that is hard to read against what is behind it. The
standard library alone: Chromium is spoken to through the two pipes of its DevTools protocol.
"""

import base64
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

WIDTHS = (400, 1400)
SCHEMES = ("light", "dark")
# How long a call, or an event, may take.
SECONDS = 60

# What is measured in the page: a list of complaints.
MEASURE = r"""
(() => {
  const found = [];
  const root = document.documentElement;
  const name = (e) => {
    const text = (e.textContent || "").trim().slice(0, 40);
    return `<${e.localName} class="${e.getAttribute("class") || ""}"> ${text}`;
  };
  if (root.scrollWidth > root.clientWidth) {
    found.push(`the document is ${root.scrollWidth} wide in a window of ${root.clientWidth}`);
  }
  const scrolls = (e) => {
    for (let up = e; up && up !== document.body; up = up.parentElement) {
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
    }
    return false;
  };
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width > 0 && (box.right > root.clientWidth + 0.5 || box.left < -0.5) && !scrolls(e)) {
      found.push(`beyond the window: ${name(e)}`);
    }
  }
  for (const svg of document.querySelectorAll("svg")) {
    const named = svg.getAttribute("role") === "img" && svg.getAttribute("aria-label");
    if (!named && svg.getAttribute("aria-hidden") !== "true") found.push("a picture without a name");
  }
  for (const e of document.querySelectorAll(".scroll")) {
    if (e.tabIndex < 0 || !e.getAttribute("aria-label")) found.push(`no name or focus: ${name(e)}`);
  }
  for (const table of document.querySelectorAll("table")) {
    const rows = table.querySelectorAll("tbody tr");
    const heads = table.querySelectorAll("tbody th[scope=row]");
    if (!table.querySelector("thead th[scope=col]") || heads.length !== rows.length) {
      found.push(`a table without heads: ${name(table)}`);
    }
  }
  // Contrast as WCAG 2 has it.
  const channels = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, under) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * under[i]);
  };
  const paper = (e) => {
    const layers = [];
    for (let up = e; up; up = up.parentElement) {
      const colour = channels(getComputedStyle(up).backgroundColor);
      if (colour.length) layers.push(colour);
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const faint = new Map();
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.localName === "title" || e.localName === "style") continue;
    const style = getComputedStyle(e);
    const isSvg = e instanceof SVGElement;
    let under = paper(e);
    const before = e.previousElementSibling;
    if (isSvg && e.classList.contains("in") && before) {
      const fill = getComputedStyle(before);
      const colour = channels(fill.fill);
      if (fill.fill !== "none") under = over([...colour.slice(0, 3), Number(fill.fillOpacity)], under);
    }
    const ink = over(channels(isSvg ? style.fill : style.color), under);
    const [a, b] = [light(ink), light(under)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) {
      const key = `${e.localName}.${e.getAttribute("class") || ""} on ${before && isSvg ? before.getAttribute("class") : ""}`;
      if (!faint.has(key)) faint.set(key, `contrast ${ratio.toFixed(2)}: ${key} ${name(e)}`);
    }
  }
  found.push(...faint.values());
  return { found, height: root.scrollHeight };
})()
"""


class Browser:
    """A Chromium that is spoken to through pipes."""

    def __init__(self, chromium, profile):
        command = [
            chromium, "--headless=new", "--remote-debugging-pipe", "--no-first-run",
            "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-default-browser-check",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
        ]
        # Its sandbox does not start for the superuser; the pages are our own and have no network.
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        to_child, self.requests = os.pipe()
        self.answers, from_child = os.pipe()
        # Chromium reads from 3 and writes to 4.
        shell = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self.child = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.number, self.rest, self.events = 0, b"", []

    def read(self, what, end):
        """The next message; fails at the time `end`, where `what` was waited for in vain."""
        while b"\0" not in self.rest:
            left = max(0, end - time.monotonic())
            if not left or not select.select([self.answers], [], [], left)[0]:
                raise SystemExit(f"{what}: no answer from Chromium within {SECONDS} s")
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                raise SystemExit("Chromium ended; start it by hand to see why")
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, session=None, **parameters):
        """The answer to a call; what happens meanwhile is kept as events."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self.read(method, end)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def until(self, method):
        """Waits for an event."""
        end = time.monotonic() + SECONDS
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.read(method, end))

    def close(self):
        """Ends it."""
        try:
            self.call("Browser.close")
        except SystemExit:
            self.child.kill()
        self.child.wait(timeout=SECONDS)


def complaints(events, url):
    """What the console and the network tell."""
    found = []
    for event in events:
        method, said = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            found.append(f"console: {said['entry']['text']}")
        elif method == "Runtime.consoleAPICalled":
            found.append(f"console: {said['type']}")
        elif method == "Runtime.exceptionThrown":
            found.append(f"exception: {said['exceptionDetails']['text']}")
        elif method == "Network.requestWillBeSent" and said["request"]["url"] != url:
            found.append(f"asks for {said['request']['url'][:80]}")
    return found


def look(browser, path, width, scheme, picture):
    """Opens a page and returns what is wrong with it."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
    session = attached["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        browser.call(f"{domain}.enable", session)
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.call("Network.emulateNetworkConditions", session, **offline)
    window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", session, **window)
    theme = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", session, features=theme)
    browser.events.clear()
    url = path.resolve().as_uri()
    browser.call("Page.navigate", session, url=url)
    browser.until("Page.loadEventFired")
    # What is folded is looked at too.
    unfold = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
    browser.call("Runtime.evaluate", session, expression=unfold)
    answer = browser.call("Runtime.evaluate", session, expression=MEASURE, returnByValue=True)
    if "exceptionDetails" in answer:
        raise SystemExit(f"measuring failed: {answer['exceptionDetails']}")
    measured = answer["result"]["value"]
    window["height"] = min(measured["height"], 16000)
    browser.call("Emulation.setDeviceMetricsOverride", session, **window)
    shot = browser.call("Page.captureScreenshot", session, format="png")
    picture.write_bytes(base64.b64decode(shot["data"]))
    found = complaints(browser.events, url) + measured["found"]
    browser.call("Target.closeTarget", targetId=target)
    return found


def main():
    """Looks at all pages; the exit code is 1 if something is wrong with one."""
    chromium, pictures, *pages = sys.argv[1:]
    pictures = pathlib.Path(pictures)
    pictures.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        for number, page in enumerate(map(pathlib.Path, pages), 1):
            for width in WIDTHS:
                for scheme in SCHEMES:
                    picture = pictures / f"{number}-{page.stem}-{width}-{scheme}.png"
                    found = look(browser, page, width, scheme, picture)
                    word = "FAILED" if found else "ok"
                    print(f"  {word:<7} {page} at {width}, {scheme}: {picture}", file=sys.stderr)
                    for complaint in found:
                        print(f"          {complaint}", file=sys.stderr)
                    wrong += bool(found)
        browser.close()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
