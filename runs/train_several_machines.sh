#!/usr/bin/env bash
# Train on several machines: start this on each of them, with the same dataset and repository in place.
#   export NNODES=2 MASTER_ADDR=10.0.0.1 NPROC=8 DATA=... TEST=...    # on both; then
#   NODE_RANK=0 sh runs/train_several_machines.sh    # on the first machine, that of MASTER_ADDR
#   NODE_RANK=1 sh runs/train_several_machines.sh    # on the second
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_several_machines}
NNODES=${NNODES:?set NNODES to the number of machines}

. "$(dirname "$0")/launch.sh"
launch train.py --model MyConvNeXt --backbone convnext_tiny \
    --if_resizing --image_size 512 \
    --batch_size 8 --epochs 50 --lr 1e-4 --min_lr 5e-7 --weight_decay 0.05 --warmup_epochs 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
