#!/usr/bin/env bash
# Robustness: the newest checkpoint of IML_ViT, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_iml_vit/checkpoint-9.pth sh runs/test_robust_iml_vit.sh [more flags of test_robust.py]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_iml_vit}
OUTPUT=${OUTPUT:-output_iml_vit/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model IML_ViT --edge_lambda 20 \
    --if_padding --image_size 1024 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
