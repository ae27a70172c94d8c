#!/usr/bin/env bash
# Train: The tutorial's model, a timm ConvNeXt.
# Data: CASIA v2 for training, CASIA v1 for testing. The backbone's ImageNet weights are downloaded once;
# --no-pretrained goes without.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_myconvnext.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_myconvnext}

. "$(dirname "$0")/launch.sh"
launch train.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 \
    --batch_size 8 --accum_iter 1 --epochs 50 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
