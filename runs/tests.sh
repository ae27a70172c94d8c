#!/usr/bin/env bash
# All tests, on the CPU: `bash runs/tests.sh`; flags go to pytest: `bash runs/tests.sh -m "not slow"`.
. "$(dirname "$0")/setup.sh"
cd "$REPOSITORY" && exec "$PYTHON" -m pytest "$@"
