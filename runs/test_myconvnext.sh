#!/usr/bin/env bash
# Test: every checkpoint of a training run of MyConvNeXt on several datasets.
#   TEST=runs/test_datasets.json CHECKPOINT=output_myconvnext sh runs/test_myconvnext.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_myconvnext}
OUTPUT=${OUTPUT:-output_myconvnext/test}

. "$(dirname "$0")/launch.sh"
launch test.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
