#!/usr/bin/env bash
# Masks: what Cat_Net's newest checkpoint, or the one you name, predicts for a dataset or a plain folder of pictures.
#   TEST=my_photos CHECKPOINT=output_cat_net/checkpoint-9.pth sh runs/save_images_cat_net.sh [more flags]
TEST=${TEST:?set TEST to a dataset or a folder of pictures}
CHECKPOINT=${CHECKPOINT:-output_cat_net}
OUTPUT=${OUTPUT:-output_cat_net/images}
INPUT_RANGE=${INPUT_RANGE:-imdlbenco}
FITTING=${FITTING:---if_resizing}

. "$(dirname "$0")/launch.sh"
launch save_images.py --model Cat_Net --input_range "$INPUT_RANGE" \
    "$FITTING" --image_size 512 --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
