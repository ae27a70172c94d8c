#!/usr/bin/env bash
# Robustness, for any model: the best checkpoint of a training run, or the one you name, under blur, noise and JPEG
# compression. Model, its flags and the size are those of the training.
#   CHECKPOINT=output_mvssnet TEST=CASIA1 sh runs/test_robust.sh [more flags of test_robust.py]
CHECKPOINT=${CHECKPOINT:?set CHECKPOINT to the output folder of a training, or to a .pth file}
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
[ -d "$CHECKPOINT" ] && RUN=$CHECKPOINT || RUN=$(dirname "$CHECKPOINT")
OUTPUT=${OUTPUT:-$RUN/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
