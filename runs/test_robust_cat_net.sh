#!/usr/bin/env bash
# Robustness: the newest checkpoint of Cat_Net, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_cat_net/checkpoint-9.pth sh runs/test_robust_cat_net.sh [more flags of test_robust.py]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_cat_net}
OUTPUT=${OUTPUT:-output_cat_net/robust}
INPUT_RANGE=${INPUT_RANGE:-imdlbenco}
FITTING=${FITTING:---if_resizing}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model Cat_Net --input_range "$INPUT_RANGE" \
    "$FITTING" --image_size 512 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
