"""Saving what PEFT trains and the engine does not serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.adapters.preflight import WEIGHTS

#: how an adapter that is no LoRA but can be merged is served
MERGE = (
    "merge it into its base and serve that by an engine of its own: "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER).merge_and_unload()"
    ".save_pretrained(OUT), the base's tokenizer files copied to OUT, then HYBRID_MODEL=OUT hybrid serve"
)
#: how an adapter that nothing merges is used
IN_PROCESS = (
    "vLLM has no place for it; use it in a process of your own, "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER).generate(…)"
)


def save_peft(model: Any, folder: Path) -> dict[str, Any]:
    """Writes PEFT's own folder. Returns the name of its weight file, for the card."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return {"weights": WEIGHTS}
