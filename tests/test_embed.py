"""The embedder says what sentence-transformers says, however it computes, in whatever company a text comes."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import SetupError
from hybrid.knowledge.embed import QUERY_TOKENS, Embedder

TEXTS = [
    "Who lit the lighthouse on Gull Rock?",
    "a",
    "",
    "   \n\t ",
    "word " * 1000,
    "The ferry to Osterholm leaves at seven in the morning and carries no bicycles. " * 6,
    "Zażółć gęślą jaźń; ¿dónde está la estación? Где находится вокзал? 駅はどこですか。",
    "e\u0301 \u200bzero\u200dwidth\ufeff \u202eright to left\u202c אבג \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x00\x07control\x1b[31m",
    "{" * 300,
    "supercalifragilistic" * 40,
]


@pytest.fixture(scope="module")
def expected(embedder: Embedder) -> np.ndarray:
    """The reference implementation's vectors, in float32."""
    return reference(embedder.path, TEXTS)


def reference(path: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu").encode(texts, normalize_embeddings=True)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (np.asarray(left, np.float64) * right).sum(axis=1)


def test_every_text_gets_the_reference_vector(embedder: Embedder, expected: np.ndarray) -> None:
    assert cosines(embedder.embed(TEXTS), expected).min() > 0.9999


def test_a_text_has_one_vector_whatever_stands_beside_it(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    assert cosines(np.stack([embedder.embed([text])[0] for text in TEXTS]), together).min() > 0.9999
    assert cosines(embedder.embed(TEXTS[::-1])[::-1], together).min() > 0.9999
    asked = embedder.embed_queries(TEXTS)
    assert cosines(np.stack([embedder.embed_query(text) for text in TEXTS]), asked).min() > 0.9999
    short = [n for n, count in enumerate(embedder.count_tokens(TEXTS)) if count <= QUERY_TOKENS - 2]
    assert len(short) > 5
    assert cosines(asked[short], together[short]).min() > 0.9999


def test_of_a_long_query_its_beginning_and_its_end_are_read(embedder: Embedder) -> None:
    begins, ends = "Translate this into Dutch.", "Who lit the lighthouse on Gull Rock?"
    filler = ["The ferry carries no bicycles. ", "A tariff is a tax on imports. "]
    for times in (12, 4000):
        first, second = (f"{begins} {text * times}{ends}" for text in filler)
        # what stands in the middle changes nothing once both ends are longer than what is read
        inner = [f"{begins} {filler[0] * 8}{text * times}{filler[0] * 8}{ends}" for text in filler]
        assert float(embedder.embed_query(inner[0]) @ embedder.embed_query(inner[1])) > 0.9999
        assert float(embedder.embed_query(first) @ embedder.embed_query(second)) < 0.99
        for changed in (first.replace(begins, "Write a poem."), first.replace(ends, "What is a tariff?")):
            assert float(embedder.embed_query(first) @ embedder.embed_query(changed)) < 0.98


def test_vectors_of_queries_have_a_digest_of_their_own(embedder: Embedder) -> None:
    assert embedder.query_digest.startswith(embedder.digest)
    assert embedder.query_digest != embedder.digest


def test_the_same_call_gives_the_same_bits(embedder: Embedder) -> None:
    again = Embedder(embedder.path, embedder.name)
    assert np.array_equal(embedder.embed(TEXTS), again.embed(TEXTS))
    assert np.array_equal(embedder.embed_query(TEXTS[0]), again.embed_query(TEXTS[0]))


def test_a_query_does_not_wait_for_a_bulk(embedder: Embedder) -> None:
    begun, answered = threading.Event(), threading.Event()

    def held(_done: int, _total: int) -> None:
        begun.set()
        assert answered.wait(60)

    with ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(embedder.embed, [f"{TEXTS[5]} {i}" for i in range(40)], held)
        assert begun.wait(60)
        embedder.embed_query("asked while another thread is in the middle of its batches")
        assert not bulk.done()
        answered.set()
        assert bulk.result().shape == (40, embedder.dim)


ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np
from hybrid.knowledge.embed import QUERY_TOKENS, Embedder
embedder = Embedder(Path(sys.argv[1]), "elsewhere")
np.save(sys.argv[2], embedder.embed(np.load(sys.argv[3]).tolist()))
sys.stdout.write(embedder.digest)
"""


def test_an_older_processor_makes_comparable_vectors_under_the_same_digest(
    embedder: Embedder, expected: np.ndarray, tmp_path: Path
) -> None:
    """oneDNN is told to know nothing after AVX2, so there is no bfloat16; what was stored elsewhere can be searched."""
    np.save(tmp_path / "texts.npy", np.array([text.replace("\x00", " ") for text in TEXTS]))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, embedder.path, tmp_path / "vectors.npy", tmp_path / "texts.npy"],
        env={"PATH": "", "HOME": str(tmp_path), "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == embedder.digest
    vectors = np.load(tmp_path / "vectors.npy")
    assert cosines(vectors, expected).min() > 0.99999
    assert cosines(vectors, embedder.embed(TEXTS)).min() > 0.9999


def test_a_torch_without_onednn_computes_the_same(embedder: Embedder, expected: np.ndarray) -> None:
    import torch

    with torch.backends.mkldnn.flags(enabled=False):
        vectors = Embedder(embedder.path, embedder.name).embed(TEXTS)
    assert cosines(vectors, expected).min() > 0.99999


@pytest.mark.parametrize(
    ("kind", "changes", "pooling"),
    [
        ("Bert", {}, "mean"),
        ("Bert", {"num_attention_heads": 2, "intermediate_size": 48}, "cls"),
        ("Bert", {"hidden_act": "relu"}, "mean"),
        ("Roberta", {"pad_token_id": 0}, "mean"),
        ("Electra", {"embedding_size": 16}, "max"),
    ],
)
def test_other_models_are_computed_too(
    embedder: Embedder, tmp_path: Path, kind: str, changes: dict[str, object], pooling: str
) -> None:
    """Random models whose limit is no multiple of anything: ours where it can, the library's code elsewhere."""
    path = make_embedder(tmp_path / "model", embedder.path, kind, changes, pooling)
    other = Embedder(path, "other")
    assert other.embed(TEXTS).shape == (len(TEXTS), other.dim) == (len(TEXTS), 64)
    assert cosines(other.embed(TEXTS), reference(path, TEXTS)).min() > 0.999
    assert other.digest != embedder.digest


def test_attention_beyond_what_a_power_may_be_stays_near_the_reference(embedder: Embedder, tmp_path: Path) -> None:
    path = make_embedder(tmp_path / "model", embedder.path, "Bert", {"initializer_range": 0.5}, "mean")
    assert cosines(Embedder(path, "loud").embed(TEXTS), reference(path, TEXTS)).min() > 0.998


def make_embedder(folder: Path, tokenizer: Path, kind: str, changes: dict[str, object], pooling: str) -> Path:
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    known = transformers.AutoTokenizer.from_pretrained(tokenizer)
    sizes = {
        "vocab_size": len(known), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 61, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**sizes, **changes}))
    model.save_pretrained(folder / "bare")
    known.save_pretrained(folder / "bare")
    parts = [Transformer(str(folder / "bare"), max_seq_length=59), Pooling(64, pooling)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "whole"))
    return folder / "whole"


def test_other_weights_have_another_digest(embedder: Embedder, tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [{}, {"num_hidden_layers": 1}]
    made = [make_embedder(tmp_path / str(i), embedder.path, "Bert", c, "mean") for i, c in enumerate(changes)]
    assert len({embedder.digest, *(Embedder(path, "made").digest for path in made)}) == 3


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="safetensors"):
        Embedder(tmp_path, "nothing").embed(["a"])
