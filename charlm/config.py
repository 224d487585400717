"""The configuration's names, types and bounds. The values are in conf/.

Hydra composes conf/ over these dataclasses, so that an unknown key or a wrong type stops before anything starts;
`TrainConfig.of` and `SampleConfig.of` turn what it composed into real objects, which check the bounds. Nothing here
imports torch: `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from charlm.errors import InputError, nearest


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise InputError(what)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = nearest(value, choices)
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"{name}={value} is not one of {', '.join(choices)}{hint}")


def _at_least(bound: int, **values: float | None) -> None:
    for name, value in values.items():
        _check(value is None or value >= bound, f"{name}={value} must be {bound} or more")


def _count(name: str, value: Any) -> int:
    """Return the whole number that is written as 500k, 1.2M, 1e6 or 1200000."""
    text = str(value).strip()
    unit = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1.0)
    try:
        number = float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        number = math.nan
    _check(1 <= number <= 1e15, f"{name}={value} must be a number from 1 to 1e15, as 500k, 1.2M or 1e6")
    return round(number)


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    """What every source of text has: how it is split, cut into windows and put into batches."""

    source: str = MISSING
    cache_dir: str | None = MISSING
    split: str = MISSING
    split_seed: int = MISSING
    fractions: list[float] = MISSING
    separator: str | None = MISSING
    vocabulary: str = MISSING
    window: int = MISSING
    stride: int = MISSING
    order: str = MISSING
    batch_size: int = MISSING
    eval_lanes: int | None = MISSING

    def __post_init__(self) -> None:
        _one_of("data.split", self.split, ("contiguous", "ends", "documents", "source", "stream_tail"))
        _one_of("data.vocabulary", self.vocabulary, ("code_points", "torchtext"))
        _one_of("data.order", self.order, ("shuffled", "streams"))
        _check(
            len(self.fractions) == 3
            and math.isclose(sum(self.fractions), 1.0, abs_tol=1e-6)
            and self.fractions[0] > 0
            and self.fractions[1] > 0
            and self.fractions[2] >= 0,
            f"data.fractions={self.fractions} must be shares of train, val and test that sum to 1; test alone may be 0",
        )
        _at_least(
            1,
            **{
                "data.window": self.window,
                "data.stride": self.stride,
                "data.batch_size": self.batch_size,
                "data.eval_lanes": self.eval_lanes,
            },
        )
        _check(
            self.order == "shuffled" or self.stride == 1,
            f"data.stride={self.stride} is of shuffled windows; streams read every character once, so leave it at 1",
        )
        for name in ("batch_size", "eval_lanes"):
            value = getattr(self, name)
            _check(value is None or value <= 1_000_000, f"data.{name}={value} must be 1,000,000 or less")


@dataclass
class PythonDocsConfig(DataConfig):
    """The English prose of Python's own reference, which comes with every CPython."""


@dataclass
class TextConfig(DataConfig):
    """Text files: one document a file."""

    path: Any = MISSING  # a file, folder or glob pattern, or a list of them
    encoding: str = MISSING
    max_expansion: float = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = self.path if isinstance(self.path, list) else [self.path]
        _check(
            bool(paths) and all(isinstance(p, str) and p for p in paths), "data.path must name a file, folder or glob"
        )
        _check(self.max_expansion >= 1, f"data.max_expansion={self.max_expansion} must be 1 or more")


@dataclass
class CsvConfig(TextConfig):
    """Tables: one document a row, made of the columns chosen (numbers from 0, or names where there is a header)."""

    columns: list[Any] = MISSING
    header: bool = MISSING
    delimiter: str = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            bool(self.columns) and all(isinstance(c, str) or (type(c) is int and c >= 0) for c in self.columns),
            f"data.columns={self.columns} must list columns by number (from 0) or by name",
        )
        _check(len(self.delimiter) == 1, f"data.delimiter={self.delimiter!r} must be one character")


@dataclass
class JsonlConfig(TextConfig):
    """JSON lines: one document a line, a field of the object that stands there."""

    field: str = MISSING


@dataclass
class AgNewsConfig(DataConfig):
    """AG News, downloaded or from a folder: see charlm/ag_news.py."""

    path: str | None = MISSING


@dataclass
class TorchtextConfig(DataConfig):
    """A text dataset of torchtext's: see charlm/torchtext_bridge.py."""

    dataset: str = MISSING
    path: str | None = MISSING
    fields: list[int] | None = MISSING
    options: Any = MISSING  # further arguments of the dataset's function, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.fields is None or (bool(self.fields) and min(self.fields) >= 0),
            f"data.fields={self.fields} must list parts of an item by number, from 0; null takes those that are text",
        )
        _check(
            self.options is None or isinstance(self.options, dict),
            f"data.options={self.options} must be names and values, as in data.options={{language_code: de}}",
        )


@dataclass
class HuggingFaceConfig(DataConfig):
    """A dataset of Hugging Face's: see charlm/huggingface.py."""

    path: str = MISSING
    name: str | None = MISSING
    revision: str | None = MISSING
    files: Any = MISSING  # a file, pattern or list of them, or those of each split by its name
    columns: list[str] = MISSING
    splits: Any = MISSING  # by ours (train, val, test), the names of theirs
    streaming: bool = MISSING
    documents: int | None = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.columns), "data.columns=[] must name at least one column")
        ours = set(self.splits) if isinstance(self.splits, dict) else set()
        _check(
            self.splits is None or {"train"} <= ours <= {"train", "val", "test"},
            f"data.splits={self.splits} must say what train is, and may say what val and test are, as in "
            "data.splits={train: train, val: validation}",
        )
        _at_least(1, **{"data.documents": self.documents})


# --- model and optimizer ------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """The network: see charlm/network.py."""

    cell: str = MISSING
    hidden_size: int | None = MISSING
    parameters: Any = MISSING  # 1200000, 1.2M or 500k: chooses the hidden size; null where that is given
    num_layers: int = MISSING
    dropout: float = MISSING
    embedding_size: int | None = MISSING
    one_hot_scale: float = MISSING
    tied: bool = MISSING
    output_gain: float | None = MISSING
    uniform_init: float | None = MISSING

    def __post_init__(self) -> None:
        _one_of("model.cell", self.cell, ("lstm", "gru", "rnn"))
        _at_least(1, **{"model.hidden_size": self.hidden_size, "model.num_layers": self.num_layers})
        _check(self.num_layers <= 1000, f"model.num_layers={self.num_layers} must be 1000 or less")
        _check(
            (self.hidden_size is None) != (self.parameters is None),
            "give model.hidden_size or model.parameters, which chooses it, not both"
            if self.hidden_size
            else "model.hidden_size=null needs model.parameters=NUMBER, which chooses it",
        )
        for name in ("one_hot_scale", "output_gain", "uniform_init"):
            value = getattr(self, name)
            _check(value is None or 0 < value <= 1e4, f"model.{name}={value} must be above 0, and 1e4 or less")
        self.parameters = None if self.parameters is None else _count("model.parameters", self.parameters)
        _at_least(0, **{"model.embedding_size": self.embedding_size})
        _check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be at least 0 and less than 1")
        _check(
            not self.tied or self.embedding_size in (None, self.hidden_size),
            f"model.tied=true makes input and output one matrix, so model.embedding_size={self.embedding_size} must be "
            "what model.hidden_size is; leave it null",
        )


@dataclass
class RegularizationConfig:
    """What keeps a network from learning a small text by heart: see charlm/regularization.py."""

    input_dropout: float = MISSING
    hidden_dropout: float = MISSING
    output_dropout: float = MISSING
    embedding_dropout: float = MISSING
    weight_dropout: float = MISSING
    activation: float = MISSING
    temporal_activation: float = MISSING

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            share = not name.endswith("activation")
            _check(
                0 <= value < (1 if share else math.inf),
                f"regularization.{name}={value} must be at least 0{' and less than 1' if share else ''}",
            )


@dataclass
class OptimizerConfig:
    """What every optimizer has: a rate, its schedule and weight decay."""

    name: str = MISSING
    learning_rate: float = MISSING
    weight_decay: float = MISSING
    schedule: str = MISSING
    warmup_steps: int = MISSING
    decay: float = MISSING
    decay_after: int = MISSING

    def __post_init__(self) -> None:
        _check(
            0 < self.learning_rate <= 1e30,  # from about 1e37 on a step itself overflows
            f"optimizer.learning_rate={self.learning_rate} must be above 0, and 1e30 or less",
        )
        _check(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            f"optimizer.weight_decay={self.weight_decay} must be 0 or more",
        )
        _one_of("optimizer.schedule", self.schedule, ("cosine", "constant", "exponential"))
        _at_least(0, **{"optimizer.warmup_steps": self.warmup_steps, "optimizer.decay_after": self.decay_after})
        _check(0 < self.decay <= 1, f"optimizer.decay={self.decay} must be above 0 and at most 1")


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam and AdamW."""

    betas: list[float] = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("optimizer.name", self.name, ("adam", "adamw"))
        _check(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas={self.betas} must be two numbers, each at least 0 and less than 1",
        )


@dataclass
class RMSpropConfig(OptimizerConfig):
    """RMSProp."""

    alpha: float = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("optimizer.name", self.name, ("rmsprop",))
        _check(0 <= self.alpha < 1, f"optimizer.alpha={self.alpha} must be at least 0 and less than 1")


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("optimizer.name", self.name, ("sgd",))
        _check(0 <= self.momentum < 1, f"optimizer.momentum={self.momentum} must be at least 0 and less than 1")


# --- trainer, callbacks, trackers ---------------------------------------------------------------------------------


@dataclass
class TrainerConfig:
    """Every argument of Lightning's Trainer that is not charlm's to give; one that is left out has Lightning's default.

    And two of ours: `capture`, and the value "auto" of `precision`.

    charlm gives callbacks, logger, default_root_dir and use_distributed_sampler (its windows know their rank), and
    leaves out what would switch those off, or make each epoch the first again (reload_dataloaders_every_n_epochs).
    """

    accelerator: Any = MISSING
    strategy: Any = MISSING
    devices: Any = MISSING
    num_nodes: int = MISSING
    precision: Any = MISSING
    fast_dev_run: Any = MISSING
    max_epochs: int | None = MISSING
    min_epochs: int | None = MISSING
    max_steps: int = MISSING
    min_steps: int | None = MISSING
    max_time: Any = MISSING
    limit_train_batches: Any = MISSING
    limit_val_batches: Any = MISSING
    limit_test_batches: Any = MISSING
    limit_predict_batches: Any = MISSING
    overfit_batches: Any = MISSING
    val_check_interval: Any = MISSING
    check_val_every_n_epoch: int | None = MISSING
    num_sanity_val_steps: int = MISSING
    log_every_n_steps: int | None = MISSING
    enable_progress_bar: bool | None = MISSING
    enable_model_summary: bool | None = MISSING
    accumulate_grad_batches: int = MISSING
    gradient_clip_val: float | None = MISSING
    gradient_clip_algorithm: str | None = MISSING
    deterministic: Any = MISSING
    benchmark: bool | None = MISSING
    inference_mode: bool = MISSING
    profiler: Any = MISSING
    detect_anomaly: bool = MISSING
    plugins: Any = MISSING
    sync_batchnorm: bool = MISSING
    enable_autolog_hparams: bool = MISSING
    capture: Any = MISSING  # not Lightning's: whether the step is one CUDA graph, see charlm/capture.py


@dataclass
class EarlyStoppingConfig:
    """When training ends before its budget."""

    patience: int | None = MISSING  # validations without a better val/loss; null: never

    def __post_init__(self) -> None:
        _at_least(1, **{"early_stopping.patience": self.patience})


@dataclass
class WeightAverageConfig:
    """A moving average of the weights: see charlm/averaging.py."""

    decay: float | None = MISSING

    def __post_init__(self) -> None:
        _check(
            self.decay is None or 0 <= self.decay < 1,
            f"weight_average.decay={self.decay} must be at least 0 and less than 1",
        )


@dataclass
class EvaluationConfig:
    """What stands beside the test figure: see charlm/baselines.py and charlm/dynamic.py."""

    ngram_order: int = MISSING
    baselines_up_to: int = MISSING
    dynamic: str | None = MISSING
    dynamic_learning_rate: float | None = MISSING
    dynamic_decay: float = MISSING
    dynamic_window: int = MISSING

    def __post_init__(self) -> None:
        _at_least(1, **{"evaluation.ngram_order": self.ngram_order, "evaluation.dynamic_window": self.dynamic_window})
        _at_least(0, **{"evaluation.baselines_up_to": self.baselines_up_to})
        if self.dynamic is not None:
            _one_of("evaluation.dynamic", self.dynamic, ("sgd", "rms"))
        _check(
            self.dynamic_learning_rate is None or 0 < self.dynamic_learning_rate < math.inf,
            f"evaluation.dynamic_learning_rate={self.dynamic_learning_rate} must be a number above 0",
        )
        _check(
            0 <= self.dynamic_decay < 1,
            f"evaluation.dynamic_decay={self.dynamic_decay} must be at least 0 and less than 1",
        )


@dataclass
class SamplingConfig:
    """How text is drawn from a model."""

    prompt: str = MISSING
    length: int = MISSING
    temperature: Any = MISSING  # one number or a list; 0 is greedy, inf uniform
    top_k: int | None = MISSING
    top_p: float | None = MISSING
    on_unknown: str = MISSING

    section: ClassVar[str] = ""  # where they are set

    def __post_init__(self) -> None:
        at = self.section
        _at_least(0, **{f"{at}length": self.length})
        _at_least(1, **{f"{at}top_k": self.top_k})
        _check(self.top_p is None or 0 < self.top_p <= 1, f"{at}top_p={self.top_p} must be above 0 and at most 1")
        _one_of(f"{at}on_unknown", self.on_unknown, ("error", "replace"))
        _check(bool(self.temperatures), f"{at}temperature=[] must name at least one temperature")

    @property
    def temperatures(self) -> list[float]:
        """The temperatures as a list.

        Raises:
            InputError: one of them is negative or not a number.
        """
        given = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        for value in given:
            _check(
                isinstance(value, int | float) and not isinstance(value, bool) and value >= 0,
                f"{self.section}temperature={value} must be a number, 0 (greedy) or more",
            )
        return [float(value) for value in given]


@dataclass
class TrainSamplingConfig(SamplingConfig):
    """Samples while training."""

    section = "sampling."
    every_n_steps: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, **{"sampling.every_n_steps": self.every_n_steps})


@dataclass
class LoggerConfig:
    """Where curves and samples go besides the run's own folder."""

    name: str = MISSING


@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases."""

    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    tags: list[str] = MISSING
    mode: str | None = MISSING
    dir: str | None = MISSING
    log_model: bool = MISSING

    def __post_init__(self) -> None:
        if self.mode is not None:
            _one_of("logger.mode", self.mode, ("online", "offline", "disabled"))
        elif mode := os.environ.get("WANDB_MODE"):  # which W&B would read once the run has begun
            _one_of("WANDB_MODE", mode, ("online", "offline", "disabled", "shared", "dryrun", "run"))
        refused = [character for character in "/\\#?%:" if character in self.project]
        _check(
            bool(self.project) and not refused,
            f"logger.project={self.project} must be a name without {' '.join(refused)}, as W&B has it"
            if refused
            else "logger.project= must be a name",
        )


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass
class TrainSchema:
    """What Hydra composes for `train.py`."""

    seed: int = MISSING
    on_nonfinite: str = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    regularization: RegularizationConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    trainer: TrainerConfig = MISSING
    weight_average: WeightAverageConfig = MISSING
    early_stopping: EarlyStoppingConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    sampling: TrainSamplingConfig = MISSING
    logger: LoggerConfig = MISSING


@dataclass
class TrainConfig:
    """All that `train.py` can be told."""

    seed: int
    on_nonfinite: str  # what to do at a loss or gradient that is not finite: "stop" or "skip" its step; see finite.py
    data: DataConfig
    model: ModelConfig
    regularization: RegularizationConfig
    optimizer: OptimizerConfig
    trainer: dict[str, Any]  # the arguments of Lightning's Trainer that were given
    capture: str | bool  # whether the step is one CUDA graph: "auto", True or False
    weight_average: WeightAverageConfig
    early_stopping: EarlyStoppingConfig
    evaluation: EvaluationConfig
    sampling: TrainSamplingConfig
    logger: LoggerConfig
    resolved: dict[str, Any]  # the same as plain values, for the run's folder and the trackers

    @classmethod
    def of(cls, cfg: DictConfig) -> TrainConfig:
        """Turn what Hydra composed into checked objects.

        Raises:
            InputError: a value that is missing or out of its bounds.
        """
        _refuse_added(cfg, TrainSchema)
        trainer = {
            str(key): _plain(cfg.trainer[key]) for key in cfg.trainer if not OmegaConf.is_missing(cfg.trainer, key)
        }
        apart = ("trainer", "capture", "resolved")
        sections = {name: _object(cfg, name) for name in cls.__annotations__ if name not in apart}
        resolved = {
            name: section if isinstance(section, int | str) else asdict(section) for name, section in sections.items()
        }
        arguments = {name: value for name, value in trainer.items() if name != "capture"}
        capture = trainer.get("capture", "auto")
        return cls(**sections, trainer=arguments, capture=capture, resolved={**resolved, "trainer": trainer})

    @property
    def run_name(self) -> str:
        """What a sweep calls the run's folder: the network, and a digest of all that its training is told."""
        told = {name: value for name, value in self.resolved.items() if name not in ("sampling", "logger")}
        told["data"] = {name: value for name, value in told["data"].items() if name != "cache_dir"}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        size = self.model.hidden_size or self.model.parameters
        return f"{self.model.cell}-{size}x{self.model.num_layers}_{digest}"

    def __post_init__(self) -> None:
        _check(
            self.capture == "auto" or isinstance(self.capture, bool),
            f"trainer.capture={self.capture} is not one of auto, true, false",
        )
        _check(0 <= self.seed < 2**32, f"seed={self.seed} must be at least 0 and less than 2**32")
        _one_of("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        precision = self.trainer.get("precision")
        _check(
            self.weight_average.decay is None or precision not in ("bf16-true", "16-true"),
            f"weight_average.decay does not go with trainer.precision={precision}, which would round away what a step "
            "adds to the average; choose bf16-mixed, 16-mixed or 32-true",
        )
        for group, key in (("data", "source"), ("logger", "name")):
            section = getattr(self, group)
            chosen = getattr(section, key)
            _check(
                SCHEMAS[group].get(chosen) is type(section),
                f"{group}.{key}={chosen} is not what {group}=NAME chose; leave it out",
            )
        _at_least(1, **self._given("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps"))
        _at_least(0, **self._given("min_steps", "min_epochs", "gradient_clip_val"))
        _at_least(-1, **self._given("max_steps", "max_epochs", "num_sanity_val_steps"))
        for name, value in self._given("max_steps", "max_epochs").items():
            _check(value != 0, f"{name}=0 would train nothing; set it to 1 or more, or to -1 for no bound")
        for name, value in self._given("limit_train_batches", "limit_val_batches", "limit_test_batches").items():
            _check(
                isinstance(value, int | float | None),
                f"{name}={value} must be a number: batches, or a share of them such as 0.5",
            )
        for name, value in self._given("limit_train_batches", "limit_val_batches").items():
            _check(value != 0, f"{name}=0 would leave nothing to train on, or to choose the best checkpoint by")
        interval = self.trainer.get("val_check_interval")
        _check(
            not isinstance(interval, int | float) or interval > 0,
            f"trainer.val_check_interval={interval} must be above 0: steps, or with trainer.check_val_every_n_epoch=1 "
            "a share of an epoch such as 0.5",
        )
        _check(
            not isinstance(interval, float) or self.trainer.get("check_val_every_n_epoch") is not None,
            f"trainer.val_check_interval={interval} is a share of an epoch; give trainer.check_val_every_n_epoch=1 too",
        )
        deterministic = self.trainer.get("deterministic")
        _check(
            deterministic in (None, True, False, "warn"),
            f"trainer.deterministic={deterministic} is not one of true, false, warn",
        )
        if self.trainer.get("gradient_clip_algorithm") is not None:
            _one_of("trainer.gradient_clip_algorithm", self.trainer["gradient_clip_algorithm"], ("norm", "value"))
        _check(
            isinstance(self.trainer.get("max_time"), str | dict | None),
            f"trainer.max_time={self.trainer.get('max_time')} must be a text such as 00:01:30:00 (days, hours, ...)",
        )

    def _given(self, *names: str) -> dict[str, Any]:
        return {f"trainer.{name}": self.trainer.get(name) for name in names}


@dataclass
class SampleConfig(SamplingConfig):
    """All that `sample.py` can be told."""

    checkpoint: str | None = MISSING
    runs: str = MISSING
    prompt_file: str | None = MISSING
    num_samples: int = MISSING
    seed: int = MISSING
    stop: str | None = MISSING
    output: str | None = MISSING
    device: str = MISSING
    weights: str = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("weights", self.weights, ("auto", "float32", "int8"))
        _at_least(1, num_samples=self.num_samples)
        _at_least(0, seed=self.seed)
        _check(self.prompt_file is None or not self.prompt, "give prompt or prompt_file, not both")
        _check(self.stop != "", "stop='' would stop at once; leave it out to write the whole length")

    @classmethod
    def of(cls, cfg: DictConfig) -> SampleConfig:
        """Turn what Hydra composed into a checked object.

        Raises:
            InputError: a value that is missing or out of its bounds.
        """
        _refuse_added(cfg, cls)
        config = _object(OmegaConf.create({"sample": cfg}), "sample")
        assert isinstance(config, cls)
        return config


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _refuse_added(cfg: DictConfig, schema: type, prefix: str = "") -> None:
    """Refuse what `+name=value` added beside the settings that there are: nothing would read it.

    Raises:
        InputError: there is such a setting.
    """
    known = [field.name for field in fields(schema)]
    for key in map(str, cfg):
        if not prefix and key == "hydra":
            continue
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {prefix}{near}?" if near else "see --help for what there is"
            raise InputError(f"there is no setting {prefix}{key}, with a + or without; {hint}")
        kind = OmegaConf.get_type(cfg, key)
        if kind is not None and is_dataclass(kind):
            _refuse_added(cfg[key], kind, f"{prefix}{key}.")


def _object(cfg: DictConfig, name: str) -> Any:
    """Return the dataclass object (or plain value) of one node."""
    try:
        node = cfg[name]
        return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
    except MissingMandatoryValue:
        missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.startswith(name))
        raise InputError(f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE") from None


SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "python_docs": PythonDocsConfig,
        "text": TextConfig,
        "csv": CsvConfig,
        "jsonl": JsonlConfig,
        "ag_news": AgNewsConfig,
        "huggingface": HuggingFaceConfig,
        "torchtext": TorchtextConfig,
    },
    "optimizer": {"adam": AdamConfig, "rmsprop": RMSpropConfig, "sgd": SGDConfig},
    "logger": {"csv": LoggerConfig, "wandb": WandbConfig},
}


def register() -> None:
    """Make the schemas known to Hydra, under the names that conf/ refers to."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    store.store(name="sample_schema", node=SampleConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("unless", lambda other, value: value if other is None else None, replace=True)
    OmegaConf.register_new_resolver("either", lambda first, second: second if first is None else first, replace=True)
    # Tells apart two runs that start in the same second.
    OmegaConf.register_new_resolver("short_id", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("temporary_folder", _temporary_folder, use_cache=True, replace=True)


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="charlm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run_name(_root_: DictConfig) -> str:
    try:
        return TrainConfig.of(_root_).run_name
    except InputError:
        return "refused"  # the job says why
