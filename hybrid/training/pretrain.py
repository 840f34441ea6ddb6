"""Continued pre-training on raw text (Gururangan et al. 2020, arXiv 2004.10964) with LoRA weights.

A document is cut into pieces of `max_length` tokens that overlap by one, so that every token but a document's first is
predicted once, and documents never see one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrid.errors import DataError
from hybrid.training.base import load_base
from hybrid.training.batches import Encoded
from hybrid.training.data import DEV_LIMIT
from hybrid.training.formats import Text
from hybrid.training.job import Fitted, Job
from hybrid.training.loop import Group
from hybrid.training.lora import adapted, save_adapter
from hybrid.training.start import take_up
from hybrid.training.supervised import Learner, fit_answers

#: characters of a dev text on which the engine's canary compares log-probabilities
CANARY_CHARS = 400


def fit(job: Job) -> Fitted:
    """Trains on texts. Raises DataError for data that hold questions and answers instead."""
    import torch

    if not job.data.texts:
        raise DataError(
            f"pretrain learns from plain texts, and {job.data.name} has none; give documents (.md, .txt) or rows with "
            "`text`, or use a supervised method such as lora."
        )
    torch.manual_seed(job.recipe.seed)
    base, tokenizer = load_base(job.model, job.recipe.precision)
    length = job.recipe.max_length
    train, dev = (pieces(tokenizer, texts, length) for texts in (job.data.texts, job.data.dev_texts[:DEV_LIMIT]))
    model = adapted(base, job.recipe, job.model.name)
    take_up(model, job)
    sample = job.data.dev_texts[0].text[:CANARY_CHARS]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner = Learner(model, [Group(weights)], lambda folder: save_adapter(model, tokenizer, sample, folder))
    fitted = fit_answers(job, learner, train, dev)
    loss = fitted.metrics["dev_loss"]
    metrics = {name: value for name, value in fitted.metrics.items() if name != "dev_exact"}
    return replace(fitted, metrics={**metrics, "dev_perplexity": round(math.exp(loss), 3)})


def pieces(tokenizer: Any, texts: Sequence[Text], length: int) -> list[Encoded]:
    """The texts as rows of at most `length` tokens, each document ended by the end-of-text token."""
    found = []
    for ids in tokenizer([text.text for text in texts], add_special_tokens=False)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        for first in range(0, len(ids) - 1, length - 1):
            found.append(Encoded((ids[first],), tuple(ids[first + 1 : first + length])))
    return found
