#!/usr/bin/env bash
# Train: The template model, one convolution: to see that everything runs.
# Data: any. Minutes on a CPU.
#   DATA=CASIA2 TEST=CASIA1 sh runs/train_mymodel.sh [more flags of train.py]
DATA=${DATA:?set DATA to the training set: folder with Tp/ and Gt/, or a JSON}
TEST=${TEST:?set TEST to the test set, or a JSON of several}
OUTPUT=${OUTPUT:-output_mymodel}

. "$(dirname "$0")/launch.sh"
launch train.py --model MyModel \
    --if_resizing --image_size 256 \
    --batch_size 8 --epochs 10 --lr 1e-3 --warmup_epochs 1 --test_period 2 \
    --data_path "$DATA" --test_data_path "$TEST" --output_dir "$OUTPUT" "$@"
