#!/usr/bin/env bash
# Masks: what MyConvNeXt's newest checkpoint, or the one you name, predicts for a dataset or a plain folder of pictures.
#   TEST=my_photos CHECKPOINT=output_myconvnext/checkpoint-9.pth sh runs/save_images_myconvnext.sh [more flags]
TEST=${TEST:?set TEST to a dataset or a folder of pictures}
CHECKPOINT=${CHECKPOINT:-output_myconvnext}
OUTPUT=${OUTPUT:-output_myconvnext/images}

. "$(dirname "$0")/launch.sh"
launch save_images.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
