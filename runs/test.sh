#!/usr/bin/env bash
# Test, for any model: every checkpoint of a training run, or the one you name, on several datasets. Model, its flags and
# the size are those of the training.
#   CHECKPOINT=output_mvssnet TEST=runs/test_datasets.json sh runs/test.sh [more flags of test.py]
CHECKPOINT=${CHECKPOINT:?set CHECKPOINT to the output folder of a training, or to a .pth file}
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
[ -d "$CHECKPOINT" ] && RUN=$CHECKPOINT || RUN=$(dirname "$CHECKPOINT")
OUTPUT=${OUTPUT:-$RUN/test}

. "$(dirname "$0")/launch.sh"
launch test.py --test_batch_size 2 --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
