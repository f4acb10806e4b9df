"""A user's mistake in a config gives one line that names key, value and what is allowed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from machinery.checkpoint import save_config
from machinery.config import Config, ConfigError, Env, changed_keys, check_config, known_keys, load_config
from machinery.errors import UserError
from models import POLICIES
from settings import Strict
from task import CALM, ENV_ID

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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
    assert config == check_config(tree)  # read as text by our loader, and with types by YAML's own


@pytest.mark.parametrize("text", ["3e-4", "1.10", "007", "5", "1_000", "true", "null"])
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


@pytest.mark.parametrize(("key", "text", "expected"), [
    *(("ppo.late_return", text, None) for text in ("null", "Null", "NULL", "~", "")),
    *(("run.bf16", text, None) for text in ("null", "~", "")),
    *((key, text, True) for key in ("ppo.value_clip", "run.bf16") for text in ("true", "True", "TRUE")),
    *((key, text, False) for key in ("env.color", "run.bf16") for text in ("false", "False", "FALSE")),
    *(("ppo.total_frames", text, 2_000_000) for text in ("2e6", "2_000_000", "2000000.0", "002000000", "+2E+6")),
    ("ppo.total_frames", "9007199254740993", 9007199254740993),  # which no float can be
    *(("ppo.learning_rate", text, 5e-4) for text in ("5e-4", "5E-4", ".0005", "0.000_5", '"5e-4"')),
    ("ppo.late_return", "-100", -100.0),
    ("ppo.late_return", "1_000", 1000.0),
    ("tracking.uri", '"sqlite:///a b.db"', "sqlite:///a b.db"),
    ("tracking.experiment", "'it''s: #1'", "it's: #1"),
    ("run.name", "", ""),
])
def test_what_a_text_stands_for(key, text, expected, tmp_path):
    section, _, name = key.partition(".")
    file = tmp_path / "x.yaml"
    file.write_text(f"model:\n  eye: none\n  mirror: false\n{section}:\n  {name}: {text}\n")
    for config in (load_config(file), load_config(None, ["model.eye=none", "model.mirror=false", f"{key}={text}"])):
        value = config.flat()[key]
        assert (value, type(value)) == (expected, type(expected))


def test_every_value_can_be_written_as_json():
    config = load_config(CONFIGS[0], ["ppo.learning_rate=1e-5", "tracking.uri='sqlite:///a b.db'", "run.name=007"])
    assert load_config(CONFIGS[0], [f"{key}={json.dumps(value)}" for key, value in config.flat().items()]) == config
    assert check_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_anchors_and_aliases(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("run:\n  seed: &number 64\nenv:\n  num_envs: *number\n")
    assert load_config(file).env.num_envs == 64


def test_lists_among_the_options_of_a_policy():
    class Options(Strict):
        channels: list[int]

    assert Options(channels=["16", "3e1"]).channels == [16, 30]
    with pytest.raises(ValidationError, match="valid integer"):
        Options(channels=[True])


@pytest.mark.parametrize(("tree", "expected"), [  # with types, as from a checkpoint
    ({"env": {"num_envs": True}}, "env.num_envs=True: input should be a valid integer"),
    ({"env": {"num_envs": 32.5}}, "env.num_envs=32.5: input should be a valid integer"),
    ({"ppo": {"gamma": False}}, "ppo.gamma=False: input should be a valid number"),
    ({"ppo": {"gamma": None}}, "ppo.gamma=None: input should be a valid number"),
    ({"ppo": {"late_return": float("nan")}}, "ppo.late_return=nan: input should be a finite number"),
    ({"env": {"color": 1}}, "env.color=1: must be true or false"),
    ({"run": {"name": True}}, "run.name=True: input should be a valid string"),
    ({"model": {"glimpse": True}}, "model.glimpse=True: input should be a valid integer"),
    ({"model": {"name": "transformer", "patch": True}}, "model.patch=True: input should be 4, 8 or 16"),
    ({"model": {"name": [1]}}, "model.name=[1] must be one of cnn"),
    ({"model": {1: 2}}, "model.1=1: keys should be strings"),
    ({1: 2}, "1=1: keys should be strings"),
    ({"ppo": None}, "ppo=None: must be a section of keys"),
    ([1], "valid dictionary"),
])
def test_mistakes_in_typed_values(tree, expected):
    with pytest.raises(ConfigError) as error:
        check_config(tree, "1.ckpt")
    assert str(error.value).startswith("1.ckpt: ")
    assert expected in str(error.value)


def test_options_refuse_true_for_a_number():
    with pytest.raises(ValidationError, match="valid integer"):
        POLICIES["cnn"].Options(glimpse=True)


@pytest.mark.parametrize(("text", "expected"), [
    ("", ["x.yaml", "empty"]),
    ("- 1\n", ["x.yaml", "sections"]),
    ("ppo: 3\n", ["ppo='3'", "section of keys"]),
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
    ("ppo:\n  learning_rate: .nan\n", ["ppo.learning_rate='.nan'", "number"]),
    ("ppo:\n  learning_rate: nan\n", ["ppo.learning_rate=nan", "finite"]),
    ("ppo:\n  late_return: -.inf\n", ["ppo.late_return='-.inf'", "number"]),
    ("ppo:\n  late_return: -inf\n", ["ppo.late_return=-inf", "finite"]),
    ("env:\n  num_envs: inf\n", ["env.num_envs=inf", "integer"]),
    ("model:\n  name: temporal_resnet\n  encoder_learning_rate: nan\n", ["encoder_learning_rate=nan", "finite"]),
    ("ppo:\n  total_frames: 1.5\n", ["ppo.total_frames=1.5"]),
    ("env:\n  color: on\n  num_envs: no\n", ["env.num_envs='no'"]),
    *((f"env:\n  color: {word}\n", [f"env.color='{word}'", "must be true or false"])
      for word in ("on", "off", "yes", "no", "y", "1", "0", "tRUE", "null", "")),
    ("run:\n  bf16: no\n", ["run.bf16='no'", "must be true or false"]),
    ("env:\n  num_envs: true\n", ["env.num_envs='true'", "integer"]),
    ("env:\n  shrink_factor: 7\n", ["env.shrink_factor=7", "1, 2, 4, 5, 8"]),
    ("env:\n  shrink_factor: 40\n", ["env.shrink_factor=40", "20, 25"]),
    ("run:\n  device: cuda:256\n", ["run.device='cuda:256'"]),  # which torch would take for cuda:0
    ("run:\n  seed: !!bool maybe\n", ["x.yaml:2:9", "no tags", "bool"]),
    ("model:\n  features: 100000000000000000000\n", ["model.features", "10000000000"]),
    ("model:\n  name: transformer\n  heads: 1\n  spatial_width: 1\n", ["model.spatial_width=1", "2"]),
    ("model:\n  features: true\n", ["model.features='true'", "integer"]),
    ("model:\n  name: transformer\n  spatial_width: 66\n", ["model.spatial_width=66", "multiple of heads=4"]),
    ("model:\n  name: transformer\n  width: 130\n", ["model.heads=4", "must divide width=130"]),
    ("model:\n  name: transformer\n  width: 129\n  heads: 3\n", ["model.spatial_width=64", "heads=3"]),
    ("env:\n  num_envs: 33\n", ["env.num_envs=33", "multiple of env.num_workers=2", "32 or 34"]),
    ("ppo:\n  num_minibatches: 7\n", ["ppo.num_minibatches=7", "2048", "4, 8"]),
    ("run:\n  name: a/b\n", ["run.name='a/b'"]),
    ("run:\n  device: gpu\n", ["run.device='gpu'"]),
    ("run:\n  name: ..\n", ["run.name='..'"]),
    ("ppo:\n", ["ppo=''", "section of keys"]),
    ("1: 2\n", ["unknown key 1;"]),
    ('"a\\nb": 2\n', ["unknown key a b;"]),
    ("? [1]\n: 2\n", ["x.yaml:1:3", "unhashable key"]),
    ("model: {1: 2}\n", ["unknown key model.1;"]),
    ("model: 1\n", ["model='1'", "section of keys"]),
    ("model: {name: [1]}\n", ["model.name=['1']", "cnn"]),
    ("ppo: {gamma: [1, 2]}\n", ["ppo.gamma=[1.0, 2.0]", "number"]),
    ("ppo: {gamma: null}\n", ["ppo.gamma='null'", "number"]),
    ("ppo: {<<: {gamma: 0.9}}\n", ["unknown key ppo.<<;"]),
    ("ppo: &a [*a]\n", ["x.yaml:1:6", "recursive"]),
    ("ppo: *a\n", ["x.yaml:1:6", "undefined alias 'a'"]),
    ("ppo: {gamma: " + 5000 * "1" + "}\n", ["x.yaml", "ppo.gamma=inf", "finite"]),
    ("ppo: " + 3000 * "[", ["x.yaml", "recursion"]),
    ('ppo: "\\U00110000"\n', ["x.yaml", "0x110000"]),
    ('ppo: "\\UFFFFFFFF"\n', ["x.yaml", "too large" if sys.version_info < (3, 13) else "chr() arg not in range"]),
    ("%YAML 1." + 5000 * "1" + "\n--- 1\n", ["x.yaml", "limit (4300", "value has 5000 digits"]),
    ("ppo: \0\n", ["x.yaml", "#x0000"]),
    ("ppo: !!python/object/apply:os.mkdir [planted]\n", ["x.yaml:1:6", "os.mkdir"]),
    ("ppo: !!python/object/new:config {gamma: 0.9}\n", ["x.yaml:1:6", "python/object/new:config"]),
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
    ("ppo.gamma=", "ppo.gamma=''"),
    ("ppo.gamma=[1, 2]", "ppo.gamma=[1.0, 2.0]: input should be a valid number"),
    ("ppo.gamma=!!float 1", "ppo.gamma=!!float 1:1:1: a config has no tags"),
    ("env.color=on", "env.color='on': must be true or false"),
    ("ppo.gamma=[\n", "ppo.gamma=[ :2:1: expected"),
    ("ppo.gamma=[1", "ppo.gamma=[1"),
    ("ppo.num_minibatches=2048", "at most 1024"),
    ("=1", "section.key=value"),
    ("ppo.gamma==", "ppo.gamma='='"),
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


@pytest.mark.parametrize("same", ["env.num_envs=32.0", "ppo.gamma=.99", "ppo.late_return=1.8e2", "run.name=''"])
def test_settings_written_differently_are_unchanged(same):
    assert changed_keys(Config(), load_config(None, [same])) == {}


def test_changed_keys():
    before, after = load_config(None, ["ppo.target_kl=0.1"]), load_config(None, ["run.name=007", "ppo.gamma=0.5"])
    assert changed_keys(before, after) == {
        "run.name": ("", "007"), "ppo.gamma": (0.99, 0.5), "ppo.target_kl": (0.1, None)}
    other = changed_keys(Config(), load_config(None, ["model.name=transformer"]))
    assert other["model.name"] == ("cnn", "transformer")
    assert other["model.patch"] == (None, 8)  # a key of the new policy alone
    assert all(key.startswith("model.") for key in other)


@pytest.mark.parametrize(("override", "expected"), [
    ("env.gravity=-12", ["env.gravity=-12.0", "between -12 and 0"]), ("env.gravity=0", ["between -12 and 0"]),
    ("env.gravity=[-8, -12]", ["env.gravity=[-8.0, -12.0]", "range"]), ("env.wind_power=[1]", ["range [low, high]"]),
    ("env.wind_power=20.5", ["env.wind_power=20.5", "between 0 and 20"]), ("env.turbulence_power=[0, 3]", ["0 and 2"]),
    ("env.wind_power=true", ["env.wind_power='true'", "number"]), ("env.gravity=.nan", ["env.gravity="])])
def test_weather_that_cannot_be(override, expected, tmp_path):
    message = error_of("model:\n  name: cnn\n", tmp_path, [override])
    for part in expected:
        assert part in message


def test_no_wind_is_told_of_unless_it_blows():
    with pytest.raises(ConfigError, match=r"^env\.wind_power: there is no wind without env\.enable_wind=true$"):
        load_config("configs/cnn.yaml", ["env.wind_power=20"])
    assert load_config("configs/cnn_wind.yaml", ["env.wind_power=20"]).env.wind_power == 20
    assert not load_config("configs/cnn_wind.yaml", ["env.wind_power=20", "env.enable_wind=false"]).env.enable_wind


def test_weather_may_be_a_range_and_reads_back(tmp_path):
    config = load_config(None, ["env.gravity=[-12, -8]", "env.enable_wind=true", "env.wind_power=[0,20.0]"])
    assert config.env.unusual() == {"gravity": [-12, -8], "enable_wind": True, "wind_power": [0, 20]}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(None).env.unusual() == {}


def test_a_report_names_the_options_that_were_in_force():
    windy = ["env.gravity=-8", "env.enable_wind=true", "env.wind_power=[0,20]"]
    assert load_config(None, windy).env.described() == {
        "id": ENV_ID, "gravity": -8, "enable_wind": True, "wind_power": [0, 20]}
    assert load_config(None, [*windy, "env.enable_wind=false"]).env.described() == {"id": ENV_ID, "gravity": -8}


def test_settings():
    assert Env(frame_skip=2, color=False, num_envs=64, wind_power=3).settings() == CALM | {
        "env_id": ENV_ID, "frame_skip": 2, "frame_stack": 4, "shrink_factor": 4, "color": False, "continuous": False,
        "wind_power": 3}


def test_a_mistake_in_a_config_is_the_users():
    assert issubclass(ConfigError, UserError)


def test_command_that_prints_all_keys():
    done = subprocess.run([sys.executable, "-m", "machinery.config"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  learning_rate: 0.001  # Adam's step size at the start\n" in done.stdout
    assert all(f"  {key.partition('.')[2]}: " in done.stdout for key in known_keys() if "." in key)


def test_every_key_has_a_line_of_doc():
    sections = [field.annotation for name, field in Config.model_fields.items() if name != "model"]
    for section in sections + [policy.Options for policy in POLICIES.values()]:
        assert all(field.description for field in section.model_fields.values())
