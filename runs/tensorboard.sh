#!/usr/bin/env bash
# Curves and images in a browser: of a training, a test or a folder of several, or of several beside each other.
#   sh runs/tensorboard.sh output_mvssnet [output_trufor ...] [flags of tensorboard, such as --port 6007 --bind_all]
. "$(dirname "$0")/launch.sh"

folders=
while [ -d "${1:-}" ]; do
    folders="$folders${folders:+,}$1:$1"
    shift
done
case "$folders" in
    "") echo "error: ${1:-no folder given}: give the output folder of a training or a test" >&2; exit 1 ;;
    *,*) set -- --logdir_spec "$folders" "$@" ;;
    *) set -- --logdir "${folders%%:*}" "$@" ;;
esac
exec "$PYTHON" -m tensorboard.main "$@"
