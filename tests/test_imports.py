"""Which module may import which: floors, no circles, and what code that travels with a repository may import at all.

A module imports from its own floor or a lower one. All imports count, also those inside functions and under
`if TYPE_CHECKING`. Importing a package counts as importing its `__init__`; `from package import module`, the module.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    [r"hf_ae\.errors"],
    [r"hf_ae\.(models|training)(\.\w+)?", r"hf_ae\.(metrics|plots|disentanglement)"],
    [
        r"hf_ae\.data(\.\w+)?",
        r"hf_ae\.loading",
        r"hf_ae\.pipelines\.(text_to_image|caption_prior|drawing_request|image_io|inpainting|prompt_reading|repo_code|repo_parts|scoring)",
    ],
    [r"hf_ae\.(codec|latents|hub|diffusion)(\.\w+)?", r"hf_ae\.(sampling|export|anomaly)"],
    [r"hf_ae\.evaluation(\.\w+)?", r"hf_ae\.sklearn", r"hf_ae\.pipelines(\.vae_roundtrip)?"],
    [r"hf_ae\.(demo|train|train_prior|train_latent_diffusion|train_discriminator)", r"hf_ae_cli(\.\w+)?"],
    [r"space\.\w+"],
]
SCRIPTS, SPACES = 5, 6
"""Floors of what nothing imports: but COMMANDS each other and `hf_ae.demo`, and files of the Space each other."""
COMMANDS = re.compile(r"hf_ae_cli(\.\w+)?$")
TRAVELS = {
    r"hf_ae\.models\.(\w+)": {"torch", "transformers", "numpy", "PIL"},
    FLOORS[2][2]: {"torch", "transformers", "diffusers", "huggingface_hub", "numpy", "PIL"},
}
"""Modules that are copied into repositories -> what they import beside siblings and the standard library. The copies
are joined as text: a sibling is imported by `from .x import y` alone, at the beginning of a line."""


def read_sources() -> dict[str, str]:
    """Module name -> source text, of the package, the command line and the Space."""
    places = {"hf_ae": ROOT / "hf_ae", "hf_ae.pipelines": ROOT / "pipelines", "hf_ae_cli": ROOT / "hf_ae_cli"}
    places["space"] = ROOT / "spaces" / "hf-ae"
    sources = {}
    for name, folder in places.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            sources[".".join((name, *(part for part in parts if part != "__init__")))] = path.read_text()
    return sources


def packages(sources: Mapping[str, str]) -> set[str]:
    return {name.rsplit(".", 1)[0] for name in sources} & set(sources)


def floor_of(module: str) -> int | None:
    return next((i for i, names in enumerate(FLOORS) if any(re.fullmatch(name, module) for name in names)), None)


@functools.cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module: str, sources: Mapping[str, str]) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """(statement, dotted name that it imports), project and other; relative names are made absolute."""
    room = module if module in packages(sources) else module.rpartition(".")[0]
    for node in import_statements(sources[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        else:
            start = room.split(".")[: room.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def resolve(name: str, sources: Mapping[str, str]) -> str | None:
    """The module of the project that a dotted name means, or that holds it; None for those of others."""
    parts = name.split(".")
    if f"space.{parts[0]}" in sources:  # the Space's files import each other by their bare names
        return f"space.{parts[0]}"
    return next((found for i in range(len(parts), 0, -1) if (found := ".".join(parts[:i])) in sources), None)


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line for each import that breaks a rule, and for each circle."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module in sources:
        own, graph[module] = floor_of(module), set()
        if own is None and module != "hf_ae":
            found.append(f"{module} belongs to no floor")
        for node, name in imports(module, sources):
            target, line = resolve(name, sources), f"{module}:{node.lineno} imports {name}"
            if target is None:
                continue
            graph[module].add(target)
            if target == "hf_ae":
                known = name == "hf_ae" or re.search(rf"\b{name.split('.')[1]}\b", sources["hf_ae"])
                if own not in (SCRIPTS, SPACES) or not known:
                    found.append(f"{line}: only scripts import the package itself, and what it defines")
            elif module == "hf_ae":
                if not target.startswith("hf_ae.models."):
                    found.append(f"{line}: hf_ae itself imports models only")
            elif (up := floor_of(target)) is not None and own is not None:
                if up > own:
                    found.append(f"{line}: from floor {own} up to floor {up}")
                allowed = {SCRIPTS: COMMANDS.match(module) and (target == "hf_ae.demo" or COMMANDS.match(target))}
                allowed[SPACES] = own == SPACES
                if not allowed.get(up, True):
                    found.append(f"{line}: nothing imports {'a script' if up == SCRIPTS else 'the Space'}")
            if module.startswith("hf_ae.training") and not re.match(r"hf_ae\.(errors$|training)", target):
                found.append(f"{line}: training imports only errors and itself")
        found += travelling(module, sources)
    return found + circles(graph)


def travelling(module: str, sources: Mapping[str, str]) -> list[str]:
    """What breaks the rules for code that is copied into repositories."""
    others = next((others for names, others in TRAVELS.items() if re.fullmatch(names, module)), None)
    if others is None:
        deep = re.fullmatch(r"hf_ae\.models\.\w+\..*", module)
        return [f"{module}: hf_ae/models is flat"] if deep else []
    found = []
    for node, name in imports(module, sources):
        line, room = f"{module}:{node.lineno} imports {name}", module.rpartition(".")[0]
        if resolve(name, sources) is None:
            top = name.split(".")[0]
            if top not in others | sys.stdlib_module_names:
                found.append(f"{line}: code that travels needs {', '.join(sorted(others))} alone")
            continue
        plain = isinstance(node, ast.ImportFrom) and node.level == 1 and node.col_offset == 0
        plain = plain and f"{room}.{node.module}" in sources and not any(a.asname or a.name == "*" for a in node.names)
        if not plain:
            found.append(f"{line}: code that travels imports siblings by `from .x import y` alone")
    starts = {node.lineno for node in import_statements(sources[module])}
    for number, text in enumerate(sources[module].splitlines(), 1):
        if text.startswith("from .") and number not in starts:
            found.append(f"{module}:{number}: this line of a text would be taken for an import")
    return found


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """One line for each circle that a walk through the graph meets."""
    found, done = [], set()

    def visit(module: str, way: list[str]):
        if module in way:
            found.append("circle: " + " -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*way, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


SOURCES = read_sources()


def test_all_modules_are_read():
    assert {"hf_ae", "hf_ae_cli", "hf_ae.codec", "hf_ae.codec.tiles", "hf_ae.pipelines", "space.app"} < set(SOURCES)
    assert packages(SOURCES) >= {"hf_ae", "hf_ae.models", "hf_ae.pipelines", "hf_ae.training"}
    edges = {resolve(name, SOURCES) for _, name in imports("hf_ae.latents.sampling", SOURCES)}
    assert edges - {None} == {"hf_ae.data", "hf_ae.errors", "hf_ae.loading"}
    edges = {resolve(name, SOURCES) for _, name in imports("space.tab_latent", SOURCES)}
    assert "space.serving" in edges


def test_no_module_imports_against_the_direction():
    assert violations(SOURCES) == []


def test_names_of_modules_that_travel_are_unique():
    """Models and pipelines may end up in one repository."""
    stems = [name.rpartition(".")[2] for name in SOURCES for names in TRAVELS if re.fullmatch(names, name)]
    assert len(stems) == len(set(stems)) > 20


INSIDE = "def late():\n    {}\n"
PLANTED = {
    "upward": ("hf_ae.metrics", "from .codec import compress", "from floor 1 up to floor 3"),
    "upward, absolute": ("hf_ae.errors", "import hf_ae.plots as plots", "from floor 0 up to floor 1"),
    "upward, for types": ("hf_ae.loading", "if TYPE_CHECKING:\n    from . import hub", "from floor 2 up to floor 3"),
    "to a room above": ("hf_ae.codec.tiles", "from ..evaluation.fidelity import kernel", "from floor 3 up to floor 4"),
    "a circle in a function": ("hf_ae.data.images", INSIDE.format("from .stream import ImageStream"), "circle: "),
    "a circle through a package": ("hf_ae.codec.tiles", "from . import compress", "circle: hf_ae.codec -> "),
    "a circle of packages": (
        "hf_ae.latents.walks",
        "from ..hub.push import refresh\nimport hf_ae.latents",
        "circle: ",
    ),
    "a model, two dots": ("hf_ae.models.blocks", "from ..errors import require", "by `from .x import y` alone"),
    "a model, absolute": ("hf_ae.models.blocks", "import hf_ae.models.tiling", "by `from .x import y` alone"),
    "a model, module": ("hf_ae.models.blocks", "from . import tiling", "by `from .x import y` alone"),
    "a model, renamed": ("hf_ae.models.blocks", "from .tiling import tiled as t", "by `from .x import y` alone"),
    "a model, late": ("hf_ae.models.blocks", INSIDE.format("from .tiling import tiled"), "`from .x import y` alone"),
    "a model, in a text": ("hf_ae.models.blocks", '"""\nfrom .tiling import tiled\n"""', "taken for an import"),
    "a model, another library": ("hf_ae.models.blocks", "import datasets", "code that travels needs"),
    "a pipeline, the package": (
        "hf_ae.pipelines.image_io",
        INSIDE.format("from hf_ae.errors import require"),
        "by `from .x import y` alone",
    ),
    "a pipeline, another library": ("hf_ae.pipelines.image_io", INSIDE.format("import yaml"), "code that travels"),
    "training": ("hf_ae.training.run", "from ..metrics import psnr", "training imports only errors and itself"),
    "a script": ("hf_ae.train", "from .train_prior import Codes", "nothing imports a script"),
    "a script from the Space": ("space.serving", "from hf_ae.train import train", "nothing imports a script"),
    "the command line": ("hf_ae.demo", "import hf_ae_cli", "nothing imports a script"),
    "the Space": ("hf_ae.demo", "from serving import place", "nothing imports the Space"),
    "the package itself": ("hf_ae.hub.cards", "from .. import MODELS", "only scripts import the package itself"),
    "from the package itself": ("hf_ae", "from .metrics import psnr", "hf_ae itself imports models only"),
    "a new module": ("hf_ae.somewhere", "", "belongs to no floor"),
    "a deep model": ("hf_ae.models.deep.net", "", "is flat"),
}


@pytest.mark.parametrize("module, planted, words", PLANTED.values(), ids=PLANTED)
def test_a_planted_line_is_found(module, planted, words):
    sources = {**SOURCES, module: f"{SOURCES.get(module, '')}\n{planted}\n"}
    before = set(violations(SOURCES))
    new = [line for line in violations(sources) if line not in before]
    assert any(words in line and module in line for line in new), new


def test_the_command_line_may_import_the_demo():
    assert any(name.startswith("hf_ae.demo") for _, name in imports("hf_ae_cli.models", SOURCES))
