"""Registration: makes SUBSPACE_PEFT a type that PEFT knows."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import SubspaceConfig
from .model import SubspaceModel


NAME = "subspace_peft"


def add_peft_type(name: str) -> None:
    """Add a member to the enum of PEFT's types, which `register_peft_method` requires and nothing else can give."""
    if name in PeftType.__members__:
        raise RuntimeError(
            f"PEFT has a type of its own called {name}; install a version of subspace_peft made for it."
        )
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def register() -> None:
    """Make SubspaceConfig and SubspaceModel PEFT's for this type.

    Raises:
        RuntimeError: if PEFT has taken the name itself.
    """
    add_peft_type(NAME.upper())
    register_peft_method(name=NAME, config_cls=SubspaceConfig, model_cls=SubspaceModel)
