"""Card: the note in an adapter's model card that says how to load it."""

from __future__ import annotations

import os


NOTE = """
## How to load this adapter

This is a [subspace_peft](https://pypi.org/project/subspace-peft/) adapter: PEFT knows its type once the package has
been imported (`pip install subspace-peft`).

```python
import subspace_peft  # makes the adapter type SUBSPACE_PEFT known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or Hub id of this adapter")
```
"""


def add_note(folder: str) -> None:
    """Append the note to the README.md in this folder, if there is one without it."""
    card = os.path.join(folder, "README.md")
    if not os.path.isfile(card):
        return
    with open(card, encoding="utf-8") as file:
        text = file.read()
    if NOTE.strip() not in text:
        with open(card, "a", encoding="utf-8") as file:
            file.write(NOTE)
