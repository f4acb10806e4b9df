"""Scored policies as MLflow's logged models, and the best one as a model that MLflow loads without this program.

Each greedy score of a run becomes a logged model with the frames it was trained for, so that MLflow ranks them. The
best one gets its final scores, its files and, with tracking.register, a version in the registry. All functions here are
jobs of outbox.Sender: what was done before, as by a run that was killed, is not done twice.
"""

import dataclasses
import hashlib
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from machinery.checkpoint import load_policy
from task import EVALUATION_SEED, SELECTION_SEED

ROOT = Path(__file__).resolve().parent.parent
CHAMPION = "champion"  # the registry's alias of the version with the best score


def scored_models(client, run_id):
    """{frames: logged model} of a run."""
    experiment = client.get_run(run_id).info.experiment_id
    models, token = [], None
    while True:
        page = client.search_logged_models(
            [experiment], filter_string=f"source_run_id = '{run_id}'", page_token=token)
        models += page
        token = page.token
        if not token:
            return {int(model.params["frames"]): model for model in models if "frames" in model.params}


def model_of(client, run_id, config, frames):
    """The run's logged model of the policy after `frames`; it is made where it is missing."""
    if found := scored_models(client, run_id).get(frames):
        return found
    flat = config.flat().items()
    params = {key: str(value) for key, value in flat if key.startswith(("model.", "env.")) or key == "run.seed"}
    return client.create_logged_model(
        client.get_run(run_id).info.experiment_id, name=f"{config.model.name}-{frames:09d}", source_run_id=run_id,
        params={"frames": str(frames)} | params, model_type="policy")


def log_metrics(client, run_id, model, frames, metrics, config, seeds):
    """Scores of `model` over the episodes of `seeds`, a range, which are named as MLflow's dataset.

    They become the run's, too. Where the run has a metric already, the same point of its curve is meant.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    episodes = {"env": config.env.settings(), "first_seed": seeds.start, "episodes": len(seeds)}
    text = json.dumps(episodes, sort_keys=True)
    kind = "unseen" if seeds.start >= EVALUATION_SEED else "selection"
    dataset = Dataset(
        name=f"{kind} seeds {seeds.start}-{seeds.stop - 1}", digest=hashlib.sha256(text.encode()).hexdigest()[:8],
        source_type="gymnasium", source=text, profile=json.dumps(episodes))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])
    known = {(metric.key, metric.step, metric.value, metric.dataset_digest) for metric in model.metrics or ()}
    batch = []
    for key, value in metrics.items():
        if (key, frames, value, dataset.digest) in known:
            continue
        points = [point for point in client.get_metric_history(run_id, key) if point.step == frames]
        at = next((point.timestamp for point in points if point.value == value), int(1000 * time.time()))
        batch.append(Metric(
            key, value, at, frames, model_id=model.model_id, dataset_name=dataset.name, dataset_digest=dataset.digest))
    if batch:
        client.log_batch(run_id, batch)


def finish(client, run_id, model, frames):
    """The run names `model` as what came of it after `frames`, and the model is no longer pending."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    if model.status == LoggedModelStatus.READY:
        return
    if model.model_id not in {output.model_id for output in client.get_run(run_id).outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, frames)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def log_score(client, run_id, config, frames, metrics, flight=None):
    """A greedy score on the episodes that choose the best policy. flight: the FlightRecorder of the first of them."""
    from mlflow.entities import LoggedModelStatus

    model = model_of(client, run_id, config, frames)
    if model.status == LoggedModelStatus.READY:
        return
    if flight:
        what = "episode" if config.env.task.landed is None else "landing"
        client.log_image(run_id, flight.picture(), key=f"{what} of seed {SELECTION_SEED}", step=frames)
    seeds = range(SELECTION_SEED, SELECTION_SEED + config.evaluation.selection_episodes)
    log_metrics(client, run_id, model, frames, metrics, config, seeds)
    finish(client, run_id, model, frames)


def log_lacking_scores(client, run_id, config, scores):
    """The scores of a run that goes on, {frames: metrics}, as far as MLflow has no model for them."""
    from mlflow.entities import LoggedModelStatus

    known = scored_models(client, run_id)
    for frames, metrics in scores.items():
        if frames not in known or known[frames].status != LoggedModelStatus.READY:
            log_score(client, run_id, config, frames, metrics)


def log_final_scores(client, run_id, config, frames, reports):
    """The scores of evaluate.py's reports, with the ends of their 95% intervals."""
    model = model_of(client, run_id, config, frames)
    for report in reports:
        low, high = report["return_ci95"]
        scores = report | {"return_ci95_low": low, "return_ci95_high": high}
        keys = ("return_mean", "return_ci95_low", "return_ci95_high", "landed_rate", "solved_rate")
        metrics = {f"final/{report['mode']}_{key}": scores[key] for key in keys if key in scores}
        seeds = range(report["seed"], report["seed"] + report["episodes"])
        log_metrics(client, run_id, model, frames, metrics, config, seeds)
    finish(client, run_id, model, frames)


def add_files(client, run_id, config, frames, file):
    """Give the model of the policy in `file` what it takes to load it anywhere."""
    model = model_of(client, run_id, config, frames)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", file, model.model_id, run_id)
        client.log_model_artifacts(model.model_id, f"{folder}/model")


def save_model(folder, file, model_id=None, run_id=None):
    """Write the policy in `file` to a new folder as a model for `mlflow.pyfunc.load_model`."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    policy, config, file = load_policy(file)
    spaces = policy.spaces
    stack = (spaces.frame_stack * spaces.planes, spaces.height, spaces.width)
    actions = TensorSpec(np.dtype("float32"), (-1, spaces.num_actions)) if spaces.continuous else TensorSpec(
        np.dtype("int64"), (-1,))
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, *stack))]), Schema([actions]),
        ParamSchema([ParamSpec("outputs", DataType.string, "actions")]))
    packages = ["mlflow", "torch", "safetensors", "numpy", "pydantic", *policy.packages]
    mlflow.pyfunc.save_model(
        folder, python_model=ROOT / "machinery" / "policy_model.py",
        code_paths=[str(ROOT / name) for name in ("models.py", "layers.py", "eyes.py", "settings.py")],
        artifacts={"policy": str(file)}, signature=signature, input_example=np.zeros((1, *stack), np.uint8),
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in packages],
        model_config={
            "model": config.model.model_dump(mode="json"), "spaces": dataclasses.asdict(spaces), "device": "cpu"},
        mlflow_model=Model(model_id=model_id, run_id=run_id))


def register(client, run_id, config, frames, score):
    """The model becomes a version of tracking.register; the champion, too, if its score beats the champion's."""
    name, model = config.tracking.register, model_of(client, run_id, config, frames)
    source = f"models:/{model.model_id}"
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    versions = {found.source: found for found in client.search_model_versions(f"name = '{name}'")}
    ours = versions.get(source)
    if not ours:
        ours = client.create_model_version(name, source, run_id, model_id=model.model_id)
        there = [{"name": name, "version": ours.version}]  # as mlflow.register_model notes it for the model's page
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(there)})
    client.set_model_version_tag(name, ours.version, "return_mean", str(score))
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    before = client.get_model_version(name, champion).tags if champion else {}
    if score > float(before.get("return_mean", "-inf")):
        client.set_registered_model_alias(name, CHAMPION, ours.version)
