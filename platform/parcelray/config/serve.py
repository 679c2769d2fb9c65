"""Job files of endpoints: `jobs/serve/*.yaml`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.connector import AnchorsOnlyConnectorConfig, M3ConnectorConfig
from parcelray.config.paths import LocalPath, ModelReference
from parcelray.config.reducer import ReducerConfig
from parcelray.config.train import TrackingConfig, default_tracking

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ServedModelConfig(StrictModel):
    """A checkpoint and how to load it."""

    reference: ModelReference = "mini_base"
    """Reference of the checkpoint, as in an evaluate job. An alias is resolved once, to the version that is served."""
    connector: M3ConnectorConfig | AnchorsOnlyConnectorConfig | None = Field(default=None, discriminator="type")
    """Weight-free connector for a checkpoint that has no connector; null: the checkpoint's own connector."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the model's weights and arithmetic."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the model."""


class FixedPolicyConfig(StrictModel):
    """The same budget for every request; a request for another budget is rejected."""

    type: Literal["fixed"] = "fixed"
    visual_tokens: int = Field(ge=1)
    """Budget of all requests, visual tokens per image."""


class RequestPolicyConfig(StrictModel):
    """The request selects its budget: `visual_tokens`, or `detail` low (smallest budget), high (largest) or auto."""

    type: Literal["request"] = "request"
    auto: int | None = Field(default=None, ge=1)
    """Budget of requests with `auto` or without a budget; null: the largest."""


class LoadPolicyConfig(StrictModel):
    """Like `request`, but the budget of `auto` requests adapts to the load to meet a latency objective."""

    type: Literal["load"] = "load"
    measure: Literal["total", "first_token"] = "total"
    """Latency that the objective applies to: of the whole request, or until its first token."""
    objective_s: float = Field(default=1.0, gt=0)
    """Latency objective: the latency that the fraction `quantile` of the requests should stay below, seconds."""
    quantile: float = Field(default=0.95, gt=0, lt=1)
    """Fraction of requests that should meet the objective."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget that may be chosen; null: the smallest offered budget.

    For a registered version with gate results, it must be a budget that the gates accepted.
    """
    window_s: float = Field(default=5.0, gt=0)
    """Length of the window over which latencies are measured, seconds."""
    lower_after_s: float = Field(default=0.5, gt=0)
    """Shortest time between two reductions of the budget, seconds."""
    raise_after_s: float = Field(default=5.0, gt=0)
    """Duration of low load before the budget is increased, seconds.

    It doubles each time that an increase had to be reverted.
    """
    raise_below: float = Field(default=0.6, gt=0, lt=1)
    """Fraction of the latency objective below which the load counts as low."""


class InputPolicyConfig(StrictModel):
    """Like `request`, but a predictor chooses the budget of `auto` requests from image and question.

    `parcelray analyze adaptive` fits the predictor.
    """

    type: Literal["input"] = "input"
    predictor: LocalPath = Field(min_length=1)
    """Folder of the fitted predictor; it must exist on every node."""
    price: float | None = Field(default=None, ge=0)
    """Smallest gain in the probability of a correct answer per visual token; null: the predictor's default."""
    floor: int | None = Field(default=None, ge=1)
    """Smallest budget that may be chosen; null: the smallest offered budget.

    For a registered version with gate results, it must be a budget that the gates accepted.
    """


BudgetPolicyConfig = Annotated[
    FixedPolicyConfig | RequestPolicyConfig | LoadPolicyConfig | InputPolicyConfig, Field(discriminator="type")
]


class ServedBudgets(StrictModel):
    """The budgets that an endpoint offers, and the policy that chooses among them."""

    offered: tuple[int, ...] = (16, 64, 256)
    """Budgets that requests may use, visual tokens per image.

    Each budget is warmed up before the endpoint is ready, and is a label value of the metrics.
    """
    policy: BudgetPolicyConfig = RequestPolicyConfig()
    """Policy that chooses the budget of each request."""

    @model_validator(mode="after")
    def _check(self) -> "ServedBudgets":
        if not self.offered or any(budget < 1 for budget in self.offered) or len(set(self.offered)) < len(self.offered):
            raise ValueError(
                f"offered {list(self.offered)} must be distinct integers of at least 1; write for example [16, 64, 256]"
            )
        named = {"visual_tokens", "auto", "floor"} & type(self.policy).model_fields.keys()
        for name in sorted(named):
            value = getattr(self.policy, name)
            if value is not None and value not in self.offered:
                raise ValueError(
                    f"{name} of the policy is {value}, which is not in offered; legal:"
                    f" {', '.join(map(str, sorted(self.offered)))}"
                )
        return self


class EngineConfig(StrictModel):
    """Inference engine of one replica, and its capacity."""

    type: Literal["continuous"] = "continuous"
    """Type of the engine; continuous: requests join and leave the batch between decode steps."""
    max_running: int = Field(default=64, ge=1)
    """Largest number of requests per decode step."""
    max_waiting: int = Field(default=128, ge=0)
    """Largest number of queued requests; further requests are rejected with status 429."""
    kv_tokens: int = Field(default=32768, ge=64)
    """Size of the KV cache in tokens: prompts, visual tokens and answers of all running requests together."""
    prefill_tokens: int = Field(default=8192, ge=1)
    """Largest number of prompt tokens prefilled between two decode steps; one longer request may exceed it."""
    vision_batch: int = Field(default=32, ge=1)
    """Largest number of images encoded per batch and between two decode steps; one larger request may exceed it."""
    feature_cache_mb: int = Field(default=256, ge=0)
    """Size of the cache of patch features, MiB; 0: no cache."""


class ReplicasConfig(StrictModel):
    """Number and resources of the model replicas."""

    min: int = Field(default=1, ge=1)
    """Smallest number of replicas. It is never 0, as a cold start takes many seconds."""
    max: int = Field(default=1, ge=1)
    """Largest number of replicas."""
    target_ongoing: int = Field(default=32, ge=1)
    """Number of ongoing requests per replica that the autoscaler aims at."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Duration of high load before a replica is added, seconds."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Duration of low load before a replica is removed, seconds."""
    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs per replica."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per replica; with a fraction, several replicas share one GPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per replica; null: all cores of the node."""
    wait_s: float = Field(default=1800.0, gt=0)
    """Longest wait for free resources, and for nodes that the autoscaler starts, before the first replica, seconds."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}; raise max or lower min")
        return self


class RequestLimits(StrictModel):
    """Limits of one request."""

    body_mb: float = Field(default=16.0, gt=0)
    """Largest size of a request body, MiB."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Time limit for receiving a request body, seconds."""
    bodies_mb: float = Field(default=256.0, gt=0)
    """Largest total size of the request bodies in the memory of one process, MiB."""
    images: int = Field(default=8, ge=0)
    """Largest number of images per request."""
    image_mb: float = Field(default=10.0, gt=0)
    """Largest size of one encoded image, MiB."""
    image_megapixels: float = Field(default=32.0, gt=0)
    """Largest width times height of one image, megapixels; checked before the image is decoded."""
    prompt_chars: int = Field(default=32768, ge=1)
    """Largest number of characters of all texts of a request together."""
    max_tokens: int = Field(default=1024, ge=1)
    """Largest legal value of a request's max_tokens."""
    default_max_tokens: int = Field(default=64, ge=1)
    """Largest number of tokens of an answer if the request sets no limit."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit from a request's arrival to its end, over all attempts, seconds; after it the replica aborts it."""
    retries: int = Field(default=1, ge=0)
    """Largest number of retries on another replica after a replica died or failed.

    A request is not retried after a part of its answer has been sent.
    """

    @model_validator(mode="after")
    def _check(self) -> "RequestLimits":
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"default_max_tokens {self.default_max_tokens} is above max_tokens {self.max_tokens}; lower it"
            )
        if self.bodies_mb < self.body_mb:
            raise ValueError(
                f"bodies_mb {self.bodies_mb:g} is below body_mb {self.body_mb:g}, so a body of the largest size could"
                " not be received; raise bodies_mb"
            )
        return self


class HttpConfig(StrictModel):
    """HTTP server of the endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on. Addresses other than loopback need `keys_file`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port to listen on."""
    proxies: Literal["head", "every_node"] = "head"
    """Nodes of the cluster that listen; every_node: the head and each node with a replica, for a load balancer."""
    keys_file: LocalPath | None = None
    """File with the hashes of the API keys (`parcelray keys add`); null: no API key is required."""
    image_hosts: tuple[str, ...] = ()
    """Hosts from which the server may fetch images over https; empty: only `data:` URLs are accepted."""
    image_threads: int = Field(default=2, ge=1)
    """Number of threads of one ingress that decode images."""
    playground: bool = True
    """Whether the path `/` serves the playground page."""

    @field_validator("image_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not host or host != host.lower() or not all(part.replace("-", "").isalnum() for part in host.split(".")):
                raise ValueError(f"{host!r} is not a lower-case host name; write for example images.example.com")
        return hosts

    @model_validator(mode="after")
    def _check(self) -> "HttpConfig":
        if self.host not in LOOPBACK and self.keys_file is None:
            raise ValueError(
                f"host is {self.host} and keys_file is not set, so anyone who can reach this address could use the"
                " model; create keys and set keys_file, or listen on 127.0.0.1"
            )
        return self


class CanaryConfig(StrictModel):
    """Canary deployment: a second model that receives a fraction of the traffic and is compared with the first."""

    model: ServedModelConfig
    """Model of the canary (the challenger)."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of the canary's model, as the job's key `reducer`."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the requests that the canary receives."""
    min_requests: int = Field(default=50, ge=1)
    """Smallest number of requests of each model before they are compared."""
    max_error_rate: float = Field(default=0.02, ge=0, le=1)
    """Largest difference between the error rates of canary and champion."""
    max_latency_ratio: float = Field(default=1.5, gt=0)
    """Largest ratio of the canary's median latency to the champion's."""


class TracesConfig(StrictModel):
    """OpenTelemetry traces that Ray Serve records of proxy, ingress and replica."""

    sampling_ratio: float = Field(default=0.01, gt=0, le=1)
    """Fraction of the requests that are traced."""
    exporter: str = ""
    """Import path `module:function` that returns the span processors, as in Ray Serve's `exporter_import_path`.

    Empty: the spans are written to files next to Ray Serve's logs.
    """


class SamplesConfig(StrictModel):
    """Samples of answered requests that are stored in MLflow for inspection."""

    ratio: float = Field(default=0.01, gt=0, le=1)
    """Fraction of the answered requests that is stored."""
    texts: bool = False
    """Whether question, answer and image hashes are stored as well.

    Everyone with access to the MLflow store can then read what clients sent.
    """


class ServeJob(StrictModel):
    """Job file of one endpoint: a model, its budgets, and the limits of requests."""

    kind: Literal["serve"]
    """Kind of the job."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name of the job, which is also the model name in requests."""
    model: ServedModelConfig = ServedModelConfig()
    """Model to serve."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of a model without compression, as in an evaluate job.

    null: the reducer that a registered version was promoted with; else none, and the connector produces each budget.
    """
    canary: CanaryConfig | None = None
    """Canary deployment of a challenger; null: none."""
    budgets: ServedBudgets = ServedBudgets()
    """Budgets of the endpoint, and the policy that chooses among them."""
    engine: EngineConfig = EngineConfig()
    """Inference engine of each replica."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Number and resources of the model replicas."""
    limits: RequestLimits = RequestLimits()
    """Limits of one request."""
    http: HttpConfig = HttpConfig()
    """HTTP server."""
    detached: bool = False
    """Whether the endpoint is handed over to the cluster and keeps running after the command has ended.

    `parcelray endpoint` shows, updates and stops it.
    """
    traces: TracesConfig | None = None
    """OpenTelemetry traces; null: none."""
    samples: SamplesConfig | None = None
    """Samples of requests that MLflow stores; null: none."""
    tracking: TrackingConfig = Field(default_factory=default_tracking)
    """MLflow store of the model registry (for `models:/...` references) and of the samples."""

    @model_validator(mode="after")
    def _check(self) -> "ServeJob":
        if self.samples is not None and self.tracking.uri is None:
            raise ValueError(
                "samples are stored in MLflow, but tracking.uri is null; set tracking.uri or remove samples"
            )
        sections = {"": (self.model, self.reducer)}
        if self.canary is not None:
            sections["canary."] = (self.canary.model, self.canary.reducer)
        for section, (model, reducer) in sections.items():
            if model.connector is not None and reducer is not None:
                raise ValueError(
                    f"{section}model.connector and {section}reducer exclude each other, as a reducer takes all patch"
                    " tokens; remove one of them"
                )
        if self.canary is not None and isinstance(self.budgets.policy, InputPolicyConfig):
            raise ValueError(
                "budgets.policy is input, whose predictor belongs to one checkpoint, but canary adds a second one;"
                " remove one of them"
            )
        return self
