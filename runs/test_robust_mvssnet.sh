#!/usr/bin/env bash
# Robustness: the newest checkpoint of MVSSNet, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_mvssnet/checkpoint-9.pth sh runs/test_robust_mvssnet.sh [more flags of test_robust.py]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_mvssnet}
OUTPUT=${OUTPUT:-output_mvssnet/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model MVSSNet \
    --if_resizing --image_size 512 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
