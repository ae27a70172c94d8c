#!/usr/bin/env bash
# Masks, for any model: what the best checkpoint of a training run, or the one you name, predicts for a dataset, a plain
# folder of images or one image. Model, its flags and the size are those of the training.
#   CHECKPOINT=output_mvssnet TEST=my_photos sh runs/save_images.sh [more flags of save_images.py]
CHECKPOINT=${CHECKPOINT:?set CHECKPOINT to the output folder of a training, or to a .pth file}
TEST=${TEST:?set TEST to a dataset, a folder of images or an image}
[ -d "$CHECKPOINT" ] && RUN=$CHECKPOINT || RUN=$(dirname "$CHECKPOINT")
OUTPUT=${OUTPUT:-$RUN/images}

. "$(dirname "$0")/launch.sh"
launch save_images.py --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
