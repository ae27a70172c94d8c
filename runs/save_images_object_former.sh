#!/usr/bin/env bash
# Masks: what ObjectFormer's newest checkpoint, or the one you name, predicts for a dataset or plain folder of pictures.
#   TEST=my_photos CHECKPOINT=output_object_former/checkpoint-9.pth sh runs/save_images_object_former.sh [more flags]
TEST=${TEST:?set TEST to a dataset or a folder of pictures}
CHECKPOINT=${CHECKPOINT:-output_object_former}
OUTPUT=${OUTPUT:-output_object_former/images}

. "$(dirname "$0")/launch.sh"
launch save_images.py --model ObjectFormer \
    --if_resizing --image_size 224 --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
