#!/usr/bin/env bash
# Test: every checkpoint of a training run of MyModel on several datasets.
#   TEST=runs/test_datasets.json CHECKPOINT=output_mymodel sh runs/test_mymodel.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_mymodel}
OUTPUT=${OUTPUT:-output_mymodel/test}

. "$(dirname "$0")/launch.sh"
launch test.py --model MyModel \
    --if_resizing --image_size 256 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
