"""The model card: it says how the adapter is loaded."""

from peft import PeftModel

from subspace_peft.adapter.card import NOTE, add_note
from tests.cases import BY_NAME, wrap


def test_the_model_card_says_what_to_import(tmp_path):
    case = BY_NAME["mlp"]
    wrap(case).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import subspace_peft  # makes the adapter type SUBSPACE_PEFT known to PEFT" in card
    assert "library_name: peft" in card
    PeftModel.from_pretrained(case.model(), tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import subspace_peft") == 1


def test_the_note_is_appended_once_and_only_to_a_card(tmp_path):
    add_note(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text("A card.\n")
    for _ in range(2):
        add_note(tmp_path)
        assert (tmp_path / "README.md").read_text() == "A card.\n" + NOTE
