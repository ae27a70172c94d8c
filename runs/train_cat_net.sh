#!/usr/bin/env bash
# Train: CAT-Net, Kwon et al., WACV 2021 and IJCV 2022.
# Settings of IMDL-BenCo's script (4 GPUs), with what its network saw (input_range imdlbenco). As the authors meant it:
# INPUT_RANGE=authors FITTING=--if_padding, so that the JPEG's own coefficients are read. Needs
# jpeglib.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_cat_net.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_cat_net}
INPUT_RANGE=${INPUT_RANGE:-imdlbenco}
FITTING=${FITTING:---if_resizing}

. "$(dirname "$0")/launch.sh"
launch train.py --model Cat_Net --input_range "$INPUT_RANGE" \
    "$FITTING" --image_size 512 \
    --batch_size 32 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
