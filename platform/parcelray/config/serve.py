"""One endpoint as data: `jobs/serve/*.yaml`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.connector import AnchorsOnlyConnectorConfig, M3ConnectorConfig
from parcelray.config.train import TrackingConfig

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ServedModelConfig(StrictModel):
    """A checkpoint and how it is loaded."""

    reference: str = "mini_base"
    """As for evaluation; an alias is resolved once, and the version that it stood for is served and reported."""
    connector: M3ConnectorConfig | AnchorsOnlyConnectorConfig | None = Field(default=None, discriminator="type")
    """A connector without weights to put into a checkpoint that has none; null: the checkpoint's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""


class FixedPolicyConfig(StrictModel):
    """Every request gets the same budget; one that asks for another is refused."""

    type: Literal["fixed"] = "fixed"
    visual_tokens: int = Field(ge=1)
    """The budget."""


class RequestPolicyConfig(StrictModel):
    """A request says: `visual_tokens`, or `detail` low (the smallest budget), high (the largest) or auto."""

    type: Literal["request"] = "request"
    auto: int | None = Field(default=None, ge=1)
    """Budget of requests that leave it open; null: the largest."""


class LoadPolicyConfig(StrictModel):
    """As `request`, but what is left open falls and rises so that a latency objective holds."""

    type: Literal["load"] = "load"
    measure: Literal["total", "first_token"] = "total"
    """What the objective is about: the whole request, or the time to its first token."""
    objective_s: float = Field(default=1.0, gt=0)
    """Latency that `quantile` of the requests should stay below, seconds."""
    quantile: float = Field(default=0.95, gt=0, lt=1)
    """Share of the requests."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget it may give; null: the smallest that is served.

    A registered version that was put to gates is served only if they accepted it.
    """
    window_s: float = Field(default=5.0, gt=0)
    """How far back latencies count, seconds."""
    lower_after_s: float = Field(default=0.5, gt=0)
    """Shortest time between two steps down, seconds."""
    raise_after_s: float = Field(default=5.0, gt=0)
    """Time that the load must have been low before a step up, seconds; doubled each time that a step up had to be taken back."""
    raise_below: float = Field(default=0.6, gt=0, lt=1)
    """Share of the objective that counts as low load."""


class InputPolicyConfig(StrictModel):
    """As `request`, but what is left open is chosen by image and question, with a predictor that `parcelray analyze adaptive` fitted."""

    type: Literal["input"] = "input"
    predictor: str = Field(min_length=1)
    """Folder of the predictor, on every node."""
    price: float | None = Field(default=None, ge=0)
    """Chance of a right answer that one visual token must buy; null: the predictor's own."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget it may give: one that the promotion gate accepted; null: the smallest that is served."""


BudgetPolicyConfig = Annotated[
    FixedPolicyConfig | RequestPolicyConfig | LoadPolicyConfig | InputPolicyConfig, Field(discriminator="type")
]


class ServedBudgets(StrictModel):
    """The budgets of an endpoint."""

    offered: tuple[int, ...] = (16, 64, 256)
    """Visual tokens per image that requests may have; each is warmed up before the endpoint is ready, and is a label of the metrics."""
    policy: BudgetPolicyConfig = RequestPolicyConfig()
    """Who chooses among them."""

    @model_validator(mode="after")
    def _check(self) -> "ServedBudgets":
        if not self.offered or any(budget < 1 for budget in self.offered) or len(set(self.offered)) < len(self.offered):
            raise ValueError(
                f"offered {list(self.offered)} are not different token counts from 1 on; write for example [16, 64,"
                " 256]"
            )
        named = {"visual_tokens", "auto", "floor"} & type(self.policy).model_fields.keys()
        for name in sorted(named):
            value = getattr(self.policy, name)
            if value is not None and value not in self.offered:
                raise ValueError(
                    f"{name} of the policy is {value}, which is not offered; legal:"
                    f" {', '.join(map(str, sorted(self.offered)))}"
                )
        return self


class EngineConfig(StrictModel):
    """What makes the answers of one replica, and what it holds at the same time."""

    type: Literal["continuous", "static"] = "continuous"
    """continuous: requests join and leave between two decode steps; static: transformers' `generate`, one batch of equal budgets after the other."""
    max_running: int = Field(default=64, ge=1)
    """Requests that share a decode step."""
    max_waiting: int = Field(default=128, ge=0)
    """Requests that may wait for one; more are refused with 429."""
    kv_tokens: int = Field(default=32768, ge=64)
    """Tokens of the KV cache: all prompts, visual tokens and answers in flight together."""
    prefill_tokens: int = Field(default=8192, ge=1)
    """Prompt tokens that are read between two decode steps at most, or those of one request that has more."""
    vision_batch: int = Field(default=32, ge=1)
    """Images per run of the vision tower, and new ones between two decode steps, or those of one request that has more."""
    feature_cache_mb: int = Field(default=256, ge=0)
    """Patch features of images seen lately, MiB; 0: none."""


class ReplicasConfig(StrictModel):
    """How many copies of the model there are."""

    min: int = Field(default=1, ge=1)
    """Copies without load. Never 0: a cold start takes many seconds."""
    max: int = Field(default=1, ge=1)
    """Copies at most."""
    target_ongoing: int = Field(default=32, ge=1)
    """Requests in flight per copy that the autoscaler aims at."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Load must last so long before a copy is added, seconds."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """And be gone so long before one is removed."""
    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs of each."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; a fraction lets several share one."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of its arithmetic on a CPU; null: all cores of the node."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}; raise max or lower min")
        return self


class RequestLimits(StrictModel):
    """What one request may ask for."""

    body_mb: float = Field(default=16.0, gt=0)
    """Size of a request, MiB."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Time that a client has to send it, seconds."""
    bodies_mb: float = Field(default=256.0, gt=0)
    """Bodies of requests that one process holds at the same time, MiB."""
    images: int = Field(default=8, ge=0)
    """Images of a request."""
    image_mb: float = Field(default=10.0, gt=0)
    """Size of one encoded image, MiB."""
    image_megapixels: float = Field(default=32.0, gt=0)
    """Width times height of one image, checked before it is decoded."""
    prompt_chars: int = Field(default=32768, ge=1)
    """Characters of all texts together."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer that may be asked for, tokens."""
    default_max_tokens: int = Field(default=64, ge=1)
    """Longest answer of requests that do not say."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time from a request's arrival at the endpoint to its end, all attempts together, after which the replica gives it up, seconds."""
    retries: int = Field(default=1, ge=0)
    """Times that a request whose replica died or failed goes to another one, unless a part of the answer has been sent already."""

    @model_validator(mode="after")
    def _check(self) -> "RequestLimits":
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"default_max_tokens {self.default_max_tokens} is above max_tokens {self.max_tokens}; lower it"
            )
        if self.bodies_mb < self.body_mb:
            raise ValueError(
                f"bodies_mb {self.bodies_mb:g} is below body_mb {self.body_mb:g}, so that no body of that size could be"
                " read; raise bodies_mb"
            )
        return self


class HttpConfig(StrictModel):
    """The endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than the loopback's needs `keys_file`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port."""
    keys_file: str | None = None
    """File with hashes of API keys (`parcelray keys add`); null: no key is asked for."""
    image_hosts: tuple[str, ...] = ()
    """Hosts whose https images the server may fetch; none: only `data:` URLs."""
    image_threads: int = Field(default=2, ge=1)
    """Images that one ingress decodes at the same time."""
    playground: bool = True
    """Whether `/` shows the playground."""

    @field_validator("image_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not host or host != host.lower() or not all(part.replace("-", "").isalnum() for part in host.split(".")):
                raise ValueError(f"{host!r} is not a host name in lower case; write for example images.example.com")
        return hosts

    @model_validator(mode="after")
    def _check(self) -> "HttpConfig":
        if self.host not in LOOPBACK and self.keys_file is None:
            raise ValueError(
                f"host is {self.host} and keys_file is unset: whoever reaches that address could use the model; make"
                " keys, or listen on 127.0.0.1"
            )
        return self


class CanaryConfig(StrictModel):
    """A share of the traffic for another model, compared with the first while both run."""

    model: ServedModelConfig
    """The challenger."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Part of the requests that it gets."""
    min_requests: int = Field(default=50, ge=1)
    """Requests of each before they are compared."""
    max_error_rate: float = Field(default=0.02, ge=0, le=1)
    """By how much its share of failed requests may exceed the champion's."""
    max_latency_ratio: float = Field(default=1.5, gt=0)
    """How many times the champion's median latency its own may be."""


class TracesConfig(StrictModel):
    """OpenTelemetry traces, which Serve records of proxy, ingress and replica."""

    sampling_ratio: float = Field(default=0.01, gt=0, le=1)
    """Share of the requests that are traced."""
    exporter: str = ""
    """`module:function` that gives the span processors, as Serve's `exporter_import_path`; empty: files beside Serve's logs."""


class SamplesConfig(StrictModel):
    """A share of the answered requests is kept in MLflow, to look at."""

    ratio: float = Field(default=0.01, gt=0, le=1)
    """Share of the answers."""
    texts: bool = False
    """Whether question, answer and the hash of each image are kept, too: whoever reads the store then reads what clients asked."""


class ServeJob(StrictModel):
    """One whole endpoint: a model, its budgets, and who may ask for what."""

    kind: Literal["serve"]
    """What the file describes."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name; the model's name in requests."""
    model: ServedModelConfig = ServedModelConfig()
    """What is served."""
    canary: CanaryConfig | None = None
    """A challenger beside it; null: none."""
    budgets: ServedBudgets = ServedBudgets()
    """Visual tokens per image."""
    engine: EngineConfig = EngineConfig()
    """What one replica holds."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Copies of the model."""
    limits: RequestLimits = RequestLimits()
    """What one request may ask for."""
    http: HttpConfig = HttpConfig()
    """The endpoint."""
    traces: TracesConfig | None = None
    """OpenTelemetry; null: no traces."""
    samples: SamplesConfig | None = None
    """Requests that MLflow keeps; null: none."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow: its registry, which `models:/...` references name, and the samples."""

    @model_validator(mode="after")
    def _check(self) -> "ServeJob":
        if self.samples is not None and self.tracking.uri is None:
            raise ValueError("samples are kept in MLflow, but tracking.uri is null; name a store, or leave samples out")
        if self.canary is not None and isinstance(self.budgets.policy, InputPolicyConfig):
            raise ValueError(
                "budgets.policy is input, whose predictor belongs to one checkpoint, and canary names a second; leave"
                " one of them out"
            )
        return self
