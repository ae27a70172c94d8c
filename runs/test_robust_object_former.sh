#!/usr/bin/env bash
# Robustness: the newest checkpoint of ObjectFormer, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_object_former/checkpoint-9.pth sh runs/test_robust_object_former.sh [more flags]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_object_former}
OUTPUT=${OUTPUT:-output_object_former/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model ObjectFormer \
    --if_resizing --image_size 224 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
