"""What every group of keys is: a frozen record that refuses what it does not know."""

from pydantic import BaseModel, ConfigDict

Scalar = bool | int | float | str | None


class Frozen(BaseModel):
    """A record that cannot be changed and refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )
