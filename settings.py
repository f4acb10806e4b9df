"""Settings with types: the base of a config's sections, and of a policy's options.

    class Options(Strict):
        width: int = Field(128, ge=1, description="size of an embedding")

    Options(width="64").width   # 64: the text of a YAML file is read as what the setting asks for
"""

from contextlib import suppress
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

# YAML 1.2's words for what is neither text nor number.
WORDS = {
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None, "": None}


def read_text(value, annotation):
    """The text of a YAML file as what a setting of that type asks for; unchanged if it is no such thing, or no text."""
    if isinstance(value, list):
        return [read_text(item, annotation) for item in value]
    if isinstance(value, dict):
        return {key: read_text(item, annotation) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    parts = get_args(annotation) or [annotation]  # of X | None, Literal[...], list[X] and dict[str, X]
    kinds = {part if isinstance(part, type) else type(part) for part in parts}
    if Any in parts:  # whatever it looks like
        kinds = {bool, type(None), int, float}
    if type(word := WORDS.get(value, value)) in kinds:
        return word
    if kinds & {int, float}:
        with suppress(ValueError):
            return int(value) if int in kinds else float(value)
        with suppress(ValueError):
            number = float(value)  # a whole number may be written 2e6 or 32.0
            return int(number) if number.is_integer() and float not in kinds else number
    return value


class Strict(BaseModel):
    """Settings that know their keys and take nothing for what it is not, such as true for 1, or `on` for true.

    A value comes with its type, or as the text of a YAML file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, settings):
        if not isinstance(settings, dict):
            return settings
        fields = cls.model_fields.items()
        return settings | {key: read_text(settings[key], field.annotation) for key, field in fields if key in settings}
