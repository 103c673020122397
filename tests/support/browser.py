"""A page in headless Chromium: what it draws, what it says and asks for, and how it measures."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH (Debian's package chromium)"
)
QUIET = [
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
# A window of Chromium's is at least 500 pixels wide, a frame may be as narrow as a phone.
HOST = """<!doctype html><html><head><style>:root {{ color-scheme: light dark }}
body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: 900px }}</style></head><body>
<iframe src="{page}"></iframe><script>addEventListener("message", (event) => {{
const place = document.createElement("pre"); place.id = "probe"; place.textContent = event.data;
document.body.append(place) }});</script></body></html>"""
# What each visible chart measures, told to the host.
PROBE = """
<script>
addEventListener("load", () => {
  const boxes = (texts) => [...texts].filter((one) => one.textContent.trim()).map((one) => {
    const box = one.getBoundingClientRect();
    return { text: one.textContent, left: box.left, top: box.top, right: box.right,
             bottom: box.bottom, font: box.height };
  });
  const charts = [...document.querySelectorAll("svg.chart")]
    .filter((one) => one.getClientRects().length)
    .map((one) => {
      const box = one.getBoundingClientRect();
      return { width: box.width, height: box.height, name: one.closest("figure").dataset.name,
               texts: boxes(one.querySelectorAll("text")),
               marks: one.querySelectorAll(".item").length };
    });
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const button = document.querySelector("button[data-as=png]");
  let saved = "";
  HTMLAnchorElement.prototype.click = function () { saved = this.download };
  button.click();
  setTimeout(() => {
    const found = { width: innerWidth, scroll: document.documentElement.scrollWidth, dark,
                    paper: getComputedStyle(document.body).backgroundColor, charts, saved };
    parent.postMessage(JSON.stringify(found), "*");
  }, 1500);
});
</script>
"""


def browse(page, folder, width=1280, dark=False):
    """(the page as drawn, its lines on the console, the URLs that it asked for)."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *QUIET,
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1000",
        "--enable-logging=stderr",
        f"--log-net-log={folder / 'net.json'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [
        event.get("params", {}) for event in json.loads((folder / "net.json").read_text())["events"]
    ]
    asked = {
        event["url"]
        for event in events
        if event.get("initiator", "not an origin") != "not an origin"
    }  # that is the browser itself
    own = ("file:", "data:", "blob:")
    return done.stdout, console, {url for url in asked if not url.startswith(own)}


def measured(page, folder, width, dark):
    """What the page's charts measure at a width, in light or dark; it must be quiet."""
    copy = folder / f"probed-{width}-{dark}.html"
    copy.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    host = folder / f"host-{width}-{dark}.html"
    host.write_text(HOST.format(width=width, page=copy.as_uri()))
    drawn, console, asked = browse(host, folder, width + 100, dark)
    assert (console, asked) == ([], set())
    [found] = re.findall(r'<pre id="probe">(.*?)</pre>', drawn, flags=re.DOTALL)
    return json.loads(unescape(found))


def check(found, width, dark):
    """Whether a page fits its window, keeps its mode, and no text in a chart meets another."""
    assert found["width"] == width and found["scroll"] <= width
    assert found["dark"] == dark
    light = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) / 3
    assert (light < 80) == dark
    assert found["saved"].endswith(".png")
    for chart in found["charts"]:
        assert chart["width"] > 0.8 * min(width, 920) - 60 and chart["height"] > 50
        texts = [one for one in chart["texts"] if one["right"] > one["left"]]
        assert min(one["font"] for one in texts) > 8, chart["name"]
        for number, one in enumerate(texts):
            for other in texts[number + 1 :]:
                assert not meets(one, other), (chart["name"], width, one["text"], other["text"])


def meets(one, other, slack=2.5):
    """Boxes of text are higher than their letters."""
    return (
        one["left"] + 1 < other["right"]
        and other["left"] + 1 < one["right"]
        and one["top"] + slack < other["bottom"] - slack
        and other["top"] + slack < one["bottom"] - slack
    )
