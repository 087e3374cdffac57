# Sourced by tests/run.sh and recipes/quickstart.sh: `environment <extras>` makes and activates a virtual environment in
# $VENV (default .venv) with the exact versions of tests/constraints.txt. It is quick where nothing has changed since.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

environment() {
    local extras=$1 python=${PYTHON:-python3} stamp wanted
    if [ ! -x "$venv/bin/python" ]; then
        if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
            echo "Python must be 3.11, 3.12 or 3.13, got $("$python" --version); set PYTHON to one of these." >&2
            return 1
        fi
        "$python" -m venv "$venv"
    fi
    source "$venv/bin/activate"
    stamp=$venv/installed-$extras
    wanted=$(cat "$root/pyproject.toml" "$root/tests/constraints.txt" <(echo "$root") | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing subspace_peft[$extras] into $venv, once ..." >&2
        # torch first and alone: where a build for the CPU is offered it is taken, and nothing of CUDA comes with it.
        pip install --quiet -c "$root/tests/constraints.txt" torch
        pip install --quiet -c "$root/tests/constraints.txt" -e "$root[$extras]"
        echo "$wanted" > "$stamp"
    fi
}
