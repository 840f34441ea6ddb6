"""Several adapters made one, before any request: what a mix by weights is compared with.

"cat" is the weighted sum of the updates, exactly, as `mix:` serves it; its rank is the sum of the ranks. "learned" is
that with weights found on a few examples of a task (LoraHub, Huang et al. 2023, arXiv 2307.13269). The others are
PEFT's `add_weighted_adapter`: smaller, and not the same as the sum; the card says how far from it they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.adapters.canary import PROMPTS
from hybrid.adapters.listing import SERVABLE, AdapterVersion
from hybrid.adapters.mix import Factors, concatenated, read_factors, write_factors
from hybrid.adapters.mixes import one_base
from hybrid.adapters.preflight import PREFIX
from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, HybridError
from hybrid.models import ModelFiles
from hybrid.rooms import check_name
from hybrid.training.base import encoded, forward_of, load_base, stops
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.lora import token_logprobs
from hybrid.training.objective import measure
from hybrid.training.recipes import Recipe
from hybrid.training.run import TrainResult

EXACT = ("cat", "learned")
#: method → what PEFT does
BY_PEFT: Mapping[str, str] = {
    "linear": "A and B averaged apart; equal ranks",
    "svd": "the sum cut to its largest singular values",
    "ties": "small entries trimmed, signs elected (Yadav et al. 2023, arXiv 2306.01708); equal ranks",
    "ties_svd": "TIES on the updates, then as svd",
    "dare_linear": "entries dropped at random, the rest scaled up (Yu et al. 2023, arXiv 2311.03099); equal ranks",
    "dare_linear_svd": "DARE on the updates, then as svd",
    "dare_ties": "DARE, then signs elected as in TIES; equal ranks",
    "dare_ties_svd": "that on the updates, then as svd",
    "magnitude_prune": "small entries trimmed; equal ranks",
    "magnitude_prune_svd": "that on the updates, then as svd",
}
METHODS = (*EXACT, *BY_PEFT)

#: LoraHub: few examples, weights within these bounds, a penalty on the mean of their sizes, a search without gradients
FEW, BOUND, PENALTY, TRIES = 32, 1.5, 0.05, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What to make: `weights` by adapter (`name` or `name@version`), under the name `name`.

    `density` is the share of entries that TIES, DARE and pruning keep, `rank` that of the SVD methods (0: the largest
    of the members'), `task` where weights are learned and where the result is measured.
    """

    name: str
    weights: Mapping[str, float]
    method: str = "cat"
    density: float = 0.5
    rank: int = 0
    task: Path | None = None


def merge(order: Merge, *, store: AdapterStore, model: ModelFiles, max_rank: int) -> TrainResult:
    """Publishes the next version of `order.name`. Raises BadRequest, ModelNotFound, Refused, DataError."""
    check_name(order.name)
    if order.method not in METHODS:
        raise BadRequest(f"There is no way to merge {order.method[:40]!r}; use one of {', '.join(METHODS)}.")
    if order.method == "learned" and order.task is None:
        raise BadRequest("Weights are learned on a task's examples: give --task DIR.")
    if not 0 < order.density <= 1:
        raise BadRequest("`density` is the share of entries kept, above 0 and at most 1.")
    members = [store.model(name) for name in order.weights]
    for version in members:
        if version.state not in SERVABLE:
            raise BadRequest(f"{version.id} is {version.state}; merge versions that have passed their checks.")
    data = read_dataset(order.task) if order.task else None
    version = store.publish(order.name, lambda folder: _fill(folder, order, members, data, model, max_rank))
    return TrainResult(version.name, version.version, version.ref.path, version.card["metrics"])


def _fill(
    folder: Path,
    order: Merge,
    members: Sequence[AdapterVersion],
    data: Dataset | None,
    model: ModelFiles,
    max_rank: int,
) -> dict[str, Any]:
    base = one_base(members)
    bench = _Bench(model, members)
    weights = list(order.weights.values())
    if order.method == "learned" and data is not None:
        weights = bench.learned(weights, data)
    exact = concatenated([(w, read_factors(v.ref.path)) for w, v in zip(weights, members, strict=True)])
    factors = exact if order.method in EXACT else bench.merged(order, weights)
    if factors.rank > max_rank:
        raise BadRequest(
            f"The merged adapter would have rank {factors.rank} and the engine holds {max_rank}: use --method svd with "
            "--rank, or raise engine.max_lora_rank."
        )
    write_factors(folder, factors, model.name)
    metrics, canary = bench.measured(folder, data)
    return {
        "kind": "lora",
        "method": "merge",
        "merge": {
            "method": order.method,
            "members": {v.id: round(w, 4) for v, w in zip(members, weights, strict=True)},
            **({"density": order.density} if order.method in BY_PEFT and order.method not in ("linear", "svd") else {}),
            "relative_error": round(distance(factors, exact), 5),
        },
        "rank": factors.rank,
        "base": model.name,
        "base_sha256": base or model.sha256,
        "metrics": metrics,
        **canary,
        **({"task": data.name, "metric": data.metric, "instruction": data.instruction} if data else {}),
    }


def distance(factors: Factors, exact: Factors) -> float:
    """‖ΔW − ΔW*‖ / ‖ΔW*‖ over all modules together (Frobenius), with ΔW* of `exact`."""
    apart = whole = 0.0
    for module, (a, b) in exact.by_module.items():
        wanted = b.astype(np.float64) @ a
        ours = np.matmul(*reversed(factors.by_module[module])) if module in factors.by_module else 0.0
        apart += float(((ours - wanted) ** 2).sum())
        whole += float((wanted**2).sum())
    return math.sqrt(apart / whole) if whole else 0.0


class _Bench:
    """The base with the members on it, in PEFT."""

    def __init__(self, files: ModelFiles, members: Sequence[AdapterVersion]) -> None:
        from peft import PeftModel

        self._recipe = Recipe()
        base, self._tokenizer = load_base(files, self._recipe.precision)
        self._names = [f"m{n}" for n in range(len(members))]
        self._model: Any = PeftModel.from_pretrained(base, str(members[0].ref.path), adapter_name=self._names[0])
        for name, version in zip(self._names[1:], members[1:], strict=True):
            self._model.load_adapter(str(version.ref.path), adapter_name=name)
        self._model.eval()

    def learned(self, start: Sequence[float], data: Dataset) -> list[float]:
        """The weights at which a few training examples are predicted best, by Nelder and Mead's search."""
        from peft.tuners.lora import LoraLayer
        from scipy.optimize import minimize

        train, _ = encoded(self._tokenizer, data, self._recipe, stops(self._model))
        layers = [layer for layer in self._model.modules() if isinstance(layer, LoraLayer)]
        scales = [dict(layer.scaling) for layer in layers]
        self._model.base_model.set_adapter(self._names)
        forward = forward_of(self._model)

        def loss(weights: Sequence[float]) -> float:
            by_name = dict(zip(self._names, weights, strict=True))
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling.update({name: scale[name] * by_name[name] for name in scale})
            return measure(forward, train[:FEW]).loss + PENALTY * float(np.abs(weights).mean())

        options = {"maxfev": TRIES * len(start)}
        bounds = [(-BOUND, BOUND)] * len(start)
        found = minimize(loss, np.asarray(start), method="Nelder-Mead", bounds=bounds, options=options)
        return [float(weight) for weight in found.x]

    def merged(self, order: Merge, weights: Sequence[float]) -> Factors:
        """PEFT's own merge; the same order gives the same numbers. Raises BadRequest with PEFT's reason."""
        import torch
        from peft import get_peft_model_state_dict

        torch.manual_seed(0)  # DARE drops at random
        options: dict[str, Any] = {} if order.method in ("linear", "svd") else {"density": order.density}
        if order.method.endswith("svd"):
            options |= {"svd_rank": order.rank or None, "svd_full_matrices": False}
        try:
            self._model.add_weighted_adapter(
                self._names, list(weights), "merged", combination_type=order.method, **options
            )
        except ValueError as error:
            raise BadRequest(f"PEFT cannot merge these by {order.method}: {error} The svd methods can.") from error
        if "merged" not in self._model.peft_config:
            raise HybridError("PEFT has merged nothing and did not say why; report this with its version.")
        state = get_peft_model_state_dict(self._model, adapter_name="merged", save_embedding_layers=False)
        tensors = {name.removeprefix(PREFIX): tensor.float().cpu().numpy() for name, tensor in state.items()}
        modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
        pairs = {m: (tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}
        return Factors(self._model.peft_config["merged"].r, pairs)

    def measured(self, folder: Path, data: Dataset | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved adapter as PEFT reads it: its numbers on the task's dev rows, and the canary's recording."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._model.unload(), str(folder))
        model = model.to(model.get_base_model().dtype).eval()
        metrics: dict[str, Any] = {}
        if data is not None:
            _, dev = encoded(self._tokenizer, data, self._recipe, stops(model))
            found = measure(forward_of(model), dev)
            metrics = {"dev_sha256": data.dev_sha256, "dev_rows": len(dev), "dev_loss": round(found.loss, 5)}
        model.get_base_model().set_attn_implementation("sdpa")
        said = token_logprobs(model, self._tokenizer, PROMPTS[1])
        return metrics, {"canary": {"prompt": PROMPTS[1], "logprobs": [round(value, 5) for value in said.tolist()]}}
