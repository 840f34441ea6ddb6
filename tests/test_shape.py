"""The house stands as drawn: layers, rooms, one table per truth, one home for every template."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hybrid"

#: lowest first; a module may import from its own layer and from those before it
LAYERS: list[set[str]] = [
    {"types", "errors"},
    {"settings", "rooms", "state", "prompts", "quickstart"},
    {"models", "engine", "knowledge", "keys", "journal", "reach"},
    {"adapters"},
    {"catalog"},
    {"gate", "strategies"},
    {"names", "convene", "plan", "cascade"},
    {"gateway"},
    {"boot", "doctor"},
    {"training", "evaluation"},
    {"lifecycle"},
    {"server", "ui", "bench"},
    {"cli"},
]
#: pairs in one layer that must not know each other; they meet through files and `types`
STRANGERS = [("training", "evaluation"), ("engine", "knowledge"), ("server", "ui")]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(part: str) -> int:
    for i, layer in enumerate(LAYERS):
        if part in layer:
            return i
    raise AssertionError(f"hybrid.{part} stands in no layer; add it to LAYERS in its place")


def own_imports(path: Path) -> set[str]:
    """The first part below `hybrid` of every import of ours in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hybrid":
            parts = node.module.split(".")
            found |= (
                {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name != "__version__"}
            )
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hybrid.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    if part == "__init__":
        assert not own_imports(path)
        return
    for imported in own_imports(path):
        assert layer_of(imported) <= layer_of(part), f"hybrid.{part} imports upward: hybrid.{imported}"
        assert (part, imported) not in STRANGERS
        assert (imported, part) not in STRANGERS


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_our_own_modules_are_imported_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybrid"):
            assert id(node) in top, f"line {node.lineno}: an import of ours inside a function hides a cycle"


def test_strategies_do_not_import_one_another() -> None:
    files = [p for p in (PACKAGE / "strategies").glob("*.py") if p.stem not in ("__init__", "bound")]
    ways = [p for p in files if re.search(r"^async def run\(", p.read_text(), re.MULTILINE)]
    shared = {f"hybrid.strategies.{p.stem}" for p in files if p not in ways}
    vocabulary = {"hybrid.types", *(f"hybrid.types.{p.stem}" for p in (PACKAGE / "types").glob("*.py"))}
    assert len(ways) > 5
    for path in ways:
        imports = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybrid.")
        }
        assert imports <= {"hybrid.errors", "hybrid.prompts", *vocabulary, *shared}, path.name


def test_rooms_of_artefacts_hold_no_code() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    code = [f for f in tracked if f.endswith(".py")]
    assert all(f.split("/")[0] in ("hybrid", "tests", "app.py") for f in code)
    allowed = {"LICENSE", "CHANGELOG.md", "README.md", "Makefile", "constraints.txt", "pyproject.toml", "app.py"}
    rooms = {"hybrid", "adapters", "index", "eval", "tests", "docs", ".ci"}
    strangers = {f.split("/")[0] for f in tracked if f} - allowed - rooms
    assert not {name for name in strangers if not name.startswith(".")}


def test_importing_hybrid_is_light() -> None:
    heavy = ("torch", "vllm", "gradio", "transformers", "faiss", "sentence_transformers", "peft", "sklearn")
    probe = f"import sys, hybrid.gateway, hybrid.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_templates_stand_in_one_file() -> None:
    marks = ("<|im_start|>", "Use the passages", "[INST]")
    for path in modules():
        if path.name != "prompts.py":
            text = path.read_text()
            assert not any(mark in text for mark in marks), (
                f"{path.name} holds a prompt template; it belongs in prompts.py"
            )


def test_one_table_of_strategies() -> None:
    tables = [p for p in modules() if "STRATEGIES: Mapping" in p.read_text() or "STRATEGIES = " in p.read_text()]
    assert tables == [PACKAGE / "strategies" / "__init__.py"]


#: what runs code when it reads
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
#: readers that unpickle unless they are told not to
GUARDED = {"np.load": ("allow_pickle", "False"), "torch.load": ("weights_only", "True")}


@pytest.mark.parametrize("path", [*modules(), ROOT / "app.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_S11_nothing_is_unpickled_at_run_time(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in imported} & PICKLES
        if isinstance(node, ast.Call) and (told := GUARDED.get(ast.unparse(node.func))):
            assert told in {(keyword.arg, ast.unparse(keyword.value)) for keyword in node.keywords}, node.lineno
