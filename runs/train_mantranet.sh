#!/usr/bin/env bash
# Train: ManTra-Net, Wu et al., CVPR 2019.
# Settings of IMDL-BenCo's script, with the right loss (--double_sigmoid brings back its own). It starts from the
# authors' weights with --resume MantraNetv4.pt (from ManTraNet-pytorch, non-commercial use only). Batches of one,
# because a mask depends on the other images of its batch.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_mantranet.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_mantranet}

. "$(dirname "$0")/launch.sh"
launch train.py --model MantraNet \
    --if_resizing --image_size 512 \
    --batch_size 1 --accum_iter 8 --epochs 200 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --test_batch_size 1 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
