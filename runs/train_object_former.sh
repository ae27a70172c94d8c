#!/usr/bin/env bash
# Train: ObjectFormer, Wang et al., CVPR 2022, as reproduced by IMDL-BenCo.
# Settings of IMDL-BenCo's script. Its weights of the transformer blocks are unpublished; --init_weight_path takes such
# a file.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_object_former.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_object_former}

. "$(dirname "$0")/launch.sh"
launch train.py --model ObjectFormer \
    --if_resizing --image_size 224 \
    --batch_size 12 --accum_iter 8 --epochs 1100 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
