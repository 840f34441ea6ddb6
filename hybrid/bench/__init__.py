"""Benchmarks a user can run: what this machine and this home do, beside what they should.

Each is an async function that returns a `Result` and writes nothing else. `routing` and `hotload` talk HTTP to the
server of this home, as a client does.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.bench import (
    answerable,
    embed,
    gate,
    gateway,
    hotload,
    ingest,
    lora,
    memory,
    overload,
    retrieval,
    routing,
    search,
    startup,
    survive,
    train,
    vectors,
)
from hybrid.bench import eval as evaluator
from hybrid.bench.result import Result


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What it measures, in words, and the function that does."""

    description: str
    measure: Callable[..., Coroutine[Any, Any, Result]]


BENCHMARKS: Mapping[str, Benchmark] = {
    "routing": Benchmark("How often the gate finds a task's own arm, and what a decision costs.", routing.measure),
    "gate": Benchmark("What the gate's decisions are worth on a measured report, and among strangers.", gate.measure),
    "hotload": Benchmark("How soon a new adapter answers while streams run, and whether one breaks.", hotload.measure),
    "embed": Benchmark("How fast passages and questions become vectors, and how exact these are.", embed.measure),
    "ingest": Benchmark("Whether an ingest that is killed loses or invents a document.", ingest.measure),
    "eval": Benchmark("How much of the engine's own speed the evaluator uses, on the same prompts.", evaluator.measure),
    "gateway": Benchmark(
        "What the way through the gateway costs, beside the engine itself and LiteLLM.", gateway.measure
    ),
    "lora": Benchmark(
        "What adapters cost on this machine, with our plugin and with vLLM's own products.", lora.measure
    ),
    "memory": Benchmark(
        "What gateway and engine hold with few and many adapters, and whether it grows.", memory.measure
    ),
    "overload": Benchmark("What becomes of a flood from one key, and of another key beside it.", overload.measure),
    "startup": Benchmark("How long a start takes, from the command to the first token.", startup.measure),
    "retrieval": Benchmark("How well each stage of a search finds what answers, and how fast.", retrieval.measure),
    "search": Benchmark("How long each stage of a search takes in a large corpus, and a change.", search.measure),
    "vectors": Benchmark("What each kind of FAISS index costs and finds, by how much it holds.", vectors.measure),
    "answerable": Benchmark("How often `rag` says that an answer is missing, rightly and wrongly.", answerable.measure),
    "survive": Benchmark("Whether a training that is killed ends where one left alone ends.", survive.measure),
    "train": Benchmark("How fast our trainer learns beside TRL's and a plain loop, and how well.", train.measure),
}
