#!/usr/bin/env bash
# Builds the wheel, installs it in a clean environment with the versions of tests/constraints.txt, and runs the README's
# example from it in an empty folder: `bash tests/wheel.sh`, from anywhere. All of it lies in a temporary folder.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH # nothing may be imported from the checkout

# A copy, because a build in the checkout would add what an earlier build left in build/.
mkdir "$work/source" "$work/empty"
cp -R "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/subspace_peft" "$work/source"
find "$work/source" -name __pycache__ -prune -exec rm -rf {} +
cp -R "$work/source/subspace_peft" "$work/expected"

"${PYTHON:-python3}" -m venv "$work/venv"
source "$work/venv/bin/activate"
pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work/source"
# torch first and alone, as in environment.sh: where a build for the CPU is offered it is taken.
pip install --quiet -c "$root/tests/constraints.txt" torch
pip install --quiet -c "$root/tests/constraints.txt" "$work"/dist/*.whl

cd "$work/empty"
installed=$(python -c 'import importlib.util as util; print(*util.find_spec("subspace_peft").submodule_search_locations)')
case $installed in
    "$work"/venv/*) ;;
    *) echo "subspace_peft must be imported from the wheel, got $installed; unset what puts that on the path." >&2; exit 1 ;;
esac
if ! diff -r -x __pycache__ "$work/expected" "$installed" >&2; then
    echo "The wheel must hold the files of subspace_peft/ and no others; see [tool.setuptools] in pyproject.toml." >&2
    exit 1
fi
if [ ! -f "$installed/py.typed" ]; then
    echo "The wheel must hold py.typed, which tells type checkers that the package is typed; add it again." >&2
    exit 1
fi

python - "$root/README.md" > example.py <<'EXTRACT'
import re
import sys

with open(sys.argv[1], encoding="utf-8") as readme:
    print("\n".join(re.findall(r"^```python\n(.*?)^```$", readme.read(), re.MULTILINE | re.DOTALL)))
EXTRACT
HF_HUB_OFFLINE=1 python example.py
test -s adapter/adapter_model.safetensors
echo "The README's example runs from the wheel."
