#!/usr/bin/env bash
# Curves and images in a browser: of a training, a test or a folder of several, or of several beside each other.
#   sh runs/tensorboard.sh output_mvssnet [output_trufor ...] [flags of tensorboard, such as --port 6007 --bind_all]
. "$(dirname "$0")/launch.sh"

runs=
while [ -d "${1:-}" ]; do
    runs=$runs${runs:+,}${1#/}:$1    # its name there and its folder
    last=$1
    shift
done
case $runs in
    "") echo "error: ${1:-no folder given}: give the output folder of a training or a test" >&2; exit 1 ;;
    *,*) exec "$PYTHON" -m tensorboard.main --logdir_spec "$runs" "$@" ;;
    *) exec "$PYTHON" -m tensorboard.main --logdir "$last" "$@" ;;
esac
