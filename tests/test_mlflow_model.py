"""Scores as MLflow's logged models, and the best policy as a model that MLflow loads where this program is not."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import venv
from contextlib import suppress

import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities import LoggedModelOutput

import evaluate
import train
from machinery.checkpoint import build_policy, load_policy, policy_bytes
from machinery.config import ConfigError, load_config
from machinery.flight import KEPT, FlightRecorder
from machinery.mlflow_model import add_files, log_final_scores, log_score, register, save_model, scored_models
from machinery.tracking import KIND, Tracker, connect
from runs import CONFIG, HANGS, ROOT, TINY, rows, wait

SMALL = ["env.shrink_factor=10", "env.frame_skip=10", "env.frame_stack=2", "model.glimpse=16", "model.features=32"]
SELECTION, UNSEEN = "selection seeds 900000-900001", "unseen seeds 1000000-1000001"
REPORT = {"mode": "greedy", "seed": 1000000, "episodes": 2, "return_mean": 7.5, "return_ci95": [6.0, 9.0],
          "landed_rate": 0.5, "solved_rate": 0.0, "returns": [6.0, 9.0]}


def policy_in(folder, frames=512, *overrides):
    """The file of a policy whose actions differ, and its config."""
    torch.manual_seed(4)  # one whose policy takes all four
    config = load_config(CONFIG, [*SMALL, *overrides])
    policy = build_policy(config)
    policy.eye.direction.copy_(torch.tensor([0.33, -0.81, 0.48]))
    torch.nn.init.normal_(policy.actor.weight)
    folder.mkdir(exist_ok=True)
    (folder / "policy.safetensors").write_bytes(policy_bytes(policy, config, frames))
    return folder / "policy.safetensors", config


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The URI of a store, whose tables take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.MlflowClient(uri).create_experiment("lunar-lander", artifact_location=f"{folder}/files")
    return uri


@pytest.fixture
def store(shared, tmp_path, monkeypatch):
    """(client, a new run's id); the store is that of trainings, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared)
    client, experiment = connect(load_config().tracking, tmp_path)
    return client, client.create_run(experiment).info.run_id


class Episode:
    """For `evaluate.play`: the frames and actions of one episode."""

    def __init__(self):
        self.frames, self.actions = [], []

    def begin(self, index, env):
        pass

    def decide(self, index, env, frames, output, row, action):
        self.frames.append(frames.copy())
        self.actions.append(action)

    def end(self, index, env):
        pass


def greedy_episode(file):
    """What evaluate.py sees and does in an episode: (uint8 (T, K, H, W), actions (T,))."""
    policy, config, _ = load_policy(file)
    episode = Episode()
    evaluate.play(policy, config.env, [evaluate.EVALUATION_SEED], rendered=True, recorder=episode)
    actions = np.array(episode.actions)
    assert len(actions) > 5
    assert len(set(actions.tolist())) > 1
    return np.stack(episode.frames), actions


def curve(client, run_id, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_each_score_of_a_run_is_a_logged_model_and_the_best_is_registered(store, tmp_path, monkeypatch):
    # Scores that are about equal are another matter: which of them is kept would hang on this machine's arithmetic.
    monkeypatch.setattr("machinery.run.is_as_good", lambda returns, best: best is None or returns.mean() > best)
    train.main(["--config", str(CONFIG), *TINY, "evaluation.interval=1000", "run.name=x", "tracking.register=trained"])
    client, _ = store
    version = client.get_model_version_by_alias("trained", "champion")
    run_id, report = version.run_id, json.loads((tmp_path / "runs/x/report.json").read_text())
    scores = {int(row["frames"]): float(row["eval/return_mean"]) for row in rows(tmp_path / "runs/x")
              if row["eval/return_mean"] != "nan"}
    models = scored_models(client, run_id)
    assert len(scores) == 3
    assert models.keys() == scores.keys()
    best = max(scores, key=scores.get)  # the first of equal ones
    for frames, model in models.items():
        metrics = {metric.key: metric for metric in model.metrics if metric.key.startswith("eval/")}
        assert (model.name, model.status, model.params["model.features"]) == (f"cnn-{frames:09d}", "READY", "32")
        assert metrics.keys() == {"eval/return_mean", "eval/landed_rate"}
        assert metrics["eval/return_mean"].value == pytest.approx(scores[frames])
        assert {(metric.step, metric.dataset_name) for metric in metrics.values()} == {(frames, SELECTION)}
        final = {metric.key: metric.value for metric in model.metrics if metric.key.startswith("final/")}
        assert bool(final) == (frames == best)
    final = {metric.key: metric.value for metric in models[best].metrics if metric.dataset_name == UNSEEN}
    assert final["final/greedy_return_mean"] == report["return_mean"]
    assert [final[f"final/greedy_return_ci95_{end}"] for end in ("low", "high")] == report["return_ci95"]
    assert "final/sampled_landed_rate" in final
    run = client.get_run(run_id)
    assert {(output.model_id, output.step) for output in run.outputs.model_outputs} == {
        (model.model_id, frames) for frames, model in models.items()}
    assert {given.dataset.name for given in run.inputs.dataset_inputs} == {
        SELECTION, UNSEEN}
    assert curve(client, run_id, "eval/return_mean") == list(scores.items())  # each point once

    ranked = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "metrics.eval/return_mean", "ascending": False}])
    assert [int(model.params["frames"]) for model in ranked][-1] == min(scores, key=scores.get)

    pictures = [artifact.path for artifact in client.list_artifacts(run_id, "images")]
    steps = [int(path.split("+step+")[1].split("+")[0]) for path in pictures if path.endswith(".png")]
    assert sorted(steps) == sorted(scores)

    assert version.source == f"models:/{models[best].model_id}"
    assert float(version.tags["return_mean"]) == report["return_mean"]
    files = {artifact.path for artifact in client.list_logged_model_artifacts(models[best].model_id)}
    assert {"MLmodel", "policy_model.py", "requirements.txt", "code", "artifacts"} <= files
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_score_that_is_told_again_is_there_once(store, tmp_path):
    """By a run that was killed after MLflow had it, or before it had all of it."""
    client, run_id = store
    file, config = policy_in(tmp_path / "x", 512, "tracking.register=twice")
    for _ in range(2):
        log_score(client, run_id, config, 512, {"eval/return_mean": -10.0, "eval/landed_rate": 0.25})
        log_final_scores(client, run_id, config, 512, [REPORT])
        add_files(client, run_id, config, 512, file)
        register(client, run_id, config, 512, 7.5)
    (model,) = scored_models(client, run_id).values()
    for key, value in (("eval/return_mean", -10.0), ("final/greedy_return_mean", 7.5)):
        assert curve(client, run_id, key) == [(512, value)]
        assert [metric.value for metric in model.metrics if metric.key == key] == [value]
    (version,) = client.search_model_versions("name = 'twice'")
    assert version.version == 1

    begun = client.create_logged_model(
        client.get_run(run_id).info.experiment_id, name="begun", source_run_id=run_id, params={"frames": "1024"})
    client.log_outputs(run_id, [LoggedModelOutput(begun.model_id, 1024)])
    log_score(client, run_id, config, 1024, {"eval/return_mean": -5.0})
    assert [found.status for found in scored_models(client, run_id).values()] == ["READY", "READY"]


@pytest.mark.usefixtures("store")
def test_scores_that_mlflow_lacks_are_sent_when_the_run_goes_on(tmp_path):
    nan, config, run_id = float("nan"), load_config(), None
    lost = {"frames": 2, "update/entropy": 1.0, "eval/return_mean": -7.0, "eval/landed_rate": 0.5}
    for again in range(2):
        with Tracker(config, tmp_path, 1, run_id) as tracker:
            run_id = tracker.run_id
            if not again:
                tracker.log({"update/entropy": 1.0, "eval/return_mean": nan, "eval/landed_rate": nan}, 1)
                tracker.log({key: lost[key] for key in list(lost)[1:]}, 2)  # and is killed before it tells of a model
    (model,) = scored_models(tracker.client, run_id).values()
    assert (model.params["frames"], {metric.key: metric.value for metric in model.metrics}) == (
        "2", {"eval/return_mean": -7.0, "eval/landed_rate": 0.5})
    assert curve(tracker.client, run_id, "eval/return_mean") == [(2, -7.0)]


def test_an_environment_without_landings_has_no_landed_rate(store, tmp_path):
    client, run_id = store
    config = load_config(None, ["env.id=CartPole-v1", "model.eye=none", "model.mirror=false"])
    log_score(client, run_id, config, 512, {"eval/return_mean": 20.0})
    log_final_scores(client, run_id, config, 512, [{k: v for k, v in REPORT.items() if k != "landed_rate"}])
    (model,) = scored_models(client, run_id).values()
    assert not [metric.key for metric in model.metrics if "landed" in metric.key]
    assert model.params["env.id"] == "CartPole-v1"


def test_the_alias_moves_only_to_a_better_score(store):
    client, run_id = store
    config = load_config(CONFIG, ["tracking.register=ranked"])
    champions = []
    for frames, score in ((1, 100.0), (2, 90.0), (3, 100.0), (4, 100.5)):
        log_score(client, run_id, config, frames, {"eval/return_mean": score})
        register(client, run_id, config, frames, score)
        champions.append(client.get_model_version_by_alias("ranked", "champion").version)
    assert champions == [1, 1, 1, 4]


def test_registering_needs_a_score_to_decide():
    for without in ("tracking.mlflow=false", "evaluation.episodes=0"):
        with pytest.raises(ConfigError, match=r"tracking\.register=x needs"):
            load_config(None, ["tracking.register=x", without])


def test_an_experiment_is_one_of_training_unless_its_owner_says_another(store, tmp_path):
    client, _ = store
    kinds = (None, "", "genai_development_inferred", "no_inferred_type", "genai_development")
    for number, before in enumerate(kinds):
        if before is not None:
            client.create_experiment(f"kind {number}", tags={KIND: before} if before else {})
        connect(load_config(None, [f"tracking.experiment=kind {number}"]).tracking, tmp_path)
        after = "custom_model_development" if before != "genai_development" else before
        assert client.get_experiment_by_name(f"kind {number}").tags[KIND] == after


def fresh_environment(folder):
    """A virtual environment that has the installed packages, and not this checkout: its Python, and variables."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    installed = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    (site / "installed.pth").write_text("\n".join(sorted(installed)) + "\n")
    server = folder / "bin" / "uvicorn"  # MLflow calls it by its name
    server.write_text(f"#!{python}\nfrom uvicorn.main import main\nmain()\n")
    server.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return python, kept | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


LOADED = """
import importlib.util, sys
import numpy as np, mlflow
assert not any(importlib.util.find_spec(name) for name in ("machinery", "models", "evaluate")), sys.path
frames = np.load("frames.npy")
model = mlflow.pyfunc.load_model("models:/landers@champion")
every = model.predict(frames, params={"outputs": "all"})
one_by_one = np.concatenate([model.predict(frames[i:i + 1]) for i in range(len(frames))])
np.savez("seen.npz", one_by_one=one_by_one, **every)
import models
assert "machinery" not in sys.modules and not models.__file__.startswith(sys.argv[1]), models.__file__
try:
    model.predict(frames.astype(np.float32))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture
def champion(store, tmp_path):
    """A registered policy: its file, and the environment that reads the registry."""
    client, run_id = store
    file, config = policy_in(tmp_path / "run", 512, "tracking.register=landers")
    log_score(client, run_id, config, 512, {"eval/return_mean": 1.0})
    add_files(client, run_id, config, 512, file)
    register(client, run_id, config, 512, 1.0)
    return file


def test_the_champion_acts_alike_where_this_program_is_not(champion, tmp_path):
    frames, actions = greedy_episode(champion)
    np.save(tmp_path / "frames.npy", frames)
    python, environment = fresh_environment(tmp_path / "fresh")
    done = subprocess.run(
        [python, "-c", LOADED, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MlflowException"]  # frames that are no uint8 are refused
    seen = np.load(tmp_path / "seen.npz")
    assert seen["one_by_one"].tolist() == actions.tolist()
    policy = load_policy(champion)[0]
    with torch.no_grad():
        output = policy(*policy.preprocess_stacks(torch.from_numpy(frames)))
    np.testing.assert_allclose(seen["probabilities"], output.distribution.probs, atol=1e-6)
    np.testing.assert_allclose(seen["values"], output.value, atol=1e-5)
    assert (seen["actions"].dtype, seen["values"].dtype) == (np.int64, np.float32)


def test_a_server_answers_frames_with_actions(champion, tmp_path):
    frames, actions = greedy_episode(champion)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def answer(body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=HANGS) as response:
            return json.load(response)["predictions"]

    python, environment = fresh_environment(tmp_path / "fresh")
    server = subprocess.Popen(
        [python, "-m", "mlflow", "models", "serve", "-m", "models:/landers@champion", "--env-manager", "local",
         "--port", str(port), "--workers", "1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment)
    try:
        wait(server, lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        assert [answer({"inputs": stack[None].tolist()})[0] for stack in frames] == actions.tolist()
        every = answer({"inputs": frames[:2].tolist(), "params": {"outputs": "all"}})
        assert every["actions"] == actions[:2].tolist()
        assert np.shape(every["probabilities"]) == (2, 4)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.communicate()


def test_a_model_of_continuous_actions(tmp_path):
    file, _ = policy_in(tmp_path / "run", 512, "env.continuous=true")
    save_model(tmp_path / "model", file)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "requirements.txt").read_text().startswith(f"mlflow=={mlflow.__version__}\ntorch==")
    policy = load_policy(file)[0]
    spaces = policy.spaces
    frames = np.random.default_rng(0).integers(
        0, 256, (3, spaces.frame_stack * spaces.planes, spaces.height, spaces.width), np.uint8)
    with torch.no_grad():
        output = policy(*policy.preprocess_stacks(torch.from_numpy(frames)))
    every = model.predict(frames, params={"outputs": "all"})
    np.testing.assert_allclose(every["actions"], output.distribution.mean, atol=1e-6)
    np.testing.assert_allclose(every["deviations"], output.distribution.log_std.exp().detach())
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 2)
    with pytest.raises(ValueError, match="must be actions or all"):
        model.predict(frames, params={"outputs": "logits"})


def test_a_flight_in_one_picture():
    """A dot that crosses a picture with a still line: both are seen, the dot at a dozen places."""
    class Env:
        class stack:
            planes, frames = 3, np.zeros((6, 20, 150), np.uint8)

    recorder, still = FlightRecorder(), np.zeros((3, 20, 150), np.uint8)
    still[:, 15] = 200
    for moment in range(3 * KEPT):
        frame = still.copy()
        frame[0, 5, 149 * moment // (3 * KEPT)] = 255
        recorder.decide(0, Env, np.concatenate([still, frame]), None, 0, 0)
        recorder.decide(1, Env, np.concatenate([frame, 255 - still]), None, 0, 0)  # another episode
    assert len(recorder.frames) <= KEPT
    picture = recorder.picture()
    assert (picture.shape, picture.dtype) == ((80, 600, 3), np.uint8)
    assert (picture[60:64] == 200).all()
    assert (picture[20:24, ::4, 0] == 255).sum() == 4 * 12
    assert (picture[:, :, 1:] > 0).sum() == 2 * 4 * 600
