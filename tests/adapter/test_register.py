"""Registration: a type that PEFT knows once the package is imported, and not before."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftType, get_peft_config

from subspace_peft import PROJECTIONS, SubspaceConfig, SubspaceModel
from subspace_peft.adapter.register import add_peft_type, register
from tests.cases import BY_NAME, wrap


def test_the_enum_member():
    member = PeftType.SUBSPACE_PEFT
    assert member is PeftType("SUBSPACE_PEFT") is PeftType["SUBSPACE_PEFT"]
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert str(member.value) == "SUBSPACE_PEFT"


def test_configs_and_models_are_made_of_the_type():
    assert isinstance(get_peft_config({"peft_type": "SUBSPACE_PEFT", "d": 3}), SubspaceConfig)
    assert isinstance(wrap(BY_NAME["mlp"]).base_model, SubspaceModel)
    assert list(PROJECTIONS) == [
        "dense",
        "sparse",
        "fastfood",
        "fastjl",
        "kronecker",
        "basis",
        "coordinate",
        "identity",
    ]


def test_a_name_that_peft_has_taken():
    with pytest.raises(
        RuntimeError, match="The name of a new PEFT type must be free, LORA is a type already; install a version"
    ):
        add_peft_type("LORA")
    with pytest.raises(RuntimeError, match="SUBSPACE_PEFT"):
        register()


def test_a_process_without_the_import(tmp_path):
    wrap(BY_NAME["mlp"]).save_pretrained(tmp_path)
    code = (
        "import sys; from peft import PeftConfig\n"
        "try: PeftConfig.from_pretrained(sys.argv[1])\n"
        "except KeyError as error: print('unknown:', error)\n"
        "import subspace_peft; print(PeftConfig.from_pretrained(sys.argv[1]).d)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["unknown: 'SUBSPACE_PEFT'", "7"]
