"""A user's mistake in a config gives one line that names key, value and what is allowed."""

from pathlib import Path

import pytest
import yaml

from checkpoint import save_config
from config import ConfigError, check_config, known_keys, load_config
from models import POLICIES

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def error_of(text, tmp_path, overrides=()):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_which_policy(path):
    config, tree = load_config(path), yaml.safe_load(path.read_text())
    assert config.model.name == tree["model"]["name"]
    assert config == check_config(tree)  # read by our loader, and by YAML's own


@pytest.mark.parametrize("text", ["3e-4", "1.10", "007", "5", "1_000"])
def test_a_name_that_looks_like_a_number_stays_as_it_is_written(text):
    assert load_config(None, [f"run.name={text}"]).run.name == text


def test_resolved_config_reads_back(tmp_path):
    config = load_config(None, ["ppo.learning_rate=3e-4", "run.name=a-b.c", "ppo.target_kl=0.02"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert set(config.flat()) == {key for key in known_keys() if "." in key}


def test_overrides_win_and_numbers_are_numbers(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("ppo:\n  learning_rate: 3e-4\n  total_frames: 2e6\nenv:\n  color: true\n  num_envs: 010\n")
    config = load_config(file, ["ppo.gamma=0.9", "ppo.late_return=null", "ppo.num_minibatches=5"])
    assert config.ppo.learning_rate == 3e-4
    assert (config.ppo.total_frames, config.env.num_envs) == (2_000_000, 10)
    assert (config.ppo.gamma, config.ppo.late_return) == (0.9, None)


@pytest.mark.parametrize(("text", "expected"), [
    ("", ["x.yaml", "empty"]),
    ("- 1\n", ["x.yaml", "sections"]),
    ("ppo: 3\n", ["ppo", "3"]),
    ("ppo:\n  gamma: 0.9\n  gamma: 0.8\n", ["x.yaml:3:3", "'gamma' is given twice"]),
    ("ppo:\n  gamma: [\n", ["x.yaml:3:1"]),
    ("ppo:\n\tgamma: 1\n", ["x.yaml:2:1"]),
    ("ppo:\n  lerning_rate: 1\n", ["unknown key ppo.lerning_rate", "ppo.learning_rate"]),
    ("pppo:\n  gamma: 1\n", ["unknown key pppo", "did you mean ppo?"]),
    ("model:\n  glimse: 32\n", ["unknown key model.glimse", "model.glimpse"]),
    ("model:\n  name: cn\n", ["model.name='cn'", "cnn"]),
    ("model:\n  glimpse: 3\n", ["model.glimpse=3", "16"]),
    ("ppo:\n  gamma: 1.5\n", ["ppo.gamma=1.5", "less than or equal to 1"]),
    ("ppo:\n  learning_rate: fast\n", ["ppo.learning_rate='fast'", "number"]),
    ("ppo:\n  learning_rate: .nan\n", ["ppo.learning_rate", "finite"]),
    ("ppo:\n  total_frames: 1.5\n", ["ppo.total_frames=1.5"]),
    ("env:\n  color: on\n  num_envs: no\n", ["env.num_envs='no'"]),
    ("env:\n  num_envs: true\n", ["env.num_envs=True", "number"]),
    ("env:\n  shrink_factor: 7\n", ["env.shrink_factor=7", "1, 2, 4, 5, 8"]),
    ("env:\n  shrink_factor: 40\n", ["env.shrink_factor=40", "20, 25"]),
    ("run:\n  device: cuda:256\n", ["run.device='cuda:256'"]),  # which torch would take for cuda:0
    ("run:\n  seed: !!bool maybe\n", ["x.yaml", "a tag such as !!bool"]),
    ("model:\n  features: 100000000000000000000\n", ["model.features", "10000000000"]),
    ("model:\n  name: transformer\n  heads: 1\n  spatial_width: 1\n", ["model.spatial_width=1", "2"]),
    ("model:\n  features: true\n", ["model.features=True", "number"]),
    ("model:\n  name: transformer\n  spatial_width: 66\n", ["model.spatial_width=66", "multiple of heads=4"]),
    ("model:\n  name: transformer\n  width: 130\n", ["model.heads=4", "must divide width=130"]),
    ("model:\n  name: transformer\n  width: 129\n  heads: 3\n", ["model.spatial_width=64", "heads=3"]),
    ("env:\n  num_envs: 33\n", ["env.num_envs=33", "multiple of env.num_workers=2", "32 or 34"]),
    ("ppo:\n  num_minibatches: 7\n", ["ppo.num_minibatches=7", "2048", "4, 8"]),
    ("run:\n  name: a/b\n", ["run.name='a/b'"]),
    ("run:\n  device: gpu\n", ["run.device='gpu'"]),
    ("run:\n  name: ..\n", ["run.name='..'"]),
    ("ppo:\n", ["ppo=None"]),
    ("1: 2\n", ["1=1", "strings"]),
    ("? [1]\n: 2\n", ["x.yaml:1:3", "unhashable key"]),
    ("model: {1: 2}\n", ["model={1: 2}", "section of keys"]),
    ("model: {name: [1]}\n", ["model.name=[1]", "cnn"]),
    ("ppo: {gamma: " + 5000 * "1" + "}\n", ["x.yaml", "4300 digits"]),
    ("ppo: " + 3000 * "[", ["x.yaml", "recursion"]),
    ("ppo: \0\n", ["x.yaml", "#x0000"]),
    ("ppo: !!python/object/apply:os.mkdir [planted]\n", ["x.yaml:1:6", "os.mkdir"]),
    ("env:\n  num_envs: 1000000\n", ["env.num_envs=1000000", "less than or equal to 4096"]),
    ("evaluation:\n  selection_episodes: 1e6\n", ["100000"]),
    ("ppo:\n  learning_rate: 1e999\n", ["ppo.learning_rate=inf", "finite"]),
    ("ppo:\n  num_steps: 65536\n  num_minibatches: 7\nenv:\n  num_envs: 4096\n", ["268435456", "4, 8"]),  # at once
])
def test_mistakes(text, expected, tmp_path):
    message = error_of(text, tmp_path)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(("override", "expected"), [
    ("ppo.gama=1", "ppo.gamma"),
    ("gamma", "section.key=value"),
    ("ppo.gamma=", "ppo.gamma=None"),
    ("ppo.gamma=[1", "ppo.gamma=[1"),
    ("ppo.num_minibatches=2048", "at most 1024"),
    ("=1", "section.key=value"),
    ("ppo.gamma==", "ppo.gamma==:1:1"),
    ("run.name=../x", "run.name='../x'"),
    ("env.num_workers=64", "nearest: 64"),
    ("model.name=[1]", "must be one of cnn"),
])
def test_mistakes_in_overrides(override, expected, tmp_path):
    assert expected in error_of("model:\n  name: cnn\n", tmp_path, [override])


def test_a_number_may_be_a_name():
    assert load_config(None, ["run.name=7"]).run.name == "7"
    assert load_config(None, ["run.name=007"]).run.name == "007"


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("ppo:\n  gamma: é\n".encode("latin1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not a text in UTF-8 .*byte 14"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml: no such config"):
        load_config(tmp_path / "folder.yaml")


def test_missing_file_names_those_there_are(tmp_path):
    (tmp_path / "cnn.yaml").write_text("model:\n  name: cnn\n")
    with pytest.raises(ConfigError, match=r"cnm\.yaml: no such config; there are .*cnn\.yaml"):
        load_config(tmp_path / "cnm.yaml")


def test_every_key_has_a_line_of_doc():
    from config import Config

    sections = [field.annotation for name, field in Config.model_fields.items() if name != "model"]
    for section in sections + [policy.Options for policy in POLICIES.values()]:
        assert all(field.description for field in section.model_fields.values())
