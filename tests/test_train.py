"""A run from beginning to end: its folder, its checkpoint, its going on, its trackers."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from charlm import decode_cpu, products
from charlm.checkpoint import open_checkpoint
from charlm.config import TrainConfig
from charlm.errors import InputError
from charlm.generate import Sampler
from charlm.run import Run, newest_completed
from charlm.sampled import Sampled
from charlm.text_metrics import METRICS
from charlm.tracking import wandb_mode
from train import train

Composed = Callable[..., TrainConfig]


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the metrics of a run but its speed, which no two runs share."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        del row["characters_per_second"]
    return found


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


@pytest.fixture(scope="module")
def run(composed: Composed, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished small run."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    train(composed(*tiny), folder)
    return folder


def test_a_run_keeps_what_it_was_told_and_what_it_came_to(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names == {
        *(".lock", "config.yaml", "metrics.csv", "samples.jsonl", "result.json", "text.json"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"),
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["hidden_size"] == 16
    assert result(run)["status"] == "completed"
    assert (result(run)["val/unseen_characters"], result(run)["test/unseen_characters"]) == (0, 0)


def test_metrics_agree_with_the_result(run: Path) -> None:
    found = rows(run)
    assert [row["step"] for row in found if row["train/loss"]] == ["5", "10", "15", "20"]
    validated = {row["step"]: float(row["val/loss"]) for row in found if row["val/loss"]}
    assert list(validated) == ["10", "20"]
    assert result(run)["val/loss"] == pytest.approx(min(validated.values()), rel=1e-6)
    tested = next(row for row in found if row["test/loss"])
    assert float(tested["test/bpc"]) == pytest.approx(float(tested["test/loss"]) / math.log(2))
    assert float(tested["test/bpb"]) == pytest.approx(float(tested["test/bpc"]))  # an ASCII text
    assert float(tested["test/loss_standard_error"]) > 0


def test_samples_come_greedy_and_at_each_temperature_while_training_and_from_the_best(run: Path) -> None:
    found = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["temperature"]) for row in found] == [
        *((10, 0.0), (10, 0.5), (10, 1.0)),
        *((20, 0.0), (20, 0.5), (20, 1.0)),
    ]
    assert {len(row["text"]) for row in found} == {30}
    assert ["entropy" in row for row in found] == [False] * 3 + [True] * 3  # only those of the best are measured
    assert all(0 <= row[name] <= 1 for row in found[3:] for name in ("loop_rate", "distinct_4grams", "copied"))


@pytest.mark.skipif(not products.Int8.agrees(16, 64), reason="needs instructions for whole numbers of 8 bits")
def test_a_large_network_draws_in_8_bits_while_training_what_it_draws_so_later_and_no_loss_differs(
    run: Path,
    composed: Composed,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(decode_cpu, "LARGE", 1)
    caplog.set_level(logging.INFO)
    train(composed(*tiny), tmp_path / "run")
    assert "samples with weights=int8" in caplog.text
    assert rows(tmp_path / "run") == rows(run)
    found = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()][-3:]
    model = open_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    temperatures = [row["temperature"] for row in found]

    def texts(weights: str, samples: int, length: int = 30) -> list[str]:
        sampler = Sampler(model.network, model.vocabulary, weights=weights)
        return sampler.texts([], length, temperatures * samples, [(1, i // 3) for i in range(3 * samples)])[:3]

    assert [row["text"] for row in found] == texts("auto", 1) == texts("int8", 20)
    assert texts("int8", 1, length=3000) != texts("float32", 1, length=3000)  # a short text may be the same


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_is_plain_values_and_suffices(run: Path, name: str) -> None:
    path = run / "checkpoints" / f"{name}.ckpt"
    content = torch.load(path, weights_only=True)
    model = open_checkpoint(path)
    assert content["hyper_parameters"]["symbols"] == model.vocabulary.symbols
    assert all(torch.equal(content["state_dict"][key], value) for key, value in model.state_dict().items())


def test_a_completed_run_is_not_run_again(
    run: Path, composed: Composed, tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = (run / "metrics.csv").read_bytes()
    with caplog.at_level(logging.INFO, "charlm"):
        assert train(composed(*tiny), run) == pytest.approx(result(run)["val/loss"])
    assert "is complete" in caplog.text
    assert (run / "metrics.csv").read_bytes() == before


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    run: Path, composed: Composed, tiny: list[str]
) -> None:
    with pytest.raises(InputError, match=r"model\.hidden_size: 16 there, 17 now"):
        train(composed(*tiny, "model.hidden_size=17"), run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("config.yaml", "a: ["),
            ("config.yaml", "- a"),
            ("result.json", "{"),
            ("result.json", "[]"),
            ("result.json", '{"status": "completed"}'),
            ("result.json", '{"status": "completed", "val/loss": null}'),
            ("result.json", '{"status": "completed", "val/loss": "1.5"}'),
            ("metrics.csv", ""),
            ("text.json", "[]"),
        ),
        ("sampled/0.7_x.yaml", "temperature: ["),
    ],
)
def test_a_damaged_file_of_a_runs_folder_is_named(
    name: str, content: str, run: Path, composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "sampled").mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{folder / name} is damaged")):
        train(composed(*tiny, "sampling.temperature=0.7"), folder)


def test_a_finished_run_writes_at_other_settings_and_is_not_trained_again(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(composed(*tiny), folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = composed(*tiny, "sampling.temperature=[0.5,1.7]", "sampling.prompt=The")
    for _ in range(2):
        assert train(other, folder) == result(folder)["val/loss"]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.suffix for path in (folder / "sampled").iterdir()) == [".jsonl", ".yaml"]
    (file,) = (folder / "sampled").glob("*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["temperature"], row["prompt"]) for row in found] == [(20, 0.5, "The"), (20, 1.7, "The")]
    assert all(METRICS[0] in row for row in found)


def test_a_finished_run_writes_also_where_its_text_is_gone_and_then_measures_less(
    composed: Composed, tiny: list[str], text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    folder = tmp_path / "run"
    told = [*tiny, f"data.path={text}"]
    train(composed(*told), folder)
    text.unlink()
    train(composed(*told, "sampling.temperature=2"), folder)
    (file,) = (folder / "sampled").glob("2_*.jsonl")
    (row,) = map(json.loads, file.read_text().splitlines())
    assert "loop_rate" in row
    assert "copied" not in row
    assert "copies and real words are not measured" in caplog.text


def test_what_was_asked_of_a_training_beforehand_it_writes_at_its_end(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    """And the same text as when it is asked afterwards, from the checkpoint."""
    asked = composed(*tiny, "sampling.temperature=0.7").resolved["sampling"]
    before, after = tmp_path / "before", tmp_path / "after"
    Sampled(before).ask([asked])
    train(composed(*tiny), before)
    train(composed(*tiny), after)
    train(composed(*tiny, "sampling.temperature=0.7"), after)
    assert Sampled(before).rows_file(asked).read_text() == Sampled(after).rows_file(asked).read_text()
    assert not list(Sampled(before).asked())


def test_a_second_process_waits_for_the_one_that_trains_in_a_folder(
    composed: Composed, tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as both:
        ended = list(both.map(lambda _: program("train.py", *tiny, "hydra.run.dir=run"), range(2)))
    assert [done.returncode for done in ended] == [0, 0]
    assert sum("is complete" in done.stdout for done in ended) == 1
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["10", "20"]


def test_a_result_is_json_whatever_its_figures(tmp_path: Path) -> None:
    Run(tmp_path, {}).complete({"val/loss": 1.5, "test/loss_dynamic": math.nan, "test/bpc_dynamic": math.inf})
    found = result(tmp_path)
    assert (found["val/loss"], found["test/loss_dynamic"], found["test/bpc_dynamic"]) == (1.5, None, None)


def test_the_newest_completed_run_is_found(run: Path) -> None:
    assert newest_completed(run.parent) == run
    damaged = Path(shutil.copytree(run, run.with_name("damaged")))
    (damaged / "result.json").write_text('{"status": "completed"}')
    assert newest_completed(run.parent) == run
    shutil.rmtree(damaged)
    assert newest_completed(run / "checkpoints") is None


def test_the_same_seed_gives_the_same_run(run: Path, composed: Composed, tiny: list[str], tmp_path: Path) -> None:
    train(composed(*tiny), tmp_path / "again")
    assert rows(tmp_path / "again") == rows(run)
    assert (tmp_path / "again" / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


class _Fail(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 13:
            raise RuntimeError("the power went out")


REGULARIZED = ("weight_average.decay=0.9", "regularization.hidden_dropout=0.3", "regularization.weight_dropout=0.3")


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("more", [(), REGULARIZED], ids=["plain", "regularized"])
def test_a_run_that_failed_goes_on_as_if_it_had_not(
    order: str,
    more: tuple[str, ...],
    composed: Composed,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = composed(*tiny, f"data.order={order}", "model.dropout=0.3", "model.num_layers=2", *more)
    train(config, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        fit = L.Trainer.fit

        def fit_and_fail(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.callbacks.append(_Fail())  # type: ignore[attr-defined]
            fit(trainer, *args, **kwargs)

        patch.setattr(L.Trainer, "fit", fit_and_fail)
        with pytest.raises(RuntimeError, match="the power went out"):
            train(config, tmp_path / "disturbed")
    assert result(tmp_path / "disturbed")["status"] == "failed"
    assert "the power went out" in result(tmp_path / "disturbed")["error"]
    train(config, tmp_path / "disturbed")
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("undisturbed", "disturbed")
    ]
    for kind in ("state_dict", "training_weights"):
        assert all(torch.equal(value, ends[1][kind][key]) for key, value in ends[0].get(kind, {}).items())
    steps = [[row["step"] for row in rows(tmp_path / name)] for name in ("undisturbed", "disturbed")]
    assert steps[0] == steps[1]


def test_without_a_test_split_the_run_ends_with_its_validation(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    loss = train(composed(*tiny, "data.fractions=[0.9,0.1,0]"), tmp_path / "run")
    assert result(tmp_path / "run")["val/loss"] == pytest.approx(loss)
    assert "test/loss" not in result(tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["10", "20"]


def test_an_interval_of_the_log_that_is_left_to_lightning_is_its_own(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    train(composed(*tiny, "trainer.log_every_n_steps=null", "trainer.max_steps=55"), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if row["train/loss"]] == ["50"]


def test_a_validation_before_the_first_step_is_a_trial_and_no_figure(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    train(composed(*tiny, "trainer.num_sanity_val_steps=2", "weight_average.decay=0.9"), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["10", "20"]


def test_validation_at_a_batch_that_no_epoch_has_is_refused(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    never = ("trainer.val_check_interval=100000", "trainer.check_val_every_n_epoch=1")
    with pytest.raises(InputError, match="val_check_interval=100000 is more than the"):
        train(composed(*tiny, *never), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_last_steps_are_validated_whatever_the_interval(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    train(composed(*tiny, "trainer.max_steps=14", "trainer.val_check_interval=10"), tmp_path / "steps")
    assert [row["step"] for row in rows(tmp_path / "steps") if row["val/loss"]] == ["10", "14"]
    epochs = ("trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.limit_train_batches=12")
    train(composed(*tiny, *epochs), tmp_path / "epochs")
    assert [row["step"] for row in rows(tmp_path / "epochs") if row["val/loss"]] == ["10", "12"]
    train(composed(*tiny, "trainer.max_steps=5", "trainer.min_epochs=3"), tmp_path / "at_least")
    assert [row["step"] for row in rows(tmp_path / "at_least") if row["val/loss"]] == ["5"]
    train(composed(*tiny, *epochs, "trainer.check_val_every_n_epoch=2"), tmp_path / "every_second")
    assert [row["step"] for row in rows(tmp_path / "every_second") if row["val/loss"]] == ["12"]


def test_training_stops_early_when_the_loss_no_longer_falls(
    composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    # At a rate of nothing the loss stays: the second validation is no better than the first.
    still = ("early_stopping.patience=1", "optimizer.learning_rate=1e-30", "trainer.max_steps=100")
    train(composed(*tiny, *still), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["10", "20"]


def test_what_is_validated_and_kept_is_the_average_of_the_weights(
    composed: Composed, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(pl_module: L.LightningModule) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.trained: list[dict[str, torch.Tensor]] = []
            self.validated: dict[str, torch.Tensor] = {}

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.trained.append(weights(pl_module))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.trained.append(weights(pl_module))

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.validated = weights(pl_module)

    watch, fit = Watch(), L.Trainer.fit

    def fit_and_watch(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        fit(trainer, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "fit", fit_and_watch)
    train(composed(*tiny, "weight_average.decay=0.8"), tmp_path / "run")
    average = watch.trained[0]
    for step, trained in enumerate(watch.trained[1:], 1):
        decay = min(0.8, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * trained[name] for name, value in average.items()}
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in average.items():
        torch.testing.assert_close(kept["state_dict"][name], value)
        assert torch.equal(kept["state_dict"][name], watch.validated[name])
        assert torch.equal(kept["training_weights"][name], watch.trained[-1][name])
        assert not torch.equal(kept["state_dict"][name], kept["training_weights"][name])


def test_the_test_figure_stands_beside_others(
    composed: Composed, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "charlm"):
        train(composed(*tiny, "evaluation.dynamic=sgd"), tmp_path / "run")
    found = result(tmp_path / "run")
    assert found["test/loss_dynamic"] != found["test/loss"]
    assert {name for name in found if name.startswith("baseline/")} == {
        *("baseline/ngram_order", "baseline/ngram_loss", "baseline/ngram_bpc"),
        *("baseline/bzip2_bpc", "baseline/xz_bpc", "baseline/xz_given_train_bpc"),
    }
    assert f"6-gram {found['baseline/ngram_loss']:.4f} nats" in caplog.text
    train(composed(*tiny, "evaluation.baselines_up_to=100"), tmp_path / "without")
    assert not any(name.startswith("baseline/") for name in result(tmp_path / "without"))


def test_a_run_of_a_number_of_parameters_says_what_size_that_is(
    composed: Composed, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = [override for override in tiny if "hidden_size" not in override]
    with caplog.at_level(logging.INFO, "charlm"):
        train(composed(*kept, "model.parameters=3k"), tmp_path / "run")
    found = result(tmp_path / "run")
    assert abs(found["parameters"] - 3000) < 100
    assert f"1 x {found['hidden_size']}, {found['parameters']:,} parameters" in caplog.text
    model = open_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert model.network.rnn.hidden_size == found["hidden_size"]


def test_wandb_shows_the_runs_numbers_offline(composed: Composed, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(composed(*tiny, "logger=wandb", "logger.tags=[small]"), folder)
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb = str(Path(sys.executable).with_name("wandb"))
    shown = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", str(offline)], capture_output=True, text=True, check=True
    ).stdout
    run = json.loads(shown)
    last = [row for row in rows(folder) if row["val/loss"]][-1]
    assert float(run["summary"]["val/loss"]) == pytest.approx(float(last["val/loss"]), rel=1e-6)
    assert float(run["summary"]["test/loss"]) == pytest.approx(result(folder)["test/loss"], rel=1e-6)
    assert run["exit_code"] == 0
    assert "${" not in json.dumps(run["config"])
    assert "hidden_size" in json.dumps(run["config"])
    tables = [json.loads(path.read_text()) for path in offline.glob("files/media/table/samples_*.json")]
    assert sum(len(table["data"]) for table in tables) == 6
    assert {tuple(table["columns"]) for table in tables} == {("step", "temperature", "prompt", "text", *METRICS)}
    best = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()][-1]
    assert float(run["summary"]["text/entropy/1"]) == pytest.approx(best["entropy"])


def test_wandb_is_online_by_request_or_credentials_alone(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def mode(*overrides: str) -> str:
        return wandb_mode(composed(*overrides).logger)[0]  # type: ignore[arg-type]

    assert mode() == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    assert mode("logger.mode=online") == "online"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InputError, match=r"WANDB_MODE=ofline is not one of .*; did you mean offline"):
        mode()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"


def test_a_server_out_of_reach_leaves_the_run_offline(
    tiny: list[str], tmp_path: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    nobody = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = program("train.py", *tiny, "logger=wandb", "hydra.run.dir=run", **nobody)
    assert done.returncode == 0, done.stderr
    assert "W&B: offline (online failed" in done.stdout
    assert result(tmp_path / "run")["status"] == "completed"
