#!/usr/bin/env bash
# Makes an environment and measures the intrinsic dimension of scikit-learn's digits: `bash recipes/quickstart.sh`, from
# anywhere; no data to fetch. Results, figure and adapter go to .quickstart/; arguments go to recipes/run.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../tests/environment.sh"
environment recipes
cd "$root"
accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run.py recipes/intrinsic_dimension/digits.yaml \
    --workers 2 --output .quickstart "$@"
