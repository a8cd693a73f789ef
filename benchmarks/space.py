"""How fast the Space feels, and what it bears.

```
python benchmarks/space.py            # in Chromium: page, first preview, image, redraws
python benchmarks/space.py --load     # 50 clients, 500 requests over every action, four times; memory; who leaves
```

It starts `make space` by itself and stops it at the end. Traffic stays on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "spaces" / "hf-ae" / "examples"
CLIENTS, REQUESTS, STORMS = 50, 500, 4
REDRAWS = {
    "Round trip": ("quality", "trip-slider"),
    "Walk": ("position", "walk-here"),
    "Turn the numbers": ("number-1", "turned"),
    "The plane": ("plane-x", "plane-digit"),
    "A learned prior": ("class-seed", "class-pictures"),
}
"""Tab -> its slider, and what that redraws."""

DRAW = """() => new Promise((done, fail) => {
    const start = performance.now(), told = document.querySelector('#draw-status');
    let preview = null, running = false;
    const look = () => {
        running ||= told.innerText.includes('Step');
        const over = running && preview !== null && told.innerText.includes('Drawn');
        if (over) done([preview, performance.now() - start]);
    };
    const loaded = () => { preview ??= performance.now() - start; look(); };
    document.querySelector('#pictures').addEventListener('load', loaded, true);
    new MutationObserver(look).observe(told, {subtree: true, childList: true, characterData: true});
    setTimeout(() => fail('no image in a minute'), 60000);
    document.querySelector('#draw').click();
})"""
"""Click on Draw -> milliseconds to the first preview on the screen, and to the finished image."""
MOVE = """([slider, target, fraction]) => new Promise((done, fail) => {
    const range = document.querySelector(`#${slider} input[type=range]`), start = performance.now();
    const loaded = () => done(performance.now() - start);
    document.querySelector(`#${target}`).addEventListener('load', loaded, {capture: true, once: true});
    const value = Number(range.min) + fraction * (range.max - range.min);
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(range, value);
    range.dispatchEvent(new Event('input', {bubbles: true}));
    setTimeout(() => fail('no image in a minute'), 60000);
})"""
"""Move a slider -> milliseconds to the redrawn image."""


@contextlib.contextmanager
def make_space() -> Iterator[tuple[str, subprocess.Popen]]:
    """`make space` on a free port: (address, process)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["make", "--silent", "space"], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> bytes:
    """Until the address answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("The Space does not start: try make space by hand.")
            time.sleep(0.02)


def line(name: str, times: list[float], most: float) -> None:
    """One row of the result; times in seconds."""
    middle = statistics.median(times)
    verdict = "ok" if middle <= most else "too slow"
    spread = f"{min(times):.3f} to {max(times):.3f}"
    print(f"{name:36} median {middle:6.3f} s   {spread}   at most {most:g} s: {verdict}", flush=True)


# In the browser


def in_browser(runs: int) -> None:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("Chromium is needed: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        visible = []
        for _ in range(3):
            started = time.perf_counter()
            with make_space() as (url, process):
                page = open_page(browser, url, process)
                visible.append(time.perf_counter() - started)
                page.close()
        line("page visible after make space", visible, 8)
        with make_space() as (url, process):
            measure_page(open_page(browser, url, process), runs)
        browser.close()


def open_page(browser: Any, url: str, process: subprocess.Popen) -> Any:
    wait_for(url, process)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(url)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    return page


def measure_page(page: Any, runs: int) -> None:
    page.locator("#draw-status", has_text="Drawn").wait_for(timeout=60_000)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#measured table").wait_for(timeout=60_000)  # the last that the page fills in by itself
    page.get_by_role("tab", name="Prompt to picture").click()
    page.locator("#pictures img").first.wait_for()
    page.wait_for_timeout(500)
    drawn = []
    for prompt in (["rocket", "cat face", "rainbow", "octopus"] * runs)[:runs]:
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.wait_for_timeout(1000)  # a click while the last drawing is not quite over does nothing
        drawn.append([milliseconds / 1000 for milliseconds in page.evaluate(DRAW)])
    line("prompt: first preview", [preview for preview, _ in drawn], 0.5)
    line("prompt: finished image", [finished for _, finished in drawn], 2)
    for tab, (slider, target) in REDRAWS.items():
        if tab == "Walk":
            page.get_by_role("tab", name="Latent space").click()
        page.get_by_role("tab", name=tab).click()
        page.locator(f"#{target} img").first.wait_for()
        page.wait_for_timeout(500)
        fractions = [0.1 + 0.8 * (0.618 * i % 1) for i in range(runs)]
        times = [page.evaluate(MOVE, [slider, target, fraction]) / 1000 for fraction in fractions]
        line(f"{tab}: slider redraw", times, 0.3)


# Under load


def actions() -> list[tuple[str, dict]]:
    """One call of every action, but that of opening a file, which needs one: `round_trip` makes it."""
    from gradio_client import handle_file

    photo, emoji = (handle_file(str(EXAMPLES / name)) for name in ("window.png", "owl.png"))
    return [
        ("draw", dict(prompt="rocket", seed=3)),
        ("steps_sheet", dict(prompt="cat face")),
        ("round_trip", dict(picture=photo)),
        ("beside_others", dict(picture=emoji, model="Emoji")),
        ("open_file", {}),
        ("walk", dict(a=emoji, b=photo)),
        ("arithmetic", dict(picture=emoji)),
        ("numbers_of", dict(picture=emoji)),
        ("draw_numbers", dict(n1=2)),
        ("plane_point", dict(x=3, y=4)),
        ("random_digits", dict(seed=4)),
        ("draw_class", dict(seed=4)),
        ("repair", dict(picture=emoji)),
        ("compare", {}),
    ]


def under_load(requests: int) -> None:
    with make_space() as (url, process):
        wait_for(url, process)
        from gradio_client import Client, handle_file

        first = Client(url, verbose=False)
        file = first.predict(handle_file(str(EXAMPLES / "owl.png")), "Emoji", api_name="/round_trip")[2]
        calls = [
            (name, options if name != "open_file" else {"file": handle_file(file)}) for name, options in actions()
        ]
        for name, options in calls:  # everything loaded
            first.predict(api_name=f"/{name}", **options)
        server = max(psutil.Process(process.pid).children(recursive=True), key=lambda p: p.memory_info().rss)
        before = server.memory_info().rss
        print(f"{CLIENTS} clients, {requests} requests over {len(calls)} actions", flush=True)
        for _ in range(STORMS):
            times, failures, seconds = storm(url, calls, requests)
            after = server.memory_info().rss
            middle, late = times[len(times) // 2], times[int(0.95 * len(times))]
            memory = f"memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB"
            rate = f"{len(times) / seconds:.1f} requests/s"
            print(f"failed {failures.total()}   p50 {middle:.2f} s   p95 {late:.2f} s   {rate}   {memory}", flush=True)
            for failure, count in failures.most_common(5):
                print(f"    {count} x {failure}")
            before = after
        leave(url, first)


def storm(url: str, calls: list[tuple[str, dict]], requests: int) -> tuple[list[float], Counter, float]:
    """(sorted seconds of the answers, failures, seconds of it all)."""
    from gradio_client import Client

    times, failures, indices = [], Counter(), iter(range(requests))

    def client() -> None:
        own = Client(url, verbose=False)
        for index in indices:
            name, options = calls[index % len(calls)]
            started = time.perf_counter()
            try:
                own.predict(api_name=f"/{name}", **options)
                times.append(time.perf_counter() - started)
            except Exception as error:
                failures[f"{name}: {error}"[:160]] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(times) or [float("nan")], failures, time.perf_counter() - started


def leave(url: str, client: Any, drawings: int = 6) -> None:
    """Clients that ask for the longest drawing and go away at once: the next one must not wait for all of these."""
    started = time.perf_counter()
    client.predict("rocket", 1, 50, 2.0, "DPM-Solver++", 6, api_name="/draw")
    alone = time.perf_counter() - started
    action = next(d["id"] for d in client.config["dependencies"] if d.get("api_name") == "draw")
    for index in range(drawings):
        data, session = ["rocket", index, 50, 2.0, "DPM-Solver++", 6, None, 0.6], f"gone{index}"
        body = {"data": data, "fn_index": action, "session_hash": session}
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/gradio_api/queue/join", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read()
        stream = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        stream.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        stream.getresponse().read(20)
        stream.sock.shutdown(socket.SHUT_RDWR)
        stream.close()
    started = time.perf_counter()
    client.predict(1, 2, api_name="/plane_point")
    waited, whole = time.perf_counter() - started, alone * drawings / 2
    verdict = "freed" if waited < whole / 2 else "NOT freed"
    left = f"{drawings} clients left their drawings of {alone:.1f} s"
    print(f"{left}; the next answer after {waited:.1f} s (all: {whole:.1f} s): slots {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="store_true", help="many clients instead of the browser")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of all clients together")
    parser.add_argument("--runs", type=int, default=9, help="of each measurement in the browser")
    options = parser.parse_args()
    if options.load:
        under_load(options.requests)
    else:
        in_browser(options.runs)


if __name__ == "__main__":
    main()
