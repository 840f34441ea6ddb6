"""Every setting, once: one frozen tree, default < `hybrid.toml` < environment (`HYBRID_ENGINE__PORT`) < flag.

A name that does not exist is an error that says so. The environment is read here and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from hybrid.errors import SetupError
from hybrid.rooms import Home

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"
#: a context of serialization in which secrets are told
SECRETS = "secrets"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """Where the server listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    ui: bool = True
    quickstart: bool = Field(True, description="train the quickstart adapters in the background on the first start")
    max_body_bytes: int = Field(4 << 20, description="a larger request body is 413")
    max_file_bytes: int = Field(512 << 20, description="a larger upload to /v1/files is 413")
    max_header_count: int = 100
    max_header_bytes: int = 32 << 10
    max_messages: int = 512
    max_n: int = Field(8, description="the largest `n`, `best_of`")
    max_logprobs: int = 20
    max_stop: int = 16
    max_inflight: int = Field(256, description="requests in the gateway at once; one more is 503")
    max_inflight_per_key: int = Field(64, ge=1, description="requests of one API key at once; one more is 429")
    drain_s: float = Field(30.0, description="how long requests in flight may take after SIGTERM")


class EngineSettings(_Section):
    """The vLLM child, or the URL of one that runs already."""

    kind: str = Field("vllm", description="vllm, scripted, or the URL of a running OpenAI-compatible vLLM server")
    max_model_len: int = 2048
    max_loras: int = Field(8, description="adapters computed in one batch")
    max_cpu_loras: int = Field(32, description="adapters kept in memory")
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 32
    max_mixes: int = Field(16, ge=1, description="mixes kept as adapters; the one not used for longest goes")
    max_num_seqs: int = 32
    kv_cache_gb: int = Field(2, description="VLLM_CPU_KVCACHE_SPACE, in GiB")
    prefix_caching: bool = Field(True, description="keep the attention of prompts for those that begin alike")
    ngram: int = Field(0, ge=0, le=16, description="tokens guessed from the prompt and checked in one step; 0: none")
    cpu_lora: bool = Field(True, description="on a CPU: adapters by our plugin instead of vLLM's own products")
    reserved_cores: int | None = Field(None, ge=0, description="cores the engine leaves free (default: as vLLM does)")
    openmp: Literal["gnu", "intel"] = Field("gnu", description="on a CPU: whose threads the engine computes with")
    dtype: str = "bfloat16"
    args: tuple[str, ...] = Field((), description="more flags for vLLM, passed as they are")
    start_timeout_s: float = 900.0
    first_byte_timeout_s: float = 120.0
    idle_timeout_s: float = 60.0
    answer_timeout_s: float = Field(600.0, description="a whole answer, where it is not streamed")
    probe_every_s: float = Field(10.0, description="a one-token answer is asked of an idle engine this often")
    probe_timeout_s: float = 20.0
    probe_failures: int = 3
    restart_limit: int = Field(8, description="restarts within ten minutes before the engine is called degraded")


class RetrievalSettings(_Section):
    """How corpora are cut and searched."""

    top_k: int | None = Field(
        None, ge=1, le=50, description="passages before a question (default: 3, or 1 if the base model is small)"
    )
    refusal: str = Field(
        "This is not in the documents.", description="the answer where nothing found is likely to hold one; empty: none"
    )
    quote: bool | None = Field(
        None, description="the sentence asked for after a `rag` answer without it (default: if the base model is small)"
    )
    chunk_tokens: int = Field(200, ge=16, description="a longer section is cut; the embedder's tokens")
    overlap_tokens: int = Field(0, ge=0, description="tokens that neighbouring pieces of a section share")
    passage_budget_tokens: int = Field(1100, description="tokens of passages in one prompt at most")
    vector_engine: SecretStr = Field(SecretStr(""), description="a PostgreSQL with pgvector in place of FAISS; its URL")
    search: Literal["hybrid", "dense", "lexical"] = Field("hybrid", description="by meaning and words, or by one alone")
    fusion: Literal["convex", "rrf"] = Field("convex", description="how the two become one list")
    weight: float | None = Field(None, ge=0, le=1, description="what meaning counts (default: as tuned, or 0.75)")
    rerank: bool = Field(True, description="a closer look at the best 30, where `hybrid corpora tune` taught one")
    cross_encoder: str = Field("", description="the folder of a cross-encoder that takes the closer look instead")
    collapse: bool = Field(True, description="of those that say almost the same the best alone, with a count")
    mmr: float = Field(0.0, ge=0, lt=1, description="how much passages that say the same are kept apart; 0: not")
    neighbours: int = Field(0, ge=0, le=5, description="pieces before and after each found one that are shown too")
    exact_up_to: int = Field(20_000, ge=0, description="of more passages meaning is searched by a graph (HNSW)")
    graph_up_to: int = Field(1_000_000, ge=0, description="of more passages, by compressed vectors (IVF-PQ)")
    words_first: int = Field(1_000, ge=0, description="new passages that are found by words before they are embedded")
    embed_batch: int = Field(512, ge=1, description="passages embedded and committed in one transaction")
    file_mb: int = Field(64, ge=1, description="a larger file is skipped; a corpus.jsonl may be of any size")
    parse_mb: int = Field(1024, ge=256, description="memory for reading one file, in MiB")
    parse_s: float = Field(60.0, gt=0, description="time for reading one file")

    def shown(self, *, small: bool = False) -> int:
        """How many passages are put before a question: a small model reads worse what stands beside the right one."""
        return self.top_k or (1 if small else 3)

    def quotes(self, *, small: bool = False) -> bool:
        """Whether the passage's own words follow an answer without them: what a small model says is often not there."""
        return small if self.quote is None else self.quote

    @field_serializer("vector_engine", when_used="json")
    def _told(self, value: SecretStr, info: FieldSerializationInfo) -> str:
        """The password in it is for our own child processes alone."""
        return value.get_secret_value() if (info.context or {}).get(SECRETS) else str(value)


class GateSettings(_Section):
    """The rules around the learned scores."""

    deadline_ms: float = Field(50.0, description="a slower gate is not waited for: the default arm answers")
    quality_cost: float = Field(0.9, ge=0, le=1, description="0 cheapest, 1 best")
    default_arm: str = Field("prompt", description="answers when the gate cannot")
    abstain_below: float | None = Field(
        None, ge=0, le=1, description="a narrow arm less likely than this is not taken (default: learned, 0.4 to 0.6)"
    )
    glance_above: float = Field(
        0.99, ge=0.5, le=1, description="so sure by its words alone, a request is not embedded to be routed; 1: never"
    )
    stay_margin: float = Field(0.15, ge=0, le=1, description="a conversation changes its arm for a larger gain only")
    cascade: float = Field(0.0, ge=0, le=1, description="a cheaper arm is tried first and kept if this sure; 0: never")
    explore: float = Field(0.0, ge=0, le=0.2, description="how often another arm within reach is tried, to learn")
    adjust_within: float = Field(0.1, ge=0, le=0.5, description="how far feedback may move a score; 0 not at all")
    few_shot_k: int = Field(4, ge=1, le=32)
    mix_top_k: int = Field(2, ge=1, le=8, description="adapters in a mix that the gate weighs")
    mix_balance: float = Field(0.0, ge=0, description="how far, in nats, the load may change which adapters are mixed")
    log_vectors: bool = Field(True, description="keep the vector of a routed query, never its words, for drift")


#: how a panel's drafts become one answer
Method = Literal["auto", "synthesis", "vote", "consistency", "best_of", "refine"]


class ProposerSettings(_Section):
    """One proposer: a `model`, and what it is told and sampled with where that is its own."""

    arm: str
    temperature: float | None = Field(None, ge=0)
    system: str = ""


class PanelSettings(_Section):
    """A panel of `moa:NAME`; what is not given is as in `moa`. A proposer may be written as its arm alone."""

    proposers: tuple[ProposerSettings, ...] = Field(min_length=1)
    method: Method = "auto"
    layers: int = Field(1, ge=1, le=3)
    aggregator: str | None = None
    quorum: int | None = Field(None, ge=1)
    deadline_s: float | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, ge=1)
    reward: str = ""

    @field_validator("proposers", mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"arm": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _rates_drafts(self) -> Self:
        if self.reward and self.method != "best_of":
            raise ValueError(f"a reward model rates the drafts of method best_of, and this is {self.method}")
        return self


class MoaSettings(_Section):
    """Agents that confer: `moa`, `moa:NAME` and `self_moa`."""

    panels: dict[str, PanelSettings] = Field(default_factory=dict, description="the panels by name")
    proposers: int = Field(3, ge=1, le=16, description="proposers of the panel that the gate chooses")
    samples: int = Field(4, ge=1, le=16, description="answers that self_moa samples")
    temperature: float = Field(0.7, ge=0, description="of repeated samples of one arm")
    deadline_s: float = Field(30.0, gt=0, description="a proposer slower than this is dropped, if a quorum answered")
    draft_tokens: int = Field(512, ge=1, description="max_tokens of each call where the request gives none")
    max_calls: int = Field(16, ge=1, description="a request that may take more engine calls is 400")
    max_tokens: int = Field(16_384, ge=1, description="a request that may write more tokens in all its calls is 400")


class TrainingSettings(_Section):
    """How adapters are trained in this home."""

    checkpoint_s: float = Field(30.0, ge=0, description="seconds between checkpoints of a run at least")
    jobs: int = Field(1, ge=1, le=64, description="jobs that train at once")
    measure: bool = Field(True, description="measure new versions on their dev split while the server is idle")
    loop: bool = Field(True, description="then teach the gate with what is new, where `measure` is on")


class Settings(BaseSettings):
    """The whole tree. `Settings.load(...)` reads file and environment; flags come in as overrides."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="HYBRID_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    home: Path = Field(default_factory=Path.cwd, description="the folder that holds adapters/, index/ and eval/")
    cache: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid",
        description="where models are materialised",
    )
    data: Path | None = Field(None, description="task folders outside the home (HYBRID_DATA), used by suites")
    model: str = Field(
        DEFAULT_MODEL, description="the base model: a built-in name, a Hugging Face id or a local folder"
    )
    embedder: str = Field(DEFAULT_EMBEDDER, description="the sentence embedder, named the same way")
    system_prompt: str = Field(
        "", description="put first by the strategy `prompt` when the request has no system message"
    )
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    gate: GateSettings = GateSettings()
    moa: MoaSettings = MoaSettings()
    training: TrainingSettings = TrainingSettings()

    def environment(self) -> dict[str, str]:
        """What makes a child process load these very settings, wherever they came from."""
        values = self.model_dump(mode="json", exclude_none=True, context={SECRETS: True})
        return {
            f"HYBRID_{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
            for name, value in values.items()
        }

    @property
    def rooms(self) -> Home:
        """The folders of the home."""
        return Home(self.home.resolve())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        home = Path(os.environ.get("HYBRID_HOME") or Path.cwd())
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, home / "hybrid.toml")

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """The settings in force. Raises SetupError naming the field when a value or a name is wrong."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise SetupError(
                f"setting {where!r}: {first['msg']}. Look in hybrid.toml and the HYBRID_* environment."
            ) from error
        except tomllib.TOMLDecodeError as error:
            raise SetupError(f"hybrid.toml is not valid TOML: {error}.") from error


def offline_environment() -> None:
    """No hub, no telemetry: set before a heavy library is imported, here and in every child."""
    os.environ.update(OFFLINE)
    # it looks for a kernel on a hub, and says on every import that it found none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def share_cores() -> None:
    """Threads that wait sleep instead of spinning: set before torch is imported, by work that runs beside other work.

    With one of two cores busy elsewhere a training step took 7 s spinning and 2 to 3 s sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


#: what every process of ours runs with
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
