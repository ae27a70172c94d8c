#!/usr/bin/env bash
# Train: Backbone, a timm model (BACKBONE, default resnet50) with SRM residuals beside the image.
# Protocol-MVSS: CASIA v2 for training, CASIA v1 for testing. The backbone's weights are downloaded once;
# --no-pretrained goes without.
#   BACKBONE=vit_small_patch16_dinov3 DATA=CASIA2 TEST=CASIA1 sh runs/train_backbone.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
BACKBONE=${BACKBONE:-resnet50}
OUTPUT=${OUTPUT:-output_backbone_$BACKBONE}

. "$(dirname "$0")/launch.sh"
launch train.py --model Backbone --backbone "$BACKBONE" --extractor srm --pretrained \
    --if_resizing --image_size 512 \
    --batch_size 8 --accum_iter 1 --epochs 50 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
