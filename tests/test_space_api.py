"""The Space as an API and an MCP server: every action, with the real clients, and what hostile callers try."""

import asyncio
import base64
import dataclasses
import json
import re
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest
from PIL import Image

from hf_ae.codec.container import pack, unpack

gradio_client = pytest.importorskip("gradio_client", reason="the Space needs pip install 'hf_ae[space]'")
EXAMPLES = Path(__file__).resolve().parent.parent / "spaces" / "hf-ae" / "examples"
PHOTO, EMOJI = (gradio_client.handle_file(str(EXAMPLES / name)) for name in ("window.png", "owl.png"))
ACTIONS = {
    "draw": dict(prompt="rocket", seed=3, steps=4),
    "steps_sheet": dict(prompt="rocket", seed=3),
    "round_trip": dict(picture=PHOTO, model="Photo", quality=0.5),
    "beside_others": dict(picture=EMOJI, model="Emoji", quality=0.5),
    "open_file": None,  # needs a file, see its test
    "walk": dict(a=EMOJI, b=PHOTO, kind="Digits", way="linear", position=0.25),
    "arithmetic": dict(a="coat", b="shirt", picture=EMOJI),
    "numbers_of": dict(picture=EMOJI),
    "draw_numbers": dict(n1=1.5, n10=-2),
    "plane_point": dict(x=3, y=-2),
    "random_digits": dict(seed=5, spread="as wide as each model's own codes"),
    "draw_class": dict(kind="bag", seed=2),
    "repair": dict(picture=EMOJI, damage="Mask", level=0.3, seed=1),
    "look": dict(picture=EMOJI),
    "find_odd_one": dict(seed=3),
    "compare": dict(family="MNIST"),
}


@pytest.fixture(scope="module")
def client(space, tmp_path_factory):
    return gradio_client.Client(space, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def pictures_in(answer) -> list[str]:
    """The files of all pictures in an answer."""
    if isinstance(answer, dict):
        return pictures_in(list(answer.values()))
    if isinstance(answer, list | tuple):
        return [path for part in answer for path in pictures_in(part)]
    return [answer] if isinstance(answer, str) and answer.endswith((".png", ".jpg", ".webp")) else []


def error_of(client, api_name: str, **arguments) -> str:
    with pytest.raises(Exception) as caught:
        client.predict(api_name=f"/{api_name}", **arguments)
    return str(caught.value)


def test_every_action_is_public_and_no_other(client):
    described = client.view_api(return_format="dict", print_info=False)
    assert set(described["named_endpoints"]) == {f"/{name}" for name in ACTIONS}
    assert not described["unnamed_endpoints"]


@pytest.mark.parametrize("name", [name for name, arguments in ACTIONS.items() if arguments])
def test_every_action_answers_with_pictures(client, name):
    found = pictures_in(client.predict(api_name=f"/{name}", **ACTIONS[name]))
    assert found and all(Image.open(path).size[0] > 27 for path in found)


@pytest.mark.parametrize(
    "damage, level", {"Noise": 0.6, "Salt and pepper": 0.02, "Mask": 0.8, "Shrink": 7, "Drop the colour": 0}.items()
)
def test_every_damage_and_its_whole_range_is_there_without_the_page(client, damage, level):
    assert "PSNR" in client.predict(EMOJI, damage, level, 99, api_name="/repair")[1]
    error = error_of(client, "repair", picture=EMOJI, damage=damage, level=7.5)
    assert error == "Value 7.5 is greater than maximum value 7."


def test_a_drawing_depends_on_its_seed_alone(client):
    drawn = [client.predict("rocket", seed, 4, api_name="/draw")[0][0]["image"] for seed in (1, 1, 2)]
    first, again, other = (Image.open(path).convert("RGB").tobytes() for path in drawn)
    assert first == again and first != other


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "Euler", "Euler, ancestral", "UniPC"])
def test_every_scheduler_draws(client, scheduler):
    pictures, told = client.predict("rocket", 1, 3, 2.0, scheduler, 2, api_name="/draw")
    assert len(pictures) == 2 and "Drawn" in told


def test_strength_zero_gives_the_picture_back(client):
    pictures, _ = client.predict("rocket", picture=EMOJI, strength=0.0, api_name="/draw")
    drawn, owl = (
        Image.open(path).convert("RGB").resize((8, 8)) for path in (pictures[0]["image"], EXAMPLES / "owl.png")
    )
    assert max(abs(a - b) for x, y in zip(drawn.getdata(), owl.getdata()) for a, b in zip(x, y)) < 60


def test_a_compressed_file_opens_again(client):
    pictures, told, file = client.predict(PHOTO, "Photo", 0.3, api_name="/round_trip")
    assert f"{Path(file).stat().st_size:,} bytes" in told
    opened, said = client.predict(gradio_client.handle_file(file), api_name="/open_file")
    assert "Photo" in said and Image.open(opened).tobytes() == Image.open(pictures[1]).tobytes()


def test_the_table_holds_what_metrics_json_says(client):
    figures, _ = client.predict("MNIST", api_name="/compare")
    cards = EXAMPLES.parent.parent.parent / "model_cards"
    for name in ("mnist-vae", "mnist-deep-ae", "mnist-ae-2d"):
        measured = json.loads((cards / name / "metrics.json").read_text())
        assert name in figures and f"<td>{measured['reconstruction']['psnr']:.2f}</td>" in figures


# MCP


def with_mcp(space, use):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        async with (
            streamablehttp_client(f"{space}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await use(session)

    return asyncio.run(run())


def test_every_action_is_an_mcp_tool_whose_description_reads_well(space):
    tools = {
        tool.name.removeprefix("hf_ae_"): tool for tool in with_mcp(space, lambda session: session.list_tools()).tools
    }
    assert {name for name in ACTIONS if any(tool.endswith(name) for tool in tools)} == set(ACTIONS) and len(
        tools
    ) == len(ACTIONS)
    for name, tool in tools.items():
        assert re.match(r"[A-Z].{30,}\.", tool.description or "", re.S), name
        for argument, schema in tool.inputSchema["properties"].items():
            assert len(schema.get("description", "")) > 8, f"{name}: {argument}"


def as_data(value):
    """A file as MCP takes it: base64 in a data address. Anything else as it is."""
    if not isinstance(value, dict):
        return value
    return data_address(Path(value["path"]).read_bytes())


def data_address(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_every_mcp_call_answers_with_a_picture_or_where_pictures_are(space):
    """Gradio 6.31 gives one output as a picture; several as text, which names the address of each."""

    async def call(session):
        tools = {
            name: tool.name
            for tool in (await session.list_tools()).tools
            for name in ACTIONS
            if tool.name.endswith(name)
        }
        answers = {
            name: await session.call_tool(tools[name], {key: as_data(value) for key, value in arguments.items()})
            for name, arguments in ACTIONS.items()
            if arguments
        }
        address = re.search(r"http://[^']+\.hfae", answers["round_trip"].content[0].text)
        compressed = data_address(urllib.request.urlopen(address[0]).read(), "application/octet-stream")
        return answers | {"open_file": await session.call_tool(tools["open_file"], {"file": compressed})}

    answers = with_mcp(space, call)
    assert set(answers) == set(ACTIONS)
    for name, answer in answers.items():
        assert not answer.isError, f"{name}: {answer.content}"
        pictures = [part for part in answer.content if part.type == "image"]
        assert all(
            picture.mimeType == "image/png" and base64.b64decode(picture.data)[:4] == b"\x89PNG"
            for picture in pictures
        ), name
        told = " ".join(part.text for part in answer.content if part.type == "text")
        addresses = re.findall(r"http://[^'\s]+\.png", told)
        assert (pictures or addresses) and all(get(address) == 200 for address in addresses), f"{name}: {told}"
    assert answers["plane_point"].content[0].type == answers["steps_sheet"].content[0].type == "image"
    assert "Drawn" in answers["draw"].content[0].text and "mnist-vae" in answers["compare"].content[0].text


# What hostile callers try


def huge_png(path: Path, side: int = 10_000) -> Path:
    """A sound PNG of 100 megapixels in 12 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    body = zlib.compress(bytes((side // 8 + 1) * side), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


PICTURE_ACTIONS = {
    "round_trip": "picture",
    "beside_others": "picture",
    "draw": "picture",
    "repair": "picture",
    "walk": "a",
    "arithmetic": "picture",
}


@pytest.mark.parametrize("name", PICTURE_ACTIONS)
def test_a_picture_of_100_megapixels_is_refused_by_its_header(client, tmp_path, name):
    sent = gradio_client.handle_file(str(huge_png(tmp_path / "huge.png")))
    said = error_of(client, name, **{**ACTIONS[name], PICTURE_ACTIONS[name]: sent})
    assert "100 megapixels" in said and "\n" not in said


def test_a_picture_that_pillow_itself_refuses_is_called_too_large(client, tmp_path):
    sent = gradio_client.handle_file(str(huge_png(tmp_path / "huge.png", 14_000)))
    assert "far too large" in error_of(client, "round_trip", picture=sent)


def test_a_narrow_picture_costs_no_more_than_its_pixels(client, tmp_path):
    """Cells of a panel are 240 pixels wide at the least: a picture of one column must not be stretched to that."""
    Image.new("RGB", (1, 768), "red").save(tmp_path / "column.png")
    sent = gradio_client.handle_file(str(tmp_path / "column.png"))
    *_, figures, panel = client.predict(sent, "Photo", 0.3, api_name="/beside_others")
    assert max(Image.open(panel).size) < 2_500 and "nan" not in figures
    *_, file = client.predict(sent, "Photo", 0.3, api_name="/round_trip")
    forged = Path(file).read_bytes()
    header = unpack(forged)
    (tmp_path / "long.hfae").write_bytes(pack(dataclasses.replace(header, width=160_000, height=1)))
    assert "160,000×1 pixels" in error_of(
        client, "open_file", file=gradio_client.handle_file(str(tmp_path / "long.hfae"))
    )


def broken_files(tmp_path: Path) -> dict[str, bytes]:
    owl = (EXAMPLES / "owl.png").read_bytes()
    return {
        "cut.png": owl[: len(owl) // 2],
        "noise.png": bytes(range(256)) * 8,
        "empty.png": b"",
        "text.jpg": b"no picture",
        "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }


@pytest.mark.parametrize("name", broken_files(Path()))
def test_a_damaged_or_foreign_picture_is_one_clear_line(client, tmp_path, name):
    (tmp_path / name).write_bytes(broken_files(tmp_path)[name])
    said = error_of(client, "round_trip", picture=gradio_client.handle_file(str(tmp_path / name)))
    assert (
        re.search("no picture|damaged", said)
        and "Traceback" not in said
        and str(tmp_path) not in said
        and "/tmp" not in said
    )


def test_damaged_and_foreign_files_are_one_clear_line(client, tmp_path):
    _, _, file = client.predict(EMOJI, "Emoji", 0.3, api_name="/round_trip")
    good = Path(file).read_bytes()
    texts = {
        "foreign.hfae": b"PK\x03\x04 and so on",
        "damaged.hfae": good[:20] + bytes([good[20] ^ 1]) + good[21:],
        "cut.hfae": good[:-9],
    }
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
        assert re.search(
            "no .hfae file|damaged",
            error_of(client, "open_file", file=gradio_client.handle_file(str(tmp_path / name))),
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(prompt="x" * 10_000), "10,000 letters, and at most 300"),
        (dict(prompt="  "), "Write what to draw"),
        (dict(prompt="cat", steps=10_000), "greater than maximum value 50"),
        (dict(prompt="cat", count=1_000), "greater than maximum value 6"),
        (dict(prompt="cat", seed=-1), "less than minimum value 0"),
        (dict(prompt="cat", guidance=1e9), "greater than maximum value 10"),
        (dict(prompt="cat", scheduler="os.system"), r"os\.system is not in the list of choices: \['DPM-Solver"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(client, arguments, words):
    said = error_of(client, "draw", **arguments)
    assert re.search(words, said, re.IGNORECASE) and "Traceback" not in said


def get(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_of_the_machine_can_be_read(space, client):
    for path in (
        "/etc/passwd",
        str(EXAMPLES.parent / "app.py"),
        str(EXAMPLES.parent.parent.parent / "README.md"),
        "../../etc/passwd",
        "app.py",
    ):
        assert get(f"{space}/gradio_api/file={path}") in (403, 404), path
    for path in ("/etc/passwd", str(EXAMPLES / "owl.png"), str(EXAMPLES.parent / "screenshot.jpg")):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {"meta": {}}, {}):
            sent = {"path": path, **meta}
            assert "event: error" in called(space, "round_trip", {"data": [sent, "Photo", 0.5]}), sent
            assert "event: error" in called(space, "repair", {"data": [sent, "Noise", 0.3, 0]}), sent
            assert "event: error" in called(space, "draw", {"data": ["owl", 1, 2, 2.0, "DDIM", 1, sent, 0.0]}), sent


def called(space: str, name: str, body: dict) -> str:
    """What the bare HTTP API answers."""
    request = urllib.request.Request(
        f"{space}/gradio_api/call/{name}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    event = json.loads(urllib.request.urlopen(request, timeout=10).read())["event_id"]
    return urllib.request.urlopen(f"{space}/gradio_api/call/{name}/{event}", timeout=60).read().decode()


def test_an_upload_stays_in_its_folder_whatever_its_name(space):
    owl = (EXAMPLES / "owl.png").read_bytes()
    name = b'name="files"; filename="../../../../../../tmp/../etc/evil.png"'
    body = b"--b\r\nContent-Disposition: form-data; " + name + b"\r\n\r\n" + owl + b"\r\n--b--\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{space}/gradio_api/upload", body, header)
    (path,) = json.loads(urllib.request.urlopen(request, timeout=10).read())
    assert ".." not in path and "hf_ae_space_" in path and not Path("/etc/evil.png").exists()


def test_no_address_of_this_machine_is_fetched(space):
    file = {"url": f"{space}/theme.css", "path": f"{space}/theme.css", "meta": {"_type": "gradio.FileData"}}
    assert "event: error" in called(space, "round_trip", {"data": [file, "Photo", 0.5]})
