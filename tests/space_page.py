"""What a visitor does on the page of the Space, in the browser that playwright drives."""

import contextlib
import re

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need pip install playwright")

TABS = ("Prompt to picture", "Round trip", "Latent space", "Repair", "Find the odd one", "Compare")
SECONDS = 30_000


def opened(browser, url: str, problems: list[str], **options):
    """A page on the Space, in a context of its own. What goes wrong in it is written into `problems`."""
    host = re.match(r"https?://[^/]+", url)[0]
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    page.on(
        "request",
        lambda request: None if request.url.startswith((host, "data:", "blob:")) else problems.append(request.url),
    )
    # A preview that the next one replaces before it has come is given up by the browser, and is no failure.
    page.on(
        "requestfailed", lambda r: None if r.failure == "net::ERR_ABORTED" else problems.append(f"{r.failure} {r.url}")
    )
    page.goto(url)
    page.get_by_role("tab", name=TABS[0]).wait_for()
    return page


def tab(page, name: str):
    """Open a tab; on a narrow page those that do not fit are buttons below."""
    page.get_by_role("tab", name=name, exact=True).or_(
        page.locator(".overflow-dropdown button", has_text=name)
    ).first.click()


def says(page, elem_id: str, words: str):
    sync_api.expect(page.locator(f"#{elem_id}")).to_contain_text(re.compile(words), timeout=SECONDS)


def drawn(page, words: str = r"Drawn.* s\."):
    says(page, "draw-status", words)


def redrawn(page, act) -> list[str]:
    """Do something, wait until a new picture is drawn, and return every status that was shown on the way."""
    page.evaluate("""() => {
        window.said = [];
        const line = document.querySelector('#draw-status');
        window.watching?.disconnect();
        window.watching = new MutationObserver(() => window.said.push(line.innerText.trim()));
        window.watching.observe(line, {subtree: true, childList: true, characterData: true});
    }""")
    act()
    page.wait_for_function("""() => {
        const asked = window.said.findIndex(text => /Step|Loading/.test(text));
        return asked >= 0 && window.said.slice(asked).some(text => text.startsWith('Drawn'));
    }""")
    return page.evaluate("window.said")


@contextlib.contextmanager
def slow_network(page, latency: int):
    """Inside, every request of the page takes so many milliseconds longer."""
    session = page.context.new_cdp_session(page)
    conditions = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    session.send("Network.emulateNetworkConditions", {**conditions, "latency": latency})
    try:
        yield
    finally:
        session.send("Network.emulateNetworkConditions", {**conditions, "latency": 0})
        session.detach()


def source(page, elem_id: str) -> str:
    """The address of the first picture in a component, once it is there."""
    image = page.locator(f"#{elem_id} img").first
    sync_api.expect(image).to_be_visible(timeout=SECONDS)
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    return image.get_attribute("src")


def changes(page, elem_id: str, act) -> str:
    """Do something, and wait until the picture in a component is another one."""
    before = source(page, elem_id)
    act()
    sync_api.expect(page.locator(f"#{elem_id} img").first).not_to_have_attribute("src", before, timeout=SECONDS)
    return source(page, elem_id)


def set_number(page, elem_id: str, value):
    field = page.locator(f"#{elem_id}").get_by_role("spinbutton")
    field.fill(str(value))
    field.press("Enter")


def toast(page, words: str):
    """One friendly line appears; it is closed again."""
    shown = page.get_by_test_id("toast-text").last
    sync_api.expect(shown).to_contain_text(re.compile(words), timeout=SECONDS)
    assert "Traceback" not in shown.inner_text() and len(shown.inner_text().splitlines()) == 1
    page.get_by_test_id("toast-close").last.click()
