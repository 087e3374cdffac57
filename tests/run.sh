#!/usr/bin/env bash
# Makes the environment and passes the tests: `bash tests/run.sh [arguments of pytest]`, from anywhere.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test
cd "$root"
ruff check
ruff format --check
python -m pytest "$@"
