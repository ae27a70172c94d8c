#!/usr/bin/env bash
# Robustness: the newest checkpoint of MyConvNeXt, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_myconvnext/checkpoint-9.pth sh runs/test_robust_myconvnext.sh [more flags]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_myconvnext}
OUTPUT=${OUTPUT:-output_myconvnext/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
