#!/usr/bin/env bash
# Test: every checkpoint of a training run of MVSSNet on several datasets.
# IMDL-BenCo tests this model with dropout on and batch statistics: give --no_model_eval to compare with its table.
#   TEST=runs/test_datasets.json CHECKPOINT=output_mvssnet sh runs/test_mvssnet.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_mvssnet}
OUTPUT=${OUTPUT:-output_mvssnet/test}

. "$(dirname "$0")/launch.sh"
launch test.py --model MVSSNet \
    --if_resizing --image_size 512 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
