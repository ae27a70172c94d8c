#!/usr/bin/env bash
# Test: every checkpoint of a training run of ObjectFormer on several datasets.
#   TEST=runs/test_datasets.json CHECKPOINT=output_object_former sh runs/test_object_former.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_object_former}
OUTPUT=${OUTPUT:-output_object_former/test}

. "$(dirname "$0")/launch.sh"
launch test.py --model ObjectFormer \
    --if_resizing --image_size 224 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
