"""The typed config: YAML plus `section.key=value` overrides -> a checked Config.

    config = load_config("configs/cnn.yaml", ["ppo.learning_rate=5e-4", "env.num_envs=16"])

Every setting is declared once, below or as a policy's Options in models.py, with its type, range, default and one line
of doc; a YAML file holds only what differs. `python config.py` prints them all.
"""

import difflib
import json
import math
import re
import signal
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from models import POLICIES, Strict

VIEWPORT = (400, 600)  # pixels: height, width of the rendered frame
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


CROSS_CHECKS = ("num_envs", "num_minibatches", "segment_length", "glimpse", "mirror", "model")  # they name their keys


class ConfigError(Exception):
    """A user's mistake in a config; the message is one line that says where and what is allowed."""


class Section(Strict):
    model_config = ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True)


class Run(Section):
    seed: int = Field(1, ge=0, lt=2**31, description="seeds weights, action sampling, minibatches and landers")
    name: str = Field(
        "", pattern=r"^([\w-][\w.-]*)?$", max_length=100,
        description="folder under runs/; empty: config file and time of start")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$", description="auto, cpu, cuda or cuda:N")
    num_threads: int = Field(0, ge=0, le=1024, description="CPU threads of the update; 0: one per core")
    bf16: bool | None = Field(None, description="bfloat16 autocast in the network; null: where hardware computes it")


class Env(Section):
    num_envs: Positive = Field(32, le=4096, description="landers played at once")
    num_workers: Positive = Field(2, description="processes that play them; divides num_envs")
    frame_skip: int = Field(4, ge=1, le=50, description="physics steps (1/50 s) per decision")
    frame_stack: int = Field(4, ge=1, le=64, description="frames the policy sees, one per decision")
    shrink_factor: Positive = Field(4, description="600x400 pixels divided by this; divides 200, 25 at most")
    color: bool = Field(True, description="red, green and blue planes; false: gray")

    @field_validator("shrink_factor")
    @classmethod
    def _divides(cls, value):
        # At least 16 rows are left to see; three convolutions need as many.
        allowed = [f for f in range(1, 26) if all(side % f == 0 for side in VIEWPORT)]
        if value not in allowed:
            raise PydanticCustomError("divides", "must be one of " + ", ".join(map(str, allowed)))
        return value

    @model_validator(mode="after")
    def _even_workers(self):
        if self.num_envs % self.num_workers:
            allowed = _nearest_multiples(self.num_envs, self.num_workers)
            raise PydanticCustomError(
                "num_envs", f"env.num_envs={self.num_envs} must be a multiple of env.num_workers={self.num_workers}; "
                f"nearest: {allowed}")
        return self


class PPO(Section):
    total_frames: Positive = Field(1_500_000, description="environment frames, that is physics steps, to train for")
    num_steps: Positive = Field(64, le=65_536, description="decisions per lander and rollout")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Adam's step size at the start")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's epsilon")
    anneal: bool = Field(True, description="learning rate falls linearly to 0 over total_frames")
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


class Evaluation(Section):
    interval: Positive = Field(250_000, description="frames between greedy scores that choose the best checkpoint")
    selection_episodes: Positive = Field(
        40, le=100_000, description="episodes of such a score, on seeds never trained on")
    episodes: int = Field(
        100, ge=0, le=100_000, description="unseen episodes that score the best checkpoint at the end; 0: none")
    videos: int = Field(3, ge=0, description="landing videos recorded at the end")


class Tracking(Section):
    mlflow: bool = Field(True, description="log to MLflow; metrics.csv is written in any case")
    uri: str = Field("sqlite:///mlflow.db", description="MLflow store; the default is what a bare `mlflow ui` opens")
    experiment: str = Field("lunar-lander", min_length=1, description="MLflow experiment")
    parent: str = Field("", pattern=r"^\w*$", description="id of an MLflow run to be a child of; empty: none")
    checkpoint_interval: Positive = Field(100_000, description="frames between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best")
    progress: bool = Field(True, description="show how training goes; false: only trouble and final scores")


class Config(Section):
    run: Run = Run()
    env: Env = Env()
    model: SerializeAsAny[BaseModel] = Field(default_factory=lambda: POLICIES["cnn"].Options(), validate_default=True)
    ppo: PPO = PPO()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @field_validator("model", mode="before")
    @classmethod
    def _policy_options(cls, value):
        if isinstance(value, BaseModel):
            return value
        if not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise PydanticCustomError("model", f"model={value!r} must be a section of keys")
        name = value.get("name", "cnn")
        if not isinstance(name, str) or name not in POLICIES:
            raise PydanticCustomError("model", f"model.name={name!r} must be one of {', '.join(POLICIES)}")
        return POLICIES[name].Options(**value)

    @model_validator(mode="after")
    def _even_minibatches(self):
        batch, parts = self.env.num_envs * self.ppo.num_steps, self.ppo.num_minibatches
        if batch % parts:
            small = [d for d in range(1, math.isqrt(batch) + 1) if batch % d == 0]
            nearest = sorted({*small, *(batch // d for d in small)}, key=lambda d: abs(d - parts))[:2]
            raise PydanticCustomError(
                "num_minibatches", f"ppo.num_minibatches={parts} must divide env.num_envs * ppo.num_steps = {batch}; "
                f"nearest: {', '.join(map(str, sorted(nearest)))}")
        if self.ppo.num_steps % self.ppo.segment_length or batch // parts % self.ppo.segment_length:
            raise PydanticCustomError(
                "segment_length", f"ppo.segment_length={self.ppo.segment_length} must divide ppo.num_steps="
                f"{self.ppo.num_steps} and the minibatch of {batch // parts} decisions")
        if batch // parts < 2 and self.ppo.normalize_advantages:
            raise PydanticCustomError(
                "num_minibatches", f"ppo.num_minibatches={parts} leaves minibatches of one decision, whose advantages "
                f"cannot be normalised; at most {batch // 2}")
        return self

    @model_validator(mode="after")
    def _fit_for_the_eye(self):
        glimpse, height = getattr(self.model, "glimpse", 0), VIEWPORT[0] // self.env.shrink_factor
        if not glimpse:
            return self
        if not self.env.color or self.env.frame_stack < 2:
            raise PydanticCustomError(
                "glimpse", f"model.glimpse={glimpse} finds what moves by its colour, so it needs env.color=true and "
                "env.frame_stack of 2 or more; model.glimpse=0 model.mirror=false sees the whole picture instead")
        if not 16 <= glimpse <= height:
            raise PydanticCustomError(
                "glimpse", f"model.glimpse={glimpse} must be 0 or between 16 and {height}, the height of the frames "
                f"(400 / env.shrink_factor={self.env.shrink_factor})")
        return self

    @model_validator(mode="after")
    def _mirror_needs_the_eye(self):
        if getattr(self.model, "mirror", False) and not self.model.glimpse:
            raise PydanticCustomError(
                "mirror", "model.mirror=true needs model.glimpse, which tells left from right; set model.mirror=false")
        return self

    def flat(self):
        """{"section.key": value} in the order of declaration."""
        return {f"{s}.{k}": v for s, section in self.model_dump(mode="json").items() for k, v in section.items()}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 3e-4 is a number, a key given twice is an error, yes/no/on/off and 010 stay text."""

    yaml_implicit_resolvers: ClassVar = {
        key: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
        for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue  # no key at all, which is refused below, or a merge
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."))


def parse_yaml(text, source):
    """One YAML value; ConfigError names `source`, line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: thousands of digits, or of brackets
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from None
    except (LookupError, AttributeError, TypeError):  # yaml's constructors check nothing
        raise ConfigError(f"{source}: a tag such as !!bool or !!timestamp before what is none") from None


def parse_value(key, text, source):
    """The value of section.key as written on a command line. What looks like a number stays text where text is asked.

    So that run.name=3e-4 does not become 0.0003.
    """
    value = parse_yaml(text, source)
    section, _, name = key.partition(".")
    fields = getattr(Config.model_fields.get(section), "annotation", Config).model_fields
    if name in fields and fields[name].annotation is str and type(value) in (int, float):
        return text.strip()
    return value


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
            found = "but is empty" if tree is None else f"not {tree!r}"
            raise ConfigError(f"{path}: must hold sections such as `ppo:`, {found}")
    return apply_overrides(tree, overrides, str(path) if path else "config")


def apply_overrides(tree, overrides, source="config"):
    """The checked config of nested dicts (changed in place) and `section.key=value` strings."""
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"{override!r}: an override is written section.key=value")
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"{section}: must be a section of keys, not {branch!r}")
        branch[name] = parse_value(key.strip(), value, override)
    return check_config(tree, source)


def check_config(tree, source="config"):
    """A Config from nested dicts; ConfigError names the first wrong key, its value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as errors:
        error = errors.errors()[0]
    location = list(error["loc"])
    if not location or error["type"] in CROSS_CHECKS:
        raise ConfigError(f"{source}: {error['msg']}")
    # An error inside a policy's Options is raised while `model` is read, and names only the key.
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known_keys(tree), 1, 0)
        raise ConfigError(f"{source}: unknown key {key}; did you mean {close[0]}?")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    raise ConfigError(f"{source}: {key}={error['input']!r}: {message}")


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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python config.py | head` is no error
    sections = {name: field.annotation for name, field in Config.model_fields.items() if name != "model"}
    sections |= {f"model, name={name}": policy.Options for name, policy in POLICIES.items()}
    for section, keys in sections.items():
        print(f"{section}:")
        for key, field in keys.model_fields.items():
            print(f"  {key}: {json.dumps(field.get_default(call_default_factory=True))}  # {field.description}")
