"""The changes that docs/changing.md shows: each applies, trains, and is as small as the page says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import BARE, ROOT, TINY, rows

PAGE = (ROOT / "docs" / "changing.md").read_text()
TABLE = dict(re.findall(r"^\| \[([^\]]+)\]\(.*?\) \| (.*) \|$", PAGE, re.MULTILINE))
DIFFS = dict(re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
SHOWS = {  # change: config, a column of metrics.csv
    "A new policy": ("mean", "update/entropy"),
    "An auxiliary loss": ("cnn", "update/reward_loss"),
    "Another action distribution": ("cnn", "update/entropy"),
    "A metric of an episode": ("cnn", "rollout/fuel_mean"),
}


@pytest.fixture
def copy(tmp_path):
    """The repository's code, without what it has measured."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: [
        name for name in names if Path(folder) == ROOT and name not in ("configs", "machinery")
        and not name.endswith(".py")])
    return copy


@pytest.mark.parametrize("change", DIFFS)
def test_a_change_applies_and_trains_and_is_as_small_as_told(change, copy, tmp_path):
    diff = DIFFS[change]
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    config, column = SHOWS[change]
    done = subprocess.run(
        [sys.executable, copy / "train.py", "--config", copy / "configs" / f"{config}.yaml", "run.name=x", *TINY, *BARE,
         "ppo.total_frames=1000"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = rows(tmp_path / "runs" / "x")[-1]
    assert abs(float(last[column])) > 1e-9  # a number, and not 0

    files, told = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE), TABLE[change[0].lower() + change[1:]]
    names, lines = told.rsplit(" | ", 1)
    code = [file for file in files if file.endswith(".py")]
    assert re.findall(r"`(.*?)`", names) == code
    assert ("YAML" in names) == (len(files) > len(code))
    assert int(lines) == len(re.findall(r"^\+(?!\+\+ )", diff, re.MULTILINE))


def test_all_changes_are_told_and_shown():
    assert DIFFS.keys() == SHOWS.keys()
    assert {name.lower() for name in DIFFS} == {name.lower() for name in TABLE}
