#!/usr/bin/env bash
# Test: every checkpoint of a training run of IML_ViT on several datasets.
#   TEST=runs/test_datasets.json CHECKPOINT=output_iml_vit sh runs/test_iml_vit.sh [more flags of test.py]
TEST=${TEST:-$(dirname "$0")/test_datasets.json}
CHECKPOINT=${CHECKPOINT:-output_iml_vit}
OUTPUT=${OUTPUT:-output_iml_vit/test}

. "$(dirname "$0")/launch.sh"
launch test.py --model IML_ViT --edge_lambda 20 \
    --if_padding --image_size 1024 --test_batch_size 2 \
    --test_data_json "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
