"""What can be had without training a weight: the bare model, examples in the prompt, a better instruction.

All are measured as every method is, by the loss of the reference answers, so that they stand beside the trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest
from hybrid.prompts import before_last_user, few_shot_messages, replace_last_user, task_message
from hybrid.rooms import write_json
from hybrid.training.base import forward_of, load_base, stops
from hybrid.training.batches import encode, end_of_turn
from hybrid.training.control import Stopped
from hybrid.training.data import DEV_LIMIT, digest
from hybrid.training.formats import Example
from hybrid.training.job import Fitted, Job
from hybrid.training.objective import Measured, measure

PROMPT = "prompt.json"
#: dev rows an instruction is chosen on at most, and as many to report it on
SEARCH_ROWS = 100
#: labels named in an instruction at most
LABELS = 100

Score = Callable[[Sequence[Example]], Measured]


def fit_zero_shot(job: Job) -> Fitted:
    """Measures the base model with the task's own instruction. Raises DataError where no row fits."""
    return _measured(job, job.data.dev, {"method": "zero_shot"}, "nothing was trained; ask the model `base`")


def fit_few_shot(job: Job) -> Fitted:
    """Measures it with the training examples nearest to each question before it, the nearest last.

    Liu et al. 2022 (KATE, arXiv 2101.06804); by the retriever's embedder, as the strategy `few_shot` does.
    """
    train, shots = job.data.train, job.recipe.shots
    dev = job.data.dev[:DEV_LIMIT]
    asked, known = (job.embedder.embed_queries([e.question for e in rows]) for rows in (dev, train))
    near = asked @ known.T
    shown = []
    for example, scores in zip(dev, near, strict=True):
        nearest = [train[n] for n in scores.argsort()[-shots:]]
        turns = few_shot_messages((found.question, found.answer) for found in nearest)
        shown.append(replace(example, messages=before_last_user(example.messages, turns)))
    how = (
        "put the task folder into eval/tasks/NAME and ask the model `few_shot:NAME`; "
        f"`gate.few_shot_k` says how many examples are shown, measured with {shots}"
    )
    return _measured(job, shown, {"method": "few_shot", "shots": shots}, how)


def fit_search(job: Job) -> Fitted:
    """Chooses the instruction under which one half of dev is likeliest, and reports the other half.

    Candidates are the task's own instruction, variants of it and the recipe's `candidates`: the search over proposals
    of Zhou et al. 2023 (APE, arXiv 2211.01910), scored by likelihood. Raises BadRequest for fewer than two dev rows,
    Stopped when told to.
    """
    dev = job.data.dev
    if len(dev) < 2:
        raise BadRequest("prompt_search needs two dev rows at least: one half chooses, the other half judges.")
    choose, judge = dev[::2][:SEARCH_ROWS], dev[1::2][:SEARCH_ROWS]
    began, score = time.monotonic(), _scorer(job)
    found: dict[str, float] = {}
    candidates = _candidates(job)
    for step, instruction in enumerate(candidates, 1):
        if (wanted := job.watch.team.agree(job.watch.control.wanted())) != "run":
            raise Stopped(wanted, step - 1)
        found[instruction] = round(score(_instructed(choose, instruction)).loss, 5)
        _tell(job, step, len(candidates), found[instruction], began)
    best = min(found, key=lambda instruction: found[instruction])
    before, after = (score(_instructed(judge, instruction)) for instruction in (job.data.instruction, best))
    prompt = {
        "method": "prompt_search",
        "instruction": best,
        "scores": [{"instruction": text, "loss": loss} for text, loss in sorted(found.items(), key=lambda x: x[1])],
        "chosen_on": len(choose),
        "judged_on": len(judge),
        "dev_loss_before": round(before.loss, 5),
        "dev_loss": round(after.loss, 5),
    }
    metrics = {
        **_numbers(after, len(judge), began),
        "dev_loss_before": prompt["dev_loss_before"],
        "dev_sha256": digest(judge),  # half of dev: its loss compares with no other method's
    }
    how = "put the instruction of prompt.json, and a blank line, before your input, and ask the model `base`"
    return _prompt(prompt, metrics, how)


def variants(instruction: str, labels: Sequence[str]) -> list[str]:
    """Instructions that ask for the same: the task's own, none, with a role, a reminder of the form, the labels."""
    listed = ", ".join(labels[:LABELS])
    roles = ["You are an expert at this task.", "You are a careful annotator who follows guidelines to the letter."]
    forms = ["Answer with the answer alone, without explanation.", "Answer in the form of the examples you know."]
    if listed and len(labels) <= LABELS:
        forms += [f"Answer with one of: {listed}.", f"The possible answers are {listed}. Write one of them, exactly."]
    made = [instruction, "", *(f"{role} {instruction}".strip() for role in roles)]
    made += [f"{instruction} {form}".strip() for form in forms]
    made += [f"{roles[0]} {instruction} {forms[-1]}".replace("  ", " ")]
    return list(dict.fromkeys(made))


def _candidates(job: Job) -> list[str]:
    return list(dict.fromkeys([*variants(job.data.instruction, job.data.labels), *job.recipe.candidates]))


def _instructed(examples: Sequence[Example], instruction: str) -> list[Example]:
    """The examples asked with another instruction."""
    return [
        replace(example, messages=replace_last_user(example.messages, task_message(instruction, example.bare)))
        for example in examples
    ]


def _scorer(job: Job) -> Score:
    base, tokenizer = load_base(job.model, job.recipe.precision)
    end, forward = end_of_turn(tokenizer, stops(base)), forward_of(base)

    def score(examples: Sequence[Example]) -> Measured:
        rows, long = encode(tokenizer, examples, end=end, max_length=job.recipe.max_length)
        if long:  # a loss over other rows would compare with nothing
            raise BadRequest(
                f"{len(long)} of {len(examples)} rows are longer than {job.recipe.max_length} tokens with this prompt; "
                "raise max_length, or show fewer shots.",
                param="max_length",
            )
        return measure(forward, rows)

    return score


def _measured(job: Job, dev: Sequence[Example], prompt: dict[str, Any], how: str) -> Fitted:
    began = time.monotonic()
    found = _scorer(job)(dev[:DEV_LIMIT])
    metrics = _numbers(found, len(dev[:DEV_LIMIT]), began)
    return _prompt({**prompt, "instruction": job.data.instruction, "dev_loss": metrics["dev_loss"]}, metrics, how)


def _numbers(found: Measured, rows: int, began: float) -> dict[str, Any]:
    return {
        "dev_loss": round(found.loss, 5),
        "dev_token_accuracy": round(found.token_accuracy, 4),
        "dev_exact": round(found.exact, 4),
        "dev_rows": rows,
        "trained_parameters": 0,
        "seconds": round(time.monotonic() - began, 1),
    }


def _prompt(prompt: dict[str, Any], metrics: dict[str, Any], how: str) -> Fitted:
    def save(folder: Path) -> dict[str, Any]:
        write_json(folder / PROMPT, prompt)
        return {"weights": PROMPT}

    return Fitted(metrics, (), save, "prompt", how)


def _tell(job: Job, step: int, steps: int, loss: float, began: float) -> None:
    left = (time.monotonic() - began) / step * (steps - step)
    job.watch.progress(phase="training", step=step, steps=steps, loss=loss, tokens_per_s=0.0, eta_s=left)
