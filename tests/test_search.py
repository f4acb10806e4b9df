"""Searches with Optuna: what is chosen, what a trial is worth, what is stopped, and how a killed search goes on."""

import argparse
import csv
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import optuna
import psutil
import pytest
from matplotlib.image import imread
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

import sweep
from machinery.config import ConfigError, load_config
from machinery.search import STEPS, Attempt, Search, SearchError, distribution, identity, living
from machinery.search_report import draw_search
from plot import NEEDED
from runs import CONFIG, HANGS, ROOT, TINY, rows, wait, wait_for_rows, without_speed

RANGES = {"ppo.gamma": FloatDistribution(0.9, 1.0)}
NO_PARENT = SimpleNamespace(id=None, tag_child=lambda *_, **__: None, log=lambda *_, **__: None)
TINY_SEARCH = [
    "--config", ROOT / "configs" / "cartpole.yaml", "--name", "s", "ppo.learning_rate=log:1e-4..1e-2",
    "ppo.num_steps=16,32", "ppo.total_frames=600", "env.shrink_factor=20", "model.glimpse=16",
    *(word for word in TINY if not word.startswith(("ppo.num_steps", "ppo.total_frames")))]


@pytest.mark.parametrize(("override", "usual", "expected"), [
    ("ppo.learning_rate=log:3e-4..3e-3", 1e-3, FloatDistribution(3e-4, 3e-3, log=True)),
    ("ppo.gamma=.98..0.999", 0.99, FloatDistribution(0.98, 0.999)),
    ("ppo.gamma=0..1", 0.99, FloatDistribution(0, 1)),
    ("env.gravity=-12..-8", -10.0, FloatDistribution(-12, -8)),
    ("ppo.update_epochs=2..8", 4, IntDistribution(2, 8)),
    ("ppo.num_steps=log:16..256", 64, IntDistribution(16, 256, log=True)),
    ("ppo.num_steps=16,32", 64, CategoricalDistribution(["16", "32"])),
    ("model.mirror=true,false", True, CategoricalDistribution(["true", "false"])),
    ("ppo.gamma=0.99", 0.99, None),
    ("env.gravity=[-12,-8]", -10.0, None),
    ("model.weights=a/../b.pth", "", None),
    ("ppo.warmup_frames=0..1e5", 0, IntDistribution(0, 100_000)),
])
def test_what_a_range_means(override, usual, expected):
    assert distribution(override, usual) == expected


@pytest.mark.parametrize(("override", "usual"), [
    ("ppo.gamma=0.9..high", 0.99), ("ppo.gamma=0.99..0.9", 0.99), ("ppo.learning_rate=log:0..1", 1e-3),
    ("ppo.num_steps=1.5..3", 64)])
def test_a_range_that_is_none_is_one_line(override, usual):
    with pytest.raises(ConfigError, match=f"^{re.escape(override)}: a range is written") as error:
        distribution(override, usual)
    assert "\n" not in str(error.value)


class Job:
    """A run of sweep.py whose metrics.csv is there already, `returns` at even steps of a million frames in all."""

    def __init__(self, folder, returns, done=True, sleeps="60"):
        self.folder, self.is_done, self.sleeps, self.started = folder, done, sleeps, []
        self.config = load_config(None, ["ppo.total_frames=1000000"])
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as file:
            table = csv.DictWriter(file, NEEDED)
            table.writeheader()
            for i, value in enumerate(returns, start=1):
                table.writerow(dict.fromkeys(NEEDED, 0) | {
                    "frames": i * 1_000_000 / STEPS, "rollout/return_mean": value, "speed/total_seconds": 60 * i})

    def done(self):
        return self.is_done

    def score(self):
        return 260.0

    def start(self, parent, own_log):
        self.started.append(subprocess.Popen(["sleep", self.sleeps]))
        return self.started[-1]


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda goal="frames", count=100, overrides=(): Search(
        "sqlite:///runs/s.db", "s", goal, RANGES, load_config(None, overrides), count)


def attempt(found, *jobs):
    return found._begin(lambda *_: list(jobs))


LEARNS = [-200, -100, 0, 100, 150, 180, 190, 195, 205]  # reaches 200 after 0.45 M frames and 9 minutes


@pytest.mark.parametrize(("goal", "expected"), [("frames", 0.45), ("minutes", 9.0), ("score", 260.0)])
def test_a_trial_is_worth_the_median_of_its_runs(goal, expected, search, tmp_path):
    never = [-200.0] * STEPS
    one = attempt(search(goal), Job(tmp_path / "a", LEARNS), Job(tmp_path / "b", never), Job(tmp_path / "c", LEARNS))
    assert one.advance(None) is None
    assert one.advance(None) is None
    assert one.advance(None).startswith(f"{expected:.3g} ")
    (trial,) = one.search.trials(TrialState.COMPLETE)
    assert trial.value == pytest.approx(expected)
    assert one.values[1] == pytest.approx({"frames": 10.0, "minutes": 10.0 * STEPS, "score": 260.0}[goal])


def test_a_run_that_came_near_is_worth_more_than_one_that_did_not(search, tmp_path):
    found, nan = search(), float("nan")
    for name, returns in (
            ("half", [-200] * 10 + [0] * 10), ("near", [nan, -200] * 5 + [100] * 10), ("none", [nan] * 20)):
        attempt(found, Job(tmp_path / name, returns)).advance(None)
    assert [trial.value for trial in found.trials(TrialState.COMPLETE)] == pytest.approx([2.0, 4 / 3, 10.0])


def test_a_run_is_stopped_at_its_goal_and_the_hopeless_is_stopped_early(search, tmp_path):
    found = search()
    for i in range(5):
        job = Job(tmp_path / str(i), LEARNS[:4], done=False)
        one = attempt(found, job)
        assert one.advance(None) is None  # and its run begins
        assert job.started[0].poll() is None
        Job.__init__(job, job.folder, LEARNS, done=False)
        process = one.process
        assert one.advance(None).startswith("0.45 ")
        assert process.returncode == -signal.SIGTERM
    for returns, told in (([-200] * 4, None), ([-200] * 10, "stopped early"), ([-200] * 4 + [210], "0.25 ")):
        job = Job(tmp_path / f"next-{len(returns)}", returns, done=False)
        one = attempt(found, job)
        said = one.advance(None)
        assert (said is None) if told is None else told in said, said
        one.end()
    assert len(found.trials(TrialState.PRUNED)) == 1
    draw_search(found, {"ppo.gamma": 1.0}, tmp_path / "search.png")
    assert imread(tmp_path / "search.png").shape[0] == 320


def test_a_good_first_run_does_not_hide_a_bad_second_one(search, tmp_path):
    found = search()
    for i in range(5):
        one = attempt(found, *(Job(tmp_path / f"{i}-{seed}", LEARNS) for seed in (1, 2)))
        assert one.advance(None) is None
        assert one.advance(None).startswith("0.45 ")
    one = attempt(found, Job(tmp_path / "good", LEARNS), Job(tmp_path / "bad", [-200] * 10, done=False))
    assert one.advance(None) is None
    assert one.advance(None).startswith(f"stopped early in {tmp_path}/bad, after 0.50 M")


def test_what_cannot_be_trained_is_told_and_not_tried_for_ever(search, tmp_path):
    found, watch, begun = search(), SimpleNamespace(received=None), []

    def jobs_of(name, _):
        begun.append(name)
        return [Job(tmp_path / name, [], sleeps="no number")]

    with pytest.raises(SearchError, match=r"^5 trials in a row could not be trained, the last one: .*004 ended with"):
        found.run(jobs_of, 1, NO_PARENT, watch)
    assert len(begun) == len(found.trials(TrialState.FAIL)) == len(found.trials()) == 5

    def impossible(*_):
        raise ConfigError("ppo.num_minibatches=3 must divide 64")

    with pytest.raises(SearchError, match=r"^100 choices in a row do not go together, the last one: ppo\.num_minib"):
        found._begin(impossible)


def test_a_run_that_ends_while_it_is_looked_at_is_not_lost(search, tmp_path, monkeypatch):
    found = search()
    job = Job(tmp_path / "a", [-200] * 10, done=False)
    one = attempt(found, job)
    one.advance(None)
    monkeypatch.setattr(one, "_hopeless", lambda *_: one.process.kill() or (one.process.wait() and False))
    assert one.advance(None) is None
    job.is_done = True
    assert one.advance(None).startswith("5 ")


def test_trouble_with_the_database_leaves_no_run_behind(search, tmp_path, capsys, monkeypatch):
    found, jobs = search(count=2), []

    def jobs_of(name, _):
        jobs.append(Job(tmp_path / name, [], done=False))
        return jobs[-1:]

    def locked(*_, **__):
        raise StorageInternalError("An exception is raised") from OperationalError("UPDATE", {}, "database is locked")

    def advance(one, parent, usual=Attempt.advance):
        return locked() if one.process else usual(one, parent)

    monkeypatch.setattr(found.study, "tell", locked)
    monkeypatch.setattr(Attempt, "advance", advance)
    with pytest.raises(SearchError, match=r"the study cannot be used any more: .*database is locked; the same command"):
        found.run(jobs_of, 2, NO_PARENT, SimpleNamespace(received=None))
    assert [job.started[0].returncode for job in jobs] == [-signal.SIGTERM] * 2
    assert capsys.readouterr().err.count("database is locked") == 2


def test_a_process_that_ended_lives_no_more_even_if_nobody_asked_how():
    process = subprocess.Popen(["sleep", "60"])
    told = identity(process.pid)
    assert living(told).pid == process.pid
    process.kill()
    until = time.monotonic() + 60
    while living(told) and time.monotonic() < until:
        time.sleep(0.01)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert living(told) is None
    process.wait()
    assert living(told) is None
    assert living(None) is None


def test_a_stopped_or_killed_search_goes_on_with_its_trials(search, tmp_path):
    found = search()
    one = attempt(found, Job(tmp_path / "a", [], done=False))
    one.advance(None)
    one.signal(signal.SIGTERM)
    one.put_back()
    assert one.process.returncode == -signal.SIGTERM
    again = attempt(found, Job(tmp_path / "a", LEARNS))
    assert again.trial.params == one.trial.params
    assert again.trial.user_attrs["name"] == one.trial.user_attrs["name"] == "trial-000"
    orphan = subprocess.Popen(["sleep", "3600"])
    again.trial.set_user_attr("trainer", [orphan.pid, psutil.Process(orphan.pid).create_time()])
    again.trial.set_user_attr("process", [orphan.pid, 0.0])  # a process of another time
    found = search()  # another process, later
    killed = attempt(found, Job(tmp_path / "a", LEARNS))
    orphan.wait(timeout=HANGS)  # it would sleep for an hour
    assert killed.trial.params == one.trial.params
    assert killed.trial.user_attrs["name"] == "trial-000"
    running = attempt(found, Job(tmp_path / "b", []))  # somebody is at the other one
    assert running.trial.user_attrs["name"] == f"trial-{running.trial.number:03d}"
    assert killed.advance(None).startswith("0.45")


def test_a_trial_of_another_machine_is_taken_over_when_it_has_not_been_heard_of_for_long(search, tmp_path):
    found = search()
    one = attempt(found, Job(tmp_path / "a", []))
    one.trial.set_user_attr("host", "elsewhere")
    assert attempt(found, Job(tmp_path / "b", [])).trial.user_attrs["name"] == "trial-001"
    one.trial.set_user_attr("seen", time.time() - 3600)
    assert attempt(found, Job(tmp_path / "a", [])).trial.user_attrs["name"] == "trial-000"


def test_enough_is_enough(search, tmp_path):
    found = search(count=2)
    watch = SimpleNamespace(received=None)
    found.run(lambda name, _: [Job(tmp_path / name, LEARNS)], 2, NO_PARENT, watch)
    assert len(found.trials()) == 2
    found.run(lambda name, _: pytest.fail("a third"), 2, NO_PARENT, watch)


def test_another_search_does_not_go_on_with_this_one(search):
    search()
    search(overrides=["run.seed=5", "evaluation.episodes=7", "ppo.gamma=0.5"])
    with pytest.raises(ConfigError, match="goal was frames, asked for score; choose another --name"):
        search("score")
    with pytest.raises(ConfigError, match=r"ppo\.clip_coef was 0\.2, asked for 0\.1; choose another --name"):
        search(overrides=["ppo.clip_coef=0.1"])


def test_a_key_that_only_begins_like_a_range_is_fixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learned = "model.eye=learned"
    words = "sqlite:///runs/s.db", "s", "frames", {"model.glimpse": CategoricalDistribution(["24", "32"])}
    Search(*words, load_config(None, [learned, "model.glimpse=24"]), 100)
    Search(*words, load_config(None, [learned, "model.glimpse=32"]), 100)
    with pytest.raises(ConfigError, match=r"model\.glimpses was 1, asked for 2"):
        Search(*words, load_config(None, [learned, "model.glimpses=2"]), 100)


def test_a_trial_that_another_machine_took_over_ends_here_alone(search, tmp_path, capsys):
    """What one that was asleep for long finds when it wakes."""
    found, jobs, watch = search(count=2), [], SimpleNamespace(received=None)

    def jobs_of(name, _):
        jobs.append(Job(tmp_path / name, LEARNS if jobs else [], done=bool(jobs)))
        if len(jobs) == 2:
            found.put_back(found.trials()[0])
        return jobs[-1:]

    found.run(jobs_of, 2, NO_PARENT, watch)
    assert jobs[0].started[0].returncode == -signal.SIGTERM
    assert "trial 0: another machine took it over" in capsys.readouterr().out
    assert len(found.trials(TrialState.COMPLETE)) == 2


def test_a_fixed_path_with_dots_is_whole_for_the_parent_and_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(config=CONFIG, goal="frames", study=None, trials=1)
    uri = "sqlite:///../mlflow.db"
    _, _, fixed, config = sweep.plan_search(args, "s", ["1"], ["ppo.gamma=0.98..0.99", f"tracking.uri={uri}"])
    assert (config.tracking.uri, config.ppo.gamma, fixed) == (uri, 0.98, [f"tracking.uri={uri}"])


def test_the_kind_of_a_range_and_what_goes_together_depend_on_the_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "cnn_no_tilt.yaml"
    args = argparse.Namespace(config=config, goal="frames", study=None, trials=1)
    found, jobs_of, fixed, _ = sweep.plan_search(args, "s", ["1", "2"], [
        "model.name=transformer", "model.spatial_layers=1..4", "env.num_envs=12,24", "env.num_workers=3,4",
        "env.gravity=[-12,-8]"])
    assert found.ranges["model.spatial_layers"] == IntDistribution(1, 4)
    assert fixed == ["model.name=transformer", "env.gravity=[-12,-8]"]
    jobs = jobs_of("trial-000", ["model.spatial_layers=2", "env.num_envs=12", "env.num_workers=3"])
    assert [job.folder.name for job in jobs] == ["s-trial-000-seed-1", "s-trial-000-seed-2"]
    assert jobs[1].config.env.gravity == [-12, -8]
    (tmp_path / "runs" / "t-trial-000-seed-1").mkdir()
    with pytest.raises(ConfigError, match="t-trial-000-seed-1: is a run of an earlier search"):
        sweep.plan_search(args, "t", ["1"], ["ppo.gamma=0.9..1"])


@pytest.mark.parametrize(("args", "told"), [
    ([], "nothing to choose from"),
    (["ppo.gamma=0.9..1.5"], "ppo.gamma=1.5"),
    (["ppo.gama=0.9..1"], "ppo.gamma"),
    (["ppo.gamma=0.9..1", "ppo.gamma=0.95"], "ppo.gamma: is given twice"),
    (["ppo.gamma=0.9..1", "--trials", "0"], "--trials 0: must be 1 or more"),
    (["ppo.gamma=0.9..1", "env.id=Pendulum-v1", "model.mirror=false"], "nobody has said when Pendulum-v1 is solved"),
    (["ppo.gamma=0.9..1", "--goal", "score", "evaluation.episodes=0"], "needs evaluation.episodes of 1 or more"),
    (["ppo.gamma=0.9..1", "--study", "sqlite:////proc/no/such.db"], "study sqlite:////proc/no/such.db cannot be used"),
    (["ppo.gamma=0.9..1", "--study", "nonsense"], "study nonsense cannot be used"),
])
def test_mistakes_are_one_line_before_anything_starts(args, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--config", str(CONFIG), "--trials", "3", *args, "tracking.mlflow=false"])
    assert told in ended.value.code
    assert "\n" not in ended.value.code
    assert not list(tmp_path.glob("runs/*"))


def test_a_killed_search_goes_on_and_is_one_family_in_mlflow(tmp_path, monkeypatch, capsys):
    words = [*map(str, TINY_SEARCH), "--trials", "2"]
    first = tmp_path / "runs" / "s-trial-000-seed-1"
    process = subprocess.Popen(
        [sys.executable, ROOT / "sweep.py", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait(process, (first / "metrics.csv").exists)
    wait_for_rows(process, first, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stdout.close()
    trainer = next(child for child in children if "train.py" in " ".join(child.cmdline()))
    begun = rows(first)

    monkeypatch.chdir(tmp_path)
    sweep.main(words)
    assert without_speed(rows(first))[: len(begun)] == without_speed(begun)
    assert not trainer.is_running()
    shown = capsys.readouterr().out
    assert set(re.findall(r"^\| (trial-00\d) \| 0\.\d+ \|", shown, re.MULTILINE)) == {"trial-000", "trial-002"}
    assert "what mattered: too few trials to tell\n" in shown
    assert re.search(r"^python train\.py --config \S+cartpole\.yaml .* ppo\.num_steps=\d\d$", shown, re.MULTILINE)
    study = optuna.load_study(study_name="s", storage="sqlite:///runs/s.db")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.trials[0].params == study.trials[1].params

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("lunar-lander").experiment_id])
    (parent,) = (run for run in found if "sweep" in run.data.tags)
    family = {run.info.run_name: run.data.tags["trial"] for run in found if run is not parent}
    assert family.keys() == {"s-trial-000-seed-1", "s-trial-002-seed-1"}
    assert all(re.fullmatch(r"[12]: 0\.\d+ M frames to the solved mark", told) for told in family.values())
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.data.metrics["search/best_frames"] == study.best_value
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["s.png"]
