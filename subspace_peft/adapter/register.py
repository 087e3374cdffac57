"""Registration: making SUBSPACE_PEFT a type that PEFT knows."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import SubspaceConfig
from .model import SubspaceModel


NAME = "subspace_peft"


def add_peft_type(name: str) -> None:
    """Add a member to the enum of PEFT's types. `register_peft_method` requires one, and PEFT offers no way to add it.

    Raises:
        RuntimeError: if PEFT already has a type of this name.
    """
    if name in PeftType.__members__:
        raise RuntimeError(
            f"The name of a new PEFT type must be free, {name} is a type already; install a version of subspace_peft "
            "made for this PEFT."
        )
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def register() -> None:
    """Register SubspaceConfig and SubspaceModel with PEFT for this type.

    Raises:
        RuntimeError: if PEFT already has a type of this name.
    """
    add_peft_type(NAME.upper())
    register_peft_method(name=NAME, config_cls=SubspaceConfig, model_cls=SubspaceModel)
