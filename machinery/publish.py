"""Copies a finished run into results/, as a page that others can judge and use, and renews the README's table.

    python -m machinery.publish runs/NAME cnn   # -> results/cnn/
    python -m machinery.publish runs/NAME cnn --yardstick runs/yardstick-s1     # with what benchmarks/yardstick.py gave
    python -m machinery.publish                 # pages, curves, landings and the table, from what results/ holds

Nothing is typed by hand: every number comes from the run's own metrics.csv, config.yaml, machine.json and reports.
"""

import signal
import sys

if __name__ == "__main__" and "IPython" not in sys.modules:  # a notebook has a handler of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error

import argparse
import json
import shlex
import shutil
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluate import play
from machinery.checkpoint import POLICY_FILE, load_checkpoint, load_policy, save_config, trained_frames
from machinery.config import load_config
from machinery.errors import UserError, one_line
from machinery.run_folder import is_finished
from machinery.video import VideoRecorder, write_gif
from plot import draw_run, reached, read_metrics
from task import ENV_ID, EVALUATION_SEED, solved_mark

HERE = Path(__file__).parent.parent
CONFIGS = HERE / "configs"
BEGIN, END = "<!-- results: written by machinery/publish.py -->", "<!-- end of results -->"
YARDSTICK = "yardstick.json"
FILES = ("config.yaml", "metrics.csv", "machine.json", "report.json", "report_sampled.json")
CARD = """# {name}: a mean return of {greedy}

![an episode](landing.gif)

| | |
| --- | --- |
| trained by | `{command}` |
| training seed | {seed} |
| priors | {priors} |
| environment frames | {frames:,} steps of {env}, seen as rendered frames only |
| best policy | that after {trained:,} of them |
| wall-clock | {minutes:.0f} minutes on {machine} |
| mean training return of 100 episodes over {solved:g} | {hit} |
| greedy, 100 unseen seeds | {greedy}, {landed}{solved_rate:.0%} with {solved:g} or more |
| sampled, the same seeds | {sampled} |
{yardstick}| commit | {commit} of the code; the settings are those of config.yaml |
| parameters | {parameters:,} |
| multiply-adds per decision | {multiply_adds:,} |

Score it again: `python evaluate.py --checkpoint results/{name}`. Train it again: the command above. The intervals are
95% bootstrap intervals of the mean. One training seed; another ends elsewhere.

![curves](curves.png)

## Use it

```python
import torch
from envs import make_env
from machinery.checkpoint import load_policy

policy, config, _ = load_policy("results/{name}")
env = make_env(rendered=True, **config.env.settings())
frames, ended = env.reset(seed=1_000_000), False
while not ended:
    with torch.no_grad():
        output = policy(*policy.preprocess_stacks(torch.from_numpy(frames)[None]))
    frames, reward, terminated, truncated = env.step(output.distribution.mode()[0].tolist())
    ended = terminated or truncated
print(env.episode_return)
```
"""


def score(report):
    low, high = report["return_ci95"]
    return f"{report['return_mean']:.0f} [{low:.0f}, {high:.0f}]"


class PublishError(UserError):
    """A run that cannot be published."""


def read_json(file, *keys):
    """The dict in a file, which must have these keys."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise PublishError(f"{file}: not JSON ({error})") from None
    if not (isinstance(content, dict) and set(keys) <= content.keys()):
        raise PublishError(f"{file}: lacks some of {', '.join(keys)}; is the run finished?")
    return content


def multiply_adds(policy, decisions):
    """Of one decision, forward only: one frame preprocessed, and its share of a segment of successive ones.

    These share most of their frames, and a policy that encodes frames one by one encodes each once for all of them.
    """
    spaces = policy.spaces
    rows = decisions + spaces.frame_stack - 1
    frames = torch.zeros(rows, spaces.planes, spaces.height, spaces.width, dtype=torch.uint8)
    frame_ids = torch.arange(decisions)[:, None] + torch.arange(spaces.frame_stack)
    policy.train()
    with torch.no_grad():
        with FlopCounterMode(display=False) as preprocessing:
            frame_store = policy.preprocess(frames)
        with FlopCounterMode(display=False) as deciding:
            policy(frame_store, frame_ids)
    policy.eval()
    return round((preprocessing.get_total_flops() / len(frames) + deciding.get_total_flops() / decisions) / 2)


def command(config, name):
    """The command that trains this again: the config file of that name, and what was set beside it."""
    usual = load_config(CONFIGS / f"{name}.yaml").flat()
    chosen = {
        key: value for key, value in config.flat().items()
        if value != usual.get(key) and key != "run.name" and not key.startswith("tracking.")}
    chosen = {"run.seed": config.run.seed} | chosen
    words = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in chosen.items())  # null, true: as in YAML
    return " ".join([f"python train.py --config configs/{name}.yaml", *map(shlex.quote, words)])


def priors(config):
    """What a policy knows beforehand: docs/eyes.md says what the words mean."""
    eye = [] if config.model.eye == "none" else [f"{config.model.eye} eye", *["tilt"] * config.model.tilt]
    return ", ".join(eye + ["mirror"] * config.model.mirror) or "none"


def facts(folder, name=None):
    """What a table row and a card say of results/NAME, or of a run that shall become it, all read from its files."""
    name = name or folder.name
    policy, config, file = load_policy(folder)
    if config.env.task.solved is None:
        raise PublishError(f"{folder}: nobody has said when {config.env.id} is solved")
    metrics = read_metrics(folder)
    report, sampled = (
        read_json(folder / name, "episodes", "seed", "return_mean", "return_ci95", "solved_rate")
        for name in ("report.json", "report_sampled.json"))
    _check_episodes(folder, report, sampled)
    machine = read_json(folder / "machine.json", "machine", "git_commit")
    where = [machine, *machine.get("resumed", [])]
    solved = reached(metrics, config.env.task.solved)
    options = ", ".join(f"{key} {value}" for key, value in config.env.described().items() if key != "id")
    return {
        "name": name, "policy": config.model.name, "seed": config.run.seed,
        "priors": priors(config), "id": config.env.id, "solved": config.env.task.solved,
        "env": config.env.id + (f" with {options}" if options else ""),
        "hit": f"{solved[0] / 1e6:.2f} M frames, {solved[1] / 60:.0f} min" if solved else "not reached",
        "command": command(load_config(folder / "config.yaml"), name), "trained": trained_frames(file),
        "frames": int(metrics["frames"][-1]), "minutes": metrics["speed/total_seconds"][-1] / 60,
        "machine": then(each["machine"] for each in where), "commit": then(each["git_commit"] for each in where),
        "greedy": score(report), "sampled": score(sampled),
        "landed": f"{report['landed_rate']:.0%} landed, " if "landed_rate" in report else "",
        "solved_rate": report["solved_rate"], "yardstick": yardstick(folder),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "multiply_adds": multiply_adds(policy, config.ppo.segment_length),
    }


def then(names):
    """Where a run began and went on, each place once."""
    return ", then ".join(dict.fromkeys(names))


def yardstick(folder):
    """The row of a card that says what PPO reached with state vectors, if that was measured."""
    file = folder / YARDSTICK
    if not file.exists():
        return ""
    report = read_json(file, "policy", "return_mean", "return_ci95")
    landed = f", {report['landed_rate']:.0%} landed" if "landed_rate" in report else ""
    return f"| the same PPO on the {report['policy']}, greedy, the same seeds | {score(report)}{landed} |\n"


def publish(run, name, yardstick=None):
    """Copy a finished run to results/NAME; yardstick: a folder with the report of benchmarks/yardstick.py, or None."""
    run, folder = Path(run), HERE / "results" / name
    facts(run, name)  # what is missing or damaged is found out before anything is replaced
    config = load_config(run / "config.yaml")
    if yardstick:
        _check_yardstick(yardstick / "report.json", config)
    if not is_finished(config, load_checkpoint(run)):
        raise PublishError(f"{run}: not trained and scored to its end; the reports may be those of an earlier policy")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "checkpoints" / POLICY_FILE, folder)
    for file in FILES:
        shutil.copy(run / file, folder)
    if yardstick:
        shutil.copy(yardstick / "report.json", folder / YARDSTICK)
    else:  # of the run that was here before
        (folder / YARDSTICK).unlink(missing_ok=True)
    save_config(config, folder / "config.yaml")  # an old one may hold a password
    return folder


def _check_episodes(where, *reports):
    """PublishError unless the reports are of the episodes of a result."""
    if any((each["episodes"], each["seed"]) != (100, EVALUATION_SEED) for each in reports):
        raise PublishError(f"{where}: a result is scored over 100 episodes from seed {EVALUATION_SEED} on")


def _check_yardstick(file, config):
    """PublishError unless its report is of the same episodes as a result's."""
    measured = read_json(file, "episodes", "seed", "env", "policy", "return_mean", "return_ci95")
    _check_episodes(file, measured)
    if measured["env"] != config.env.described():
        raise PublishError(f"{file}: was measured in another environment, {measured['env']}")


def draw(folder):
    """The pictures of a result: its curves, and the first of the scored episodes that is a solution."""
    draw_run(folder, folder / "curves.png")
    policy, config, _ = load_policy(folder)
    returns = read_json(folder / "report.json", "returns")["returns"]
    solved = config.env.task.solved
    seed = EVALUATION_SEED + next((i for i, value in enumerate(returns) if value >= solved), 0)
    with VideoRecorder(folder, 1, seed, "landing") as recorder:
        play(policy, config.env, [seed], rendered=True, recorder=recorder)
    if recorder.failure:
        raise PublishError(f"{folder}: no landing filmed: {recorder.failure}")
    write_gif(folder / "landing.mp4", folder / "landing.gif")


def write_pages():
    """The page of each result, and their table in the README."""
    found = [facts(report.parent) for report in (HERE / "results").glob("*/report.json")]
    for each in found:
        (HERE / "results" / each["name"] / "README.md").write_text(CARD.format(**each))
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    if END not in rest:
        raise PublishError(f"{readme}: has no place for the table, between {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")


def table(found):
    """The results table in Markdown. found: the `facts` of each result."""
    found = sorted(found, key=lambda row: (row["id"] != ENV_ID, row["name"]))
    others = {f"{row['id']} {row['solved']:g}": 0 for row in found if row["id"] != ENV_ID}
    mark = f"{solved_mark(ENV_ID):g}" + (f" ({', '.join(others)})" if others else "")
    rows = [
        f"| config | priors | frames, time to a return of {mark} | trained for | greedy | sampled | landed |",
        "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in found:
        rows.append(
            f"| [{row['name']}](results/{row['name']}) | {row['priors']} | {row['hit'].replace(' frames', '')} | "
            f"{row['frames'] / 1e6:.1f} M, {row['minutes']:.0f} min | {row['greedy']} | "
            f"{row['sampled'].partition(' ')[0]} | {row['landed'].partition(' ')[0] or '-'} |")
    return "\n".join(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="runs/NAME, finished")
    parser.add_argument("name", nargs="?", help="folder under results/, named as its config file")
    parser.add_argument("--yardstick", type=Path, help="a run of benchmarks/yardstick.py in the same environment")
    args = parser.parse_args(argv)
    if args.yardstick and not args.run:
        parser.error("--yardstick belongs to a run")
    with one_line("publish.py"):
        if args.run:
            folders = [publish(args.run, args.name or Path(args.run).name, args.yardstick)]
        else:
            folders = [report.parent for report in (HERE / "results").glob("*/report.json")]
        for folder in folders:
            draw(folder)
        write_pages()


if __name__ == "__main__":
    main()
