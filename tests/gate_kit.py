"""A small home for gate tests: two adapters and a corpus, every line of which is written here."""

from __future__ import annotations

from pathlib import Path

from hybrid.gate.general import general_lines, general_vectors, outside_lines, outside_vectors
from hybrid.gate.model import Gate, Scores
from hybrid.gate.policy import Policy
from hybrid.gate.train import train_gate
from hybrid.knowledge.embed import Embedder
from hybrid.settings import GateSettings
from hybrid.types.arm import Arm
from hybrid.types.passage import Passage
from hybrid.types.request import Knobs

GARDEN, LIBRARY = Arm("adapter", ("garden",)), Arm("adapter", ("library",))
ISLAND = Arm("rag", ("island",))
GARDEN_TASK = "Name the garden job. Reply with one label."
LIBRARY_TASK = 'Return one JSON object {"title": ..., "action": ...}.'
PLANTS = ["roses", "tulips", "beans", "the apple tree", "lavender", "potatoes", "the hedge", "mint", "peonies", "leeks"]
TROUBLES = [
    "When should I prune {}?",
    "{} have yellow leaves and drop them",
    "How much water do {} need in July?",
    "Snails are eating {}, what helps?",
    "Is it too late to plant {} now?",
]
BOOKS = ["The Silent Harbour", "A Winter in Minsk", "Ten Small Rivers", "The Glass Orchard", "Letters to Ada"]
BOOKS += ["The Last Lamplighter", "Salt and Thunder", "A Field Guide to Fog", "Nine Doors", "The Clockmaker's Son"]
ORDERS = ["renew {} until next week", "put {} on hold for me", "I return {} today", "extend the loan of {}",
          "cancel my reservation of {}"]  # fmt: skip
PASSAGES = [
    ("Harbour", "The harbour of Vell was dug in 1788 by convicts and holds forty fishing boats."),
    ("Lighthouse", "The lighthouse on Cape Orrin is 31 metres high and was automated in 1984."),
    ("Kelp", "Kelp is gathered on the northern beaches in spring and burnt for its ash, which once made glass."),
    ("Language", "The islanders speak Vellish, a language with eleven cases and no word for yes."),
    ("Ferry", "The ferry to the mainland sails twice a day and takes three hours; it does not sail in storms."),
    ("Governor", "The first governor, Ada Holm, abolished the salt tax and founded the school in Lower Vell."),
    ("Puffins", "About nine thousand puffins nest on the western cliffs between April and August."),
    ("Bread", "Islanders bake a dark bread of barley and dried apples called brunn for the midwinter feast."),
]


GARDEN_ASKED = [t.format(p) for t in TROUBLES for p in PLANTS[8:]]
LIBRARY_ASKED = [t.format(b) for t in ORDERS for b in BOOKS[8:]]
ISLAND_ASKED = [
    "How high is the lighthouse on Cape Orrin?",
    "When was the harbour of Vell dug?",
    "What language do the islanders speak?",
    "How long does the ferry to the mainland take?",
    "Who founded the school in Lower Vell?",
    "How many puffins nest on the western cliffs?",
]
STRANGERS = [
    "hello, how are you?",
    "Schreibe mir ein Gedicht über Züge",
    "Write a Python function that counts vowels",
    "A box holds 12 pens. How many pens are in 7 boxes?",
    "Translate to Spanish: the door is open",
    "Which is a metal?\nA. oak\nB. iron\nC. wool",
]


class GateHome:
    """Enrols the arms of these tests, each line of which is written here."""

    def __init__(self, embedder: Embedder, cache: Path) -> None:
        self.embedder = embedder
        self.gate = Gate(pieces=embedder.count_tokens)
        self.gate.enrol_general(general_lines(), general_vectors(embedder.embed_queries, "test", cache))
        self.gate.enrol_outside(outside_lines(), outside_vectors(embedder.embed_queries, "test", cache))

    def adapter(self, name: str, task: str, inputs: list[str]) -> None:
        full = [f"{task}\n\n{text}" for text in inputs]
        self.gate.enrol_adapter(name, full, self.embedder.embed_queries(full), self.embedder.embed_queries(inputs))

    def garden(self) -> None:
        self.adapter("garden", GARDEN_TASK, [t.format(p) for t in TROUBLES for p in PLANTS[:8]])

    def library(self) -> None:
        self.adapter("library", LIBRARY_TASK, [t.format(b) for t in ORDERS for b in BOOKS[:8]])

    def island(self) -> None:
        passages = [Passage(f"p{i}", title, text, corpus="island") for i, (title, text) in enumerate(PASSAGES)]
        self.gate.enrol_corpus("island", passages, self.embedder.embed([f"{p.title}\n{p.text}" for p in passages]))

    def train(self) -> None:
        self.gate.weights = train_gate(self.gate.bank, self.embedder.embed_queries)

    def best(self, query: str) -> Arm:
        scores = self.scores(query)
        return Policy(GateSettings()).choose(scores, allowed=lambda _: True, knobs=Knobs()).arm

    def scores(self, query: str) -> Scores:
        return self.gate.score(query, self.embedder.embed_query(query))
