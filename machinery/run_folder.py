"""A run's folder, runs/NAME: made for a new run, readied for one that goes on, held by one process at a time.

    with ExitStack() as lock:
        config, folder, state = start_run(args, lock)     # args: config, resume, overrides, from the command line
"""

import itertools
import os
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from machinery.checkpoint import POLICY_FILE, CheckpointError, load_checkpoint, save_config, trained_frames
from machinery.config import ConfigError, apply_overrides, changed_keys, check_config, load_config
from machinery.files import locked, newest_run, remove_unfinished
from machinery.processes import launcher
from machinery.tracking import Metrics, with_store
from task import LANDED

RESUMABLE = ("ppo.total_frames", "run.device", "run.num_threads", "evaluation.", "tracking.")


def resume_config(saved, overrides):
    """The config of a checkpoint with those overrides that may change in mid-run."""
    before = check_config(saved)
    refused = {}
    for key, _, value in (override.partition("=") for override in overrides):
        if key.strip() == "model.name" and value.strip() != before.model.name:  # it decides which other keys there are
            refused["model.name"] = before.model.name, value.strip()
    if not refused:
        after = apply_overrides(saved, overrides)
        refused = {k: pair for k, pair in changed_keys(before, after).items() if not k.startswith(RESUMABLE)}
    if refused:
        raise ConfigError("a resumed run keeps its config: " + ", ".join(
            f"{key} was {was!r}, asked for {asked}" for key, (was, asked) in refused.items()))
    return after


def is_finished(config, state):
    """Whether a checkpoint's run has nothing left to train or to score."""
    counters = state["counters"]
    return (counters["env_frames"] >= config.ppo.total_frames
            and counters.get("scored") == config.evaluation.episodes)


def is_over(config, state):
    """Whether it is finished, and MLflow has all of it."""
    return is_finished(config, state) and state["counters"].get("sent", True)


def _aside(file):
    """A name for what a run leaves behind, that nothing has yet."""
    names = itertools.chain(["aside"], (f"aside-{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := file.with_name(f"{file.name}.{name}")).exists())


def new_folder(config, config_file):
    """Make runs/NAME; without a name, one that no other run has, even one started in the same second."""
    runs, name = Path("runs"), config.run.name
    if name:
        (runs / name).mkdir(parents=True, exist_ok=True)
        return runs / name
    name = f"{Path(config_file).stem if config_file else 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
    runs.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def start_run(args, lock, processes=1):
    """(config, run folder, checkpoint state or None) from the command line; `lock`, an ExitStack, holds the folder."""
    if args.resume is not None:
        return resume_run("latest" if args.resume == "latest" else Path(args.resume), args.overrides, lock, processes)
    config = load_config(args.config, args.overrides)
    config = config.model_copy(update={"tracking": with_store(config.tracking)})
    folder = new_folder(config, args.config)
    lock.enter_context(locked(folder))
    remove_unfinished(folder)
    if any(folder.glob("checkpoints/*")):
        raise ConfigError(f"{folder}: that run exists; go on with --resume {folder}, or choose another run.name")
    if any((folder / name).exists() for name in ("metrics.csv", "report.json")):
        raise ConfigError(f"{folder}: holds what an earlier run measured; choose another run.name, or remove that")
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    return config, folder, None


def resume_run(path, overrides, lock, processes=1):
    """As start_run, from a run's folder, a checkpoint file or "latest"."""
    path = newest_run() if path == "latest" else path
    if path is None:
        raise CheckpointError("no run under runs/ has a checkpoint to resume")
    folder = path if path.is_dir() else Path(os.path.relpath(path.absolute().parent.parent))
    if (folder / "checkpoints").is_dir():
        lock.enter_context(locked(folder))
    state = load_checkpoint(path)
    if not (isinstance(state, dict) and {"config", "counters", "policy", "landers"} <= state.keys()):
        raise CheckpointError(f"{path}: holds no training run")
    if not path.is_dir() and path.absolute().parent.name != "checkpoints":
        raise CheckpointError(f"{path}: to go on from it, put it into the checkpoints/ of its run's folder")
    saved = 1 + len(state.get("peers", []))
    if saved != processes:
        raise CheckpointError(f"{path}: holds the landers of {saved} process(es), but {processes} were started; go on "
                              f"with: {launcher(saved)} train.py --resume {path}")
    config = resume_config(state["config"], overrides)
    # Checkpoints of an earlier release have [return, length, index into task.OUTCOMES] of the last episodes.
    state["recent"] = [
        episode if isinstance(episode, dict) else
        {"return_mean": episode[0], "length_mean": episode[1], "landed_rate": float(episode[2] == LANDED)}
        for episode in state.get("recent", [])]
    state["source"] = str(path)  # to name it if its weights do not fit
    counters = state["counters"]
    remove_unfinished(folder)
    if is_over(config, state):
        return config, folder, state
    config = config.model_copy(update={"tracking": with_store(config.tracking)})
    # Left in their place, newer ones, damaged or not, would be taken for newer than those that are about to be saved.
    newest = f"{counters['env_frames']:012d}.ckpt"
    newer = [file for file in folder.glob("checkpoints/*.ckpt") if file.name > newest]
    policy, metrics = folder / "checkpoints" / POLICY_FILE, folder / "metrics.csv"
    another = config.ppo.total_frames != check_config(state["config"]).ppo.total_frames  # its schedules are others
    left = [file for file in folder.glob("checkpoints/*.ckpt.aside*") if file.name.partition(".aside")[0] > newest]
    if newer and metrics.exists():
        shutil.copyfile(metrics, _aside(metrics))
    if another and (newer or left):  # what MLflow has of the branch that is left stays a run of its own
        state["run_id"] = None
    if (newer or another) and trained_frames(policy) > counters["env_frames"]:  # nor will it come again
        newer.append(policy)
    for file in newer:
        aside = file.rename(_aside(file))
        print(f"{file} is newer than what this run goes on from; it is put aside as {aside.name}")
    if not trained_frames(policy):  # put aside, lost or damaged
        counters["best"] = None  # the best of what comes is chosen anew
    there = Metrics(folder / "metrics.csv").drop_after(counters["env_frames"])
    if there < counters["env_frames"]:
        print(f"{folder}/metrics.csv lacks the updates between {there:,} and {counters['env_frames']:,} frames")
    save_config(config, folder / "config.yaml")
    return config, folder, state
