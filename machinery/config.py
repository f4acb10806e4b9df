"""The typed config: YAML plus `section.key=value` overrides -> a checked Config.

    config = load_config("configs/cnn.yaml", ["ppo.learning_rate=5e-4", "env.num_envs=16"])

Every setting is declared once, below or as a policy's Options in models.py, with its type, range, default and one line
of doc; a YAML file holds only what differs. `python -m machinery.config` prints them all.
"""

import difflib
import json
import math
import re
import signal
import warnings
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from machinery.errors import UserError
from models import POLICIES
from settings import WORDS, Strict
from task import CALM, ENV_ID, WIND_OPTIONS, TaskError, find_task

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Weather = float | list[float]  # a number, or the ends of a range
LANDER_OPTIONS = {"continuous": False} | CALM  # and their defaults
MASK = "***"  # in place of the credentials of a URI


class ConfigError(UserError):
    """A mistake in a config: where it is, and what is allowed."""

    def __init__(self, message):
        # A key or an override may hold line breaks, or a URI with a password.
        super().__init__(masked(" ".join(map(str.strip, message.splitlines()))))


class ConflictError(ConfigError):
    """Settings, each allowed by itself, that do not go with each other."""


def masked(text):
    """`text`, which is or quotes one URI, without the URI's credentials."""
    text = re.sub(r"://[^/\s].*@", f"://{MASK}@", text)
    return re.sub(r"(password|passwd|pwd|token)=[^&\s]*", rf"\1={MASK}", text, flags=re.IGNORECASE)


class Run(Strict):
    seed: int = Field(1, ge=0, lt=2**31, description="seeds weights, action sampling, minibatches and landers")
    name: str = Field(
        "", pattern=r"^([\w-][\w.-]*)?$", max_length=100,
        description="folder under runs/; empty: config file and time of start")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?)$", description="auto, cpu, cuda, cuda:N or mps")
    num_threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the update; 0: one per core, or 1 beside other work")
    bf16: bool | None = Field(None, description="bfloat16 autocast in the network; null: where hardware computes it")


class Env(Strict):
    id: str = Field(
        ENV_ID, min_length=1, max_length=200,
        description="any Gymnasium environment with frames; your own: my_module:MyEnv-v0")
    options: dict[str, Any] = Field({}, description="what gym.make takes besides; of LunarLander-v3: the keys below")
    num_envs: Positive = Field(32, le=4096, description="environments played at once")
    num_workers: Positive = Field(2, description="processes that play them; divides num_envs")
    frame_skip: int = Field(4, ge=1, le=50, description="environment steps per decision; a lander's take 1/50 s")
    frame_stack: int = Field(4, ge=1, le=64, description="frames the policy sees, one per decision")
    shrink_factor: Positive = Field(4, description="sides of a frame divided by this; divides both, 25 at most")
    color: bool = Field(True, description="red, green and blue planes; false: gray")
    # Options of LunarLander-v3:
    continuous: bool = Field(False, description="actions are thrusts of main and side engine; false: one of four")
    gravity: Weather = Field(-10.0, description="between -12 and 0; [low, high]: each episode draws its own")
    enable_wind: bool = Field(False, description="wind pushes the lander sideways, turbulence turns it")
    wind_power: Weather = Field(15.0, description="strength of the wind, 0 to 20; or [low, high]")
    turbulence_power: Weather = Field(1.5, description="strength of the turbulence, 0 to 2; or [low, high]")

    @field_validator("gravity", "wind_power", "turbulence_power")
    @classmethod
    def _within(cls, value, info):
        """LunarLander-v3's own limits. A gravity of -12 or 0 is none of its numbers, but may end a range."""
        low, high = {"gravity": (-12, 0), "wind_power": (0, 20), "turbulence_power": (0, 2)}[info.field_name]
        is_range = isinstance(value, list)
        if is_range and not (len(value) == 2 and value[0] <= value[1]):
            raise PydanticCustomError("range", "must be a number or a range [low, high]")
        for end in value if is_range else [value]:
            if not low <= end <= high or (info.field_name == "gravity" and end in (low, high) and not is_range):
                raise PydanticCustomError("range", f"must lie between {low} and {high}")
        return value

    @model_validator(mode="after")
    def _even_workers(self):
        if self.num_envs % self.num_workers:
            allowed = _nearest_multiples(self.num_envs, self.num_workers)
            raise PydanticCustomError(
                "conflict", f"env.num_envs={self.num_envs} must be a multiple of env.num_workers={self.num_workers}; "
                f"nearest: {allowed}")
        return self

    @model_validator(mode="after")
    def _options_of_its_own(self):
        if self.id == ENV_ID and self.options:
            raise PydanticCustomError(
                "conflict", f"env.options: of {ENV_ID} they are keys of env: {', '.join(LANDER_OPTIONS)}")
        if self.id != ENV_ID and (given := self.unusual()):
            raise PydanticCustomError(
                "conflict", f"env.{next(iter(given))} is an option of {ENV_ID}; those of {self.id} go to env.options")
        return self

    @model_validator(mode="after")
    def _frames_to_be_had(self):
        try:
            height, width = self.task.viewport
        except TaskError as error:
            raise PydanticCustomError("conflict", f"env.id={self.id} {error}") from None
        # At least 16 rows and columns are left to see; three convolutions need as many.
        limit = min(height, width, 400) // 16
        allowed = [str(factor) for factor in range(1, limit + 1) if height % factor == width % factor == 0]
        if not allowed:
            raise PydanticCustomError("conflict", f"env.id={self.id} shows frames of only {width}x{height} pixels")
        if str(self.shrink_factor) not in allowed:
            raise PydanticCustomError(
                "conflict", f"env.shrink_factor={self.shrink_factor} must be one of {', '.join(allowed)}, which divide "
                f"frames of {width}x{height}")
        return self

    @property
    def task(self):
        """The facts of this environment, a task.Task."""
        return find_task(self.id, {"continuous": self.continuous} if self.id == ENV_ID else self.options)

    def settings(self):
        """What envs.make_env takes: which environment, how it is seen, and its options."""
        seen = {"env_id": self.id} | self.model_dump(include={"frame_skip", "frame_stack", "shrink_factor", "color"})
        own = set(LANDER_OPTIONS) if self.id == ENV_ID else {"options"}
        return seen | self.model_dump(include=own)

    def described(self):
        """What a report says of the environment: its id, and the options in force that are not its defaults."""
        in_force = self.unusual()
        if not self.enable_wind:
            in_force = {key: value for key, value in in_force.items() if key not in WIND_OPTIONS}
        return {"id": self.id} | in_force | self.options

    def unusual(self):
        """The options of LunarLander-v3 that are not gymnasium's defaults."""
        return {key: getattr(self, key) for key, usual in LANDER_OPTIONS.items() if getattr(self, key) != usual}


class PPO(Strict):
    total_frames: Positive = Field(
        1_500_000, description="environment frames, that is physics steps, to train for; the last rollout is finished")
    num_steps: Positive = Field(64, le=65_536, description="decisions per lander and rollout")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Adam's step size at the start")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's epsilon")
    anneal: float = Field(1, ge=0, le=10, description="learning rate is multiplied by the share of total_frames left, "
                          "to this power; 0: it stays as it is, 1: falls linearly to 0, 2: sooner, with a longer tail")
    warmup_frames: int = Field(0, ge=0, description="learning rate rises linearly from 0 over this many frames")
    gamma: Probability = Field(0.99, description="discount per decision")
    gae_lambda: Probability = Field(0.95, description="lambda of generalised advantage estimation")
    update_epochs: Positive = Field(4, description="passes over each rollout")
    num_minibatches: Positive = Field(8, description="minibatches per pass; divides num_envs * num_steps")
    clip_coef: float = Field(0.2, gt=0, le=1, description="epsilon of the clipped surrogate objective")
    value_clip: bool = Field(False, description="clip value changes by clip_coef as well")
    value_coef: float = Field(0.5, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(0.01, ge=0, le=1, description="weight of the entropy bonus")
    normalize_advantages: bool = Field(True, description="zero mean and unit deviation per minibatch")
    segment_length: Positive = Field(
        1, description="successive decisions kept together when minibatches are shuffled; divides num_steps")
    max_grad_norm: float = Field(0.5, gt=0, description="gradients are scaled down to this global norm")
    target_kl: float | None = Field(None, gt=0, description="an update ends early once a pass exceeds this KL")
    reward_scale: float = Field(0.01, gt=0, description="rewards are multiplied by this before learning")
    late_return: float | None = Field(180, description="mean return at which the late stage begins; null: never")
    late_learning_rate: float = Field(0.25, gt=0, le=1, description="late stage: learning rate times this")
    late_entropy: float = Field(0.0, ge=0, le=1, description="late stage: entropy bonus times this")

    @field_validator("anneal", mode="before")
    @classmethod
    def _power(cls, value):
        """Configs from before it was a power say true, that is 1, or false."""
        word = WORDS.get(value, value) if isinstance(value, str) else value
        return float(word) if isinstance(word, bool) else value


class Evaluation(Strict):
    interval: Positive = Field(250_000, description="frames between greedy scores that choose the best checkpoint")
    selection_episodes: Positive = Field(
        40, le=100_000, description="episodes of such a score, on seeds never trained on")
    episodes: int = Field(
        100, ge=0, le=100_000, description="unseen episodes that score the best checkpoint at the end; 0: none")
    videos: int = Field(3, ge=0, description="landing videos recorded at the end")


# pydantic's classes have a `register` of their own, which nobody needs here.
warnings.filterwarnings("ignore", 'Field name "register" in "Tracking"', UserWarning)


class Tracking(Strict):
    mlflow: bool = Field(True, description="log to MLflow; metrics.csv is written in any case")
    uri: str = Field(
        "", description="MLflow store; empty: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, which `mlflow ui` opens")
    experiment: str = Field("", description="MLflow experiment; empty: MLFLOW_EXPERIMENT_NAME, else lunar-lander")
    parent: str = Field("", pattern=r"^\w*$", description="id of an MLflow run to be a child of; empty: none")
    register: str = Field(
        "", pattern=r"^[\w -]*$", max_length=100,
        description="registered model of which the best policy becomes a version, `champion` if it is; empty: none")
    checkpoint_interval: Positive = Field(100_000, description="frames between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best")
    progress: bool = Field(True, description="show how training goes; false: only the first line, trouble and scores")


class Config(Strict):
    run: Run = Run()
    env: Env = Env()
    model: SerializeAsAny[BaseModel] = Field(default_factory=lambda: POLICIES["cnn"].Options(), validate_default=True)
    ppo: PPO = PPO()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @field_validator("model", mode="before")
    @classmethod
    def _policy_options(cls, value):
        if not isinstance(value, dict):
            return value
        name = value.get("name", "cnn")
        if str(name) not in POLICIES:
            raise PydanticCustomError("conflict", f"model.name={name!r} must be one of {', '.join(POLICIES)}")
        return POLICIES[str(name)].Options.model_validate(value)

    @model_validator(mode="after")
    def _even_minibatches(self):
        batch, parts = self.env.num_envs * self.ppo.num_steps, self.ppo.num_minibatches
        if batch % parts:
            small = [d for d in range(1, math.isqrt(batch) + 1) if batch % d == 0]
            nearest = sorted({*small, *(batch // d for d in small)}, key=lambda d: abs(d - parts))[:2]
            raise PydanticCustomError(
                "conflict", f"ppo.num_minibatches={parts} must divide env.num_envs * ppo.num_steps = {batch}; "
                f"nearest: {', '.join(map(str, sorted(nearest)))}")
        if self.ppo.num_steps % self.ppo.segment_length or batch // parts % self.ppo.segment_length:
            raise PydanticCustomError(
                "conflict", f"ppo.segment_length={self.ppo.segment_length} must divide ppo.num_steps="
                f"{self.ppo.num_steps} and the minibatch of {batch // parts} decisions")
        if batch // parts < 2 and self.ppo.normalize_advantages:
            raise PydanticCustomError(
                "conflict", f"ppo.num_minibatches={parts} leaves minibatches of one decision, whose advantages "
                f"cannot be normalised; at most {batch // 2}")
        return self

    @model_validator(mode="after")
    def _registered_with_a_score(self):
        if self.tracking.register and not (self.tracking.mlflow and self.evaluation.episodes):
            raise PydanticCustomError(
                "conflict", f"tracking.register={self.tracking.register} needs tracking.mlflow=true, and "
                "evaluation.episodes of 1 or more, whose score decides who is champion")
        return self

    @model_validator(mode="after")
    def _fit_for_the_eye(self):
        eye, glimpse = getattr(self.model, "eye", "none"), getattr(self.model, "glimpse", 0)
        side = min(self.env.task.viewport) // self.env.shrink_factor
        frames = {"colour": 2, "learned": 3, "none": 1}[eye]
        if eye == "colour" and not self.env.color:
            raise PydanticCustomError(
                "conflict", "model.eye=colour finds what moves by its colour, so it needs env.color=true; "
                "model.eye=learned finds it in gray, too, and model.eye=none sees the whole picture")
        if self.env.frame_stack < frames:
            raise PydanticCustomError(
                "conflict", f"model.eye={eye} finds what moves from one frame to the next, so it needs env.frame_stack "
                f"of {frames} or more; model.eye=none sees the whole picture instead")
        if getattr(self.model, "pooling", "flatten") == "attention" and self.env.frame_stack < 2:
            raise PydanticCustomError(
                "conflict", "model.pooling=attention sees what changes from one frame to the next, so it needs "
                "env.frame_stack of 2 or more")
        glimpses = getattr(self.model, "glimpses", 1)
        if glimpses > 1 and eye != "learned":
            raise PydanticCustomError(
                "conflict", f"model.glimpses={glimpses} needs model.eye=learned, which can tell several things apart; "
                f"model.eye={eye} {'sees the whole picture' if eye == 'none' else 'looks at one'}")
        if getattr(self.model, "tilt", False) and eye != "colour":
            raise PydanticCustomError(
                "conflict", f"model.tilt=true needs model.eye=colour, which sees the whole of a body; model.eye={eye} "
                f"{'sees the whole picture' if eye == 'none' else 'looks at parts of it'}; or set model.tilt=false")
        if eye != "none" and glimpse > side:
            raise PydanticCustomError(
                "conflict", f"model.glimpse={glimpse} must be between 16 and {side}, the shorter side of a frame "
                f"({min(self.env.task.viewport)} / env.shrink_factor={self.env.shrink_factor}); model.eye=none sees "
                "the whole picture instead")
        return self

    @model_validator(mode="after")
    def _mirror_needs_to_be_known(self):
        if getattr(self.model, "mirror", False) and not self.env.task.mirrored_actions:
            raise PydanticCustomError(
                "conflict", f"model.mirror=true needs to know what each action of {self.env.id} is in a mirror, which "
                "nobody has said; set model.mirror=false")
        return self

    def saved(self):
        """Nested dicts of plain values as files keep them: without the credentials of a URI."""
        tree = self.model_dump(mode="json")
        tree["tracking"]["uri"] = masked(tree["tracking"]["uri"])
        return tree

    def flat(self):
        """{"section.key": value} in the order of declaration."""
        return {f"{s}.{k}": v for s, section in self.model_dump(mode="json").items() for k, v in section.items()}


class _Loader(yaml.BaseLoader):
    """YAML whose values are all text. A key that is given twice is a mistake, and so is a tag such as !!bool."""

    def construct_object(self, node, deep=False):
        if node.tag not in (self.DEFAULT_SCALAR_TAG, self.DEFAULT_SEQUENCE_TAG, self.DEFAULT_MAPPING_TAG):
            raise yaml.MarkedYAMLError(problem=f"a config has no tags such as {node.tag}", problem_mark=node.start_mark)
        return super().construct_object(node, deep)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text, source):
    """Texts, and lists and dicts of them; ConfigError names `source`, line and column. Where nothing stands, ""."""
    try:
        value = yaml.load(text, _Loader)
        return "" if value is None else value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    # The last three: "\U00110000", which is no character, "\UFFFFFFFF", and thousands of brackets.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


def load_config(path=None, overrides=()):
    """The checked config of a YAML file (None: all defaults) and `section.key=value` strings, which win."""
    tree = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            there = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
            raise ConfigError(f"{path}: no such config" + (f"; there are {', '.join(there)}" if there else ""))
        try:
            tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
        if not isinstance(tree, dict):
            found = f"not {tree!r}" if tree else "but is empty"
            raise ConfigError(f"{path}: must hold sections such as `ppo:`, {found}")
    return apply_overrides(tree, overrides, str(path) if path else "config")


def split_override(override):
    """("section.key", "value") of `section.key=value`; ConfigError if it is written otherwise."""
    key, equals, value = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override!r}: an override is written section.key=value")
    return key.strip(), value


def key_of(override):
    """The section.key of `section.key=value`."""
    return split_override(override)[0]


def apply_overrides(tree, overrides, source="config"):
    """The checked config of nested dicts and `section.key=value` strings."""
    merged, keys = dict(tree), []
    for override in overrides:
        key, value = split_override(override)
        keys.append(key)
        section, _, name = key.partition(".")
        branch = merged.get(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"{section}: must be a section of keys, not {branch!r}")
        merged[section] = {**branch, name: parse_yaml(value, override)}
    try:
        config = check_config(merged, "command line" if overrides else source)
    except ConfigError:
        check_config(tree, source)  # a file that is wrong by itself is to blame
        raise
    idle = [key for key in keys if key.removeprefix("env.") in WIND_OPTIONS]
    if idle and config.env.id == ENV_ID and not config.env.enable_wind and "env.enable_wind" not in keys:
        raise ConfigError(f"{idle[0]}: there is no wind without env.enable_wind=true")
    return config


def check_config(tree, source="config"):
    """A Config from nested dicts; ConfigError names the first wrong key, its value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as errors:
        error = errors.errors()[0]
    key = ".".join(map(str, error["loc"][:2]))  # more would tell which of two types was tried, or where in a list
    message = error["msg"].removeprefix("Value error, ")
    if not key or error["type"] == "conflict":  # the message names the keys
        raise ConflictError(f"{source}: {message}")
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known_keys(tree), 1, 0)
        raise ConfigError(f"{source}: unknown key {key}; did you mean {close[0]}?")
    plainer = {"model_type": "must be a section of keys", "bool_type": "must be true or false"}
    message = plainer.get(error["type"], message[0].lower() + message[1:])
    raise ConfigError(f"{source}: {key}={error['input']!r}: {message}")


def split_choices(text):
    """The values of `value,value`; a comma within a list [low, high] or a dict is none between values."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def changed_keys(before, after):
    """{"section.key": (value before, value after)} of the settings in which two configs differ."""
    before, after = before.flat(), after.flat()
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def known_keys(tree=None):
    """All "section.key" names, with those of the policy that `tree` chooses, and the bare section names."""
    model = (tree or {}).get("model")
    name = model.get("name", "cnn") if isinstance(model, dict) else "cnn"
    sections = {s: field.annotation for s, field in Config.model_fields.items() if s != "model"}
    sections["model"] = POLICIES.get(str(name), POLICIES["cnn"]).Options
    return [f"{s}.{key}" for s, section in sections.items() for key in section.model_fields] + list(sections)


def _nearest_multiples(value, of):
    below, above = value // of * of, -(-value // of) * of
    return " or ".join(str(v) for v in (below, above) if v)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python -m machinery.config | head` is no error
    sections = {name: field.annotation for name, field in Config.model_fields.items() if name != "model"}
    sections |= {f"model:  # with name: {name}": policy.Options for name, policy in POLICIES.items()}
    for section, keys in sections.items():
        print(section if ":" in section else f"{section}:")
        for key, field in keys.model_fields.items():
            print(f"  {key}: {json.dumps(field.get_default(call_default_factory=True))}  # {field.description}")
