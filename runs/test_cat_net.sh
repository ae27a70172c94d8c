#!/usr/bin/env bash
# Test: every checkpoint of a training run of Cat_Net on several datasets.
#   TEST=runs/test_datasets.json CHECKPOINT=output_cat_net sh runs/test_cat_net.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_cat_net}
OUTPUT=${OUTPUT:-output_cat_net/test}
INPUT_RANGE=${INPUT_RANGE:-imdlbenco}
FITTING=${FITTING:---if_resizing}

. "$(dirname "$0")/launch.sh"
launch test.py --model Cat_Net --input_range "$INPUT_RANGE" \
    "$FITTING" --image_size 512 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
