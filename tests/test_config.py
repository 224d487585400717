"""The configuration: what is shipped composes, and what cannot work is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import lightning as L
import pytest
from hydra.errors import HydraException

from charlm.config import SampleConfig, TrainConfig, TrainerConfig
from charlm.errors import InputError

ROOT = Path(__file__).parent.parent
CHOICES = sorted(
    path.relative_to(ROOT / "conf").with_suffix("")
    for path in (ROOT / "conf").glob("*/**/*.yaml")
    if "hydra" not in path.parts  # groups of Hydra's own
)
# What charlm gives Lightning's Trainer itself, and what would switch that off; and what is charlm's own.
OURS = {
    "self",
    "logger",
    "callbacks",
    "default_root_dir",
    "use_distributed_sampler",
    "enable_checkpointing",
    "barebones",
}
ALSO_OURS = {"model_registry", "reload_dataloaders_every_n_epochs"}
CHARLM_ONLY = {"capture"}

Composed = Callable[..., TrainConfig]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_shipped_choice_composes(choice: Path, composed: Composed) -> None:
    group, _, name = choice.as_posix().partition("/")
    path = ["data.path=somewhere"] if "path: ???" in (ROOT / "conf" / choice.with_suffix(".yaml")).read_text() else []
    if name == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install -e '.[optuna]'")
    config = composed(f"{group}={name}", *path)
    assert "${" not in str(config.resolved)


def test_help_names_every_shipped_choice() -> None:
    text = (ROOT / "conf" / "train.yaml").read_text().split("template: |")[1]
    names = [choice.as_posix().partition("/")[2] for choice in CHOICES if choice.name != "base"]
    assert [name for name in names if name not in text] == []


def test_the_trainer_takes_every_argument_of_lightnings() -> None:
    lightnings = set(inspect.signature(L.Trainer.__init__).parameters)
    assert {field.name for field in fields(TrainerConfig)} - CHARLM_ONLY == lightnings - OURS - ALSO_OURS


def test_what_is_not_given_to_the_trainer_is_left_to_lightning(composed: Composed) -> None:
    arguments = composed("trainer.accumulate_grad_batches=2").trainer
    assert arguments["accumulate_grad_batches"] == 2
    assert "num_nodes" not in arguments


def test_a_scale_that_sgd_would_count_twice_is_for_other_optimizers(composed: Composed) -> None:
    assert composed("optimizer=sgd").model.one_hot_scale == 1
    assert composed("optimizer=sgd", "model.one_hot_scale=2").model.one_hot_scale == 2
    assert composed("optimizer=rmsprop").model.one_hot_scale == composed().model.one_hot_scale > 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hidden_size=0", "hidden_size=0 must be 1 or more"),
        ("model.num_layers=-1", "num_layers=-1"),
        ("model.dropout=1.5", "dropout=1.5 must be at least 0 and less than 1"),
        ("model.cell=lst", "did you mean lstm"),
        ("model.embedding_size=-1", "embedding_size=-1"),
        ("model.uniform_init=0", "uniform_init=0"),
        ("model.one_hot_scale=0", "one_hot_scale=0"),
        ("model.output_gain=1e5", "output_gain=100000.0"),
        ("optimizer.learning_rate=1e38", "1e30 or less"),
        ("trainer.val_check_interval=0", "val_check_interval=0 must be above 0"),
        ("weight_average.decay=0.9 trainer.precision=bf16-true", "does not go with trainer.precision=bf16-true"),
        ("trainer.log_every_n_steps=0", "log_every_n_steps=0 must be 1 or more"),
        ("data.source=text", "data.source=text is not what data=NAME chose"),
        ("logger.name=csv", "logger.name=csv is not what logger=NAME chose"),
        ("model.parameters=many", "parameters=many must be a number"),
        ("model.parameters=-1M", "parameters=-1M must be a number"),
        ("model.hidden_size=null", "needs model.parameters"),
        ("regularization.hidden_dropout=1", "hidden_dropout=1"),
        ("regularization.activation=-1", "activation=-1"),
        ("weight_average.decay=1", "weight_average.decay=1"),
        ("evaluation.dynamic=rmsprop", "evaluation.dynamic=rmsprop is not one of sgd, rms"),
        ("evaluation.dynamic_decay=1", "dynamic_decay=1"),
        ("evaluation.ngram_order=0", "ngram_order=0"),
        ("optimizer.decay=0", "optimizer.decay=0"),
        ("data.window=0", "window=0"),
        ("data.fractions=[0.5,0.5]", "sum to 1"),
        ("data.fractions=[0.5,0.2,0.2]", "sum to 1"),
        ("data.order=sideways", "data.order=sideways is not one of"),
        ("optimizer.learning_rate=0", "learning_rate=0"),
        ("optimizer.learning_rate=nan", "learning_rate=nan"),
        ("optimizer.betas=[0.9,1.0]", "betas"),
        ("early_stopping.patience=0", "patience=0"),
        ("sampling.temperature=-1", "temperature=-1"),
        ("sampling.temperature=nan", "temperature=nan"),
        ("sampling.temperature=[]", "at least one"),
        ("sampling.temperature=warm", "temperature=warm"),
        ("sampling.top_p=0", "top_p=0"),
        ("sampling.top_k=0", "top_k=0"),
        ("sampling.every_n_steps=0", "every_n_steps=0"),
        ("logger.mode=onlin", "did you mean online"),
        ("seed=-1", "seed=-1"),
        ("model.parameters=1e30", "from 1 to 1e15"),
        ("data.order=streams data.stride=2", "data.stride=2 is of shuffled windows"),
        ("trainer.max_epochs=0", "max_epochs=0 would train nothing"),
        ("trainer.limit_val_batches=0", "limit_val_batches=0"),
        ("trainer.limit_test_batches=some", "limit_test_batches=some must be a number"),
        ("trainer.deterministic=maybe", "deterministic=maybe is not one of"),
        ("logger.project=a/b", "logger.project=a/b must be a name without /"),
        ("logger.project=''", "must be a name"),
        ("++model.hiden_size=3", "did you mean model.hidden_size"),
        ("+sede=3", "did you mean seed"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_name(override: str, says: str, composed: Composed) -> None:
    with pytest.raises(InputError, match=says.replace("[", r"\[")):
        composed(*override.split())


@pytest.mark.parametrize(("written", "meant"), [("500k", 500_000), ("1.2M", 1_200_000), ("1e6", 1_000_000), ("65", 65)])
def test_a_number_of_parameters_stands_in_for_the_hidden_size(written: str, meant: int, composed: Composed) -> None:
    model = composed(f"model.parameters={written}").model
    assert (model.parameters, model.hidden_size) == (meant, None)
    with pytest.raises(InputError, match="not both"):
        composed(f"model.parameters={written}", "model.hidden_size=64")


@pytest.mark.parametrize("name", [choice.as_posix() for choice in CHOICES if choice.parts[0] == "experiment"])
def test_an_experiments_size_gives_way_to_one_that_is_given(name: str, composed: Composed) -> None:
    told = [
        name.replace("/", "=", 1),
        *(["data.path=x"] if "path: ???" in (ROOT / "conf" / f"{name}.yaml").read_text() else []),
    ]
    by_number, by_size = composed(*told, "model.parameters=77k").model, composed(*told, "model.hidden_size=77").model
    assert (by_number.parameters, by_number.hidden_size) == (77_000, None)
    assert (by_size.parameters, by_size.hidden_size) == (None, 77)


@pytest.mark.parametrize(
    "override", ["data.widow=3", "trainer.max_step=3", "data.window=abc", "model=lst", "optimizer.alpha=1"]
)
def test_an_unknown_name_or_a_wrong_type_does_not_compose(override: str, composed: Composed) -> None:
    with pytest.raises(HydraException):
        composed(override)


def test_what_must_be_given_is_asked_for(composed: Composed) -> None:
    with pytest.raises(InputError, match=r"data\.path must be given"):
        composed("data=text")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        *(("num_samples=0", "num_samples=0"), ("length=-1", "length=-1"), ("stop=''", "stop"), ("seed=-2", "seed=-2")),
        ("+lenght=3", "did you mean length"),
    ],
)
def test_sampling_settings_have_bounds_too(
    override: str, says: str, composed_sample: Callable[..., SampleConfig]
) -> None:
    with pytest.raises(InputError, match=says):
        composed_sample(override)
