# Sourced by demo.sh and tests.sh: makes .venv in the repository once, installs requirements.txt when it has changed,
# and sets PYTHON.
# An environment of your own is used as it is: PYTHON=/path/to/python bash runs/demo.sh
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$REPOSITORY/.venv/bin/python
    wanted=$(cksum < "$REPOSITORY/requirements.txt")
    if [ "$wanted" != "$(cat "$REPOSITORY/.venv/installed" 2>/dev/null)" ]; then
        echo "installing requirements.txt into $REPOSITORY/.venv (PyTorch is large: this takes minutes)"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: python3 is missing or older than 3.10: install a newer one" >&2
            exit 1
        }
        [ -x "$PYTHON" ] || python3 -m venv "$REPOSITORY/.venv" || exit 1
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$REPOSITORY/requirements.txt" || exit 1
        echo "$wanted" > "$REPOSITORY/.venv/installed"
    fi
fi
export PYTHON
