"""`hybrid corpora tune --reader`: teaches a reader from a task's training questions and the passages that answer them.

A question is shown its passage beside others that the search confuses with it. Three losses are added: the passage is
the likeliest of its group; each is judged by itself, so that what is said of different questions can be compared; and
the answer's words are pointed at, where they stand in the passage, and none in the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.errors import DataError
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.tasks import Task, read_split, read_task
from hybrid.knowledge.bert import precision
from hybrid.knowledge.embed import Embedder, open_model, padded
from hybrid.knowledge.logistic import Logistic
from hybrid.knowledge.ranking import CLOSER, WEIGHT, Floats, convex
from hybrid.knowledge.reader import HEADS, NETWORK, PAIR_TOKENS, Reader, pair_tokenizer, passage_tokens, said
from hybrid.knowledge.rerank import features, told
from hybrid.knowledge.search import Library
from hybrid.lifecycle.lessons import Lesson, gold, question, tested_questions
from hybrid.rooms import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
Step = Callable[[int, int], None]

#: questions that can be learned from, at least and at most
LEAST, MOST = 50, 4000
#: passages beside the right one, from so many of the best found
OTHERS, AMONG = 3, 12
#: questions a step, and the fewest steps: few questions are seen again, no more often than this
AT_ONCE, STEPS, EPOCHS = 6, 250, 6
#: what is learned a step, by the network and by what stands on top of it
RATE, RATE_ON_TOP = 6e-5, 1e-3
WARM_UP, LAST = 0.1, 0.02
#: what the place of the answer counts beside the two other losses
POINTS = 0.5
#: questions that are put into batches of like length together
_LOT = 20 * AT_ONCE


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """A question, the passage that answers it, others that do not, and the right answers; of the first that were found,
    the `rerank.features` [m, 12] and whether each is right [m]."""

    question: str
    right: str
    others: tuple[str, ...]
    answers: tuple[str, ...]
    rows: Floats
    marks: tuple[bool, ...]


def reader_for(library: Library, name: str, folder: Path, cache: Path, progress: Progress | None) -> Reader:
    """The reader that a task's training questions teach for a corpus; those of dev and test never do.

    Raises DataError for too few questions, NotFound.
    """
    told_of = progress or (lambda _step, _done, _total: None)
    taught = groups(library, name, read_task(folder), train_examples(folder), told_of)
    return teach(library.embedder, taught, cache, told_of)


def train_examples(folder: Path) -> list[Example]:
    """A task's training questions that name their gold passages, and are neither dev nor test questions.

    Raises DataError where it has none.
    """
    task = read_task(folder)
    held_out = tested_questions(task)
    if (folder / "dev.jsonl").is_file():
        held_out |= {example.input for example in read_split(task, "dev").examples}
    return [e for e in read_split(task, "train").examples if gold(e) and e.input not in held_out]


def groups(library: Library, name: str, task: Task, examples: Sequence[Example], progress: Progress) -> list[Group]:
    """What these questions can teach: those whose passage the corpus holds. Raises DataError for too few, NotFound."""
    dice = random.Random(0)
    drawn = dice.sample(list(examples), min(MOST, len(examples)))
    found: list[Group] = []
    for done, example in enumerate(drawn, 1):
        text = question(task, example)
        candidates = library.candidates(name, text)
        hits = convex(candidates.hits, WEIGHT)
        lesson = Lesson(text, hits, candidates.rarity, gold(example), example.references)
        right = next((told(hit) for hit in hits if lesson.right(hit)), None)
        others = tuple(told(h) for h in hits[:AMONG] if not lesson.right(h) and not lesson.says(h))
        if right and len(others) >= OTHERS:
            rows = features(text, lesson.rarity, hits[:CLOSER])
            marks = tuple(lesson.right(hit) for hit in hits[:CLOSER])
            found.append(Group(text, right, others, lesson.answers, rows, marks))
        progress("questions for the reader", done, len(drawn))
    if len(found) < LEAST or not any(mark for group in found for mark in group.marks):
        raise DataError(
            f"{len(found)} training questions of {task.folder} name passages that the search of {name} finds; "
            f"a reader needs {LEAST} at least. Tune without `--reader`."
        )
    return found


def teach(embedder: Embedder, taught: Sequence[Group], cache: Path, progress: Progress) -> Reader:
    """The reader that these groups teach, from `cache` where the same ones taught one before. Takes minutes."""
    from safetensors.torch import load_file, save

    file = cache / "readers" / f"{_key(embedder, taught)}.safetensors"
    if not file.is_file():
        tensors = _Lesson(embedder).teach(taught, lambda *at: progress("teaching the reader", *at))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save(tensors))
    first = Logistic.fit(np.concatenate([g.rows for g in taught]), [mark for g in taught for mark in g.marks])
    assert first is not None  # noqa: S101  `groups` found right ones and others
    return Reader(embedder, load_file(file), first)


def _key(embedder: Embedder, taught: Sequence[Group]) -> str:
    how = [embedder.digest, PAIR_TOKENS, OTHERS, AT_ONCE, STEPS, EPOCHS, RATE, RATE_ON_TOP, WARM_UP, LAST, POINTS]
    told_of = [[g.question, g.right, g.others, g.answers] for g in taught]
    return hashlib.sha256(json.dumps([how, told_of]).encode()).hexdigest()[:32]


class _Lesson:
    """The network that learns, from the embedder on."""

    def __init__(self, embedder: Embedder) -> None:
        import torch

        model = open_model(embedder.path)
        self._network: Any = model[0].auto_model
        self._pad = model.tokenizer.pad_token_id or 0
        self._tokenizer = pair_tokenizer(model.tokenizer.backend_tokenizer.to_str())
        width = int(self._network.config.hidden_size)
        drawn = torch.Generator().manual_seed(0)
        shapes: Mapping[str, tuple[int, ...]] = dict(zip(HEADS, ((width,), (), (2, width), (2,)), strict=True))
        self._heads = {
            name: (torch.randn(shape, generator=drawn) * 0.02 * (".weight" in name)).requires_grad_()
            for name, shape in shapes.items()
        }

    def teach(self, taught: Sequence[Group], step: Step) -> dict[str, Tensor]:
        """The tensors of the reader; the same groups give the same ones on the same machine."""
        import torch

        # the network stays in eval mode: with dropout attention has no fused kernel, and a step took twice as long
        # the words keep their places: what was taught of few of them would tear them from the rest
        words = getattr(self._network, "embeddings", None) or self._network.get_input_embeddings()
        words.requires_grad_(requires_grad=False)
        layers = [(name, p) for name, p in self._network.named_parameters() if p.requires_grad]
        batches = list(self._batches(taught))
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in layers], "lr": RATE},
                {"params": list(self._heads.values()), "lr": RATE_ON_TOP},
            ],
            weight_decay=0.01,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, len(batches)))
        every = [p for group in optimizer.param_groups for p in group["params"]]
        for done, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            self._loss(batch).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(every, 1.0)
            optimizer.step()
            schedule.step()
            step(done, len(batches))
        kept = {f"{NETWORK}{name}": p.detach().bfloat16() for name, p in layers if not name.startswith("pooler.")}
        return {**kept, **{name: p.detach() for name, p in self._heads.items()}}

    def _batches(self, taught: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups in an order of their own each time; a batch has passages of like length, so that little is padded."""
        dice = random.Random(0)
        for _ in range(max(1, min(EPOCHS, math.ceil(STEPS * AT_ONCE / len(taught))))):
            order = dice.sample(list(taught), len(taught))
            lots = [sorted(order[at : at + _LOT], key=lambda g: len(g.right)) for at in range(0, len(order), _LOT)]
            batches = [lot[at : at + AT_ONCE] for lot in lots for at in range(0, len(lot), AT_ONCE)]
            for batch in dice.sample(batches, len(batches)):
                yield [replace(g, others=tuple(dice.sample(g.others, OTHERS))) for g in batch]

    def _loss(self, batch: Sequence[Group]) -> Tensor:
        import torch
        from torch.nn import functional

        pairs = [(g.question, passage) for g in batch for passage in (g.right, *g.others)]
        encodings = self._tokenizer.encode_batch(pairs)
        ids, mask = padded([e.ids for e in encodings], self._pad, PAIR_TOKENS)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision() is torch.bfloat16):
            hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        answers, begins, ends = said(hidden.float(), mask, self._heads)
        right = torch.tensor([float(n % (1 + OTHERS) == 0) for n in range(len(pairs))])
        places = torch.tensor(
            [
                _answer(encoding, pair[1], batch[n // (1 + OTHERS)].answers) if right[n] else (0, 0)
                for n, (encoding, pair) in enumerate(zip(encodings, pairs, strict=True))
            ]
        )
        alone = functional.binary_cross_entropy_with_logits(answers, right)
        first = torch.zeros(len(batch), dtype=torch.long)
        among = functional.cross_entropy(answers.view(len(batch), 1 + OTHERS), first)
        points = [
            functional.cross_entropy(of, at, ignore_index=-1) for of, at in zip((begins, ends), places.T, strict=True)
        ]
        return alone + among / 2 + POINTS * torch.stack(points).sum()


def _answer(encoding: Any, passage: str, answers: Sequence[str]) -> tuple[int, int]:
    """The first and the last token of the first answer that stands in the passage; (-1, -1), which teaches nothing,
    where none does."""
    held = passage.casefold()
    for answer in answers:
        at = held.find(answer.strip().casefold()) if answer.strip() else -1
        if at < 0 or len(held) != len(passage):
            continue
        end = at + len(answer.strip())
        of = [n for n in passage_tokens(encoding) if encoding.offsets[n][1] > at and encoding.offsets[n][0] < end]
        if of and encoding.offsets[of[-1]][1] >= end:
            return of[0], of[-1]
    return -1, -1


def _rate(done: int, steps: int) -> float:
    """The share of the full rate: up for a tenth of the steps, then down in a straight line."""
    return min(1.0, (done + 1) / (WARM_UP * steps)) * max(LAST, 1 - done / steps)
