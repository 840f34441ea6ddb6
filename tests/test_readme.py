"""The README's snippets run as they stand, and the docs name what exists: settings, errors, files, links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from hybrid import errors
from hybrid.evaluation.words import glance
from hybrid.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ADDRESS = "http://127.0.0.1:8000"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "index" / "handbook" / "documents").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, without their fences."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for spoken, code in every if spoken == language]


SNIPPETS = [(language, code) for language in ("bash", "python") for code in blocks(README, language)]


def test_every_snippet_asks_the_server_that_make_run_starts() -> None:
    assert {language for language, _ in SNIPPETS} == {"bash", "python"}
    assert all(ADDRESS in code for _, code in SNIPPETS)


@pytest.mark.parametrize(("language", "code"), SNIPPETS, ids=[f"{la}-{i}" for i, (la, _) in enumerate(SNIPPETS)])
def test_the_readme_snippet_runs(language: str, code: str, server_url: str) -> None:
    code = code.replace(ADDRESS, server_url).replace("curl -sS", "curl -sS --fail-with-body")
    argv = {"bash": ["bash", "-euc", code], "python": [sys.executable, "-c", code]}[language]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_readme_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(README, "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def tree_paths() -> Iterator[tuple[Path, bool]]:
    """Every path that the README's tree draws, and whether it is drawn as a folder."""
    tree = next(block for block in blocks(README, "") if block.startswith("hybrid/"))
    for line in tree.splitlines():
        name = line.split()[0]
        yield ROOT / ("hybrid" if line.startswith("  ") else "") / name, name.endswith("/")


def test_the_tree_is_the_real_one() -> None:
    drawn = dict(tree_paths())
    for path, folder in drawn.items():
        assert path.is_dir() if folder else path.is_file(), path
    hidden = {"__init__.py", "__pycache__", "py.typed"}
    real = {path for path in (ROOT / "hybrid").iterdir() if path.name not in hidden}
    assert real <= set(drawn), f"the README's tree lacks {sorted(p.name for p in real - set(drawn))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if "handbook" in p.parts], ids=lambda page: page.name)
def test_a_handbook_section_fits_a_passage(page: Path) -> None:
    for section in re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        assert len(section.split()) <= 150, section.splitlines()[0]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every setting as (dotted name, default)."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


@pytest.mark.parametrize(("name", "default"), list(fields(Settings)))
def test_settings_md_tells_every_setting_and_its_default(name: str, default: object) -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    row = re.search(rf"^\| `{re.escape(name)}` \| (.+?) \| .+ \|$", page, re.MULTILINE)
    assert row, f"docs/settings.md has no row for {name}"
    if isinstance(default, bool | int | float | str) and default != "":
        assert row[1] == f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_settings_md_tells_no_setting_that_is_gone() -> None:
    told = set(re.findall(r"^\| `([a-z_.]+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))
    assert told == {name for name, _ in fields(Settings)}


def leaves(error: type[errors.HybridError]) -> Iterator[type[errors.HybridError]]:
    yield error
    for child in error.__subclasses__():
        yield from leaves(child)


def test_failures_md_tells_every_status_and_code() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    for error in leaves(errors.HybridError):
        if error.__module__ == "hybrid.errors" and error is not errors.SetupError:
            code = vars(error).get("code", error.code)
            assert f"| {error.status} | `{code}` |" in page, error.__name__


def test_the_readmes_scores_are_the_committed_reports() -> None:
    report = json.loads((ROOT / "eval/reports/real/report.json").read_text())
    table = [line for line in glance(report).splitlines() if line.startswith("|")]
    assert len(table) > 3
    assert "\n".join(table) in README.read_text()


def test_the_readmes_taught_score_is_the_committed_reports() -> None:
    report = json.loads((ROOT / "eval/reports/real-taught/report.json").read_text())
    assert f"[{report['overall']['auto']['score']:.2f}](eval/reports/real-taught/report.md)" in README.read_text()


@pytest.mark.parametrize("name", ["real", "real-taught"])
def test_the_committed_report_holds_no_text_of_a_data_set(name: str) -> None:
    folder = ROOT / "eval/reports" / name
    assert not (folder / "examples.jsonl").exists()
    rows = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    assert rows
    assert not any(row["answer"] for row in rows)
    assert all(path.stat().st_size < 2_000_000 for path in folder.iterdir())
