"""What every part of the configuration shares."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def changed(self, *names: str) -> list[str]:
        """Those of the keys that are not at their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
