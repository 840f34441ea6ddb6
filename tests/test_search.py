"""Searching by words and by meaning: each finds what the other misses, what is hidden takes no part, every stage can
be switched off."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from library_kit import FACTS, Open, coded, write
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from hybrid import catalog
from hybrid.cli import app
from hybrid.errors import DataError, Refused, SetupError
from hybrid.evaluation.asking import Offer, shown_settings
from hybrid.evaluation.tasks import Task
from hybrid.knowledge.rerank import COLUMNS, Reranker
from hybrid.knowledge.search import Library
from hybrid.knowledge.store import About
from hybrid.knowledge.tuned import Tuned
from hybrid.lifecycle.tune_search import dev_examples, learn
from hybrid.settings import Settings
from hybrid.strategies.followup import search_query
from hybrid.types.request import Message
from hybrid.types.rights import Rights

CODES = coded(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One row a text."""
    return write(tmp_path / "documents", CODES | FACTS)


def ids(library: Library, query: str, k: int = 3, **more: object) -> list[str]:
    return [p.id for p in library.search("town", query, k, **more)]


def test_words_find_codes_meaning_finds_paraphrases_and_both_find_both(open_library: Open, folder: Path) -> None:
    both = open_library()
    both.ingest("town", folder)
    paraphrase = "when does the boat leave in the morning?"
    codes = [f"what does ZX-{n}Q cost?" for n in range(4100, 4160)]
    assert [ids(both, code, 1) for code in codes] == [[name] for name in CODES]
    assert ids(both, paraphrase, 1) == ["ferry"]
    assert ids(open_library(search="lexical"), "kittens sleeping", 3) == []
    assert ids(open_library(search="dense"), "kittens sleeping", 1) == ids(both, "kittens sleeping", 1) == ["cat"]
    dense = open_library(search="dense")
    assert [ids(dense, code, 1) for code in codes] != [[name] for name in CODES]


def test_every_stage_shows_its_score_and_the_score_is_the_cosine(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    query = "what does ZX-4117Q cost?"
    vector = library.embedder.embed_query(query)
    found = library.search("town", query, 5)
    kept, vectors = library.sample("town", 100, 0)
    cosine = {p.id: float(own @ vector) for p, own in zip(kept, vectors, strict=True)}
    for passage in found:
        assert passage.scores is not None
        assert passage.score == passage.scores.dense == pytest.approx(cosine[passage.id], abs=1e-4)
        assert passage.scores.rerank is None
    fused = [p.scores.fused for p in found if p.scores]
    assert fused == sorted(fused, reverse=True)
    by_vector = library.search("town", vector, 5)
    assert [p.id for p in by_vector] == sorted(cosine, key=lambda name: -cosine[name])[:5]


def test_what_a_caller_may_not_read_is_not_found_by_its_words_and_takes_no_place(open_library: Open) -> None:
    library = open_library(search="lexical")
    for n in range(60):
        library.add_document("town", f"hidden{n}", text=f"zebra zebra zebra {n}", about=About({}, "ann", ()))
    library.add_document("town", "open", text="The zebra is mentioned here once, among many other words.")
    guest = Rights(caller="bob", admin=False)
    assert ids(library, "zebra", 3, rights=guest) == ["open"]
    assert ids(library, "zebra", 3, matches=lambda about: about.get("kind") == "none") == []
    assert len(ids(library, "zebra", 3)) == 3


def test_new_passages_are_found_by_their_words_at_once_as_after_a_rebuild(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    library.add_document("town", "ZX-9000Q", text="Part ZX-9000Q of the valve costs 3 coins and is made of tin.")
    library.delete_document("town", "ZX-4100Q")
    asked = ["ZX-9000Q", "ZX-4100Q", "ZX-4101Q", "tin", "the stork and the clock", "part of the pump"]
    before = [ids(library, query, 3) for query in asked]
    assert before[0][0] == "ZX-9000Q"
    assert "ZX-4100Q" not in before[1]
    library._corpus("town").publish()
    assert [ids(open_library(), query, 3) for query in asked] == before


def test_a_damaged_index_of_words_is_noticed_and_built_again(open_library: Open, home: Path, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    before = [ids(library, query) for query in ("ZX-4117Q", "a boat")]
    for damaged in ("words/0/data.csc.index.npy", "words/0/vocab.index.json", "words/0/words.rows.npy"):
        newest = max((home / "index/town/generations").glob("[0-9]*"), key=lambda p: int(p.name))
        content = bytearray((newest / damaged).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / damaged).write_bytes(content)
        other = open_library()
        assert [ids(other, query) for query in ("ZX-4117Q", "a boat")] == before
        assert other.corpus("town").generation == int(newest.name) + 1


def task(folder: Path, questions: int) -> Path:
    """A task whose questions name a code; only its own passage answers."""
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"name": "parts", "metric": "token_f1", "license": "CC0-1.0"}))
    rows = [
        {"id": name, "input": f"what does {name} cost?", "reference": "coins", "meta": {"gold_passages": [name]}}
        for name in list(CODES)[:questions]
    ]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_tune_learns_from_dev_questions_and_every_process_searches_by_it(
    open_library: Open, folder: Path, tmp_path: Path
) -> None:
    library = open_library(weight=None)
    library.ingest("town", folder)
    read, examples = dev_examples(task(tmp_path / "parts", 30))
    learned = learn(library, "town", read, examples)
    assert learned.weight < 1, "words alone tell the codes apart"
    assert learned.facts["questions"] == 30
    assert learned.facts["fused"] >= learned.facts["ndcg@10"]
    library.tune("town", learned)
    assert open_library().tuned("town") == learned


def test_a_closer_look_orders_the_best_and_can_be_switched_off(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    query = "what does ZX-4117Q cost?"
    plain = ids(library, query, 20)
    farthest_first = tuple(-1.0 if name == "dense" else 0.0 for name in COLUMNS)
    library.tune("town", Tuned(0.6, Reranker((0.0,) * 12, (1.0,) * 12, farthest_first, 0.0)))
    found = library.search("town", query, 20)
    assert all(p.scores and p.scores.rerank is not None for p in found)
    assert [p.score for p in found] == sorted(p.score for p in found)
    assert "ZX-4117Q" not in [p.id for p in found]
    assert ids(open_library(rerank=False), query, 20) == plain


def test_a_cross_encoder_takes_the_closer_look(open_library: Open, folder: Path, tmp_path: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    model = tmp_path / "cross"
    tokenizer = AutoTokenizer.from_pretrained(library.embedder.path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    query = "what does ZX-4117Q cost?"
    found = open_library(cross_encoder=str(model)).search("town", query, 5)
    told = CrossEncoder(str(model), device="cpu").predict([(query, p.text) for p in found])
    assert [p.scores.rerank for p in found if p.scores] == pytest.approx(told.tolist(), abs=1e-5)
    assert told.tolist() == sorted(told.tolist(), reverse=True)
    with pytest.raises(SetupError, match="cross_encoder"):
        open_library(cross_encoder=str(tmp_path / "nowhere")).search("town", query, 5)


def test_the_command_line_tunes_searches_and_measures(home: Path, folder: Path, tmp_path: Path) -> None:
    parts = task(tmp_path / "parts", 24)
    (parts / "corpus.jsonl").write_text((folder / "corpus.jsonl").read_text())
    run = partial(CliRunner().invoke, app, env={"HYBRID_HOME": str(home)}, catch_exceptions=False)
    assert run(["index", str(parts), "--name", "town"]).exit_code == 0
    tuned = json.loads(run(["corpora", "tune", "town", "--task", str(parts), "--json"]).stdout)
    assert tuned["questions"] == 24
    (hit,) = json.loads(run(["search", "town", "ZX-4117Q", "--k", "1", "--json"]).stdout)["hits"]
    assert hit["id"] == "ZX-4117Q"
    assert hit["scores"]["lexical"] > 0
    for more in ([], ["--corpus", "town", "--limit", "6"]):
        told = json.loads(run(["bench", "retrieval", "--task", str(parts), "--json", *more]).stdout)
        assert told["summary"]["passages"] == len(CODES | FACTS)
        assert told["summary"]["questions"] == (6 if more else 12)
        by_words = next(row for row in told["rows"] if row["stages"] == "words")
        assert by_words["recall@1"].startswith("1.0000")


def test_tune_refuses_a_test_split_and_questions_that_stand_in_it(tmp_path: Path) -> None:
    folder = task(tmp_path / "parts", 12)
    (folder / "test.jsonl").write_text((folder / "dev.jsonl").read_text())
    with pytest.raises(Refused, match="test split never"):
        dev_examples(folder / "test.jsonl")
    with pytest.raises(DataError, match="not in the test split"):
        dev_examples(folder)


def test_outcomes_of_a_corpus_that_was_tuned_anew_are_asked_again(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    task = Task("town", "token_f1")

    def digest() -> str:
        status = {"adapters": [], "corpora": catalog.corpora(library), "gate": {}, "engine": {}}
        return Offer(("rag:town",), status, shown_settings(Settings.load()), "base").digest("rag:town", task)

    found = [digest(), digest()]
    for weight in (0.1, 0.2):
        library.tune("town", Tuned(weight=weight))
        found.append(digest())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_damaged_tuned_file_counts_as_none(open_library: Open, home: Path, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    library.tune("town", Tuned(weight=0.1))
    assert library.tuned("town").weight == 0.1
    path = home / "index/town/tuned.json"
    path.write_text(path.read_text().replace("0.1", "0.9"))
    assert open_library().tuned("town") == Tuned()


def test_spreading_brings_another_text_forward(open_library: Open) -> None:
    plain, spread = open_library(search="dense"), open_library(search="dense", mmr=0.6)
    for n in range(4):
        plain.add_document("town", f"copy{n}", text=f"The ferry leaves for Osterholm at seven in the morning, {n}.")
    plain.add_document("town", "other", text="Tickets to Osterholm cost four coins.")
    query = "the ferry for Osterholm in the morning"
    assert "other" not in ids(plain, query, 2)
    assert "other" in ids(spread, query, 2)


def test_neighbours_are_the_pieces_beside_those_found(open_library: Open) -> None:
    library = open_library(chunk_tokens=16, neighbours=1)
    text = "\n\n".join(f"Chapter {n} is about the {w} and nothing else at all, says its author." for n, w in
                       enumerate(["fox", "owl", "bee", "yak", "eel"]))  # fmt: skip
    library.add_document("town", "book", text=text)
    (found,) = library.search("town", "yak", 1)
    place = int(found.id.rpartition("#")[2])
    assert {p.id for p in library.around([found])} == {f"book#{place + d}" for d in (-1, 0, 1)}
    assert open_library().around([found]) == (found,)


@pytest.mark.parametrize(
    ("turns", "query"),
    [
        (["Who built the lighthouse?"], "Who built the lighthouse?"),
        (["Who built the lighthouse?", "And when?"], "Who built the lighthouse?\nAnd when?"),
        (["Who built the lighthouse?", "when was it lit?"], "Who built the lighthouse?\nwhen was it lit?"),
        (["Who built it in Osterholm harbour?", "why?", "more"], "Who built it in Osterholm harbour?\nwhy?\nmore"),
        (["Who built the lighthouse?", "Which bread does the bakery sell?"], "Which bread does the bakery sell?"),
        (["Answer shortly.\n\nWho built the lighthouse?"], "Who built the lighthouse?"),
    ],
)
def test_a_follow_up_takes_the_message_it_leans_on_with_it(turns: list[str], query: str) -> None:
    messages = [m for turn in turns for m in (Message("user", turn), Message("assistant", "An answer."))][:-1]
    assert search_query(messages) == query


def test_an_empty_corpus_and_a_question_without_words_find_nothing_by_words(open_library: Open) -> None:
    library = open_library(search="lexical")
    library.add_document("town", "marks", text="!!! ???")
    assert ids(library, "zebra") == []
    assert ids(open_library(), "…") == ["marks"]
    assert np.isfinite([p.scores.fused for p in open_library().search("town", "zebra", 1) if p.scores]).all()
