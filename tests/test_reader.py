"""A reader that a task's training questions taught finds the passage that answers among those about the same matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import DataError
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.quote import quote
from hybrid.knowledge.ranking import WEIGHT
from hybrid.knowledge.reader import Reader
from hybrid.knowledge.search import Library
from hybrid.lifecycle.teach_reader import groups, teach, train_examples
from hybrid.lifecycle.tune_search import dev_examples, learn
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings
from hybrid.types.passage import Passage

MILLS = [
    f"{first}{last}"
    for first, last in product(
        ("Quil", "Mar", "Thorn", "Esk", "Bram", "Oster", "Fal", "Wend"),
        ("low", "garth", "wick", "ney", "combe", "stead"),
    )
]
FOUNDERS = ("the weaver Ansgar", "two sisters", "the abbey", "a ship owner", "the guild of dyers")
GOODS = ("oat flour", "linen", "mustard", "paper", "lamp oil", "snuff")
RIVERS = ("the Aster", "the Lune", "a mill pond", "the Orme", "a canal")
#: how each fact is told, and how it is asked in other words
FACTS = {
    "year": ("Work at {mill} began in {value}, after a hard winter.", "How old is {mill}?"),
    "founder": ("It was {value} who paid for the walls of {mill}.", "Who is {mill} owed to?"),
    "goods": ("Carts left {mill} loaded with {value} every week.", "What did {mill} make?"),
    "river": ("The wheel of {mill} was turned by {value}.", "Where did {mill} get its power?"),
}


def value(mill: int, fact: str) -> str:
    if fact == "year":
        return str(1700 + 3 * mill)
    choices = {"founder": FOUNDERS, "goods": GOODS, "river": RIVERS}[fact]
    return choices[mill % len(choices)]


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def mills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of four facts about each of many mills; the passages of one mill are alike to an embedder."""
    folder = tmp_path_factory.mktemp("tasks") / "mills"
    folder.mkdir()
    told: list[dict[str, object]] = []
    asked: list[dict[str, object]] = []
    for (n, mill), (fact, (tells, asks)) in product(enumerate(MILLS), FACTS.items()):
        name, answer = f"{mill}-{fact}", value(n, fact)
        told.append({"id": name, "title": "", "text": tells.format(mill=mill, value=answer)})
        asked.append(
            {"id": name, "input": asks.format(mill=mill), "reference": answer, "meta": {"gold_passages": [name]}}
        )
    write(folder / "corpus.jsonl", told)
    (folder / "task.json").write_text(json.dumps({"name": "mills", "metric": "token_f1", "license": "CC0-1.0"}))
    # other mills teach than are asked for afterwards
    write(folder / "train.jsonl", asked[:112])
    write(folder / "dev.jsonl", asked[112:152])
    write(folder / "test.jsonl", asked[152:])
    return folder


@pytest.fixture(scope="module")
def home(mills: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("home"))
    library = Library(home, embedder, RetrievalSettings())
    library.ingest("mills", mills)
    library.close()
    return home


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reader(home: Home, mills: Path, embedder: Embedder, cache: Path) -> Reader:
    library = Library(home, embedder, RetrievalSettings())
    task, _ = dev_examples(mills)
    seen: list[tuple[str, int, int]] = []
    made = teach(
        embedder, groups(library, "mills", task, train_examples(mills), _quiet), cache, lambda *at: seen.append(at)
    )
    library.close()
    assert seen[-1][1] == seen[-1][2] > 1
    return made


@pytest.fixture
def library(home: Home, embedder: Embedder) -> Library:
    return Library(home, embedder, RetrievalSettings())


def _quiet(step: str, done: int, total: int) -> None:
    """No bar is shown."""


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def first(library: Library, asked: Sequence[dict[str, str]]) -> float:
    """The share of the questions whose own passage comes first."""
    return fmean(library.search("mills", row["input"], 1)[0].id == row["id"] for row in asked)


def test_what_was_taught_reads_questions_it_never_saw(
    library: Library, home: Home, mills: Path, reader: Reader, embedder: Embedder
) -> None:
    asked = rows(mills / "test.jsonl")
    before = first(library, asked)
    task, examples = dev_examples(mills)
    learned = learn(library, "mills", task, examples, reader=reader)
    assert learned.reranker is not None
    assert learned.facts["reranked"] > learned.facts["fused"]
    library.tune("mills", learned, reader)
    assert before < 0.8
    assert first(library, asked) > max(0.9, before + 0.1)
    # another process reads it from the disk, and says the same
    other = Library(home, embedder, RetrievalSettings())
    for row in asked[:5]:
        mine, theirs = (one.look_up("mills", row["input"], 3) for one in (library, other))
        assert [p.id for p in mine.passages] == [p.id for p in theirs.passages]
        assert mine.answerable == pytest.approx(theirs.answerable, abs=1e-3)
        assert mine.passages[0].scores.rerank > mine.passages[1].scores.rerank
    other.close()
    plain = Library(home, embedder, RetrievalSettings(rerank=False, weight=WEIGHT))
    assert first(plain, asked) == before
    plain.close()


def test_what_it_says_can_be_compared_and_points_at_answers(reader: Reader, mills: Path) -> None:
    told = {row["id"]: row["text"] for row in rows(mills / "corpus.jsonl")}
    right, wrong = [], []
    for row in rows(mills / "test.jsonl"):
        mill = row["id"].partition("-")[0]
        others = [text for name, text in told.items() if name.startswith(f"{mill}-") and name != row["id"]]
        said = reader.read(row["input"], [told[row["id"]], *others])
        assert said.shape == (4, 2)
        right.append(said[0])
        wrong += list(said[1:])
    for column in range(2):
        least = sorted(one[column] for one in right)[len(right) // 10]
        assert fmean(one[column] < least for one in wrong) > 0.9
    assert reader.read("Anything?", []).shape == (0, 2)
    assert reader.read("", ["", "x" * 5000]).shape == (2, 2)


def test_it_quotes_the_sentence_with_the_words_it_points_at(reader: Reader, mills: Path, embedder: Embedder) -> None:
    told = {row["id"]: row["text"] for row in rows(mills / "corpus.jsonl")}
    asked = rows(mills / "test.jsonl")
    noise = "Nobody works there on Sundays. " * 4
    pointed = []
    for row in asked:
        passage = Passage(row["id"], "A mill", f"{noise}{told[row['id']]} {'It is ' + 'very ' * 50}old.")
        found = quote(row["input"], passage, embedder, reader)
        assert found is not None
        assert found.answer in found.text
        pointed.append(found.text == told[row["id"]] and row["reference"] in found.answer)
    assert fmean(pointed) > 0.8
    long = Passage("long", "", " ".join(["very"] * 90) + " " + told[asked[0]["id"]])
    cut = quote(asked[0]["input"], long, embedder, reader)
    assert cut is not None
    assert cut.text.startswith("… very")
    assert cut.answer in cut.text
    assert reader.point("Anything?", "") == (0, 0)


def test_the_same_questions_teach_once(
    library: Library, mills: Path, reader: Reader, embedder: Embedder, cache: Path
) -> None:
    [kept] = (cache / "readers").iterdir()
    written = kept.stat().st_mtime_ns
    task, _ = dev_examples(mills)
    taught = groups(library, "mills", task, train_examples(mills), _quiet)
    again = teach(embedder, taught, cache, _quiet)
    assert kept.stat().st_mtime_ns == written
    passages = ["Work at Wendstead began in 1840, after a hard winter."]
    assert again.read("How old is Wendstead?", passages) == pytest.approx(
        reader.read("How old is Wendstead?", passages)
    )


def test_held_out_questions_never_teach(mills: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mills"
    folder.mkdir()
    for file in mills.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    train, dev, test = (rows(folder / f"{split}.jsonl") for split in ("train", "dev", "test"))
    write(folder / "train.jsonl", [*train, dev[0], test[0], {"id": "x", "input": "?", "reference": "!", "meta": {}}])
    assert [example.input for example in train_examples(folder)] == [row["input"] for row in train]


def test_too_few_questions_are_told(library: Library, mills: Path) -> None:
    task, _ = dev_examples(mills)
    with pytest.raises(DataError, match="Tune without `--reader`"):
        groups(library, "mills", task, train_examples(mills)[:20], _quiet)


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [spoil, Path.unlink], ids=["a byte flipped", "gone"])
def test_a_damaged_reader_is_left_out_and_told(
    harm: Callable[[Path], None],
    library: Library,
    home: Home,
    mills: Path,
    reader: Reader,
    embedder: Embedder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, examples = dev_examples(mills)
    library.tune("mills", learn(library, "mills", task, examples, reader=reader), reader)
    harm(home.root / "index/mills/reader.safetensors")
    other = Library(home, embedder, RetrievalSettings())
    found = other.look_up("mills", "What did Wendstead make?", 3)
    assert len(found.passages) == 3
    assert found.answerable is None
    assert "corpora tune" in caplog.text
    other.close()


def test_the_command_line_teaches_one_and_takes_it_away(
    mills: Path, home: Home, embedder: Embedder, cache: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_HOME", str(home.root))
    monkeypatch.setenv("HYBRID_CACHE", str(cache))
    file = home.root / "index/mills/reader.safetensors"
    run = CliRunner()
    done = run.invoke(app, ["corpora", "tune", "mills", "--task", str(mills), "--reader", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["reader"], told["rerank"]) == (True, True)
    assert file.is_file()
    done = run.invoke(app, ["corpora", "tune", "mills", "--task", str(mills), "--json"])
    assert json.loads(done.stdout)["reader"] is False
    assert not file.exists()
