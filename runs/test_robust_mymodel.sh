#!/usr/bin/env bash
# Robustness: the best checkpoint of MyModel, or the one you name, under blur, noise and JPEG compression.
#   TEST=CASIA1 CHECKPOINT=output_mymodel/checkpoint-9.pth sh runs/test_robust_mymodel.sh [more flags of test_robust.py]
TEST=${TEST:?set TEST to the test set: folder with Tp/ and Gt/, or a JSON}
CHECKPOINT=${CHECKPOINT:-output_mymodel}
OUTPUT=${OUTPUT:-output_mymodel/robust}

. "$(dirname "$0")/launch.sh"
launch test_robust.py --model MyModel \
    --if_resizing --image_size 256 --test_batch_size 2 \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
