#!/usr/bin/env bash
# Train: MVSS-Net, Chen et al., ICCV 2021.
# Settings of IMDL-BenCo's script. Its ImageNet weights are downloaded once.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_mvssnet.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_mvssnet}

. "$(dirname "$0")/launch.sh"
launch train.py --model MVSSNet --pretrained_base \
    --if_resizing --image_size 512 --edge_mask_width 7 \
    --batch_size 1 --accum_iter 8 --epochs 200 --lr 2e-5 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --if_not_amp \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
