#!/usr/bin/env bash
# All experiments; --quick for a few, --all for everything, --list for their flags (see experiments/runs.py).
set -euo pipefail
cd "$(dirname "$0")"
exec python -m experiments.runs "$@"
