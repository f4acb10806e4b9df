"""Each diagnosis made to happen, said once, with its settings; and none of them on the runs that went well."""

from pathlib import Path

import pytest

from machinery.config import load_config
from machinery.diagnostics import LONG, Diagnostics
from plot import read_metrics

ROOT = Path(__file__).parent.parent
HEALTHY = {
    "rollout/return_mean": 50.0, "rollout/length_mean": 250.0, "update/clip_fraction": 0.15, "update/approx_kl": 0.02,
    "update/entropy": 0.8, "update/explained_variance": 0.5, "schedule/learning_rate": 1e-3}
TROUBLE = {
    "high clip fraction": (
        {"update/clip_fraction": 0.4}, "0.40", ["ppo.learning_rate=0.001", "ppo.update_epochs=4", "num_minibatches=8"]),
    "low clip fraction": (
        {"update/clip_fraction": 0.004}, "0.004", ["ppo.learning_rate", "ppo.update_epochs", "ppo.num_minibatches"]),
    "KL": ({"update/approx_kl": 0.5}, "0.50", ["ppo.learning_rate", "ppo.target_kl", "ppo.update_epochs"]),
    "entropy": ({"update/entropy": 0.05}, "0.05", ["ppo.entropy_coef=0.01", "ppo.learning_rate", "ppo.update_epochs"]),
    "explained variance": (
        {"update/explained_variance": -0.3}, "-0.30", ["ppo.value_coef", "ppo.reward_scale", "ppo.learning_rate"]),
    "time": ({"rollout/length_mean": 980.0}, "980", ["ppo.gamma", "ppo.entropy_coef", "env.frame_skip"]),
}


@pytest.fixture
def diagnostics():
    return Diagnostics(load_config())


@pytest.mark.parametrize("name", TROUBLE)
def test_lasting_trouble_is_said_once_with_its_settings(name, diagnostics):
    change, number, settings = TROUBLE[name]
    said = [diagnostics.watch(HEALTHY | change) for _ in range(3 * LONG)]
    assert [bool(sentences) for sentences in said] == [False] * (LONG - 1) + [True] + [False] * 2 * LONG
    ((sentence,),) = (sentences for sentences in said if sentences)
    assert name.split()[-1] in sentence
    assert number in sentence
    assert all(setting in sentence for setting in settings)
    assert "\n" not in sentence


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_passes_is_not_told(name, diagnostics):
    change = TROUBLE[name][0]
    for i in range(10 * LONG):
        assert not diagnostics.watch(HEALTHY if i % LONG == 0 else HEALTHY | change)


@pytest.mark.parametrize(("change", "why"), [
    ({"update/clip_fraction": 0.0, "schedule/learning_rate": 1e-5}, "at the end of annealing"),
    ({"update/clip_fraction": 0.0, "rollout/return_mean": 230.0}, "once it lands"),
    ({"update/entropy": 0.1, "rollout/return_mean": 230.0}, "once it lands"),
    ({"update/explained_variance": float("nan"), "rollout/return_mean": float("nan"),
      "rollout/length_mean": float("nan"), "update/clip_fraction": 0.01}, "before the first episode has ended"),
])
def test_what_is_no_trouble_is_not_told(change, why, diagnostics):
    for _ in range(2 * LONG):
        assert diagnostics.watch(HEALTHY | change) == [], why


@pytest.mark.parametrize("run", sorted(path.parent for path in (ROOT / "results").glob("*/metrics.csv")),
                         ids=lambda run: run.name)
def test_runs_that_went_well_raise_no_alarm(run):
    diagnostics, metrics = Diagnostics(load_config(run / "config.yaml")), read_metrics(run)
    for i in range(len(metrics["frames"])):
        assert diagnostics.watch({key: column[i] for key, column in metrics.items()}) == []
