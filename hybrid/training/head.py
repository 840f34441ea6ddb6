"""A linear head on frozen features: the feature-based way to adapt a model, in seconds and without a gradient in it.

Standardised features, multinomial logistic regression, its penalty chosen on dev, its probabilities calibrated by a
temperature on dev (Guo et al. 2017, arXiv 1706.04599). The features are the embedder's vectors, which is what
`head:NAME` serves, or the base model's own hidden states (BERT's section 5.3, arXiv 1810.04805; averaged over the
prompt), which the engine does not give out: those measure what the base knows of the task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.adapters.heads import HEAD_WEIGHTS, Head, Vectors, bare
from hybrid.errors import BadRequest
from hybrid.training.base import load_base
from hybrid.training.batches import render
from hybrid.training.control import Stopped
from hybrid.training.data import DEV_LIMIT
from hybrid.training.formats import Example
from hybrid.training.job import Fitted, Job

Labels = npt.NDArray[np.int64]

MAX_ANSWERS = 500
#: inverse strengths of the penalty on standardised features, strongest first: each starts where the last one ended
PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TEMPERATURES = np.geomspace(0.1, 10.0, 120)
MAX_ITERATIONS = 300
#: padded tokens in one forward of the base model
BATCH_TOKENS = 4096
#: the least probability that counts in a loss: an answer that training never saw has none
FLOOR = 1e-6
MEASURED = "It reads the base model's hidden states, which the engine does not give out: its card says how good it is."


def fit(job: Job) -> Fitted:
    """Fits a head. Raises BadRequest for data whose answers are no closed set, Stopped when told to."""
    began = time.monotonic()
    train, dev = job.data.train, job.data.dev[:DEV_LIMIT]
    classes = _classes(job)
    rows = _features(job, (*train, *dev))
    known, held = rows[: len(train)], rows[len(train) :]
    place = {name: n for n, name in enumerate(classes)}
    truth, wanted = (np.array([place.get(e.answer, -1) for e in part], np.int64) for part in (train, dev))
    head, loss, penalty = _best(job, classes, (known, truth), (held, wanted), began)
    right = int((head.probabilities(held).argmax(axis=1) == wanted).sum())
    metrics = {
        "dev_accuracy": round(right / len(dev), 4),
        "dev_right": right,
        "dev_rows": len(dev),
        "dev_loss": round(loss, 5),
        "train_loss": round(_loss(head.probabilities(known), truth), 5),
        "train_rows": len(train),
        "classes": len(classes),
        "penalty": penalty,
        "temperature": round(head.temperature, 4),
        "steps": len(PENALTIES),
        "tokens": sum(job.embedder.count_tokens([e.bare for e in train])),
        "seconds": round(time.monotonic() - began, 1),
    }
    served = job.recipe.features == "embedder"

    def save(folder: Any) -> dict[str, Any]:
        head.save(folder)
        card = {"weights": HEAD_WEIGHTS, "features": job.recipe.features, "embedder": job.embedder.digest}
        return {**card, "base_sha256": ""} if served else card

    return Fitted(metrics, (), save, kind="head", serve_with="" if served else MEASURED)


def _classes(job: Job) -> tuple[str, ...]:
    """The answers that training shows, when they are a closed set."""
    answers = [example.answer for example in job.data.train]
    classes = tuple(sorted(set(answers)))
    closed = bool(job.data.labels) or (len(classes) <= MAX_ANSWERS and 2 * len(classes) <= len(answers))
    if not closed:
        raise BadRequest(
            f"A head chooses among answers it has seen, and this task is open-ended: {len(classes)} different answers "
            f"in {len(answers)} rows. Use method=lora, or name the `labels` in task.json.",
            param="method",
        )
    if len(classes) < 2:
        raise BadRequest("Every row has the same answer; a head needs rows of two labels at least.", param="method")
    return classes


# --- features --------------------------------------------------------------------------------------------------------


def _features(job: Job, examples: Sequence[Example]) -> Vectors:
    """What the head reads of each example, float32 [n, d]: of the input alone, as it is read when it serves."""
    parts: list[Vectors] = []
    if job.recipe.features in ("embedder", "both"):
        parts.append(job.embedder.embed([bare(example.bare, job.data.instruction) for example in examples]))
    if job.recipe.features in ("base", "both"):
        parts.append(_hidden(job, examples))
    return np.concatenate(parts, axis=1)


def _hidden(job: Job, examples: Sequence[Example]) -> Vectors:
    """The last layer's hidden states, averaged over the prompt that the model itself would be given."""
    import torch

    model, tokenizer = load_base(job.model, job.recipe.precision)
    model.set_attn_implementation("sdpa")
    prompts = [render(tokenizer, example.messages) for example in examples]
    ids = [row[-job.recipe.max_length :] for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for batch in _batches([len(row) for row in ids]):
            _heed(job)
            longest = max(len(ids[n]) for n in batch)
            padded = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, n in enumerate(batch):
                padded[row, : len(ids[n])] = torch.tensor(ids[n])
                mask[row, : len(ids[n])] = 1
            there = {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}
            states = model.base_model(**there, use_cache=False).last_hidden_state.float()
            weights = there["attention_mask"][..., None].float()
            out[batch] = ((states * weights).sum(1) / weights.sum(1)).cpu().numpy()
    return out


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions by falling length, cut so that a padded batch holds BATCH_TOKENS at most."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    start = 0
    while start < len(order):
        size = max(1, BATCH_TOKENS // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


# --- the fit ---------------------------------------------------------------------------------------------------------


def _best(
    job: Job, classes: tuple[str, ...], train: tuple[Vectors, Labels], dev: tuple[Vectors, Labels], began: float
) -> tuple[Head, float, float]:
    """(head, its dev loss, its penalty) with the least calibrated loss on dev."""
    from sklearn.linear_model import LogisticRegression

    (rows, truth), (held, wanted) = train, dev
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    std = np.where(std > 0, std, 1.0).astype(np.float32)
    scaled = (rows - mean) / std
    solver = LogisticRegression(max_iter=MAX_ITERATIONS, tol=1e-3, warm_start=True)
    found: list[tuple[float, float, Head]] = []
    for step, penalty in enumerate(PENALTIES, 1):
        _heed(job)
        solver.set_params(C=penalty).fit(scaled, truth)
        weight, bias = _rows_of(solver, len(classes))
        head = _calibrated(Head(classes, weight, bias, mean, std, 1.0), held, wanted)
        found.append((_loss(head.probabilities(held), wanted), penalty, head))
        left = (time.monotonic() - began) / step * (len(PENALTIES) - step)
        job.watch.progress(
            phase="training", step=step, steps=len(PENALTIES), loss=found[-1][0], tokens_per_s=0.0, eta_s=left
        )
    loss, penalty, head = min(found, key=lambda one: one[0])
    return head, loss, penalty


def _rows_of(solver: Any, classes: int) -> tuple[Vectors, Vectors]:
    """(weight [classes, d], bias [classes]); of two classes the solver gives one row, the second's."""
    weight, bias = solver.coef_.astype(np.float32), solver.intercept_.astype(np.float32)
    if classes == 2:
        return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
    return weight, bias


def _calibrated(head: Head, held: Vectors, wanted: Labels) -> Head:
    """The head with the temperature of the least loss on held-out rows.

    They count as right with Platt's (1999) (n + 1) / (n + 2), so that a few that are all right do not make it certain.
    """
    known = wanted >= 0
    if not known.any():
        return head
    logits, truth = head.logits(held[known]), wanted[known]
    doubt = 1 / (len(truth) + 2)
    losses = []
    for temperature in TEMPERATURES:
        scaled = logits / temperature
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        logs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        right = logs[np.arange(len(truth)), truth]
        others = (logs.sum(axis=1) - right) / (logs.shape[1] - 1)
        losses.append(-((1 - doubt) * right + doubt * others).mean())
    best = float(TEMPERATURES[int(np.argmin(losses))])
    return Head(head.classes, head.weight, head.bias, head.mean, head.std, best)


def _loss(chances: Vectors, truth: Labels) -> float:
    """Mean negative log-probability of the true answers, in nats a row."""
    given = np.where(truth >= 0, chances[np.arange(len(truth)), truth], 0.0)
    return float(-np.log(np.maximum(given, FLOOR)).mean())


def _heed(job: Job) -> None:
    if (wanted := job.watch.team.agree(job.watch.control.wanted())) != "run":
        raise Stopped(wanted, 0)
