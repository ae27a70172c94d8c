#!/usr/bin/env bash
# Train: PSCC-Net, Liu et al., IEEE TCSVT 2022.
# Settings of IMDL-BenCo's script. Its ImageNet weights of the HRNet are downloaded once.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_pscc_net.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_pscc_net}

. "$(dirname "$0")/launch.sh"
launch train.py --model PSCC_Net --pretrain_path timm \
    --if_resizing --image_size 256 --if_predict_label \
    --batch_size 16 --epochs 150 --lr 1e-4 --min_lr 0 --weight_decay 0.05 --warmup_epochs 2 \
    --if_not_amp \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
