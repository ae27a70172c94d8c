#!/usr/bin/env bash
# Masks: what MyModel's best checkpoint, or the one you name, predicts for a dataset or a folder of images.
#   TEST=my_photos CHECKPOINT=output_mymodel/checkpoint-9.pth sh runs/save_images_mymodel.sh [more flags]
TEST=${TEST:?set TEST to a dataset or a folder of images}
CHECKPOINT=${CHECKPOINT:-output_mymodel}
OUTPUT=${OUTPUT:-output_mymodel/images}

. "$(dirname "$0")/launch.sh"
launch save_images.py --model MyModel \
    --if_resizing --image_size 256 --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
