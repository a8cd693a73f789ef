"""The Space in a real browser, from a user's side. Needs Chromium (Debian: apt-get install chromium).

HF_AE_SCREENSHOTS=folder keeps a picture of every tab at two widths, light and dark.
"""

import io
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from space_page import (
    SECONDS,
    TABS,
    changes,
    drawn,
    opened,
    redrawn,
    says,
    set_number,
    slow_network,
    source,
    sync_api,
    tab,
    toast,
)

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the browser tests need Chromium: apt-get install chromium, or CHROMIUM=path", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "spaces" / "hf-ae" / "examples"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECTIONS = ("Walk", "Arithmetic", "Turn the numbers", "The plane", "A map", "Random codes", "A learned prior")
SHOWN = {
    "Prompt to picture": "pictures", "Round trip": "trip-slider", "Walk": "frames", "Arithmetic": "sum",
    "Turn the numbers": "turned", "The plane": "plane-digit", "Random codes": "dice-1",
    "A learned prior": "class-pictures", "Repair": "repaired", "Compare": "measured-pictures",
}  # fmt: skip
"""Where a tab shows something as soon as it is opened."""
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(browser, space):
    problems: list[str] = []
    page = opened(browser, space, problems)
    drawn(page)
    yield page, problems
    page.context.close()


@pytest.fixture
def page(shared):
    """The one page of this module; after each test nothing may have gone wrong in it."""
    page, problems = shared
    yield page
    assert problems == []


# Prompt to picture


def test_the_page_draws_before_anybody_asks(page):
    assert page.get_by_label("Prompt", exact=True).input_value() == "birthday cake"
    source(page, "pictures")


def test_a_prompt_shows_previews_and_then_its_picture(page):
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("rocket")
    said = redrawn(page, lambda: changes(page, "pictures", lambda: prompt.press("Enter")))
    assert sum(text.startswith("Step") for text in said) >= 2, said


def test_settings_take_effect(page):
    page.get_by_role("button", name="More settings").click()
    page.wait_for_timeout(500)  # fields that open for the first time take their values a moment later
    set_number(page, "count", 3)
    set_number(page, "steps", 4)
    page.locator("#scheduler input").click()
    page.get_by_role("option", name="DDIM").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#pictures .thumbnail-item img")).to_have_count(3, timeout=SECONDS)
    drawn(page)
    before = page.get_by_label("Seed").input_value()
    page.get_by_role("button", name="Another seed").click()
    expect(page.get_by_label("Seed")).not_to_have_value(before)
    drawn(page)


def test_a_picture_is_downloaded(page):
    page.locator("#pictures .thumbnail-item").first.click()
    with page.expect_download() as download:
        page.locator("#pictures").get_by_label("Download").click()
    assert Image.open(download.value.path()).size == (64, 64)
    page.locator("#pictures").get_by_label("Close").click()


def test_an_example_draws_at_one_click(page):
    changes(page, "pictures", lambda: page.locator("#prompt-examples").get_by_text("octopus").click())
    drawn(page)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("octopus")


def test_a_link_brings_everything_back(page, browser, space):
    page.get_by_role("button", name="Copy a link").click()
    link = page.locator("#link textarea, #link input").first
    expect(link).to_have_value(
        re.compile(r"\?prompt=octopus&seed=\d+&steps=4&guidance=2&scheduler=DDIM&count=3"), timeout=SECONDS
    )
    problems: list[str] = []
    other = opened(browser, link.input_value(), problems)
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("octopus", timeout=SECONDS)
    expect(other.locator("#pictures .thumbnail-item img")).to_have_count(3, timeout=SECONDS)
    other.context.close()
    assert problems == []


@pytest.mark.parametrize(
    "text", ['<img src=x onerror="window.hit = 1">', "<script>window.hit = 1</script>${window.hit = 1}"]
)
def test_html_in_a_prompt_is_only_text(page, browser, space, text):
    page.get_by_label("Prompt", exact=True).fill(text)
    redrawn(page, page.get_by_role("button", name="Draw", exact=True).click)
    problems: list[str] = []
    other = opened(browser, space + "/?prompt=" + text.replace('"', "%22"), problems)
    drawn(other)
    for each in (page, other):
        assert each.evaluate("window.hit") is None
    other.context.close()
    assert problems == []


def test_wrong_prompts_are_one_friendly_line(page):
    prompt = page.get_by_label("Prompt", exact=True)
    for text, words in (("", "Write what to draw"), ("a " * 5_000, "9,999 letters, and at most 300")):
        prompt.fill(text)
        page.get_by_role("button", name="Draw", exact=True).click()
        toast(page, words)
    prompt.fill("cat face")


def test_a_drawing_may_start_from_a_picture(page):
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("#start-picture input[type=file]").set_input_files(EXAMPLES / "owl.png")
    source(page, "start-picture")
    set_number(page, "strength", 0.3)
    changes(page, "pictures", lambda: page.get_by_role("button", name="Draw", exact=True).click())
    drawn(page)


def test_the_sheet_of_steps_and_seeds(page):
    page.get_by_role("button", name="Sheet").click()
    assert source(page, "sheet")


# Round trip


def test_the_quality_decides_about_bytes_and_error(page):
    tab(page, "Round trip")
    says(page, "trip-status", "bytes")
    told = {}
    for quality in (0.1, 0.9):
        line = page.locator("#trip-status p")
        before = line.inner_text()
        set_number(page, "quality", quality)
        expect(line).not_to_have_text(before, timeout=SECONDS)
        text = line.inner_text()
        told[quality] = [
            float(re.search(wanted, text)[1].replace(",", "")) for wanted in (r"([\d,]+) bytes", r"PSNR ([\d.]+)")
        ]
    (small, poor), (large, good) = told[0.1], told[0.9]
    assert small * 2 < large and poor + 3 < good


def test_the_line_between_before_and_after_follows_the_pointer(page):
    slider = page.locator("#trip-slider")
    before = slider.screenshot()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.85, middle, steps=5)
    page.mouse.up()
    assert slider.screenshot() != before


def test_other_formats_at_the_same_size(page):
    changes(page, "trip-picture", lambda: page.get_by_label("Emoji: owl").click())
    says(page, "trip-status", "instead of 12,288")
    expect(page.get_by_role("radio", name="Emoji")).to_be_checked()
    page.get_by_role("button", name="Put JPEG").click()
    figures = page.locator("#trip-figures")
    expect(figures.get_by_role("row")).to_have_count(5, timeout=SECONDS)
    sizes = {
        row.split()[0]: int(row.split()[1].replace(",", ""))
        for row in figures.get_by_role("row").all_inner_texts()[1:]
    }
    assert set(sizes) == {"Autoencoder", "JPEG", "WebP", "AVIF"}
    source(page, "trip-others")


def test_a_file_goes_out_and_comes_in_again(page, tmp_path):
    with page.expect_download() as download:
        page.locator("#trip-file a").first.click()
    file = tmp_path / "owl.hfae"
    download.value.save_as(file)
    assert file.stat().st_size < 2_000
    page.get_by_role("button", name="Open a compressed file").click()
    page.locator("#dropped input[type=file]").set_input_files(file)
    source(page, "opened")
    says(page, "open-status", "64×64 pixels")


def test_wrong_files_are_one_friendly_line(page, tmp_path):
    (tmp_path / "cut.png").write_bytes((EXAMPLES / "owl.png").read_bytes()[:2000])
    page.locator("#trip-picture").get_by_label("Clear").or_(
        page.locator("#trip-picture").get_by_label("Remove")
    ).first.click()
    page.locator("#trip-picture input[type=file]").set_input_files(tmp_path / "cut.png")
    toast(page, "damaged")
    page.get_by_label("Emoji: cupcake").click()
    source(page, "trip-picture")


def test_of_quick_clicks_the_last_one_counts(page):
    tab(page, "Round trip")
    picker, line = page.locator("#trip-picker"), page.locator("#trip-status p")

    def alone(label: str) -> str:
        picker.get_by_label(label).click()
        expect(line).to_contain_text("294,912" if label.startswith("Photo") else "12,288", timeout=SECONDS)
        return line.inner_text()

    for first, last in (("caps", "boat"), ("window", "caps")):
        alone("Emoji: owl")
        expected = alone(f"Photo: {last}")
        alone("Emoji: owl")
        with slow_network(page, 400):
            picker.get_by_label(f"Photo: {first}").click()
            page.wait_for_timeout(100)
            picker.get_by_label(f"Photo: {last}").click()
            expect(line).to_have_text(expected, timeout=SECONDS)
            page.wait_for_timeout(1500)
        assert line.inner_text() == expected, "the earlier click came after the last one"


# Latent space


def test_a_walk_follows_the_slider_and_the_ends(page):
    tab(page, "Latent space")
    assert page.locator("#frames img").count() == 9
    changes(page, "walk-here", lambda: set_number(page, "position", 0.9))
    handle = page.locator("#position input[type=range]")
    changes(page, "walk-here", lambda: (handle.focus(), handle.press("ArrowLeft")))
    changes(page, "walk-here", lambda: page.locator("#walk-pick-a").get_by_label("trousers").click())
    changes(page, "walk-here", lambda: page.locator("#walk-kind").get_by_label("Digits").click())
    changes(page, "walk-here", lambda: page.locator("#walk-way").get_by_label("linear").click())


def test_arithmetic_follows_its_terms(page):
    tab(page, "Arithmetic")
    assert page.locator("#sum img").count() == 4

    def choose():
        page.locator("#group-a input").click()
        page.get_by_role("option", name="coat").click()

    changes(page, "sum", choose)


def test_each_number_has_a_slider(page):
    tab(page, "Turn the numbers")
    assert page.locator("[id^=number-] input[type=range]").count() == 10
    changes(page, "turned", lambda: set_number(page, "number-1", -3))
    changes(page, "turned", lambda: page.locator("#turn-picker").get_by_label("sneaker").click())


def test_the_plane_is_drawn_where_one_points(page):
    tab(page, "The plane")
    plane = page.locator("#plane .map")
    side = plane.bounding_box()["width"]
    changes(page, "plane-digit", lambda: plane.click(position={"x": 0.1 * side, "y": 0.1 * side}))
    expect(page.locator("#plane-x").get_by_role("spinbutton")).to_have_value(re.compile(r"-5\.\d"), timeout=SECONDS)
    handle = page.locator("#plane-y input[type=range]")
    changes(page, "plane-digit", lambda: (handle.focus(), [handle.press("PageUp") for _ in range(3)]))
    box = plane.bounding_box()
    with slow_network(page, 200):
        page.mouse.move(box["x"] + 0.5 * side, box["y"] + 0.2 * side)
        page.mouse.move(box["x"] + 0.9 * side, box["y"] + 0.1 * side, steps=30)  # faster than digits come
        for name in ("x", "y"):
            field = page.locator(f"#plane-{name}").get_by_role("spinbutton")
            expect(field).to_have_value(re.compile(r"14\.\d"), timeout=SECONDS)
    assert page.get_by_test_id("toast-text").count() == 0


def test_random_codes_change_with_the_dice(page):
    tab(page, "Random codes")
    changes(page, "dice-0", lambda: set_number(page, "dice", 7))
    changes(page, "dice-1", lambda: page.get_by_label("as wide as").click())


def test_a_class_is_drawn_with_the_learned_prior(page):
    tab(page, "A learned prior")
    assert page.locator("#class-pictures img").count() == 3
    changes(page, "class-pictures", lambda: page.locator("#class").get_by_label("trousers").click())
    changes(page, "class-pictures", lambda: set_number(page, "class-seed", 7))


# Repair and compare


def test_damage_is_undone(page):
    tab(page, "Repair")
    says(page, "repair-status", "better")
    for damage in ("Mask", "Shrink", "Salt and pepper"):
        page.locator("#damage").get_by_label(damage).click()
        says(page, "repair-status", r"PSNR [\d.]+ dB before")
    page.locator("#damage").get_by_label("Drop the colour").click()
    says(page, "repair-status", "better")
    changes(page, "repaired", lambda: page.locator("#repair-picker").get_by_label("crying face").click())
    page.locator("#damage").get_by_label("Noise").click()
    page.locator("#repair-picker").get_by_label("bag").click()
    changes(page, "repaired", lambda: page.locator("#repair-picker").get_by_label("dress").click())


def test_the_odd_one_is_found(page):
    tab(page, "Find the odd one")
    says(page, "odd-status", "outlier")
    changes(page, "odd-shown", lambda: page.locator("#odd-picker").get_by_label("pullover").click())
    says(page, "odd-status", "nothing odd")
    says(page, "odd-found", "the digit")
    changes(page, "twelve", lambda: set_number(page, "odd-seed", 5))
    says(page, "odd-found", "the digit")


def test_a_map_whose_decoder_runs_in_the_browser(page):
    tab(page, "Latent space")
    tab(page, "A map")
    frame = page.frame_locator("#map-frame")
    expect(frame.locator("#about")).to_contain_text("2,000 images by its two latents", timeout=SECONDS)
    page.frames[-1].wait_for_function("session !== null", timeout=SECONDS)
    frame.locator("#map").hover(position={"x": 200, "y": 200})
    expect(frame.locator("#what")).to_contain_text("image", timeout=SECONDS)
    page.frames[-1].wait_for_function("frames.length > 0", timeout=SECONDS)
    keep(page, "A map, loaded", 1280, "light")


def test_the_measured_tables(page):
    tab(page, "Compare")
    expect(page.locator("#measured").get_by_role("rowheader", name="fashion-vae", exact=True)).to_be_visible()
    page.get_by_label("MNIST", exact=True).click()
    expect(page.locator("#measured").get_by_role("rowheader", name="mnist-vae")).to_be_visible(timeout=SECONDS)
    source(page, "measured-pictures")


# The whole page


NAMELESS = """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, select, [role=slider]')]
    .filter(e => e.offsetParent && !(e.getAttribute('aria-label') || e.innerText?.trim() || e.title ||
        e.labels?.length || e.closest('label') || e.getAttribute('aria-labelledby') || e.placeholder ||
        e.querySelector('[aria-label], title, img[alt]:not([alt=""])')))
    .map(e => e.outerHTML.slice(0, 160))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_fits_and_names_its_controls(browser, space, width, theme):
    problems: list[str] = []
    page = opened(
        browser, f"{space}/?__theme={theme}", problems, viewport={"width": width, "height": 900}, color_scheme=theme
    )
    drawn(page)
    for name in (*TABS[:3], *SECTIONS, *TABS[3:]):
        tab(page, name)
        if name in SHOWN:
            source(page, SHOWN[name])
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(NAMELESS) == [], name
        if name != "Latent space":
            keep(page, f"{TABS[2]}, {name}" if name in SECTIONS else name, width, theme)
    page.context.close()
    assert problems == []


def keep(page, name: str, width: int, theme: str):
    """A picture of the whole page, where HF_AE_SCREENSHOTS says."""
    if folder := os.environ.get("HF_AE_SCREENSHOTS"):
        path = Path(folder) / f"{name}-{width}-{theme}.png".replace(", ", "-").replace(" ", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB").save(path)
