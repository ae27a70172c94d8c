#!/usr/bin/env bash
# Masks: what IML_ViT's newest checkpoint, or the one you name, predicts for a dataset or a plain folder of pictures.
#   TEST=my_photos CHECKPOINT=output_iml_vit/checkpoint-9.pth sh runs/save_images_iml_vit.sh [more flags]
TEST=${TEST:?set TEST to a dataset or a folder of pictures}
CHECKPOINT=${CHECKPOINT:-output_iml_vit}
OUTPUT=${OUTPUT:-output_iml_vit/images}

. "$(dirname "$0")/launch.sh"
launch save_images.py --model IML_ViT --edge_lambda 20 \
    --if_padding --image_size 1024 --test_batch_size 2 --save_overlay \
    --test_data_path "$TEST" --checkpoint_path "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
